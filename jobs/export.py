"""Write the model of a checkpoint: `python jobs/export.py --checkpoint … --output_dir …`; the same as `diffdis export`."""

from _bootstrap import run

if __name__ == "__main__":
    run("export")
