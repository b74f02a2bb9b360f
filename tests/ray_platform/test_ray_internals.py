"""Ray's non-public API, as ray_platform.ray_internals uses it: fails when a new version of Ray changes it."""

import inspect

from ray_platform import ray_internals


def test_draining_and_autoscaling_are_known_of_a_cluster(ray_cluster):
    assert ray_internals.draining_nodes() == set()
    assert not ray_internals.autoscaler_is_running()


def test_the_controller_calls_back_before_it_resizes():
    hook = ray_internals.ControllerCallback.before_controller_execute_resize_decision
    assert list(inspect.signature(hook).parameters) == ["self", "resize_decision"]
