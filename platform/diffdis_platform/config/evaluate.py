"""Configuration of an evaluation."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from diffdis_platform.config.parse import MAX_CONFIG_BYTES, check_output_dir
from ray_platform.contracts import ConfigError, one_line
from ray_platform.placement import check_labels
from ray_platform.tracking import TrackingConfig

RETRIEVAL = ("flickr30k", "mscoco_captions")
QUICK = ("vtab/cifar10", "vtab/dtd", "vtab/pets", "vtab/eurosat")
_SET_NAME = re.compile(r"(?=.{1,100}$)[\w.-]+(/[\w.-]+)*")  # it becomes a part of files' names, and of metrics'
DEMO = ("heldout_style", "heldout_names", "heldout_pairs")  # which jobs/build_demo_shards.py writes


@dataclass(frozen=True)
class ScoringConfig:
    """How the model's text query of an image is denoised."""

    num_steps: int = 10
    num_draws: int = 1  # averaged; under the one-way mask they share one pass of the image
    guidance: float = 0.0  # the paper's w, over the image; needs a model trained with image_dropout


@dataclass(frozen=True)
class QualityConfig:
    """Image quality: what is drawn, and what it is compared with. Nothing is drawn without prompts."""

    prompts: str = ""  # a text of one prompt a line, or a retrieval set's folder: the first caption of each image
    # Real images (a folder, tars), or the reference_<network>.npz that an earlier evaluation wrote.
    reference: str = ""
    num_images: int = 30_000  # at most: so many of the first prompts, and of the reference images
    networks: tuple[str, ...] = ("efficientnet_lite0",)  # and inception, which needs its file
    inception: str = ""  # pt_inception-2015-12-05-6726825d.pth, local or s3://
    resize: Literal["pytorch_fid", "torch_fidelity", "clean_fid"] = "clean_fid"  # to Inception's 299 px
    clip: str = ""  # a CLIP in transformers' layout for CLIPScore; empty: the evaluated model judges its own images
    guidance_scales: tuple[float, ...] = (3.0,)  # several give the curve of distance against alignment
    num_steps: int = 50  # of DDIM
    seed: int = 0
    keep_images: bool = False  # all of them; the first 64 are kept for the report in any case

    def __post_init__(self) -> None:
        if self.prompts and not self.reference:
            raise ConfigError("quality.reference: give the real images (a folder or tars) that generated ones are compared with")
        if "inception" in self.networks and not self.inception:
            raise ConfigError("quality.inception: the network inception needs its file, pt_inception-2015-12-05-6726825d.pth")
        if self.num_images < 2 or self.num_steps < 1 or not self.guidance_scales or not self.networks:
            raise ConfigError("quality: at least 2 images, 1 step, 1 guidance scale and 1 network")


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, on what, by how many workers, and where the results go."""

    checkpoint: str = ""  # an exported model, a step_* folder, or a run's output_dir: then its newest checkpoint; local or s3://
    weights: Literal["best", "ema", "weights"] = "best"  # of a checkpoint; best: the EMA where there is one
    output_dir: str = ""  # absolute folder or s3:// URL
    # paper: the 12 sets and retrieval; quick: four small ones; demo: the demo's; else a YAML file, see docs/evaluation.md
    suite: str = "paper"
    data_roots: tuple[str, ...] = ()  # folders or s3:// URLs in which sets are looked for
    baselines: tuple[str, ...] = ()  # CLIPs in transformers' layout, scored by the same code on the same sets
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    curve_set: str = ""  # of the suite: accuracy against steps and draws on it
    curve_steps: tuple[int, ...] = (1, 2, 5, 10)
    curve_draws: tuple[int, ...] = (1, 4)
    allow_missing: bool = False  # go on without the sets that are not found
    allow_short: bool = False  # score a set that has fewer images than it should
    num_workers: int = 0  # model replicas; 0: as many as there is room for
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0  # 0.5: two share a GPU; 0: on CPUs
    placement: dict[str, str] = field(default_factory=dict)  # labels of their nodes, as {pool: gpu}; empty: any
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # where the checkpoint's own run is not known

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.cpus_per_worker <= 0 or self.gpus_per_worker < 0:
            raise ConfigError("num_workers and gpus_per_worker: at least 0; cpus_per_worker: above 0")
        if self.scoring.num_steps < 1 or self.scoring.num_draws < 1:
            raise ConfigError("scoring.num_steps and scoring.num_draws: at least 1")
        check_labels("placement", self.placement)

    def check_job(self) -> None:
        """Raise ConfigError if a field that an evaluation needs is missing."""
        if not self.checkpoint:
            raise ConfigError("checkpoint: give an exported model, a step_* folder, or a run's output_dir")
        check_output_dir(self.output_dir)


def suite_sets(suite: str) -> dict[str, str]:
    """{set: where it is, or "" to look for it below data_roots}. Raises ConfigError for a suite that cannot be read."""
    from ray_platform import storage
    from ray_platform.evaluate.sets import PAPER

    suites = {"paper": (*PAPER, *RETRIEVAL), "quick": QUICK, "demo": DEMO}
    if suite in suites:
        return dict.fromkeys(suites[suite], "")
    if not suite.endswith((".yaml", ".yml")):
        raise ConfigError(f"suite: {suite} is none of {', '.join(suites)}, and no .yaml file")
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
