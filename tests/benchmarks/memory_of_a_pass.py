"""One pass of our stream over COPIES times the shards in FOLDER, and its peak memory: `memory_of_a_pass.py FOLDER COPIES`.

`processes`: the sum, over this process and all of Ray's below it, of the memory that is each one's own (USS, megabytes).
`object_store`: what Ray says that it holds. One JSON line.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream
from ray_platform.ray_internals import spilled_bytes


def watch(peaks: dict[str, float], done: threading.Event) -> None:
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    while not done.wait(0.25):
        own = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                own += process.memory_full_info().uss
            except psutil.Error:
                continue
        used = get_memory_info_reply(state).store_stats.object_store_bytes_used
        for name, value in (("processes", own), ("object_store", used)):
            peaks[name] = max(peaks.get(name, 0.0), round(value / 2**20, 1))


def main() -> None:
    folder, copies = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        for copy in range(copies):
            (Path(scratch) / f"{copy:02d}").symlink_to(folder.resolve())
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**30, log_to_driver=False)
        config = DataConfig(sources=tuple(f"{scratch}/{copy:02d}" for copy in range(copies)), cpus_per_read=1.0)
        catalog = build_catalog(config)
        nothing, peaks, done = Ledger(catalog.num_units), {}, threading.Event()
        watcher = threading.Thread(target=watch, args=(peaks, done))
        watcher.start()
        count, begun = 1000 * len(catalog.shards) // 64, time.perf_counter()
        for _ in stream(catalog, config, Reader(0, 0, 1, nothing, nothing.copy()), batch_size=64, num_batches=count):
            pass
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
        print(json.dumps(peaks | {"spilled": spilled_bytes() / 2**20, "images": count * 64, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
