"""Hostile model folders, and sets to evaluate on, by what opens them."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.io
import torch

from diffdis.autoencoder import build_autoencoder
from diffdis.clip_scorer import ClipScorer
from diffdis.config import AutoencoderConfig, TextEncoderConfig, tiny
from diffdis.model import DiffDis
from diffdis.pipeline import DiffDisPipeline
from diffdis.text_encoder import build_text_encoder
from diffdis.warm_start import load_warm_start
from diffdis_platform.evaluation.quality import ReferenceFeatures
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.precomputed import to_arrow
from ray_platform.data.source import open_precomputed
from ray_platform.evaluate.discovery import find_evaluation_set
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.sets import read_slice
from tests.ray_platform.conftest import png, tar_of
from tests.safety.cases import CANARY, Case, Evil, line_of
from tests.support.tiny_checkpoints import save_clip, save_mean_pool_encoder, save_stable_diffusion

ENCODER, CLIP, START, MODEL = "`model.text_encoder.path`", "`baselines`", "`model.warm_start`", "`jobs/generate.py --model`"


def changed(save: Callable[[Path], Path], change: Callable[[Path], None], opened: Callable[[Path], object]):
    def feed(folder: Path) -> str:
        made = save(folder / "model")
        change(made)
        return line_of(lambda: opened(made), ValueError, FileNotFoundError)

    return feed


def encoder(folder: Path) -> object:
    return build_text_encoder(TextEncoderConfig("mean_pool", str(folder), max_length=8, token_dim=32, embedding_dim=32))


def start(folder: Path) -> object:
    return load_warm_start(DiffDis(tiny()), str(folder))


def vae(folder: Path) -> object:
    return build_autoencoder(AutoencoderConfig("kl", str(folder)))


def pickled(name: str, inside: str = "") -> Callable[[Path], None]:
    """The weights as torch saved them for years, with a command among them."""

    def change(folder: Path) -> None:
        folder = folder / inside
        for file in folder.glob("*.safetensors"):
            file.unlink()
        torch.save({"x": Evil(folder.parent if not inside else folder.parent.parent)}, folder / name)

    return change


def setting(name: str = "config.json", **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / CANARY)!r}, 'w')\nclass Model: pass\n")
    setting(auto_map={"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}, model_type="evil")(folder)


def export_of(folder: Path) -> Path:
    encoder_folder = save_mean_pool_encoder(folder.parent / "encoder")
    import dataclasses

    config = dataclasses.replace(tiny(), text_encoder=dataclasses.replace(tiny().text_encoder, path=str(encoder_folder)))
    torch.manual_seed(0)
    DiffDisPipeline(
        config, DiffDis(config), build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder)
    ).save_pretrained(folder)
    return folder


def cut(folder: Path) -> None:
    file = folder / "alignment" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


MODELS = [
    Case(
        "a pickle that runs a command for a text encoder's weights",
        ENCODER,
        "pytorch_model.bin…safetensors",
        changed(save_mean_pool_encoder, pickled("pytorch_model.bin"), encoder),
    ),
    Case(
        "the same for a CLIP's",
        CLIP,
        "pytorch_model.bin…safetensors",
        changed(save_clip, pickled("pytorch_model.bin"), ClipScorer),
    ),
    Case(
        "the same for a U-Net's",
        START,
        "unet…diffusion_pytorch_model.bin…safetensors",
        changed(save_stable_diffusion, pickled("diffusion_pytorch_model.bin", "unet"), start),
    ),
    Case(
        "the same for an autoencoder's",
        "`model.autoencoder.path`",
        "vae…diffusion_pytorch_model.bin…safetensors",
        changed(save_stable_diffusion, pickled("diffusion_pytorch_model.bin", "vae"), vae),
    ),
    Case(
        "Python code beside the weights, named by `auto_map`",
        ENCODER,
        "config.json…auto_map",
        changed(save_mean_pool_encoder, own_code, encoder),
    ),
    Case(
        "an attention implementation that is a hub's repository of compiled kernels",
        ENCODER,
        "config.json…_attn_implementation…evil/kernels",
        changed(save_mean_pool_encoder, setting(_attn_implementation="evil/kernels"), encoder),
    ),
    Case(
        "an adapter that names another model to fetch",
        ENCODER,
        "adapter_config.json",
        changed(save_mean_pool_encoder, lambda folder: (folder / "adapter_config.json").write_text("{}"), encoder),
    ),
    Case(
        "a text encoder of a million layers",
        ENCODER,
        "config.json…num_hidden_layers",
        changed(save_mean_pool_encoder, setting(num_hidden_layers=10**6), encoder),
    ),
    Case(
        "a `config.json` of 100 MB",
        ENCODER,
        "config.json…1,048,576 bytes",
        changed(save_mean_pool_encoder, setting(x="x" * 10**8), encoder),
    ),
    Case(
        "a U-Net of 100,000 channels",
        START,
        "unet…parameters…bytes",
        changed(save_stable_diffusion, lambda f: setting("unet/config.json", block_out_channels=[100_000, 100_000])(f), start),
    ),
    Case(
        "an exported model that declares 100,000 channels",
        MODEL,
        "model…parameters…bytes",
        changed(
            export_of,
            lambda f: setting(
                "diffdis.json",
                unet=json.loads((f / "diffdis.json").read_text())["unet"] | {"block_out_channels": [100_000, 100_000]},
            )(f),
            DiffDisPipeline.from_pretrained,
        ),
    ),
    Case(
        "an exported model whose tensors are cut off",
        MODEL,
        "model…weights",
        changed(export_of, cut, DiffDisPipeline.from_pretrained),
    ),
    Case(
        "an exported model with a field that there is not",
        MODEL,
        "evil",
        changed(export_of, setting("diffdis.json", evil=1), DiffDisPipeline.from_pretrained),
    ),
]

SETS_DOOR = "`jobs/eval.py --data_roots`"


def read_all(root: Path, name: str) -> str:
    def read() -> str:
        samples = [sample for part in find_evaluation_set([str(root)], name).slices for sample in read_slice(part)]
        causes = [sample.cause for sample in samples if hasattr(sample, "cause")]
        return ", ".join([f"{len(samples) - len(causes)} images", *(f"1 × {cause}" for cause in causes)])

    return line_of(read, ConfigError, DataError)


def cifar(content: Callable[[Path], bytes]):
    def feed(folder: Path) -> str:
        (folder / "cifar-10-batches-py").mkdir()
        names = {"label_names": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]}
        (folder / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
        (folder / "cifar-10-batches-py" / "test_batch").write_bytes(content(folder))
        return read_all(folder, "vtab/cifar10")

    return feed


def pointers(folder: Path) -> bytes:
    """numpy.ndarray((2,), dtype=object, buffer=…): bytes that would be followed as pointers."""
    out = b"\x80\x02cnumpy\nndarray\n(K\x02\x85cnumpy\ndtype\nX\x01\x00\x00\x00O\x85RC\x10" + b"A" * 16 + b"tR."
    return b"\x80\x02}X\x04\x00\x00\x00data" + out[2:-1] + b"s."


def cars(folder: Path) -> str:
    """An index that names a file of this machine as a picture."""
    (folder / "cars" / "devkit").mkdir(parents=True)
    (folder / "cars" / "cars_test").mkdir()
    names = np.array([f"Car {i}" for i in range(196)], dtype=object)
    scipy.io.savemat(folder / "cars" / "devkit" / "cars_meta.mat", {"class_names": names})
    annotations = np.array([("../../outside/secret.png", 1), ("b.jpg", 2)], dtype=[("fname", object), ("class", int)])
    scipy.io.savemat(folder / "cars" / "cars_test_annos_withlabels.mat", {"annotations": annotations})
    return read_all(folder, "cars")


def own_set(folder: Path, **texts: bytes) -> str:
    (folder / "wds_mine" / "test").mkdir(parents=True)
    files = {"classnames.txt": b"cat\ndog", "zeroshot_classification_templates.txt": b"{c}"} | texts
    for name, content in files.items():
        (folder / "wds_mine" / name).write_bytes(content)
    (folder / "wds_mine" / "test" / "0.tar").write_bytes(tar_of([("a.png", png(1)), ("a.cls", b"1")]))
    return read_all(folder, "mine")


def parquet(content: bytes):
    def feed(folder: Path) -> str:
        (folder / "mine").mkdir()
        (folder / "mine" / "test.parquet").write_bytes(content)
        return read_all(folder, "mine")

    return feed


def units(content: bytes):
    def feed(folder: Path) -> str:
        (folder / f"{'a' * 32}.npz").write_bytes(content)
        return f"{len(ResultCache(str(folder)).read(['a' * 32]))} of 1 unit taken as done"

    return feed


def reference(content: Callable[[Path], bytes]):
    def feed(folder: Path) -> str:
        (folder / "reference.npz").write_bytes(content(folder))
        return line_of(lambda: ReferenceFeatures.read(str(folder / "reference.npz")), DataError)

    return feed


def arrays(compressed: bool = False, **values: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, allow_pickle=True, **values)
    return buffer.getvalue()


def npy_of(shape: str) -> bytes:
    """An .npz whose array says that it is so large."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    return buffer.getvalue()


def offsets(folder: Path) -> str:
    """A precomputed shard, an offset of whose captions points far out of the file."""
    content = bytearray(to_arrow(["key"] * 3, ["caption"] * 3, {"latent": np.zeros((3, 2), dtype=np.float16)}))
    at = content.find(np.array([0, 7, 14, 21], dtype=np.int32).tobytes())
    content[at + 4 : at + 8] = (2**31 - 5).to_bytes(4, "little")
    unit = open_precomputed(pa.py_buffer(bytes(content)), "0.arrow/")
    return f"0 used, {len(unit)} × {unit.sample(0).cause}"


SETS = [
    Case(
        "a pickle that runs a command as CIFAR's batch",
        SETS_DOOR,
        "vtab/cifar10…test_batch…posix.system",
        cifar(lambda folder: pickle.dumps(Evil(folder))),
    ),
    Case("a pickle that makes numpy follow bytes as pointers", SETS_DOOR, "vtab/cifar10…test_batch…array", cifar(pointers)),
    Case("an index that names `../../outside/secret.png`", SETS_DOOR, "cars…outside/secret.png", cars),
    Case(
        "a list of classes of 100 MB",
        SETS_DOOR,
        "classnames.txt…bytes",
        lambda folder: own_set(folder, **{"classnames.txt": b"a" * 10**8}),
    ),
    Case(
        "10^30 shards by nshards.txt",
        SETS_DOOR,
        "mine…nshards.txt",
        lambda folder: own_set(folder, **{"test/nshards.txt": b"1" + b"0" * 30}),
    ),
    Case("a parquet file of garbage", SETS_DOOR, "mine…test.parquet", parquet(b"PAR1" + b"\xff" * 100 + b"PAR1")),
    Case(
        "a finished unit that holds a pickle",
        "`output_dir`/units",
        "0 of 1 unit taken as done",
        units(arrays(x=np.array([{}], dtype=object))),
    ),
    Case(
        "a finished unit that unpacks to 1 GB",
        "`output_dir`/units",
        "0 of 1 unit taken as done",
        units(arrays(True, x=np.zeros(2**27))),
    ),
    Case(
        "a reference that holds a pickle with a command",
        "`quality.reference`",
        "quality.reference…reference.npz…Object arrays",
        reference(lambda folder: arrays(features=np.array([Evil(folder)], dtype=object), protocol=np.array("{}"))),
    ),
    Case(
        "a reference that claims an exabyte",
        "`quality.reference`",
        "quality.reference…reference.npz",
        reference(lambda _: npy_of(f"({2**58},)")),
    ),
    Case(
        "a precomputed shard whose offsets lead out of the file",
        "`data.sources`, an .arrow shard",
        "0 used, 1 × shard_unreadable",
        offsets,
    ),
]
