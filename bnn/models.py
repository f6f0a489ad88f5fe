"""A Pyro model out of a net, a prior and a likelihood.

w ~ prior,    y_i | x_i, w ~ likelihood(net_w(x_i)),    i = 1 ... N
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from bnn.likelihoods import Likelihood
from bnn.net_checks import Seen, check_inputs, check_names, check_net, check_outputs, check_rows, check_sizes, copied
from bnn.net_parameters import parameters_of
from bnn.prior_rules import priors_of
from bnn.priors import FanIn, Fixed

Inputs = Tensor | Sequence[Tensor]


def bayesian(
    net: nn.Module,
    *,
    prior: Any = None,
    likelihood: Likelihood,
    batch_size: int | None = None,
    num_data: int | None = None,
) -> BayesianNet:
    """Make a Pyro model of a net: its parameters become sites with a prior, its outputs the law of the targets.

    :param net: any ``nn.Module`` that maps one batch of inputs, or several tensors of inputs, to one tensor whose first
        dimension counts the rows. It is copied, and itself left alone; its mode (``train()`` or ``eval()``) is kept.
    :param prior: of :mod:`bnn.priors`: one for all parameters (by default ``FanIn()``), a mapping such as
        ``{"*.bias": Normal(1.0), "*": FanIn()}`` from patterns of parameter names, or a list of pairs whose first is
        such a pattern or a function of module and parameter name that says whether it applies. The first match counts.
        Whether a parameter requires gradients is not looked at: to keep one, give it ``Fixed()``.
    :param likelihood: of :mod:`bnn.likelihoods`.
    :param batch_size: draw minibatches of so many rows, in the plate ``"data"``; fewer data are used as a whole.
    :param num_data: number of rows of all data, if what the model is called with is one batch of a loader.
    :raises ValueError: if the net, the prior or the numbers do not suit, saying why.
    :returns: the model, to be called with ``(x, y)``.

    >>> import bnn, torch
    >>> from bnn.kernels import MCMC, SGLD
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1), batch_size=10)
    >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> mcmc = MCMC(SGLD(model, step_size=1e-5), num_samples=20, disable_progbar=True)
    >>> mcmc.run(x, x.sin())
    >>> {name: tuple(draws.shape) for name, draws in mcmc.get_samples().items()}
    {'0.weight': (20, 20, 1), '0.bias': (20, 20), '2.weight': (20, 1, 20), '2.bias': (20, 1)}
    """
    return BayesianNet(net, prior=prior, likelihood=likelihood, batch_size=batch_size, num_data=num_data)


class BayesianNet:
    """The Pyro model that :func:`bayesian` makes: ``model(x, y=None, mask=None)``.

    Sites are the parameters' own names, the noise's if it is learned, and ``"y"``, in the plate ``"data"``. Without
    ``y`` the plate holds the rows of ``x``, and ``"y"`` is drawn. Where ``mask`` is False, ``(N,)`` or in the shape of
    y, a target does not count. Can be pickled, copied and sent to other processes.

    :ivar net: a copy of the net.
    :ivar likelihood: the likelihood.
    :ivar priors: parameter -> its prior.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        prior: Any = None,
        likelihood: Likelihood,
        batch_size: int | None = None,
        num_data: int | None = None,
    ) -> None:
        check_net(net)
        if not isinstance(likelihood, Likelihood):
            raise ValueError(
                f"likelihood is {likelihood!r:.80}; give one of bnn.likelihoods, such as bnn.likelihoods.Gaussian(0.1) "
                "for real targets or bnn.likelihoods.Categorical() for classes."
            )
        check_sizes(batch_size, num_data)
        self.likelihood, self.batch_size, self.num_data = likelihood, batch_size, num_data
        given = parameters_of(net)  # a user's predicate may ask for modules of this very net
        self.priors = priors_of(net, given, FanIn() if prior is None else prior)
        for parameter in given:
            self.priors[parameter.name].check(parameter)
        check_names([p.name for p in given], list(likelihood.learned()), self.priors)
        self.net = copied(net)
        self.parameters = parameters_of(self.net)
        self._seen = Seen()
        self._attends = any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoder)) for m in net.modules())

    def __call__(self, x: Inputs, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the model: returns the observed or drawn targets."""
        inputs = [x] if isinstance(x, Tensor) else x
        rows = check_inputs(inputs, self.parameters, self._seen)
        values = {p.name: self.priors[p.name].sample(p) for p in self.parameters}
        noise = self.likelihood.sample_noise(inputs[0].device)
        if y is not None:
            check_rows(rows, inputs[0].device, y, mask, self.num_data)
        size, count = self._sizes(rows, y)
        with pyro.plate("data", size, subsample_size=count) as index:
            if count < size and count != rows:
                index = torch.as_tensor(index, device=inputs[0].device)
                inputs = [part[index] for part in inputs]
            else:
                index = None
            outputs = self.outputs(values, inputs)
            return self._observe(outputs, noise, y, mask, index)

    def outputs(self, values: Mapping[str, Tensor | None], inputs: Sequence[Tensor]) -> Tensor:
        """The net's outputs.

        :param values: parameter -> value; one that is missing, or None, keeps the value that it has in the net.
        :param inputs: the net's inputs.
        """
        sampled = {name: value for name, value in values.items() if value is not None}
        with _plain_attention() if self._attends else contextlib.nullcontext():
            outputs = torch.func.functional_call(self.net, sampled, tuple(inputs))
        check_outputs(outputs, len(inputs[0]))
        return outputs

    def law(self, name: str) -> Any:
        """The prior distribution of a parameter; of its scale, where that is learned.

        :raises ValueError: if there is no such parameter.
        :raises NotImplementedError: if it is kept at a value.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return self.priors[name].law(parameter)
        raise ValueError(f"the net has no parameter {name!r}; its parameters are {', '.join(map(repr, self.priors))}.")

    def _sizes(self, rows: int, y: Tensor | None) -> tuple[int, int]:
        """Size of the plate, and how many of its rows this call sees."""
        if y is None:
            return rows, rows
        if self.num_data is not None:
            return self.num_data, rows
        return rows, rows if self.batch_size is None else min(self.batch_size, rows)

    def _observe(
        self, outputs: Tensor, noise: Mapping[str, Tensor], y: Tensor | None, mask: Tensor | None, index: Any
    ) -> Tensor:
        weights = None
        if y is not None:
            self._seen.once(y, mask, (*outputs.shape[1:],), partial(self.likelihood.check, outputs.shape, y, mask))
            if index is not None:
                y, mask = y[index], None if mask is None else mask[index]
            y = self.likelihood.targets(y, outputs, mask)
            weights = self.likelihood.weights(y, outputs.dtype)
        law = self.likelihood.law(outputs, noise, mask)
        with contextlib.nullcontext() if weights is None else poutine.scale(scale=weights):
            value: Tensor = pyro.sample("y", law, obs=y)
        return value

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_seen": None, "parameters": None}
        trained = self._trained()
        if trained:
            state["net"] = net = copy.deepcopy(self.net)
            for name, parameter in net.named_parameters():
                parameter.data = trained.get(name, parameter.data)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._seen, self.parameters = Seen(), parameters_of(self.net)

    def _trained(self) -> dict[str, Tensor]:
        """What SVI has made of the parameters that it trains: another process has no part in the param store."""
        store = pyro.get_param_store()
        names = [name for name, prior in self.priors.items() if isinstance(prior, Fixed) and prior.train]
        return {name: store[name].detach().clone() for name in names if name in store}

    def __repr__(self) -> str:
        width = max(map(len, self.priors))
        lines = [f"{p.name:<{width}}  {str(tuple(p.shape)):<16} {self.priors[p.name]}" for p in self.parameters]
        return "\n".join([f"BayesianNet of {type(self.net).__name__}, {self.likelihood}", *lines])


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused layers of eval mode: they are not differentiable, nor to be had for many draws at once."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
