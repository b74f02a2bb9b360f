"""Assignment of the pairs to the training split and the held-out splits."""

import hashlib
from dataclasses import dataclass

from diffdis_platform.demo.icons import Icon, IconImage

HELDOUT_FAMILY = "twemoji"
HELDOUT_ONE_IN = 10
SPLITS = ("train", "heldout_style", "heldout_names")


@dataclass(frozen=True)
class Pair:
    """An image with its name, caption and group."""

    icon: Icon
    name: str
    caption: str
    group: str
    image: IconImage


def is_heldout_name(name: str) -> bool:
    """Return whether a name is held out, which depends on the name alone, so that it holds for every family."""
    return int(hashlib.sha256(f"heldout:{name}".encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def _shuffled(pairs: list[Pair]) -> list[Pair]:
    # A digest as sort key shuffles independently of the version of a random generator.
    def sort_key(pair: Pair) -> bytes:
        return hashlib.sha256(f"order:{pair.icon.family}:{pair.icon.icon}".encode()).digest()

    return sorted(pairs, key=sort_key)


def _first_of_each_image(pairs: list[Pair], taken: set[str]) -> list[Pair]:
    """Return the pairs without images in `taken`, and with one pair per image: an image of two classes has no right answer.

    The name with the fewest words stays: "flag of spain", not "flag of ceuta and melilla", whose flag is the same.
    """
    kept, seen = [], set(taken)
    for pair in sorted(pairs, key=lambda pair: (pair.name.count("-"), pair.name, pair.icon.family, pair.icon.icon)):
        if pair.image.pixels_sha256 not in seen:
            seen.add(pair.image.pixels_sha256)
            kept.append(pair)
    return kept


def split_pairs(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs of each split, shuffled.

    train: all families but the held-out one, without the held-out names; equal images of one name are kept once.
    heldout_style: the held-out family's images of names that occur in train.
    heldout_names: every family's images of the held-out names.
    The held-out family's images of names that are neither in train nor held out are in no split, and neither are held-out
    images with the same pixels as one in train.
    """
    train: dict[tuple[str, str], Pair] = {}
    style, unseen = [], []
    for pair in pairs:
        if is_heldout_name(pair.name):
            unseen.append(pair)
        elif pair.icon.family == HELDOUT_FAMILY:
            style.append(pair)
        else:
            train.setdefault((pair.name, pair.image.pixels_sha256), pair)
    train_names = {name for name, _ in train}
    train_images = {pixels for _, pixels in train}
    known_style = [pair for pair in style if pair.name in train_names]
    return {
        "train": _shuffled(list(train.values())),
        "heldout_style": _shuffled(_first_of_each_image(known_style, train_images)),
        "heldout_names": _shuffled(_first_of_each_image(unseen, train_images)),
    }
