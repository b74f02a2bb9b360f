"""Typed records of what the pages show: the details of an evaluation, a sweep and a comparison.

They are TypedDicts because each one is stored as JSON (`details.json`, `summary.json`) and a page can be built
again from the file. Keys that older releases did not write, and parts that may not have been measured, are optional.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from ray_platform.metric_registry import Direction

NestedFields = Mapping[str, Any]  # values by field; a value may be a mapping again
MetricValues = Mapping[str, float | None]  # by the names that the metric registry declares


class RunHeader(TypedDict):
    title: str
    created: str  # ISO 8601, local time
    seconds: float
    code_version: str


class EvaluatedModel(TypedDict):
    """A model of an evaluation; the first one is what the report is about, the others are baselines."""

    name: str
    pretrained: str  # folder or URL of the checkpoint
    task: str
    step: int | None
    settings: NestedFields
    weights_digest: NotRequired[str]
    preprocessing: NotRequired[str]  # of images
    dtype: NotRequired[str]


class ReusedUnits(TypedDict):
    """Units whose rows an earlier evaluation computed."""

    code_version: str
    num_units: int
    oldest: str  # ISO 8601, local time
    newest: str


class ReuseCounts(TypedDict):
    """Units of work of a result, and which of them were computed earlier."""

    num_units: int
    num_reused: int
    reused: Sequence[ReusedUnits]  # by code version


class UnreadableSample(TypedDict):
    key: str
    cause: str


class PairedDifference(TypedDict):
    """Mean difference of paired values, such as two models on one set or two arms over their seeds, and its 95 % interval."""

    mean: float | None
    low: float | None  # None if one pair does not determine it
    high: float | None
    n: int
    detectable: NotRequired[float | None]  # smallest difference that is found with 80 % power; comparisons only


class DatasetResult(TypedDict):
    set: str
    model: str
    url: NotRequired[str]  # folder of the dataset
    data_digest: NotRequired[str]  # over names, sizes and versions of the files
    content_digest: NotRequired[str]  # over what was read; it does not depend on where and when the data were stored
    layout: NotRequired[str]
    num_templates: NotRequired[int]
    templates: NotRequired[str]  # where they come from: "published for the set", "ImageNet's, the fallback", or a file
    class_names: NotRequired[str]  # where they come from: "published for the set", or a file or folder
    seed: NotRequired[int | None]  # of the noise; None for models without noise
    standard_errors: NotRequired[MetricValues]  # over the images of the set
    seeds: NotRequired[Mapping[str, Sequence[float | None]]]  # metric -> values for each seed
    differences: NotRequired[dict[str, Mapping[str, PairedDifference]]]  # baseline -> metric -> this model minus it
    settings: NotRequired[NestedFields]  # of the model
    metrics: MetricValues
    units: NotRequired[ReuseCounts]
    seconds: float
    unreadable: Sequence[UnreadableSample]  # the first ones
    num_unreadable: int
    num_expected: NotRequired[int | None]  # images of the published set; None for other sets
    num_missing: NotRequired[int]  # images that the published set has, and this one lacks
    limit: NotRequired[int]  # size of a random sample of the set that was measured; 0: all of it
    is_complete: NotRequired[bool]  # every image was read; only then it is compared with published figures


def is_complete(result: DatasetResult) -> bool:
    """Return whether every image of the set was read; results of earlier releases only know how many could not be read."""
    return result.get("is_complete", not result["num_unreadable"])


class ExampleImage(TypedDict):
    key: str
    jpeg: NotRequired[str]  # base64; absent if the image could not be fetched


class ClassRecall(TypedDict("ClassName", {"class": str})):
    count: int  # images of the class
    recall: float | None  # None without images


class Confusion(TypedDict):
    """A class whose images were taken for another class."""

    true: str
    predicted: str
    count: int
    fraction: float  # of the images of class `true`
    examples: Sequence[ExampleImage]


class PredictedClass(TypedDict):
    name: str
    right: bool


class PredictedImage(ExampleImage):
    """An image with its true class and the classes that score highest."""

    true: str
    predicted: Sequence[PredictedClass]  # best first


class ZeroShotResult(DatasetResult):
    main_metric: str
    n: int  # images
    chance: float  # accuracy of guessing
    per_class: Sequence[ClassRecall]
    confusions: Sequence[Confusion]
    examples: NotRequired[Sequence[PredictedImage]]  # a random choice of correct and of incorrect predictions


class RetrievedImage(ExampleImage):
    similarity: float
    right: bool


class RetrievedCaption(TypedDict):
    text: str
    similarity: float
    right: bool


class CaptionQuery(TypedDict):
    caption: str
    images: Sequence[RetrievedImage]  # best first


class ImageQuery(ExampleImage):
    captions: Sequence[RetrievedCaption]  # best first


class RetrievalResult(DatasetResult):
    n: NotRequired[int]  # images
    num_images: int
    num_texts: int
    examples: Sequence[CaptionQuery]
    image_examples: Sequence[ImageQuery]


class GeneratedSample(TypedDict):
    caption: str
    png: str  # base64


class QualityPoint(TypedDict):
    guidance_scale: float
    metrics: MetricValues
    alignment_by: NotRequired[str]  # the model that measured `alignment`
    protocol: NestedFields
    warnings: NotRequired[Sequence[str]]  # what limits the figures
    n: int  # images
    num_reference: NotRequired[Mapping[str, int]]  # feature network -> real images
    units: NotRequired[ReuseCounts]
    seconds: float
    samples: Sequence[GeneratedSample]


class CurvePoint(TypedDict):
    set: str
    model: str
    num_steps: int
    num_draws: int
    acc1: float | None
    seconds: float


class StepScore(TypedDict):
    """Main metric of a set for one checkpoint of a run."""

    step: int
    set: str
    metric: str
    value: float | None
    standard_error: float | None


class EvaluationDetails(RunHeader):
    """`details.json` of an evaluation; the file lacks the images."""

    models: Sequence[EvaluatedModel]
    zero_shot: NotRequired[Sequence[ZeroShotResult]]
    means: NotRequired[Mapping[str, float | None]]  # model -> mean over all sets of the benchmark; None if one is missing
    published: NotRequired[Mapping[str, Mapping[str, float]]]  # model -> set or "mean" -> main metric
    retrieval: NotRequired[Sequence[RetrievalResult]]
    published_retrieval: NotRequired[Mapping[str, Mapping[str, MetricValues]]]  # model -> set -> metrics
    published_sources: NotRequired[Mapping[str, Mapping[str, str]]]  # where figures come from -> model -> its name there
    published_notes: NotRequired[Sequence[str]]  # what else was published
    quality: NotRequired[Sequence[QualityPoint]]
    curve: NotRequired[Sequence[CurvePoint]]
    over_training: NotRequired[Sequence[StepScore]]  # of all checkpoints that were evaluated by one command
    units: NotRequired[ReuseCounts]
    warnings: NotRequired[Sequence[str]]  # about the sets, such as class names that occur twice
    unfinished: NotRequired[Sequence[str]]  # sets that were still being measured when this was written
    failures: NotRequired[Sequence[str]]


class ObjectiveRecord(TypedDict):
    metric: str
    mode: Direction


class HistoryEntry(TypedDict):
    step: int
    samples: int
    seconds: float
    metrics: MetricValues


class TrialRecord(TypedDict):
    name: str
    state: Literal["finished", "stopped", "failed"]
    default: bool  # trained with the recipe's values
    error: str
    values: NestedFields  # field -> value
    history: Sequence[HistoryEntry]
    metrics: MetricValues  # of the last milestone
    run_id: str
    url: str  # its folder
    run_page: NotRequired[str]  # URL of its MLflow run; earlier releases lack it


class SearchDimension(TypedDict, total=False):
    """The values of a field: either `values`, or a range from `low` to `high`."""

    values: Sequence[Any]
    low: float
    high: float
    log: bool


class SweepDetails(RunHeader):
    """`details.json` of a sweep."""

    command: str
    recipe: str
    objectives: Sequence[ObjectiveRecord]
    space: Mapping[str, SearchDimension]
    budget_samples: int  # that a finished trial was trained on
    scheduler: str
    search: str
    trials: Sequence[TrialRecord]
    front: Sequence[str]  # names of the trials on the Pareto front of all objectives
    best: Mapping[str, str]  # metric -> name of the trial


class ArmResult(TypedDict):
    seeds: Mapping[str, NestedFields]  # seed -> metrics and costs of the run; `environment` is text
    mean: MetricValues
    std: MetricValues  # None with one seed


class ClaimResult(TypedDict):
    holds: bool
    why: str


class ImageGrid(TypedDict):
    arm: str
    seed: int
    samples: Sequence[GeneratedSample]


class TrainingPoint(TypedDict):
    samples: int
    metrics: MetricValues


class ComparisonDetails(RunHeader):
    """`summary.json` of a comparison, with `best_of_<n>` if images were chosen, its header, images and learning curves."""

    command: str
    config: NotRequired[NestedFields]
    config_digest: NotRequired[str]
    environment: NotRequired[str]
    selected_on: NotRequired[Sequence[int]]  # seeds on which settings were chosen; `paired` is about the others, `fresh`
    fresh: NotRequired[Sequence[int]]
    arms: Mapping[str, ArmResult]
    paired: NotRequired[Mapping[str, PairedDifference]]  # `<metric>_<arm>_minus_<arm>`
    claim: ClaimResult
    failures: NotRequired[Sequence[str]]
    grids: NotRequired[Sequence[ImageGrid]]
    curves: NotRequired[Mapping[str, Mapping[str, Sequence[TrainingPoint]]]]  # arm -> seed -> points


@dataclass(frozen=True)
class Claim:
    """What a comparison is about: differences that must all favor their first arm, and a sentence for each outcome."""

    differences: tuple[tuple[str, str, str], ...]  # (metric, first arm, second arm)
    holds: str
    opposite: str  # a difference is significant in the other direction
    partly: str  # some differences are significant, and the intervals of the others include zero
    not_shown: str  # all intervals include zero
    undecided: str  # not everything was measured over several seeds
