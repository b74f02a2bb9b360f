"""The command lines of jobs/export.py and jobs/generate.py; what they make is in tests/end_to_end/test_train.py."""

import pytest

from diffdis_platform.config import export, generate
from ray_platform.contracts import ConfigError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "/x"], "checkpoint: give a step_"),
        (["--checkpoint", "/none", "--output_dir", "x"], "output_dir: x; give an absolute"),
        (["--checkpoint", "/none", "--output_dir", "/x", "--weights", "all"], "weights"),
        (["--checkpoint", "/none", "--output_dir", "/x"], "checkpoint: /none is no complete checkpoint, and no run that has one"),
    ],
)
def test_bad_fields_of_export_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        export.parse(arguments).find()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "/x", "--captions", "a"], "model: give the folder"),
        (["--model", "/m", "--output_dir", "/x"], "captions: give some, or a captions_file"),
        (["--model", "/m", "--output_dir", "/x", "--captions", "a", "--captions_file", "/y"], "not both"),
        (["--model", "/m", "--output_dir", "/x", "--captions", "a", "--num_steps", "0"], "num_steps and batch_size"),
        (["--model", "/m", "--output_dir", "/x", "--caption", "a"], r"--caption: no such field; did you mean --captions\?"),
    ],
)
def test_bad_fields_of_generate_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        generate.parse(arguments)
    assert "\n" not in str(raised.value)


def test_captions_come_from_the_line_or_from_a_file(tmp_path):
    base = ["--model", "/m", "--output_dir", "/x"]
    assert generate.parse([*base, "--captions", '["a cat", "a dog"]']).all_captions() == ["a cat", "a dog"]
    assert generate.parse([*base, "--captions", "a cat"]).all_captions() == ["a cat"]
    (tmp_path / "captions.txt").write_text("a cat\n\n a dog \n")
    assert generate.parse([*base, "--captions_file", str(tmp_path / "captions.txt")]).all_captions() == ["a cat", "a dog"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no caption"):
        generate.parse([*base, "--captions_file", str(tmp_path / "empty.txt")]).all_captions()
