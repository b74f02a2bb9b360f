"""`diffdis sizing`: predict throughput, memory, storage and cost of a run, without data, weights or a cluster."""

import functools
import json
from collections.abc import Sequence

from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sizing import SizingConfig
from diffdis_platform.recipes import recipes_of


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[SizingConfig]:
    names = sorted(recipes_of(PretrainConfig), key=lambda name: name != "sd_v1_laion")  # the first is the default
    recipes = {name: functools.partial(_from_recipe, name) for name in names}
    description = "Predict throughput, memory, storage and cost of a run."
    return parse(SizingConfig, argv, command="sizing", description=description, recipes=recipes)


def _from_recipe(name: str) -> SizingConfig:
    return SizingConfig(pretrain=recipes_of(PretrainConfig)[name]())


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    from diffdis_platform.sizing.estimate import as_json, estimate
    from diffdis_platform.sizing.tables import report

    counts, estimates = estimate(config)
    print(report(config, counts, estimates))
    print(json.dumps(as_json(config, counts, estimates)))
    return 0
