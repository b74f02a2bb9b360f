"""Scorers of images and texts in an evaluation: an exported DiffDis model, and any CLIP or SigLIP in transformers' layout."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

from diffdis.autoencoder import KLAutoencoder
from diffdis.config import Dtype
from diffdis.metrics.zero_shot import class_embeddings
from diffdis.model_folder import NO_CODE, check_model_folder
from diffdis.pipeline import DiffDisPipeline
from diffdis.pretrained import load_component
from diffdis.text_encoder import load_tokenizer

TEXT_BATCH_SIZE = 256
Resize = Literal["torch", "pillow"]
_TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
_MAX_LONG_SIDE = 32  # of an image that is resized as a whole, relative to the size of the crop
_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))
# model_type of config.json -> classes of the model and of its image processor.
SCORER_TYPES: dict[str, tuple[Any, Any]] = {
    "clip": (CLIPModel, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipImageProcessorPil),  # also SigLIP 2 of fixed resolution
}


class DiffDisScorer:
    """An exported DiffDis model; satisfies the platform's Scorer and Generator protocols."""

    def __init__(self, folder: str, device: str, dtype: Dtype = "float32"):
        self.pipeline = DiffDisPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if isinstance(self.pipeline.autoencoder, KLAutoencoder):
            # One image at a time: at 512 px its activations are larger than the U-Net's for the whole batch.
            self.pipeline.autoencoder.vae.enable_slicing()

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Return [S, S, 3] of the model's size for uint8 [H, W, 3]: center-cropped to a square, resized with a bicubic filter."""
        return self.pipeline.preprocess([image])[0]

    def embed_images(
        self, images: np.ndarray, keys: Sequence[str], num_steps: int = 10, num_draws: int = 1, guidance: float = 0.0
    ) -> np.ndarray:
        """Return queries denoised from pure noise, [B, D] float32, of uint8 [B, S, S, 3]; see `DiffDisPipeline.embed_image`."""
        queries = self.pipeline.embed_image(images, keys=keys, num_steps=num_steps, num_draws=num_draws, guidance=guidance)
        return queries.float().cpu().numpy()

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32."""
        return self.pipeline.embed_text(texts).float().cpu().numpy()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return [num_classes, D] float32."""
        return self.pipeline.embed_classes(class_names, templates).float().cpu().numpy()

    def generate_images(
        self,
        captions: Sequence[str],
        indices: Sequence[int | str],
        num_steps: int,
        guidance_scale: float,
        seed: int,
        scheduler: str = "",
    ) -> np.ndarray:
        """Return uint8 [B, S, S, 3]; see `DiffDisPipeline.generate` and `DiffDisPipeline.scheduler`."""
        self.pipeline.scheduler = scheduler
        images = self.pipeline.generate(
            captions, num_inference_steps=num_steps, guidance_scale=guidance_scale, seed=seed, indices=indices
        )
        return np.stack([np.asarray(image) for image in images])


class ClipScorer:
    """A CLIP or SigLIP, as a baseline or for CLIPScore; satisfies the platform's Scorer protocol.

    Its folder has config.json, weights and tokenizer.
    Images are preprocessed as the folder's preprocessor_config.json specifies, or in the model's own way at its size if there
    is none. `resize` is "pillow" for the pixels of CLIP's published results, or "torch", which takes a fifth of the time and
    differs by 1 gray level, rarely 2, in about 0.3 % of the values: its kernel, that of transformers' fast processors, has
    weights of 16 bits. Filters and layouts that torch does not have use Pillow in any case.

    Raises:
        ValueError: The folder has no CLIP or SigLIP, or its preprocessor produces another size than the model's.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", resize: Resize = "torch", dtype: Dtype = "float32"):
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json; give a folder with a CLIP in transformers' layout")
        check_model_folder(folder)
        kind = AutoConfig.from_pretrained(folder, **NO_CODE).model_type
        if kind not in SCORER_TYPES:
            raise ValueError(f"{folder}: its config.json says model_type {kind}, not {' or '.join(SCORER_TYPES)}")
        model_class, processor_class = SCORER_TYPES[kind]
        self._is_siglip = kind == "siglip"
        self._device = torch.device(device)
        model = load_component(model_class, folder)
        self._model = model.eval().requires_grad_(False).to(self._device, getattr(torch, dtype))
        self._tokenizer = load_tokenizer(folder)
        self._size = self._model.config.vision_config.image_size
        self._processor = _image_processor(processor_class, folder, self._size)
        crop, self._short = self._processor.crop_size or {}, int((self._processor.size or {}).get("shortest_edge") or 0)
        # CLIP's own way: resize the shorter side to a length, and crop a square from the center.
        self._is_plain = bool(self._processor.do_resize and self._short and self._processor.do_center_crop) and (
            (crop["height"], crop["width"]) == (self._size, self._size) and self._short >= self._size
        )
        self._torch_mode = _TORCH_MODES.get(self._processor.resample, "") if resize == "torch" else ""
        self._check_size(folder)
        # The processor's result is linear in the pixel: what it makes of 0 and 255 gives the factor and offset of each channel.
        levels = np.broadcast_to(np.array([0, 255], dtype=np.uint8)[:, None, None], (2, 1, 3))
        normalized = self._processor(levels, do_resize=False, do_center_crop=False, input_data_format="channels_last")
        black, white = torch.from_numpy(normalized["pixel_values"][0][:, :, 0].astype(np.float64)).T  # [3]
        # For a row of S pixels with their three channels side by side.
        self._factors = ((white - black) / 255).float().repeat(self._size).to(self._device)
        self._offsets = black.float().repeat(self._size).to(self._device)
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
            by = "torch" if self._torch_mode else "Pillow"
            return f"shorter side to {self._short} px, {resample} by {by}; {self._size} px from the center"
        return f"preprocessor_config.json, {resample}, to {self._size} px"

    def preprocess(self, image: np.ndarray) -> np.ndarray:
        """Return uint8 [S, S, 3] of the model's size for RGB uint8 [H, W, 3]. May be called from several threads."""
        if self._is_plain:
            return self._resize_and_crop(image)
        resized = self._processor(image, do_rescale=False, do_normalize=False, input_data_format="channels_last")
        return np.ascontiguousarray(resized["pixel_values"][0].transpose(1, 2, 0))

    def _resize_and_crop(self, image: np.ndarray) -> np.ndarray:
        """Resize the shorter side to `self._short` and crop a square from the center, like CLIP's own transform.

        The crop begins where torchvision's CenterCrop does, with which scores were published. That of transformers begins one
        pixel earlier if the longer side has 3, 7, 11, ... more pixels than the square.
        """
        size, (height, width) = self._size, image.shape[:2]
        short, long = min(height, width), int(self._short * max(height, width) / min(height, width))
        target = (self._short, long) if width == short else (long, self._short)  # width, height
        left, top = (round((side - size) / 2) for side in target)
        if long > _MAX_LONG_SIDE * size:  # crop first: the whole of a 1 x 60,000 image would have gigabytes
            scale_x, scale_y = width / target[0], height / target[1]
            box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
            return np.asarray(Image.fromarray(image).resize((size, size), self._processor.resample, box=box))
        if self._torch_mode:
            # First a batch of one, then permuted: torch treats that as channels-last, for which it has a faster kernel.
            pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
            resized = F.interpolate(pixels, target[::-1], mode=self._torch_mode, antialias=True)[0].permute(1, 2, 0).numpy()
            return np.ascontiguousarray(resized[top : top + size, left : left + size])
        whole = Image.fromarray(image).resize(target, self._processor.resample)
        return np.asarray(whole.crop((left, top, left + size, top + size)))

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return uint8 [B, S, S, 3] as normalized float32 [B, 3, S, S], channels last. It is valid until the next call."""
        rows = images.reshape(-1, 3 * self._size)
        if self._buffer.shape != rows.shape:  # reused, because touching new pages each time costs more than the arithmetic
            self._buffer = torch.empty(rows.shape, device=self._device)
        torch.addcmul(self._offsets, self._buffer.copy_(rows), self._factors, out=self._buffer)
        return self._buffer.view(images.shape).permute(0, 3, 1, 2)

    @torch.no_grad()
    def embed_images(self, images: np.ndarray, keys: Sequence[str] = (), **settings: Any) -> np.ndarray:
        """Return [B, D] float32 of unit norm for images [B, S, S, 3] uint8 from `preprocess`.

        CLIP uses no noise and no steps: keys and settings, which other scorers need, have no effect.
        """
        values = self._normalize(torch.from_numpy(np.array(images)).to(self._device))
        with torch.autocast(self._device.type, enabled=False):
            embedded = self._model.get_image_features(pixel_values=values).pooler_output
        return F.normalize(embedded.float(), dim=-1).cpu().numpy()

    def embed_classes(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """Return [num_classes, D] float32 of unit norm; see `class_embeddings`."""
        return class_embeddings(self.embed_texts, class_names, templates).numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 of unit norm. Texts are truncated to the length that CLIP was trained with (77 tokens).

        SigLIP was trained with every text padded to its length, and published with texts in lower case without punctuation, which
        the tokenizer of SigLIP 2 leaves to its caller. CLIP's batches have texts of similar length and are padded to the longest
        one, since most texts have a fifth of CLIP's length: its text attention is causal and reads the state of the end token, so
        that padding after it has no effect.
        """
        length = self._model.config.text_config.max_position_embeddings
        texts = [" ".join(text.translate(_NO_PUNCTUATION).lower().split()) for text in texts] if self._is_siglip else list(texts)
        padding = "max_length" if self._is_siglip else False
        tokens = self._tokenizer(texts, truncation=True, max_length=length, padding=padding)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(tokens[index]))
        embeddings: dict[int, np.ndarray] = {}
        for start in range(0, len(order), TEXT_BATCH_SIZE):
            indices = order[start : start + TEXT_BATCH_SIZE]
            padded = self._tokenizer.pad({"input_ids": [tokens[index] for index in indices]}, return_tensors="pt")
            with torch.autocast(self._device.type, enabled=False):
                embedded = self._model.get_text_features(input_ids=padded["input_ids"].to(self._device)).pooler_output
            embeddings |= dict(zip(indices, F.normalize(embedded.float(), dim=-1).cpu().numpy(), strict=True))
        return np.stack([embeddings[index] for index in range(len(texts))])


def _image_processor(kind: Any, folder: Path, size: int) -> Any:
    if (folder / "preprocessor_config.json").is_file():
        return kind.from_pretrained(folder)
    square = {"height": size, "width": size}
    return kind(size={"shortest_edge": size}, crop_size=square) if kind is CLIPImageProcessorPil else kind(size=square)
