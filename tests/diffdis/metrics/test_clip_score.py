import numpy as np
import pytest

from diffdis.metrics.image_quality import clip_score


def test_the_scale_and_that_no_pair_counts_below_0():
    assert clip_score(np.array([1.0, 0.5, -1.0], dtype=np.float32)) == 50.0
    assert clip_score(np.array([0.25])) / 40 == 2.5 * 0.25  # as Hessel et al. scale it


def test_nothing_and_nan_are_refused():
    for cosines in ([], [0.1, np.nan]):
        with pytest.raises(ValueError, match=f"CLIPScore of {len(cosines)} cosines"):
            clip_score(np.array(cosines))
