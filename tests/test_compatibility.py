"""Files of earlier versions still load. The README.md of each folder in tests/fixtures describes them."""

import dataclasses
import gzip
import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffdis.pipeline import DiffDisPipeline
from diffdis_platform.commands.compare import parse_arguments as parse_compare
from diffdis_platform.commands.eval import parse_arguments as parse_eval
from diffdis_platform.commands.pretrain import parse_arguments as parse_pretrain
from diffdis_platform.comparison.run import plan_comparison
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import build_task, export
from diffdis_platform.recipes.demo import demo
from diffdis_platform.sweeping import rebuild_report
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data import precomputed
from ray_platform.data.catalog import build_catalog, difference
from ray_platform.data.config import DataConfig
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.formats import NewerFormatError
from ray_platform.lease import Holder
from ray_platform.report.comparison import comparison_page
from ray_platform.tracking import read_run_record
from ray_platform.train import checkpoint_format
from tests.support.html_page import Page
from tests.support.messages import check_message
from tests.support.training import logged_losses

FILES = Path(__file__).parent / "fixtures" / "ba8fcc6" / "files.tar.xz"
OLD_ROOT = "/tmp/ba8fcc6"
CAPTIONS = ["red heart", "blue star", "green tree", "cat"]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A copy of the files in which the paths are replaced by the copy's folder."""
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(FILES) as tar:
        tar.extractall(root, filter="data")
    with tarfile.open(root / "mlflow_model.tar.gz") as tar:
        tar.extractall(root, filter="data")
    (root / "run" / "mlflow.db").write_bytes(gzip.decompress((root / "run" / "mlflow.db.gz").read_bytes()))
    for path in root.rglob("*"):
        is_text = path.suffix in (".yaml", ".json", ".csv") and "tune" not in path.parts  # Ray Tune's .json files contain pickles
        if is_text and path.name != "expected.json" and OLD_ROOT in (text := path.read_text()):
            path.write_text(text.replace(OLD_ROOT, str(root)))
    return root


@pytest.fixture(scope="module")
def expected(old):
    """Values that release ba8fcc6 read and computed: {"exact": …, "close": …, …}."""
    return json.loads((old / "expected.json").read_text().replace(OLD_ROOT, str(old)))


@pytest.fixture(scope="module")
def old_checkpoint(old):
    (url,) = checkpoint_format.list_checkpoints(str(old / "run"))
    return url, checkpoint_format.read_manifest(url)


def digest(arrays) -> str:
    """Return the SHA-256 of names, types, shapes and values of {name: array or tensor}."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        value = value.detach().cpu().contiguous().numpy() if hasattr(value, "detach") else np.ascontiguousarray(value)
        h.update(f"{name} {value.dtype.str} {value.shape}".encode() + value.tobytes())
    return h.hexdigest()


def as_json(record):
    return json.loads(json.dumps(dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record))


def assert_contains(values, expected, place=""):
    """Check that all expected fields have their old values. Additional fields are allowed."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in values, f"{place}.{key} is missing"
            assert_contains(values[key], value, f"{place}.{key}")
    else:
        assert values == expected, place


def test_a_configuration(old, expected):
    config = parse_pretrain(["--config", str(old / "run" / "config.yaml")]).config
    values = expected["exact"]["run/config.yaml"]
    assert config.model.gamma == pytest.approx(values["model"]["schedule"].pop("gamma"))  # renamed to query_snr
    assert config.data.max_skipped_fraction == values["data"].pop("max_skipped_share")
    assert_contains(as_json(config), values)
    # The recipe of this run has other values since then, for a field that is newer than the file.
    assert (config.objective.generation_weighting, config.objective.channel_weights) == ("none", ())


def test_a_configuration_with_some_sections_adds_to_the_recipe(tmp_path):
    (tmp_path / "part.yaml").write_text("recipe: demo\nobjective: {lambda_alignment: 0.5}\n")
    objective = parse_pretrain(["--config", str(tmp_path / "part.yaml")]).config.objective
    assert objective == dataclasses.replace(demo().objective, lambda_alignment=0.5)


def test_removed_fields_are_ignored_in_a_saved_configuration_only(old, tmp_path, caplog):
    saved = yaml.safe_load((old / "run" / "config.yaml").read_text())
    saved["train"]["removed"], saved["removed_section"] = 1, {"a": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    parsed = parse_pretrain(["--config", str(tmp_path / "config.yaml"), "--train.num_steps", "7"])
    expected = parse_pretrain(["--config", str(old / "run" / "config.yaml"), "--train.num_steps=7"])
    assert parsed.config == expected.config
    assert "removed_section, train.removed" in caplog.text
    [ignoring] = [message for message in caplog.messages if "removed_section" in message]
    check_message("--config with a removed field, in the log", ignoring, FILE=tmp_path / "config.yaml")
    again = tmp_path / "again.yaml"
    again.write_text(parsed.yaml)
    assert parse_pretrain([f"--config={again}"]).config == parsed.config
    again.write_text("train: {num_stepz: 1}")  # written by a user
    with pytest.raises(ConfigError, match="num_stepz"):
        parse_pretrain(["--config", str(again)])
    again.write_text(parsed.yaml.replace("format_version: 1", "format_version: 9"))
    with pytest.raises(NewerFormatError, match=r"again\.yaml: .*newer version.*9"):
        parse_pretrain(["--config", str(again)])


def test_a_renamed_field(tmp_path, caplog):
    """A former name works on the command line, in a saved configuration and in one that a user wrote."""
    (tmp_path / "config.yaml").write_text("data: {max_skipped_share: 0.25}")
    (tmp_path / "saved.yaml").write_text("format_version: 1\ndata: {max_skipped_share: 0.25}")
    for source in ("--data.max_skipped_share=0.25", f"--config={tmp_path}/config.yaml", f"--config={tmp_path}/saved.yaml"):
        caplog.clear()
        parsed = parse_pretrain([f"--output_dir={tmp_path}", source])
        assert "max_skipped_share is deprecated; use max_skipped_fraction" in caplog.text.replace("data.", "")
        assert parsed.config.data.max_skipped_fraction == 0.25
        assert "max_skipped_share" not in parsed.yaml


def test_a_checkpoint_with_removed_fields_is_exported(old, old_checkpoint, tmp_path):
    url, _ = old_checkpoint
    shutil.copytree(url, tmp_path / "checkpoint")
    values = json.loads((tmp_path / "checkpoint" / "complete.json").read_text().replace(OLD_ROOT, str(old)))
    values["config"]["model"]["removed"] = values["config"]["objective"]["removed"] = 1
    (tmp_path / "checkpoint" / "complete.json").write_text(json.dumps(values))
    export(ExportConfig(checkpoint=str(tmp_path / "checkpoint"), output_dir=str(tmp_path / "export")))
    states = [DiffDisPipeline.from_pretrained(path).model.state_dict() for path in (tmp_path / "export", old / "run" / "export")]
    assert digest(states[0]) == digest(states[1])


def test_a_checkpoints_manifest_and_ledgers(old_checkpoint, expected):
    url, manifest = old_checkpoint
    exact = expected["exact"]
    assert_contains(as_json(manifest), exact["checkpoint/manifest"])
    base, consumed = checkpoint_format.read_ledgers(url, manifest)
    assert json.loads(base.to_bytes()) == exact["checkpoint/base"]
    assert json.loads(consumed.to_bytes()) == exact["checkpoint/consumed"]
    for unit, ranges in exact["checkpoint/consumed ranges of pool 0, epoch 1"].items():
        assert [int(end) for end in np.ravel(list(consumed.ranges(0, 1, int(unit))))] == ranges
    for rank, state in exact["checkpoint/rank states"].items():
        found = checkpoint_format.read_rank_state(url, manifest, int(rank))
        assert (found.skipped, as_json(found.history)) == (state["skipped"], state["history"])


def test_a_checkpoints_tensors(old_checkpoint, expected):
    url, manifest = old_checkpoint
    exact = expected["exact"]
    tensors = checkpoint_format.read_tensors(url, manifest, checkpoint_format.tensor_files(manifest))
    assert digest(tensors) == exact["checkpoint/tensors"]["digest"]
    for which in ("weights", "ema"):
        assert digest(dict(checkpoint_format.read_weights(url, which))) == exact[f"checkpoint/{which}"]


def test_an_export_equals_the_one_made_of_its_checkpoint(old, old_checkpoint, expected, tmp_path):
    url, manifest = old_checkpoint
    config = json.loads(json.dumps(manifest.config).replace(OLD_ROOT, str(old)))
    build_task(config).save_pretrained(dict(checkpoint_format.read_weights(url, "ema")), tmp_path)
    for folder in (old / "run" / "export", tmp_path):
        assert digest(DiffDisPipeline.from_pretrained(folder).model.state_dict()) == expected["exact"]["export"]["digest"]


def test_an_exports_answers(old, expected):
    close = expected["close"]
    pipeline = DiffDisPipeline.from_pretrained(old / "run" / "export")
    rng = np.random.default_rng(5)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(2)]
    steps = {"num_steps": 3, "num_draws": 2, "keys": ["a", "b"]}

    def assert_close(values, name, tolerance=1e-3):
        np.testing.assert_allclose(np.asarray(values, float), close[name], rtol=tolerance, atol=tolerance)

    assert_close(pipeline.embed_image(images, **steps).tolist(), "embed_image")
    assert_close(pipeline.embed_text(CAPTIONS).tolist(), "embed_text")
    assert_close(pipeline.classify(images, CAPTIONS, ["a {c}."], **steps).tolist(), "classify")
    assert_close(pipeline.generate(CAPTIONS[:2], num_inference_steps=3, guidance_scale=2.0), "generate", 1.0)


def test_a_model_from_mlflow(old, expected):
    """The model includes the code of its version; if another diffdis is already imported, MLflow uses that one."""
    import mlflow.pyfunc
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(old / "mlflow_model"))
    result = model.predict(pd.DataFrame({"caption": CAPTIONS}), {"task": "embed"})
    embedding = [list(map(float, row)) for row in result["embedding"]]
    np.testing.assert_allclose(embedding, expected["close"]["mlflow_model embed"], rtol=1e-3, atol=1e-3)


def test_files_with_format_versions(tmp_path):
    folder = Path(__file__).parent / "fixtures" / "2026_11_29"
    config = parse_pretrain(["--config", str(folder / "config.yaml")]).config
    assert (config.output_dir, config.train.num_steps, config.data.sources) == ("/data/run", 7, ("/data/shards",))
    newest, older = checkpoint_format.list_checkpoints(str(folder))
    assert (newest[-8:], older[-8:]) == ("00000015", "00000020")
    manifest = checkpoint_format.read_manifest(newest)
    assert (manifest.counter, manifest.parent) == (3, "20261129-120000-aaaaaa/step_00000020")
    assert (manifest.ancestors, manifest.seed) == (["20261129-120000-aaaaaa"], 3)
    weights = {name: tensor.tolist() for name, tensor in checkpoint_format.read_weights(newest, "weights")}
    assert weights == {"p0": [0, 1, 2, 3], "p1": [1, 2, 3, 4]}
    assert checkpoint_format.read_rank_state(newest, manifest, 1).skipped == {"image_undecodable": 2}
    holder = Holder.from_bytes((folder / "lease.json").read_bytes(), "lease.json")
    assert str(holder) == "launch 20261129-110000-bbbbbb (host gpu-3, pid 812, Ray job raysubmit_1)"
    assert read_run_record(str(folder))["run_id"] == "0123456789abcdef"
    (tmp_path / "shards").mkdir()
    for name, size in (("00000.tar", 2048), ("00001.tar", 4096)):
        (tmp_path / "shards" / name).write_bytes(bytes(size))
    catalog = build_catalog(DataConfig(sources=(str(tmp_path / "shards"),)))
    assert difference((folder / "catalog.json").read_bytes(), catalog) == ""
    (tmp_path / "shards" / "00001.tar").unlink()
    smaller = build_catalog(DataConfig(sources=(str(tmp_path / "shards"),)))
    assert "1 removed (00001.tar)" in difference((folder / "catalog.json").read_bytes(), smaller)
    shutil.copy(folder / "precomputed" / "manifest.json", tmp_path)
    (tmp_path / "00000-0000000.arrow").write_bytes(b"x")
    encoded = build_catalog(DataConfig(sources=(str(tmp_path),), image_size=16))
    assert (encoded.num_samples, encoded.manifest["encoders"]) == (3, {"autoencoder": {"kind": "haar"}})


@pytest.mark.parametrize("name", ["catalog.json", "mlflow.json", "manifest.json"])
def test_a_file_of_a_newer_version_is_told_apart_from_a_damaged_one(tmp_path, name):
    (tmp_path / name).write_text('{"format_version": 9}')
    (tmp_path / "a.arrow").write_bytes(b"x")
    read = {
        "catalog.json": lambda: difference((tmp_path / name).read_bytes(), None),
        "mlflow.json": lambda: read_run_record(str(tmp_path)),
        "manifest.json": lambda: build_catalog(DataConfig(sources=(str(tmp_path),))),
    }[name]
    with pytest.raises(NewerFormatError, match=rf"{name}: .*newer version"):
        read()
    (tmp_path / name).write_text("[")
    with pytest.raises(DataError, match=name) as damaged:
        read()
    assert "newer version" not in str(damaged.value)


def test_the_data_of_an_old_run_is_recognized(old, expected):
    config = parse_pretrain(["--config", str(old / "run" / "config.yaml")]).config
    catalog = build_catalog(config.data)
    assert (catalog.digest, list(catalog.num_units)) == (expected["exact"]["shards"]["digest"], [2])
    assert difference((old / "run" / "catalog.json").read_bytes(), catalog) == ""


def test_precomputed_shards(old, expected):
    for name, values in expected["exact"]["precomputed"].items():
        keys, captions, tensors = precomputed.from_arrow((old / "precomputed" / name).read_bytes())
        assert (keys, captions, digest(tensors)) == (values["keys"], values["captions"], values["digest"])
    catalog = build_catalog(DataConfig(sources=(str(old / "precomputed"),), image_size=16))
    assert (catalog.digest, catalog.num_samples) == (expected["exact"]["precomputed catalog"]["digest"], 24)
    encoders = parse_pretrain(["--config", str(old / "run" / "config.yaml")]).config.run("demo").describe_encoders()
    precomputed.check_encoders(catalog.manifest, encoders)
    other = encoders | {"text_encoder": encoders["text_encoder"] | {"max_length": 9}}
    with pytest.raises(DataError, match="text_encoder"):
        precomputed.check_encoders(catalog.manifest, other)


def test_an_evaluation(old, expected):
    folder = old / "evaluation"
    parse_eval(["--config", str(folder / "config.yaml")])
    details = json.loads((folder / "details.json").read_text())
    assert expected["exact"]["evaluation/metrics_for_tracking"].items() <= metrics_for_tracking(details).items()
    keys = sorted(path.stem for path in (folder / "units").glob("*.npz"))
    cached = list(ResultCache(str(folder / "units"), "git-0").read(keys))
    assert {origin for _, _, origin in cached} == {("unknown", "unknown")}
    assert {key: digest(rows) for key, rows, _ in cached} == expected["exact"]["evaluation/units"]


def test_a_comparison_has_nothing_left_to_do(old, expected):
    plan = plan_comparison(parse_compare(["--config", str(old / "comparison" / "config.yaml")]).config)
    assert plan.pending == []
    results = json.dumps(expected["exact"]["comparison/plan"]["results"])
    assert as_json(plan.results) == json.loads(
        results.replace("flops_a_sample", "flops_per_sample").replace("drawing_seconds", "generation_seconds")
    )
    summary = json.loads((old / "comparison" / "summary.json").read_text())
    details = {"title": "t", "created": "2026-01-01T00:00:00", "seconds": 1.0, "code_version": "c", "command": "x"}
    page = Page(comparison_page({**details, **summary, "grids": [], "curves": {}}))
    assert "generation" in page.text


def test_the_report_of_a_finished_sweep_is_rebuilt(old):
    report = old / "sweep" / "report.html"
    report.unlink(missing_ok=True)
    details = rebuild_report(str(old / "sweep"))
    text = Page(report.read_text()).text
    assert [trial["name"] for trial in details["trials"]] == ["trial_000", "trial_001"]
    assert all(trial["name"] in text for trial in details["trials"])


def test_an_unfinished_sweep_is_rejected_in_one_line(old, tmp_path):
    shutil.copy(old / "sweep" / "sweep.json", tmp_path)
    with pytest.raises(ConfigError, match=r"^output_dir: .*unfinished") as error:
        rebuild_report(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_an_old_run_resumes_with_the_losses_that_it_would_have_had(old, expected, ray_cluster):
    arguments = ["--config", str(old / "run" / "config.yaml"), "--train.stop_at_step", "0", "--train.resume", "auto"]
    parse_pretrain(arguments).config.run("demo").fit()
    losses = logged_losses(old / "run")
    exact = expected["losses of the steps after the checkpoint (close)"]
    for step in ("5", "6"):
        values = tuple(exact[f"train/loss_{name}"][step] for name in ("generation", "alignment"))
        torch.testing.assert_close(losses[int(step)], values, rtol=1e-3, atol=1e-3)
