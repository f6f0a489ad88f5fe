"""The runner: ``pyro.infer.MCMC`` that moves all chains at once.

The private names of Pyro's runner that this project needs stand in this file and in ``_parallel``.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import MCMC as PyroMCMC
from pyro.infer.mcmc.api import _UnarySampler
from pyro.infer.mcmc.util import diagnostics as site_diagnostics
from pyro.infer.mcmc.util import print_summary
from torch import Tensor
from tqdm.auto import tqdm

from bnn.kernels._base import StochasticGradientKernel
from bnn.kernels._clock import Clock
from bnn.kernels._draws import STOPPED_IN_WARMUP, Draws, DrawsInMemory, gathered
from bnn.kernels._parallel import ParallelSampler
from bnn.kernels._ranks import sharing_of
from bnn.kernels._stored_run import StoredRun, store_of
from bnn.ranks import RankError
from bnn.run_statistics import site_facts
from bnn.sampling_cost import describe_efficiency
from bnn.store import GROUPS, Store
from bnn.stored_draws import Arrays, StoredGroup
from bnn.temperature import describe_temperatures, verdict, wrong_temperature

METHODS = ("vectorized", "sequential", "parallel")

# Above this many numbers a site's effective sample sizes cost more than they say.
LARGEST_DIAGNOSED_SITE = 2_000


class MCMC(PyroMCMC):
    """``pyro.infer.MCMC`` with vectorized chains, statistics per draw and minibatch kernels.

    A drop-in replacement: all arguments of Pyro's class are served, with the same meaning, for the kernels here and
    for Pyro's own. ``get_samples``, ``summary``, ``diagnostics`` and ``arviz.from_pyro`` work as before.

    :param kernel: one of ``bnn.kernels``, or a kernel of Pyro such as ``NUTS``.
    :param num_samples: draws per chain that are kept.
    :param warmup_steps: draws per chain that are thrown away first; as many as ``num_samples`` by default.
    :param initial_params: unconstrained starting values per site, with a leading chain dimension if
        ``num_chains > 1``.
    :param num_chains: number of chains.
    :param hook_fn: called as ``hook_fn(kernel, params, stage, i)`` after each draw; in a vectorized run ``params`` lead
        with the chain dimension.
    :param mp_context: for ``chain_method="parallel"``; ``"spawn"`` by default, since forked PyTorch threads hang.
    :param disable_progbar: show no progress bar.
    :param disable_validation: as in Pyro.
    :param transforms: as in Pyro.
    :param save_params: names of the sites to keep; all by default.
    :param chain_method: ``"vectorized"`` (all chains in one program; Pyro's own kernels run sequentially),
        ``"sequential"``, or ``"parallel"`` (one process per chain).
    :param ranks: under ``torchrun``, what its processes share out, ``"chains"`` (every rank holds all of them at the
        end, or they are in one store) or the rows of the ``"data"``. See :mod:`bnn.ranks`.
    :param store: a path, or a :class:`bnn.Store` with more settings: draws go there; memory holds one block of them.
    :param resume: go on with a store that exists, bit for bit as if the run had never ended (on a CPU): after its end
        (with a larger ``num_samples``), an interrupt, or a kill at any moment.
    :raises ValueError: for fewer than one draw or chain, an unknown ``chain_method``, or unknown ``save_params``.
    :raises NotImplementedError: for a store with ``chain_method="parallel"`` or a kernel of Pyro's own.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGLD
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(SGLD(model, step_size=0.1), num_samples=100, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> mcmc.get_samples(group_by_chain=True)["z"].shape
    torch.Size([4, 100])
    """

    sampler: Any  # Pyro leaves these without a type
    _samples: Any
    _diagnostics: Any
    _failure: RankError | None

    def __init__(
        self,
        kernel: Any,
        num_samples: int,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
        num_chains: int = 1,
        hook_fn: Callable[..., Any] | None = None,
        mp_context: str | None = None,
        disable_progbar: bool = False,
        disable_validation: bool | None = True,
        transforms: Mapping[str, Any] | None = None,
        save_params: Sequence[str] | None = None,
        *,
        chain_method: str = "vectorized",
        ranks: str | None = None,
        store: str | os.PathLike[str] | Store | None = None,
        resume: bool = False,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("num_chains", num_chains, 1),
            ("warmup_steps", num_samples if warmup_steps is None else warmup_steps, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")
        if chain_method not in METHODS:
            raise ValueError(
                f"chain_method={chain_method!r} is unknown: choose one of {', '.join(map(repr, METHODS))}."
            )
        # Pyro sorts names when it unpacks draws but not when it packs them.
        save = None if save_params is None else sorted(save_params)
        super().__init__(
            kernel,
            num_samples,
            warmup_steps,
            num_chains=1,
            hook_fn=hook_fn,
            disable_progbar=disable_progbar,
            disable_validation=disable_validation,
            transforms=transforms,
            save_params=save,
        )
        self.num_chains, self.chain_method = num_chains, chain_method
        self._save, self._hook, self._disable_progbar = save, hook_fn, disable_progbar
        self._asked_samples, self._asked_chains = num_samples, num_chains
        self._dim = 0
        self._facts: dict[str, Any] = {}
        self._diagnostics = [None] * num_chains
        self._sample_stats: Any = {}
        self._initial = initial_params
        if initial_params is not None:
            if num_chains > 1:
                self._validate_initial_params(initial_params)
            else:
                initial_params = {name: value.unsqueeze(0) for name, value in initial_params.items()}
            self._initial = initial_params
        self._ours = isinstance(kernel, StochasticGradientKernel)
        self._sharing, self._failure = sharing_of(ranks, self._ours, chain_method), None
        disable_progbar = self._disable_progbar = disable_progbar or self._sharing.rank > 0
        self.has_default_warmup = warmup_steps is None
        self.store, self._resume = store_of(store, resume, self._ours and chain_method != "parallel"), resume
        settings = (kernel, num_samples, self.warmup_steps, num_chains)
        if chain_method == "parallel" and num_chains > 1:
            self.sampler = ParallelSampler(
                *settings, mp_context or "spawn", disable_progbar, initial_params=initial_params, hook=hook_fn
            )
        else:
            self.sampler = _UnarySampler(*settings, disable_progbar, initial_params=initial_params, hook=hook_fn)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Draw the chains. An interrupt (Ctrl-C) keeps what was drawn.

        Warns if the chains' kinetic temperature was not the one asked for.

        :param args: arguments of the model.
        :param kwargs: keyword arguments of the model.
        :raises RuntimeError: if every chain diverges before its first draw.
        """
        self.num_samples, self.num_chains = self._asked_samples, self._asked_chains
        self._diagnostics = [None] * self.num_chains
        self._samples, self._sample_stats = None, {}
        parallel = self.chain_method == "parallel" and self.num_chains > 1
        if not self._ours or parallel:
            super().run(*args, **kwargs)
            return
        self._args, self._kwargs = args, kwargs
        validation = pyro.settings.get("validate_distributions_pyro")
        validate = validation if self.disable_validation is None else not self.disable_validation
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        with poutine.block(), pyro.validation_enabled(validate):
            width = self.num_chains if self.chain_method == "vectorized" else 1
            groups = [range(chain, chain + width) for chain in range(0, self.num_chains, width)]
            stored = None if self.store is None else StoredRun(self, self.store, self._resume, self._sharing)
            with nullcontext() if stored is None else closing(stored):
                self._run_groups(groups, args, kwargs, stored)

    def _run_groups(
        self,
        groups: Sequence[range],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        stored: StoredRun | None,
    ) -> None:
        finished: list[Any] = []
        asked = count = self.num_samples if stored is None else stored.kept
        self._failure = None
        self._facts = {"setup_time": 0.0, "warmup_time": 0.0, "sampling_time": 0.0, "gradient_evaluations": 0}
        own = self._sharing.start(groups, {}) if stored is None else stored.start(groups)
        for number, group in own:
            try:
                self._sharing.before(group)
                whole = None if stored is None else stored.before_setup(number, group)
                draws: Any = whole or self._run_group(group, args, kwargs, stored)
            except KeyboardInterrupt:
                if not finished:
                    raise
                break
            if draws.interrupted and draws.count < count and finished:
                break  # interrupted: the finished chains are whole
            finished.append(draws)
            if draws.interrupted:
                break
        try:
            finished = self._sharing.gather(finished, self._facts)
        except RankError as error:
            if stored is not None:
                raise
            self._failure = error
        self._diagnostics = [entry for draws in finished for entry in draws.diagnostics]
        self.num_samples = count = min(draws.count for draws in finished)
        if all(len(entry["divergences"]) == count for entry in self._diagnostics):
            raise RuntimeError(STOPPED_IN_WARMUP)
        self.transforms = self.kernel.transforms if self.transforms is None else self.transforms
        if stored is None:
            self._samples, self._sample_stats = gathered(finished, count, self.transforms)
        else:
            self._samples, self._sample_stats = (StoredGroup(stored.options.path, group) for group in GROUPS)
        if len(self._diagnostics) < self.num_chains:
            warnings.warn(
                f"interrupted: {len(self._diagnostics)} of {self.num_chains} chains are complete and kept.",
                RuntimeWarning,
                stacklevel=4,
            )
            self.num_chains = len(self._diagnostics)
        elif count < asked:
            why = "interrupted" if finished[-1].interrupted else "all chains stopped"
            warnings.warn(f"{why}: {count} of {asked} draws are kept.", RuntimeWarning, stacklevel=4)
        wrong = wrong_temperature(Arrays(self._sample_stats), dim=self._dim)
        if wrong:
            warnings.warn(wrong, RuntimeWarning, stacklevel=4)
        if self._failure is not None:
            raise self._failure

    def _run_group(
        self, chains: range, args: tuple[Any, ...], kwargs: Mapping[str, Any], stored: StoredRun | None
    ) -> Draws:
        kernel, warmup = self.kernel, self.warmup_steps
        kernel.num_chains, kernel.num_samples, kernel.ranks = len(chains), self.num_samples, self._sharing.for_kernel
        label = "" if len(chains) == self.num_chains else f" [{chains[0]}]"
        start, stop, given = chains.start, chains.stop, self._initial
        kernel.initial_params = given and {name: value[start:stop] for name, value in given.items()}
        started = time.perf_counter()
        try:
            kernel.setup(warmup, *args, **kwargs)
            self._facts["setup_time"] += time.perf_counter() - started
            self._facts.update(site_facts(kernel.potential.sites))
            self._dim = kernel.potential.dim
            if stored is None:
                draws: Draws = DrawsInMemory(kernel, len(chains), self.num_samples, self._save)
            else:
                draws = stored.draws(chains)
            total = warmup + self.num_samples
            with (
                draws.signals(),
                tqdm(total=total, initial=draws.done, disable=self._disable_progbar, desc="Warmup" + label) as bar,
            ):
                try:
                    self._draw(draws, bar, label)
                except BaseException as error:
                    draws.stop()
                    rank_ended = isinstance(error, RankError) and stored is None
                    if not (rank_ended or isinstance(error, KeyboardInterrupt)) or not draws.count:
                        raise
                    draws.interrupted = True
                    self._failure = error if isinstance(error, RankError) else None
            draws.finish()
            return draws
        finally:
            kernel.cleanup()
            kernel.num_chains = kernel.num_samples = kernel.ranks = None

    def _draw(self, draws: Draws, bar: Any, label: str) -> None:
        kernel, hook, shown, says_warmup = self.kernel, self._hook, 0.0, True
        clock = Clock(self._facts, kernel)
        if draws.done and not self._disable_progbar:
            bar.write(f"Goes on after {draws.done} draws, warm-up included.")
        for i in range(draws.done, self.warmup_steps + self.num_samples):
            warm = i < self.warmup_steps
            # A chain that runs alone repeats its last finite state to the end, as it does beside others.
            if kernel.any_stopped and kernel.all_stopped and draws.chains == self.num_chains:
                if i <= self.warmup_steps:
                    raise RuntimeError(STOPPED_IN_WARMUP)
                break
            if not warm and says_warmup:
                says_warmup = False
                bar.set_description("Sample" + label, refresh=False)
                if kernel.warmup_report and not self._disable_progbar:
                    bar.write(f"Warm-up chose {kernel.warmup_report}.")
            draws.moving = True
            kernel.advance()
            clock.tick(warm)
            self._sharing.after_draw(kernel, i)
            if not warm:
                draws.add(kernel.position)
            draws.done, draws.moving = i + 1, False
            if hook is not None:
                stage = "Warmup" if warm else "Sample"
                hook(kernel, kernel.initial_params, stage, i - (0 if warm else self.warmup_steps))
            draws.pause()
            if not self._disable_progbar:
                now = time.monotonic()
                if now - shown > 0.5:
                    bar.set_postfix(kernel.logging(), refresh=False)
                    shown = now
                bar.update()

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:
        """The draws per site, as Pyro returns them.

        :raises RuntimeError: before ``run``.
        """
        self._check_run()
        return dict(super().get_samples(num_samples, group_by_chain))

    @property
    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics per draw, name -> ``(chains, draws)``: energy, temperatures, norms, settings, divergences."""
        self._check_run()
        return self._sample_stats

    @property
    def run_facts(self) -> dict[str, Any]:
        """Sites, seconds of setup, warm-up and sampling, and gradients of single chains while sampling."""
        self._check_run()
        return dict(self._facts)

    def diagnostics(self) -> dict[str, Any]:
        """Effective sample size and split R-hat per site, and the kernel's diagnostics per chain.

        Sites of more than 2,000 numbers are left out: for weights of a net, ask for them on predictions.
        """
        self._check_run()
        small = self._small_sites()
        result = dict(site_diagnostics(small)) if small else {}
        for name in self._diagnostics[0] or {}:
            result[name] = {f"chain {i}": entry[name] for i, entry in enumerate(self._diagnostics)}
        return result

    def summary(self, prob: float = 0.9) -> None:
        """Print Pyro's table of sites, then the temperature asked for and measured, and divergences."""
        self._check_run()
        small = self._small_sites()
        if small:
            print_summary(small, prob=prob)
        for name in sorted(set(self._samples) - set(small)):
            print(f"{name}: {self._site_sizes()[name]} numbers, not listed")
        if self._sample_stats:
            print(self.temperature_report())
            print(f"Verdict: {self.temperature_verdict()}")
            print(describe_efficiency(self))
        for report in dict.fromkeys(entry["warm-up chose"] for entry in self._diagnostics if "warm-up chose" in entry):
            print(f"Warm-up chose {report}.")
        if self._diagnostics[0] and "divergences" in self._diagnostics[0]:
            print(f"Number of divergences: {sum(len(entry['divergences']) for entry in self._diagnostics)}")

    def temperature_report(self) -> str:
        """One line: the temperature asked for, and the kinetic and configurational ones that the chains had.

        :raises RuntimeError: before ``run``, or for a kernel of Pyro's own, which has no temperature.
        """
        if not self.sample_stats:
            raise RuntimeError("there are no statistics to measure a temperature by: the kernel is not one of bnn's.")
        return describe_temperatures(Arrays(self._sample_stats), dim=self._dim)

    def temperature_verdict(self) -> str:
        """In words: whether the chains sampled at the temperature asked for, and the likeliest cause if not.

        :raises RuntimeError: before ``run``, or for a kernel of Pyro's own, which has no temperature.
        """
        if not self.sample_stats:
            raise RuntimeError("there are no statistics to measure a temperature by: the kernel is not one of bnn's.")
        sizes = dict(zip(self._facts["site_name"], self._facts["site_size"], strict=True))
        found = verdict(Arrays(self._sample_stats), dim=self._dim, sites=sizes)
        return f"{found} But {self.kernel.caveat}." if self.kernel.caveat else found

    def _small_sites(self) -> dict[str, Tensor]:
        """Draws of the sites whose effective sample sizes are worth their cost, none for fewer than four draws."""
        if self.num_samples < 4:
            return {}
        return {n: self._samples[n] for n, size in self._site_sizes().items() if size <= LARGEST_DIAGNOSED_SITE}

    def _site_sizes(self) -> dict[str, int]:
        if isinstance(self._samples, StoredGroup):
            return self._samples.sizes
        return {name: value[0, 0].numel() for name, value in self._samples.items()}

    def _check_run(self) -> None:
        if self._samples is None:
            raise RuntimeError("there are no draws yet: call run(...) first.")
