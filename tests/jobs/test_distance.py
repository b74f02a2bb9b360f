"""`diffdis distance` compares two sets of images as they are, and gives the numbers of the tools that its protocols name."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffdis import feature_networks
from diffdis.feature_networks import PooledFeatures, build_feature_network
from diffdis.metrics.image_quality import Moments, frechet_distance
from diffdis_platform.cli import main
from diffdis_platform.commands.distance import parse_arguments
from diffdis_platform.evaluation import distance
from diffdis_platform.evaluation.distance import measure_distance, plan_distance
from ray_platform.evaluate.unit_work import WorkerModels
from tests.diffdis.test_feature_networks import pictures, random_inception  # noqa: F401  (a fixture)

TOOLS = Path(__file__).parents[1] / "support" / "fid_tools.py"
LITE = ["--networks", '["efficientnet_lite0"]']


def write_images(folder: Path, num: int, seed: int, sizes=((40, 56),)) -> Path:
    """Write images of the sizes (height, width) in turns."""
    folder.mkdir()
    for index in range(num):
        image = pictures(1, *sizes[index % len(sizes)], seed=seed + index)[0]
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    generated = write_images(root / "generated", 9, seed=0, sizes=((40, 56), (64, 64)))
    return generated, write_images(root / "reference", 12, seed=100)


def config_of(generated, reference, output_dir, *arguments):
    arguments = ("--generated", str(generated), "--reference", str(reference), "--output_dir", str(output_dir), *arguments)
    return parse_arguments(arguments).config


def measure_here(plan: distance.DistancePlan) -> dict[str, float]:
    """Return the metrics of a plan whose units this process runs."""
    replica = WorkerModels(
        {f"features/{name}": functools.partial(lambda one, _: one, one) for name, one in plan.networks.items()}, 1, "cpu"
    )
    units = plan.generated.units(plan.networks)
    if isinstance(plan.reference, distance.ImageFeatures):
        units |= plan.reference.units(plan.networks)
    for images, place, unit in units.values():
        images.rows[place] = unit.work.run(replica)
    return distance._metrics(plan)


def features_of(folder: Path) -> np.ndarray:
    network = build_feature_network("efficientnet_lite0")
    images = [np.asarray(Image.open(file)) for file in sorted(folder.iterdir())]
    return np.concatenate([network.features(image[None]) for image in images])


def test_images_of_several_sizes_are_compared_as_they_are(folders, tmp_path):
    metrics = measure_here(plan_distance(config_of(*folders, tmp_path, *LITE)))
    expected = frechet_distance(*(Moments.of(features_of(folder)) for folder in folders))
    assert metrics["fd_efficientnet_lite0"] == pytest.approx(expected, rel=1e-3)
    assert {"kid_efficientnet_lite0", "precision_efficientnet_lite0", "recall_efficientnet_lite0"} < metrics.keys()


@pytest.mark.parametrize(("to_size", "batches"), [(12, [32, 8]), (None, [8] * 40)])
def test_images_of_several_sizes_share_the_batches_of_a_network_that_resizes(to_size, batches):
    def to_input(pixels, device):
        channels = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        return F.interpolate(channels, to_size) if to_size else channels

    def mean_colors(inputs):
        sizes.append(len(inputs))
        return inputs.mean(dim=(2, 3))

    network = PooledFeatures(mean_colors, to_input, torch.device("cpu"), "fd_colors", {})
    images = [pictures(1, 8 + index, 9, seed=index)[0] for index in range(40)]
    sizes = []
    expected = np.concatenate([network.features(image[None]) for image in images])
    sizes.clear()
    rows = WorkerModels({"features/colors": lambda device: network}, 1, "cpu").extract_features(["colors"], images)
    assert np.allclose(rows["features/colors"], expected)
    assert sizes == batches


def test_a_set_has_no_distance_to_itself(folders, tmp_path):
    metrics = measure_here(plan_distance(config_of(folders[1], folders[1], tmp_path, *LITE)))
    assert metrics["fd_efficientnet_lite0"] == pytest.approx(0, abs=1e-3)
    assert metrics["recall_efficientnet_lite0"] == 1


def test_published_statistics_give_the_distance_to_their_images(folders, tmp_path):
    moments = Moments.of(features_of(folders[1]))
    np.savez_compressed(tmp_path / "published.npz", mu=moments.mean, sigma=moments.covariance)
    metrics = measure_here(plan_distance(config_of(folders[0], tmp_path / "published.npz", tmp_path, *LITE)))
    expected = frechet_distance(Moments.of(features_of(folders[0])), moments)
    assert metrics == {"fd_efficientnet_lite0": pytest.approx(expected, rel=1e-3)}


def test_a_command_on_a_cluster(folders, tmp_path, ray_cluster, capsys):
    config = config_of(*folders, tmp_path / "out", *LITE, "--num_workers", "1")
    details = measure_distance(config, plan_distance(config))
    assert json.loads((tmp_path / "out" / "distance.json").read_text()) == details
    assert (details["generated"]["n"], details["reference"]["n"]) == (9, 12)
    table = distance.render_distance(details)
    assert "FD-efficientnet_lite0" in table
    assert "9 generated and 12 reference images, protocol clean-fid" in table
    assert "with fewer than 6,400 of either" in table
    (folders[0] / "broken.png").write_bytes(b"no image")
    try:
        config = config_of(*folders, tmp_path / "out", *LITE, "--num_workers", "1")
        again = measure_distance(config, plan_distance(config))
    finally:
        (folders[0] / "broken.png").unlink()
    assert again["metrics"] == pytest.approx(details["metrics"])
    assert "generated: 1 image left out" in distance.render_distance(again)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--generated", ""), "generated: give a folder of images or tars"),
        (("--networks", '["inception"]'), "inception: FID needs the weights pt_inception-2015-12-05-6726825d.pth; without them"),
        (("--generated", "{tmp}/none", "--networks", "inception"), "generated: {tmp}/none: no such file or folder"),
        (("--generated", "{tmp}/none"), "generated: {tmp}/none: no such file or folder; correct the path"),
        (("--reference", "{tmp}/other.npz"), "reference: {tmp}/other.npz is not an .npz with mu and sigma"),
        (("--reference", "{tmp}/small.npz"), "reference: {tmp}/small.npz has 3 features, but efficientnet_lite0 has 1,280"),
        (("--networks", '["resnet"]'), "networks: feature network 'resnet': unknown; use efficientnet_lite0"),
        (("--networks", '["{tmp}/a/clip", "{tmp}/b/clip"]'), "networks: two networks have the same name (clip, clip)"),
        (("--protocol", "tf-fid"), "protocol: tf-fid is none of"),
    ],
)
def test_an_input_that_cannot_be_compared_is_one_line(arguments, line, folders, tmp_path, capsys):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    fields = {"--generated": str(folders[0]), "--reference": str(folders[1]), "--output_dir": str(tmp_path / "out")}
    values = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    fields |= {"--networks": LITE[1]} | dict(zip(values[::2], values[1::2], strict=True))
    assert main(["distance", *(part for pair in fields.items() for part in pair)]) == 1
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(f"error: {line.replace('{tmp}', str(tmp_path))}")


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Path:
    """A folder with the tools and torchvision, without their dependencies."""
    folder = tmp_path_factory.mktemp("tools")
    packages = ["torchvision==0.28.0", "pytorch-fid==0.3.0", "clean-fid==0.1.35", "requests"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--target", str(folder), *packages], check=True)
    return folder


@pytest.mark.slow
def test_the_protocols_give_the_numbers_of_their_tools(tools, random_inception, tmp_path, monkeypatch):  # noqa: F811
    weights, digest = random_inception
    folders = [write_images(tmp_path / name, 16, seed) for name, seed in (("generated", 0), ("reference", 100))]
    environment = os.environ | {"PYTHONPATH": str(tools), "TORCH_HOME": str(tmp_path / "torch")}
    command = [sys.executable, str(TOOLS), *map(str, folders), weights]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    theirs = json.loads(done.stdout.splitlines()[-1])
    monkeypatch.setattr(feature_networks, "INCEPTION_DIGEST", digest)
    for protocol in ("pytorch-fid", "clean-fid", "torch-fidelity"):
        config = config_of(*folders, tmp_path, "--networks", '["inception"]', "--inception", weights, "--protocol", protocol)
        ours = measure_here(plan_distance(config))
        assert ours["fid"] == pytest.approx(theirs[protocol], rel=1e-3), protocol
    assert ours["inception_score"] == pytest.approx(theirs["inception_score"], rel=1e-3)
    assert len({round(theirs[protocol], 2) for protocol in ("pytorch-fid", "clean-fid", "torch-fidelity")}) == 3
