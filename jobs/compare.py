"""Run the controlled comparison: `ray job submit --working-dir . -- python jobs/compare.py --output_dir …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("compare")
