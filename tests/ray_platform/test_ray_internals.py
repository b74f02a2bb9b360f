"""Ray's private API as used by ray_platform.ray_internals: these tests fail if a new version of Ray changes it."""

import inspect
import math
import threading
from types import SimpleNamespace

import pytest
import ray.data
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy

from ray_platform import ray_internals
from ray_platform.data.config import DataConfig
from ray_platform.data.stream import SchedulerThrottle
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run


def test_draining_and_autoscaling_are_known_of_a_cluster(ray_cluster):
    assert ray_internals.draining_nodes() == set()
    assert not ray_internals.autoscaler_is_running()


def test_the_controller_calls_back_before_it_resizes():
    hook = ray_internals.ControllerCallback.before_controller_execute_resize_decision
    assert list(inspect.signature(hook).parameters) == ["self", "resize_decision"]


def test_ray_data_has_the_buffer_of_read_tasks_and_calls_the_throttle(ray_cluster, monkeypatch):
    assert hasattr(ray.data.DataContext(), ray_internals._GENERATOR_BUFFER)
    turns = []
    monkeypatch.setattr(SchedulerThrottle, "on_execution_step", lambda self, executor: turns.append(executor))
    context = ray.data.DataContext.get_current().copy()
    ray_internals.set_generator_buffer(context, 4)
    context.custom_execution_callback_classes = [SchedulerThrottle]
    with ray.data.DataContext.current(context):
        assert ray.data.range(3).map_batches(lambda batch: batch).count() == 3
    assert turns


def test_spilled_bytes_are_known_later(ray_cluster, monkeypatch):
    answered, read = threading.Event(), ray_internals._read_spilled_bytes
    monkeypatch.setattr(ray_internals, "_read_spilled_bytes", lambda: answered.wait() and read())
    spilled_bytes = ray_internals.SpilledBytes()
    assert math.isnan(spilled_bytes.newest()), "it does not wait for the nodes"
    answered.set()
    assert any(spilled_bytes.newest() >= 0 for _ in range(10**7))


@pytest.mark.parametrize("preempted", [False, True])
def test_ray_train_leaves_failures_and_hangs_to_the_driver(tmp_path, preempted):
    """Its controller would neither log nor count a restart, and the hang detector would still ask new workers to stop."""
    run = Run(dict, DataConfig(sources=("a",)), TrainConfig(), TrackingConfig(), str(tmp_path), {}, dict)
    trainer = run._trainer(SimpleNamespace(launch="launch", hang_detector=None))
    assert trainer.backend_config.timeout_s == run.train.collective_timeout_s
    died = RayActorError(None, "The actor died.", preempted=preempted)
    policy = create_failure_policy(trainer.run_config.failure_config)
    assert policy.make_decision(WorkerGroupError("a worker died", {1: died})) == FailureDecision.RAISE
