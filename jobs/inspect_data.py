"""Inspect shards: `ray job submit --working-dir . -- python jobs/inspect_data.py --data.sources … --output_dir …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("inspect")
