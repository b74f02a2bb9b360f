"""An inspection counts exactly, regardless of which worker reads which shard and of the shard's content."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_platform.contracts import DataError
from ray_platform.data.catalog import Catalog, Shard, ShardRange, build_catalog
from ray_platform.data.causes import SHARD_CHANGED, SHARD_CRASHES
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.inspection import (
    EXAMPLES,
    THUMBNAILS,
    Histogram,
    Statistics,
    inspect_first_samples,
    inspect_unit,
    inspect_units,
    spread_units,
)
from ray_platform.data.precomputed import to_arrow
from ray_platform.report.inspection import InspectionSummary, inspection_page, summarize
from tests.ray_platform.conftest import png, samples_of, tar_of
from tests.support.html_page import EVIL, check_poison_is_text
from tests.support.messages import check_message

CONFIG = DataConfig(image_size=16, retry_seconds=0, filters=FilterConfig(min_size=10))


def unit_of(path: Path, content: bytes | None = None, num_samples: int = -1) -> ShardRange:
    if content is not None:
        path.write_bytes(content)
    size = path.stat().st_size
    return ShardRange(Shard(str(path), size, path.name, num_samples), 0, size)


def summary_of(statistics: Statistics, units, config=CONFIG) -> InspectionSummary:
    return summarize(Catalog(tuple(unit.shard for unit in units), (tuple(units),), (1.0,)), config, statistics, cpus=2)


def merged(parts) -> Statistics:
    total = Statistics()
    for part in parts:
        total.merge(part)
    return total


def untimed(statistics: Statistics) -> Statistics:
    return dataclasses.replace(statistics, read_seconds=0.0, decode_seconds=0.0)


def encoded(height: int, width: int, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> list[ShardRange]:
    """30 good samples, 2 that are too small, and bad samples of many causes."""
    folder = tmp_path_factory.mktemp("mixture")
    mixed = [*samples_of(100, 10), *samples_of(200, 2, size=8), *[(f"empty{i}.png", b"") for i in range(7)]]
    mixed += [(f"empty{i}.txt", b"a") for i in range(7)]
    mixed += [("blank.png", png(1)), ("blank.txt", b"  "), ("broken.png", b"no png"), ("broken.txt", b"a"), ("alone.txt", b"a")]
    shards = {"good.tar": tar_of(samples_of(0, 20)), "mixed.tar": tar_of(mixed)}
    shards |= {"garbage.tar": b"garbage" * 400, "hollow.tar": tar_of([]), "cut.tar": tar_of(samples_of(0, 20))[:20_000]}
    return [unit_of(folder / name, content) for name, content in shards.items()]


def test_a_known_mixture_is_counted_exactly(mixture):
    counted = merged(inspect_unit(unit, CONFIG) for unit in mixture)
    assert (counted.units, counted.readable_units, counted.unusable_units) == (5, 3, 2)
    cut = counted.truncated_samples
    assert 1 < cut < 20
    assert (counted.used, counted.num_samples) == (30 + cut, 20 + 22 + cut + 1)
    assert counted.num_bytes == sum(unit.shard.size for unit in mixture)
    assert counted.rejected == {
        "filtered_size": 2, "image_empty": 7, "caption_empty": 1, "image_undecodable": 1, "image_missing": 1,
    }  # fmt: skip
    assert counted.lost_units == {"shard_empty": 1, "shard_not_a_tar": 1, "tar_truncated": 1}
    assert counted.examples["image_empty"] == [f"mixed.tar/empty{i}" for i in range(EXAMPLES)]
    assert counted.shapes == {(16, 16): 30 + cut}
    assert counted.histograms["width"].counts == [33 + cut, *[0] * 16]  # 30 used, 2 filtered, 1 without a caption
    words = counted.histograms["caption_words"]
    assert (sum(words.counts), words.minimum, words.maximum) == (30 + cut, 2, 2)
    # A lost shard counts as the mean number of samples in the whole ones, and the lost part of one for the rest.
    summary, lost = summary_of(counted, mixture), 21
    assert {cause: summary.rejects[cause].samples for cause in counted.lost_units} == {
        "shard_empty": lost, "shard_not_a_tar": lost, "tar_truncated": lost - cut
    }  # fmt: skip
    samples, bad = summary.samples, 10 + 3 * lost - cut
    assert (samples.used, samples.filtered, samples.bad) == (30 + cut, 2, bad)
    assert samples.bad_fraction == bad / (30 + cut + bad)
    assert summary.verdict.startswith(
        f"{bad} of {30 + cut + bad} samples are bad (shard_empty {lost / (30 + cut + bad):.1%}, shard_not"
    )
    assert "5 of 5 shards inspected" in summary.table
    assert "filtered_size 2" in summary.table
    assert max(map(len, summary.table.splitlines())) < 200


def test_known_counts_say_what_is_lost(tmp_path):
    whole = tar_of(samples_of(0, 20))
    unit = unit_of(tmp_path / "cut.tar", whole[: len(whole) // 2], 20)
    cut = inspect_unit(unit, CONFIG)
    assert cut.used + cut.rejected.total() == 20
    (tmp_path / "cut.tar").unlink()
    assert inspect_unit(unit, CONFIG).rejected == {"shard_missing": 20}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Statistics]:
    """Seven units with more samples than the contact sheet shows, and more rejects than are listed by name."""
    folder = tmp_path_factory.mktemp("parts")
    units = []
    for number in range(7):
        bad = [(f"bad{number}{i}.txt", b"no image") for i in range(number)]
        members = [*samples_of(100 * number, 10, size=6 + 2 * number), *bad]
        units.append(unit_of(folder / f"{number}.tar", tar_of(members)))
    return [untimed(inspect_unit(unit, CONFIG)) for unit in units]


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(7)), workers=st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_the_result_does_not_depend_on_who_read_what(parts, order, workers):
    by_worker = [merged(parts[i] for i, worker in zip(order, workers, strict=True) if worker == number) for number in range(3)]
    expected = merged(parts)
    assert merged(by_worker) == expected
    assert len(expected.thumbnails) == THUMBNAILS == min(THUMBNAILS, expected.used)


def test_a_tar_in_parts_counts_as_the_whole_one(tmp_path):
    whole = unit_of(tmp_path / "large.tar", tar_of(samples_of(0, 40)))
    border = whole.stop // 2 // 512 * 512
    halves = [ShardRange(whole.shard, 0, border), ShardRange(whole.shard, border, whole.stop)]
    one, two = untimed(inspect_unit(whole, CONFIG)), untimed(merged(inspect_unit(half, CONFIG) for half in halves))
    assert (two.units, two.readable_units, two.used) == (2, 2, 40)
    assert dataclasses.replace(two, units=1, readable_units=1) == one


def test_sizes_are_those_that_are_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    members = [("turned.jpg", encoded(40, 100, "JPEG", exif=exif)), ("turned.txt", b"a")]
    unit = unit_of(tmp_path / "a.tar", tar_of([*members, ("b.webp", encoded(12, 30, "WEBP")), ("b.txt", b"b")]))
    counted = inspect_unit(unit, dataclasses.replace(CONFIG, aspect_ratios=(0.5, 1, 2), image_size=32, size_step=16))
    assert {thumbnail.key: thumbnail.size for thumbnail in counted.thumbnails} == {"a.tar/turned": (40, 100), "a.tar/b": (30, 12)}
    assert counted.shapes == {(48, 16): 1, (16, 48): 1}
    assert counted.upscaled == 1
    assert counted.histograms["aspect_ratio"].minimum == 0.4
    for thumbnail in counted.thumbnails:
        with Image.open(io.BytesIO(thumbnail.jpeg)) as shown:
            assert shown.size == ((16, 48) if thumbnail.key == "a.tar/turned" else (48, 16))


def test_precomputed_shards_have_counts_and_captions(tmp_path):
    tensors = {"latent": np.zeros((3, 4, 2, 2), np.float16)}
    (tmp_path / "0.arrow").write_bytes(to_arrow(["k0", "k1", "k2"], ["a", "b c", "<i>d</i>"], tensors))
    (tmp_path / "1.arrow").write_bytes(b"no arrow")
    manifest = {"encoders": {}, "settings": {}, "complete": True, "shards": {"0.arrow": 3, "1.arrow": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    catalog = build_catalog(DataConfig(sources=(str(tmp_path),)))
    counted = merged(inspect_unit(unit, CONFIG) for unit in catalog.pools[0])
    assert (counted.used, counted.rejected, counted.shapes) == (3, {"shard_unreadable": 2}, {})
    assert sum(counted.histograms["caption_words"].counts) == 3
    assert not any(counted.histograms["width"].counts)
    html = inspection_page(summarize(catalog, CONFIG, counted, 1), counted.thumbnails, CONFIG)
    assert "<img" not in html
    assert "&lt;i&gt;d&lt;/i&gt;" in html


def test_the_page_takes_nothing_of_the_web_for_markup(tmp_path):
    members = [("a.png", png(1)), ("a.txt", EVIL.encode()), ('b"><img src=x>.txt', b"no image")]
    unit, config = unit_of(tmp_path / "a.tar", tar_of(members)), dataclasses.replace(CONFIG, sources=(f"s3://{EVIL}",))
    counted = inspect_unit(unit, config)
    assert (counted.used, counted.rejected) == (1, {"image_missing": 1})
    html = inspection_page(summary_of(counted, [unit], config), counted.thumbnails, config)
    assert check_poison_is_text(html, 4).count("img") == 1  # in the title, heading, caption and tooltip
    assert "http" not in html


def test_ray_reads_all_units_and_survives_what_goes_wrong(ray_cluster, mixture, tmp_path, caplog):
    grown = unit_of(tmp_path / "grown.tar", tar_of(samples_of(0, 2)))
    grown = ShardRange(grown.shard._replace(size=grown.stop - 512), 0, grown.stop - 512)
    gone = ShardRange(Shard(str(tmp_path / "gone.tar"), 99, "gone.tar"), 0, 99)
    nonsense = ShardRange(Shard(None, 99, "nonsense.tar", 7), 0, 99)  # type: ignore[arg-type]
    counted = merged(inspect_units([*mixture, grown, gone, nonsense], CONFIG))
    assert (counted.units, counted.used) == (8, 30 + counted.truncated_samples)
    assert counted.lost_units == {
        "shard_empty": 1, "shard_not_a_tar": 1, "tar_truncated": 1, "shard_missing": 1, SHARD_CHANGED: 1
    }  # fmt: skip
    assert counted.rejected[SHARD_CRASHES] == 7
    assert "its reader failed" in caplog.text
    alone = merged(inspect_unit(unit, CONFIG) for unit in [*mixture, grown, gone])
    assert (counted.histograms, counted.thumbnails) == (alone.histograms, alone.thumbnails)


def test_a_dry_run_tries_shards_all_over_the_source(tmp_path, caplog):
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(samples_of(number, 2)) if number < 4 else b"<html>")
    tried = inspect_first_samples(build_catalog(DataConfig(sources=(str(tmp_path),))), CONFIG, 8)
    assert (tried.num_shards, tried.good, tried.rejected) == (4, 4, {"shard_not_a_tar": 2})
    assert caplog.text.count("shard_not_a_tar") == 2
    pools = build_catalog(DataConfig(sources=(f"{tmp_path}/[0-3].tar", f"{tmp_path}/[4-7].tar"), weights=(1, 1)))
    with pytest.raises(
        DataError, match=r"\d.tar: no sample tried in this shard and 1 more can be used \(2 × shard_not_a_tar"
    ) as raised:
        inspect_first_samples(pools, CONFIG, 8)
    check_message("a dry run over shards that are HTML pages", raised.value, SOURCE=tmp_path)
    units = [unit for pool in pools.pools for unit in pool]
    verdict = summary_of(merged(inspect_unit(unit, CONFIG) for unit in units), units).verdict
    check_message("an inspection of 8 shards, 4 of which are HTML pages", verdict)


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
def test_quantiles_stay_within_the_bin_of_the_true_one(values, fraction):
    edges = [0, 10, 100, 1000]
    histogram = Histogram(edges, [0] * 4)
    for value in values:
        histogram.add(value)
    true = sorted(values)[max(0, int(np.ceil(fraction * len(values))) - 1)]
    end = next((edge for edge in edges if edge > true), max(values))
    assert max(edge for edge in edges if edge <= true) <= histogram.quantile(fraction) <= end


def test_nothing_usable_is_a_verdict_even_where_nothing_is_bad(tmp_path):
    unit = unit_of(tmp_path / "a.tar", tar_of(samples_of(0, 3, size=8)))
    line = summary_of(inspect_unit(unit, CONFIG), [unit]).verdict
    assert line.startswith("none of the 3 inspected samples can be used (3 × filtered_size)")
