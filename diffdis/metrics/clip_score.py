"""CLIPScore: how well images fit their captions, by another model's embeddings."""

import numpy as np


def clip_score(cosines: np.ndarray) -> float:
    """The mean of max(100 cos, 0) over pairs, 0 to 100: the scale of torchmetrics.

    cosines [N]: of each image's embedding with its caption's. Hessel et al. (2021), "CLIPScore", write 2.5 max(cos, 0): divide by
    40 for theirs. Raises ValueError for none, or one that is not finite.
    """
    if not len(cosines) or not np.isfinite(cosines).all():
        raise ValueError(f"CLIPScore of {len(cosines)} cosines: at least one is needed, and all of them finite")
    return float(np.maximum(100.0 * np.asarray(cosines, dtype=np.float64), 0.0).mean())
