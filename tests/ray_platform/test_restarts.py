"""What the driver does when workers are gone: start them again, or say in a line why not."""

from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import ActorDiedError
from ray.train import ControllerError

from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.storage import StorageError
from ray_platform.train import restarts
from ray_platform.train.overseer import progress_line
from ray_platform.train.restarts import Interrupted, Restarts, Stopped
from ray_platform.train.worker import built


class Failed(Exception):
    """Shaped as Ray Train's: what each rank raised."""

    def __init__(self, **worker_failures):
        super().__init__("training failed")
        self.worker_failures = {int(name[1:]): failure for name, failure in worker_failures.items()}


DIED = Failed(r0=ConnectionError("peer closed the connection"), r1=ActorDiedError())


def restarting(newest="", max_failures=1):
    found = SimpleNamespace(newest=newest)
    return Restarts(max_failures, lambda: found.newest), found


def test_workers_that_died_start_again_until_nothing_new_comes_of_it():
    again, found = restarting()
    assert again.judge(DIED, "", False) == "worker 1 died; going on from where this launch began"
    found.newest = "run/step_20"
    for _ in range(5):  # each time it got further
        found.newest += "0"
        assert again.judge(DIED, "", False) == f"worker 1 died; going on from {found.newest}"
    drained = Failed(r0=Interrupted("node a1b2 is being taken away; saved at step 7"))
    assert again.judge(drained, "", False).startswith("node a1b2")
    with pytest.raises(TrainingError, match=r"^worker 1 died \(failure 2 without a new checkpoint; train.max_failures\)$"):
        again.judge(DIED, "", False)


def test_what_failed_before_the_ranks_began_is_named():
    refused = ControllerError(RuntimeError("Gloo connectFullMesh failed:\nConnection refused"))
    line = "the workers' controller: RuntimeError: Gloo connectFullMesh failed:; going on from where this launch began"
    assert restarting()[0].judge(refused, "", False) == line


FINAL = [ConfigError("train.seed: wrong"), DataError("a.tar: gone"), StorageError("s3: no", "forbidden")]


@pytest.mark.parametrize("error", FINAL)
def test_what_would_only_happen_again_ends_the_run(error):
    for stopping in (False, True):
        with pytest.raises(TrainingError, match=f"^{error}$"):
            restarting()[0].judge(Failed(r0=error), "", stopping)


def test_a_run_that_was_stopped_says_what_there_is_and_does_not_start_again():
    again, found = restarting("run/step_20")
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM; saved at step 20; go on from run/step_20 with --resume auto$"):
        again.judge(Failed(r0=Interrupted("stopped by SIGTERM; saved at step 20")), "", True)
    with pytest.raises(Stopped, match=r"could not save at once: worker 1 died; go on from run/step_20 with"):
        again.judge(DIED, "", True)
    with pytest.raises(Stopped, match=r"could not save at once: rank 1 hangs; go on from run/step_20 with"):
        again.judge(DIED, "rank 1 hangs", True)
    found.newest = ""
    with pytest.raises(TrainingError, match=r"worker 1 died; this launch has made no checkpoint$"):
        again.judge(DIED, "", True)


def test_storage_that_is_away_does_not_keep_a_run_from_ending():
    def away():
        raise StorageError("s3://bucket: cannot reach", "unavailable")

    with pytest.raises(TrainingError, match=r"worker 1 died; its checkpoints cannot be listed \(s3://bucket: cannot reach\)"):
        Restarts(1, away).judge(DIED, "", True)


@pytest.mark.parametrize("error", [ValueError("objective.freeze:\n no such"), FileNotFoundError("objective.freeze: no such")])
def test_a_task_that_cannot_be_built_is_not_tried_again(error):
    def build():
        raise error

    with pytest.raises(ConfigError, match=r"^objective\.freeze: no such$") as found:
        built(SimpleNamespace(train=SimpleNamespace(seed=0), build_task=cloudpickle.dumps(build)))
    assert restarts.is_final(found.value)


def test_the_progress_line_says_what_stalls():
    metrics = {"train/loss": 1.0, "train/loss_alignment": 2.5, "train/samples_per_second": 113.4, "data/share_waiting": 0.02}
    line = progress_line(3, 9, metrics | {"train/share_stalled": 0.034, "train/seconds_left": 61.0})
    assert line == "step 3/9  loss_alignment 2.500  113 samples/s  waiting for data 2%  stalled 3%  left 1:01"
    assert "stalled" not in progress_line(3, 9, metrics | {"train/share_stalled": 0.009})
