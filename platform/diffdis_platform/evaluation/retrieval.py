"""Image and text retrieval of one model on one dataset of images with several captions each."""

import numpy as np

from diffdis.metrics.retrieval import most_similar, retrieval_recalls
from diffdis_platform.evaluation.units import SetMeasurement
from ray_platform.contracts import DataError
from ray_platform.evaluate.sets import check_counts
from ray_platform.report.records import CaptionQuery, ImageQuery, RetrievalResult

_NUM_QUERIES, _NUM_RETRIEVED = 4, 5  # queries of each kind in the report, and what is shown for each


class RetrievalMeasurement(SetMeasurement):
    def result(self) -> RetrievalResult:
        rows, data = self._joined_rows(), self.data
        if "embeddings" not in rows or "texts" not in rows:
            raise DataError(f"{data.name}: no image of {data.url} can be read; see jobs/inspect_data.py")
        is_sample = rows["num_texts"] > 0  # the other rows are slices or samples that could not be read at all
        check_counts(data, int(is_sample.sum()), int((~is_sample).sum()), self.allow_short)
        is_readable = rows["causes"][is_sample] == ""
        images = np.zeros((len(is_readable), rows["embeddings"].shape[1]), dtype=np.float32)  # [N, D]
        images[is_readable] = rows["embeddings"]
        image_of_text = np.repeat(np.arange(len(images)), rows["num_texts"][is_sample])
        embeddings, texts = rows["text_embeddings"], [str(text) for text in rows["texts"]]
        keys = [str(key) for key in rows["keys"][is_sample]]
        metrics = retrieval_recalls(images, embeddings, image_of_text, is_readable=is_readable)
        return {
            **self._common_result(rows, metrics),
            "n": len(images),
            "num_images": len(images),
            "num_texts": len(texts),
            "examples": _caption_queries(images, embeddings, image_of_text, is_readable, texts, keys),
            "image_examples": _image_queries(images, embeddings, image_of_text, texts, keys),
        }


def _spread(count: int) -> np.ndarray:
    """Return the indices of a few queries, evenly spread."""
    return np.unique(np.linspace(0, count - 1, _NUM_QUERIES).astype(int))


def _caption_queries(
    images: np.ndarray,
    embeddings: np.ndarray,
    image_of_text: np.ndarray,
    is_readable: np.ndarray,
    texts: list[str],
    keys: list[str],
) -> list[CaptionQuery]:
    queries = _spread(len(texts))
    retrieved, similarity = most_similar(embeddings[queries], images, _NUM_RETRIEVED, is_readable)
    return [
        {
            "caption": texts[query],
            "images": [
                {"key": keys[image], "similarity": float(cosine), "right": bool(image == image_of_text[query])}
                for image, cosine in zip(retrieved[row], similarity[row], strict=True)
            ],
        }
        for row, query in enumerate(queries)
    ]


def _image_queries(
    images: np.ndarray, embeddings: np.ndarray, image_of_text: np.ndarray, texts: list[str], keys: list[str]
) -> list[ImageQuery]:
    queries = _spread(len(images))
    retrieved, similarity = most_similar(images[queries], embeddings, _NUM_RETRIEVED)
    return [
        {
            "key": keys[query],
            "captions": [
                {"text": texts[text], "similarity": float(cosine), "right": bool(image_of_text[text] == query)}
                for text, cosine in zip(retrieved[row], similarity[row], strict=True)
            ],
        }
        for row, query in enumerate(queries)
    ]
