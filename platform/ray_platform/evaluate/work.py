"""What a worker does for one unit of an evaluation, on the models that it holds. Plain classes: Ray is `fan_out`'s."""

import contextlib
import ctypes
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ray_platform import storage
from ray_platform.contracts import Rows, Scorer
from ray_platform.data.causes import RejectedSample, SampleError
from ray_platform.data.decode import resized, thumbnail_jpeg
from ray_platform.evaluate.slices import RawSample, Slice, read_slice, rgb

# Images a model call, and of a unit's remainder: the last batch is filled up. Results of other batch shapes differ in their last
# bits, so the batches of a unit are always the same ones, whoever works on it.
BATCH_SIZE, REMAINDER_SIZE = 32, 8


class WorkerModels:
    """A worker's models by name, each built when it is first asked for, and its threads for decoding."""

    def __init__(self, builders: Mapping[str, Callable[[str], Any]], num_threads: int, device: str):
        """`builders` make a Scorer, Generator or FeatureNetwork, by a torch device."""
        torch.set_num_threads(num_threads)
        _keep_freed_memory()
        self.device, self._builders = device, builders
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.lock = threading.Lock()  # two units may be under way: one computes, the other one is read and decoded
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        with self.lock:
            if name not in self._built:
                self._built[name] = self._builders[name](self.device)
            return self._built[name]

    def in_batches(self, call: Callable[..., np.ndarray], *columns: Sequence[Any] | np.ndarray) -> np.ndarray:
        """`call` on the columns, some rows at a time, joined. At least one row."""
        results, num_rows = [], len(columns[0])
        full = num_rows - num_rows % BATCH_SIZE
        starts = [(start, BATCH_SIZE) for start in range(0, full, BATCH_SIZE)]
        starts += [(start, REMAINDER_SIZE) for start in range(full, num_rows, REMAINDER_SIZE)]
        for start, size in starts:
            # What fills up the last batch are the first rows again.
            part = [[column[row % num_rows] for row in range(start, start + size)] for column in columns]
            with self.lock:
                results.append(call(*part))
        return np.concatenate(results)[:num_rows]


def _keep_freed_memory() -> None:
    """glibc gives a batch's large blocks back to the kernel, which zeroes their pages anew for the next batch: that took longer
    than a small network itself."""
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)  # the most that it takes
        libc.mallopt(trim_threshold, 2**30)


@dataclass(frozen=True)
class EmbedClasses:
    scorer: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def run(self, parts: WorkerModels) -> Rows:
        """embeddings [num_classes, D] float32."""
        scorer: Scorer = parts[self.scorer]
        with parts.lock:
            return {"embeddings": scorer.embed_classes(self.class_names, self.templates)}


@dataclass(frozen=True)
class Thumbnails:
    """Small pictures of some samples of a slice, for people."""

    slice: Slice
    keys: tuple[str, ...]

    def run(self, parts: WorkerModels) -> Rows:
        """keys [n], sizes [n] in bytes, jpegs [sum of sizes] uint8; of those that can be read."""
        wanted = set(self.keys)
        samples = [s for s in read_slice(self.slice) if isinstance(s, RawSample) and s.key in wanted]
        pictures = dict(zip((s.key for s in samples), parts.pool.map(_thumbnail, samples), strict=True))
        made = {key: jpeg for key, jpeg in pictures.items() if jpeg}
        return {
            "keys": np.array(list(made), dtype=np.str_),
            "sizes": np.array([len(jpeg) for jpeg in made.values()], dtype=np.int64),
            "jpegs": np.frombuffer(b"".join(made.values()), dtype=np.uint8),
        }


def _thumbnail(sample: RawSample) -> bytes:
    try:
        return thumbnail_jpeg(rgb(sample.image))
    except SampleError:
        return b""


@dataclass(frozen=True)
class EmbedImages:
    """The images of a slice, with their labels, or with their captions and those captions' embeddings."""

    scorer: str
    set_name: str
    slice: Slice
    settings: Mapping[str, Any]

    def run(self, parts: WorkerModels) -> Rows:
        """n samples: keys [n], labels [n] (-1: none), causes [n] ("": the image was read); embeddings [r, D] of the r that were.

        Of a retrieval set also num_texts [n], texts [m] and text_embeddings [m, D], in the order of the samples.
        """
        scorer: Scorer = parts[self.scorer]
        samples = read_slice(self.slice)
        prepared = list(parts.pool.map(lambda sample: _prepared(sample, scorer.preprocess), samples))
        raw = [sample if isinstance(sample, RawSample) else None for sample in samples]
        rows: Rows = {
            "keys": np.array([sample.key for sample in samples], dtype=np.str_),
            "labels": np.array([sample.label if sample else -1 for sample in raw], dtype=np.int32),
            "causes": np.array([image if isinstance(image, str) else "" for image in prepared], dtype=np.str_),
        }
        good = [place for place, image in enumerate(prepared) if not isinstance(image, str)]
        if good:
            # Noise is drawn by the set and the sample, never by rank or batch.
            names = [f"{self.set_name}/{samples[place].key}" for place in good]
            rows["embeddings"] = parts.in_batches(
                lambda images, keys: scorer.embed_images(np.stack(images), keys, **self.settings),
                [prepared[place] for place in good],
                names,
            )
        if texts := [text for sample in raw if sample for text in sample.captions]:
            rows["num_texts"] = np.array([len(sample.captions) if sample else 0 for sample in raw], dtype=np.int32)
            rows["texts"] = np.array(texts)
            with parts.lock:
                rows["text_embeddings"] = scorer.embed_texts(texts)
        return rows


def _prepared(sample: RawSample | RejectedSample, prepare: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | str:
    """The image, ready for its model, or why not."""
    if isinstance(sample, RejectedSample):
        return sample.cause
    try:
        return prepare(rgb(sample.image))
    except SampleError as unusable:
        return unusable.cause


@dataclass(frozen=True)
class MeasureImages:
    """Features of real images, to compare generated ones with."""

    slice: Slice
    networks: tuple[str, ...]
    image_size: int  # cut to a square and resized to this first, as the generated ones are

    def run(self, parts: WorkerModels) -> Rows:
        """Of the n images that can be read: keys [n], and `features/<network>` [n, d]. causes [m] of the others."""
        networks = {name: parts[name] for name in self.networks}
        samples = read_slice(self.slice)
        size = (self.image_size, self.image_size)
        cut = list(parts.pool.map(lambda sample: _prepared(sample, lambda image: resized(image, size)), samples))
        images = [image for image in cut if not isinstance(image, str)]
        rows: Rows = {
            "keys": np.array([sample.key for sample, image in zip(samples, cut, strict=True) if not isinstance(image, str)]),
            "causes": np.array([image for image in cut if isinstance(image, str)], dtype=np.str_),
        }
        for name, network in networks.items() if images else ():
            rows[f"features/{name}"] = parts.in_batches(lambda part, network=network: network.features(np.stack(part)), images)
        return rows


@dataclass(frozen=True)
class DrawImages:
    """Generated images of some prompts: their features, and how well each fits its prompt."""

    generator: str
    prompts: tuple[str, ...]
    first: int  # place of the first one among all prompts
    settings: Mapping[str, Any]
    networks: tuple[str, ...]
    aligner: str  # the Scorer that tells how well an image fits its prompt; empty: nobody does
    images_dir: str  # where the images go whose place is below `num_kept`
    num_kept: int

    def run(self, parts: WorkerModels) -> Rows:
        """`features/<network>` [n, d], and with an aligner alignment [n]: the cosine of image and prompt."""
        generator = parts[self.generator]
        networks = {name: parts[name] for name in self.networks}
        places = range(self.first, self.first + len(self.prompts))
        images = parts.in_batches(lambda *part: generator.draw(*part, **self.settings), self.prompts, places)
        for place, image in zip(places, images, strict=True):
            if place < self.num_kept:
                self._keep(place, image)
        rows = {
            f"features/{name}": parts.in_batches(lambda part, network=network: network.features(np.stack(part)), images)
            for name, network in networks.items()
        }
        if self.aligner:
            rows["alignment"] = self._alignment(parts, images)
        return rows

    def _alignment(self, parts: WorkerModels, images: np.ndarray) -> np.ndarray:
        aligner: Scorer = parts[self.aligner]
        fitting = list(parts.pool.map(aligner.preprocess, images))
        names = [f"generated/{self.first + place}" for place in range(len(images))]
        embedded = parts.in_batches(lambda part, keys: aligner.embed_images(np.stack(part), keys), fitting, names)
        with parts.lock:
            texts = aligner.embed_texts(self.prompts)
        return (embedded * texts).sum(axis=1)

    def _keep(self, place: int, image: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        url = storage.join(self.images_dir, image_name(place))
        storage.write_bytes(url, buffer.getvalue())


def image_name(place: int) -> str:
    return f"{place:06d}.png"
