"""What the driver does while its workers train: show progress, hand on notices, name a rank that hangs and end its group."""

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

LOOK_SECONDS = 1.0
SLOW_LOOK_SECONDS = 5.0  # for what needs several calls
_ANSWER_TIMEOUT_S = 10.0


class Overseer:
    """For the length of a `with` block, to be entered in the main thread where SIGTERM shall be answered."""

    def __init__(self, watch: Any, tracker: Tracker, machines: NodeMetrics, train: TrainConfig):
        self.watch, self.tracker, self.machines, self.train = watch, tracker, machines, train
        self.stopping = False  # SIGTERM came: a checkpoint is made, and the run ends
        self.last_hang = ""  # said once by `workers_are_gone`
        self._shown = -1
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True, name="overseer")
        self._handler: Any = None

    def __enter__(self) -> "Overseer":
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._show()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def workers_are_gone(self) -> None:
        """Others will start."""
        self.last_hang = ""
        self.watch.forget.remote()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        print("SIGTERM: saving a checkpoint", flush=True)
        self._order_stop()

    def _order_stop(self) -> None:
        self.watch.order_stop.remote("stopped by SIGTERM")

    def _look_on(self) -> None:
        looks = 0
        while not self._done.wait(LOOK_SECONDS):
            self._show()
            looks += 1
            if looks % (SLOW_LOOK_SECONDS // LOOK_SECONDS) == 0:
                try:
                    if self.stopping:  # again: workers that were just being started would not know
                        self._order_stop()
                    nodes = ray.get(self.watch.nodes.remote(), timeout=_ANSWER_TIMEOUT_S)
                    self._hand_on_drains(nodes)
                    self._end_a_hang()
                    self.machines.poll(nodes)
                except ray.exceptions.RayError as error:
                    logger.warning("the watch over the workers does not answer: %s", error)

    def _hand_on_drains(self, nodes: set[str]) -> None:
        """One of `nodes` that will be taken away, by its cloud say: save while it is there, and go on without it."""
        if ours := draining_nodes() & nodes:
            self.watch.order_stop.remote(f"node {min(ours)[:8]} is being taken away")

    def _end_a_hang(self) -> None:
        line, actors = ray.get(self.watch.hanging.remote(self.train.hang_seconds), timeout=_ANSWER_TIMEOUT_S)
        if not line:
            return
        self.last_hang = line
        logger.warning("%s; all workers start again", line)
        for actor in actors:
            ray.kill(actor)
        self.watch.forget.remote()

    def _show(self) -> None:
        """Print a line whenever new metrics have come in."""
        step, metrics = self.tracker.latest()
        if step > self._shown and "train/samples_per_second" in metrics:
            self._shown = step
            print(progress_line(step, self.train.num_steps, metrics), flush=True)


def progress_line(step: int, num_steps: int, metrics: dict[str, float]) -> str:
    """`step 120/780  loss_generation 0.412  loss_alignment 3.101  113 samples/s  waiting for data 2 %  stalled 3 %  left 5:32`

    Stalled: by checkpoints, scores and previews, where they take at least 1 %.
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
