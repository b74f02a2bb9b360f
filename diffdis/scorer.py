"""An exported DiffDis model in an evaluation: it scores how well images and texts fit each other, and generates images."""

from collections.abc import Sequence

import numpy as np

from diffdis.autoencoder import KLAutoencoder
from diffdis.pipeline import DiffDisPipeline


class DiffDisScorer:
    """Satisfies the platform's Scorer and Generator protocols."""

    def __init__(self, folder: str, device: str):
        self.pipeline = DiffDisPipeline.from_pretrained(folder).to(device)
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
        indices: Sequence[int],
        num_steps: int,
        guidance_scale: float,
        seed: int,
        best_of: int = 1,
    ) -> np.ndarray:
        """Return uint8 [B, S, S, 3]; see `DiffDisPipeline.generate`."""
        images = self.pipeline.generate(
            captions,
            best_of=best_of,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            indices=indices,
        )
        return np.stack([np.asarray(image) for image in images])
