"""Search hyperparameters: `ray job submit --working-dir . -- python jobs/sweep.py --recipe demo_sweep --output_dir …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("sweep")
