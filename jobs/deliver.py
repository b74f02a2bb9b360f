"""Deliver a run's metrics after an outage of MLflow: `python jobs/deliver.py --output_dir DIR`; the same as `diffdis deliver`."""

from _bootstrap import run

if __name__ == "__main__":
    run("deliver")
