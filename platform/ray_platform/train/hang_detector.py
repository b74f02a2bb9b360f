"""Hang detection: every rank sends a heartbeat every few seconds, and the driver finds the rank that the others wait for."""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ray

from ray_platform.placement import log_restart
from ray_platform.train.config import SLOW_PHASE_FACTOR

HEARTBEAT_SECONDS = 2.0
_SILENT_SECONDS = 5 * HEARTBEAT_SECONDS  # after this, the process is stopped or its node is lost
_MAX_RANKS_NAMED = 8  # in the message about a hang
# Files of frames that wait for other ranks, with gloo. NCCL's calls return at once and the next read of a result waits, wherever
# it is; the trainer marks such places (`HeartbeatThread.waiting_for_ranks`).
_COLLECTIVE_FRAMES = ("torch/distributed/", "deepspeed/comm/")


# --- ranks ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heartbeat:
    """Heartbeat sent by one rank."""

    rank: int
    step: int
    phase: str  # what the training loop does, such as "waiting for data"
    stack_top: str  # file:line function of the training thread
    waits_for_ranks: bool
    is_slow_phase: bool  # see SLOW_PHASE_FACTOR
    progress: int  # counter of files uploaded, micro-batches scored, …
    host: str
    pid: int
    node: str  # Ray's hex id
    actor: Any = field(compare=False)  # handle with which the rank can be killed

    @property
    def progress_key(self) -> tuple[int, int, str, int]:
        """Values of which at least one changes when the rank makes progress."""
        return self.pid, self.step, self.phase, self.progress


class HeartbeatThread:
    """Thread of a rank that sends heartbeats until it is stopped. A detector that does not answer does not disturb training."""

    def __init__(self, detector: Any, rank: int):
        """`detector`: handle of the `HangDetector` actor. Create it in the thread that trains."""
        self.detector, self.rank = detector, rank
        self.step, self.progress, self.phase = 0, 0, "starting"
        self.stop_reason = ""  # why to save and stop, as requested by the driver
        self._waits_for_ranks, self._is_slow_phase = False, True
        self._training_thread = threading.get_ident()
        self._done = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._send_heartbeats, daemon=True, name="heartbeat").start()

    def stop(self) -> None:
        self._done.set()

    def set_phase(self, phase: str, is_slow: bool = False) -> None:
        self.phase, self._is_slow_phase = phase, is_slow

    def report_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of a step for the driver's progress line, which does not depend on the tracker. Does not wait."""
        self.detector.report_progress.remote(step, metrics)

    def count_progress(self) -> None:
        """Report progress within a step or phase. May be called from any thread."""
        self.progress += 1

    @contextlib.contextmanager
    def waiting_for_ranks(self) -> Iterator[None]:
        """Mark a block that ends when all ranks have entered it, and in which this rank only waits for the others."""
        before, self._waits_for_ranks = self._waits_for_ranks, True
        try:
            yield
        finally:
            self._waits_for_ranks = before

    def heartbeat(self, host: str = "", pid: int = 0, node: str = "", actor: Any = None) -> Heartbeat:
        """Return the heartbeat of this moment."""
        stack_top, is_in_collective = self._training_stack()
        waits, is_slow = self._waits_for_ranks or is_in_collective, self._is_slow_phase
        return Heartbeat(self.rank, self.step, self.phase, stack_top, waits, is_slow, self.progress, host, pid, node, actor)

    def _send_heartbeats(self) -> None:
        context = ray.get_runtime_context()
        process = (socket.gethostname(), os.getpid(), context.get_node_id(), context.current_actor)
        call: Any = None
        while not self._done.is_set():
            try:
                call = call or self.detector.record.remote(self.heartbeat(*process))
                if ray.wait([call], timeout=HEARTBEAT_SECONDS)[0]:
                    self.stop_reason, call = ray.get(call), None
            except ray.exceptions.RayError:
                call = None
            self._done.wait(HEARTBEAT_SECONDS)
        self.detector.remove.remote(self.rank)

    def _training_stack(self) -> tuple[str, bool]:
        """Return (innermost frame of the training thread outside of libraries, whether the thread is inside a collective)."""
        top = sys._current_frames().get(self._training_thread)
        stack = traceback.walk_stack(top) if top else ()
        frames = [(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in stack]
        is_in_collective = any(part in name.replace(os.sep, "/") for name, _, _ in frames for part in _COLLECTIVE_FRAMES)
        name, line, function = next((f for f in frames if "site-packages" not in f[0]), (*frames, ("?", 0, "?"))[0])
        return f"{os.path.basename(name)}:{line} {function}", is_in_collective


# --- detector ------------------------------------------------------------------------------------------------------------


@dataclass
class _Received:
    heartbeat: Heartbeat
    received_at: float
    progressed_at: float  # when `progress_key` last changed


class HangDetector:
    """Actor that receives the heartbeats and answers them with a request to stop. Times are those of its own clock.

    If its process dies, Ray restarts it, and the next heartbeats restore what it knows of the ranks.
    """

    def __init__(self) -> None:
        self._ranks: dict[int, _Received] = {}
        self._stop_reason = ""
        self._progress: tuple[int, dict[str, float]] = (-1, {})
        self._started_at = time.monotonic()
        log_restart("the process of the hang detector died and was restarted; training continues, and hangs are detected")

    def record(self, heartbeat: Heartbeat) -> str:
        """Return why the rank has to save and stop; empty when it may continue."""
        now, last = time.monotonic(), self._ranks.get(heartbeat.rank)
        unchanged = last is not None and last.heartbeat.progress_key == heartbeat.progress_key
        self._ranks[heartbeat.rank] = _Received(heartbeat, now, last.progressed_at if last and unchanged else now)
        return self._stop_reason

    def request_stop(self, reason: str) -> None:
        self._stop_reason = reason

    def reset(self) -> None:
        """Forget all ranks and the request to stop: new workers will start."""
        self._ranks, self._stop_reason = {}, ""

    def remove(self, rank: int) -> None:
        """Forget a rank that will send no more heartbeats."""
        self._ranks.pop(rank, None)

    def all_stopped(self) -> bool:
        """Return whether no rank sends heartbeats any more. False for some seconds after a start, when that is not known yet."""
        signs_of_life = [self._started_at, *(rank.received_at for rank in self._ranks.values())]
        return time.monotonic() - max(signs_of_life) > _SILENT_SECONDS

    def report_progress(self, step: int, metrics: dict[str, float]) -> None:
        """Store the metrics of the newest step that was logged, for the driver's progress line."""
        self._progress = (step, metrics)

    def progress(self) -> tuple[int, dict[str, float]]:
        """Return the step and the metrics that were reported last; step -1 before the first ones."""
        return self._progress

    def actors(self) -> list[Any]:
        return [rank.heartbeat.actor for rank in self._ranks.values()]

    def nodes(self) -> set[str]:
        return {rank.heartbeat.node for rank in self._ranks.values()}

    def find_hang(self, seconds: float) -> str:
        """Return a line that names the rank to blame for a hang; an empty string when there is none.

        A hang is no progress of any rank for `seconds`, times `SLOW_PHASE_FACTOR` in slow phases.
        A slow phase gives no more time to a rank that is silent, or to the ranks that wait for it. Silent ranks are blamed; if
        there are none, those that do not wait for other ranks.
        """
        now, ranks = time.monotonic(), self._ranks.values()

        def is_silent(rank: _Received) -> bool:
            return now - rank.received_at > _SILENT_SECONDS

        silent = [rank.heartbeat for rank in ranks if is_silent(rank)]

        def timeout(rank: _Received) -> float:
            waits_in_vain = is_silent(rank) or (silent and rank.heartbeat.waits_for_ranks)
            return seconds * (SLOW_PHASE_FACTOR if rank.heartbeat.is_slow_phase and not waits_in_vain else 1)

        if not ranks or any(now - rank.progressed_at < timeout(rank) for rank in ranks):
            return ""
        busy = [rank.heartbeat for rank in ranks if not rank.heartbeat.waits_for_ranks]
        blamed = sorted(silent or busy, key=lambda heartbeat: heartbeat.rank)
        if blamed:
            names = ", ".join(f"rank {h.rank} ({h.host}, pid {h.pid}) in step {h.step + 1}" for h in blamed[:_MAX_RANKS_NAMED])
            names += f" and {len(blamed) - _MAX_RANKS_NAMED} more ranks" if len(blamed) > _MAX_RANKS_NAMED else ""
            how = "sends no heartbeats" if silent else f"hangs while {blamed[0].phase}, at {blamed[0].stack_top}"
            cause = f"{names} {how}; the other {len(ranks) - len(blamed)} of {len(ranks)} ranks wait"
        else:
            cause = f"all {len(ranks)} ranks wait for each other; check the network between their nodes"
        return f"no step for {now - max(rank.progressed_at for rank in ranks):.0f} s: {cause}"
