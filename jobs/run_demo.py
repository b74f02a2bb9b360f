"""Run the whole demo: `make demo`; the same as `diffdis demo`."""

from _bootstrap import run

if __name__ == "__main__":
    run("demo")
