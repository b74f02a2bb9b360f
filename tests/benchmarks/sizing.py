"""Measure the CPU time of decoding by image size and of uploading a checkpoint to S3: constants of `diffdis sizing`.

    PYTHONPATH=platform:. python tests/benchmarks/sizing.py [--rounds 5]

Uses one process and CPU seconds, so that other load on the machine matters little; results are medians over rounds.
Decoding is fitted as seconds = a + b * megapixels of the file, as in `diffdis_platform.sizing.estimate`, relative to the images
of the loader benchmark. The last line is one JSON object.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ray_platform import storage
from ray_platform.data.config import DataConfig
from ray_platform.data.decode import image
from tests.benchmarks.loader_data import photo_like
from tests.benchmarks.measuring import in_turns, medians
from tests.support.s3_server import S3Server

SIDES = ((256, 256), (384, 256), (512, 256), (384, 512), (512, 512), (1024, 512))  # sizes of the JPEG and of the target
IMAGES = 24
UPLOAD_BYTES, UPLOADS = 256 * 2**20, 3


def jpegs(side: int) -> list[bytes]:
    rng, found = np.random.default_rng(side), []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(photo_like(rng, side, side)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def decoding(contents: list[bytes], target: int) -> float:
    """Return CPU seconds per image."""
    config = DataConfig(image_size=target)
    begun = time.process_time()
    for content in contents:
        image({"jpg": memoryview(content)}, config, "")
    return (time.process_time() - begun) / len(contents)


def upload() -> tuple[float, float]:
    """Return (bytes per second, CPU seconds of this process per gigabyte) of one writer, with seaweedfs on the same cores."""
    rates, cpus = [], []
    with tempfile.TemporaryDirectory() as folder:
        server = S3Server(Path(folder))
        try:
            server.start()
            os.environ |= server.environment
            data = os.urandom(UPLOAD_BYTES)
            for number in range(UPLOADS):
                clock, cpu = time.perf_counter(), time.process_time()
                storage.write_bytes(f"s3://tests/{number}.safetensors", data)
                rates.append(UPLOAD_BYTES / (time.perf_counter() - clock))
                cpus.append((time.process_time() - cpu) / UPLOAD_BYTES * 1e9)
        finally:
            server.stop()
    return statistics.median(rates), statistics.median(cpus)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    contents = {side: jpegs(side) for side, _ in SIDES}
    calls = {f"{side} to {target}": partial(decoding, contents[side], target) for side, target in SIDES}
    seconds = dict(zip(SIDES, medians(in_turns(calls, arguments.rounds), 6).values(), strict=True))
    megapixels = [(side / 1000) ** 2 for side, _ in seconds]
    rate, cpu = upload()
    result = {
        "cpu_ms_an_image": {f"{side} to {target}": round(1e3 * value, 3) for (side, target), value in seconds.items()},
        "mean_kb": {str(side): round(statistics.mean(map(len, c)) / 1e3, 1) for side, c in contents.items()},
        "decode_ms_a_b": [round(1e3 * float(x), 3) for x in np.polyfit(megapixels, list(seconds.values()), 1)[::-1]],
        "upload_mb_per_second": round(rate / 1e6),
        "upload_cpu_seconds_per_gigabyte": round(cpu, 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
