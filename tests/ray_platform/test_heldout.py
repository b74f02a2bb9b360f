import numpy as np
import pytest

from ray_platform.contracts import Batch
from ray_platform.train.heldout import select_samples


@pytest.mark.parametrize("indices", [range(2, 4), range(0), [3, 0, 0]])
def test_samples_are_selected_and_those_of_a_range_are_not_copied(indices):
    images = np.arange(40, dtype=np.uint8).reshape(5, 2, 4)
    selected = select_samples(Batch({"image": images}, list("abcde"), list("vwxyz"), (), {}), indices)
    assert np.array_equal(selected.tensors["image"], images[list(indices)])
    assert ("".join(selected.captions), "".join(selected.keys)) == (
        "".join("abcde"[i] for i in indices),
        "".join("vwxyz"[i] for i in indices),
    )
    assert np.shares_memory(selected.tensors["image"], images) == (indices == range(2, 4))
