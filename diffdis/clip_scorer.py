"""Any CLIP or SigLIP in transformers' layout as a scorer of images and texts: a baseline, and the model of CLIPScore."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipImageProcessorPil,
    SiglipModel,
)

from diffdis.metrics.zero_shot import class_embeddings
from diffdis.model_folder import NO_CODE, check_model_folder
from diffdis.pretrained import load_component

TEXT_BATCH_SIZE = 256
# model_type of config.json -> classes of the model and of its image processor.
SCORER_TYPES: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPModel, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipImageProcessorPil),  # also SigLIP 2 of fixed resolution
}


class ClipScorer:
    """A CLIP or SigLIP from a folder with config.json, weights and tokenizer; satisfies the platform's Scorer protocol.

    Images are preprocessed by PIL, as for CLIP's published results, as the folder's preprocessor_config.json specifies, or in
    the model's own way at its size if there is none.

    Raises:
        ValueError: The folder has no CLIP or SigLIP, or its preprocessor produces another size than the model's.
    """

    def __init__(self, folder: str | Path, device: str = "cpu"):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json; give a folder with a CLIP in transformers' layout")
        check_model_folder(folder)
        kind = AutoConfig.from_pretrained(folder, **NO_CODE).model_type
        if kind not in SCORER_TYPES:
            raise ValueError(f"{folder}: its config.json says model_type {kind}, not {' or '.join(SCORER_TYPES)}")
        model_class, processor_class = SCORER_TYPES[kind]
        self._pads_texts = kind == "siglip"
        self._device = torch.device(device)
        model = load_component(model_class, folder)
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        self._size = self._model.config.vision_config.image_size
        self._processor = _image_processor(processor_class, folder, self._size)
        crop, self._short = self._processor.crop_size or {}, int((self._processor.size or {}).get("shortest_edge") or 0)
        # CLIP's own way: resize the shorter side to a length, and crop a square from the center.
        self._is_plain = bool(self._processor.do_resize and self._short and self._processor.do_center_crop) and (
            (crop["height"], crop["width"]) == (self._size, self._size) and self._short >= self._size
        )
        self._check_size(folder)
        # The processor's result for each of the 256 values in each channel: its exact numbers, whatever mean, std and factor.
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 1, 3))
        normalized = self._processor(levels, do_resize=False, do_center_crop=False, input_data_format="channels_last")
        self._values = torch.from_numpy(normalized["pixel_values"][0][:, :, 0].copy())  # [3, 256]
        mean, std = (
            torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
            for values in (self._processor.image_mean, self._processor.image_std)
        )
        self._scaling = torch.tensor(self._processor.rescale_factor, dtype=torch.float32), mean, std
        scaled = self._normalize_in_place(torch.arange(256.0).repeat(3, 1)[:, None])  # [3, 1, 256]
        self._by_arithmetic = torch.equal(scaled[:, 0], self._values)
        self._buffer = torch.empty(0)

    def _check_size(self, folder: Path) -> None:
        expected = (self._size, self._size, 3)
        shape = self.preprocess(np.zeros((2 * self._size, 3 * self._size, 3), dtype=np.uint8)).shape
        if shape != expected:
            raise ValueError(
                f"{folder}: preprocessor_config.json produces images of {shape[0]} x {shape[1]}, but the model takes "
                f"{self._size} x {self._size}; use the files of one model"
            )

    @property
    def preprocessing(self) -> str:
        """What `preprocess` does, for the results."""
        resample = Image.Resampling(self._processor.resample).name.lower()
        if self._is_plain:
            return f"shorter side to {self._short} px, {resample}; {self._size} px from the center"
        return f"preprocessor_config.json, {resample}, to {self._size} px"

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Return uint8 [S, S, 3] of the model's size for RGB uint8 [H, W, 3]. May be called from several threads."""
        if self._is_plain:
            return self._resize_and_crop(image)
        resized = self._processor(image, do_rescale=False, do_normalize=False, input_data_format="channels_last")
        return np.ascontiguousarray(resized["pixel_values"][0].transpose(1, 2, 0))

    def _resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        """Do what CLIP's own processor does, without its checks and copies."""
        size, (height, width) = self._size, image.shape[:2]
        short, long = min(height, width), int(self._short * max(height, width) / min(height, width))
        target = (self._short, long) if width == short else (long, self._short)  # width, height
        resized = Image.fromarray(image).resize(target, self._processor.resample)
        left, top = (target[0] - size) // 2, (target[1] - size) // 2
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 [B, 3, S, S] as normalized float32, like the processor. The result is valid until the next call."""
        if not self._by_arithmetic:
            return torch.stack([self._values[channel][pixels[:, channel].int()] for channel in range(3)], dim=1)
        if self._buffer.shape != pixels.shape:  # reused, because touching new pages each time costs more than the arithmetic
            self._buffer = torch.empty(pixels.shape)
        return self._normalize_in_place(self._buffer.copy_(pixels))

    def _normalize_in_place(self, values: torch.Tensor) -> torch.Tensor:
        """Normalize [..., 3, S, S] float32 of 0 to 255 in place."""
        factor, mean, std = self._scaling
        return values.mul_(factor).sub_(mean).div_(std)

    @torch.no_grad()
    def embed_images(self, images: np.ndarray, keys: Sequence[str] = (), **settings: Any) -> np.ndarray:
        """Return [B, D] float32 of unit norm for images [B, S, S, 3] uint8 from `preprocess`.

        CLIP uses no noise and no steps: keys and settings, which other scorers need, have no effect.
        """
        values = self._normalize(torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).to(self._device)
        with torch.autocast(self._device.type, enabled=False):
            embedded = self._model.get_image_features(pixel_values=values).pooler_output
        return F.normalize(embedded, dim=-1).cpu().numpy()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return [num_classes, D] float32 of unit norm; see `class_embeddings`."""
        return class_embeddings(self.embed_texts, class_names, templates).numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 of unit norm. Texts are truncated to the length that CLIP was trained with (77 tokens).

        SigLIP was trained with every text padded to its length. CLIP's batches have texts of similar length and are padded to the
        longest one, since most texts have a fifth of CLIP's length: its text attention is causal and reads the state of the end
        token, so that padding after it has no effect.
        """
        length = self._model.config.text_config.max_position_embeddings
        padding = "max_length" if self._pads_texts else False
        tokens = self._tokenizer(list(texts), truncation=True, max_length=length, padding=padding)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        embeddings: dict[int, np.ndarray] = {}
        for start in range(0, len(order), TEXT_BATCH_SIZE):
            indices = order[start : start + TEXT_BATCH_SIZE]
            padded = self._tokenizer.pad({"input_ids": [tokens[index] for index in indices]}, return_tensors="pt")
            with torch.autocast(self._device.type, enabled=False):
                embedded = self._model.get_text_features(input_ids=padded["input_ids"].to(self._device)).pooler_output
            embeddings |= dict(zip(indices, F.normalize(embedded, dim=-1).cpu().numpy(), strict=True))
        return np.stack([embeddings[index] for index in range(len(texts))])


def _image_processor(kind: Any, folder: Path, size: int) -> Any:
    if (folder / "preprocessor_config.json").is_file():
        return kind.from_pretrained(folder)
    square = {"height": size, "width": size}
    return kind(size={"shortest_edge": size}, crop_size=square) if kind is CLIPImageProcessorPil else kind(size=square)
