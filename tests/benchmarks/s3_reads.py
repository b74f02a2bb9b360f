"""Whole shards from S3 by s3fs and by pyarrow: `PYTHONPATH=platform:. python tests/benchmarks/s3_reads.py`.

seaweedfs on loopback, one reader, interleaved. Megabytes a second of the clock, and seconds of this process's CPU a gigabyte:
reads share their cores with decoding. The last line is one JSON object.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import fsspec

from ray_platform import storage
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

SIZE, FILES, ROUNDS = 100 * 2**20, 3, 7


def by_s3fs(path: str) -> int:
    client = {"config_kwargs": {"s3": {"addressing_style": "path"}}, "client_kwargs": {"region_name": "us-east-1"}}
    filesystem = fsspec.filesystem(
        "s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False, **client
    )
    return len(filesystem.cat_file(path))


def by_storage(path: str) -> int:
    """What the platform does: pyarrow."""
    return len(storage.read_bytes(f"s3://{path}"))


def main() -> None:
    readers = {"s3fs": by_s3fs, "pyarrow": by_storage}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    cpus: dict[str, list[float]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        try:
            server.start()
            os.environ |= server.environment
            for number in range(FILES):
                storage.write_bytes(f"s3://tests/{number}.tar", os.urandom(SIZE))
            for turn in range(ROUNDS + 1):
                for name, read in readers.items():
                    clock, cpu = time.perf_counter(), time.process_time()
                    total = sum(read(f"tests/{number}.tar") for number in range(FILES))
                    if turn:
                        rates[name].append(total / 2**20 / (time.perf_counter() - clock))
                        cpus[name].append((time.process_time() - cpu) / total * 2**30)
        finally:
            server.stop()
    result = {"mb_per_second": {n: round(statistics.median(v)) for n, v in rates.items()}}
    result["cpu_seconds_a_gigabyte"] = {n: round(statistics.median(v), 2) for n, v in cpus.items()}
    result["ratio_s3fs_to_pyarrow"] = round(result["mb_per_second"]["s3fs"] / result["mb_per_second"]["pyarrow"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
