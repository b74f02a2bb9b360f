"""Sets that are made of links, as in Hugging Face's cache, or that a user put together from other folders."""

from pathlib import Path

from ray_platform.evaluate.discovery import open_image_set, open_evaluation_set
from ray_platform.evaluate.samples import read_slice
from tests.support.evaluation_sets import encoded, picture, write_one


def keys(found) -> list[str]:
    return [sample.key for part in found.slices for sample in read_slice(part)]


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), "JPEG"))


def test_an_export_in_hugging_faces_cache(tmp_path):
    real = write_one(tmp_path / "real", "vtab/cifar10", samples_a_shard=4)
    cache = tmp_path / "datasets--clip-benchmark--wds_vtab-cifar10"
    for number, path in enumerate(sorted(path for path in real.rglob("*") if path.is_file())):
        blob, link = cache / "blobs" / f"{number:040x}", cache / "snapshots" / "main" / path.relative_to(real)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        link.symlink_to(blob)
    found = open_evaluation_set("vtab/cifar10", str(cache / "snapshots" / "main"))
    assert found.num_files == 3
    assert keys(found) == [f"{i // 4}.tar/s{i:07d}" for i in range(10)]


def test_links_to_classes_and_to_images(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / "there" / name / "0.jpg", seed)
    (tmp_path / "mine").mkdir()
    for name in ("a", "b"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "b" / "link.jpg").symlink_to(tmp_path / "there" / "a" / "0.jpg")
    (tmp_path / "there" / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "there" / "b" / "circle").symlink_to(tmp_path / "there" / "b")
    assert keys(open_evaluation_set("mine", str(tmp_path / "mine"))) == ["a/0.jpg", "b/0.jpg", "b/link.jpg"]
    assert keys(open_image_set(str(tmp_path / "mine"))) == ["a/0.jpg", "b/0.jpg", "b/link.jpg"]
