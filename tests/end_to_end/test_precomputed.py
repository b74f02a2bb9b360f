"""Pretraining from what jobs/precompute.py's encoders made."""

import dataclasses
import functools

import numpy as np
import pytest

from diffdis.encoder import FrozenEncoder, describe_encoders
from ray_platform.contracts import DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.precompute import EncoderPool, precompute
from tests.end_to_end.test_train import plain_loop

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def encoded(ray_cluster, shards, tiny_model, tmp_path_factory):
    """The shards, precomputed with the tiny model's encoders."""
    out = tmp_path_factory.mktemp("encoded")
    config = DataConfig(sources=(str(shards),), image_size=tiny_model.image_size)
    made_by = EncoderPool(functools.partial(FrozenEncoder, tiny_model), describe_encoders(tiny_model), cpus=0.5)
    list(precompute(build_catalog(config), config, made_by, str(out)))
    return out


@pytest.mark.slow  # tests/ray_platform/test_precompute.py streams them
def test_a_run_from_precomputed_shards_follows_the_plain_loop_over_them(make_run, losses, encoded, tmp_path):
    run = make_run(tmp_path / "out", sources=encoded, num_steps=4)
    run.fit()
    expected = plain_loop(run)
    tracked = losses(tmp_path / "out")
    assert tracked.keys() == expected.keys()
    for step, values in expected.items():
        np.testing.assert_allclose(tracked[step], values, rtol=2e-3, atol=2e-4)


def test_shards_of_other_encoders_are_refused(make_run, encoded, tiny_model, tmp_path):
    run = make_run(tmp_path / "out", sources=encoded)
    other = dataclasses.replace(tiny_model, text_encoder=dataclasses.replace(tiny_model.text_encoder, max_length=9))
    run = dataclasses.replace(run, describe_encoders=functools.partial(describe_encoders, other))
    with pytest.raises(DataError, match=r"precomputed with text_encoder = .*run jobs/precompute.py with this model"):
        run.check()
    assert not (tmp_path / "out").exists()
