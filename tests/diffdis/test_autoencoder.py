import numpy as np
import pytest
import torch

from diffdis.autoencoder import DECODED_AT_ONCE, HaarAutoencoder, build_autoencoder, decode, decode_as, to_latents, to_uint8
from diffdis.config import AutoencoderConfig


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_is_orthonormal_and_inverts(levels):
    haar = HaarAutoencoder(levels)
    image = torch.randn(2, 3, 16, 16)
    latent = haar.encode_image(image)
    assert latent.shape == (2, 3 * 4**levels, 16 // 2**levels, 16 // 2**levels)
    torch.testing.assert_close(latent.square().sum(), image.square().sum())
    torch.testing.assert_close(haar.decode_latent(latent), image)


def test_scaled_haar_gives_back_every_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    mean, std = tuple(np.linspace(-1, 1, 12)), tuple(np.linspace(0.1, 2, 12))
    haar = HaarAutoencoder(1, mean, std)
    assert np.array_equal(to_uint8(decode(haar, to_latents(haar, images, "cpu"))), images)


def test_many_latents_are_decoded_in_parts_and_in_order(monkeypatch):
    haar, latents, sizes = HaarAutoencoder(1), torch.randn(2 * DECODED_AT_ONCE + 1, 12, 8, 8), []
    expected = (decode(haar, latents) + 1) / 2
    original = haar.decode_latent
    monkeypatch.setattr(haar, "decode_latent", lambda part: sizes.append(len(part)) or original(part))
    torch.testing.assert_close(decode_as(haar, latents, "pt"), expected)
    assert sizes == [DECODED_AT_ONCE, DECODED_AT_ONCE, 1]


def test_wrong_number_of_scales_is_named():
    with pytest.raises(ValueError, match=r"haar_std: 3 values for 12 channels"):
        HaarAutoencoder(1, (), (1.0, 1.0, 1.0))


def test_kl_without_a_path_or_with_a_wrong_one(tmp_path):
    with pytest.raises(ValueError, match=r"model\.autoencoder\.path"):
        build_autoencoder(AutoencoderConfig(kind="kl"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        build_autoencoder(AutoencoderConfig(kind="kl", path=str(tmp_path)))
