"""Which drawing is trained on and which is held out."""

import hashlib
from dataclasses import dataclass

from diffdis_platform.demo.drawing import Picture
from diffdis_platform.demo.families import Icon

HELDOUT_FAMILY = "twemoji"
HELDOUT_ONE_IN = 10
SPLITS = ("train", "heldout_style", "heldout_names")


@dataclass(frozen=True)
class Pair:
    """A picture with its words."""

    icon: Icon
    name: str
    caption: str
    group: str
    picture: Picture


def is_heldout_name(name: str) -> bool:
    """Decided by the name alone, so that it holds for every family and for whatever is added later."""
    return int(hashlib.sha256(f"heldout:{name}".encode()).hexdigest(), 16) % HELDOUT_ONE_IN == 0


def _shuffled(pairs: list[Pair]) -> list[Pair]:
    # A digest as sort key is a shuffle that no version of any random generator changes.
    def place(pair: Pair) -> bytes:
        return hashlib.sha256(f"order:{pair.icon.family}:{pair.icon.icon}".encode()).digest()

    return sorted(pairs, key=place)


def _first_of_each_picture(pairs: list[Pair], taken: set[str]) -> list[Pair]:
    """Drop pictures in `taken`, and all but one of equal pictures: two classes for one picture have no right answer.

    The name with the fewest words stays: "flag of spain", not "flag of ceuta and melilla", which flies the same.
    """
    kept, seen = [], set(taken)
    for pair in sorted(pairs, key=lambda pair: (pair.name.count("-"), pair.name, pair.icon.family, pair.icon.icon)):
        if pair.picture.pixels_sha256 not in seen:
            seen.add(pair.picture.pixels_sha256)
            kept.append(pair)
    return kept


def split_pairs(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each split, shuffled.

    train: all families but the held-out one, without the held-out names; equal pictures of one name are kept once.
    heldout_style: the held-out family's drawings of names that occur in train.
    heldout_names: every family's drawings of the held-out names.
    The held-out family's drawings of names that are neither in train nor held out are in no split. Neither are
    held-out pictures that equal, pixel by pixel, one in train.
    """
    train: dict[tuple[str, str], Pair] = {}
    style, unseen = [], []
    for pair in pairs:
        if is_heldout_name(pair.name):
            unseen.append(pair)
        elif pair.icon.family == HELDOUT_FAMILY:
            style.append(pair)
        else:
            train.setdefault((pair.name, pair.picture.pixels_sha256), pair)
    train_names = {name for name, _ in train}
    train_pictures = {pixels for _, pixels in train}
    known_style = [pair for pair in style if pair.name in train_names]
    return {
        "train": _shuffled(list(train.values())),
        "heldout_style": _shuffled(_first_of_each_picture(known_style, train_pictures)),
        "heldout_names": _shuffled(_first_of_each_picture(unseen, train_pictures)),
    }
