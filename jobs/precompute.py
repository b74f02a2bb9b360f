"""Encode shards once: `ray job submit --working-dir . -- python jobs/precompute.py --data.sources … --output_dir …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("precompute")
