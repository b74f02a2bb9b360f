"""Zero-shot accuracy from similarities of image queries and class embeddings."""

import torch


def top_k_accuracy(similarity: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """The share of images whose class is among the k most similar. similarity [N, C], labels [N] in 0..C-1."""
    k = min(k, similarity.shape[1])
    return (similarity.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def subset_accuracy(
    similarity: torch.Tensor, labels: torch.Tensor, num_classes: int = 100, num_subsets: int = 20, seed: int = 0
) -> float:
    """acc1 among `num_classes` classes: the mean over fixed random subsets, each scored on the images of its classes."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = min(num_classes, similarity.shape[1])
    accuracies = []
    for _ in range(num_subsets):
        subset = torch.randperm(similarity.shape[1], generator=generator)[:num_classes]
        inside = torch.isin(labels, subset)
        if inside.any():
            predicted = subset[similarity[inside][:, subset].argmax(dim=1)]
            accuracies.append((predicted == labels[inside]).double().mean().item())
    return sum(accuracies) / len(accuracies)


def shuffled_images(similarity: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The control: every query and label as they were, the images permuted. Its accuracy must be at chance."""
    return similarity[torch.randperm(len(similarity), generator=torch.Generator().manual_seed(seed))]
