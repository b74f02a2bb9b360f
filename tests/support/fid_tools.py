"""Runs pytorch-fid, clean-fid and torch-fidelity on two folders, and prints their numbers as one JSON line.

    python fid_tools.py GENERATED REFERENCE WEIGHTS

All use the weights of Inception in a file. Runs in a process of its own: these tools import torchvision, which is not a
dependency of this project. Its compiled operators, of which these tools use none, need another build of torch; they are declared
without an implementation.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(generated: str, reference: str, weights: str) -> None:
    from cleanfid.fid import compute_fid
    from pytorch_fid.fid_score import calculate_fid_given_paths
    from pytorch_fid.inception import fid_inception_v3
    from torch_fidelity import calculate_metrics

    # Where torch looks for it before it downloads it.
    cache = Path(os.environ["TORCH_HOME"], "hub", "checkpoints", "pt_inception-2015-12-05-6726825d.pth")
    cache.parent.mkdir(parents=True)
    shutil.copy(weights, cache)
    network = fid_inception_v3()
    network.fc = torch.nn.Identity()
    network.eval()
    cpu = torch.device("cpu")

    def features(images: torch.Tensor) -> torch.Tensor:  # as clean-fid's wrapper of the network in TorchScript
        return network((images - 128) / 128)

    found = calculate_metrics(
        input1=generated, input2=reference, fid=True, isc=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=weights, batch_size=8,
    )  # fmt: skip
    options = {"mode": "clean", "custom_feat_extractor": features, "num_workers": 0, "device": cpu, "verbose": False}
    numbers = {
        "pytorch-fid": float(calculate_fid_given_paths([generated, reference], 8, cpu, 2048, 0)),
        "clean-fid": float(compute_fid(generated, reference, **options)),
        "torch-fidelity": found["frechet_inception_distance"],
        "inception_score": found["inception_score_mean"],
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
