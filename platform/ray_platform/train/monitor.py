"""Monitoring of a training run by its driver: progress lines, SIGTERM, drained nodes and hung workers."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import ray

from ray_platform.ray_internals import draining_nodes
from ray_platform.tracking import Tracker
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.train.config import TrainConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
SLOW_POLL_SECONDS = 5.0  # for what needs several calls
_ANSWER_TIMEOUT_SECONDS = 10.0


class DriverMonitor:
    """Watches the workers for the length of a `with` block. Enter it in the main thread, where it handles SIGTERM."""

    def __init__(self, hang_detector: Any, tracker: Tracker, node_metrics: NodeMetrics, train: TrainConfig):
        self.hang_detector, self.tracker, self.node_metrics, self.train = hang_detector, tracker, node_metrics, train
        self.stopping = False  # SIGTERM was received: the workers save, and the run ends
        self.last_hang = ""  # message about the workers killed since the last `reset_workers`
        self._printed_step = -1
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, daemon=True, name="monitor")
        self._previous_handler: Any = None

    def __enter__(self) -> "DriverMonitor":
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._print_progress()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def reset_workers(self) -> None:
        """Forget the workers that ended; new ones will start."""
        self.last_hang = ""
        self.hang_detector.reset.remote()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        print("SIGTERM: saving a checkpoint", flush=True)
        self._request_stop()

    def _request_stop(self) -> None:
        self.hang_detector.request_stop.remote("stopped by SIGTERM")

    def _poll_loop(self) -> None:
        num_polls = 0
        while not self._done.wait(POLL_SECONDS):
            self._print_progress()
            num_polls += 1
            if num_polls % (SLOW_POLL_SECONDS // POLL_SECONDS) == 0:
                try:
                    if self.stopping:  # again, for workers that were being started
                        self._request_stop()
                    nodes = ray.get(self.hang_detector.nodes.remote(), timeout=_ANSWER_TIMEOUT_SECONDS)
                    self._handle_node_drain(nodes)
                    self._kill_hung_workers()
                    self.node_metrics.poll(nodes)
                except ray.exceptions.RayError as error:
                    logger.warning("the hang detector does not answer: %s", error)

    def _handle_node_drain(self, nodes: set[str]) -> None:
        """When one of the workers' `nodes` is being drained, have them save and restart without it."""
        if drained := draining_nodes() & nodes:
            self.hang_detector.request_stop.remote(f"node {min(drained)[:8]} is being drained")

    def _kill_hung_workers(self) -> None:
        hang = ray.get(self.hang_detector.find_hang.remote(self.train.hang_seconds), timeout=_ANSWER_TIMEOUT_SECONDS)
        if hang is None:
            return
        self.last_hang = hang.message
        logger.warning("%s; restarting all workers", hang.message)
        for actor in hang.actors:
            ray.kill(actor)
        self.hang_detector.reset.remote()

    def _print_progress(self) -> None:
        """Print a line when new metrics have arrived."""
        step, metrics = self.tracker.latest()
        if step > self._printed_step and "train/samples_per_second" in metrics:
            self._printed_step = step
            print(progress_line(step, self.train.num_steps, metrics), flush=True)


def progress_line(step: int, num_steps: int, metrics: dict[str, float]) -> str:
    """Format `step 120/780  loss_generation 0.412  113 samples/s  waiting for data 2 %  stalled 3 %  left 5:32`.

    Stalled is the fraction of time spent on checkpoints, scores and previews, shown from 1 % on.
    """
    names = [name for name in sorted(metrics, reverse=True) if name.startswith("train/loss_")]
    losses = "  ".join(f"{name.removeprefix('train/')} {metrics[name]:.3f}" for name in names)
    minutes, seconds = divmod(int(metrics.get("train/seconds_left", 0)), 60)
    stalled = metrics.get("train/share_stalled", 0)
    return (
        f"step {step}/{num_steps}  {losses}  {metrics.get('train/samples_per_second', 0):.0f} samples/s  "
        f"waiting for data {metrics.get('data/share_waiting', 0):.0%}  "
        f"{f'stalled {stalled:.0%}  ' if stalled >= 0.01 else ''}left {minutes}:{seconds:02d}"
    )
