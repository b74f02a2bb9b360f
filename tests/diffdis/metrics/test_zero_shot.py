"""Accuracies from predicted classes, against CLIP_benchmark's and scikit-learn's definitions."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as their_confusion_matrix

from diffdis.metrics import zero_shot
from diffdis.metrics.zero_shot import accuracies, class_embeddings, confusion_matrix, recall_per_class, top_k
from tests.diffdis.metrics.peers import zeroshot_classification


def predicted(similarity: np.ndarray) -> np.ndarray:
    return top_k(similarity, np.eye(similarity.shape[1], dtype=similarity.dtype), 5)


@pytest.mark.parametrize(("num", "num_classes"), [(1000, 37), (997, 5), (501, 4), (3, 1000)])
def test_accuracies_equal_clip_benchmarks(num, num_classes):
    random = np.random.default_rng(num)
    labels = random.integers(0, num_classes, num)
    similarity = random.standard_normal((num, num_classes)).astype(np.float32)
    similarity[np.arange(num), labels] += 1.0
    found = accuracies(labels, predicted(similarity), num_classes)
    logits, target = torch.from_numpy(similarity), torch.from_numpy(labels)
    assert found["acc1"] == zeroshot_classification.accuracy(logits, target, topk=(1,))[0]
    assert found["mean_per_class_recall"] == balanced_accuracy_score(labels, similarity.argmax(axis=1))
    if num_classes < 5:
        assert math.isnan(found["acc5"])
    else:
        assert found["acc5"] == zeroshot_classification.accuracy(logits, target, topk=(1, 5))[1]


def test_confusions_and_recalls_equal_scikit_learns():
    random = np.random.default_rng(0)
    labels, top5 = random.integers(0, 7, 500), random.integers(0, 8, (500, 5))
    labels[labels == 5] = 6  # class 5 does not occur
    found = confusion_matrix(labels, top5, 8)
    assert found.dtype == np.int64
    assert np.array_equal(found[:, :8], their_confusion_matrix(labels, top5[:, 0], labels=range(8)))
    assert not found[:, 8].any()
    recalls = recall_per_class(found)
    assert np.isnan(recalls[[5, 7]]).all()
    assert recalls[3] == np.mean(top5[labels == 3, 0] == 3)


def test_an_image_that_cannot_be_read_is_wrong():
    labels = np.array([0, 0, 1, 1, 2, 2])
    top5 = np.repeat(labels[:, None], 5, axis=1)
    top5[1] = -1
    found = accuracies(labels, top5, 6)
    assert found == {"acc1": 5 / 6, "acc5": 5 / 6, "mean_per_class_recall": pytest.approx((0.5 + 1 + 1) / 3)}
    matrix = confusion_matrix(labels, top5, 6)
    assert matrix[:, 6].tolist() == [1, 0, 0, 0, 0, 0]
    assert matrix.sum() == 6


def test_equally_similar_classes_are_taken_in_their_order():
    similarity = np.array([[0.0, 2.0, 2.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], dtype=np.float32)
    assert predicted(similarity).tolist() == [[1, 2, 4, 3, 5], [0, 1, 2, 3, 4]]
    assert predicted(similarity[:, :3]).tolist() == [[1, 2, 0, -1, -1], [0, 1, 2, -1, -1]]


def test_top_k_equals_a_stable_sort_whatever_the_chunks(monkeypatch):
    random = np.random.default_rng(0)
    queries = random.integers(-2, 3, (101, 6)).astype(np.float32)  # small integers: many exact ties
    candidates = random.integers(-2, 3, (53, 6)).astype(np.float32)
    expected = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, :5]
    assert np.array_equal(top_k(queries, candidates, 5), expected)
    monkeypatch.setattr(zero_shot, "SCORES_AT_ONCE", 530)
    assert np.array_equal(top_k(queries, candidates, 5), expected)


def test_what_cannot_be_scored_is_named():
    good = np.zeros((2, 5), dtype=np.int64)
    with pytest.raises(ValueError, match="sample 1: label 3 is not one of the 3 classes"):
        accuracies(np.array([0, 3]), good, 3)
    with pytest.raises(ValueError, match="sample 1: label -1"):
        confusion_matrix(np.array([0, -1]), good, 3)
    with pytest.raises(ValueError, match="sample 0: predicted class 7 is not one of the 3 classes"):
        confusion_matrix(np.array([0, 0]), good + 7, 3)
    with pytest.raises(ValueError, match="no samples"):
        accuracies(np.zeros(0, dtype=int), good[:0], 3)
    with pytest.raises(ValueError, match="query 1: its embedding is not finite"):
        top_k(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.eye(2), 1)


def test_class_embeddings_are_the_normalised_means_of_templates():
    asked = []

    def embed(texts):
        asked.append(list(texts))
        angles = torch.tensor([float(len(text)) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    found = class_embeddings(embed, ["cat", "horse"], ["a {c}", "{c}, the {c}"])
    assert asked == [["a cat", "cat, the cat", "a horse", "horse, the horse"]]  # all at once
    for row, (short, long) in zip(found, ((5, 12), (7, 16)), strict=True):
        angle = (short + long) / 2  # the mean of two unit vectors points half-way, or there and back
        expected = torch.tensor([math.cos(angle), math.sin(angle)]) * math.copysign(1.0, math.cos((long - short) / 2))
        torch.testing.assert_close(row, expected)
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{c\}"):
        class_embeddings(embed, ["cat"], ["a photo"])
