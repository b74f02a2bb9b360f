"""Terminal output: aligned tables and one-line errors."""

import pytest

from ray_platform.contracts import ConfigError, describe_error, one_line
from ray_platform.terminal import render_table


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
