"""An elastic run that changes its number of workers: Ray ends all of them for that, and would throw away what they did since the
newest checkpoint. So they save first."""

import time
from typing import Any

import ray

from ray_platform.ray_internals import ControllerCallback

LONGEST_WAIT_S = 600.0  # then the newest checkpoint has to do


class SaveBeforeResize(ControllerCallback):
    """Lives in the controller of Ray Train, which waits here before it ends the workers."""

    def __init__(self, watch: Any):
        self.watch = watch
        self.started = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self.started:  # the first decision starts the workers
            self.started = True
            return
        ray.get(self.watch.order_stop.remote(f"going on with {resize_decision.num_workers} workers"))
        deadline = time.monotonic() + LONGEST_WAIT_S
        while ray.get(self.watch.num_present.remote()) and time.monotonic() < deadline:
            time.sleep(0.2)
        ray.get(self.watch.forget.remote())
