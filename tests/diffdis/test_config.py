import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffdis.config import DiffDisConfig, ObjectiveConfig, UNetConfig, sd_v1, sd_v2, tiny
from diffdis.model import DiffDis
from diffdis.objective import Objective


def test_sd_v1_builds_at_full_size_on_the_meta_device():
    with torch.device("meta"):
        model = DiffDis(sd_v1())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["unet"] == 859_520_964  # the size of Stable Diffusion v1
    # Counted by hand, for width C and D = 768: a site is FC_in + FC_out + 2 norms + a GEGLU feed-forward of 4 C.
    site = {c: 768 * c + c + c * 768 + 768 + 4 * c + (c * 8 * c + 8 * c) + (4 * c * c + c) for c in (320, 640, 1280)}
    time = 2 * (768 * 768 + 768)
    assert count["stream"] == 2 * site[320] + 2 * site[640] + 2 * site[1280] + site[1280] + time
    w = 768
    block = 4 * w + 3 * w * w + (w * w + w) + (w * 8 * w + 8 * w) + (4 * w * w + w)
    assert count["head"] == 6 * block + 2 * 1280 + (1280 * w + w) + (768 * w + w) + 2 * w + (w * 768 + 768)
    assert count["temperature"] == 1


# unet/config.json of Stable Diffusion 2.0 and 2.1 base, without what diffusers has as default
SD_2_BASE = {
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 2,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}


def test_sd_v2_is_the_published_u_net_with_heads_of_width_64():
    with torch.device("meta"):
        published, ours = UNet2DConditionModel(**SD_2_BASE), DiffDis(sd_v2()).unet
    shapes = [{name: p.shape for name, p in unet.state_dict().items()} for unet in (published, ours)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 865_910_724  # the size of Stable Diffusion 2 base
    widths = [
        {part.inner_dim // part.heads for name, part in unet.named_modules() if name.endswith((".attn1", ".attn2"))}
        for unet in (published, ours)
    ]
    assert widths == [{64}, {64}]


@pytest.mark.parametrize("config", [tiny(query_visibility="joint"), sd_v2()])
def test_a_config_survives_json(config):
    assert DiffDisConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_key_is_ignored_with_a_warning_that_names_it(caplog):
    assert DiffDisConfig.from_dict({"unet": {"chanels": 3}}) == DiffDisConfig()
    assert "ignoring unknown fields of a model's configuration: unet.chanels" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": UNetConfig(sample_size=9)}, "unet.sample_size: 9 is not divisible by 8"),
        ({"image_size": 64}, "1 haar levels of 64 px need 12, 32"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_several_draws_need_the_one_way_mask():
    with pytest.raises(ValueError, match="num_draws"):
        Objective(DiffDis(tiny(query_visibility="joint")), ObjectiveConfig(num_draws=2))
