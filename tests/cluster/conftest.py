import pytest

from tests.end_to_end.conftest import write_shards


@pytest.fixture(scope="session")
def build_shards(tmp_path_factory):
    """A folder of four shards."""
    return write_shards(tmp_path_factory.mktemp("shards"))
