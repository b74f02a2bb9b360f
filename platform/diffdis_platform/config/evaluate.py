"""Configuration of an evaluation."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffdis.config import Dtype
from diffdis_platform.config.export import check_weights
from diffdis_platform.config.parse import check_output_dir
from diffdis_platform.config.saved import read_yaml
from ray_platform.contracts import ConfigError
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
    """Denoising steps of an image's text query."""
    num_draws: int = 1
    """Noise samples that are averaged per image. With the one-way mask they share one pass over the image."""
    guidance: float = 0.0
    """Guidance over the image (the paper's w). Needs a model that was trained with image_dropout."""


@dataclass(frozen=True)
class QualityConfig:
    """Prompts, reference and networks of the image quality. Without prompts, no images are generated."""

    prompts: str = ""
    """Text file with one prompt per line, or the folder of a retrieval set. Of a set, the first captions are used. Empty: no
    images are generated."""
    reference: str = ""
    """Real images (a folder or tars), or an earlier reference_<network>.npz. An evaluation writes such a file."""
    num_images: int = 30_000
    """Maximum number of generated images, of the first prompts."""
    num_reference: int = 0
    """Number of real images: a random sample, the same for every model and seed. 0: all."""
    networks: tuple[str, ...] = ("efficientnet_lite0",)
    """Feature networks of the distances: efficientnet_lite0, inception (FID), or your own as module:function."""
    inception: str = ""
    """File pt_inception-2015-12-05-6726825d.pth, local or s3://, which the network inception needs."""
    resize: Literal["pytorch_fid", "torch_fidelity", "clean_fid"] = "clean_fid"
    """How images are resized to Inception's 299 px: as the tool of this name does it."""
    clip: str = ""
    """Folder of a CLIP in transformers' layout for CLIPScore. Empty: the evaluated model scores its own images."""
    guidance_scales: tuple[float, ...] = (3.0,)
    """Guidance scales of the generation. Several give a curve of distance against alignment."""
    num_steps: int = 50
    """Steps of the sampler."""
    scheduler: str = ""
    """Sampler of diffusers, such as DDPMScheduler. Empty: DDIM."""
    seed: int = 0
    """Seed of the generated images."""
    best_of: int = 1
    """Generated images per prompt. Above 1, each figure is also measured for the image of a prompt that the model itself finds
    closest to it, as <metric>_best_of_<n>; the other figures remain those of the first images."""
    ranker: str = ""
    """Another model that chooses the best image: an exported model, a checkpoint, or a CLIP. Empty: the evaluated model."""
    keep_images: bool = False
    """Keep all generated images. The report always keeps the first 64."""

    def __post_init__(self) -> None:
        if self.prompts and not self.reference:
            raise ConfigError("quality.reference: give the real images (a folder or tars) that generated ones are compared with")
        if "inception" in self.networks and not self.inception:
            raise ConfigError("quality.inception: the network inception needs its file, pt_inception-2015-12-05-6726825d.pth")
        check_networks("quality.networks", self.networks)
        if self.num_images < 2 or self.num_steps < 1 or not self.guidance_scales:
            raise ConfigError("quality: at least 2 images, 1 step and 1 guidance scale")
        if self.best_of < 1:
            raise ConfigError(f"quality.best_of: {self.best_of} is not 1 or more; 1 measures a single image per prompt")
        if self.ranker and self.best_of == 1:
            raise ConfigError("quality.ranker: nothing is ranked with quality.best_of 1; set quality.best_of, such as 4")
        if self.num_reference and (self.num_reference < 2 or self.reference.endswith(".npz")):
            raise ConfigError(
                f"quality.num_reference: {self.num_reference} is not 0 (all) or at least 2 of the images in a folder or tars; "
                "correct it, or leave it out for a reference_<network>.npz"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Configuration of an evaluation: model, evaluation sets, settings and workers."""

    checkpoint: str = ""
    """Exported model, checkpoint, output_dir of a run, or a CLIP or SigLIP. A checkpoint is a step_* folder; of an output_dir,
    the newest one is evaluated. Local or s3://."""
    steps: str = ""
    """Which checkpoints of a run: `all`, or `every:5000` for multiples of 5000. Empty: the newest one."""
    weights: str = "best"
    """Which weights of a checkpoint, as for jobs/export.py; `best` are those that its run scored."""
    output_dir: str = ""
    """Absolute folder or s3:// URL of the report. Several models may be evaluated into one folder."""
    name: str = ""
    """Name of the model in the results. Empty: its run or folder, and its step."""
    suite: str = "paper"
    """Sets: paper (12 and retrieval), quick (4 small ones), demo, names of sets, or a file. Names are those of known sets,
    separated by commas; docs/evaluation.md describes the file."""
    class_names: str = ""
    """Text file with one class per line, in label order, for a suite of one set. Empty: the set's own."""
    templates: str = ""
    """Text file with one template per line, with {c} for the class, for a suite of one set. Empty: the set's own."""
    data_roots: tuple[str, ...] = ()
    """Folders or s3:// URLs that are searched for evaluation sets."""
    baselines: tuple[str, ...] = ()
    """Folders of CLIPs and SigLIPs, scored by the same code on the same sets. They have transformers' layout."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    seeds: int = 1
    """How often the model is measured, each time with other noise. The results contain the spread."""
    resize: Literal["torch", "pillow"] = "torch"
    """How images of CLIPs are resized. `pillow` gives the pixels of published scores; `torch` takes a fifth of the time and
    differs by 1 gray level, rarely 2, in about 0.3 % of the values."""
    dtype: Dtype = "float32"
    """dtype of the model and the baselines. Feature networks and quality.clip stay in float32."""
    curve_set: str = ""
    """Set of the suite for the curve of accuracy against steps and draws. Empty: no curve."""
    curve_steps: tuple[int, ...] = (1, 2, 5, 10)
    """Denoising steps of the curve."""
    curve_draws: tuple[int, ...] = (1, 4)
    """Noise samples of the curve."""
    limit: int = 0
    """Images per set, a random sample. 0: all. A limited set is part of no mean and is not compared with published figures."""
    allow_missing: bool = False
    """Continue without the sets that are not found."""
    allow_short: bool = False
    """Score a set with fewer images than published."""
    num_workers: int = 0
    """Model replicas. 0: as many as the cluster has room for."""
    cpus_per_worker: float = 1.0
    """CPUs per replica."""
    gpus_per_worker: float = 0.0
    """GPUs per replica. 0.5: two share a GPU; 0: CPUs only."""
    placement: dict[str, str] = field(default_factory=dict)
    """Labels of the replicas' nodes, such as '{"pool": "gpu"}'. Empty: any node."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking of the evaluation, used if the run of the checkpoint is unknown."""

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
        check_weights(self.weights)
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


def check_networks(field: str, networks: Sequence[str]) -> None:
    """Raise ConfigError if there are no feature networks, or if two have the same short name."""
    names = list(map(network_name, networks))
    if not names:
        raise ConfigError(f"{field}: empty; give at least one network")
    if len(set(names)) < len(names):
        raise ConfigError(f"{field}: two networks have the same name ({', '.join(names)}); give each once, or rename a folder")


def suite_sets(suite: str) -> dict[str, str]:
    """Return the folder of each set of a suite, or "" for a set below data_roots. Raises ConfigError."""
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
    layout = "a file with `sets:` and a list of names, or `name: folder` pairs"
    sets = read_yaml("suite", suite, f"give {layout}").get("sets")
    if not isinstance(sets, list | dict) or not sets:
        raise ConfigError(f"suite: {suite} is not {layout}")
    pairs = sets.items() if isinstance(sets, dict) else [(name, "") for name in sets]
    if not all(isinstance(name, str) and isinstance(url or "", str) for name, url in pairs):
        raise ConfigError(f"suite: {suite}: names and folders of `sets:` must be texts")
    found = {name: url or "" for name, url in pairs}
    if odd := [name for name in found if not _SET_NAME.fullmatch(name) or ".." in name.split("/")]:
        raise ConfigError(
            f"suite: {suite}: {odd[0][:120]!r} cannot name a set: up to 100 letters, digits and . - _ in parts joined by /"
        )
    return found
