"""Build the demo's data: `python jobs/build_demo_shards.py`; the same as `diffdis build-demo-shards`."""

from _bootstrap import run

if __name__ == "__main__":
    run("build-demo-shards")
