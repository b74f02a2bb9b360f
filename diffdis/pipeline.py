"""DiffDisPipeline: inference with a trained model. It generates images, and it scores which text belongs to an image.

The methods take images and a *list* of candidate texts, never a label: a score cannot leak the answer.
"""

import functools
import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack, get_args

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from tqdm.auto import tqdm

from diffdis import arguments, export_folder, schedule
from diffdis.arguments import EmbedSettings, GenerateSettings, OutputType, StepCallback, TextInput, as_texts, check_length
from diffdis.autoencoder import Autoencoder, KLAutoencoder, decode_as, join, to_latents
from diffdis.config import DiffDisConfig
from diffdis.images import ImagesInput, as_image_list, preprocess
from diffdis.metrics.zero_shot import class_embeddings
from diffdis.model import DiffDis, ImageCondition
from diffdis.schedule import named_generator, named_noise
from diffdis.text_encoder import TextEncoder

IMAGE_BATCH, TEXT_BATCH = 32, 256
RANKING_DRAWS = 4  # noise samples with which an image is scored for `best_of`, in one step each
_CLASS_CACHE = 8  # sets of classes whose embeddings are kept


class DiffDisPipeline:
    """A trained model with its frozen encoders, for inference."""

    def __init__(self, config: DiffDisConfig, model: DiffDis, autoencoder: Autoencoder, text_encoder: TextEncoder):
        """Take the parts as they are, all on the device of `model`, and set the model to eval mode."""
        self.config, self.model = config, model.eval()
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self._ddim = self._scheduler = schedule.ddim_scheduler(config.schedule)
        self._progress_bar: dict[str, Any] = {}
        self._classes: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], torch.Tensor] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.model.alphas_cumprod.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.unet.conv_in.weight.dtype

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> "DiffDisPipeline":
        """Move all parts to a device, a dtype or both, and return self. The noise schedule stays float32."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        # The Haar transform has no weights, and half precision would only cost image quality.
        exact = () if isinstance(self.autoencoder, KLAutoencoder) else (self.autoencoder,)
        for module in (self.model, self.text_encoder, self.autoencoder):
            for target in (device, None if module in exact else dtype):
                if target is not None:
                    module.to(target)
        self._classes.clear()
        return self

    @property
    def scheduler(self) -> Any:
        """The sampler of images: DDIM by default and for "", or any scheduler of diffusers, as an object or as the name of its
        class, which then gets the model's noise schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = self._ddim if scheduler == "" else schedule.build_scheduler(scheduler, self.config.schedule)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Set arguments of the progress bar of `pipeline(...)`, tqdm's, such as `disable=True`."""
        self._progress_bar = settings

    # --- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: TextInput,
        *,
        negative_prompt: TextInput | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        indices: Sequence[int | str] | None = None,
        output_type: OutputType = "pil",
        batch_size: int = IMAGE_BATCH,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput:
        """Generate images with classifier-free guidance: eps = uncond + guidance_scale (cond - uncond).

        Args:
            prompt: a text or a list of N texts.
            negative_prompt: text (or one per prompt) in the place of the empty one, from which guidance leads away.
            num_images_per_prompt: images of each prompt, which follow each other in the result.
            num_inference_steps: number of sampling steps.
            guidance_scale: the usual one, the paper's w plus 1.
            height, width: of the images in pixels; the model's size by default.
            seed: the initial noise of an image depends on the seed and its index alone, not on the batch.
            generator: samples all initial noise in one tensor instead, as diffusers' pipelines do.
            latents: the initial noise itself, [N * num_images_per_prompt, C, h, w].
            indices: the index of each image among all images; 0, 1, ... by default.
            output_type: "pil", "np" ([N, H, W, 3] in [0, 1]), "pt" ([N, 3, H, W] in [0, 1]) or "latent".
            batch_size: images at a time.
            callback_on_step_end: called after each step of each batch; the latents that it returns are used.

        Returns:
            A record whose `images` are a list of PIL images, or an array or a tensor.

        Raises:
            ValueError: the model was not trained to generate, or an argument does not fit.
        """
        self._check_generates(output_type, num_images_per_prompt, batch_size)
        prompts, negative = self._paired_prompts(prompt, negative_prompt, num_images_per_prompt)
        indices = range(len(prompts)) if indices is None else check_length("indices", indices, len(prompts))
        shape = arguments.latent_shape(self.config, height, width)
        latents, parts = arguments.given_latents(latents, generator, (len(prompts), *shape)), []
        with tqdm(total=-(-len(prompts) // batch_size) * num_inference_steps, **self._progress_bar) as bar:
            on_step = functools.partial(self._on_step, bar, callback_on_step_end)
            for start in range(0, len(prompts), batch_size):
                rows = slice(start, start + batch_size)
                names = [f"{seed}/{index}" for index in indices[rows]]
                noise = torch.stack([named_noise(f"generate/{n}", shape) for n in names]) if latents is None else latents[rows]
                steps = (num_inference_steps, generator or [named_generator(f"sample/{name}") for name in names], on_step)
                sampled = self._sample(noise, prompts[rows], negative[rows], guidance_scale, *steps)
                parts.append(decode_as(self.autoencoder, sampled, output_type))
        return ImagePipelineOutput(images=join(parts, output_type))

    def generate(self, prompt: TextInput, *, best_of: int = 1, **settings: Unpack[GenerateSettings]) -> Any:
        """Return the images of `pipeline(prompt, ...)`, which has the same arguments.

        Args:
            prompt: a text or a list of N texts.
            best_of: above 1, generate so many images per prompt, and return the `num_images_per_prompt` of them that the model
                itself finds closest to the prompt, the best first. `indices` are then those of the prompts.
            **settings: arguments of `pipeline(prompt, ...)`.

        Raises:
            ValueError: the model cannot generate or, with `best_of`, not score images; or an argument does not fit.
        """
        for old, new in (("num_steps", "num_inference_steps"), ("places", "indices")):
            if old in settings:
                warnings.warn(f"generate: `{old}` is deprecated; use `{new}`", DeprecationWarning, stacklevel=2)
                settings[new] = settings.pop(old)  # type: ignore[literal-required, misc]
        if best_of != 1:
            return self._best_images(as_texts(prompt, "prompt"), best_of, **settings)
        return self(prompt, **settings).images  # type: ignore[misc]

    @torch.no_grad()
    def _best_images(self, prompts: list[str], best_of: int, **settings: Any) -> Any:
        """Return the images of each prompt whose latents have the highest alignment score of `best_of`."""
        num_kept, output_type = settings.pop("num_images_per_prompt", 1), settings.pop("output_type", "pil")
        batch_size, indices = settings.setdefault("batch_size", IMAGE_BATCH), settings.pop("indices", None)
        self._check_generates(output_type, num_kept, batch_size)
        if best_of < num_kept or self.config.trained_for == "generation":
            raise ValueError(
                f"best_of: {best_of} needs a model that was trained for both tasks, and at least num_images_per_prompt "
                f"({num_kept}) images; use 1 to keep all images"
            )
        indices = range(len(prompts)) if indices is None else check_length("indices", indices, len(prompts))
        # The first of a prompt's images is the one that `best_of` 1 gives.
        names = [f"{index}/{number}" if number else str(index) for index in indices for number in range(best_of)]
        settings |= {"num_images_per_prompt": best_of, "indices": names, "output_type": "latent"}
        latents = self(prompts, **settings).images  # [N * best_of, C, h, w]
        rows = [slice(start, start + batch_size) for start in range(0, len(latents), batch_size)]
        queries = torch.cat([self.embed_latent(latents[r], names[r], num_steps=1, num_draws=RANKING_DRAWS) for r in rows])
        texts = self.embed_text(prompts).float()[:, :, None]  # [N, D, 1]
        scores = (queries.float().unflatten(0, (len(prompts), best_of)) @ texts).squeeze(2)  # [N, best_of]
        best = latents.unflatten(0, scores.shape)[torch.arange(len(prompts))[:, None], scores.topk(num_kept).indices.cpu()]
        batches = best.flatten(0, 1).split(batch_size)
        return join([decode_as(self.autoencoder, part, output_type) for part in batches], output_type)

    def _check_generates(self, output_type: str, num_images_per_prompt: int, batch_size: int) -> None:
        if num_images_per_prompt < 1 or batch_size < 1:
            raise ValueError(f"num_images_per_prompt, batch_size: {num_images_per_prompt}, {batch_size}; use at least 1")
        if self.config.trained_for in ("alignment", "clip"):
            raise ValueError(f"this model was trained for {self.config.trained_for} alone: it cannot generate images")
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type: {output_type!r} is unknown; use {', '.join(get_args(OutputType))}")

    def _paired_prompts(
        self, prompt: TextInput, negative_prompt: TextInput | None, num_images_per_prompt: int
    ) -> tuple[list[str], list[str]]:
        """Return the prompt and the negative prompt of each image."""
        texts, negative = as_texts(prompt, "prompt"), as_texts(negative_prompt or "", "negative_prompt")
        negative = negative * len(texts) if len(negative) == 1 else check_length("negative_prompt", negative, len(texts))
        self.warn_about_long_captions([*dict.fromkeys(texts), *dict.fromkeys(negative)])
        prompts, negative = ([text for text in part for _ in range(num_images_per_prompt)] for part in (texts, negative))
        return prompts, negative

    def _on_step(self, bar: Any, callback: StepCallback | None, index: int, t: int, latents: torch.Tensor) -> torch.Tensor:
        bar.update()
        return callback(self, index, t, {"latents": latents})["latents"] if callback else latents

    def _sample(
        self,
        latents: torch.Tensor,
        prompts: Sequence[str],
        negative: Sequence[str],
        guidance_scale: float,
        num_steps: int,
        generators: torch.Generator | list[torch.Generator],
        on_step: Callable[[int, int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Denoise latents [B, C, h, w] with the pipeline's scheduler."""
        latents = latents.to(self.device, torch.float32)
        token_states, _ = self.text_encoder.encode(prompts, self.device)  # [B, L, D_c]
        if len(set(negative)) == 1:
            null_states = self.text_encoder.encode(negative[:1], self.device)[0].expand_as(token_states)
        else:
            null_states, _ = self.text_encoder.encode(negative, self.device)

        def predict(latents: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
            """Return the guided noise, v or x_0, [B, C, h, w]."""
            timesteps = torch.as_tensor(timestep, device=self.device).expand(len(latents))
            out = self.model.predict_image(latents, timesteps, token_states)
            if guidance_scale != 1.0:
                uncond = self.model.predict_image(latents, timesteps, null_states)
                out = uncond + guidance_scale * (out - uncond)
            return out

        if self._scheduler is self._ddim:
            return schedule.sample_ddim(predict, latents, num_steps, self.config.schedule, self.model.alphas_cumprod, on_step)
        return schedule.sample(predict, latents, num_steps, self._scheduler, generators, on_step)

    # --- alignment -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_image(
        self,
        images: ImagesInput,
        *,
        keys: Sequence[str] | None = None,
        num_steps: int = 10,
        num_draws: int = 1,
        guidance: float = 0.0,
        batch_size: int = IMAGE_BATCH,
    ) -> torch.Tensor:
        """Denoise the text query of each image from pure noise (Algorithm 3). Returns [B, D], unit norm.

        A model of the `clip` task embeds the image directly and ignores `num_steps`, `num_draws` and `guidance`.

        Args:
            images: one or B images; see `diffdis.images.ImageInput`.
            keys: the noise of an image depends on its key (by default a digest of its pixels), never on its index in the batch.
            num_steps: number of denoising steps.
            num_draws: number of noise samples per image, whose queries are averaged.
            guidance: the paper's w, over the image condition; the model must be trained with image_dropout.
            batch_size: images at a time.

        Raises:
            ValueError: wrong images, or guidance for a model that was trained with image_dropout = 0.
        """
        if guidance and not self.config.image_dropout:
            raise ValueError(
                f"guidance: {guidance:g}, but the model was trained with image_dropout = 0 and cannot do without an image; use 0"
            )
        given = as_image_list(images)
        keys = keys if keys is None else check_length("keys", keys, len(given))
        queries = []
        for start in range(0, len(given), batch_size):
            pixels = self.preprocess(given[start : start + batch_size])
            named = keys[start : start + batch_size] if keys else [hashlib.sha256(p.tobytes()).hexdigest() for p in pixels]
            latent = to_latents(self.autoencoder, pixels, self.device)
            queries.append(self.embed_latent(latent, named, num_steps, num_draws, guidance))
        return torch.cat(queries)

    @torch.no_grad()
    def embed_latent(
        self, latent: torch.Tensor, keys: Sequence[str], num_steps: int = 10, num_draws: int = 1, guidance: float = 0.0
    ) -> torch.Tensor:
        """Embed latents [B, C, H, W] as `embed_image` does. Raises ValueError for a model that was trained to generate alone."""
        if self.config.trained_for == "generation":
            raise ValueError("this model was trained for generation alone: it cannot tell which text belongs to an image")
        null_states, _ = self.text_encoder.encode([""], self.device)  # [1, L, D_c]
        if self.config.trained_for == "clip":
            return self.model.clip_image_embedding(latent, null_states)
        condition = self.model.encode_condition(latent, null_states)
        masked = self.model.encode_condition(torch.zeros_like(latent), null_states) if guidance else None
        width = self.config.text_encoder.embedding_dim
        queries = []
        # One sample at a time under the joint mask, where a query changes the image's tokens; all at once under one-way.
        chunk = num_draws if self.config.query_visibility == "one_way" else 1
        for start in range(0, num_draws, chunk):
            samples = range(start, start + chunk)
            noise = [torch.stack([named_noise(f"embed/{key}/{sample}", (width,)) for sample in samples]) for key in keys]
            queries.append(self._denoise_query(condition, masked, torch.stack(noise).to(self.device), num_steps, guidance))
        return F.normalize(torch.cat(queries, dim=1).mean(dim=1), dim=-1)

    def _denoise_query(
        self, condition: ImageCondition, masked: ImageCondition | None, e_t: torch.Tensor, num_steps: int, guidance: float
    ) -> torch.Tensor:
        """Denoise e_T [B, n, D] to unit-norm queries [B, n, D]. `masked`: the condition without an image, for guidance."""
        gamma, length = self.config.gamma, e_t.shape[-1] ** 0.5
        e0 = e_t
        for t, abar, abar_prev in schedule.query_steps(self.model.alphas_cumprod, num_steps):
            timestep = torch.full((1, 1), t, device=self.device)  # the same for all
            e0 = self.model.predict_query(condition, e_t, timestep)
            if masked is not None:
                uncond = self.model.predict_query(masked, e_t, timestep)
                e0 = F.normalize((1 + guidance) * e0 - guidance * uncond, dim=-1)
            e_t = schedule.ddim_step(e_t, length * e0, abar, abar_prev, gamma)
        return e0

    @torch.no_grad()
    def embed_text(self, captions: TextInput, batch_size: int = TEXT_BATCH) -> torch.Tensor:
        """Return the text queries of one or N captions, [N, D], unit norm."""
        captions = as_texts(captions, "captions")
        self.warn_about_long_captions(captions)
        parts = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)]
        return torch.cat([self.text_encoder.encode(part, self.device)[1] for part in parts])

    def embed_classes(self, class_names: TextInput, templates: TextInput = ("{c}",)) -> torch.Tensor:
        """Return the normalized mean over the templates of each class, [num_classes, D]; "{c}" is the class name.

        The embeddings of the last sets of classes are kept, as text encoder and templates do not change between images.
        """
        key = tuple(as_texts(class_names, "class_names")), tuple(as_texts(templates, "templates"))
        if key not in self._classes:
            self._classes[key] = class_embeddings(self.embed_text, *key)
            if len(self._classes) > _CLASS_CACHE:
                self._classes.popitem(last=False)
        return self._classes[key]

    def classify(
        self,
        images: ImagesInput,
        class_names: TextInput,
        templates: TextInput = ("{c}",),
        **settings: Unpack[EmbedSettings],
    ) -> torch.Tensor:
        """Return probabilities over `class_names`, [B, num_classes]. `settings`: arguments of `embed_image`."""
        classes = self.embed_classes(class_names, templates)
        embedded = self.embed_image(images, **settings)
        return (embedded @ classes.T * self.model.temperature().float()).softmax(dim=-1).detach()

    def rank_captions(self, images: ImagesInput, captions: TextInput, **settings: Unpack[EmbedSettings]) -> torch.Tensor:
        """Return the indices of N `captions` for each image, best first, [B, N]. `settings`: arguments of `embed_image`."""
        texts = self.embed_text(captions)
        return (self.embed_image(images, **settings) @ texts.T).argsort(dim=-1, descending=True)

    def rank(self, images: ImagesInput, captions: TextInput, **settings: Unpack[EmbedSettings]) -> torch.Tensor:
        """Deprecated: use `rank_captions`."""
        warnings.warn("DiffDisPipeline.rank is deprecated; use rank_captions", DeprecationWarning, stacklevel=2)
        return self.rank_captions(images, captions, **settings)

    def pixels(self, images: ImagesInput) -> np.ndarray:
        """Deprecated: use `preprocess`."""
        warnings.warn("DiffDisPipeline.pixels is deprecated; use preprocess", DeprecationWarning, stacklevel=2)
        return self.preprocess(images)

    def preprocess(self, images: ImagesInput) -> np.ndarray:
        """Return images as the model takes them, [B, S, S, 3] uint8; see `diffdis.images.preprocess`."""
        return preprocess(as_image_list(images), self.config.image_size)

    def warn_about_long_captions(self, captions: Sequence[str]) -> None:
        """Warn once for captions of more tokens than the text encoder takes; the rest of such a caption has no effect."""
        if long := self.text_encoder.truncated(captions):
            warnings.warn(
                f"{len(long)} of {len(captions)} captions have more than {self.config.text_encoder.max_length} tokens and are "
                f"cut, such as {long[0][:80]!r}",
                stacklevel=4,
            )

    # --- folders ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, training: export_folder.Training | None = None) -> None:
        """Write unet/ vae/ text_encoder/ tokenizer/ scheduler/ for diffusers and transformers, alignment/, diffdis.json and a
        model card. `training`: what the card reports about the training."""
        export_folder.save(Path(folder), self.config, self.model, self.autoencoder, self.text_encoder, self._ddim, training)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None, variant: str | None = None
    ) -> "DiffDisPipeline":
        """Open a folder that `save_pretrained` wrote, or a repository of the hub with its content.

        Args:
            folder: the folder.
            torch_dtype: of all weights; float32 by default.
            variant: of the weight files, such as fp16; by default those without one, if there are any.

        Raises:
            FileNotFoundError: the folder is not an exported model.
            ValueError: it is damaged, or contains more than tensors.
        """
        return cls(*export_folder.load(str(folder), variant)).to(dtype=torch_dtype)
