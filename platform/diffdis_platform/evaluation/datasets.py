"""The evaluation sets of a configuration. Imports neither torch nor Ray: a misspelled set is reported within seconds."""

from diffdis_platform.config.evaluate import EvalConfig, suite_sets
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.discovery import SetNotFoundError, find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import CLASSES_FILE, TEMPLATES_FILE, EvaluationSet, check_counts

OpenedSets = tuple[dict[str, EvaluationSet], dict[str, str]]  # by name: the sets, and the errors of those that are missing


def open_sets(config: EvalConfig) -> OpenedSets:
    """Return the sets of the suite, and an error per missing set, if missing sets are allowed.

    Prints their warnings. Raises ConfigError and DataError, also for a set that is short: before hours of work.
    """
    sets, missing, suite = {}, {}, suite_sets(config.suite)
    texts = {CLASSES_FILE: config.class_names, TEMPLATES_FILE: config.templates}
    overrides = {file: url for file, url in texts.items() if url}
    if overrides and len(suite) != 1:
        raise ConfigError(
            f"class_names and templates: for a suite of one set, but {config.suite} has {len(suite)}; name one set with --suite"
        )
    for name, url in suite.items():
        try:
            data = open_evaluation_set(name, url, overrides) if url else find_evaluation_set(config.data_roots, name, overrides)
        except SetNotFoundError as error:
            missing[name] = str(error)
            continue
        if overrides and data.task != "zeroshot_classification":
            raise ConfigError(f"class_names and templates: {name} is a set for retrieval, which has no classes; leave them out")
        if data.known_images is not None and not config.limit:
            check_counts(data, data.known_images, 0, config.allow_short)
        sets[name] = data
    for warning in (warning for data in sets.values() for warning in data.warnings):
        print(f"warning: {warning}", flush=True)
    if missing and not config.allow_missing:
        raise ConfigError(f"{'; '.join(missing.values())} (--allow_missing true evaluates the other sets)")
    if not sets and not config.quality.prompts:
        folders = ", ".join(config.data_roots) or "any data_roots"
        raise ConfigError(f"suite: none of the sets of {config.suite} is below {folders}; correct data_roots")
    return sets, missing
