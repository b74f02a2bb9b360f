"""What a comparison measures, what of it was measured before, and what is left."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.evaluation.quality import ReferenceFeatures, read_prompts
from diffdis_platform.evaluation.run import open_sets
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.discovery import open_image_set
from ray_platform.json_values import first_difference, with_defaults
from ray_platform.redaction import redacted_values

SUMMARY, RESULT = "summary.json", "result.json"
# On which no figure depends, or which stand for files whose digests are taken instead: these may lie elsewhere.
_PLACES = (
    "pretrain.output_dir", "pretrain.tracking", "pretrain.preview_captions", "pretrain.train.seed", "pretrain.train.resume",
    "pretrain.train.heldout_sources", "pretrain.data.sources", "pretrain.model.text_encoder.path",
    "pretrain.model.autoencoder.path", "evaluation.checkpoint", "evaluation.output_dir", "evaluation.tracking",
    "evaluation.suite", "evaluation.data_roots", "evaluation.quality.prompts", "evaluation.quality.reference",
    "evaluation.num_workers", "evaluation.cpus_per_worker", "evaluation.gpus_per_worker", "pretrain.data.placement",
    "pretrain.train.placement", "evaluation.placement",
)  # fmt: skip

Results = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> figures


@dataclass(frozen=True)
class Plan:
    """`identity` is all that the figures depend on besides arm and seed."""

    identity: Mapping[str, Any]
    fields: dict[str, dict[str, Any]]  # of the arms
    results: Results  # of earlier calls; more come in
    left: list[tuple[str, int]]  # (arm, seed), a seed's arms together

    @property
    def digest(self) -> str:
        return digest_of(self.identity)


def digest_of(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def with_new_fields(earlier: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as an earlier version of the code wrote it, with its default for every field that came later."""
    return {**earlier, **{part: with_defaults(earlier[part], values) for part, values in _fields(CompareConfig()).items()}}


def plan(config: CompareConfig) -> Plan:
    """After every check that needs no cluster. Raises ConfigError and DataError."""
    identity = _identity(config)
    fields, results = _earlier(config, identity)
    for arm in config.arms:
        if fields.setdefault(arm, config.fields_of(arm)) != config.fields_of(arm):
            raise ConfigError(f"own_arms.{arm}: {config.output_dir} has one with {fields[arm]}; take another name")
    left = []
    for seed in config.seeds:
        for arm in config.arms:
            known = results.setdefault(arm, {})
            if seed not in known and (found := _result(config, identity, arm, seed)) is not None:
                known[seed] = found
            if seed not in known:
                left.append((arm, seed))
    return Plan(identity, fields, results, left)


def _fields(config: CompareConfig) -> dict[str, Any]:
    """What all runs have in common, without places and seeds, in JSON types."""
    fields: dict[str, Any] = json.loads(
        json.dumps({"pretrain": asdict(config.pretrain), "evaluation": asdict(config.evaluation)})
    )
    for place in _PLACES:
        *groups, name = place.split(".")
        inner = fields
        for group in groups:
            inner = inner[group]
        inner.pop(name)
    return fields


def _identity(config: CompareConfig) -> dict[str, Any]:
    """The configuration without places and seeds, with digests of the files that it names."""
    run = config.pretrain_of(config.arms[0], config.seeds[0]).run("")
    sets, _ = open_sets(config.evaluation)
    return redacted_values(_fields(config)) | {
        "encoders": json.loads(json.dumps(run.describe_encoders())),
        "training_data": run.check().digest,
        "sets": {name: data.digest for name, data in sets.items()},
        "quality": _quality(config.evaluation.quality),
    }


def _quality(config: QualityConfig) -> dict[str, str]:
    """Digests of the prompts, and of the reference images."""
    if not config.prompts:
        return {}
    prompts = hashlib.sha256("\n".join(read_prompts(config)).encode()).hexdigest()[:16]
    real = ReferenceFeatures.read(config.reference) if config.reference.endswith(".npz") else open_image_set(config.reference)
    return {"prompts": prompts, "reference": real.digest}


def _earlier(config: CompareConfig, identity: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], Results]:
    """(the arms' fields, their results) of the summary that is there. Raises ConfigError for that of another comparison."""
    url = storage.join(config.output_dir, SUMMARY)
    if not storage.exists(url):
        return {}, {}
    try:
        summary = json.loads(storage.read_small(url))
        arms, theirs = summary["arms"], dict(summary["config"])
        results = {arm: {int(seed): figures for seed, figures in entry["seeds"].items()} for arm, entry in arms.items()}
        fields = theirs.pop("arms")
        theirs = with_new_fields(theirs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"output_dir: {url} is no summary of a comparison ({error}); remove it") from None
    if difference := first_difference(theirs, identity):
        field, one, other = difference
        raise ConfigError(
            f"output_dir: {config.output_dir} holds another comparison ({field}: {one} there, {other} here); restore what it "
            "had, or give another output_dir"
        )
    return fields, results


def _result(config: CompareConfig, identity: Mapping[str, Any], arm: str, seed: int) -> dict[str, Any] | None:
    """Of a run that was finished under the same configuration."""
    url = storage.join(config.run_dir(arm, seed), RESULT)
    if not storage.exists(url):
        return None
    found = json.loads(storage.read_small(url))
    same = found["fields"] == config.fields_of(arm) and with_new_fields(found["config"]) == identity
    return found["figures"] if same else None
