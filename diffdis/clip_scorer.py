"""Any CLIP in transformers' layout as a scorer of images and texts: the baseline, and the judge of CLIPScore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from diffdis.encoder import digest_of_folder
from diffdis.metrics.zero_shot import class_embeddings
from diffdis.model_folder import NO_CODE, NO_PICKLES, check_model_folder

TEXTS_AT_ONCE = 256


class ClipScorer:
    """A folder with CLIP's config.json, weights and tokenizer; satisfies the platform's Scorer by shape.

    Images are prepared as the folder's preprocessor_config.json says, or CLIP's own way at the model's size where there is none;
    by PIL, as CLIP was evaluated. Raises ValueError for a folder that holds no CLIP, or whose images come out in another size.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json; give a folder with a CLIP in transformers' layout")
        check_model_folder(folder)
        kind = AutoConfig.from_pretrained(folder, **NO_CODE).model_type
        if kind != "clip":
            raise ValueError(f"{folder}: its config.json says model_type {kind}, not clip")
        self.description = {"name": folder.name, "digest": digest_of_folder(folder)}
        self._device = torch.device(device)
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, **NO_PICKLES)
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        self._size = self._model.config.vision_config.image_size
        self._processor = _image_processor(folder, self._size)
        crop, self._short = self._processor.crop_size, int((self._processor.size or {}).get("shortest_edge") or 0)
        # CLIP's own way: the shorter side to a length, and a square cut from the middle.
        self._is_plain = bool(self._processor.do_resize and self._short and self._processor.do_center_crop) and (
            (crop["height"], crop["width"]) == (self._size, self._size) and self._short >= self._size
        )
        self._check_size(folder)
        # What the processor makes of each of the 256 values in each channel: its very numbers, whatever mean, std and factor.
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 1, 3))
        normalised = self._processor(levels, do_resize=False, do_center_crop=False, input_data_format="channels_last")
        self._values = torch.from_numpy(normalised["pixel_values"][0][:, :, 0].copy())  # [3, 256]
        mean, std = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            for values in (self._processor.image_mean, self._processor.image_std)
        )
        self._scaling = torch.tensor(self._processor.rescale_factor, dtype=torch.float32), mean, std
        scaled = self._scaled(torch.arange(256.0).repeat(3, 1)[:, None])  # [3, 1, 256]
        self._by_arithmetic = torch.equal(scaled[:, 0], self._values)
        self._buffer = torch.empty(0)

    def _check_size(self, folder: Path) -> None:
        expected = (self._size, self._size, 3)
        found = self.preprocess(np.zeros((2 * self._size, 3 * self._size, 3), dtype=np.uint8)).shape
        if found != expected:
            raise ValueError(
                f"{folder}: preprocessor_config.json makes images of {found[0]} x {found[1]}, the model takes "
                f"{self._size} x {self._size}: they do not belong together"
            )

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """RGB uint8 [H, W, 3] of any size -> uint8 [S, S, 3], as the model sees it. May be called from several threads."""
        if self._is_plain:
            return self._resized_and_cut(image)
        resized = self._processor(image, do_rescale=False, do_normalize=False, input_data_format="channels_last")
        return np.ascontiguousarray(resized["pixel_values"][0].transpose(1, 2, 0))

    def _resized_and_cut(self, image: np.ndarray) -> np.ndarray:
        """What the processor does where it is CLIP's own, without its checks and copies."""
        size, (height, width) = self._size, image.shape[:2]
        short, long = min(height, width), int(self._short * max(height, width) / min(height, width))
        target = (self._short, long) if width == short else (long, self._short)  # width, height
        resized = Image.fromarray(image).resize(target, self._processor.resample)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] -> float32, as the processor does. Good until the next call."""
        if not self._by_arithmetic:
            return torch.stack([self._values[channel][pixels[:, channel].int()] for channel in range(3)], dim=1)
        if self._buffer.shape != pixels.shape:  # kept: to touch new pages each time costs more than the arithmetic
            self._buffer = torch.empty(pixels.shape)
        return self._scaled(self._buffer.copy_(pixels))

    def _scaled(self, values: torch.Tensor) -> torch.Tensor:
        """[..., 3, S, S] float32 of 0 to 255, in place."""
        factor, mean, std = self._scaling
        return values.mul_(factor).sub_(mean).div_(std)

    @torch.no_grad()
    def embed_images(self, images: np.ndarray, keys: Sequence[str] = (), **settings: Any) -> np.ndarray:
        """What `prepare` made, [B, S, S, 3] uint8 -> [B, D] float32, unit norm.

        CLIP draws no noise and takes no steps: keys and settings, which other scorers need, change nothing.
        """
        values = self._normalised(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).to(self._device)
        with torch.autocast(self._device.type, enabled=False):
            embedded = self._model.get_image_features(pixel_values=values).pooler_output
        return F.normalize(embedded, dim=-1).cpu().numpy()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """[num_classes, D] float32, unit norm; see `class_embeddings`."""
        return class_embeddings(self.embed_texts, class_names, templates).numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """[N, D] float32, unit norm. Cut to the length that CLIP was trained with (77 tokens).

        Padded to the longest text of a batch, of texts of like length: CLIP's text attention is causal and reads the state of the
        end token, so what follows it changes nothing, and most texts are a fifth as long as CLIP's length.
        """
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        order = sorted(range(len(texts)), key=lambda place: len(tokens[place]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), TEXTS_AT_ONCE):
            places = order[start : start + TEXTS_AT_ONCE]
            padded = self._tokenizer.pad({"input_ids": [tokens[place] for place in places]}, return_tensors="pt")
            with torch.autocast(self._device.type, enabled=False):
                embedded = self._model.get_text_features(input_ids=padded["input_ids"].to(self._device)).pooler_output
            found |= dict(zip(places, F.normalize(embedded, dim=-1).cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(texts))])


def _image_processor(folder: Path, size: int) -> Any:
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(folder)
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
