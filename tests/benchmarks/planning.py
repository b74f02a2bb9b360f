"""The plan and the ledger at LAION-400M's size: 41,000 shards of 10,000 samples, 1,024 ranks; or any other.

    PYTHONPATH=platform python tests/benchmarks/planning.py [--shards 41000 --samples 10000 --ranks 1024]

Every rank plans for itself, so the figures are one rank's. `plan` is the time to a rank's first group and to all of its
groups of an epoch; `checkpoint` takes up what all ranks consumed since the last one and writes the ledger; `resume` reads it and
plans again, on one rank fewer. The last line is one JSON object.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any

from ray_platform.contracts import ConsumedRange
from ray_platform.data.catalog import Catalog, Shard, ShardRange
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Group, Reader, groups

READS, INTERLEAVE = 2, 2


def measured(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds, peak megabytes); twice, since watching the memory takes time."""
    begun = time.perf_counter()
    work()
    seconds = time.perf_counter() - begun
    tracemalloc.start()
    result = work()
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return result, round(seconds, 3), round(peak, 1)


def catalog_of(shards: int, samples: int) -> Catalog:
    made = tuple(Shard(f"s3://laion/part/{i:07d}.tar", samples * 40_000, f"{i:07d}.tar", samples) for i in range(shards))
    return Catalog(made, (tuple(ShardRange(shard, 0, shard.size) for shard in made),), (1.0,))


def marks_in_mid_epoch(catalog: Catalog, ranks: int, samples: int, base: Ledger) -> list[list[ConsumedRange]]:
    """Every rank has read half of an epoch: its shards whole, and its open window's to 37 %, in ranges out of order."""
    windows = max(1, len(catalog.shards) // ranks // (READS * INTERLEAVE) // 2)
    order = [item.number for group in _all(catalog, base) for item in group.items]
    whole = order[: windows * READS * INTERLEAVE * ranks]
    open_now = order[len(whole) : len(whole) + READS * INTERLEAVE * ranks]
    marks = [[ConsumedRange(0, 0, number, 0, samples, samples)] for number in whole]
    # Buckets leave holes: samples of a rare shape wait for their batch.
    holes = [(0, 1200), (1201, 3000), (3002, 3700)]
    marks += [[ConsumedRange(0, 0, n, a, b, samples) for a, b in holes] for n in open_now]
    return marks


def _all(catalog: Catalog, base: Ledger) -> Iterator[Group]:
    """One rank that reads everything, for an epoch."""
    return takewhile(lambda g: g.items[0].epoch == 0, groups(catalog, Reader(0, 0, 1, base, base), INTERLEAVE, READS))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=41_000)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=1024)
    a = parser.parse_args()
    catalog = catalog_of(a.shards, a.samples)
    base = Ledger(catalog.num_units)

    def plan(reader: Reader) -> int:
        epoch = takewhile(lambda g: g.items[0].epoch == 0, groups(catalog, reader, INTERLEAVE, READS))
        return sum(len(g.items) for g in epoch)

    items, plan_s, plan_mb = measured(lambda: plan(Reader(0, 7, a.ranks, base, base.copy())))
    marks = marks_in_mid_epoch(catalog, a.ranks, a.samples, base)

    def checkpoint() -> bytes:
        consumed = base.copy()
        for part in marks:
            consumed.add(part)
        return consumed.to_bytes()

    written, checkpoint_s, checkpoint_mb = measured(checkpoint)

    def resume() -> int:
        consumed = Ledger.from_bytes(written)
        return plan(Reader(0, 7, a.ranks - 1, consumed, consumed.copy()))

    left, resume_s, resume_mb = measured(resume)
    print(
        json.dumps(
            {
                "shards": a.shards, "samples": a.shards * a.samples, "ranks": a.ranks, "shards_of_a_rank": items,
                "shards_left_to_a_rank": left,
                "plan_seconds": plan_s, "plan_mb": plan_mb,
                "checkpoint_seconds": checkpoint_s, "checkpoint_mb": checkpoint_mb, "ledger_bytes": len(written),
                "resume_seconds": resume_s, "resume_mb": resume_mb,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
