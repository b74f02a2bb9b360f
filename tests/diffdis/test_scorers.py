"""A CLIP in transformers' layout gets the same scores as from CLIP_benchmark."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

from diffdis.metrics.retrieval import RetrievalRanks
from diffdis.metrics.zero_shot import ZeroShotScores
from diffdis.scorers import ClipScorer
from tests.diffdis.metrics.peers import clip_transform, zeroshot_classification
from tests.support.tiny_checkpoints import (
    save_clip,
    save_clip_text_encoder,
    save_gemma_tokenizer,
    save_siglip,
    save_siglip_tokenizer,
)

CLASSES = ["cat", "grey horse", "tree", "star", "boat", "red heart", "old house"]
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clips") / "tiny-clip")


@pytest.fixture(scope="module")
def scorer(folder):
    return ClipScorer(folder)


def pictures(num, seed=0):
    """Return images of various sizes and shapes with different colors and frequencies."""
    random = np.random.default_rng(seed)
    for _ in range(num):
        height, width = random.integers(20, 90, 2)
        waves = np.sin(np.outer(np.linspace(0, random.uniform(1, 30), height), np.linspace(0, random.uniform(1, 30), width)))
        image = 128 + 90 * waves[:, :, None] * random.uniform(-1, 1, 3) + random.normal(0, 15, (height, width, 3))
        yield image.clip(0, 255).astype(np.uint8)


def their_parts(folder):
    """Return the inputs of CLIP_benchmark: a model with two methods, a tokenizer and a transform."""
    model, tokenizer = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]

    def pixels(images):
        return torch.stack([clip_transform(Image.fromarray(image), 32) for image in images])

    encoders = SimpleNamespace(
        encode_image=lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        encode_text=lambda tokens: model.get_text_features(input_ids=tokens).pooler_output,
    )
    return encoders, tokenize, pixels


class Batches(list):
    dataset = SimpleNamespace(classes=CLASSES)


def embedded(scorer, images, batch_size):
    prepared = np.stack([scorer.preprocess(image) for image in images])
    keys = [str(place) for place in range(len(images))]
    batches = range(0, len(images), batch_size)
    return np.concatenate([scorer.embed_images(prepared[i : i + batch_size], keys[i : i + batch_size]) for i in batches])


@pytest.mark.parametrize("resize", ["torch", "pillow"])
def test_zero_shot_equals_clip_benchmark(folder, resize):
    scorer = ClipScorer(folder, resize=resize)
    images, labels = list(pictures(200)), np.random.default_rng(1).integers(0, len(CLASSES), 200)
    model, tokenize, pixels = their_parts(folder)
    batches = Batches((pixels(images[i : i + 32]), torch.from_numpy(labels[i : i + 32])) for i in range(0, 200, 32))
    expected = zeroshot_classification.evaluate(model, batches, tokenize, CLASSES, TEMPLATES, "cpu", amp=False)
    scores = ZeroShotScores.from_embeddings(embedded(scorer, images, 24), scorer.embed_classes(CLASSES, TEMPLATES), labels)
    assert scores.metrics == expected
    assert len(np.unique(scores.predictions[:, 0])) > 3  # predictions are not all the same class


def test_retrieval_equals_clip_benchmark(folder, scorer):
    images = list(pictures(60, seed=2))
    counts = np.random.default_rng(0).integers(1, 6, 60)
    captions = [[f"{CLASSES[(i + j) % 7]} {i} of {j}" for j in range(count)] for i, count in enumerate(counts)]
    model, tokenize, pixels = their_parts(folder)
    batches = [(pixels(images[i : i + 16]), captions[i : i + 16]) for i in range(0, 60, 16)]
    expected = zeroshot_retrieval.evaluate(model, batches, tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    texts = scorer.embed_texts([text for some in captions for text in some])
    found = RetrievalRanks.of(embedded(scorer, images, 25), texts, np.repeat(np.arange(60), counts)).recalls()
    assert {name: np.float32(value) for name, value in found.items()} == expected


@pytest.mark.parametrize(
    ("size", "resample"), [({"shortest_edge": 40}, 2), ({"height": 33, "width": 37}, 3), ({"shortest_edge": 25}, 3)]
)
def test_pixels_are_those_of_the_folders_processor(tmp_path, size, resample):
    """Covers settings of the folder: other sizes (also smaller than the crop, which pads), filters and means."""
    folder = save_clip(tmp_path)
    processor = CLIPImageProcessorPil(
        size=size, crop_size={"height": 32, "width": 32}, resample=resample, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    scorer = ClipScorer(folder, resize="pillow")
    # Without those of which transformers crops another part than torchvision.
    images = [image for image in pictures(8) if int(40 * max(image.shape) / min(image.shape[:2])) % 4 != 3]
    images += [np.zeros((3, 50, 3), dtype=np.uint8) + 7]  # a height of 3 pixels must not be mistaken for channels
    prepared = np.stack([scorer.preprocess(image) for image in images])
    assert prepared.dtype == np.uint8
    seen = []
    scorer._model.vision_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["pixel_values"]), with_kwargs=True
    )
    scorer.embed_images(prepared, ["key"] * len(images), num_steps=3)
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", ["torch", "pillow"])
@pytest.mark.parametrize("is_wide", [True, False])
def test_the_crop_is_that_of_published_scores(folder, resize, is_wide):
    """torchvision rounds half a pixel to the even number: of 35 pixels, it drops 2 on the left and 1 on the right."""
    scorer, starts = ClipScorer(folder, resize=resize), []
    for extra in range(8):
        ramp = np.broadcast_to(np.arange(32 + extra, dtype=np.uint8)[None, :, None], (32, 32 + extra, 3))
        pixels = scorer.preprocess(np.ascontiguousarray(ramp if is_wide else ramp.swapaxes(0, 1)))
        starts.append(int(pixels[0, 0, 0]))
    assert starts == [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("shape", [(60, 90), (91, 60), (32, 32), (20, 70), (333, 500)])
@pytest.mark.parametrize("resample", [2, 3])
def test_torch_resizes_like_pillow(folder, tmp_path, shape, resample):
    own = save_clip(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=resample).save_pretrained(
        own
    )
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC))
    by_torch, by_pillow = (ClipScorer(own, resize=resize).preprocess(image).astype(int) for resize in ("torch", "pillow"))
    assert np.abs(by_torch - by_pillow).max() <= 1
    assert (by_torch == by_pillow).mean() > 0.97


@pytest.mark.parametrize("resize", ["torch", "pillow"])
@pytest.mark.parametrize("shape", [(60_000, 1), (1, 60_000), (2, 30_000)])
def test_an_image_of_extreme_shape_takes_bounded_memory(scorer, folder, shape, resize):
    """The whole of a 1 x 60,000 image, resized to 224 pixels on its shorter side, would have 9 GB."""
    scorer = ClipScorer(folder, resize=resize)
    ramp = np.linspace(0, 255, max(shape)).astype(np.uint8)
    image = np.broadcast_to(ramp[:, None] if shape[0] > shape[1] else ramp[None], shape)[..., None].repeat(3, axis=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = scorer.preprocess(image)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024  # KiB
    assert pixels.shape == (32, 32, 3)
    assert set(np.unique(pixels)) <= {127, 128}, "the center of the ramp"


def test_threads_prepare_alike_and_batches_do_not_matter(scorer):
    images = list(pictures(40))
    one_by_one = [scorer.preprocess(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(a, b) for a, b in zip(pool.map(scorer.preprocess, images), one_by_one, strict=True))
    found = embedded(scorer, images, 40)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(embedded(scorer, images, 7), found, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_allclose(embedded(scorer, images, 40), found, atol=1e-6)


def test_texts_of_any_number_and_length(scorer, monkeypatch):
    monkeypatch.setattr("diffdis.scorers.TEXT_BATCH_SIZE", 3)
    texts = ["cat", "cat", "x" * 500, "", "a tree", "star", "boat"]
    found = scorer.embed_texts(texts)
    assert found.shape == (7, 32)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[4]).max() > 0.01
    np.testing.assert_allclose(scorer.embed_texts(["x" * 600])[0], found[2], atol=1e-6)  # truncated to 77 tokens
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)


def test_without_a_preprocessor_config_clips_own(tmp_path):
    folder = save_clip(tmp_path, image_size=48)
    given = ClipScorer(folder)
    image = next(pictures(1))
    expected = given.preprocess(image), given.embed_images(given.preprocess(image)[None], ["key"])
    (folder / "preprocessor_config.json").unlink()
    scorer = ClipScorer(folder)
    assert np.array_equal(scorer.preprocess(image), expected[0])
    assert np.array_equal(scorer.embed_images(expected[0][None], ["key"]), expected[1])


def test_folders_that_hold_no_clip(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        ClipScorer(tmp_path)
    save_clip_text_encoder(tmp_path / "text", tmp_path / "text", projection=True)
    with pytest.raises(ValueError, match="model_type clip_text_model, not clip"):
        ClipScorer(tmp_path / "text")
    folder = save_clip(tmp_path / "clip")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | {"crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(ValueError, match=r"produces images of 24 x 24, but the model takes 32 x 32"):
        ClipScorer(folder)


@pytest.mark.parametrize("tokenizer", [save_siglip_tokenizer, save_gemma_tokenizer])
def test_a_siglip_gives_what_transformers_gives(tmp_path, tokenizer):
    """Images are resized to a square without a crop, and texts padded to the length of the training."""
    folder = save_siglip(tmp_path / "siglip", tokenizer=tokenizer)
    scorer, model = ClipScorer(folder), SiglipModel.from_pretrained(folder)
    images, texts = list(pictures(5)), ["a", "a photo of a cat", "a very long text that is cut"]
    processor, tokenizer = SiglipImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pixels = torch.from_numpy(np.stack(processor(images)["pixel_values"]))
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = [model.get_image_features(pixels).pooler_output, model.get_text_features(tokens).pooler_output]
    found = [scorer.embed_images(np.stack([scorer.preprocess(image) for image in images])), scorer.embed_texts(texts)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, torch.nn.functional.normalize(other, dim=-1).numpy(), atol=1e-6)
    assert scorer.preprocessing == "preprocessor_config.json, bicubic, to 32 px"


@pytest.mark.parametrize("tokenizer", [save_siglip_tokenizer, save_gemma_tokenizer])
def test_case_and_punctuation_of_a_text_are_nothing_to_a_siglip(tmp_path, tokenizer):
    """SigLIP 2 has Gemma's tokenizer, which keeps both, and was published with texts like those of SigLIP's own tokenizer."""
    folder = save_siglip(tmp_path / "siglip", tokenizer=tokenizer)
    texts, expected = ["A Cat.", " an  OX,\ta 'b'!", "red_fox"], ["a cat", "an ox a b", "red fox"]
    scorer, reference = ClipScorer(folder), AutoTokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(scorer.embed_texts(texts), scorer.embed_texts(expected))
    is_own = tokenizer is save_siglip_tokenizer
    assert (reference(texts[:2])["input_ids"] == reference(expected[:2])["input_ids"]) == is_own
