"""Ray's private API as used by ray_platform.ray_internals: these tests fail if a new version of Ray changes it."""

import inspect

import ray.data

from ray_platform import ray_internals
from ray_platform.data.stream import SchedulerThrottle


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


def test_spilled_bytes_are_known(ray_cluster):
    assert ray_internals.spilled_bytes() >= 0
