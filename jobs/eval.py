"""Evaluate a model: `ray job submit --working-dir . -- python jobs/eval.py --checkpoint … --data_roots … --output_dir …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("eval")
