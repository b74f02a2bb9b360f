"""Groups of gloo ranks on loopback, without Ray. All tests share them.

The ranks are forked from one server that has imported the libraries, because these imports take each process many seconds.
"""

import gc
import os
import pickle  # used directly, because torch would put tensors into shared memory, whose manager is slow under load
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tests.support.environments import BITSANDBYTES

_TIMEOUT_S = 180
_ROOT = Path(__file__).parents[2]
_PRELOAD = ["ray_platform.train.engine", "deepspeed", "diffdis.task"]


class Ranks:
    """A group of `world_size` processes that the first call starts. A failure ends the group; the next call starts a new one."""

    def __init__(self, world_size):
        self.world_size, self.processes = world_size, []

    def run(self, function, *arguments):
        """Return [function(rank, *arguments) of each rank]. Raises AssertionError with the traceback of a failure."""
        if not self.processes:
            self._start()
        for asked in self.asked:
            asked.put(pickle.dumps((function, arguments)))
        results = [None] * self.world_size
        for _ in range(self.world_size):
            rank, ok, result = self.answered.get(timeout=_TIMEOUT_S)
            if not ok:
                self.stop()
                raise AssertionError(f"rank {rank}: {result}")
            results[rank] = pickle.loads(result)
        return results

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def _start(self):
        # The server imports by PYTHONPATH alone; multiprocessing passes it no other path.
        os.environ["PYTHONPATH"] = os.pathsep.join([f"{_ROOT}/platform", str(_ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.asked, self.answered = [context.Queue() for _ in range(self.world_size)], context.Queue()
        self.folder = tempfile.TemporaryDirectory()
        self.extensions = Path(self.folder.name) / "extensions"  # the folder in which DeepSpeed would compile its kernels
        for rank, asked in enumerate(self.asked):
            arguments = (rank, self.world_size, self.folder.name, asked, self.answered)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()


_shared: dict[int, Ranks] = {}


def shared_ranks(world_size: int) -> Ranks:
    """Return the group of the given size that all tests of this process share."""
    return _shared.setdefault(world_size, Ranks(world_size))


def stop_shared_ranks() -> None:
    for group in _shared.values():
        group.stop()


def whole_state(engine):
    """Return the state of all ranks, joined from their parts as a checkpoint's are."""
    from ray_platform.train.checkpoint_format import contiguous_on_cpu
    from ray_platform.train.collective import gather_objects
    from ray_platform.train.tensor_parts import TensorJoiner

    joiner, tensors = TensorJoiner(), {}
    parts = {key: contiguous_on_cpu(tensor) for key, tensor, _ in engine.local_state()}
    # As arrays of bytes: pickling and loading tensors takes several times as long.
    local = {key: (part.reshape(-1).view(torch.uint8).numpy(), part.dtype, part.shape) for key, part in parts.items()}
    for of_rank in gather_objects(local):
        for key, (content, dtype, shape) in of_rank.items():
            part = torch.from_numpy(content).view(dtype).reshape(shape)
            tensors |= dict(filter(None, [joiner.add(key, part)]))
    joiner.check_complete()
    return tensors


def _serve(rank, world_size, folder, asked, answered):
    torch.set_num_threads(1)
    sys.path.append(BITSANDBYTES)  # diffusers, which the server imported, did not find it
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), TORCH_EXTENSIONS_DIR=f"{folder}/extensions"
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    num_modules = 0
    while True:
        function, arguments = pickle.loads(asked.get())
        if len(sys.modules) > num_modules:
            # DeepSpeed collects garbage at every start of ZeRO 3, which takes 0.7 s if that includes all imported modules.
            gc.collect()
            gc.freeze()
            num_modules = len(sys.modules)
        try:
            answered.put((rank, True, pickle.dumps(function(rank, *arguments))))
        except Exception:
            answered.put((rank, False, traceback.format_exc()))
