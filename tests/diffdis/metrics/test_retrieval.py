"""Recalls equal CLIP_benchmark's, which holds all scores in memory; also covers cases that its definition leaves open."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval

from diffdis.metrics import retrieval
from diffdis.metrics.retrieval import RetrievalRanks, most_similar


def embeddings(num_images, texts_of_image, width=16, seed=0):
    """Return partly correlated unit-norm image and text embeddings, and the image index of each text."""
    random = np.random.default_rng(seed)
    images = F.normalize(torch.from_numpy(random.standard_normal((num_images, width))).float(), dim=-1)
    owners = np.repeat(np.arange(num_images), texts_of_image)
    noise = torch.from_numpy(random.standard_normal((len(owners), width))).float()
    return images, F.normalize(images[owners] + 0.4 * noise, dim=-1), owners


def theirs(images, texts, owners, ks):
    """Run CLIP_benchmark's evaluate on batches of embeddings, with a model and a tokenizer that return their input."""
    model = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)
    rows = [texts[owners == place] for place in range(len(images))]
    batches = [(images[i : i + 32], rows[i : i + 32]) for i in range(0, len(images), 32)]
    return zeroshot_retrieval.evaluate(model, batches, torch.stack, "cpu", amp=False, recall_k_list=ks)


@pytest.mark.parametrize(("num_images", "texts_of_image", "at_once"), [(10, 1, 2**23), (101, 5, 777), (333, "various", 2**23)])
def test_recalls_equal_clip_benchmarks(monkeypatch, num_images, texts_of_image, at_once):
    monkeypatch.setattr(retrieval, "MAX_SIMILARITIES", at_once)
    counts = np.random.default_rng(1).integers(1, 5, num_images) if texts_of_image == "various" else texts_of_image
    images, texts, owners = embeddings(num_images, counts)
    expected = theirs(images, texts, owners, [1, 5, 10])
    found = RetrievalRanks.of(images.numpy(), texts.numpy(), owners).recalls()
    assert found.keys() == expected.keys()
    assert {name: np.float32(value) for name, value in found.items()} == expected  # CLIP_benchmark averages in float32
    assert 0 < found["image_retrieval_recall@1"] < found["image_retrieval_recall@10"]


def test_the_order_of_texts_does_not_matter():
    images, texts, owners = embeddings(50, 3)
    mixed = np.random.default_rng(0).permutation(len(owners))
    expected = RetrievalRanks.of(images.numpy(), texts.numpy(), owners).recalls()
    assert RetrievalRanks.of(images.numpy(), texts.numpy()[mixed], owners[mixed]).recalls() == expected


def test_an_unreadable_image_is_never_found_and_fails_with_its_texts():
    images, texts, owners = (np.asarray(part) for part in embeddings(60, 2))
    readable = np.random.default_rng(3).random(60) > 0.3
    broken = np.where(readable[:, None], images, np.nan)
    found = RetrievalRanks.of(broken, texts, owners, is_readable=readable).recalls()
    # Equal to the recall over readable images, with all texts as candidates; unreadable images count as 0.
    kept = np.flatnonzero(readable)
    of_readable = readable[owners]
    places = np.searchsorted(kept, owners[of_readable])
    inner = RetrievalRanks.of(images[kept], texts[of_readable], places).recalls()
    similarity = images[kept] @ texts.T
    for k in (1, 5, 10):
        name = f"image_retrieval_recall@{k}"
        assert found[name] == pytest.approx(inner[name] * of_readable.mean())
        best = np.argsort(-similarity, axis=1)[:, :k]
        hits = (owners[best] == kept[:, None]).any(axis=1).sum()
        assert found[f"text_retrieval_recall@{k}"] == hits / 60


def test_of_equal_candidates_the_first_is_found():
    same = np.array([[1, 0], [1, 0]], dtype=np.float32)
    for owner, share in ((0, 1.0), (1, 0.0)):
        found = RetrievalRanks.of(same, same[:1], np.array([owner])).recalls((1, 2))
        assert found["image_retrieval_recall@1"] == share
        assert found["image_retrieval_recall@2"] == 1
    found = RetrievalRanks.of(same, same, np.array([1, 0])).recalls((1, 2))  # the first text belongs to the second image
    assert found["text_retrieval_recall@1"] == found["image_retrieval_recall@1"] == 0.5
    images, texts = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:2]  # an image without a text
    found = RetrievalRanks.of(images, texts, np.array([0, 1])).recalls((1, 10))
    assert (found["text_retrieval_recall@10"], found["image_retrieval_recall@10"]) == (2 / 3, 1)


def test_examples_are_the_best_of_what_can_be_read():
    images, texts, _ = (np.asarray(part) for part in embeddings(40, 1))
    readable = np.arange(40) % 3 > 0
    places, similarity = most_similar(texts[:4], images, 5, readable)
    scores = texts[:4] @ images.T
    scores[:, ~readable] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, :5]
    assert np.array_equal(places, expected)
    np.testing.assert_allclose(similarity, np.take_along_axis(scores, expected, axis=1), rtol=1e-6)
    assert most_similar(texts[:4], images[:3], 5)[0].shape == (4, 3)


def test_a_broken_embedding_is_named():
    images, texts, owners = (np.array(part) for part in embeddings(10, 1))
    texts[7, 0] = np.inf
    with pytest.raises(ValueError, match="text 7: its embedding is not finite"):
        RetrievalRanks.of(images, texts, owners).recalls()
    with pytest.raises(ValueError, match="candidate 7"):
        most_similar(images[:1], texts, 3)
