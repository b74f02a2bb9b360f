"""Which worker gets which unit next. Plain Python: no Ray, no clock.

The dearest units first (longest processing time, LPT): what is left at the end is small, and all workers end together.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

IN_FLIGHT = 2  # units a worker: while one is computed, the next one is read and decoded
MAX_DEATHS = 3  # of workers that had a unit, and no other, before the unit is given up


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    name: str  # for people
    group: str  # whose measurement it belongs to: when one of its units fails, the group's others are left out
    key: str  # see `kept.cache_key`
    cost: float  # relative to the other units'
    work: Any  # see `fan_out.Work`
    first: bool = False  # before all that are not: others wait for its rows


class Schedule:
    def __init__(self, units: Iterable[Unit]):
        self.waiting = deque(sorted(units, key=lambda unit: (not unit.first, -unit.cost)))
        self.failed: set[str] = set()  # groups
        self._load: dict[Any, int] = {}  # worker -> its units in flight
        self._deaths: Counter[str] = Counter()  # unit key -> workers that died with it alone
        self._suspects: set[str] = set()  # units whose worker died: from then on each has a worker for itself

    @property
    def workers(self) -> list[Any]:
        return list(self._load)

    def add_worker(self, worker: Hashable) -> None:
        self._load[worker] = 0

    def hand_out(self, begin: Callable[[Unit, Any, bool], None], left_out: Callable[[Unit], None]) -> None:
        """Call `begin(unit, worker, alone)` for all that can begin now, and `left_out(unit)` for those of failed groups.

        Every worker gets one unit before any gets a second one, and none gets a second one at the end, when it could be another's
        first.
        """
        for level in range(IN_FLIGHT):
            for worker, load in self._load.items():
                if load == level and (not level or len(self.waiting) > len(self._load)):
                    unit = self._next(not level, left_out)
                    if unit is not None:
                        alone = unit.key in self._suspects
                        self._load[worker] = IN_FLIGHT if alone else load + 1
                        begin(unit, worker, alone)

    def _next(self, alone: bool, left_out: Callable[[Unit], None]) -> Unit | None:
        """The next unit, for a worker that has none (`alone`), or one that has."""
        for unit in list(self.waiting):
            if unit.group in self.failed:
                self.waiting.remove(unit)
                left_out(unit)
            elif alone or unit.key not in self._suspects:
                self.waiting.remove(unit)
                return unit
        return None

    def done(self, worker: Hashable, alone: bool) -> None:
        """One of its units, whatever came of it."""
        if worker in self._load:
            self._load[worker] -= IN_FLIGHT if alone else 1

    def died(self, worker: Hashable) -> bool:
        """Whether that is news: of a worker with two units, both are lost."""
        return self._load.pop(worker, None) is not None

    def again(self, unit: Unit, alone: bool) -> bool:
        """Its worker died: put it back. False where that has happened too often to it."""
        self._suspects.add(unit.key)
        self._deaths[unit.key] += alone  # of two, the other one may be to blame
        if self._deaths[unit.key] >= MAX_DEATHS:
            return False
        self.waiting.appendleft(unit)
        return True
