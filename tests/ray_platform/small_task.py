"""Small Tasks that are unrelated to DiffDis: the platform trains any Task that implements the interface."""

import io

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

SIZE = 24


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(SIZE, 40), nn.Linear(40, 40), nn.Linear(40, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.full((SIZE,), 0.1))

    def forward(self, inputs, seed, **more):
        noise = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
        x = (inputs["x"] + self.shift + 0.01 * noise).to(self.first.weight.dtype)
        out = self.last(torch.tanh(self.frozen(self.first(x)))).float()
        loss = (out.squeeze(1) - inputs["y"]).square().mean()
        return loss, {"loss": torch.stack([loss.detach() * len(out), torch.tensor(float(len(out)))])}


class SmallTask:
    def __init__(self):
        torch.manual_seed(0)
        self.module = Regression()

    def parameter_groups(self):
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"name": "matrices", "params": [p for p in trained if p.ndim > 1], "lr": 1e-2, "weight_decay": 0.1},
            {"name": "biases", "params": [p for p in trained if p.ndim == 1], "lr": 2e-2, "weight_decay": 0.0},
        ]

    def enable_activation_checkpointing(self):
        pass

    def compile(self):
        self.module.compile()

    def precompute_step_loss(self, inputs, seeds, control, progress):
        return [{} for _ in inputs]


class PictureTask(SmallTask):
    """Convolutions, one of them frozen, over inputs [B, 2, 6, 2]."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = Convolutions()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, (2, 1))
        self.frozen.requires_grad_(False)

    def forward(self, inputs, seed):
        loss = self.frozen(self.first(inputs["x"])).square().mean()
        return loss, {"loss": torch.stack([loss.detach(), torch.tensor(1.0)])}


class PixelTask(SmallTask):
    """Predicts the length of a caption from the brightness of 24 stripes of its image."""

    def inputs(self, batch, device):
        stripes = torch.from_numpy(np.array(batch.tensors["image"])).float().flatten(1).unflatten(1, (SIZE, -1)).mean(dim=2) / 255
        return {"x": stripes.to(device), "y": torch.tensor([float(len(c)) for c in batch.captions], device=device) / 10}

    def embed_heldout(self, inputs):
        noise = torch.zeros_like(inputs["x"])
        return {"error": (self.module(inputs | {"x": inputs["x"] + noise}, 0)[0]).expand(len(inputs["x"])).clone()}

    def score(self, rows):
        return {"heldout/error": float(rows["error"].mean()), "heldout/rows": float(len(rows["error"]))}

    def preview(self, rank, world_size):
        return {place: np.full((4, 4, 3), 60 * place, dtype=np.uint8) for place in range(rank, 3, world_size)}

    def preview_page(self, images):
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate([images[place] for place in sorted(images)], axis=1)).save(buffer, format="PNG")
        return buffer.getvalue()

    def save_pretrained(self, state_dict, folder, training=None):
        save_file(dict(state_dict), folder / "model.safetensors")

    def describe(self, captions=()):
        return {"parameters": sum(p.numel() for p in self.module.parameters())}


def samples(step, num):
    """Return the samples of a step. Sample i is the same on any rank."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(num, SIZE, generator=generator)
    return {"x": x, "y": x.square().mean(dim=1)}
