import pytest

from tests.support.training import diffdis_run


@pytest.fixture(scope="session")
def make_run(tiny_model, training_shards):
    """make_run(output_dir, sources, objective fields, **TrainConfig fields): a Run of the tiny model by two workers."""

    def make(output_dir, sources=None, objective=None, **train):
        return diffdis_run(tiny_model, sources or training_shards, output_dir, objective, **train)

    return make
