"""CLIPScore: how well images fit their captions, by another model's embeddings."""

import numpy as np


def clip_score(cosines: np.ndarray) -> float:
    """Return the mean of max(100 cos, 0) over pairs, 0 to 100, on the scale of torchmetrics.

    Hessel et al. (2021), "CLIPScore", define 2.5 max(cos, 0): divide by 40 for theirs.

    Args:
        cosines: [N] similarities of each image with its caption.

    Raises:
        ValueError: There are none, or one is not finite.
    """
    if not len(cosines) or not np.isfinite(cosines).all():
        raise ValueError(f"CLIPScore of {len(cosines)} cosines: at least one is needed, and all must be finite")
    return float(np.maximum(100.0 * np.asarray(cosines, dtype=np.float64), 0.0).mean())
