"""Who is where: every rank says so every few seconds, the driver sees which one the others wait for, and has orders for them."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BEAT_SECONDS = 2.0
_SILENT_SECONDS = 5 * BEAT_SECONDS  # then a process is taken to be stopped, or its machine to be gone
_PATIENCE = 10  # times as long for what takes long by itself: building, restoring, scoring, drawing, exporting
# In the file names of frames that wait for other ranks: with gloo. NCCL's calls return at once, and it is the next read of a
# result that waits, wherever that is; such places say so (`Heart.waiting`).
_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True)
class Beat:
    rank: int
    step: int
    doing: str  # what the rank's loop is at
    place: str  # file:line function where its thread stands
    waits_for_ranks: bool
    takes_long: bool  # by itself: see _PATIENCE
    moves: int  # files uploaded, say: counts as a step does
    host: str
    pid: int
    node: str  # Ray's id
    actor: Any = field(compare=False)  # to kill it by


@dataclass
class _Seen:
    beat: Beat
    heard: float  # when
    moved: float  # when its step, what it was doing, or `moves` last changed


class Watch:
    """An actor of the driver's. Time is its own clock."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Seen] = {}
        self._stop = ""

    def beat(self, beat: Beat) -> str:
        """Returns why the rank has to save and stop; empty: it need not."""
        now, seen = time.monotonic(), self._ranks.get(beat.rank)
        same = seen is not None and _where(seen.beat) == _where(beat)
        self._ranks[beat.rank] = _Seen(beat, now, seen.moved if seen and same else now)
        return self._stop

    def order_stop(self, reason: str) -> None:
        self._stop = reason

    def forget(self) -> None:
        """The workers are gone; others will start."""
        self._ranks, self._stop = {}, ""

    def leave(self, rank: int) -> None:
        """It will beat no more."""
        self._ranks.pop(rank, None)

    def num_present(self) -> int:
        """Ranks that beat."""
        return sum(time.monotonic() - seen.heard < _SILENT_SECONDS for seen in self._ranks.values())

    def nodes(self) -> set[str]:
        return {seen.beat.node for seen in self._ranks.values()}

    def hanging(self, seconds: float) -> tuple[str, list[Any]]:
        """Where no rank has moved for so long: (a line that names the one to blame, the actors of all). Else ("", []).

        One that does what takes long is waited for longer; but not one that says nothing any more, nor those that wait for it.
        """
        now, ranks = time.monotonic(), self._ranks.values()
        silent = [seen.beat for seen in ranks if now - seen.heard > _SILENT_SECONDS]
        if not ranks or any(now - seen.moved < seconds * _patience(seen.beat, silent) for seen in ranks):
            return "", []
        busy = [seen.beat for seen in ranks if not seen.beat.waits_for_ranks]
        return blame(silent, busy, len(ranks), seconds), [seen.beat.actor for seen in ranks]


def _where(beat: Beat) -> tuple[Any, ...]:
    return beat.pid, beat.step, beat.doing, beat.moves


def _patience(beat: Beat, silent: list[Beat]) -> int:
    in_vain = beat in silent or (silent and beat.waits_for_ranks)
    return _PATIENCE if beat.takes_long and not in_vain else 1


def blame(silent: list[Beat], busy: list[Beat], num_ranks: int, seconds: float) -> str:
    """One line about the ranks that keep the others waiting: those that say nothing any more, else those that do not wait."""
    blamed = sorted(silent or busy, key=lambda beat: beat.rank)
    if not blamed:
        return f"all {num_ranks} ranks wait for each other for {seconds:.0f} s: look at the network between their nodes"
    names = ", ".join(f"rank {b.rank} ({b.host}, pid {b.pid}) in step {b.step + 1}" for b in blamed)
    how = "does not answer any more" if silent else f"hangs while {blamed[0].doing}, at {blamed[0].place}"
    return f"no step for {seconds:.0f} s: {names} {how}; the other {num_ranks - len(blamed)} of {num_ranks} ranks wait"


class Heart:
    """A thread of a rank that beats until it is stopped. A watch that does not answer changes nothing."""

    def __init__(self, watch: Any, rank: int):
        self.watch, self.rank = watch, rank
        self.step, self.moves, self.doing = 0, 0, "starting"
        self.order = ""  # why to save and stop
        self._waits, self._takes_long = False, True
        self._thread_id = threading.get_ident()  # the training's
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heart")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()

    def at(self, doing: str, takes_long: bool = False) -> None:
        """What the rank's loop is at from now on."""
        self.doing, self._takes_long = doing, takes_long

    def moved(self) -> None:
        """Something was done on the way to the next step. Called from any thread."""
        self.moves += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what ends when all ranks have come there, and where a rank has nothing to do but wait for the others."""
        before, self._waits = self._waits, True
        try:
            yield
        finally:
            self._waits = before

    def whereabouts(self) -> dict[str, Any]:
        """The part of a Beat that changes."""
        place, inside_a_collective = self._place()
        return {
            "step": self.step,
            "doing": self.doing,
            "place": place,
            "waits_for_ranks": self._waits or inside_a_collective,
            "takes_long": self._takes_long,
            "moves": self.moves,
        }

    def _beat(self) -> None:
        context = ray.get_runtime_context()
        actor, node = context.current_actor, context.get_node_id()
        here = {"host": socket.gethostname(), "pid": os.getpid(), "node": node, "actor": actor}
        call: Any = None
        while not self._done.is_set():
            try:
                if call is None:
                    call = self.watch.beat.remote(Beat(self.rank, **self.whereabouts(), **here))
                if ray.wait([call], timeout=BEAT_SECONDS)[0]:
                    self.order, call = ray.get(call), None
            except ray.exceptions.RayError:
                call = None
            self._done.wait(BEAT_SECONDS)
        self.watch.leave.remote(self.rank)

    def _place(self) -> tuple[str, bool]:
        """(where the training's thread stands, whether that is inside a collective)."""
        frame, inside = sys._current_frames().get(self._thread_id), []
        while frame is not None:
            inside.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        waits = any(part in name.replace(os.sep, "/") for name, _, _ in inside for part in _COLLECTIVE)
        ours = [entry for entry in inside if "site-packages" not in entry[0]] or inside
        name, line, function = ours[0] if ours else ("?", 0, "?")
        return f"{os.path.basename(name)}:{line} {function}", waits


def start_watch() -> Any:
    """Beside the driver, so that it is not lost with a node of the workers'."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Watch).options(scheduling_strategy=here).remote()
