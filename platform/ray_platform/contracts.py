"""The types that the packages of the platform exchange, and the protocols of what they train and evaluate.

A Task comes from outside, as `diffdis.task`, and satisfies `Task` by its shape alone: neither library imports the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict

from ray_platform.json_values import JsonObject
from ray_platform.redaction import redacted

if TYPE_CHECKING:  # every read worker imports this file, and torch would double its start and its memory
    import numpy as np
    import torch


class UserError(Exception):
    """One line for people. It may quote what a user or a server wrote: secrets in it are not shown, wherever it is."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class DataError(UserError):
    """A source, shard or sample that cannot be used. The message names it and says what to do."""


class ConfigError(UserError):
    """A field, or a combination of fields, that cannot work. The message names it and says what to do."""


class TrainingError(UserError):
    """The training run ended before its last step. The message states the cause in one line."""


@contextlib.contextmanager
def named_field(field: str) -> Iterator[None]:
    """Add the name of the field to a DataError about its URLs."""
    try:
        yield
    except DataError as error:
        if str(error).startswith("data."):
            raise
        raise DataError(f"{field}: {error}") from error


def one_line(error: BaseException | str, max_length: int | None = None) -> str:
    """Return the text of an error on one line, without secrets and with at most `max_length` characters.

    For an error without a text, that is the name of its type.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = redacted(" ".join(str(error).split())) or type(error).__name__
    return text if max_length is None or len(text) <= max_length else f"{text[: max_length - 1]}…"


def root_cause(error: BaseException) -> BaseException:
    """Return the error that led to `error`: `Connection refused` instead of a paragraph about retries."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return error


def describe_error(error: BaseException) -> str:
    """Return `one_line(error)` for a `UserError`; the text of any other error is shortened and preceded by its type."""
    if isinstance(error, UserError):
        return one_line(error)
    text = one_line(error, max_length=500)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


# Arrays by name, such as the results of a unit of work: numbers and strings, no objects.
Rows = dict[str, "np.ndarray"]


class UnitOrigin(NamedTuple):
    """When a stored unit of work was computed, and by which code."""

    code_version: str
    created: str  # ISO 8601, local time


class ConsumedRange(NamedTuple):
    """Samples start..stop of a unit (a shard, or a part of one) were consumed, unusable ones included; it has `total`.

    Samples are counted in the order in which that epoch reads the unit.
    """

    pool: int
    epoch: int
    unit: int
    start: int
    stop: int
    total: int


class MixtureState(NamedTuple):
    """Where a rank's mixture of weighted sources stands after a batch."""

    credits: Sequence[float] = ()  # per pool: samples that it is behind its weight
    waiting: Sequence[int] = ()  # pools of the samples that wait for a batch of their shape


@dataclass(frozen=True)
class Batch:
    """A batch of a rank's data stream, of B = micro_batch_size samples."""

    # Either `image`, [B, H, W, 3] uint8 RGB, or the precomputed results of the Task's encoders.
    tensors: Mapping[str, np.ndarray]
    captions: Sequence[str]  # B
    keys: Sequence[str]  # B; "<shard name>/<key in the tar>", unique in the source
    consumed: Sequence[ConsumedRange]  # since the previous batch: this batch's samples, and those that were skipped
    skipped: Mapping[str, int]  # cause -> samples skipped since the stream began, on this rank
    epoch_samples: float = 0.0  # of the whole source, as far as this rank knows
    skip_details: Mapping[str, str] = field(default_factory=dict)  # cause -> the latest error of storage on this rank
    mixture: MixtureState = field(default_factory=MixtureState)  # after this batch


class Encoder(Protocol):
    """The frozen half of a Task, whose results can be computed before training."""

    def encode(self, images: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode images [B, H, W, 3] uint8 and their captions to arrays of B rows each, in half precision."""


class TrainingFacts(TypedDict):
    """What the model card of an export reports about the training."""

    recipe: str
    data: str  # the sources of the training data
    data_digest: str
    step: int
    samples_seen: int
    scores: dict[str, float]


class Task(Protocol):
    """A model and its training objective, as the trainer sees them.

    `module(inputs, seed, **more)` returns the loss of a micro-batch and its metrics, with all randomness derived from `seed`. A
    metric is a [2] tensor, a weighted sum and its weight; both are added over ranks, micro-batches and steps, and divided when
    they are logged. With `train.precision` bf16 or fp16 the weights have that type, and `module` converts its inputs to it.

    Every rank calls every method that runs `module` equally often, because each call is a collective under ZeRO 3.
    """

    module: torch.nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW groups over `module`'s trainable parameters: `params`, `lr`, `weight_decay` and a `name` for the log.

        A group may have a `max_value`, to which its parameters are limited after each update, and `float32`: its parameters stay
        float32 where `train.precision` converts the others to half precision, except under ZeRO 3.
        """

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""

    def compile(self) -> None:
        """Compile `module`, or its parts, with torch.compile at their next call."""

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        """Convert a batch, of images and captions or precomputed, to the inputs of `module`."""

    def precompute_step_loss(
        self, inputs: Sequence[dict[str, torch.Tensor]], seeds: Sequence[int], control: bool, progress: float
    ) -> Sequence[Mapping[str, Any]]:
        """Return more keyword arguments of `module` for each micro-batch of an optimizer step.

        Called before the first micro-batch runs, so that a loss can depend on all samples of the step. `control`: `module` also
        returns the metrics that cost additional operations, which is so every `train.control_every` steps. `progress`: the
        fraction of `train.num_steps` before this step, for the weights of losses that change over the run.
        """

    def embed_heldout(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what `score` needs of B validation samples: tensors of B rows each. Called without gradients."""

    def score(self, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return metrics over all ranks' rows of all validation samples, each sample once."""

    def preview(self, rank: int, world_size: int) -> dict[int, np.ndarray]:
        """Generate this rank's part of the preview images, {index: [H, W, 3] uint8}, always of the same captions and noise.

        Called without gradients.
        """

    def preview_page(self, images: Mapping[int, np.ndarray]) -> bytes:
        """Return all ranks' preview images as one PNG."""

    def save_pretrained(
        self, state_dict: Mapping[str, torch.Tensor], folder: Path, training: TrainingFacts | None = None
    ) -> Sequence[str]:
        """Write a folder from which the model can be used without this platform, and return what it was opened with as a check.

        Raises ValueError if a library does not open it or gives other results.
        """

    def describe(self, captions: Sequence[str] = ()) -> JsonObject:
        """Return what was built, for the log: parameter counts, what a warm start loaded, what `captions` of the data show."""


class Scorer(Protocol):
    """A model that measures how well images and texts fit each other: DiffDis, or a CLIP as the baseline.

    Equal images, keys and settings give equal embeddings, whatever the batch.
    """

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Return one row of the input of `embed_images` for RGB uint8 [H, W, 3] of any size. Called from several threads."""

    def embed_images(self, images: np.ndarray, keys: Sequence[str], **settings: Any) -> np.ndarray:
        """Return [B, D] float32 of unit norm for [B, ...]. The noise of an image, if there is any, depends on its key."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 of unit norm."""

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return [num_classes, D] float32 of unit norm: each class over all templates, whose "{c}" is its name."""


class Generator(Protocol):
    """A model that generates images from captions, in an evaluation."""

    def generate_images(self, captions: Sequence[str], indices: Sequence[int | str], **settings: Any) -> np.ndarray:
        """Return [B, H, W, 3] uint8. The noise of an image depends on its index among all prompts, not on the batch.

        Other images of a prompt have names as their index, such as 7/1.
        """


class FeatureNetwork(Protocol):
    """A network whose features of real and generated images the Fréchet distance compares."""

    figure: str  # the name of a distance between its features: "fid" or "fd_<network>"
    protocol: JsonObject  # everything that the features depend on: equal protocols make features comparable

    def preprocess(self, images: np.ndarray) -> torch.Tensor:
        """Return the network's input [B, ...] for uint8 [B, H, W, 3]. Called from several threads."""

    def embed_inputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return float32 [B, d] of the network's input [B, ...]."""
