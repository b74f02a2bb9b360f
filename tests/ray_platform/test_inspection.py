"""What an inspection counts: exactly, whoever reads which shard, and whatever is in it."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_platform.data.catalog import Catalog, Shard, ShardRange, build_catalog
from ray_platform.data.causes import SHARD_CHANGED, SHARD_CRASHES
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.inspection import (
    EXAMPLES,
    THUMBNAILS,
    Histogram,
    Statistics,
    inspect_unit,
    inspect_units,
    spread_units,
)
from ray_platform.data.precomputed import to_arrow
from ray_platform.report.inspection import InspectionSummary, inspection_page, summarize
from tests.ray_platform.conftest import png, samples_of, tar_of

CONFIG = DataConfig(image_size=16, retry_seconds=0, filters=FilterConfig(min_size=10))


def unit_of(path: Path, num_samples: int = -1) -> ShardRange:
    size = path.stat().st_size
    return ShardRange(Shard(str(path), size, path.name, num_samples), 0, size)


def summary_of(found: Statistics, units, config=CONFIG) -> InspectionSummary:
    shards = tuple(unit.shard for unit in units)
    return summarize(Catalog(shards, (tuple(units),), (1.0,)), config, found, cpus=2)


def merged(parts) -> Statistics:
    total = Statistics()
    for part in parts:
        total.merge(part)
    return total


def untimed(found: Statistics) -> Statistics:
    return dataclasses.replace(found, read_seconds=0.0, decode_seconds=0.0)


def picture(height: int, width: int, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[ShardRange]:
    """30 good samples, 2 too small ones, and bad ones of many causes."""
    folder = tmp_path_factory.mktemp("mixture")
    shards = {
        "good.tar": tar_of(samples_of(0, 20)),
        "mixed.tar": tar_of(
            [
                *samples_of(100, 10),
                *samples_of(200, 2, size=8),
                *[(f"empty{i}.png", b"") for i in range(7)],
                *[(f"empty{i}.txt", b"a") for i in range(7)],
                *[("blank.png", png(1)), ("blank.txt", b"  ")],
                *[("broken.png", b"no png"), ("broken.txt", b"a")],
                ("alone.txt", b"a"),
            ]
        ),
        "garbage.tar": b"garbage" * 400,
        "hollow.tar": tar_of([]),
    }
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    return [unit_of(folder / name) for name in shards]


def test_a_known_mixture_is_counted_exactly(mixture):
    found = merged(inspect_unit(unit, CONFIG) for unit in mixture)
    assert (found.units, found.readable_units, found.unusable_units) == (4, 3, 2)
    assert (found.used, found.looked_at) == (30, 20 + 22 + 1)
    assert found.num_bytes == sum(unit.shard.size for unit in mixture)
    assert found.rejected == {
        "filtered_size": 2, "image_empty": 7, "caption_empty": 1, "image_undecodable": 1, "image_missing": 1, "tar_truncated": 1,
    }  # fmt: skip
    assert found.lost_units == {"shard_empty": 1}
    assert found.examples["image_empty"] == [f"mixed.tar/empty{i}" for i in range(EXAMPLES)]
    assert found.shapes == {(16, 16): 30}
    widths = dict(zip(found.histograms["width"].edges, found.histograms["width"].counts, strict=True))
    assert {edge: count for edge, count in widths.items() if count} == {0: 33}  # 30 used, 2 filtered, 1 without caption
    words = found.histograms["caption_words"]
    assert (sum(words.counts), words.least, words.most) == (30, 2, 2)


def test_the_summary_counts_a_lost_shard_as_what_the_others_hold(mixture):
    found = merged(inspect_unit(unit, CONFIG) for unit in mixture)
    summary = summary_of(found, mixture)
    a_shard = round(43 / 3)
    assert summary.rejects["shard_empty"].samples == a_shard
    samples = summary.samples
    assert (samples.used, samples.filtered, samples.bad) == (30, 2, 11 + a_shard)
    assert samples.bad_share == (11 + a_shard) / (30 + 11 + a_shard)
    assert summary.verdict.startswith(f"{11 + a_shard} of {41 + a_shard} samples are bad (shard_empty 25.5%, image_empty 12.7%")
    text = summary.table
    assert "4 of 4 shards inspected" in text
    assert "filtered_size 2" in text
    assert max(map(len, text.splitlines())) < 200


def test_known_counts_say_what_is_lost(tmp_path):
    whole = tar_of(samples_of(0, 20))
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = inspect_unit(unit_of(tmp_path / "cut.tar", 20), CONFIG)
    assert cut.used + cut.rejected.total() == 20
    gone = unit_of(tmp_path / "cut.tar", 20)
    (tmp_path / "cut.tar").unlink()
    assert inspect_unit(gone, CONFIG).rejected == {"shard_missing": 20}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Statistics]:
    """Seven units with more samples than the contact sheet shows, and more rejects than are named."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(7):
        bad = [(f"bad{number}{i}.txt", b"no image") for i in range(number)]
        (folder / f"{number}.tar").write_bytes(tar_of([*samples_of(100 * number, 10, size=6 + 2 * number), *bad]))
    found = [inspect_unit(unit_of(folder / f"{number}.tar"), CONFIG) for number in range(7)]
    return [untimed(each) for each in found]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_result_does_not_depend_on_who_read_what(parts, data):
    order = data.draw(st.permutations(range(7)))
    workers = [data.draw(st.integers(0, 2)) for _ in order]
    own = [merged(parts[i] for i, worker in zip(order, workers, strict=True) if worker == number) for number in range(3)]
    expected = merged(parts)
    assert merged(own) == expected
    assert len(expected.thumbnails) == THUMBNAILS == min(THUMBNAILS, expected.used)


def test_a_tar_in_parts_counts_as_the_whole_one(tmp_path):
    path = tmp_path / "large.tar"
    path.write_bytes(tar_of(samples_of(0, 40)))
    whole = unit_of(path)
    border = whole.stop // 2 // 512 * 512
    halves = [ShardRange(whole.shard, 0, border), ShardRange(whole.shard, border, whole.stop)]
    one, two = untimed(inspect_unit(whole, CONFIG)), untimed(merged(inspect_unit(half, CONFIG) for half in halves))
    assert (two.units, two.readable_units, two.used) == (2, 2, 40)
    assert dataclasses.replace(two, units=1, readable_units=1) == one


def test_sizes_are_those_that_are_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    members = [("turned.jpg", picture(40, 100, "JPEG", exif=exif)), ("turned.txt", b"a"), ("b.webp", picture(12, 30, "WEBP"))]
    (tmp_path / "a.tar").write_bytes(tar_of([*members, ("b.txt", b"b")]))
    config = dataclasses.replace(CONFIG, aspect_ratios=(0.5, 1, 2), image_size=32, size_step=16)
    found = inspect_unit(unit_of(tmp_path / "a.tar"), config)
    assert {thumbnail.key: thumbnail.size for thumbnail in found.thumbnails} == {"a.tar/turned": (40, 100), "a.tar/b": (30, 12)}
    assert found.shapes == {(48, 16): 1, (16, 48): 1}
    assert found.upscaled == 1
    assert found.histograms["aspect_ratio"].least == 0.4
    for thumbnail in found.thumbnails:
        with Image.open(io.BytesIO(thumbnail.jpeg)) as shown:
            assert shown.size == ((16, 48) if thumbnail.key == "a.tar/turned" else (48, 16))


def test_precomputed_shards_have_counts_and_captions(tmp_path):
    tensors = {"latent": np.zeros((3, 4, 2, 2), np.float16)}
    (tmp_path / "0.arrow").write_bytes(to_arrow(["k0", "k1", "k2"], ["a", "b c", "<i>d</i>"], tensors))
    (tmp_path / "1.arrow").write_bytes(b"no arrow")
    manifest = {"encoders": {}, "settings": {}, "complete": True, "shards": {"0.arrow": 3, "1.arrow": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    catalog = build_catalog(DataConfig(sources=(str(tmp_path),)))
    found = merged(inspect_unit(unit, CONFIG) for unit in catalog.pools[0])
    assert (found.used, found.rejected, found.shapes) == (3, {"shard_unreadable": 2}, {})
    assert sum(found.histograms["caption_words"].counts) == 3
    assert not any(found.histograms["width"].counts)
    html = inspection_page(summarize(catalog, CONFIG, found, 1), found.thumbnails, CONFIG)
    assert "<img" not in html
    assert "&lt;i&gt;d&lt;/i&gt;" in html


def test_the_page_takes_nothing_of_the_web_for_markup(tmp_path):
    evil = "<script>alert(1)</script> \"'><img src=x onerror=alert(1)>"
    members = [("a.png", png(1)), ("a.txt", evil.encode()), ('b"><img src=x>.txt', b"no image")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    config = dataclasses.replace(CONFIG, sources=(f"s3://{evil}",))
    found = inspect_unit(unit_of(tmp_path / "a.tar"), config)
    assert (found.used, found.rejected) == (1, {"image_missing": 1})
    html = inspection_page(summary_of(found, [unit_of(tmp_path / "a.tar")], config), found.thumbnails, config)
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # title, head, caption and what a pointer shows
    assert html.count("<img ") == html.count('<img alt="" src="data:image/jpeg;base64,') == 1
    assert "http" not in html


def test_ray_reads_all_units_and_survives_what_goes_wrong(ray_cluster, mixture, tmp_path, caplog):
    (tmp_path / "grown.tar").write_bytes(tar_of(samples_of(0, 2)))
    grown = unit_of(tmp_path / "grown.tar")
    grown = ShardRange(grown.shard._replace(size=grown.stop - 512), 0, grown.stop - 512)
    gone = ShardRange(Shard(str(tmp_path / "gone.tar"), 99, "gone.tar"), 0, 99)
    nonsense = ShardRange(Shard(None, 99, "nonsense.tar", 7), 0, 99)  # type: ignore[arg-type]
    found = merged(inspect_units([*mixture, grown, gone, nonsense], CONFIG))
    assert (found.units, found.used) == (7, 30)
    assert found.lost_units == {"shard_empty": 1, "shard_missing": 1, SHARD_CHANGED: 1}
    assert found.rejected[SHARD_CRASHES] == 7
    assert "its reader failed" in caplog.text
    alone = merged(inspect_unit(unit, CONFIG) for unit in [*mixture, grown, gone])
    assert (found.histograms, found.thumbnails) == (alone.histograms, alone.thumbnails)


def test_units_are_spread_over_every_pool():
    pools = tuple(tuple(ShardRange(Shard(f"{p}{i}", 1, f"{p}{i:03}"), 0, 1) for i in range(n)) for p, n in (("a", 100), ("b", 3)))
    catalog = Catalog(tuple(unit.shard for pool in pools for unit in pool), pools, (0.5, 0.5))
    chosen = [unit.shard.name for unit in spread_units(catalog, 10)]
    assert chosen == [unit.shard.name for unit in spread_units(catalog, 10)]
    assert [name[:2] for name in chosen[:-1]] == sorted(name[:2] for name in chosen[:-1])
    assert len(set(chosen)) == len(chosen) == 10
    assert chosen[-1].startswith("b")
    assert len(spread_units(catalog, 0)) == len(spread_units(catalog, 200)) == 103


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_stay_within_the_bin_of_the_true_one(values, share):
    edges = (0, 10, 100, 1000)
    histogram = Histogram(edges, [0] * 4)
    for value in values:
        histogram.add(value)
    true = sorted(values)[max(0, int(np.ceil(share * len(values))) - 1)]
    begin = max(edge for edge in edges if edge <= true)
    end = next((edge for edge in edges if edge > true), max(values))
    assert begin <= histogram.quantile(share) <= end


def test_nothing_usable_is_a_verdict_even_where_nothing_is_bad(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of(samples_of(0, 3, size=8)))
    unit = unit_of(tmp_path / "a.tar")
    line = summary_of(inspect_unit(unit, CONFIG), [unit]).verdict
    assert line.startswith("none of the 3 inspected samples can be used (3 × filtered_size)")
