"""Generate images: `python jobs/generate.py --model … --captions … --output_dir …`; the same as `diffdis generate`."""

from _bootstrap import run

if __name__ == "__main__":
    run("generate")
