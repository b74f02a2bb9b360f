"""Pretrain DiffDis: `ray job submit --working-dir . -- python jobs/pretrain.py --recipe demo --output_dir … --data.sources …`."""

from _bootstrap import run

if __name__ == "__main__":
    run("pretrain")
