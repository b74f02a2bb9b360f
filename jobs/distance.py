"""Compare two existing sets of images: `python jobs/distance.py --generated DIR --reference DIR …`; as `diffdis distance`."""

from _bootstrap import run

if __name__ == "__main__":
    run("distance")
