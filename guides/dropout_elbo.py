"""Dropout's two regularizers, apart (Wei, Kakade and Ma 2020, "The implicit and explicit regularization effects of
dropout").

Dropout minimizes E_ζ U(M ζ), which differs from U(M) by an explicit regularizer; and its gradient has noise of some
covariance C, which regularizes too. With k masks a step the objective stays and the noise is C / k. With weights e of
the explicit part and v of the noise, a step follows

    (1 − e) ∇U(M) + e/k Σ_{i ≤ k} ∇U(M ζ_i) + c (∇U(M ζ_a) − ∇U(M ζ_b)),        c² = (v − e²/k) / 2,

of mean ∇[U(M) + e (E_ζ U(M ζ) − U(M))] and covariance v C: e = v = 1 is plain dropout, e = 1, v = 1/k has little noise,
e = 1, v = 1 with many masks has it knocked in again, and e = 0, v = 1 is the noise alone. To second order the explicit
regularizer is, with H the Gauss-Newton matrix of −log p(D | z) and v_u the part of M that unit u drops,

    R = ½ p / (1 − p) Σ_u v_uᵀ H v_u,

exact for linear regression: ½ p / (1 − p) Σ_j w_j² Σ_i x_ij² / σ².
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bnn.guides._flat import FlatGuide
from bnn.guides.dropout import AutoDropout
from bnn.guides.ensemble_elbo import TraceEnsemble_ELBO
from bnn.model_graph import ModelGraph

# Units whose derivatives are computed at a time.
CHUNK = 64


class TraceDropout_ELBO(TraceEnsemble_ELBO):
    """The loss of :class:`~bnn.guides.AutoDropout` with its explicit regularizer and its noise weighted apart.

    :param masks: k, masks that estimate the explicit part.
    :param explicit: e, from 0 (none) to 1 (dropout's).
    :param noise: v, the gradient noise relative to that of one mask; at least e²/k, the default.
    :param compile: ``"fx"`` or ``"inductor"``, see :mod:`bnn.tiers`.
    :raises ValueError: for settings out of range, or another guide.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoDropout, TraceDropout_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoDropout(model, rate=0.1)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceDropout_ELBO(masks=8, noise=1.0))
    >>> losses = [svi.step(x, x.sin()) for _ in range(20)]
    >>> bool(explicit_regularizer(guide, x, x.sin()) > 0)
    True
    """

    def __init__(
        self, masks: int = 8, *, explicit: float = 1.0, noise: float | None = None, compile: str = "fx"
    ) -> None:
        if not isinstance(masks, int) or isinstance(masks, bool) or masks < 1:
            raise ValueError(f"masks is {masks!r}; give the number of masks per step, at least 1.")
        super().__init__(num_particles=masks, compile=compile)
        if not 0 <= explicit <= 1:
            raise ValueError(f"explicit is {explicit}; give a weight from 0 (no regularizer) to 1 (dropout's).")
        least = explicit**2 / masks
        noise = least if noise is None else noise
        if not least <= noise < math.inf:
            raise ValueError(
                f"noise is {noise}; with explicit={explicit} and {masks} masks it is at least {least:.4g}: give "
                "more, or use more masks."
            )
        self.explicit, self.noise = explicit, noise
        self._knocked_in = math.sqrt((noise - least) / 2)

    def points(self, guide: FlatGuide) -> Tensor:
        """Without mask, with k masks, and with two more whose difference is noise."""
        if not isinstance(guide, AutoDropout):
            raise ValueError(f"TraceDropout_ELBO is for AutoDropout; the guide is {type(guide).__name__}.")
        extra = 2 if self._knocked_in else 0
        return torch.cat([guide.loc[None], guide.particles(self.num_particles + extra)])

    def weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(1 − e, e/k, ...), and in the gradient besides (c, −c)."""
        in_loss = points.new_zeros(len(points))
        in_loss[0] = 1.0 - self.explicit
        in_loss[1 : self.num_particles + 1] = self.explicit / self.num_particles
        in_gradient = in_loss.clone()
        if self._knocked_in:
            in_gradient[-2:] = points.new_tensor([self._knocked_in, -self._knocked_in])
        return in_loss, in_gradient


def explicit_regularizer(guide: AutoDropout, *args: Any, **kwargs: Any) -> Tensor:
    """R, the explicit regularizer of dropout to second order, on the model's arguments.

    Differentiable in ``guide.loc``, with the Fisher information of the likelihood held fixed. Where the model
    subsamples, on the first rows.

    :param guide: dropout over the weights.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :raises NotImplementedError: for a likelihood whose Gauss-Newton matrix is not known, or an unrecordable model.
    """
    if not guide.is_set_up:
        guide(*args, **kwargs)
    graph = ModelGraph(guide.model, args, kwargs, curvature="ggn")
    if graph.graph is None:
        raise NotImplementedError(f"the model cannot be recorded: {graph.cause}.")
    if graph.cannot_label:
        raise NotImplementedError("; ".join(f"site {name!r}: {why}" for name, why in graph.cannot_label.items()) + ".")
    rows = [torch.arange(plate.batch_size, device=graph.structure.device) for plate in graph.plates]
    inputs, loc = graph.inputs((args, kwargs), rows), guide.loc
    unit_of = _units(guide)

    count = int(unit_of.max()) + 1
    with torch.enable_grad():
        # M with its units scaled by s = 1: v_u is the derivative by s_u. The transposed Jacobian's own transpose, as
        # the gradient of a gradient, gives one unit's derivatives of all data at a time.
        scales = torch.ones(count, dtype=loc.dtype, device=loc.device, requires_grad=True)
        position = loc * torch.where(unit_of < 0, 1.0, scales[unit_of.clamp_min(0)])
        terms, _ = graph(guide.constrain(position), inputs, graph.parameters, wanted=lambda key: key[0] == "probe")
        probes = torch.cat([value.reshape(-1) for probe in terms.probes for value in probe.values()])
        direction = torch.zeros_like(probes, requires_grad=True)
        (back,) = torch.autograd.grad(probes, scales, direction, create_graph=True)
        total = loc.new_zeros(())
        for units in torch.eye(count, dtype=loc.dtype, device=loc.device).split(CHUNK):
            (slopes,) = torch.autograd.grad(back, direction, units, create_graph=True, is_grads_batched=True)
            total = total + slopes.square().sum()
    return 0.5 * guide.rate / (1.0 - guide.rate) * total


def _units(guide: AutoDropout) -> Tensor:
    """The number of the unit that each entry of z belongs to, −1 for none."""
    result = torch.full((guide.structure.dim,), -1, device=guide.structure.device)
    first = 0
    for name, dim in guide.unit_dims.items():
        site = guide.structure.sites[name]
        shape = [1] * len(site.shape)
        shape[dim] = count = site.shape[dim]
        numbers = torch.arange(first, first + count, device=result.device).reshape(shape)
        result[site.slice] = numbers.expand(site.shape).reshape(-1)
        first += count
    return result
