"""Configuration of a pretraining run, which combines the two libraries.

Torch and Ray are imported when a run is built: parsing a command line needs neither.
"""

import functools
import importlib
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffdis
from diffdis.config import DiffDisConfig, ObjectiveConfig, TaskName, resolve_encoder_paths
from ray_platform.contracts import ConfigError, one_line
from ray_platform.data.config import DataConfig
from ray_platform.storage_config import StorageConfig
from ray_platform.tracking import ModelPackage, TrackingConfig
from ray_platform.train.config import TrainConfig

if TYPE_CHECKING:
    from ray_platform.train.launch import Run
    from ray_platform.train.preflight import RunPlan

ALIASES = {"--resume": "--train.resume", "--profile": "--train.profile"}
MAIN_FIELDS = (  # explained by `--help`
    *("output_dir", "data.sources", "data.image_size", "model.warm_start", "objective.task", "objective.lr_unet"),
    *("objective.lr_new", "train.num_workers", "train.gpus_per_worker", "train.num_steps", "train.micro_batch_size"),
    *("train.global_batch_size", "train.zero_stage", "train.precision", "train.checkpoint_every", "train.resume"),
    *("train.profile", "tracking.uri", "tracking.experiment"),
)


@dataclass(frozen=True)
class PretrainConfig:
    """Configuration of a pretraining run; it is saved in the run's folder as config.yaml."""

    output_dir: str = ""
    """Absolute folder or s3:// URL for checkpoints, the model and the metrics."""
    model: DiffDisConfig = field(default_factory=DiffDisConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    preview_captions: tuple[str, ...] = ("a red apple", "a blue car", "a green tree", "a yellow sun")
    """Captions of the images that are generated during training."""

    def run(self, recipe: str, command: str = "") -> "Run":
        """Return the run of this configuration, with the arguments and errors of `plan`."""
        from ray_platform.train.launch import Run

        return Run(**vars(self.plan(recipe, command)))

    def plan(self, recipe: str, command: str = "") -> "RunPlan":
        """Return the run of this configuration to check it; it imports what its checks need, when they need it.

        Args:
            recipe: name of the recipe, for the tracker.
            command: the command line as it was typed, for the tracker.

        Raises:
            ConfigError: the model and the data do not fit each other.
        """
        from ray_platform.redaction import redacted_values
        from ray_platform.train.preflight import RunPlan

        model = resolve_encoder_paths(self.model)
        check_model(model, self.data)
        if (steps := model.schedule.num_timesteps) <= self.objective.query_timestep_min:
            raise ConfigError(
                f"objective.query_timestep_min: {self.objective.query_timestep_min} is not below the {steps} timesteps of "
                "model.schedule.num_timesteps"
            )
        if self.objective.noised_alignment_weight and self.train.compile:
            raise ConfigError(
                "objective.noised_alignment_weight: the number of its images changes from step to step, for which train.compile "
                "would compile again; use train.compile false"
            )
        return RunPlan(
            functools.partial(_build_task, self.model, self.objective, self.preview_captions),
            self.data,
            self.train,
            self.tracking,
            self.output_dir,
            redacted_values({"recipe": recipe, **asdict(self)}),
            functools.partial(_describe, "diffdis.encoder:describe_encoders", model),
            functools.partial(_describe, "diffdis.task:describe_captions", model, self.objective),
            model_package(self.objective.task),
            command,
            functools.partial(_describe, "diffdis.preflight:describe_training", model, self.objective),
        )


def _build_task(*arguments: Any) -> Any:
    """Return the DiffDisTask of a configuration, whose paths may be s3:// URLs."""
    from diffdis.task import DiffDisTask
    from ray_platform.cached_folders import with_cached_folders

    return with_cached_folders(DiffDisTask, *arguments)


def _describe(function: str, *arguments: Any) -> dict[str, Any]:
    """Call a function of `diffdis`, given as `module:name`, on the driver. Raises ConfigError for weights that are missing or do
    not fit."""
    from ray_platform.cached_folders import with_cached_folders

    module, _, name = function.partition(":")
    try:
        return with_cached_folders(getattr(importlib.import_module(module), name), *arguments)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(one_line(error)) from error


def check_model(model: DiffDisConfig, data: DataConfig) -> None:
    """Raise ConfigError if the model and the data do not fit each other, or if the path of weights is missing."""
    if data.image_size != model.image_size:
        raise ConfigError(f"data.image_size: {data.image_size}, but model.image_size is {model.image_size}; make them equal")
    if not model.text_encoder.path:
        raise ConfigError("model.text_encoder.path: give the folder (or hub name) of the text encoder")
    if model.autoencoder.kind == "kl" and not model.autoencoder.path:
        raise ConfigError("model.autoencoder.path: give the folder (or hub name) of the AutoencoderKL")


# --- How MLflow stores, documents and loads the exported model (serving/pyfunc_model.py) ---------------------------------------

SERVING_PARAMS: dict[str, Any] = {
    "task": "classify",
    "classes": [],
    "templates": ["{c}"],
    "num_steps": 0,
    "num_draws": 1,
    "guidance_scale": 7.5,
    "negative_prompt": "",
    "best_of": 1,
    "seed": 0,
}


def model_package(trained_for: TaskName) -> ModelPackage:
    """Return the package of a model that was trained for a task, which decides its input example."""
    generates = trained_for == "generation"
    return ModelPackage(
        entry=str(Path(__file__).parents[1] / "serving" / "pyfunc_model.py"),
        code=(str(Path(diffdis.__file__).parent),),
        requirements=("torch", "diffusers", "transformers", "safetensors", "numpy", "pandas", "pillow", "einops"),
        columns={"image": "binary", "caption": "string"},
        results={"class": "string", "score": "double", "scores": ["double"], "image": "binary", "embedding": ["double"]},
        params=SERVING_PARAMS | ({"task": "generate"} if generates else {}),
        example={"caption": ["a red circle"]} if generates else {"image": [red_circle()]},
        example_params={"task": "generate", "num_steps": 10} if generates else {"classes": ["a red circle", "a blue square"]},
    )


def red_circle() -> bytes:
    """Return a small synthetic image as a PNG."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
