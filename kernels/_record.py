"""The statistics of a run's draws: a row for each, and what follows from the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._norm_rates import norm_rates
from bnn.kernels.schedules import Schedule, value_at

if TYPE_CHECKING:
    from bnn.kernels._run import Run

TEMPERATURES = ("kinetic_temperature", "configurational_temperature")


class Record:
    """Rows of statistics of the draws after warm-up. They can be taken out block by block, to be kept elsewhere.

    What is taken out does not depend on where the blocks begin, bit for bit.

    :param run: whose draws.
    :ivar thinning: every so many draws one is recorded.
    :ivar taken: how many draws have been taken out.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.thinning, self.taken = 1, 0
        self._seen = 0
        self._table: Tensor | None = None
        self._rows = 0
        self._steps: list[int] = []
        self._before = 0  # rows of the table that were taken out: the last, which rates of change start from
        self._sums: dict[str, np.ndarray[Any, Any]] = {}  # of temperatures of what was taken out, and their number
        self._time, self._timed = 0.0, 0  # sum of the sizes of so many steps

    def add(self, stats: Tensor, step: int) -> None:
        """Append the statistics ``(chains, names)`` of a draw, that of step ``step``."""
        self._seen += 1
        if (self._seen - 1) % self.thinning:
            return
        if self._table is None:
            self._table = stats.new_empty(64, *stats.shape)
        elif self._rows == len(self._table):
            self._table = torch.cat([self._table, torch.empty_like(self._table)])
        self._table[self._rows] = stats
        self._steps.append(step)
        self._rows += 1

    @property
    def draws(self) -> int:
        """How many draws were recorded, those included that were taken out."""
        return self.taken + self._rows - self._before

    def table(self) -> Tensor:
        """Statistics ``(draws, chains, names)``, from the last that was taken out on."""
        return torch.empty(0, self.run.chains, 0) if self._table is None else self._table[: self._rows].cpu()

    def first_diverging(self, chain: int) -> int:
        """The first draw of a chain that only repeats its last finite state; all draws if there is none."""
        start = self.run.stopped_at[chain]
        return self.draws if start is None else -(-max(start - self.run.warmup_steps, 0) // self.thinning)

    def diagnostics(self) -> list[dict[str, Any]]:
        """Pyro's diagnostics of each chain."""
        asked = value_at(self.run.kernel.temperature, max(self.run.step - 1, 0))
        sums = self._summed(self.table())
        result = []
        for chain in range(self.run.chains):
            diverging = list(range(self.first_diverging(chain), self.draws))
            entry: dict[str, Any] = {"divergences": diverging, "temperature asked": asked}
            for name, (total, count) in sums.items():
                entry[name.replace("_", " ")] = float(total[chain] / count[chain]) if count[chain] else float("nan")
            result.append(entry)
        return result

    def arrays(self) -> dict[str, Tensor]:
        """Name -> ``(chains, draws)``, and of statistics per site ``(chains, draws, sites)``; without those taken."""
        run, kernel, table, steps = self.run, self.run.kernel, self.table(), self._steps
        draws = len(table)
        stats = run.statistics.arrays(table)

        def add(name: str, values: Sequence[float] | np.ndarray[Any, Any], dtype: torch.dtype = torch.float64) -> None:
            stats[name] = torch.as_tensor(values, dtype=dtype).expand(run.chains, draws).contiguous()

        for name, setting in kernel.settings().items():
            add(name, [value_at(setting, step) for step in steps])
        known = [kernel.stats_at(step) for step in steps]
        for name in known[0] if known else ():
            add(name, [one[name] for one in known])
        for setting in kernel.settings().values():
            if isinstance(setting, Schedule) and setting.has_cycles:
                add("cycle_position", [setting.cycle_position(step) for step in steps])
                add("cycle", [setting.cycle(step) for step in steps], torch.int64)
                break
        add("step", steps, torch.int64)
        add("time", self._times())
        if kernel.balances_norms:
            doubles = {name: values.double().numpy() for name, values in stats.items()}
            found = norm_rates(kernel, steps, run.potential.dim, doubles, doubles["temperature"])
            stats.update({name: torch.from_numpy(values) for name, values in found.items()})
        number = torch.arange(draws) + self.taken - self._before
        stats["diverging"] = torch.stack([number >= self.first_diverging(chain) for chain in range(run.chains)])
        return {name: values[:, self._before :] for name, values in stats.items()}

    def take(self) -> dict[str, Tensor]:
        """The :meth:`arrays`, which are then forgotten."""
        found = self.arrays()
        if self._rows > self._before:
            self._sums = self._summed(self.table())
            self._time, self._timed = float(self._times()[-1]), self._steps[-1] + 1
            assert self._table is not None
            self.taken = self.draws
            last = self._table[self._rows - 1].clone()
            self._table = last.new_empty(64, *last.shape)
            self._table[0] = last
            self._steps, self._rows, self._before = self._steps[-1:], 1, 1
        return found

    def _times(self) -> np.ndarray[Any, Any]:
        """The sum of the step sizes up to each draw."""
        size = self.run.kernel.settings()["step_size"]
        if not isinstance(size, Schedule):
            return (np.asarray(self._steps, dtype=np.float64) + 1.0) * float(size)
        last = self._steps[-1] + 1 if self._steps else 0
        sizes = [size.value_at(step) for step in range(self._timed, last)]
        sums = np.cumsum(np.array([self._time, *sizes], dtype=np.float64))
        return sums[np.asarray(self._steps, dtype=np.int64) + 1 - self._timed]

    def _summed(self, table: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Temperature -> its sum over all draws of each chain before it diverged, and their number."""
        result = {}
        names = [name for name in TEMPERATURES if self.draws and name in self.run.stat_names]
        for name in names:
            column = self.run.stat_names.index(name)
            sums = self._sums.get(name, np.zeros((2, self.run.chains))).copy()
            for chain in range(self.run.chains):
                whole = self._before + max(self.first_diverging(chain) - self.taken, 0)
                values = table[self._before : whole, chain, column].double().numpy()
                sums[0, chain] = np.cumsum([sums[0, chain], *values])[-1]  # in one order, however many at once
                sums[1, chain] += len(values)
            result[name] = sums
        return result
