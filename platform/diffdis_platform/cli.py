"""The command `diffdis`: runs one of the commands, and turns errors into one line and an exit status."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from diffdis_platform import __version__
from ray_platform.contracts import UserError

COMMANDS = {
    "pretrain": "pretrain a model on image-text shards",
    "eval": "measure zero-shot accuracy, retrieval and image quality",
    "distance": "measure FID and other distances between two folders of images",
    "generate": "generate images from captions",
    "export": "write the model of a checkpoint as a pipeline folder",
    "inspect": "inspect shards: counts, sizes, rejected samples, time of an epoch",
    "precompute": "encode images and captions once, for many epochs and runs",
    "sweep": "search hyperparameters with Ray Tune",
    "compare": "train and evaluate the joint model and its baselines on equal data",
    "deliver": "deliver a run's metrics to MLflow after an outage",
    "sizing": "predict throughput, memory, storage and cost of a run",
    "build-demo-shards": "build the demo's shards and evaluation sets",
    "demo": "build the demo's data, pretrain on it, and report the results",
}
# Names that users try -> the command that they mean.
SYNONYMS = {"train": "pretrain", "evaluate": "eval", "test": "eval", "sample": "generate", "fid": "distance", "tune": "sweep"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `diffdis COMMAND ...` and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        print(f"diffdis {__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<19}{text}" for name, text in COMMANDS.items()]
        print("\n".join(["usage: diffdis COMMAND [options]", "", *lines, "", "`diffdis COMMAND --help` explains its options."]))
        return 0
    if arguments[0] not in COMMANDS:
        word = arguments[0].replace("_", "-")
        near = SYNONYMS.get(word) or next(iter(difflib.get_close_matches(word, COMMANDS, n=1)), "")
        advice = f"did you mean {near}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"error: {arguments[0]}: no such command; {advice}", file=sys.stderr)
        return 2
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command and return the exit status: 0, or 1 after an error or an interrupt was reported in one line."""
    command = importlib.import_module(f"diffdis_platform.commands.{name.replace('-', '_')}")
    try:
        return command.main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(getattr(command, "INTERRUPTED", "stopped"), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
