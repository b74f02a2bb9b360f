"""Read entire shards from S3 with s3fs and with pyarrow: `PYTHONPATH=platform:. python tests/benchmarks/s3_reads.py`.

Uses seaweedfs on loopback and one reader; the contenders take turns. Reports megabytes per second and CPU seconds of this process
per gigabyte, because reads share their cores with decoding. The last line is one JSON object.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec

from ray_platform import storage
from tests.benchmarks.measuring import in_turns, medians
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

SIZE, FILES, ROUNDS = 100 * 2**20, 3, 7
URLS = [f"s3://tests/{number}.tar" for number in range(FILES)]


def by_s3fs(url: str) -> bytes:
    client = {"config_kwargs": {"s3": {"addressing_style": "path"}}, "client_kwargs": {"region_name": "us-east-1"}}
    filesystem = fsspec.filesystem(
        "s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=os.environ["AWS_ENDPOINT_URL"], use_listings_cache=False, **client
    )
    return filesystem.cat_file(url)


def main() -> None:
    cpu_seconds: dict[str, list[float]] = {"s3fs": [], "pyarrow": []}

    def megabytes_per_second(name: str, read: Callable[[str], bytes]) -> float:
        clock, cpu = time.perf_counter(), time.process_time()
        total = sum(len(read(url)) for url in URLS)
        cpu_seconds[name].append((time.process_time() - cpu) / total * 2**30)
        return total / 2**20 / (time.perf_counter() - clock)

    readers = {"s3fs": by_s3fs, "pyarrow": storage.read_bytes}  # the platform reads with pyarrow
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        try:
            server.start()
            os.environ |= server.environment
            for url in URLS:
                storage.write_bytes(url, os.urandom(SIZE))
            rates = in_turns({name: partial(megabytes_per_second, name, read) for name, read in readers.items()}, ROUNDS)
        finally:
            server.stop()
    speeds = medians(rates, 0)
    result = {"mb_per_second": speeds, "cpu_seconds_per_gigabyte": medians({n: v[1:] for n, v in cpu_seconds.items()})}
    print(json.dumps(result | {"ratio_s3fs_to_pyarrow": round(speeds["s3fs"] / speeds["pyarrow"], 2)}))


if __name__ == "__main__":
    main()
