"""The few figures by which models are compared, out of all that an evaluation measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np

RETRIEVAL = ("image_retrieval_recall_at_1", "text_retrieval_recall_at_1", "retrieval_recall_at_1")


def headline(details: Mapping[str, Any]) -> dict[str, float]:
    """Of the evaluated model: `accuracy`, the mean acc1 over the zero-shot sets; `image_retrieval_recall_at_1` and
    `text_retrieval_recall_at_1`, means over the retrieval sets, and `retrieval_recall_at_1`, the mean of both; image quality at
    the first guidance scale by its metrics' names. What was not measured is absent.
    """
    name, found = details["models"][0]["name"], {}
    zero_shot = [entry["metrics"]["acc1"] for entry in details["zero_shot"] if entry["model"] == name]
    if zero_shot:
        found["accuracy"] = float(np.mean(zero_shot))
    recalls = [entry["metrics"] for entry in details["retrieval"] if entry["model"] == name]
    if recalls:
        for side in ("image", "text"):
            found[f"{side}_retrieval_recall_at_1"] = float(np.mean([recall[f"{side}_retrieval_recall@1"] for recall in recalls]))
        found["retrieval_recall_at_1"] = (found["image_retrieval_recall_at_1"] + found["text_retrieval_recall_at_1"]) / 2
    if details["quality"]:
        found |= {metric: float(value) for metric, value in details["quality"][0]["metrics"].items()}
    return found
