"""Predict the size of a run: `python jobs/sizing.py --recipe sd_v1_laion --num_gpus 64`; the same as `diffdis sizing`."""

from _bootstrap import run

if __name__ == "__main__":
    run("sizing")
