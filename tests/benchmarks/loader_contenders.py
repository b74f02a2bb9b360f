"""Read the benchmark's shards with one of the loaders, in a separate process that `loader.py` controls.

For every line `COUNT` on standard input, the process discards prefetched images, times COUNT images and prints images per second.
Each contender imports only the libraries it needs, so that peers can run in other environments.
"""

import io
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, BATCH, WORKERS = 256, 64, 2


def pillow(content: bytes) -> np.ndarray:
    """Return the reference for the `exact` decoder: Pillow's full decode and bicubic resize of the central square."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def webdataset(folder: str) -> Iterator[int]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    data = (
        wds.WebDataset(shards, shardshuffle=len(shards), seed=0, workersplitter=wds.split_by_worker)
        .repeat()
        .to_tuple("jpg", "txt")
        .map_tuple(pillow, bytes.decode)
        .batched(BATCH, collation_fn=lambda rows: (np.stack([image for image, _ in rows]), [text for _, text in rows]))
    )
    for images, _ in DataLoader(data, batch_size=None, num_workers=WORKERS):
        yield len(images)


def mds(folder: str) -> Iterator[int]:
    """Read a mosaicml-streaming dataset whose samples are decoded in the same way as the other contenders'."""
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    out = f"{folder}/mds"
    if not os.path.exists(f"{out}/index.json"):
        with MDSWriter(out=out, columns={"jpg": "bytes", "txt": "str"}) as writer:
            for shard in sorted(Path(folder).glob("*.tar")):
                with tarfile.open(shard) as tar:
                    contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
                for name in contents:
                    if name.endswith(".jpg"):
                        writer.write({"jpg": contents[name], "txt": contents[name[:-3] + "txt"].decode()})

    class Decoded(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return pillow(sample["jpg"]), sample["txt"]

    data = Decoded(local=out, shuffle=True, batch_size=BATCH)
    loader = DataLoader(
        data, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True, drop_last=True,
        collate_fn=lambda rows: (np.stack([image for image, _ in rows]), [text for _, text in rows]),
    )  # fmt: skip
    while True:
        for images, _ in loader:
            yield len(images)


def ray_platform(folder: str, decoder: str) -> Iterator[int]:
    """Read a rank's stream in this process, with reads as Ray tasks on one core each."""
    import ray

    from ray_platform.data.catalog import build_catalog
    from ray_platform.data.config import DataConfig
    from ray_platform.data.ledger import Ledger
    from ray_platform.data.plan import Reader
    from ray_platform.data.stream import stream

    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "PYTHONPATH"}
    ray.init(
        address="local", num_cpus=WORKERS, include_dashboard=False, object_store_memory=2**30, log_to_driver=False,
        logging_level="ERROR", runtime_env={"env_vars": variables},
    )  # fmt: skip
    source = f"{folder}/*.tar"
    config = DataConfig(sources=(source,), image_size=SIZE, decoder=decoder, reads_per_rank=WORKERS, cpus_per_read=1.0)  # type: ignore[arg-type]
    catalog = build_catalog(config)
    empty = Ledger(catalog.num_units)
    for batch in stream(catalog, config, Reader(0, 0, 1, empty, empty.copy()), batch_size=BATCH, num_batches=10**9):
        yield len(batch.captions)


def decode_limit(folder: str) -> Iterator[int]:
    """Run only the platform's `exact` decoder on all cores, from bytes in memory; the pixels are discarded."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(WORKERS, _load, (folder,)) as pool:
        while True:
            yield from pool.imap_unordered(_decode, range(64), chunksize=1)


_contents: list[bytes] = []


def _load(folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    with tarfile.open(sorted(Path(folder).glob("*.tar"))[0]) as tar:
        _contents.extend(tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg"))  # type: ignore[union-attr]


def _decode(_: int) -> int:
    from ray_platform.data.config import DataConfig
    from ray_platform.data.decode import image

    config = DataConfig(image_size=SIZE)
    for content in _contents[:BATCH]:
        image({"jpg": memoryview(content)}, config, "")
    _contents[:] = _contents[BATCH:] + _contents[:BATCH]
    return BATCH


def _take(images: Iterator[int], count: int) -> int:
    taken = 0
    while taken < count:
        taken += next(images)
    return taken


def main() -> None:
    name, folder, discard = sys.argv[1], sys.argv[2], int(sys.argv[3])
    kind, _, decoder = name.partition(":")
    contenders = {"webdataset": webdataset, "mds": mds, "decode_limit": decode_limit}
    images = ray_platform(folder, decoder) if kind == "ray" else contenders[kind](folder)
    for _ in range(3):
        next(images)
    print("ready", flush=True)
    for line in sys.stdin:
        _take(images, discard)
        begun = time.perf_counter()
        count = _take(images, int(line))
        print(count / (time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main()
