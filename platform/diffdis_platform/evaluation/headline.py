"""The few metrics by which models are compared, out of all that an evaluation measured."""

from collections.abc import Sequence

import numpy as np

from ray_platform.report.records import DatasetResult, EvaluationDetails

RETRIEVAL_METRICS = ("image_retrieval_recall_at_1", "text_retrieval_recall_at_1", "retrieval_recall_at_1")


def headline(details: EvaluationDetails) -> dict[str, float]:
    """Return the metrics of the evaluated model; those that were not measured are absent.

    `accuracy` is the mean acc1 over the zero-shot sets, `image_retrieval_recall_at_1` and `text_retrieval_recall_at_1` are means
    over the retrieval sets, and `retrieval_recall_at_1` is the mean of both. Image quality is that of the first guidance scale,
    by the metrics' own names.
    """
    name, metrics = details["models"][0]["name"], {}
    zero_shot = [result for result in details.get("zero_shot", ()) if result["model"] == name]
    if zero_shot:
        metrics["accuracy"] = _mean(zero_shot, "acc1")
    retrieval = [result for result in details.get("retrieval", ()) if result["model"] == name]
    if retrieval:
        image, text = (_mean(retrieval, f"{way}_retrieval_recall@1") for way in ("image", "text"))
        metrics |= dict(zip(RETRIEVAL_METRICS, (image, text, (image + text) / 2), strict=True))
    if quality := details.get("quality"):
        metrics |= {metric: float(value) for metric, value in quality[0]["metrics"].items() if value is not None}
    return metrics


def _mean(results: Sequence[DatasetResult], metric: str) -> float:
    return float(np.mean([np.float64(result["metrics"][metric]) for result in results]))
