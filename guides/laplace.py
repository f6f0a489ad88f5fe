"""Laplace's approximation: a Gaussian at a mode, with the curvature there as its precision.

    q(z) = N(z*, Λ⁻¹),        Λ = Σ_n J_nᵀ F_n J_n + D,

z* the mode of the log joint in unconstrained space, J_n the derivative of the likelihood's parameters at datum n, F_n
their Fisher information, D the curvature of minus the log prior (MacKay 1992; Daxberger et al. 2021). The Gauss-Newton
matrix in place of the Hessian makes Λ positive and is exact for linear models; in a net it is that of the model
linearised at z*, whose predictive (Immer, Korzepa and Bauer 2021) is :meth:`Laplace.linearised`.

Bias: a Gaussian around one mode. Cost: one backward pass per output over all data (two for the eigenbasis), and the
cube of the layers' sides, or of the number of latents for ``"full"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide, init_to_value
from torch import Tensor, nn
from torch.distributions import biject_to

from bnn.guide_draws import model_of
from bnn.guides._auto import KeptGuide
from bnn.guides._base import latent_site
from bnn.guides._blocks import LatentSite
from bnn.guides._evidence import Evidence, maximize
from bnn.guides._laplace_blocks import LaplaceBlock
from bnn.guides._laplace_curvature import STRUCTURES
from bnn.guides._laplace_fit import CURVATURES, Fit
from bnn.guides._linearised import Outputs, outputs_of, prediction_of
from bnn.minibatch import Arguments


class Laplace(KeptGuide):
    """A Gaussian around a point estimate, whose precision is the curvature of the log joint there.

    It is a guide of Pyro's: ``bnn.predict``, ``bnn.to_arviz``, ``Predictive`` and ELBOs take it. Sites that are not in
    ``sites`` stay at their point. Constrained sites have their Gaussian in unconstrained space.

    * ``"diagonal"``, ``"kronecker"``, ``"eigenbasis"`` and ``"full"`` are the structures of the precision. The middle
      two give each weight matrix a Gaussian of its own, and each vector (a bias) a full matrix.
    * ``"ggn"`` is the exact Gauss-Newton matrix, for Normal, Student-t, Bernoulli, Categorical and Poisson laws;
      ``"sampled"`` its estimate from drawn labels, for all others; ``"empirical"`` the observed labels (biased);
      ``"hessian"`` the Hessian of minus the log-likelihood, for ``"full"`` and ``"diagonal"``, which may not be
      positive. Sites that a Gauss-Newton matrix does not see, such as a noise, have their Hessian.

    :param guide: a fitted guide with a ``median``, such as ``AutoDelta``; or a Pyro model, with ``point``.
    :param structure: of the precision.
    :param sites: names; ``"last layer"`` (what the outputs are linear in); or None for all.
    :param point: values of all sites, in place of the guide's median.
    :param curvature: of the likelihood.
    :param label_samples: draws of the labels per datum, for ``"sampled"``.
    :raises ValueError: for wrong settings.

    A regression net, its noise learned with it:

    >>> import bnn, pyro, torch
    >>> from pyro.infer import SVI
    >>> from pyro.infer.autoguide import AutoDelta
    >>> from bnn.guides import Laplace, NaturalGradientDescent, TraceNaturalGradient_ELBO
    >>> x = torch.linspace(-2, 2, 60).unsqueeze(-1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1))
    >>> guide = AutoDelta(model)
    >>> svi = SVI(model, guide, NaturalGradientDescent(lr=0.5), TraceNaturalGradient_ELBO("ggn"))
    >>> losses = [svi.step(x, x.sin()) for _ in range(1000)]
    >>> posterior = Laplace(guide, "full").fit(x, x.sin())
    >>> posterior.linearised(torch.tensor([[0.], [9.]])).epistemic.flatten().round(decimals=1)  # here and far away
    tensor([0.0000, 1.0000])

    A classifier:

    >>> pyro.clear_param_store()  # an AutoDelta of the same class has parameters of the same names
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Categorical())
    >>> guide, labels = AutoDelta(model), (x[:, 0] > 0).long()
    >>> svi = SVI(model, guide, NaturalGradientDescent(lr=0.5), TraceNaturalGradient_ELBO("ggn"))
    >>> losses = [svi.step(x, labels) for _ in range(200)]
    >>> posterior = Laplace(guide, "kronecker").fit(x, labels)
    >>> bnn.predict(posterior, x).labels.equal(labels), posterior.linearised(x).labels.equal(labels)
    (True, True)
    """

    def __init__(
        self,
        guide: Any,
        structure: Literal["diagonal", "kronecker", "eigenbasis", "full"] = "kronecker",
        *,
        sites: Sequence[str] | Literal["last layer"] | None = None,
        point: Mapping[str, Tensor] | None = None,
        curvature: Literal["ggn", "sampled", "empirical", "hessian"] = "ggn",
        label_samples: int = 1,
    ) -> None:
        is_guide = isinstance(guide, AutoGuide)
        if not callable(guide) or not (is_guide or point is not None):
            raise ValueError(
                f"guide is {type(guide).__name__}; give a fitted guide such as pyro.infer.autoguide.AutoDelta, or a "
                "model with point=, the values of its sites."
            )
        for name, value, known in (("structure", structure, STRUCTURES), ("curvature", curvature, CURVATURES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, known))}.")
        if curvature == "hessian" and structure in ("kronecker", "eigenbasis"):
            raise ValueError(
                f"structure={structure!r} has no Hessian: give structure='full' or 'diagonal', or curvature='ggn'."
            )
        if not isinstance(label_samples, int) or label_samples < 1:
            raise ValueError(f"label_samples is {label_samples!r}; give the number of draws of the labels, 1 or more.")
        super().__init__(model_of(guide) if is_guide else guide)
        self.structure, self.curvature, self.label_samples = structure, curvature, label_samples
        self._asked = sites if sites is None or isinstance(sites, str) else tuple(sites)
        # In a tuple, so that the parameters of the guide are not this one's.
        self._source = (guide if is_guide and point is None else None, dict(point or {}))
        self._blocks = nn.ModuleList()
        self._points = nn.Module()
        self._sites: dict[str, LatentSite] = {}
        self._evidence: Evidence | None = None

    # ---- fitting

    def fit(self, *args: Any, batches: Iterable[Any] | None = None, **kwargs: Any) -> Laplace:
        """Sum the curvature over all data, each datum once, whatever minibatches the model's plates draw.

        :param args: arguments of the model: all data.
        :param batches: in place of them an iterable of the model's arguments, such as a ``DataLoader``.
        :param kwargs: keyword arguments of the model.
        :returns: itself.
        :raises ValueError: for unknown sites, data that do not suit, or a full matrix that would not fit into memory.
        :raises RuntimeError: if the precision is not positive definite.
        :raises NotImplementedError: for discrete latents, and latents inside of subsampled plates.
        """
        guide, given = self._source
        fit = Fit(self.model, self.structure, self.curvature, self.label_samples, args, kwargs, batches)
        if guide is None and not given:
            raise RuntimeError("this Laplace was pickled before it was fitted and lost its guide: make it anew.")
        values = dict(given if guide is None else _median(guide, fit.example))
        point = fit.unconstrained(values)
        self._init = init_to_value(values=values)
        self._setup_prototype(*fit.example[0], **fit.example[1])
        prototype: Any = self.prototype_trace
        sites = {name: latent_site(name, node) for name, node in prototype.iter_stochastic_nodes()}
        included = fit.choose(self._asked, list(sites))
        blocks = fit.run({name: sites[name] for name in included}, point)
        self._sites, self._evidence = sites, fit.evidence
        self._points, self._blocks = nn.Module(), nn.ModuleList(blocks)
        for number, value in enumerate(point.values()):
            self._points.register_buffer(str(number), value.clone())
        self._settle(fit.evidence.prior(None), None)
        fit.check_mode(blocks)
        return self

    def _settle(self, prior: dict[str, Tensor], noise: float | None) -> None:
        evidence = self._fitted("prior precisions")
        for block in self.blocks:
            block.settle(prior, float(evidence.weight(noise)))
        self._prior, self._noise = prior, noise

    def _fitted(self, what: str) -> Evidence:
        if self._evidence is None:
            raise RuntimeError(f"{what} needs the curvature at the mode: call fit(x, y) first.")
        return self._evidence

    @property
    def blocks(self) -> list[LaplaceBlock]:
        """The blocks of latent sites that share a Gaussian; empty before :meth:`fit`."""
        return list(self._blocks)  # type: ignore[arg-type]

    @property
    def is_set_up(self) -> bool:
        """Whether :meth:`fit` was called."""
        return self._evidence is not None

    def _loc(self) -> dict[str, Tensor]:
        self._fitted("the posterior")
        return dict(zip(self._sites, self._points.buffers(), strict=True))

    # ---- evidence

    @property
    def prior_precision(self) -> dict[str, Tensor]:
        """Precisions of the Normal priors, as used: site -> one for each entry."""
        names = self._fitted("prior_precision").precisions
        return {name: self._prior[name].reshape(self._sites[name].shape) for name in names}

    def log_marginal_likelihood(
        self, *, prior_precision: float | Mapping[str, Any] | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """The log evidence log ∫ p(D, z) dz of the sites of the approximation, at the values of the others; in nats.

        The mode stays where it is, whatever the arguments. It can be differentiated by them.

        :param prior_precision: of the Normal priors, in place of the model's own: one number for all sites, or site ->
            one number or one for each entry. Means of the priors stay.
        :param noise: standard deviation of the Normal likelihood, in place of the model's own.
        :raises ValueError: if a prior or the likelihood is of another kind.
        """
        evidence = self._fitted("log_marginal_likelihood")
        prior = self._prior if prior_precision is None else evidence.prior(prior_precision)
        return evidence(self.blocks, prior, evidence.weight(self._noise if noise is None else noise))

    def optimize_marginal_likelihood(
        self, prior: Literal["global", "site"] | None = "global", *, noise: bool = False, steps: int = 100
    ) -> float:
        """Choose prior precisions and noise at which the evidence is largest, and use them from now on.

        The mode is not moved. A prior is changed by a factor: priors that differ, by fan-in say, keep their ratios.

        :param prior: ``"global"``: one factor for all Normal priors; ``"site"``: one for each; None: leave them.
        :param noise: whether the noise is chosen too: it must be a site of the model that is not in ``sites``.
        :param steps: at most so many iterations of L-BFGS.
        :returns: the log evidence.
        :raises ValueError: if there is nothing to choose, or the noise is a number written in the model.
        """
        evidence = self._fitted("optimize_marginal_likelihood")
        if prior not in ("global", "site", None):
            raise ValueError(f"prior is {prior!r}; give 'global', 'site' or None.")
        names = list(evidence.precisions)
        groups = {"global": [names], "site": [[name] for name in names], None: []}[prior]
        if not (noise or prior) or (prior and not names):
            raise ValueError("there is nothing to choose: no site has a Normal prior, and noise is False.")
        start = None
        if noise:
            start = float(evidence.noise.scale) if not isinstance(evidence.noise, str) else evidence.weight(1.0)
            if evidence.noise.site is None:  # type: ignore[union-attr]
                raise ValueError(
                    "the noise is a number written in the model, and predictions would keep it: make it a site, such "
                    "as bnn.likelihoods.Gaussian(dist.HalfNormal(1.0)), and leave it out of sites=."
                )
            start = self._noise or start
        found, sd, value = maximize(evidence, self.blocks, self._prior, groups, start, steps)
        self._settle(found, self._noise if sd is None else sd)
        if sd is not None:
            site = evidence.noise.site  # type: ignore[union-attr]
            loc = self._loc()[site]
            loc.copy_(biject_to(self._sites[site].support).inv(torch.full_like(loc, sd)))
        return value

    # ---- what Pyro asks for

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites.

        :returns: site -> value.
        """
        loc, result = self._loc(), {}
        plates = self._create_plates(*args, **kwargs)
        for block in self.blocks:
            result.update(block.sample(loc, plates))
        for name in self._sites.keys() - result.keys():
            site = self._sites[name]
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                value = biject_to(site.support)(loc[name])
                result[name] = pyro.sample(name, dist.Delta(value, event_dim=site.event_dim))
        return {name: result[name] for name in self._sites}

    @torch.no_grad()
    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Many draws at once: site -> values ``(num_samples, *shape)``."""
        loc = self._loc()
        flat = {name: value.expand(num_samples, *value.shape) for name, value in loc.items()}
        for block in self.blocks:
            noise = torch.randn(num_samples, block.numel, dtype=block.like.dtype, device=block.like.device)
            for name, deviation in block.split(block.spread(noise)).items():
                flat[name] = loc[name] + deviation
        return {name: biject_to(self._sites[name].support)(value) for name, value in flat.items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The mode: site -> tensor."""
        return {name: biject_to(self._sites[name].support)(loc.clone()) for name, loc in self._loc().items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each entry of each site, with a leading dimension for the quantiles."""
        loc = self._loc()
        sd = {name: torch.zeros_like(value) for name, value in loc.items()}
        for block in self.blocks:
            sd |= block.split(block.variance().sqrt())
        results = {}
        for name, value in loc.items():
            levels = torch.as_tensor(quantiles, dtype=value.dtype, device=value.device)
            normal = torch.special.ndtri(levels).reshape((-1,) + (1,) * value.dim())
            results[name] = biject_to(self._sites[name].support)(value + sd[name] * normal)
        return results

    # ---- the linearised predictive

    def outputs(self, *args: Any, **kwargs: Any) -> dict[str, Outputs]:
        """The law N(f(x), J Λ⁻¹ Jᵀ) of the net's outputs in the model linearised at the mode, by predicted site.

        Outputs are the locations of Normal laws, the logits of Bernoulli laws, the log probabilities of classes.

        :param args: arguments of the model: new inputs.
        :param kwargs: its keyword arguments.
        :raises NotImplementedError: for other likelihoods.
        """
        loc = self._loc()
        return outputs_of(self.model, loc, self.median(), self.blocks, args, kwargs)

    def linearised(
        self, *args: Any, link: Literal["sampled", "probit"] = "sampled", num_samples: int = 1000, **kwargs: Any
    ) -> Any:
        """The predictive of the model linearised at the mode, as a :class:`bnn.Prediction`.

        Means and variances of Normal laws are in closed form; a noise among the sites counts by its mode. Classes
        average their probabilities over draws of the outputs, or by the probit approximation: σ(m / √(1 + πv/8)) with
        mean m and variance v of a logit, for several classes of all differences of two (Lu, Ie and Sha 2020).

        :param args: arguments of the model: new inputs.
        :param link: for classes.
        :param num_samples: draws of the outputs, for ``"sampled"``.
        :param kwargs: keyword arguments of the model.
        :returns: a prediction; with several predicted sites a dict of them, by name.
        """
        if link not in ("sampled", "probit"):
            raise ValueError(f"link is {link!r}; give 'sampled' or 'probit'.")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}; give the number of draws of the outputs, at least 1.")
        found = {
            name: prediction_of(name, outputs, link, num_samples)
            for name, outputs in self.outputs(*args, **kwargs).items()
        }
        return next(iter(found.values())) if len(found) == 1 else found

    def __getstate__(self) -> dict[str, Any]:
        # The guide is no longer needed; Pyro's own would lose its model by being pickled.
        state = super().__getstate__()
        return {**state, "_source": (None, self._source[1])}


def _median(guide: AutoGuide, example: Arguments) -> Mapping[str, Tensor]:
    try:
        return guide.median(*example[0], **example[1])
    except NotImplementedError:
        raise ValueError(
            f"guide {type(guide).__name__} has no median: give point=, the values of all sites at the mode."
        ) from None
