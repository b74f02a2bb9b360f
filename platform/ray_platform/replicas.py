"""Run units of work on replicas of a model: Ray actors that are replaced when they die.

Results do not depend on the number of replicas or on their deaths: a unit gives the same rows on every replica, and `join_rows`
joins the rows of a group by the places of its units. The units that an earlier run finished come from a store.

`WorkQueue` decides which replica gets which unit and knows neither Ray nor the clock. `ReplicaPool` runs it on actors.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ray_platform.contracts import Rows, UnitOrigin, UserError, describe_error, one_line
from ray_platform.placement import Labels, ResourceRequest, StartNotice, label_selector
from ray_platform.terminal import ProgressBar, left_text

logger = logging.getLogger(__name__)

UNITS_IN_FLIGHT = 2  # units per replica: while one is computed, the next one is read and decoded
MAX_DEATHS = 3  # replicas that may die while they run a unit and no other one, before the unit fails
_POLL_SECONDS = 5.0


class UnitWork(Protocol):
    """The work of one unit. It is sent to a replica, so it holds plain data."""

    def run(self, replica: Any) -> Rows: ...  # `replica` is what `ReplicaSpec.build` returned


class ResultStore(Protocol):
    """The rows of finished units by their keys, such as `evaluate.result_cache.ResultCache`."""

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Rows, UnitOrigin]]: ...

    def write(self, key: str, rows: Rows) -> None: ...


@dataclass(frozen=True)
class WorkUnit:
    """One piece of work."""

    name: str  # for messages
    group: str  # the measurement that the unit belongs to: when one unit of a group fails, the others are dropped
    key: str  # equal keys stand for equal rows
    cost: float  # relative to the other units
    work: UnitWork
    runs_first: bool = False  # before all other units of its stage, because others wait for its rows
    stage: int = 0  # units of a stage start after all those of the stages below it


@dataclass(frozen=True)
class UnitResult:
    """The rows of a unit, or the error with which its group failed."""

    unit: WorkUnit
    rows: Rows | None
    error: str = ""
    origin: UnitOrigin | None = None  # of rows that were computed earlier


@dataclass(frozen=True)
class ReplicaSpec:
    """How many replicas run, on which nodes, and how each is built."""

    build: Callable[[str], Any]  # torch device -> what `UnitWork.run` receives; called in the actor's process
    num_replicas: int = 0  # 0: as many as fit on the cluster now
    cpus: float = 1.0  # per replica
    gpus: float = 0.0  # per replica
    placement: Labels = field(default_factory=dict)  # labels of the nodes

    @property
    def request(self) -> ResourceRequest:
        """What one replica needs."""
        return ResourceRequest(self.placement, {"CPU": self.cpus, "GPU": self.gpus})

    def resolve_num_replicas(self) -> int:
        """Return the number of replicas to start. Raises ConfigError if they can never fit."""
        self.request.check_fits(max(1, self.num_replicas))
        return self.num_replicas or max(1, self.request.capacity())


class WorkQueue:
    """Assigns units to replicas: stage by stage, the most expensive unit of a stage first (longest processing time).

    So all replicas end together, and the first stages are finished long before the last one.
    """

    def __init__(self, units: Iterable[WorkUnit]):
        self.waiting = deque(sorted(units, key=lambda unit: (unit.stage, not unit.runs_first, -unit.cost)))
        self.failed_groups: set[str] = set()
        self._load: dict[Any, int] = {}  # replica -> number of its units in flight
        self._deaths: Counter[str] = Counter()  # unit key -> replicas that died while they ran no other unit
        self._suspects: set[str] = set()  # keys of units whose replica died: from then on each has a replica for itself

    @property
    def replicas(self) -> list[Any]:
        return list(self._load)

    def add_replica(self, replica: Hashable) -> None:
        self._load[replica] = 0

    def assign(self, start: Callable[[WorkUnit, Any, bool], None], drop: Callable[[WorkUnit], None]) -> None:
        """Call `start(unit, replica, exclusive)` for every unit that can start now and `drop(unit)` for those of failed groups.

        Every replica gets one unit before any gets a second one. At the end no replica gets a second unit that another one
        could start at once.
        """
        for level in range(UNITS_IN_FLIGHT):
            for replica, load in self._load.items():
                if load == level and (level == 0 or len(self.waiting) > len(self._load)):
                    unit = self._next_unit(is_idle=level == 0, drop=drop)
                    if unit is not None:
                        exclusive = unit.key in self._suspects
                        self._load[replica] = UNITS_IN_FLIGHT if exclusive else load + 1
                        start(unit, replica, exclusive)

    def _next_unit(self, is_idle: bool, drop: Callable[[WorkUnit], None]) -> WorkUnit | None:
        """Return the next unit for a replica; only an idle one may get a suspect."""
        for unit in list(self.waiting):
            if unit.group in self.failed_groups:
                self.waiting.remove(unit)
                drop(unit)
            elif is_idle or unit.key not in self._suspects:
                self.waiting.remove(unit)
                return unit
        return None

    def finish(self, replica: Hashable, exclusive: bool) -> None:
        """Record that one of the replica's units ended, in whatever way."""
        if replica in self._load:
            self._load[replica] -= UNITS_IN_FLIGHT if exclusive else 1

    def remove_replica(self, replica: Hashable) -> bool:
        """Return whether the replica was known until now: the death of a replica with two units is reported twice."""
        return self._load.pop(replica, None) is not None

    def retry(self, unit: WorkUnit, exclusive: bool) -> bool:
        """Put back a unit whose replica died. Return False when that happened MAX_DEATHS times."""
        self._suspects.add(unit.key)
        self._deaths[unit.key] += exclusive  # when two units were in flight, the other one may be the cause
        if self._deaths[unit.key] >= MAX_DEATHS:
            return False
        self.waiting.appendleft(unit)
        return True


@dataclass
class PoolProgress:
    """Progress over all units of a run, weighted by their costs."""

    total_cost: float
    num_units: int
    started: float = field(default_factory=time.monotonic)
    done_cost: float = 0.0
    cached_cost: float = 0.0  # the part of done_cost that earlier runs had finished
    units_done: int = 0
    replicas_lost: int = 0

    def add(self, unit: WorkUnit, *, cached: bool) -> None:
        self.done_cost, self.units_done = self.done_cost + unit.cost, self.units_done + 1
        self.cached_cost += unit.cost if cached else 0.0

    def drop(self, unit: WorkUnit) -> None:
        self.total_cost, self.num_units = self.total_cost - unit.cost, self.num_units - 1

    def text(self) -> str:
        """Return `41%  left 3.2 min`; without a time until enough was computed to tell."""
        fraction = self.done_cost / self.total_cost if self.total_cost else 1.0
        computed, elapsed = self.done_cost - self.cached_cost, time.monotonic() - self.started
        is_known = computed > 0.05 * (self.total_cost - self.cached_cost)  # the first units also load the models
        left = f"  {left_text(elapsed * (self.total_cost - self.done_cost) / computed)}" if is_known else ""
        lost = f"  workers lost {self.replicas_lost}" if self.replicas_lost else ""
        return f"{fraction:.0%}{left}{lost}"


class ReplicaActor:
    """Actor that runs units. It builds its replica at the first unit, so that an error in it is reported as that unit's error."""

    def __init__(self, build: Callable[[str], Any], device: str, store: ResultStore):
        self._build, self._device, self._store = build, device, store
        self._replica: Any = None
        self._lock = threading.Lock()
        self._last_end = 0.0  # when the previous unit ended

    def run_unit(self, key: str, work: UnitWork) -> Rows:
        with self._lock:
            if self._replica is None:
                self._replica = self._build(self._device)
            started = time.monotonic()
        rows = work.run(self._replica)
        with self._lock:  # two units in flight share the replica's time: each counts what passed since the previous one ended
            now = time.monotonic()
            rows["seconds"] = np.array([now - max(started, self._last_end)])
            self._last_end = now
        self._store.write(key, rows)
        return rows


class ReplicaPool:
    """Runs units on replicas and yields results in any order. A context manager: replicas stay alive between its runs."""

    def __init__(self, spec: ReplicaSpec, store: ResultStore, bar: ProgressBar):
        """`bar` shows the progress."""
        self.spec, self.store, self.bar = spec, store, bar
        self._running: dict[ray.ObjectRef, tuple[WorkUnit, Any, bool]] = {}  # call -> unit, actor, whether it is exclusive
        self._starting: dict[ray.ObjectRef, Any] = {}  # first call -> actor, which waits for its resources or starts
        self.queue = WorkQueue([])  # of the last run; it knows the replicas that are alive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self.queue.replicas, *self._starting.values()):
            ray.kill(actor)

    def run(self, units: Sequence[WorkUnit]) -> Iterator[UnitResult]:
        """Yield one result per unit, those of an earlier run first. After a group's first error its other units are dropped.

        The units' keys differ. An error of a unit's work becomes the error of its group, in one line. Raises ConfigError if
        the replicas do not fit on the cluster.
        """
        self.progress = PoolProgress(sum(unit.cost for unit in units), len(units))
        remaining = {unit.key: unit for unit in units}
        for key, rows, origin in self.store.read(list(remaining)):
            unit = remaining.pop(key)
            self.progress.add(unit, cached=True)
            yield UnitResult(unit, rows, origin=origin)
        if not remaining:
            return
        replicas, self.queue, self._running = self.queue.replicas, WorkQueue(remaining.values()), {}
        for actor in replicas:
            self.queue.add_replica(actor)
        for _ in range(len(replicas) + len(self._starting), min(self.spec.resolve_num_replicas(), len(remaining))):
            self._start_replica()
        yield from self._run_queue()
        self.bar.close()

    def _start_replica(self) -> None:
        """Start an actor, which gets units when it answers: other work may hold its resources for longer than the run takes."""
        actor_class: Any = ray.remote(ReplicaActor)
        actor = actor_class.options(
            num_cpus=self.spec.cpus,
            num_gpus=self.spec.gpus,
            max_concurrency=UNITS_IN_FLIGHT,
            label_selector=label_selector(self.spec.placement),
            scheduling_strategy="DEFAULT",  # not the placement group of a sweep's trial, which has no CPUs
        ).remote(self.spec.build, "cuda" if self.spec.gpus else "cpu", self.store)
        self._starting[actor.__ray_ready__.remote()] = actor

    def _run_queue(self) -> Iterator[UnitResult]:
        notice = StartNotice(self.spec.request)
        while True:
            self.queue.assign(self._start_unit, self.progress.drop)
            if not self._running and not self.queue.waiting:
                return
            finished, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=_POLL_SECONDS)
            for call in finished:
                if call in self._starting:  # an actor that could not start is added, too: its first unit reports its death
                    self.queue.add_replica(self._starting.pop(call))
                elif (result := self._collect(call)) is not None:
                    yield result
            if not self.queue.replicas:
                notice.check()
            if finished:
                self.bar.update("units", self.progress.units_done, self.progress.num_units, self.progress.text())

    def _start_unit(self, unit: WorkUnit, actor: Any, exclusive: bool) -> None:
        self._running[actor.run_unit.remote(unit.key, unit.work)] = unit, actor, exclusive

    def _collect(self, call: ray.ObjectRef) -> UnitResult | None:
        unit, actor, exclusive = self._running.pop(call)
        self.queue.finish(actor, exclusive)
        try:
            rows = ray.get(call)
        except RayTaskError as error:
            prefix = "" if isinstance(error.cause, UserError) else f"{unit.name}: "
            return self._fail_group(unit, prefix + describe_error(error.cause))
        except RayError as error:  # the replica or its node died, together with the rows
            return self._handle_death(unit, actor, error, exclusive)
        self.progress.add(unit, cached=False)
        return None if unit.group in self.queue.failed_groups else UnitResult(unit, rows)

    def _handle_death(self, unit: WorkUnit, actor: Any, error: RayError, exclusive: bool) -> UnitResult | None:
        if isinstance(error, RayActorError) and self.queue.remove_replica(actor):
            self._start_replica()
            self.progress.replicas_lost += 1
            logger.warning("a worker died; a new one runs its units")
        if self.queue.retry(unit, exclusive):
            return None
        cause = one_line(error, max_length=200)
        return self._fail_group(unit, f"{unit.name}: {MAX_DEATHS} workers died while they ran it; the last error: {cause}")

    def _fail_group(self, unit: WorkUnit, error: str) -> UnitResult | None:
        if unit.group in self.queue.failed_groups:
            return None
        self.queue.failed_groups.add(unit.group)
        return UnitResult(unit, None, error)


def join_rows(rows_by_place: Mapping[int, Rows]) -> Rows:
    """Concatenate the rows of all units of a group in the order of the units' places."""
    ordered = [rows_by_place[place] for place in sorted(rows_by_place)]
    joined = {}
    for name in sorted({name for rows in ordered for name in rows}):
        # A unit without samples does not know the width of its arrays.
        arrays = [rows[name] for rows in ordered if len(rows.get(name, ()))]
        joined[name] = np.concatenate(arrays) if arrays else np.empty(0)
    return joined
