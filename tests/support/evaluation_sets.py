"""Small evaluation sets in common layouts. As in CLIP_benchmark, its export is written with webdataset."""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from ray_platform.contracts import UserError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS, PAPER_SETS, EvaluationSet, RawSample, read_slice

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SUFFIXES = {b"\x89PN": "png", b"\xff\xd8\xff": "jpg", b"RIF": "webp"}


def picture(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Return uint8 noise [height, width, 3] with a color that is unique to the seed."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 192, 3) + rng.integers(0, 64, (height, width, 3))).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, file_format: str = "WEBP", **options) -> bytes:
    """Encode an image as lossless WebP, like the exporter, or in another of Pillow's formats."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **(options or ({"lossless": True, "method": 0} if file_format == "WEBP" else {})))
    return buffer.getvalue()


@functools.cache  # tests write thousands of images
def encoded_picture(seed: int, file_format: str) -> bytes:
    return encoded(picture(seed), file_format)


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded_picture(seed, "JPEG"))


def write_wds(
    folder: Path,
    name: str,
    images: Sequence[np.ndarray | bytes],
    *,
    labels: Sequence[int] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] = (),
    samples_per_shard: int = 10_000,
) -> Path:
    """Write `<folder>/wds_<name>/` with a test split that has `labels` or, for retrieval, `captions` of each image.

    Images that are arrays are encoded as lossless WebP; bytes are written unchanged (PNG, JPEG or WebP).
    """
    root = folder / f"wds_{name.replace('/', '-')}"
    (root / "test").mkdir(parents=True)
    if classes:
        (root / "classnames.txt").write_text("".join(f"{line}\n" for line in classes))
    if templates:
        (root / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    if captions is not None:
        (root / "dataset_type.txt").write_text("retrieval\n")
    sink = webdataset.ShardWriter(str(root / "test" / "%d.tar"), maxcount=samples_per_shard, maxsize=10**9, verbose=0)
    for index, image in enumerate(images):
        content = encoded(image) if isinstance(image, np.ndarray) else image
        sample: dict = {"__key__": f"s{index:07d}", _SUFFIXES[content[:3]]: content}
        if labels is not None:
            sample["cls"] = labels[index]
        if captions is not None:
            sample["txt"] = "\n".join(caption.replace("\n", r"\n") for caption in captions[index]).encode()
        sink.write(sample)
    sink.close()
    num_shards = len(list((root / "test").glob("*.tar")))
    (root / "test" / "nshards.txt").write_text(f"{num_shards}\n")
    return root


def write_own(folder: Path, count: int = 6, **fields) -> Path:
    """Write a user-defined set of three classes."""
    values = {"labels": [i % 3 for i in range(count)], "classes": ["a", "b", "c"], "templates": ["a {c}"]} | fields
    return write_wds(folder, "mine", [encoded_picture(seed, "WEBP") for seed in range(count)], **values)


def class_names(name: str) -> tuple[str, ...]:
    """Return the classes of a known set."""
    return KNOWN_SETS[name].classes


def write_one(root: Path, name: str, images_per_class: int = 1, samples_per_shard: int = 10_000) -> Path:
    """Write one of the twelve sets in its export layout, with some images of each class in alternation."""
    known = KNOWN_SETS[name]
    labels = list(range(known.num_classes)) * images_per_class
    texts = {"classes": class_names(name), "templates": known.templates}
    images = [encoded_picture(seed, "WEBP") for seed in range(len(labels))]
    return write_wds(root, name, images, labels=labels, samples_per_shard=samples_per_shard, **texts)


def write_all_twelve(root: Path) -> dict[str, Path]:
    """Write all twelve sets below `root`, with one image per class (fewer than the real sets). Returns name -> folder."""
    return {name: write_one(root, name) for name in PAPER_SETS}


def write_retrieval(root: Path, name: str, num_images: int, captions_per_image: int = 5, samples_per_shard: int = 10_000) -> Path:
    """Write a retrieval set whose image i has the captions "image i, caption 0", …"""
    captions = [[f"image {i}, caption {number}" for number in range(captions_per_image)] for i in range(num_images)]
    images = [encoded_picture(seed, "WEBP") for seed in range(num_images)]
    return write_wds(root, name, images, captions=captions, samples_per_shard=samples_per_shard)


def read(data: EvaluationSet, **named) -> list[RawSample | RejectedSample]:
    """Return all samples of a set, slice by slice."""
    assert [part.place for part in data.slices] == list(range(len(data.slices)))
    assert len({part.name for part in data.slices}) == len(data.slices)
    return [sample for part in data.slices for sample in read_slice(part, **named)]


def open_own(folder: Path) -> EvaluationSet:
    return open_evaluation_set("mine", str(folder))


def keys_or_causes(data: EvaluationSet) -> list[str]:
    return [getattr(sample, "cause", sample.key) for sample in read(data)]


def contents(data: EvaluationSet) -> list[tuple[str, int, bytes]]:
    """Return key, label and encoded image of every sample of a set."""
    return [(sample.key, sample.label, bytes(sample.image)) for sample in read(data)]


def error_of(call, *arguments, kind: type[UserError] = UserError, **named) -> str:
    """Return the one-line message of the error that `call` raises."""
    with pytest.raises(kind) as raised:
        call(*arguments, **named)
    message = str(raised.value)
    assert "\n" not in message
    return message


def error_of_set(name: str, url: Path | str, kind: type[UserError] = UserError) -> str:
    """Return the message of the error that opening or reading a set raises."""
    return error_of(lambda: read(open_evaluation_set(name, str(url))), kind=kind)
