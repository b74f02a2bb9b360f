"""Configuration of an evaluation."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from diffdis_platform.config.parse import MAX_CONFIG_BYTES, check_output_dir
from ray_platform.contracts import ConfigError, one_line
from ray_platform.placement import check_labels
from ray_platform.storage_config import StorageConfig
from ray_platform.tracking import TrackingConfig

RETRIEVAL = ("flickr30k", "mscoco_captions")
QUICK = ("vtab/cifar10", "vtab/dtd", "vtab/pets", "vtab/eurosat")
_SET_NAME = re.compile(r"(?=.{1,100}$)[\w.-]+(/[\w.-]+)*")  # it becomes part of the names of files and metrics
_STEPS = re.compile(r"all|every:[1-9]\d*")
_MODEL_NAME = re.compile(r"\w[\w. -]{0,99}")  # it becomes a folder of the results
DEMO = ("heldout_style", "heldout_names", "heldout_pairs")  # which jobs/build_demo_shards.py writes


@dataclass(frozen=True)
class ScoringConfig:
    """Settings of the denoising of an image's text query."""

    num_steps: int = 10
    num_draws: int = 1  # averaged; with the one-way mask they share one pass over the image
    guidance: float = 0.0  # the paper's w, over the image; needs a model trained with image_dropout


@dataclass(frozen=True)
class QualityConfig:
    """Prompts, reference and networks of the image quality. Without prompts, no images are generated."""

    prompts: str = ""  # text file with one prompt per line, or the folder of a retrieval set, whose first captions are used
    # Real images (a folder, tars), or the reference_<network>.npz that an earlier evaluation wrote.
    reference: str = ""
    num_images: int = 30_000  # generated images: at most so many of the first prompts
    num_reference: int = 0  # real images: a random sample of this size, the same for every model and seed; 0: all
    networks: tuple[str, ...] = ("efficientnet_lite0",)  # and inception, which needs `inception`
    inception: str = ""  # pt_inception-2015-12-05-6726825d.pth, local or s3://
    resize: Literal["pytorch_fid", "torch_fidelity", "clean_fid"] = "clean_fid"  # to Inception's 299 px
    clip: str = ""  # a CLIP in transformers' layout for CLIPScore; empty: the evaluated model judges its own images
    guidance_scales: tuple[float, ...] = (3.0,)  # several give a curve of distance against alignment
    num_steps: int = 50  # of DDIM
    seed: int = 0
    keep_images: bool = False  # keep all images; the report always keeps the first 64

    def __post_init__(self) -> None:
        if self.prompts and not self.reference:
            raise ConfigError("quality.reference: give the real images (a folder or tars) that generated ones are compared with")
        if "inception" in self.networks and not self.inception:
            raise ConfigError("quality.inception: the network inception needs its file, pt_inception-2015-12-05-6726825d.pth")
        if self.num_images < 2 or self.num_steps < 1 or not self.guidance_scales or not self.networks:
            raise ConfigError("quality: at least 2 images, 1 step, 1 guidance scale and 1 network")
        if self.num_reference and (self.num_reference < 2 or self.reference.endswith(".npz")):
            raise ConfigError(
                f"quality.num_reference: {self.num_reference} is not 0 (all) or at least 2 of the images in a folder or tars; "
                "correct it, or leave it out for a reference_<network>.npz"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation: model, evaluation sets, settings and workers."""

    # An exported model, a step_* folder, a run's output_dir for its newest checkpoint, or a CLIP or SigLIP; local or s3://.
    checkpoint: str = ""
    steps: str = ""  # of a run's checkpoints: "all", or "every:5000" for multiples of 5000; empty: the newest one
    weights: Literal["best", "ema", "weights"] = "best"  # of a checkpoint; best: the EMA if it has one
    output_dir: str = ""  # absolute folder or s3:// URL; several models may be evaluated into one
    name: str = ""  # of the model in the results; empty: its run or folder, and its step
    # paper: the 12 sets and retrieval; quick: four small sets; demo: the demo's sets; names of known sets, separated by commas;
    # or a YAML file, see docs/evaluation.md
    suite: str = "paper"
    class_names: str = ""  # text file of a suite of one set: a class per line, in label order; empty: the set's own
    templates: str = ""  # text file of a suite of one set: a template per line, with {c} for the class; empty: the set's own
    data_roots: tuple[str, ...] = ()  # folders or s3:// URLs that are searched for evaluation sets
    baselines: tuple[str, ...] = ()  # CLIPs and SigLIPs in transformers' layout, scored by the same code on the same sets
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    seeds: int = 1  # how often the model is measured, with other noise each time; the results have the spread
    # How images of CLIPs are resized: pillow gives the pixels of published scores, torch takes a fifth of the time and differs by
    # 1 gray level, rarely 2, in about 0.3 % of the values.
    resize: Literal["torch", "pillow"] = "torch"
    curve_set: str = ""  # set of the suite for the curve of accuracy against steps and draws
    curve_steps: tuple[int, ...] = (1, 2, 5, 10)
    curve_draws: tuple[int, ...] = (1, 4)
    limit: int = 0  # images per set, a random sample; 0: all. A limited set is in no mean and not compared with published figures
    allow_missing: bool = False  # continue without the sets that are not found
    allow_short: bool = False  # score a set with fewer images than published
    num_workers: int = 0  # model replicas; 0: as many as the cluster has resources for
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0  # 0.5: two share a GPU; 0: on CPUs
    placement: dict[str, str] = field(default_factory=dict)  # labels of the workers' nodes, as {pool: gpu}; empty: any
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # used if the run of the checkpoint is unknown

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError("num_workers and gpus_per_worker: at least 0; cpus_per_worker: above 0")
        if self.scoring.num_steps < 1 or self.scoring.num_draws < 1:
            raise ConfigError("scoring.num_steps and scoring.num_draws: at least 1")
        if self.steps and not _STEPS.fullmatch(self.steps):
            raise ConfigError(f"steps: {self.steps!r}; use all, or every:N for the checkpoints whose step is a multiple of N")
        if self.seeds < 1 or self.limit < 0:
            raise ConfigError(f"seeds: at least 1 ({self.seeds}); limit: at least 0 ({self.limit})")
        if self.name and not _MODEL_NAME.fullmatch(self.name):
            raise ConfigError(f"name: {self.name[:120]!r}; use up to 100 letters, digits, spaces and . - _")
        check_labels("placement", self.placement)

    def check_job(self) -> None:
        """Raise ConfigError if a field that an evaluation needs is missing."""
        if not self.checkpoint:
            raise ConfigError("checkpoint: give an exported model, a step_* folder, or a run's output_dir")
        check_output_dir(self.output_dir)
        if not (self.data_roots or self.allow_missing or self.suite.endswith((".yaml", ".yml"))):
            raise ConfigError(f"data_roots: empty; give the folders or s3:// URLs that have the sets of the suite {self.suite}")


def network_name(network: str) -> str:
    """Return the short name of an entry of `quality.networks`: a model in a folder has the folder's name."""
    return network.rstrip("/").rpartition("/")[2]


def suite_sets(suite: str) -> dict[str, str]:
    """Return the folder of each set of a suite, or "" for a set below data_roots. Raises ConfigError."""
    from ray_platform import storage
    from ray_platform.evaluate.sets import KNOWN_SETS, PAPER_SETS

    suites = {"paper": (*PAPER_SETS, *RETRIEVAL), "quick": QUICK, "demo": DEMO}
    if suite in suites:
        return dict.fromkeys(suites[suite], "")
    if not suite.endswith((".yaml", ".yml")):
        names = [name.strip() for name in suite.split(",")]
        if unknown := [name for name in names if name not in (*KNOWN_SETS, *DEMO)]:
            short_names = {name.rpartition("/")[2]: name for name in [*suites, *KNOWN_SETS]}
            near = difflib.get_close_matches(unknown[0].rpartition("/")[2].lower(), short_names, 1)
            raise ConfigError(
                f"suite: {unknown[0]} is none of {', '.join(suites)}, not the name of a known set (see --list), "
                "and not a .yaml file" + (f"; did you mean {short_names[near[0]]}?" if near else "")
            )
        return dict.fromkeys(names, "")
    try:
        content: Any = yaml.safe_load(storage.read_small(suite, MAX_CONFIG_BYTES))
        sets = content["sets"]
        found = dict.fromkeys(sets, "") if isinstance(sets, list) else {name: url or "" for name, url in sets.items()}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"suite: {suite} is not `sets:` with a list of names, or `name: folder` pairs ({one_line(error)})"
        ) from None
    if not found or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise ConfigError(f"suite: {suite}: `sets:` needs at least one name, and names and folders must be texts")
    if odd := [name for name in found if not _SET_NAME.fullmatch(name) or ".." in name.split("/")]:
        raise ConfigError(
            f"suite: {suite}: {odd[0][:120]!r} cannot name a set: up to 100 letters, digits and . - _ in parts joined by /"
        )
    return found
