"""A run from and to S3 whose server is away for a while, in a process of its own: `python s3_run.py <folder> <seconds away>`."""

import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

from ray_platform import storage
from ray_platform.tracking import TrackingConfig
from ray_platform.train import checkpoint_format
from tests.end_to_end.conftest import write_shards
from tests.end_to_end.test_faults import make_run, records, wait_for_steps
from tests.support.s3_server import S3Server


def main():
    folder, away = Path(sys.argv[1]), float(sys.argv[2])
    server = S3Server(folder / "s3")
    server.start()
    os.environ.update(server.environment)
    storage.put_folder(write_shards(folder / "shards", num_shards=8, samples_a_shard=60), "s3://tests/shards")
    paths = os.pathsep.join(sys.path)
    ray.init(
        address="local", num_cpus=4, object_store_memory=2**29, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths} | server.environment},
    )  # fmt: skip
    run = make_run(
        folder, "s3://tests/shards", output_dir="s3://tests/run", tracking=TrackingConfig(f"sqlite:///{folder}/mlflow.db")
    )

    def break_off():
        wait_for_steps(folder, 60)
        server.stop()
        time.sleep(away)
        server.start()

    threading.Thread(target=break_off, daemon=True).start()
    run.fit()
    newest = checkpoint_format.list_checkpoints("s3://tests/run")[0]
    done = len(records(folder, run).trained_on())
    print(f"{done} of {2 * run.train.num_steps} rank steps, {records(folder).count()} in all, newest {newest.rsplit('/', 1)[1]}")
    assert dict(checkpoint_format.read_weights(newest, "ema"))
    assert storage.exists("s3://tests/run/export/model.safetensors")
    ray.shutdown()
    server.stop()


if __name__ == "__main__":
    main()
