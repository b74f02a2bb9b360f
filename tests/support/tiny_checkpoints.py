"""Small random checkpoints in common layouts: CLIP, its text model, a mean-pooled encoder, Stable Diffusion."""

import io
import json
import string
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    GemmaTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipTokenizer,
    SiglipVisionConfig,
)

WIDTH = 32
TRANSFORMER = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


SD_2 = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True}
V_PREDICTION = {"prediction_type": "v_prediction"}
SAMPLE = {"prediction_type": "sample"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def draw_query_weights(model) -> None:
    """Randomize a DiffDis model's zero-initialized weights, so that its queries depend on their noise like a trained model's."""
    for layer in [*(block.fc_in for block in model.stream.blocks), model.head.query_in]:
        layer.reset_parameters()


def save_tokenizer(folder: Path) -> int:
    """Save a character tokenizer with [CLS] and [SEP]. Returns the size of its vocabulary."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate(special + [chr(c) for c in range(32, 127)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return len(vocabulary)


def save_mean_pool_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=save_tokenizer(folder), max_position_embeddings=64, **TRANSFORMER)).save_pretrained(folder)
    return folder


def save_clip_tokenizer(folder: Path) -> CLIPTextConfig:
    """Save CLIP's tokenizer with a vocabulary of single letters. Returns the configuration of a matching small text model."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder, model_max_length=77)
    special = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    return CLIPTextConfig(vocab_size=len(tokens), projection_dim=WIDTH, **special, **TRANSFORMER)


def save_clip(folder: Path, image_size: int = 32, patch_size: int = 8) -> Path:
    """Save a complete CLIP for images of `image_size` pixels. Its weights are large enough for embeddings to differ."""
    torch.manual_seed(0)
    text = save_clip_tokenizer(folder)
    sizes = TRANSFORMER | {"num_hidden_layers": 2, "image_size": image_size, "patch_size": patch_size}
    vision = CLIPVisionConfig(projection_dim=WIDTH, **sizes)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)
    return folder


def save_siglip_tokenizer(folder: Path) -> int:
    """Save the tokenizer of SigLIP with a vocabulary of single characters. Returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    content, ids = io.BytesIO(), {"unk_id": 0, "eos_id": 1, "bos_id": -1, "pad_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([string.ascii_letters + string.digits + string.punctuation]),
        model_writer=content, model_type="char", vocab_size=200, hard_vocab_limit=False, minloglevel=2, **ids,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(content.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_gemma_tokenizer(folder: Path) -> int:
    """Save the tokenizer of SigLIP 2 with a vocabulary of single characters. Returns the size of its vocabulary."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    GemmaTokenizer(vocabulary, add_bos_token=False, add_eos_token=True, padding_side="right", do_lower_case=True).save_pretrained(
        folder
    )
    return len(tokens)


def save_siglip(folder: Path, image_size: int = 32, tokenizer: Callable[[Path], int] = save_siglip_tokenizer) -> Path:
    """Save a complete SigLIP: images are resized without a crop, and every text is padded to 16 tokens."""
    torch.manual_seed(0)
    text = SiglipTextConfig(vocab_size=tokenizer(folder), max_position_embeddings=16, projection_size=WIDTH, **TRANSFORMER)
    vision = SiglipVisionConfig(image_size=image_size, patch_size=8, **TRANSFORMER)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def save_clip_text_encoder(model_folder: Path, tokenizer_folder: Path, *, projection: bool) -> None:
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection if projection else CLIPTextModel
    model(save_clip_tokenizer(tokenizer_folder)).save_pretrained(model_folder)
    if not projection:  # transformers 5 saves it without the prefix that all published ones have
        file = model_folder / "model.safetensors"
        save_file({f"text_model.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})


def save_stable_diffusion(folder: Path, unet_options: dict | None = None, schedule: dict | None = None) -> Path:
    """Save unet/, vae/, text_encoder/, tokenizer/ and scheduler/ like SD v1 at a fraction of its size (16 px images).

    With the options `SD_2` and `V_PREDICTION`, the layout is that of SD 2.1.
    """
    torch.manual_seed(0)
    unet = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1}
    unet |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet |= {"cross_attention_dim": WIDTH, "attention_head_dim": 2, "norm_num_groups": 8}
    UNet2DConditionModel(**unet | (unet_options or {})).save_pretrained(folder / "unet")
    vae = {"sample_size": 16, "latent_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**vae).save_pretrained(folder / "vae")
    save_clip_text_encoder(folder / "text_encoder", folder / "tokenizer", projection=False)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    DDIMScheduler(**betas | {"set_alpha_to_one": False} | (schedule or {})).save_pretrained(folder / "scheduler")
    return folder
