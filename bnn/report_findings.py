"""What speaks against a run, in words, and what to do about it.

Thresholds are the field's: R-hat of 1.01 and 100 effective draws a chain, 400 in all (Vehtari et al. 2021, Bayesian
Analysis), BFMI of 0.3 (Betancourt 2016), the 99 % regions of :mod:`bnn.temperature`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bnn.draw_blocks import blocks
from bnn.norm_identities import NORMS, norm_balance
from bnn.report_data import FEWEST_DRAWS, Convergence, RunData, quiet
from bnn.temperature import verdict, wrong_temperature

SERIOUS, CAUTION, NOTE = "serious", "caution", "note"

# R-hat above which chains have not mixed enough, and above which they are in different places. Of many numbers the
# largest R-hat is above 1.01 by chance: it counts if more than a twentieth are, or if it is far above.
RHAT, LARGEST_RHAT, BAD_RHAT, LARGEST_SHARE = 1.01, 1.05, 1.1, 0.05

# Effective draws below which quantiles, and below which even means, are rough.
ESS, BAD_ESS = 400.0, 100.0

BFMI = 0.3

LOW_ACCEPTANCE = 0.4

# A residual of so many standard errors is no chance among three.
BALANCE_ERRORS = 4.0

# Kernels whose Metropolis test makes them exact at any step size.
CORRECTED = ("GGMC", "AMAGOLD", "HMC", "NUTS")


@dataclass(frozen=True)
class Finding:
    """Something to know before the draws are used.

    :ivar level: ``"serious"``, ``"caution"`` or ``"note"``.
    :ivar title: in a few words.
    :ivar text: what was found.
    :ivar remedy: what to do.
    """

    level: str
    title: str
    text: str
    remedy: str


def findings(data: RunData, more: Sequence[Finding] = ()) -> list[Finding]:
    """All that was found, the worst first.

    :param more: found elsewhere.
    """
    found = [*(one for check in CHECKS for one in check(data)), *more]
    return sorted(found, key=lambda one: (SERIOUS, CAUTION, NOTE).index(one.level))


def conclusion(found: list[Finding], data: RunData) -> tuple[str, str]:
    """The level of the whole, and the verdict in words."""
    serious, caution = (sum(one.level == level for one in found) for level in (SERIOUS, CAUTION))
    if serious:
        return SERIOUS, f"Do not rely on these draws yet: {_count(serious, 'serious problem')}."
    if caution:
        return CAUTION, f"Usable with care: {_count(caution, 'thing')} to look at."
    if data.is_guide:
        return NOTE, "Draws from a guide: as good as its fit, which they cannot show."
    if data.draws < FEWEST_DRAWS:
        return NOTE, "Nothing found that speaks against these draws; their convergence is not judged."
    return "good", "Nothing found that speaks against these draws."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def _not_finite(data: RunData) -> Iterator[Finding]:
    variables = {**data.functions, **data.sites}
    bad = [
        name
        for name, v in variables.items()
        if v.dtype.kind == "f" and not all(np.isfinite(block).all() for block in blocks(v))
    ]
    if bad:
        yield Finding(
            SERIOUS,
            "Draws that are no numbers",
            f"{', '.join(bad)} hold NaN or infinite values.",
            "Find the chain they come from: its step size is too large, or the model divides by zero or overflows.",
        )


def _divergences(data: RunData) -> Iterator[Finding]:
    diverging = np.asarray(data.statistics.stats.get("diverging", False), dtype=bool)
    if not diverging.any():
        return
    chains: list[int] = np.flatnonzero(diverging.any(-1)).tolist() if diverging.ndim == 2 else []
    where = f" in chains {', '.join(map(str, chains))}" if len(chains) else ""
    share = f"{diverging.sum():,} of {diverging.size:,} draws ({100 * diverging.mean():.2g} %) diverged{where}."
    if data.is_ours:
        yield Finding(
            SERIOUS,
            "Chains diverged",
            f"{share} A chain that left the finite numbers repeats its last finite state.",
            "Use a smaller step size (or step_size='auto'), or standardise the data; then run again.",
        )
    else:
        yield Finding(
            SERIOUS,
            "Divergences",
            f"{share} The sampler misses the regions where it diverges.",
            "Raise the target acceptance probability towards 0.95 or 0.99; if that does not help, reparametrise the "
            "model (non-centred hierarchies) or tighten its priors.",
        )


def _convergence(data: RunData) -> Iterator[Finding]:
    if data.is_guide:
        return
    if data.draws < FEWEST_DRAWS:
        yield Finding(
            NOTE,
            "Convergence is not judged",
            f"{data.draws} draws in each chain are too few for R-hat and effective sample sizes.",
            "Draw at least four times in each chain. Members of an ensemble are no chains: nothing is to be done.",
        )
        return
    if data.chains == 1:
        yield Finding(
            NOTE,
            "One chain",
            "R-hat compares the two halves of the only chain, which cannot tell that there are other modes.",
            "Run at least four chains from different starting points; num_chains=4 costs little when vectorized.",
        )
    rhat, ess = worst_of(data.judged)
    share = _share_above(data)
    if rhat > RHAT and (share > LARGEST_SHARE or rhat > LARGEST_RHAT):
        yield _disagreement(data, rhat, share)
    if ess < ESS:
        what = "predictions" if data.functions else "the sites"
        yield Finding(
            SERIOUS if ess < BAD_ESS else CAUTION,
            "Few effective draws",
            f"The lowest effective sample size of {what}, bulk or tail, is {ess:.0f} of {data.chains * data.draws:,} "
            "draws; 400 are asked for, 100 are the least.",
            "Run longer, or raise steps_per_sample so that draws lie farther apart; more chains add up too.",
        )
    yield from _single_numbers(data)


def worst_of(convergence: Sequence[Convergence]) -> tuple[float, float]:
    """The largest R-hat and the lowest effective sample size, bulk or tail; NaN where none is known."""
    rhat = np.concatenate([np.array([np.nan]), *(found.rhat for found in convergence)])
    ess = np.concatenate([np.array([np.nan]), *(np.fmin(found.ess_bulk, found.ess_tail) for found in convergence)])
    with quiet():
        return float(np.nanmax(rhat)), float(np.nanmin(ess))


def _share_above(data: RunData) -> float:
    rhat = np.concatenate([found.rhat for found in data.judged])
    rhat = rhat[np.isfinite(rhat)]
    return float((rhat > RHAT).mean()) if rhat.size else 0.0


def _disagreement(data: RunData, worst: float, share: float) -> Finding:
    level = SERIOUS if worst > BAD_RHAT else CAUTION
    amount = f"R-hat is up to {worst:.4g}, and above 1.01 for {100 * share:.3g} % of the values looked at"
    remedy = "Use more warm-up and longer chains; if R-hat stays, chains sit in modes that differ: report them apart."
    if data.functions:
        title = "Chains disagree in their predictions" if level == SERIOUS else "Chains have not quite mixed"
        return Finding(level, title, f"{amount}. These are predictions, which relabelled units do not change.", remedy)
    if any(found.size > 1 for found in data.of_sites):
        return Finding(
            CAUTION,
            "Sites differ between chains",
            f"{amount}. For the weights of a net that need not be bad: they are identified only up to permutations "
            "and signs of hidden units.",
            "Of a net, judge convergence on predictions: bnn.to_arviz(run, function_space=True). Otherwise use more "
            "warm-up and longer chains.",
        )
    return Finding(level, "Chains disagree", f"{amount}.", remedy)


def _single_numbers(data: RunData) -> Iterator[Finding]:
    """Sites of one number, which no permutation touches, beside predictions that are judged by themselves."""
    if not data.functions:
        return
    slow = []
    for found in data.of_sites:
        rhat, ess = worst_of([found])
        if found.size == 1 and (rhat > RHAT or ess < ESS):
            slow.append(f"{found.name} (R-hat {rhat:.3f}, ESS {ess:.0f})")
    if slow:
        yield Finding(
            CAUTION,
            "Single numbers mix slowly",
            f"{', '.join(slow)}. Predictions are judged apart from these.",
            "Run longer if you report these numbers by themselves, such as the scale of the noise.",
        )


def _temperature(data: RunData) -> Iterator[Finding]:
    statistics = data.statistics
    asked = statistics.stats.get("temperature")
    if asked is None or not statistics.dim:
        return
    said = temperature_verdict(data)
    if said and not said.endswith("as asked."):
        wrong = wrong_temperature(statistics.stats, statistics.dim)
        what, _, cause = said.rstrip(".").rpartition(": ")
        yield Finding(
            SERIOUS if wrong else CAUTION, "Not the temperature asked for", f"{_capital(what)}.", f"{_capital(cause)}."
        )
    temperature = float(np.mean(asked))
    if abs(temperature - 1.0) > 1e-6:
        cold = "colder" if temperature < 1.0 else "hotter"
        yield Finding(
            NOTE,
            f"A {cold} posterior",
            f"The draws are from exp(−U/T) with T = {temperature:.3g}, {cold} than the posterior: LOO and the scores "
            "below are those of this tempered law.",
            "For the posterior itself use temperature=1. State T wherever the results are shown.",
        )


def temperature_verdict(data: RunData) -> str | None:
    """What :func:`bnn.temperature.verdict` says; None if no temperature was measured."""
    statistics = data.statistics
    measured = {"kinetic_temperature", "configurational_temperature", "noise_temperature"} & set(statistics.stats)
    if not measured or "temperature" not in statistics.stats or not statistics.dim:
        return None
    if not all(np.isfinite(one).all() for one in statistics.need(*measured)):  # all chains diverged: said elsewhere
        return None
    with quiet():
        said = verdict(statistics.stats, statistics.dim, sites={n: s.size for n, s in statistics.sites.items()})
    return said.replace("+-", "±")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _norms(data: RunData) -> Iterator[Finding]:
    try:
        with quiet():
            balance = norm_balance(data.source)
    except ValueError:
        return
    errors = np.abs(balance.residual.values) / balance.error.values
    worst = int(np.nanargmax(errors)) if np.isfinite(errors).any() else 0
    if errors[worst] > BALANCE_ERRORS:
        label = NORMS[str(balance.norm.values[worst])]
        yield Finding(
            CAUTION,
            "Norms are not in balance",
            f"What changed {label} and what should have changed it differ by {errors[worst]:.3g} standard errors.",
            "The chains are not in equilibrium, or momenta were drawn afresh between the draws: use more warm-up, and "
            "steps_per_sample=1 to balance path by path.",
        )


def _energy(data: RunData) -> Iterator[Finding]:
    """For Hamiltonian samplers, whose energy is that of position and momentum."""
    energy = data.statistics.stats.get("energy")
    if energy is None or data.is_ours or np.ndim(energy) != 2 or np.shape(energy)[1] < 4:
        return
    from arviz import bfmi

    with quiet():
        lowest = float(np.min(np.asarray(bfmi(np.asarray(energy, dtype=float)))))
    if lowest < BFMI:
        yield Finding(
            CAUTION,
            "Energies are explored slowly",
            f"The lowest BFMI of a chain is {lowest:.2g}, below 0.3: momenta carry the chain too little in energy.",
            "Reparametrise heavy-tailed or hierarchical parts of the model; run longer chains.",
        )


def _acceptance(data: RunData) -> Iterator[Finding]:
    rate = data.statistics.stats.get("acceptance_rate")
    if rate is not None and float(np.mean(rate)) < LOW_ACCEPTANCE:
        yield Finding(
            CAUTION,
            "Few proposals are accepted",
            f"{100 * float(np.mean(rate)):.3g} % of the proposals were accepted.",
            "Use a smaller step size, or step_size='auto'.",
        )


def _kernel(data: RunData) -> Iterator[Finding]:
    caveat = data.attrs.get("caveat")
    if caveat:
        text = str(caveat)
        yield Finding(CAUTION, "What this sampler assumes", f"{_capital(text)}.", "Compare before you rely on it.")
    elif data.is_ours and data.attrs.get("kernel") and data.attrs["kernel"] not in CORRECTED:
        yield Finding(
            NOTE,
            "No Metropolis test",
            f"{data.attrs['kernel']} is biased by its step size and by minibatch noise; the measured temperature shows "
            "large bias only.",
            "Where figures matter, halve the step size, run again and compare predictions; or use GGMC or AMAGOLD.",
        )
    cycles = data.statistics.stats.get("cycle")
    if cycles is not None:
        count = len(np.unique(cycles))
        yield Finding(
            NOTE,
            "Draws come in cycles",
            f"Each chain draws in {count} cycles, each of which starts anew from a large step: draws of one cycle are "
            "alike, and ESS does not know it.",
            f"Think of {count * data.chains} places in the posterior rather than of {data.chains * data.draws:,} "
            "draws; use more cycles for more.",
        )


def _guide(data: RunData) -> Iterator[Finding]:
    if data.is_guide:
        yield Finding(
            NOTE,
            "Draws from a guide",
            f"These are independent draws from {data.attrs['guide']}, an approximation of one mode of the posterior, "
            "which as a rule is too narrow.",
            "Look at the ELBO's trace for convergence, and at coverage on held-out data; compare with MCMC on a part "
            "of the data.",
        )


CHECKS: list[Callable[[RunData], Iterator[Finding]]] = [
    _not_finite, _divergences, _convergence, _temperature, _norms, _energy, _acceptance, _kernel, _guide,
]  # fmt: skip
