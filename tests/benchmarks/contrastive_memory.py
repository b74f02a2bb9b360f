"""The most memory that InfoNCE and its gradient take at a global batch, in a process of its own (see train_step.py).

    PYTHONPATH=platform:. python -m tests.benchmarks.contrastive_memory chunked|plain 32768

One rank of as many as make up the global batch with 512 samples each; what the others would send is not sent (torch's fake
process group), which changes neither the sizes nor the order of what is computed here.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffdis.losses import InfoNCE
from tests.diffdis.plain_losses import plain_alignment_loss

LOCAL, WIDTH = 512, 768


def gb(name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def main() -> None:
    which, global_batch = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("fake", rank=0, world_size=global_batch // LOCAL, store=FakeStore())
    scale = torch.tensor(14.0, requires_grad=True)
    num = LOCAL if which == "chunked" else global_batch
    predicted = F.normalize(torch.randn(num, 1, WIDTH), dim=-1).requires_grad_()
    query, ids = F.normalize(torch.randn(num, WIDTH), dim=-1), torch.arange(num)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = gb("VmRSS")
    if which == "chunked":
        loss = InfoNCE()(predicted, query, ids, scale).mean
    else:
        loss = plain_alignment_loss(predicted, query, ids, scale).loss.mean()
    loss.backward()
    print(round(gb("VmHWM") - before, 3))


if __name__ == "__main__":
    main()
