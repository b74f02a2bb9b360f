"""Image quality: generate images, extract features, and compare them with those of real images, at several guidance scales."""

import base64
import hashlib
import itertools

import numpy as np

from diffdis.metrics.image_quality import clip_score
from diffdis.pipeline import RANKING_DRAWS
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.evaluation.distance import (
    Reference,
    ReferenceFeatures,
    few_images_warning,
    network_builders,
    open_networks,
    read_reference,
)
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.units import build_unit, count_units
from ray_platform import storage
from ray_platform.contracts import ConfigError, Rows, UnitOrigin, one_line
from ray_platform.evaluate.discovery import open_evaluation_set, open_image_set
from ray_platform.evaluate.results import results_folder
from ray_platform.evaluate.sets import EvaluationSet, RawSample, read_slice
from ray_platform.evaluate.unit_work import GenerateImages, MeasureImages, Ranking, choose_sample, digest_of_contents, image_name
from ray_platform.json_values import JsonObject
from ray_platform.replicas import WorkUnit, join_rows
from ray_platform.report.records import GeneratedSample, QualityPoint
from ray_platform.units import plural

IMAGES_PER_UNIT = 32
NUM_SHOWN = 64  # images that are stored for the report in any case
_STEP_COST = 6.0  # of a denoising step with guidance (two passes of the whole U-Net), relative to a pass of its image branch


def read_prompts(config: QualityConfig) -> list[str]:
    """Return the first lines of a text file or first captions of a retrieval set. Raises ConfigError for fewer than two."""
    if config.prompts.endswith((".txt", ".tsv")):
        lines = storage.read_small(config.prompts).decode(errors="replace").splitlines()
        texts = (line.strip() for line in lines if line.strip())
    else:
        data = open_evaluation_set("prompts", config.prompts)
        samples = (sample for part in data.slices for sample in read_slice(part))
        texts = (sample.captions[0] for sample in samples if isinstance(sample, RawSample) and sample.captions)
    prompts = list(itertools.islice(texts, config.num_images))
    if len(prompts) < 2:
        raise ConfigError(f"quality.prompts: {config.prompts} has {plural(len(prompts), 'prompt')}; give at least 2")
    return prompts


# --- The measurement ------------------------------------------------------------------------------------------------------------


class QualityMeasurement:
    """The image quality of one model at all guidance scales. It receives the rows of its units in any order.

    The reference images and each guidance scale are a group of units: one of them may fail without the others.
    """

    reference_group = "reference images"

    def __init__(
        self,
        model: EvaluationModel,
        judge: EvaluationModel | None,
        image_size: int,
        config: QualityConfig,
        prompts: list[str],
        output_dir: str,
        ranker: EvaluationModel | None = None,
    ):
        """`judge` measures how well an image fits its prompt, and `ranker` chooses the best of several images; None: nothing."""
        self.ranker = ranker
        self.model, self.judge, self.image_size, self.config, self.output_dir = model, judge, image_size, config, output_dir
        self.prompts = prompts
        self.network_builders = network_builders(config.networks, config.inception, config.resize)
        networks = open_networks("quality.networks", self.network_builders)
        self.figures = {name: network.figure for name, network in networks.items()}
        self.protocols = {name: dict(network.protocol) | {"image_size": image_size} for name, network in networks.items()}
        self.references: dict[str, Reference] = {}
        self._reference_content = ""  # digest of the real images; empty: they are in no folder
        self._real: dict[int, Rows] = {}  # place of a slice -> rows
        self._generated: dict[float, dict[int, Rows]] = {scale: {} for scale in config.guidance_scales}
        self._destinations: dict[str, tuple[dict[int, Rows], int]] = {}  # unit key -> where its rows belong, and at which place
        self.origins: list[UnitOrigin | None] = []  # of the units that were received
        self.units = [*self._reference_units(), *self._generation_units()]

    def _reference_units(self) -> list[WorkUnit]:
        config, units = self.config, []
        if config.reference.endswith(".npz"):
            if len(self.protocols) > 1:
                raise ConfigError(
                    f"quality.reference: {config.reference} has the features of one network, but quality.networks has "
                    f"{len(self.protocols)}; name one network, or give the real images"
                )
            (name,) = self.protocols
            self.references = {name: read_reference("quality.reference", config.reference, self.protocols[name])}
            return []
        data = open_image_set(config.reference)
        for part, num_sampled in zip(data.slices, sample_sizes(data, config.num_reference), strict=True):
            if num_sampled == 0:
                continue
            unit = build_unit(
                self.reference_group, f"reference {part.name}", part.estimated_images if num_sampled is None else num_sampled,
                MeasureImages(part, tuple(self.protocols), self.image_size, num_sampled), runs_first=True,
                data=data.digest, slice=part.name, num_sampled=num_sampled, networks=list(self.protocols.values()),
            )  # fmt: skip
            units.append(unit)
            self._destinations[unit.key] = (self._real, part.place)
        return units

    def _generation_units(self) -> list[WorkUnit]:
        config, units = self.config, []
        judge, judged_by = (self.judge.identity, [self.judge.digest, self.judge.preprocessing]) if self.judge else ("", [])
        num_kept = len(self.prompts) if config.keep_images else NUM_SHOWN
        for scale in config.guidance_scales:
            settings: JsonObject = {"num_steps": config.num_steps, "guidance_scale": scale, "seed": config.seed}
            if config.scheduler:  # absent for DDIM, as in earlier results
                settings["scheduler"] = config.scheduler
            ranking = None
            if self.ranker:  # a CLIP has no settings
                few_draws = {"num_steps": 1, "num_draws": RANKING_DRAWS} if self.ranker.settings else {}
                ranking = Ranking(self.ranker.identity, config.best_of, few_draws)
            for first in range(0, len(self.prompts), IMAGES_PER_UNIT):
                prompts, images_dir = tuple(self.prompts[first : first + IMAGES_PER_UNIT]), self.images_dir(scale)
                measured = tuple(self.protocols), judge, images_dir, num_kept, ranking
                unit = build_unit(
                    self.group_of(scale), f"images {first}… at guidance {scale:g}",
                    _STEP_COST * config.num_steps * len(prompts) * config.best_of,
                    GenerateImages(self.model.identity, prompts, first, settings, *measured),
                    model=self.model.identity, settings=settings, prompts=prompts, first=first, kept=num_kept,
                    networks=list(self.protocols.values()), judge=judged_by,
                    images_dir=images_dir if first < num_kept else "", **self._best_of(),
                )  # fmt: skip
                units.append(unit)
                self._destinations[unit.key] = (self._generated[scale], first)
        return units

    def _best_of(self) -> JsonObject:
        """Return the fields of the protocol; they are absent for single images, as in earlier results."""
        if self.ranker is None:
            return {}
        ranked_by = "the evaluated model itself" if self.ranker is self.model else self.ranker.url
        return {"best_of": self.config.best_of, "ranked_by": ranked_by, "ranker_digest": self.ranker.digest}

    def _judge_name(self) -> str:
        if self.judge is None:
            return ""
        return "the evaluated model itself" if self.judge is self.model else self.judge.name

    def images_dir(self, scale: float) -> str:
        return images_dir(self.output_dir, self.model.name, scale)

    def add(self, unit: WorkUnit, rows: Rows) -> None:
        """Receive the rows of one unit."""
        rows_by_place, place = self._destinations[unit.key]
        rows_by_place[place] = rows

    @property
    def groups(self) -> set[str]:
        return {unit.group for unit in self.units}

    @property
    def reference_error(self) -> str:
        """Why the real images are too few, in one line, as soon as all of them are measured; empty if they are enough."""
        if not self._real or len(self._real) < sum(unit.group == self.reference_group for unit in self.units):
            return ""
        count, needed = sum(len(rows["keys"]) for rows in self._real.values()), max(2, self.config.num_reference)
        remedy = "lower quality.num_reference" if self.config.num_reference else "give other images"
        message = (
            f"quality.reference: only {plural(count, 'image')} of {self.config.reference} can be read, but {needed:,} are needed"
        )
        return "" if count >= needed else f"{message}; {remedy}"

    @staticmethod
    def group_of(scale: float) -> str:
        return f"images at guidance {scale:g}"

    def results(self, failures: dict[str, str]) -> list[QualityPoint]:
        """Return one entry of the report per guidance scale without a failure. Writes reference_<network>.npz.

        A metric that fails is one line in `failures`, and absent in the entry.
        """
        if self._real and self.reference_group not in failures:
            real, num_reference = join_rows(self._real), self.config.num_reference
            chosen = choose_sample([str(key) for key in real["keys"]], num_reference or len(real["keys"]))
            self._reference_content = digest_of_contents({name: real[name][chosen] for name in ("keys", "contents")})
            for name in self.protocols:
                reference = ReferenceFeatures(real[f"features/{name}"][chosen], self.protocols[name])
                self.references[name] = reference
                reference.write(storage.join(self.output_dir, f"reference_{name}.npz"))
        points = []
        for scale, rows in self._generated.items():
            if self.group_of(scale) not in failures:
                points.append(self._result(scale, join_rows(rows), failures))
        return points

    def _num_reference(self) -> dict[str, int]:
        """Return the number of real images of each reference that says it."""
        return {name: count for name, reference in self.references.items() if (count := reference.num_images) is not None}

    def _result(self, scale: float, rows: Rows, failures: dict[str, str]) -> QualityPoint:
        group = self.group_of(scale)
        warnings = []
        for name, reference in self.references.items():
            features = rows[f"features/{name}"]
            warnings.append(few_images_warning(self.figures[name], len(features), reference.num_images, features.shape[1]))
        metrics = self._metrics(group, rows, failures)
        if self.ranker:
            best = {name.removeprefix("best/"): values for name, values in rows.items() if name.startswith("best/")}
            of_best = self._metrics(f"{group}, best of {self.config.best_of}", best, failures)
            metrics |= {f"{n}_best_of_{self.config.best_of}": value for n, value in of_best.items() if not n.endswith("_std")}
        return {
            "guidance_scale": scale,
            "metrics": metrics,
            "alignment_by": self._judge_name(),
            "protocol": {
                "networks": self.protocols,
                "image_size": self.image_size,
                "dtype": self.model.dtype,
                "num_images": len(self.prompts),
                "num_reference": self._num_reference(),
                "prompts": self.config.prompts,
                "prompts_digest": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()[:16],
                "sampler": self.config.scheduler or "ddim",
                "num_steps": self.config.num_steps,
                "guidance_scale": scale,
                "seed": self.config.seed,
                **self._best_of(),
                "reference": self.config.reference,
                "reference_content": self._reference_content,
                "reference_digests": {name: reference.digest for name, reference in self.references.items()},
                "alignment_by": self._judge_name(),
                "alignment_preprocessing": self.judge.preprocessing if self.judge else "",
                "alignment_digest": self.judge.digest if self.judge else "",
            },
            "warnings": list(filter(None, warnings)),
            "n": len(self.prompts),
            "num_reference": self._num_reference(),
            "units": count_units(self.origins),
            "seconds": round(float(rows["seconds"].sum()), 1),
            "samples": stored_samples(self.prompts[:NUM_SHOWN], self.images_dir(scale)),
        }

    def _metrics(self, group: str, rows: Rows, failures: dict[str, str]) -> dict[str, float | None]:
        """Return the figures of an image per prompt."""
        metrics: dict[str, float | None] = {}
        for name, reference in self.references.items():
            try:
                metrics |= reference.metrics(self.figures[name], rows[f"features/{name}"])
            except (ValueError, RuntimeError) as error:  # torch's linear algebra raises RuntimeErrors
                failures[f"{group}: {name}"] = f"{group}: {name}: {one_line(error)}"
        if self.judge:
            try:
                metrics["alignment"] = clip_score(rows["alignment"])
            except ValueError as error:
                failures[f"{group}: alignment"] = f"{group}: alignment by {self._judge_name()}: {one_line(error)}"
        return metrics


def sample_sizes(data: EvaluationSet, num_images: int, margin: float = 1.25) -> list[int | None]:
    """Return how many images of each slice are measured for a sample of `num_images`; None means all of them.

    With the margin a quarter more than needed, since some cannot be read, and numbers of images in tars are estimates.
    """
    estimates = np.array([part.estimated_images for part in data.slices])
    fraction = margin * num_images / estimates.sum()
    if not num_images or fraction >= 1:
        return [None] * len(estimates)
    return [int(count) for count in np.diff(np.ceil(estimates.cumsum() * fraction), prepend=0)]


def images_dir(output_dir: str, model: str, scale: float) -> str:
    """Return the folder of the images that an evaluation generated with a model at a guidance scale."""
    return storage.join(results_folder(output_dir, "images", model), f"guidance_{scale:g}")


def stored_samples(prompts: list[str], images_dir: str) -> list[GeneratedSample]:
    """Return the stored images of the first prompts; images that are missing are left out."""
    urls = {storage.join(images_dir, image_name(index)): prompt for index, prompt in enumerate(prompts)}
    images = storage.read_many(list(urls))
    return [{"caption": urls[url], "png": base64.b64encode(images[url]).decode()} for url in urls if url in images]
