"""Terminal output: aligned tables and one-line errors."""

import io
import re

import pytest

from ray_platform.contracts import ConfigError, describe_error, one_line
from ray_platform.terminal import ProgressBar, render_table, show_output


def test_text_is_left_aligned_and_numbers_are_right_aligned():
    lines = render_table([["set", "acc1", "note"], ["cifar10", "9.5%", ""], ["pets", "-", "missing"]]).splitlines()
    assert lines == ["set      acc1  note", "cifar10  9.5%", "pets        -  missing"]


@pytest.mark.parametrize(
    ("error", "line", "described"),
    [
        (ConfigError("train.seed: two\nlines"), "train.seed: two lines", "train.seed: two lines"),
        (ValueError("two\n lines"), "two lines", "ValueError: two lines"),
        (KeyError(), "KeyError", "KeyError"),
        (RecursionError("maximum"), "nested too deeply", "RecursionError: nested too deeply"),
    ],
)
def test_errors_are_one_line(error, line, described):
    assert (one_line(error), describe_error(error)) == (line, described)


def test_secrets_are_hidden_and_long_errors_are_shortened():
    assert "hunter2hunter2" not in one_line(ConfigError("s3://key:hunter2hunter2@bucket/x"))
    assert len(one_line(ValueError("x" * 900), 100)) == 100
    assert len(describe_error(ValueError("x" * 900))) < 600


OUTPUT = """\
Job submission server address: http://127.0.0.1:20000
-------------------------------------------------------
Job 'diffdis-0123456789ab' submitted successfully
Next steps
  Query the logs of the job:
    ray job logs diffdis-0123456789ab
2026-11-30 01:00:00,100\tSUCC cli.py:66 -- \x1b[32m-----------------------\x1b[39m
Running entrypoint for job diffdis-0123456789ab: python jobs/pretrain.py
2026-11-30 01:00:00,123\tINFO worker.py:2000 -- Connecting to existing Ray cluster
\x1b[36m(RayTrainWorker pid=41)\x1b[0m [2026-11-30 01:00:01,123] [WARNING] [engine.py:2304] **** proceed with caution *****
Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'
wandb: Adding directory to artifact (/tmp/run/export)...
Done. 5.1s
(RayTrainWorker pid=41) /x/site-packages/diffusers/a.py:12: UserWarning: slow
(RayTrainWorker pid=41)   model.load()

(run_trial pid=43) step 3/9  loss_generation 1.90
\x1b[36m(RayTrainWorker pid=41)\x1b[0m training from the beginning: 2 workers
step 10/40  loss_generation 1.20  90 samples/s  left 20.0 s
step 20/40  loss_generation 1.10  91 samples/s  left 13.2 s
step 40/40  loss_generation 1.00  90 samples/s  left 0.0 s
units 1/3  40%

set      acc1
cifar10  9.5%

error: output_dir: it is in use
"""


def test_the_output_of_a_job_is_shown_without_that_of_the_libraries_and_with_few_lines_of_progress(capsys):
    log = io.StringIO()
    show_output(OUTPUT.splitlines(keepends=True), log)
    assert log.getvalue() == OUTPUT
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "training from the beginning: 2 workers",
        "step 10/40  loss_generation 1.20  90 samples/s  left 20.0 s",
        "step 40/40  loss_generation 1.00  90 samples/s  left 0.0 s",
        "set      acc1",
        "cifar10  9.5%",
        "",
    ]
    assert captured.err == "error: output_dir: it is in use\n"


def test_progress_is_a_line_from_time_to_time_and_at_the_end_of_a_stage(capsys):
    bar = ProgressBar(seconds_between_lines=1e9)
    for done in range(1, 4):
        bar.update("shards", done, 3, f"{10 * done} samples")
    bar.update("units", 1, 2)
    bar.update("units", 2, 2)
    assert capsys.readouterr().out.splitlines() == ["shards 1/3  10 samples", "shards 3/3  30 samples", "units 2/2"]


def test_the_progress_of_a_job_is_a_bar_in_a_terminal(monkeypatch, capsys):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_output(OUTPUT.splitlines(keepends=True), io.StringIO())
    shown = capsys.readouterr().out
    assert "100%" in shown
    assert re.search(r"100% .* step 40/40  loss_generation 1.00", shown)
    assert re.search(r"33% .* units 1/3  40%", shown), "a stage has its own bar"
