"""The keys of an evaluation's units: rows are reused only for the same data, models and settings. Distances of features."""

import dataclasses
import io
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffdis.metrics import image_quality
from diffdis.metrics.image_quality import Moments, frechet_distance
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.evaluation.distance import feature_metrics, few_images_warning
from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.quality import QualityMeasurement, read_prompts
from diffdis_platform.evaluation.results import EvaluationPlan, EvaluationResults
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate import sets
from ray_platform.evaluate.discovery import find_evaluation_set
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.evaluate.unit_work import GenerateImages, Ranking, WorkerModels, choose_sample
from ray_platform.replicas import UnitResult, WorkQueue
from tests.ray_platform.evaluate.test_torchvision_folders import write_aircraft, write_cifar
from tests.support.evaluation_sets import encoded, picture, write_image, write_own, write_retrieval, write_wds

MODEL = EvaluationModel("diffdis", "/model", "digest", build=lambda device: None)


def write_images(root: Path) -> None:
    for seed, name in enumerate(("cat/0.jpg", "cat/1.jpg", "dog/0.jpg")):
        write_image(root / "mine" / name, seed)


def write_pairs(root: Path) -> None:
    write_retrieval(root, "flickr30k", 4)


def write_parquet(root: Path) -> None:
    table = pa.table({"image": [encoded(picture(seed), "PNG") for seed in range(4)], "label": [0, 1, 0, 1]})
    (root / "mine").mkdir()
    (root / "mine" / "classnames.txt").write_text("cat\ndog\n")
    pq.write_table(table, root / "mine" / "test.parquet")


# A function that writes a set, its name, a file in it, and bytes of the file to replace by others of the same length.
CHANGES = {
    "label in a tar": (write_own, "mine", "wds_mine/test/0.tar", b"\x000\0", b"\x001\0"),
    "caption in a tar": (write_pairs, "flickr30k", "wds_flickr30k/test/0.tar", b"image 2", b"other 2"),
    "image of a folder": (write_images, "mine", "mine/cat/1.jpg", b"\xff\xd9", b"\xff\xda"),
    "parquet": (write_parquet, "mine", "mine/test.parquet", b"IEND", b"IEnD"),
    "file of CIFAR": (write_cifar, "vtab/cifar10", "cifar-10-batches-py/test_batch", b"K\x07", b"K\x03"),
    "index of labels": (
        write_aircraft, "fgvc_aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt", b" 707-320", b" 727-200"
    ),
}  # fmt: skip


def unit_keys(root: Path, name: str) -> list[str]:
    data = find_evaluation_set([str(root)], name)
    measurement = RetrievalMeasurement if data.task == "zeroshot_retrieval" else ZeroShotMeasurement
    return [unit.key for unit in measurement(MODEL, data).units if not unit.runs_first]


@pytest.mark.parametrize("change", CHANGES)
def test_a_set_that_changes_at_the_same_size_is_measured_again(tmp_path, change):
    write, name, file, old, new = CHANGES[change]
    write(tmp_path)
    path = tmp_path / file
    os.utime(path, (0, 0))
    before = unit_keys(tmp_path, name)
    assert unit_keys(tmp_path, name) == before, "the same data, the same keys"
    content = path.read_bytes()
    assert content.count(old)
    path.write_bytes(content.replace(old, new, 1))
    assert not set(unit_keys(tmp_path, name)) & set(before)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("png", b""), ("cls", b"cat")], "2 label_invalid (a label that is not a whole number but a text"),
        ([("png", b""), ("json", b'{"label": 1}')], "2 label_missing (a sample of an evaluation set without a label"),
        ([("jp2", b""), ("cls", b"1")], "2 image_missing (no .jpg, .jpeg, .png or .webp (in evaluations also"),
        ([("png", b""), ("cls", b"1"), ("cls", b"1")], "2 key_repeated (the same file name twice in a tar"),
    ],
    ids=["labels are texts", "labels in .json", "images are .jp2", "every key twice"],
)
def test_the_cause_for_which_no_sample_can_be_used(tmp_path, members, words):
    folder = write_own(tmp_path)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for key in ("0", "1"):
            for suffix, content in members:
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                content = content or encoded(picture(0), "PNG")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    measurement = ZeroShotMeasurement(MODEL, find_evaluation_set([str(tmp_path)], "mine"))
    scorer = SimpleNamespace(preprocess=lambda image: image, embed_classes=lambda names, templates: np.eye(3, dtype=np.float32))
    models = WorkerModels({MODEL.identity: lambda device: scorer}, 1, "cpu")
    for unit in measurement.units:
        measurement.add(unit, unit.work.run(models) | {"seconds": np.ones(1)})
    with pytest.raises(DataError, match="can be used: ") as raised:
        measurement.scores()
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("layout", "num_reference", "expected"), [("folder", 0, 40), ("folder", 16, 16), ("tars", 16, 16), ("tars", 40, 40)]
)
def test_the_reference_is_the_whole_folder_or_a_sample_of_all_of_it(tmp_path, monkeypatch, layout, num_reference, expected):
    """The first images by name would all be of one class."""
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", 8)
    if layout == "folder":
        for seed in range(40):
            write_image(tmp_path / "mine" / ("airplane" if seed < 20 else "truck") / f"{seed:02}.jpg", seed)
    else:
        write_wds(tmp_path, "mine", [picture(seed) for seed in range(40)], labels=[0] * 40, classes=["a"], samples_per_shard=8)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    reference = tmp_path / ("mine" if layout == "folder" else "wds_mine")
    sizes = {"num_images": 2, "num_reference": num_reference}
    config = QualityConfig(str(tmp_path / "prompts.txt"), str(reference), guidance_scales=(1.0,), **sizes)
    measurement = QualityMeasurement(MODEL, None, 32, config, read_prompts(config), str(tmp_path / "out"))
    models, measured = WorkerModels(measurement.network_builders, 1, "cpu"), 0
    for unit in measurement.units:
        if unit.group == measurement.reference_group:
            rows = unit.work.run(models) | {"seconds": np.ones(1)}
            measured += len(rows["keys"])
            measurement.add(unit, rows)
    assert measurement.results({measurement.group_of(1.0): "not generated here"}) == []
    assert len(measurement.references["efficientnet_lite0"].features) == expected
    assert measured <= max(expected, 1.25 * expected + 1) or layout == "tars"
    if layout == "folder" and num_reference == 16:
        images = {str(key) for rows in measurement._real.values() for key in rows["keys"]}
        assert 8 <= sum(name.startswith("truck") for name in images) <= 12


def test_too_few_reference_images_are_noticed_before_images_are_generated(tmp_path):
    write_images(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = QualityConfig(prompts=str(tmp_path / "prompts.txt"), reference=str(tmp_path / "mine"), num_reference=4)
    for num_reference, keys, words in ((4, ["a", "b", "c"], "only 3 images of"), (0, [], "only 0 images of")):
        config = dataclasses.replace(config, num_reference=num_reference)
        measurement = QualityMeasurement(MODEL, None, 32, config, read_prompts(config), str(tmp_path / "out"))
        results = EvaluationResults(EvaluationPlan(MODEL, [], {}, quality=measurement))
        first, *others = WorkQueue(results.units).waiting
        results.add(UnitResult(first, {"keys": np.array(keys), "causes": np.array([])}))
        assert {unit.group for unit in others} < results.failures.keys(), "they are not generated"
        details = results.finish()
        assert details["quality"] == []
        assert [words in line for line in details["failures"]] == [True]
    for wrong in ({"num_reference": 1}, {"num_reference": 9, "reference": "reference_inception.npz"}):
        with pytest.raises(ConfigError, match=r"quality\.num_reference"):
            dataclasses.replace(config, **wrong)


def test_published_statistics_are_a_reference(tmp_path):
    """Those of pytorch-fid and clean-fid: mu and sigma, without the number of images. KID needs the features of each image."""
    rng = np.random.default_rng(0)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(12)))
    published, generated = Moments.of(rng.standard_normal((50, 1280))), rng.standard_normal((12, 1280)).astype(np.float32)
    np.savez_compressed(tmp_path / "published.npz", mu=published.mean, sigma=published.covariance)
    config = QualityConfig(str(tmp_path / "prompts.txt"), str(tmp_path / "published.npz"), guidance_scales=(1.0, 2.0))
    measurement = QualityMeasurement(MODEL, None, 32, config, read_prompts(config), str(tmp_path / "out"))
    for unit in measurement.units:
        broken = np.where(unit.group == measurement.group_of(2.0), np.nan, 1.0).astype(np.float32)
        measurement.add(unit, {"features/efficientnet_lite0": generated * broken, "seconds": np.ones(1)})
    failures: dict[str, str] = {}
    point, failed = measurement.results(failures)
    expected = frechet_distance(Moments.of(generated), published)
    assert point["metrics"] == {"fd_efficientnet_lite0": pytest.approx(expected, rel=1e-6)}
    assert (point["num_reference"], failed["metrics"]) == ({}, {})
    assert "12 generated and an unknown number of real images in 1,280 dimensions" in point["warnings"][0]
    assert ["12 of 12 generated images have NaN features" in line for line in failures.values()] == [True]


def test_a_reference_that_does_not_fit_is_one_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = QualityConfig(str(tmp_path / "prompts.txt"), str(tmp_path / "reference.npz"))
    for arrays, line in (
        (
            {"mu": np.zeros(3), "sigma": np.eye(3)},
            "has 3 features, but efficientnet_lite0 has 1,280; give the statistics",
        ),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "is not an .npz with mu and sigma, nor a reference_<network>.npz"),
        ({"other": np.zeros(3)}, "is not an .npz with mu and sigma, nor a reference_<network>.npz"),
    ):
        np.savez(tmp_path / "reference.npz", **arrays)
        with pytest.raises(ConfigError, match=rf"^quality\.reference: \S+ {line}"):
            QualityMeasurement(MODEL, None, 32, config, read_prompts(config), str(tmp_path / "out"))


def test_a_sample_depends_on_the_keys_alone():
    keys = [f"{number:03}.jpg" for number in range(200)]
    chosen = choose_sample(keys, 50)
    assert (len(chosen), chosen) == (50, sorted(set(chosen)))
    assert {keys[index] for index in chosen} == {keys[::-1][index] for index in choose_sample(keys[::-1], 50)}
    assert 15 <= sum(index < 100 for index in chosen) <= 35, "not the first ones"
    assert choose_sample(keys[:3], 50) == [0, 1, 2]


def test_reference_images_that_change_at_the_same_size_are_measured_again(tmp_path):
    write_images(tmp_path)
    path, prompts = tmp_path / "mine" / "cat" / "0.jpg", tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    config = QualityConfig(prompts=str(prompts), reference=str(tmp_path / "mine"), guidance_scales=(1.0,))

    def keys() -> dict[str, str]:
        return {
            unit.name: unit.key
            for unit in QualityMeasurement(MODEL, None, 32, config, read_prompts(config), str(tmp_path / "out")).units
        }

    os.utime(path, (0, 0))
    before = keys()
    assert keys() == before
    path.write_bytes(path.read_bytes().replace(b"\xff\xd9", b"\xff\xda"))
    after = keys()
    assert {name for name, key in after.items() if before[name] != key} == {name for name in after if "reference" in name}
    assert len(after) == 2


def test_the_best_of_several_images_is_another_unit_and_another_protocol(tmp_path):
    write_images(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    config = QualityConfig(str(tmp_path / "prompts.txt"), str(tmp_path / "mine"), guidance_scales=(1.0,))
    rows, points = {"features/efficientnet_lite0": np.zeros((2, 4)), "seconds": np.ones(2)}, []
    for each in (config, dataclasses.replace(config, best_of=4)):
        ranker = MODEL if each.best_of > 1 else None
        measurement = QualityMeasurement(MODEL, None, 32, each, read_prompts(each), str(tmp_path / "out"), ranker)
        (unit,) = (unit for unit in measurement.units if unit.group == measurement.group_of(1.0))
        measurement.add(unit, rows)
        points.append((unit, measurement.results({measurement.reference_group: "not measured here"})[0]["protocol"]))
    (single, single_protocol), (best, best_protocol) = points
    assert single.key != best.key
    assert (best.work.ranking, single.work.ranking) == (Ranking(MODEL.identity, 4, {}), None)
    assert best.cost == 4 * single.cost
    with pytest.raises(ConfigError, match="protocol best_of"):
        check_same_protocol(single_protocol, best_protocol)
    with pytest.raises(ConfigError, match=r"quality\.best_of: 0"):
        dataclasses.replace(config, best_of=0)
    with pytest.raises(ConfigError, match=r"quality\.ranker: nothing is ranked"):
        dataclasses.replace(config, ranker="/clip")


def test_the_best_image_of_each_prompt_is_chosen_by_the_ranker_and_the_first_ones_stay(tmp_path):
    """Each image has one gray level, and the ranker prefers one level for each prompt."""
    level = {7: 10, "7/1": 20, "7/2": 30, 8: 40, "8/1": 50, "8/2": 60}
    wanted, asked = {"a cat": 30, "a dog": 40}, []

    def generate_images(prompts, names, num_steps):
        return np.stack([np.full((4, 4, 3), level[name], np.uint8) for name in names])

    def embed_images(images, keys, **settings):
        asked.append((keys, settings))
        return np.eye(70, dtype=np.float32)[images[:, 0, 0, 0]]

    def embed_texts(prompts):
        return np.eye(70, dtype=np.float32)[[wanted[prompt] for prompt in prompts]]

    generator = SimpleNamespace(generate_images=generate_images)
    ranker = SimpleNamespace(preprocess=lambda image: image, embed_images=embed_images, embed_texts=embed_texts)
    network = SimpleNamespace(preprocess=torch.from_numpy, embed_inputs=lambda inputs: inputs[:, 0, 0, :1].float())
    builders = {"model": generator, "ranker": ranker, "features/network": network}
    models = WorkerModels({name: lambda device, each=each: each for name, each in builders.items()}, 1, "cpu")
    arguments = ("model", ("a cat", "a dog"), 7, {"num_steps": 1}, ("network",), "ranker", str(tmp_path), 8)
    rows = GenerateImages(*arguments, Ranking("ranker", 3, {"num_draws": 4})).run(models)
    single = GenerateImages(*arguments).run(models)
    assert rows["best_number"].tolist() == [2, 0]
    assert rows["best/features/network"].tolist() == [[30], [40]]
    assert rows["best/alignment"].tolist() == [1, 1]
    assert rows["features/network"].tolist() == single["features/network"].tolist() == [[10], [40]]
    assert rows["alignment"].tolist() == single["alignment"].tolist() == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["000007.png"]
    assert {settings.get("num_draws") for _, settings in asked} == {4, None}


def test_features_that_are_not_finite_are_named():
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    broken = x.copy()
    broken[[3, 5], 0] = np.nan
    with pytest.raises(ValueError, match="2 of 40 generated images have NaN features, the first is image 3;"):
        feature_metrics("fid", broken, x)
    with pytest.raises(ValueError, match="2 of 40 reference images"):
        feature_metrics("fid", x, broken)


@pytest.mark.parametrize(("num_generated", "has_extrapolation", "has_deviation"), [(30, False, False), (40, True, True)])
def test_distances_of_few_images(num_generated, has_extrapolation, has_deviation, monkeypatch):
    """5 images a dimension are needed; KID has a deviation only if subsets differ in both sets."""
    monkeypatch.setattr(image_quality, "KID_SUBSET_SIZE", 35)
    rng = np.random.default_rng(0)
    metrics = feature_metrics("fid", *(rng.standard_normal((n, 8)).astype(np.float32) for n in (num_generated, 50)))
    assert ("fid_infinity" in metrics, "kid_std" in metrics) == (has_extrapolation, has_deviation)
    warning = few_images_warning("fid", num_generated, 50, 8)
    expected = "FID: 30 generated and 50 real images in 8 dimensions; with fewer than 40 of either, the distance is biased"
    assert warning.startswith("" if has_extrapolation else expected)
    assert bool(warning) != has_extrapolation
