"""Image quality: generate -> features -> statistics -> distance, at one or several guidance scales."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffdis.feature_networks import build_feature_network
from diffdis.metrics.clip_score import clip_score
from diffdis.metrics.frechet import NUM_SUBSETS, Moments, extrapolated_distance, frechet_distance_of_features
from diffdis.metrics.kid import kernel_distance
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.evaluation.models import Model
from diffdis_platform.evaluation.units import unit
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, Rows, one_line
from ray_platform.evaluate.discovery import open_evaluation_set, open_image_set
from ray_platform.evaluate.result_cache import read_arrays
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.evaluate.samples import RawSample, read_slice
from ray_platform.evaluate.unit_work import GenerateImages, MeasureImages
from ray_platform.replicas import WorkUnit, join_rows

IMAGES_A_UNIT = 32
SHOWN = 64  # images that are kept for the report in any case
_DRAW_COST = 6.0  # of a denoising step with guidance: two passes of the whole U-Net, in passes of its image branch


def builders(config: QualityConfig) -> dict[str, Any]:
    """What makes the feature networks in a worker, by name."""
    if not config.prompts:
        return {}
    own = {"inception": (config.inception, config.resize)}  # the others have one file and one way of resizing
    return {
        name: functools.partial(storage.with_cached_folders, build_feature_network, name, *own.get(name, ("", "")))
        for name in config.networks
    }


def _built(build: Callable[[str], Any]) -> Any:
    """What is wrong with a network's name or file is said before anything is drawn."""
    try:
        return build("cpu")
    except ValueError as error:
        raise ConfigError(f"quality.networks: {one_line(error)}") from error


def read_prompts(config: QualityConfig) -> list[str]:
    """The first `num_images` lines of a text, or first captions of a retrieval set. Raises ConfigError where there are none."""
    if config.prompts.endswith((".txt", ".tsv")):
        lines = storage.read_small(config.prompts).decode(errors="replace").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        data = open_evaluation_set("prompts", config.prompts)
        samples = (sample for part in data.slices for sample in read_slice(part))
        prompts = [sample.captions[0] for sample in samples if isinstance(sample, RawSample) and sample.captions]
    if len(prompts) < 2:
        raise ConfigError(f"quality.prompts: {config.prompts} holds {len(prompts)} prompts; a distance needs at least 2")
    return prompts[: config.num_images]


@dataclass(frozen=True)
class Reference:
    """Features of real images, and what made them."""

    features: np.ndarray  # [n, d]
    protocol: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.features).tobytes()).hexdigest()[:16]

    def write(self, url: str) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, features=self.features, protocol=np.array(json.dumps(dict(self.protocol))))
        storage.write_bytes(url, buffer.getvalue())

    @classmethod
    def read(cls, url: str) -> "Reference":
        try:
            found = read_arrays(storage.read_bytes(url))
            return cls(found["features"], json.loads(str(found["protocol"])))
        except (ValueError, KeyError, RecursionError) as error:
            what = one_line(error)
            raise DataError(f"quality.reference: {url} is no reference_<network>.npz that an evaluation wrote ({what})") from None


class Quality:
    """All guidance scales of one model."""

    group = "image quality"

    def __init__(self, model: Model, image_size: int, config: QualityConfig, output_dir: str):
        self.model, self.image_size, self.config, self.output_dir = model, image_size, config, output_dir
        # Who says how well an image fits its prompt: nobody, where there is no CLIP and the model can only draw.
        self.judge = config.clip or ("the evaluated model itself" if model.can_score else "")
        self.prompts = read_prompts(config)
        networks = {name: _built(build) for name, build in builders(config).items()}
        self.figures = {name: network.figure for name, network in networks.items()}
        self.protocols = {name: dict(network.protocol) | {"image_size": image_size} for name, network in networks.items()}
        self.references: dict[str, Reference] = {}
        self._real: dict[int, Rows] = {}
        self._drawn: dict[float, dict[int, Rows]] = {scale: {} for scale in config.guidance_scales}
        self._of_unit: dict[str, tuple[dict[int, Rows], int]] = {}  # unit key -> where its rows go, and its place
        self.units = [*self._reference_units(), *self._drawing_units()]

    def _reference_units(self) -> list[WorkUnit]:
        config, units = self.config, []
        if config.reference.endswith(".npz"):
            (name,) = config.networks if len(config.networks) == 1 else ("",)
            if not name:
                raise ConfigError(
                    "quality.reference: one file serves one network; name one in quality.networks, or give the images"
                )
            self.references = {name: Reference.read(config.reference)}
            check_same_protocol(self.references[name].protocol, self.protocols[name])
            return []
        data, expected = open_image_set(config.reference), 0.0
        for part in data.slices:
            if expected > 1.25 * config.num_images:  # sizes are estimates
                break
            expected += part.estimated_images
            identity = {"data": data.digest, "slice": part.name, "networks": [self.protocols[n] for n in config.networks]}
            work = MeasureImages(part, config.networks, self.image_size)
            units.append(unit(self.group, f"reference {part.name}", part.estimated_images, work, identity))
            self._of_unit[units[-1].key] = (self._real, part.place)
        return units

    def _drawing_units(self) -> list[WorkUnit]:
        config, units = self.config, []
        aligner = "clip" if config.clip else self.model.name if self.judge else ""
        for scale in config.guidance_scales:
            settings = {"num_steps": config.num_steps, "guidance_scale": scale, "seed": config.seed}
            for first in range(0, len(self.prompts), IMAGES_A_UNIT):
                prompts = tuple(self.prompts[first : first + IMAGES_A_UNIT])
                kept = len(self.prompts) if config.keep_images else SHOWN
                work = GenerateImages(
                    self.model.name, prompts, first, settings, config.networks, aligner, self.images_dir(scale), kept
                )
                identity = {
                    "model": self.model.digest, "settings": settings, "prompts": prompts, "first": first, "kept": kept,
                    "networks": [self.protocols[name] for name in config.networks], "aligner": config.clip or aligner,
                    "images_dir": work.images_dir if first < kept else "",
                }  # fmt: skip
                cost = _DRAW_COST * config.num_steps * len(prompts)
                units.append(unit(self.group, f"images {first}… at guidance {scale:g}", cost, work, identity))
                self._of_unit[units[-1].key] = (self._drawn[scale], first)
        return units

    def images_dir(self, scale: float) -> str:
        return storage.join(self.output_dir, "images", f"guidance_{scale:g}")

    def add(self, done: WorkUnit, rows: Rows) -> None:
        into, place = self._of_unit[done.key]
        into[place] = rows

    def results(self) -> list[dict[str, Any]]:
        """The entries of `quality` in the report's details, one a guidance scale. Writes reference_<network>.npz."""
        if self._real:
            real = join_rows(self._real)
            for name in self.config.networks:
                features = real[f"features/{name}"][: self.config.num_images]
                self.references[name] = Reference(features, self.protocols[name])
                self.references[name].write(storage.join(self.output_dir, f"reference_{name}.npz"))
        return [self._at(scale, join_rows(rows)) for scale, rows in self._drawn.items()]

    def _at(self, scale: float, rows: Rows) -> dict[str, Any]:
        config = self.config
        metrics: dict[str, float] = {}
        for name in config.networks:
            metrics |= distances(self.figures[name], rows[f"features/{name}"], self.references[name].features)
        if self.judge:
            metrics["alignment"] = clip_score(rows["alignment"])
        return {
            "guidance_scale": scale,
            "metrics": metrics,
            "alignment_by": "CLIP" if config.clip else self.judge,
            "protocol": self._protocol(scale),
            "n": len(self.prompts),
            "num_reference": {name: len(reference.features) for name, reference in self.references.items()},
            "seconds": round(float(rows["seconds"].sum()), 1),
        }

    def _protocol(self, scale: float) -> dict[str, Any]:
        config = self.config
        digest = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16]
        return {
            "networks": self.protocols,
            "image_size": self.image_size,
            "num_images": len(self.prompts),
            "prompts": config.prompts,
            "prompts_digest": digest,
            "sampler": "ddim",
            "num_steps": config.num_steps,
            "guidance_scale": scale,
            "seed": config.seed,
            "reference": config.reference,
            "reference_digests": {name: reference.digest for name, reference in self.references.items()},
            "alignment_by": self.judge,
        }


def distances(figure: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """`figure`, a Fréchet distance; the same at infinitely many generated images; KID with its spread."""
    reference, kid = Moments.of(real), kernel_distance(generated, real)
    network = "" if figure == "fid" else figure.removeprefix("fd")
    found = {
        figure: frechet_distance_of_features(generated, reference),
        f"kid{network}": kid.mean,
        f"kid{network}_std": kid.std,
    }
    if len(generated) >= 2 * NUM_SUBSETS:  # fewer give no line to extrapolate
        found[f"{figure}_infinity"] = extrapolated_distance(generated, reference)
    return found
