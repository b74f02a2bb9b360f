"""The work of an evaluation's units, on the models that a replica holds. Plain classes, which `ray_platform.replicas` runs."""

import contextlib
import ctypes
import hashlib
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
from ray_platform.contracts import FeatureNetwork, Generator, Rows, Scorer
from ray_platform.data.causes import RejectedSample, SampleError
from ray_platform.data.decode import resized, rgb, thumbnail_jpeg
from ray_platform.evaluate.sets import DatasetSlice, RawSample, read_slice

# Images per model call, and per call for the remainder of a unit; the last batch is filled up. Results of other batch shapes
# differ in their last bits, so a unit always has the same batches, whichever replica runs it.
BATCH_SIZE, REMAINDER_SIZE = 32, 8


class WorkerModels:
    """The models of a replica by name, each built when it is first used, and the threads that decode images."""

    def __init__(self, builders: Mapping[str, Callable[[str], Any]], num_threads: int, device: str):
        """`builders` return a Scorer, a Generator or a FeatureNetwork on a torch device."""
        torch.set_num_threads(num_threads)
        _keep_freed_memory()
        self.device, self._builders = device, builders
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.lock = threading.Lock()  # of two units in flight, one computes while the other one is read and decoded
        self._models: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        with self.lock:
            if name not in self._models:
                self._models[name] = self._builders[name](self.device)
            return self._models[name]

    def in_batches(self, call: Callable[..., np.ndarray], *columns: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return the results of `call` on batches of the columns' rows (at least one), concatenated."""
        results, num_rows, start = [], len(columns[0]), 0
        while start < num_rows:
            size = BATCH_SIZE if num_rows - start >= BATCH_SIZE else REMAINDER_SIZE
            # The last batch is filled up with the first rows.
            batch = [[column[row % num_rows] for row in range(start, start + size)] for column in columns]
            with self.lock:
                results.append(call(*batch))
            start += size
        return np.concatenate(results)[:num_rows]

    def extract_features(self, networks: Sequence[str], images: Sequence[np.ndarray] | np.ndarray) -> Rows:
        """Return `features/<network>` [n, d] of n images of any sizes."""
        rows = {}
        for name in networks:
            key = f"features/{name}"  # a scorer may have the name alone
            network: FeatureNetwork = self[key]
            inputs = list(self.pool.map(network.preprocess, [image[None] for image in images]))
            by_shape: dict[torch.Size, list[int]] = {}  # one, unless the network takes images of any size
            for index, each in enumerate(inputs):
                by_shape.setdefault(each.shape, []).append(index)
            parts = [
                self.in_batches(
                    lambda batch, network=network: network.embed_inputs(torch.cat(batch)).cpu().numpy(),
                    [inputs[index] for index in indices],
                )
                for indices in by_shape.values()
            ]
            places = np.argsort(np.concatenate(list(by_shape.values())))
            rows[key] = np.concatenate(parts)[places]
        return rows


def _keep_freed_memory() -> None:
    """Keep glibc from returning a batch's large blocks to the kernel, which zeroes their pages again for the next batch: that
    took longer than a small network itself."""
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)  # the largest value that it accepts
        libc.mallopt(trim_threshold, 2**30)


@dataclass(frozen=True)
class EmbedClasses:
    """Embeds class names with templates."""

    scorer: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def run(self, models: WorkerModels) -> Rows:
        """Return embeddings [num_classes, D] float32."""
        scorer: Scorer = models[self.scorer]
        with models.lock:
            return {"embeddings": scorer.embed_classes(self.class_names, self.templates)}


def _content_digest(sample: RawSample | RejectedSample) -> str:
    """Return 16 hex digits over what is stored of a sample; "" if it could not be read."""
    if isinstance(sample, RejectedSample):
        return ""
    hashed = hashlib.sha256(sample.image)
    hashed.update(repr((sample.label, sample.captions)).encode())
    return hashed.hexdigest()[:16]


def _prepare(sample: RawSample | RejectedSample, preprocess: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | str:
    """Return the preprocessed image, or the cause for which it cannot be used."""
    if isinstance(sample, RejectedSample):
        return sample.cause
    try:
        return preprocess(rgb(sample.image))
    except SampleError as error:
        return error.cause
    except MemoryError:
        return "image_too_large"


@dataclass(frozen=True)
class Thumbnails:
    """Small images of some samples of a slice, for the report."""

    slice: DatasetSlice
    keys: tuple[str, ...]

    def run(self, models: WorkerModels) -> Rows:
        """Return keys [n], sizes [n] in bytes and jpegs [sum of sizes] uint8 of the images that can be read."""
        samples = [sample for sample in read_slice(self.slice) if sample.key in self.keys]
        thumbnails = models.pool.map(lambda sample: _prepare(sample, _thumbnail), samples)
        jpegs = {sample.key: jpeg for sample, jpeg in zip(samples, thumbnails, strict=True) if isinstance(jpeg, np.ndarray)}
        return {
            "keys": np.array(list(jpegs), dtype=np.str_),
            "sizes": np.array([len(jpeg) for jpeg in jpegs.values()], dtype=np.int64),
            "jpegs": np.concatenate([np.empty(0, dtype=np.uint8), *jpegs.values()]),
        }


def _thumbnail(image: np.ndarray) -> np.ndarray:
    return np.frombuffer(thumbnail_jpeg(image), dtype=np.uint8)


@dataclass(frozen=True)
class EmbedImages:
    """Embeds the images of a slice, with their labels, or with their captions and the captions' embeddings."""

    scorer: str
    slice: DatasetSlice
    settings: Mapping[str, float]
    seed: int = 0  # of the noise
    num_sampled: int | None = None  # None: all samples of the slice

    def run(self, models: WorkerModels) -> Rows:
        """Return the rows of n samples, r of which could be read.

        keys [n], labels [n] (-1: none), causes [n] ("": the image was read), contents [n] (digests) and embeddings [r, D]. For a
        retrieval set also num_texts [n], texts [m] and text_embeddings [m, D], in the order of the samples.
        """
        scorer: Scorer = models[self.scorer]
        samples = read_slice(self.slice)
        if self.num_sampled is not None:
            samples = [samples[index] for index in choose_sample([sample.key for sample in samples], self.num_sampled)]
        images = list(models.pool.map(lambda sample: _prepare(sample, scorer.preprocess), samples))
        raw = [sample if isinstance(sample, RawSample) else None for sample in samples]
        rows: Rows = {
            "keys": np.array([sample.key for sample in samples], dtype=np.str_),
            "labels": np.array([sample.label if sample else -1 for sample in raw], dtype=np.int32),
            "causes": np.array([image if isinstance(image, str) else "" for image in images], dtype=np.str_),
            "contents": np.array(list(models.pool.map(_content_digest, samples)), dtype=np.str_),
        }
        readable = [index for index, image in enumerate(images) if not isinstance(image, str)]
        if readable:
            # The noise of a sample depends on the seed, its set and key, never on a rank or batch.
            prefix = f"seed {self.seed}/" if self.seed else ""
            noise_keys = [f"{prefix}{self.slice.schema.set_name}/{samples[index].key}" for index in readable]
            rows["embeddings"] = models.in_batches(
                lambda batch, keys: scorer.embed_images(np.stack(batch), keys, **self.settings),
                [images[index] for index in readable],
                noise_keys,
            )
        if self.slice.schema.task == "zeroshot_retrieval":
            rows["num_texts"] = np.array([len(sample.captions) if sample else 0 for sample in raw], dtype=np.int32)
        if texts := [text for sample in raw if sample for text in sample.captions]:
            rows["texts"] = np.array(texts)
            with models.lock:
                rows["text_embeddings"] = scorer.embed_texts(texts)
        return rows


def digest_of_contents(rows: Rows) -> str:
    """Return 16 hex digits over the keys and contents of samples. They do not depend on where and when the data were stored."""
    lines = "\n".join(f"{key} {content}" for key, content in zip(rows["keys"], rows["contents"], strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def choose_sample(keys: Sequence[str], count: int) -> list[int]:
    """Return the indices of `count` of the keys, or of all if there are fewer: a random choice that depends on the keys alone."""
    order = sorted(range(len(keys)), key=lambda index: hashlib.sha256(keys[index].encode()).digest())
    return sorted(order[:count])


@dataclass(frozen=True)
class MeasureImages:
    """Extracts features of the images of a slice, which are compared with those of other images."""

    slice: DatasetSlice
    networks: tuple[str, ...]
    image_size: int  # images are first cropped to a square and resized to this size, like the generated ones; 0: not changed
    num_sampled: int | None = None  # None: all images of the slice

    def run(self, models: WorkerModels) -> Rows:
        """Return keys [n], contents [n] (digests) and `features/<network>` [n, d] of the n images that can be read.

        And causes [m] of the others.
        """
        samples, size = read_slice(self.slice), (self.image_size, self.image_size)
        if self.num_sampled is not None:
            samples = [samples[index] for index in choose_sample([sample.key for sample in samples], self.num_sampled)]
        preprocess = (lambda image: resized(image, size)) if self.image_size else np.asarray
        prepared = list(models.pool.map(lambda sample: _prepare(sample, preprocess), samples))
        readable = [sample for sample, image in zip(samples, prepared, strict=True) if not isinstance(image, str)]
        contents = np.array(list(models.pool.map(_content_digest, readable)), dtype=np.str_)
        images = [image for image in prepared if not isinstance(image, str)]
        causes = np.array([image for image in prepared if isinstance(image, str)], dtype=np.str_)
        features = models.extract_features(self.networks, images) if images else {}
        return {"keys": np.array([sample.key for sample in readable]), "contents": contents, "causes": causes, **features}


@dataclass(frozen=True)
class Ranking:
    """Chooses the image that fits its prompt best."""

    ranker: str  # a Scorer
    best_of: int  # images of each prompt
    settings: Mapping[str, float]  # of the ranker's embed_images


@dataclass(frozen=True)
class GenerateImages:
    """Generates images for some prompts and extracts their features and their alignment with the prompts."""

    generator: str
    prompts: tuple[str, ...]
    first: int  # index of the first prompt among all prompts
    settings: Mapping[str, float]
    networks: tuple[str, ...]
    aligner: str  # the Scorer that measures how well an image fits its prompt; empty: nothing measures it
    images_dir: str  # where images with an index below `num_kept` are stored
    num_kept: int
    ranking: Ranking | None = None  # of several images per prompt; None: there is one

    def run(self, models: WorkerModels) -> Rows:
        """Return `features/<network>` [n, d], and with an aligner alignment [n]: the cosine of image and prompt.

        With a ranking, they are those of each prompt's first image, and `best/<name>` those of its best one; `best_number` [n] is
        the best one's number among the images of its prompt.
        """
        indices = range(self.first, self.first + len(self.prompts))
        images = self._generate(models, indices)
        for index, image in zip(indices, images, strict=True):
            if index < self.num_kept:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                storage.write_bytes(storage.join(self.images_dir, image_name(index)), buffer.getvalue())
        rows = self._measure(models, indices, images)
        if self.ranking:
            candidates, scores = [images], [self._alignments(models, self.ranking.ranker, indices, images, self.ranking.settings)]
            for number in range(1, self.ranking.best_of):
                names = [f"{index}/{number}" for index in indices]  # as `DiffDisPipeline.generate` with best_of
                candidates.append(self._generate(models, names))
                scores.append(self._alignments(models, self.ranking.ranker, names, candidates[-1], self.ranking.settings))
            rows["best_number"] = np.stack(scores).argmax(axis=0)
            best = np.stack([candidates[number][row] for row, number in enumerate(rows["best_number"])])
            rows |= {f"best/{name}": values for name, values in self._measure(models, indices, best).items()}
        return rows

    def _generate(self, models: WorkerModels, names: Sequence[int | str]) -> np.ndarray:
        """Return an image per prompt, [n, H, W, 3] uint8, whose noise depends on its name."""
        generator: Generator = models[self.generator]
        return models.in_batches(
            lambda prompts, names: generator.generate_images(prompts, names, **self.settings), self.prompts, names
        )

    def _measure(self, models: WorkerModels, indices: Sequence[int], images: np.ndarray) -> Rows:
        rows = models.extract_features(self.networks, images)
        if self.aligner:
            rows["alignment"] = self._alignments(models, self.aligner, indices, images, {})
        return rows

    def _alignments(
        self,
        models: WorkerModels,
        scorer_name: str,
        names: Sequence[int | str],
        images: np.ndarray,
        settings: Mapping[str, float],
    ) -> np.ndarray:
        """Return the cosine of each image and its prompt, [n]."""
        scorer: Scorer = models[scorer_name]
        preprocessed = list(models.pool.map(scorer.preprocess, images))
        keys = [f"generated/{name}" for name in names]
        embedded = models.in_batches(
            lambda batch, keys: scorer.embed_images(np.stack(batch), keys, **settings), preprocessed, keys
        )
        with models.lock:
            return (embedded * scorer.embed_texts(self.prompts)).sum(axis=1)


def image_name(index: int) -> str:
    """Return the file name of a generated image."""
    return f"{index:06d}.png"
