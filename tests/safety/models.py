"""Hostile model folders and evaluation sets, passed to the functions that open them."""

import dataclasses
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
from diffdis.config import AutoencoderConfig, TextEncoderConfig, tiny
from diffdis.model import DiffDis
from diffdis.pipeline import DiffDisPipeline
from diffdis.scorers import ClipScorer
from diffdis.text_encoder import build_text_encoder
from diffdis.warm_start import load_warm_start
from diffdis_platform.evaluation.distance import read_reference
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.precomputed import to_arrow
from ray_platform.data.source import open_precomputed
from ray_platform.evaluate.discovery import find_evaluation_set
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.sets import KNOWN_SETS, read_slice
from tests.ray_platform.conftest import png, tar_of
from tests.safety.cases import CANARY, Evil, Feed, line_of
from tests.support.tiny_checkpoints import save_clip, save_mean_pool_encoder, save_stable_diffusion

Change = Callable[[Path], object]  # modifies a model folder


def changed(save: Callable[[Path], Path], load: Callable[[Path], object], change: Change) -> Feed:
    def feed(folder: Path) -> str:
        model = save(folder / "model")
        change(model)
        return line_of(lambda: load(model), ValueError, FileNotFoundError)

    return feed


def text_encoder(change: Change) -> Feed:
    config = TextEncoderConfig("mean_pool", "", max_length=8, token_dim=32, embedding_dim=32)
    return changed(save_mean_pool_encoder, lambda f: build_text_encoder(dataclasses.replace(config, path=str(f))), change)


def warm_start(change: Change) -> Feed:
    return changed(save_stable_diffusion, lambda folder: load_warm_start(DiffDis(tiny()), str(folder)), change)


def autoencoder(change: Change) -> Feed:
    return changed(save_stable_diffusion, lambda folder: build_autoencoder(AutoencoderConfig("kl", str(folder))), change)


def exported_model(change: Change) -> Feed:
    return changed(save_export, DiffDisPipeline.from_pretrained, change)


def save_export(folder: Path) -> Path:
    encoder = save_mean_pool_encoder(folder.parent / "encoder")
    config = dataclasses.replace(tiny(), text_encoder=dataclasses.replace(tiny().text_encoder, path=str(encoder)))
    frozen = build_autoencoder(config.autoencoder), build_text_encoder(config.text_encoder)
    DiffDisPipeline(config, DiffDis(config), *frozen).save_pretrained(folder)
    return folder


def pickled(name: str) -> Change:
    """Replace the weights by a pickle, torch's older format, that contains a command."""

    def change(folder: Path) -> None:
        for file in (folder / name).parent.glob("*.safetensors"):
            file.unlink()
        torch.save({"x": Evil(folder.parent)}, folder / name)

    return change


def setting(name: str = "config.json", **values: Any) -> Change:
    """Change fields of a JSON file; a dictionary updates the existing nested fields."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        for field, value in values.items():
            fields[field] = fields[field] | value if isinstance(fields.get(field), dict) else value
        (folder / name).write_text(json.dumps(fields))

    return change


def add_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / CANARY)!r}, 'w')\nclass Model: pass\n")
    setting(auto_map={"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}, model_type="evil")(folder)


def cut_off(folder: Path) -> None:
    file = folder / "alignment" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


WIDE = {"block_out_channels": [100_000, 100_000]}
MODELS = {
    "a pickle that runs a command for a text encoder's weights": text_encoder(pickled("pytorch_model.bin")),
    "the same for a CLIP's": changed(save_clip, ClipScorer, pickled("pytorch_model.bin")),
    "the same for a U-Net's": warm_start(pickled("unet/diffusion_pytorch_model.bin")),
    "the same for an autoencoder's": autoencoder(pickled("vae/diffusion_pytorch_model.bin")),
    "Python code next to the weights, named by `auto_map`": text_encoder(add_code),
    "an attention implementation that is a hub's repository of compiled kernels": text_encoder(
        setting(_attn_implementation="evil/kernels")
    ),
    "an adapter that names another model to fetch": text_encoder(lambda f: (f / "adapter_config.json").write_text("{}")),
    "a text encoder of a million layers": text_encoder(setting(num_hidden_layers=10**6)),
    "a `config.json` of 10 MB": text_encoder(setting(x="x" * 10**7)),
    "a U-Net of 100,000 channels": warm_start(setting("unet/config.json", **WIDE)),
    "an exported model that declares 100,000 channels": exported_model(setting("diffdis.json", unet=WIDE)),
    "an exported model whose tensors are cut off": exported_model(cut_off),
    "an exported model of a later format": exported_model(setting("diffdis.json", format_version=2)),
    "an exported model whose format is not a number": exported_model(setting("diffdis.json", format_version="x")),
}


def evaluation_set(name: str, files: dict[str, bytes]) -> Feed:
    """Return a case: an evaluation on a set with the given files, by path."""

    def feed(folder: Path) -> str:
        for path, content in files.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return line_of(
            lambda: [read_slice(part) for part in find_evaluation_set([str(folder)], name).slices], ConfigError, DataError
        )

    return feed


def cifar(batch: bytes) -> Feed:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = pickle.dumps({"label_names": classes}, protocol=2)
    files = {"cifar-10-batches-py/batches.meta": meta, "cifar-10-batches-py/test_batch": batch}
    return evaluation_set("vtab/cifar10", files)


def pickled_cifar(folder: Path) -> str:
    return cifar(pickle.dumps(Evil(folder)))(folder)


def pointers() -> bytes:
    """Return a pickle of numpy.ndarray((2,), dtype=object, buffer=…), whose bytes numpy would dereference as pointers."""
    out = b"\x80\x02cnumpy\nndarray\n(K\x02\x85cnumpy\ndtype\nX\x01\x00\x00\x00O\x85RC\x10" + b"A" * 16 + b"tR."
    return b"\x80\x02}X\x04\x00\x00\x00data" + out[2:-1] + b"s."


def matlab(**values: Any) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, values)
    return buffer.getvalue()


def cars() -> Feed:
    """Return a case: a set whose index names a file outside the set as an image."""
    annotations = np.array([("../../outside/secret.png", 1), ("b.jpg", 2)], dtype=[("fname", object), ("class", int)])
    files = {
        "cars/devkit/cars_meta.mat": matlab(class_names=np.array(KNOWN_SETS["cars"].classes, dtype=object)),
        "cars/cars_test_annos_withlabels.mat": matlab(annotations=annotations),
        "cars/cars_test/b.jpg": b"",
    }
    return evaluation_set("cars", files)


def webdataset(name: str, content: bytes) -> Feed:
    """Return a case: a WebDataset set with one hostile file."""
    files = {"classnames.txt": b"cat\ndog", "zeroshot_classification_templates.txt": b"{c}"}
    files |= {"test/0.tar": tar_of([("a.png", png(1)), ("a.cls", b"1")]), name: content}
    return evaluation_set("mine", {f"wds_mine/{name}": content for name, content in files.items()})


def unit(content: bytes) -> Feed:
    """Return a case: the finished unit of an interrupted evaluation, with the given content."""

    def feed(folder: Path) -> str:
        (folder / f"{'a' * 32}.npz").write_bytes(content)
        return f"{len(list(ResultCache(str(folder), 'git-0').read(['a' * 32])))} of 1 unit taken as done"

    return feed


def reference(folder: Path, content: bytes) -> str:
    (folder / "reference.npz").write_bytes(content)
    return line_of(lambda: read_reference("quality.reference", str(folder / "reference.npz")), ConfigError)


def pickled_reference(folder: Path) -> str:
    return reference(folder, arrays(features=np.array([Evil(folder)], dtype=object), protocol=np.array("{}")))


def arrays(save: Callable[..., None] = np.savez, **values: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, allow_pickle=True, **values)
    return buffer.getvalue()


def npy_of(shape: str) -> bytes:
    """Return an .npz whose array header claims a shape."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("features.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())
    return buffer.getvalue()


def offsets(folder: Path) -> str:
    """Read a precomputed shard in which a caption offset points far outside the file."""
    content = bytearray(to_arrow(["key"] * 3, ["caption"] * 3, {"latent": np.zeros((3, 2), dtype=np.float16)}))
    at = content.find(np.array([0, 7, 14, 21], dtype=np.int32).tobytes())
    content[at + 4 : at + 8] = (2**31 - 5).to_bytes(4, "little")
    unit = open_precomputed(pa.py_buffer(bytes(content)), "0.arrow/")
    return f"0 used, {len(unit)} × {unit[0].cause}"


SETS = {
    "a pickle that runs a command as CIFAR's batch": pickled_cifar,
    "a pickle that makes numpy follow bytes as pointers": cifar(pointers()),
    "an index that names `../../outside/secret.png`": cars(),
    "a list of classes of 100 MB": webdataset("classnames.txt", bytes(10**8)),
    "10^30 shards by nshards.txt": webdataset("test/nshards.txt", b"1" + b"0" * 30),
    "a parquet file of garbage": evaluation_set("mine", {"mine/test.parquet": b"PAR1" + b"\xff" * 100 + b"PAR1"}),
    "a finished unit that holds a pickle": unit(arrays(x=np.array([{}], dtype=object))),
    "a finished unit that is compressed, so that it may unpack to any size": unit(arrays(np.savez_compressed, x=np.zeros(2**20))),
    "a reference that holds a pickle with a command": pickled_reference,
    "a reference that claims an exabyte": lambda folder: reference(folder, npy_of(f"({2**58},)")),
    "a precomputed shard whose offsets lead out of the file": offsets,
}
