"""Our stream from S3 and from precomputed shards, against local tars; and its memory over 1 x and 10 x the data.

    PYTHONPATH=platform:. python tests/benchmarks/storage_and_memory.py [--rounds 5]

S3 is seaweedfs on loopback, on the same cores. Precomputed samples have Stable Diffusion v1's sizes at 256 px (latent,
77 x 768 token states, query: 128 kB). The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from loader import ROOT, Contender, compare
from loader_data import build

from ray_platform.data.precomputed import to_arrow
from tests.support.s3_server import S3Server

SHAPES = {"latent": (4, 32, 32), "token_states": (77, 768), "query": (768,)}
PRECOMPUTED_SHARDS, SHARD_SAMPLES = 16, 500


def build_precomputed(folder: Path) -> Path:
    marker = folder / "manifest.json"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for shard in range(PRECOMPUTED_SHARDS):
            keys = [f"{shard:05d}.tar/{i:04d}" for i in range(SHARD_SAMPLES)]
            tensors = {n: rng.standard_normal((SHARD_SAMPLES, *s), np.float32).astype(np.float16) for n, s in SHAPES.items()}
            captions = [f"a photograph of nothing, number {i}" for i in range(SHARD_SAMPLES)]
            (folder / f"{shard:05d}.arrow").write_bytes(to_arrow(keys, captions, tensors))
        shards = {f"{shard:05d}.arrow": SHARD_SAMPLES for shard in range(PRECOMPUTED_SHARDS)}
        marker.write_text(json.dumps({"encoders": {}, "settings": {}, "complete": True, "shards": shards}))
    return folder


def memory(folder: Path, copies: int) -> dict[str, float]:
    """Peak megabytes of one pass over `copies` times the data, in a process and a Ray of its own."""
    command = [sys.executable, str(Path(__file__).with_name("memory_of_a_pass.py")), str(folder), str(copies)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = ROOT / "data/benchmarks/loader"
    build(folder)
    precomputed = build_precomputed(ROOT / "data/benchmarks/precomputed")
    with ExitStack() as stack:
        server = S3Server(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(server.stop)
        server.start()
        upload(folder, server)
        contenders = {
            "local": Contender("ray:exact", folder),
            "s3": Contender("ray:exact", "s3://tests/loader", **server.environment),
            "precomputed": Contender("ray:exact:arrow", precomputed),
        }
        for contender in contenders.values():
            stack.callback(contender.close)
        speeds = compare(contenders, arguments.rounds)
    once, tenfold = memory(folder, 1), memory(folder, 10)
    result = {
        "images_per_second": speeds,
        "ratio_s3_to_local": round(speeds["s3"] / speeds["local"], 3),
        "ratio_precomputed_to_exact": round(speeds["precomputed"] / speeds["local"], 2),
        "peak_mb_1x": once,
        "peak_mb_10x": tenfold,
        "ratio_memory": {name: round(tenfold[name] / once[name], 3) for name in ("processes", "object_store")},
    }
    print(json.dumps(result))


def upload(folder: Path, server: S3Server) -> None:
    import fsspec

    s3 = fsspec.filesystem(
        "s3", key=server.environment["AWS_ACCESS_KEY_ID"], secret=server.environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=server.endpoint, client_kwargs={"region_name": "us-east-1"},
        config_kwargs={"s3": {"addressing_style": "path"}},
    )  # fmt: skip
    for shard in sorted(folder.glob("*.tar")):
        s3.put_file(str(shard), f"tests/loader/{shard.name}")


if __name__ == "__main__":
    main()
