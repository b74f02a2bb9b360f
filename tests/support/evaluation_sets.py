"""Writes small sets in the very layouts that people have: CLIP_benchmark's export, by the writer that it uses."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.sets import PAPER_SETS, KNOWN_SETS, EvaluationSet
from ray_platform.evaluate.samples import RawSample, read_slice

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SUFFIXES = {b"\x89PN": "png", b"\xff\xd8\xff": "jpg", b"RIF": "webp"}


def picture(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """[height, width, 3] uint8 of noise that no other seed gives, in a colour of its own."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 192, 3) + rng.integers(0, 64, (height, width, 3))).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, file_format: str = "WEBP", **options) -> bytes:
    """Lossless WebP, as the exporter writes it, or another of Pillow's formats."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, file_format, **(options or ({"lossless": True, "method": 0} if file_format == "WEBP" else {})))
    return buffer.getvalue()


def write_wds(
    folder: Path,
    name: str,
    images: Sequence[np.ndarray | bytes],
    *,
    labels: Sequence[int] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] = (),
    samples_a_shard: int = 10_000,
) -> Path:
    """`<folder>/wds_<name>/`, its test split with `labels`, or for retrieval with each image's `captions`.

    Images that are arrays become lossless WebP; bytes stay as they are (PNG, JPEG or WebP).
    """
    root = folder / f"wds_{name.replace('/', '-')}"
    (root / "test").mkdir(parents=True)
    if classes:
        (root / "classnames.txt").write_text("".join(f"{line}\n" for line in classes))
    if templates:
        (root / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in templates))
    if captions is not None:
        (root / "dataset_type.txt").write_text("retrieval\n")
    sink = webdataset.ShardWriter(str(root / "test" / "%d.tar"), maxcount=samples_a_shard, maxsize=10**9, verbose=0)
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


def class_names(name: str) -> tuple[str, ...]:
    """The registry's, CIFAR-10's, or names that stand for those that come with the data."""
    info = KNOWN_SETS[name]
    if info.classes:
        return info.classes
    return CIFAR10 if info.num_classes == 10 else tuple(f"{name.rpartition('/')[2]} {i}" for i in range(info.num_classes))


def write_one(root: Path, name: str, images_a_class: int = 1, samples_a_shard: int = 10_000) -> Path:
    """One of the twelve in the layout of its export, with so many pictures of each class, in turn."""
    info = KNOWN_SETS[name]
    labels = list(range(info.num_classes)) * images_a_class
    images = [picture(seed) for seed in range(len(labels))]
    return write_wds(
        root, name, images, labels=labels, classes=class_names(name), templates=info.templates, samples_a_shard=samples_a_shard
    )


def write_all_twelve(root: Path, images_a_class: int = 1, samples_a_shard: int = 10_000) -> dict[str, Path]:
    """All twelve below `root`; name -> folder. They are short: the real ones have more images."""
    return {name: write_one(root, name, images_a_class, samples_a_shard) for name in PAPER_SETS}


def write_retrieval(root: Path, name: str, num_images: int, captions_an_image: int = 5, samples_a_shard: int = 10_000) -> Path:
    """A retrieval set whose image i has the captions "image i, caption 0", …"""
    captions = [[f"image {i}, caption {number}" for number in range(captions_an_image)] for i in range(num_images)]
    return write_wds(
        root, name, [picture(seed) for seed in range(num_images)], captions=captions, samples_a_shard=samples_a_shard
    )


def read(found: EvaluationSet, **named) -> list[RawSample | RejectedSample]:
    """All samples of a set, slice by slice."""
    assert [part.place for part in found.slices] == list(range(len(found.slices)))
    assert len({part.name for part in found.slices}) == len(found.slices)
    return [sample for part in found.slices for sample in read_slice(part, **named)]
