"""Units of work over the cluster, on actors that are replaced when they die; results as they come.

What is measured does not depend on any of it: a unit's rows are the same whoever makes them, and are merged by their place.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_platform.contracts import ConfigError, UserError, describe_error, one_line
from ray_platform.evaluate.result_cache import ResultCache, Rows
from ray_platform.evaluate.schedule import IN_FLIGHT, MAX_DEATHS, Schedule, Unit
from ray_platform.placement import Labels, ResourceRequest, may_grow, named, room, selector

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0


class Work(Protocol):
    """What a worker does for one unit. It travels to the worker, so it holds plain data."""

    def run(self, parts: Any) -> Rows: ...


@dataclass(frozen=True)
class Outcome:
    """Of a unit: its rows, or why its group cannot be measured."""

    unit: Unit
    rows: Rows | None
    error: str = ""


@dataclass(frozen=True)
class Fleet:
    """The workers. `build` makes one, by a torch device, in the actor's process."""

    build: Callable[[str], Any]
    num_workers: int = 0  # 0: as many as there is room for now
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    placement: Labels = field(default_factory=dict)  # of their nodes

    def size(self) -> int:
        """Raises ConfigError where the cluster cannot hold so many, or not even one: they would wait without a word."""
        fitting = ResourceRequest(self.placement, {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}).capacity()
        needed = max(1, self.num_workers)
        if fitting < needed and not may_grow():
            there = room(self.placement)
            raise ConfigError(
                f"num_workers: {needed} with {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs each do not fit "
                f"{named(self.placement)}'s {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs; lower num_workers, "
                "cpus_per_worker or gpus_per_worker"
            )
        return self.num_workers or max(1, fitting)


class _Actor:
    """The remote skin of a worker. Its parts are made at the first unit, so that what is wrong with them is told as an error."""

    def __init__(self, build: Callable[[str], Any], device: str, kept: ResultCache):
        self._build, self._device, self._kept = build, device, kept
        self._worker: Any = None
        self._lock = threading.Lock()
        self._ended = 0.0  # the unit before

    def do(self, key: str, work: Work) -> Rows:
        with self._lock:
            if self._worker is None:
                self._worker = self._build(self._device)
            begun = time.monotonic()
        rows = work.run(self._worker)
        with self._lock:  # two units under way share the worker's time: each has what passed since the one before ended
            now = time.monotonic()
            rows["seconds"] = np.array([now - max(begun, self._ended)])
            self._ended = now
        self._kept.write(key, rows)
        return rows


@dataclass
class Progress:
    """One bar over all units."""

    total: float  # cost
    num_units: int
    begun: float = field(default_factory=time.monotonic)
    done: float = 0.0
    kept: float = 0.0  # of what is done, what earlier runs had done
    units_done: int = 0
    workers_lost: int = 0

    def add(self, unit: Unit, *, kept: bool) -> None:
        self.done, self.units_done = self.done + unit.cost, self.units_done + 1
        self.kept += unit.cost if kept else 0.0

    def leave_out(self, unit: Unit) -> None:
        self.total, self.num_units = self.total - unit.cost, self.num_units - 1

    def line(self) -> str:
        """`412/940 units  [########            ]  41 %  left 3:12`"""
        share = self.done / self.total if self.total else 1.0
        fresh, seconds = self.done - self.kept, time.monotonic() - self.begun
        left = int(seconds * (self.total - self.done) / fresh) if fresh else 0
        bar = "#" * round(20 * share)
        lost = f"  workers lost {self.workers_lost}" if self.workers_lost else ""
        return f"{self.units_done}/{self.num_units} units  [{bar:<20}]  {share:.0%}  left {left // 60}:{left % 60:02d}{lost}"


class FanOut:
    """Does units and yields their outcomes, in any order. In a `with` block: a run's workers stay for the block's next one."""

    def __init__(self, fleet: Fleet, kept: ResultCache, show: Callable[[str], None]):
        self.fleet, self.kept, self.show = fleet, kept, show
        self._running: dict[ray.ObjectRef, tuple[Unit, Any, bool]] = {}  # call -> unit, actor, whether it has that for itself
        self.schedule = Schedule([])  # of the last run; its workers are the ones that there are

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.schedule.workers:
            ray.kill(actor)

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Each unit once; those that an earlier run did come first. After a group's first error its units come no more.

        Raises ConfigError for a cluster too small. Whatever a unit's work raises is its group's error, in one line.
        """
        self.progress = Progress(sum(unit.cost for unit in units), len(units))
        found, left = self.kept.read([unit.key for unit in units]), []
        for unit in units:
            if unit.key in found:
                self.progress.add(unit, kept=True)
                yield Outcome(unit, found.pop(unit.key))
            else:
                left.append(unit)
        if not left:
            return
        there, self.schedule, self._running = self.schedule.workers, Schedule(left), {}
        for actor in there:
            self.schedule.add_worker(actor)
        for _ in range(len(there), min(self.fleet.size(), len(left))):
            self.schedule.add_worker(self._start())
        yield from self._work()
        self.show(self.progress.line())

    def _start(self) -> Any:
        device = "cuda" if self.fleet.gpus_per_worker else "cpu"
        options: dict[str, Any] = {
            "num_cpus": self.fleet.cpus_per_worker,
            "num_gpus": self.fleet.gpus_per_worker,
            "max_concurrency": IN_FLIGHT,
            "label_selector": selector(self.fleet.placement),
            "scheduling_strategy": "DEFAULT",  # not into the placement group of a sweep's trial, which has no CPUs
        }
        return ray.remote(_Actor).options(**options).remote(self.fleet.build, device, self.kept)

    def _work(self) -> Iterator[Outcome]:
        said = time.monotonic()
        while True:
            self.schedule.hand_out(self._begin, self.progress.leave_out)
            if not self._running:
                return
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=_LOOK_SECONDS)
            for call in done:
                if (outcome := self._collect(call)) is not None:
                    yield outcome
            if time.monotonic() - said > _LOOK_SECONDS:
                said = time.monotonic()
                self.show(self.progress.line())

    def _begin(self, unit: Unit, actor: Any, alone: bool) -> None:
        self._running[actor.do.remote(unit.key, unit.work)] = unit, actor, alone

    def _collect(self, call: ray.ObjectRef) -> Outcome | None:
        unit, actor, alone = self._running.pop(call)
        self.schedule.done(actor, alone)
        try:
            rows = ray.get(call)
        except RayTaskError as error:
            return self._fail(unit, _line(error.cause, unit))
        except RayError as error:  # the worker died, or its node, and what it had made with it
            return self._lost(unit, actor, error, alone)
        self.progress.add(unit, kept=False)
        return None if unit.group in self.schedule.failed else Outcome(unit, rows)

    def _lost(self, unit: Unit, actor: Any, error: RayError, alone: bool) -> Outcome | None:
        if isinstance(error, RayActorError) and self.schedule.died(actor):
            self.schedule.add_worker(self._start())
            self.progress.workers_lost += 1
            logger.warning("a worker died; another one takes its units")
        if self.schedule.again(unit, alone):
            return None
        return self._fail(unit, f"{unit.name}: {MAX_DEATHS} workers died with it, the last time so: {one_line(error)[:200]}")

    def _fail(self, unit: Unit, line: str) -> Outcome | None:
        if unit.group in self.schedule.failed:
            return None
        self.schedule.failed.add(unit.group)
        return Outcome(unit, None, line)


def _line(cause: Exception, unit: Unit) -> str:
    """Return the error on one line; an unexpected one is preceded by the name of the unit."""
    return describe_error(cause) if isinstance(cause, UserError) else f"{unit.name}: {describe_error(cause)}"


def in_order(parts: Mapping[int, Rows]) -> Rows:
    """The rows of all units of a group, by their units' places, joined in that order."""
    ordered = [parts[place] for place in sorted(parts)]
    joined = {}
    for name in sorted({name for part in ordered for name in part}):
        # A unit without rows does not know how wide they would be.
        found = [part[name] for part in ordered if len(part.get(name, ()))]
        joined[name] = np.concatenate(found) if found else np.empty(0)
    return joined
