"""Recipes of `diffdis compare`."""

import dataclasses

from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.recipes.demo import DEMO_DATA, demo


def demo_compare(demo_data: str = str(DEMO_DATA)) -> CompareConfig:
    """The demo's model on the demo's data: `demo_data` is the folder that `diffdis build-demo-shards` filled; absolute or s3://."""
    demo_data = demo_data.rstrip("/")
    base, pairs = demo(), f"{demo_data}/wds_heldout_pairs"
    return CompareConfig(
        pretrain=dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, sources=(f"{demo_data}/train",)),
            train=dataclasses.replace(
                base.train,
                preview_every=0,
                heldout_sources=(f"{demo_data}/heldout_style",),
                heldout_every=80,
            ),
        ),
        evaluation=EvalConfig(
            suite="demo",
            data_roots=(demo_data,),
            scoring=ScoringConfig(num_steps=10, num_draws=8),
            quality=QualityConfig(prompts=pairs, reference=pairs, num_steps=20),
        ),
    )
