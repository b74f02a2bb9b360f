"""Scores of predicted classes match the definitions of CLIP_benchmark and scikit-learn."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as their_confusion_matrix

from diffdis.metrics import zero_shot
from diffdis.metrics.zero_shot import ZeroShotScores, class_embeddings, predict_classes
from tests.diffdis.metrics.peers import zeroshot_classification


def from_similarity(similarity: np.ndarray, labels: np.ndarray) -> ZeroShotScores:
    """Return the scores of images whose embeddings are their similarities with the classes."""
    return ZeroShotScores.from_embeddings(similarity, np.eye(similarity.shape[1], dtype=similarity.dtype), labels)


@pytest.mark.parametrize(("num", "num_classes"), [(1000, 37), (997, 5), (501, 4), (3, 1000)])
def test_accuracies_equal_clip_benchmarks(num, num_classes):
    random = np.random.default_rng(num)
    labels = random.integers(0, num_classes, num)
    similarity = random.standard_normal((num, num_classes)).astype(np.float32)
    similarity[np.arange(num), labels] += 1.0
    metrics = from_similarity(similarity, labels).metrics
    logits, target = torch.from_numpy(similarity), torch.from_numpy(labels)
    assert metrics["acc1"] == zeroshot_classification.accuracy(logits, target, topk=(1,))[0]
    assert metrics["mean_per_class_recall"] == balanced_accuracy_score(labels, similarity.argmax(axis=1))
    if num_classes < 5:
        assert math.isnan(metrics["acc5"])
    else:
        assert metrics["acc5"] == zeroshot_classification.accuracy(logits, target, topk=(1, 5))[1]


def test_confusions_and_recalls_equal_scikit_learns():
    random = np.random.default_rng(0)
    labels, predictions = random.integers(0, 7, 500), random.integers(0, 8, (500, 5))
    labels[labels == 5] = 6  # class 5 does not occur
    scores = ZeroShotScores(labels, predictions, 8)
    assert scores.confusion.dtype == np.int64
    assert np.array_equal(scores.confusion[:, :8], their_confusion_matrix(labels, predictions[:, 0], labels=range(8)))
    assert not scores.confusion[:, 8].any()
    assert np.isnan(scores.class_recalls[[5, 7]]).all()
    assert scores.class_recalls[3] == np.mean(predictions[labels == 3, 0] == 3)


def test_scores_over_many_classes_take_memory_for_the_samples_alone():
    """The confusion matrix of ImageNet-21k has 4 GB."""
    labels, predictions = np.arange(1000) % 700, np.arange(5000).reshape(1000, 5)
    predictions[:500, 0] = labels[:500]
    predictions[900:, 0] = 20_000
    tracemalloc.start()
    scores = ZeroShotScores(labels, predictions, 21_841)
    assert scores.metrics["acc1"] == 0.5
    true, predicted, counts = scores.confused
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert (true[-1], predicted[-1], counts.sum(), scores.class_counts.sum()) == (699, 3495, 1000, 1000)


def test_an_image_that_cannot_be_read_is_wrong():
    labels = np.array([0, 0, 1, 1, 2, 2])
    predictions = np.repeat(labels[:, None], 5, axis=1)
    predictions[1] = -1
    scores = ZeroShotScores(labels, predictions, 6)
    assert scores.metrics == {"acc1": 5 / 6, "acc5": 5 / 6, "mean_per_class_recall": pytest.approx((0.5 + 1 + 1) / 3)}
    assert scores.confusion[:, 6].tolist() == [1, 0, 0, 0, 0, 0]
    assert scores.confusion.sum() == 6


def test_shuffled_images_keep_labels_and_predictions_but_not_their_pairs():
    labels = np.arange(1000) % 10
    control = from_similarity(np.eye(10, dtype=np.float32)[labels], labels).with_shuffled_images()
    assert np.array_equal(np.sort(control.predictions[:, 0]), np.sort(labels))
    assert 0.05 < control.accuracy() < 0.15


@given(seed=st.integers(0, 1000), num_classes=st.integers(1, 60), at_once=st.sampled_from([60, 530, 2**23]))
@settings(max_examples=30)
def test_predictions_equal_a_stable_sort_whatever_the_chunks(seed, num_classes, at_once):
    random = np.random.default_rng(seed)
    queries = random.integers(-2, 3, (101, 6)).astype(np.float32)  # small integers: many exact ties
    classes = random.integers(-2, 3, (num_classes, 6)).astype(np.float32)
    expected = np.full((101, 5), -1)
    expected[:, : min(5, num_classes)] = np.argsort(-(queries @ classes.T), axis=1, kind="stable")[:, :5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "MAX_SIMILARITIES", at_once)
        assert np.array_equal(predict_classes(queries, classes), expected)


def test_values_that_cannot_be_scored():
    predictions = np.zeros((2, 5), dtype=np.int64)
    with pytest.raises(ValueError, match="sample 1: label 3 is not one of the 3 classes"):
        ZeroShotScores(np.array([0, 3]), predictions, 3)
    with pytest.raises(ValueError, match="sample 1: label -1"):
        ZeroShotScores(np.array([0, -1]), predictions, 3)
    with pytest.raises(ValueError, match="sample 0: predicted class 7 is not one of the 3 classes"):
        ZeroShotScores(np.array([0, 0]), predictions + 7, 3)
    with pytest.raises(ValueError, match="no samples"):
        ZeroShotScores(np.zeros(0, dtype=int), predictions[:0], 3)
    with pytest.raises(ValueError, match="image 1: its embedding is not finite"):
        predict_classes(np.array([[1.0, 0.0], [np.nan, 0.0]]), np.eye(2), 1)


def test_class_embeddings_are_the_normalized_means_of_templates():
    calls = []

    def embed(texts):
        calls.append(list(texts))
        angles = torch.tensor([float(len(text)) for text in texts])
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    embeddings = class_embeddings(embed, ["cat", "horse"], ["a {c}", "{c}, the {c}"])
    assert calls == [["a cat", "cat, the cat", "a horse", "horse, the horse"]]  # all texts in one call
    for row, (short, long) in zip(embeddings, ((5, 12), (7, 16)), strict=True):
        angle = (short + long) / 2  # the mean of two unit vectors bisects their angle, or points in the opposite direction
        expected = torch.tensor([math.cos(angle), math.sin(angle)]) * math.copysign(1.0, math.cos((long - short) / 2))
        torch.testing.assert_close(row, expected)
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{c\}"):
        class_embeddings(embed, ["cat"], ["a photo"])
