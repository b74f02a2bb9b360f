"""The arguments of `diffdis export` and `diffdis generate`; their results are tested in tests/end_to_end/test_train.py."""

import json

import pytest

from diffdis.config import ObjectiveConfig
from diffdis.task import DiffDisTask
from diffdis_platform.commands import export, generate
from diffdis_platform.exporting import find_checkpoint
from ray_platform.contracts import ConfigError

MODEL = ["--model", "/m", "--output_dir", "/x"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (export, ["--output_dir", "/x"], "checkpoint: give a step_"),
        (export, ["--checkpoint", "/none", "--output_dir", "x"], "output_dir: x; give an absolute"),
        (export, ["--checkpoint", "/none", "--output_dir", "/x", "--weights", "all"], "weights"),
        (generate, ["--output_dir", "/x", "--captions", "a"], "model: give the folder"),
        (generate, MODEL, "captions: give captions or captions_file"),
        (generate, [*MODEL, "--captions", "a", "--captions_file", "/y"], "not both"),
        (generate, [*MODEL, "--captions", "a", "--num_steps", "0"], "num_steps, batch_size"),
        (generate, [*MODEL, "--caption", "a"], r"--caption: no such field; did you mean --captions"),
    ],
)
def test_bad_fields_are_one_line(command, arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        command.parse_arguments(arguments)
    assert "\n" not in str(raised.value)


def test_a_missing_checkpoint_is_one_line():
    with pytest.raises(ConfigError, match="checkpoint: /none is not a complete checkpoint"):
        find_checkpoint("/none")


def test_captions_come_from_the_line_or_from_a_file(tmp_path):
    def captions(*arguments):
        return generate.parse_arguments([*MODEL, *arguments]).config.all_captions()

    assert captions("--captions", '["a cat", "a dog"]') == captions("--captions", "a cat", "a dog") == ["a cat", "a dog"]
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n\n a dog \n")
    assert captions("--captions_file", str(file)) == ["a cat", "a dog"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no caption"):
        captions("--captions_file", str(file))


def test_images_are_generated_from_the_folder_of_a_run(tiny_model, tmp_path):
    task = DiffDisTask(tiny_model, ObjectiveConfig())
    task.save_pretrained(task.module.state_dict(), tmp_path / "run" / "export")
    arguments = ["--model", str(tmp_path / "run"), "--captions", "red heart", "blue car", "--num_images_per_prompt", "2"]
    arguments += ["--num_steps", "1", "--negative_prompt", "gray", "--scheduler", "EulerDiscreteScheduler"]
    assert generate.main([*arguments, "--output_dir", str(tmp_path / "images")]) == 0
    captions = json.loads((tmp_path / "images" / "captions.json").read_text())
    assert list(captions.values()) == ["red heart", "red heart", "blue car", "blue car"]
    assert len(list((tmp_path / "images").glob("0*.png"))) == 4
    with pytest.raises(ConfigError, match=r"^scheduler: diffusers has no scheduler 'Euler'; use Euler.*EulerDiscreteScheduler"):
        generate.main([*arguments[:-1], "Euler", "--output_dir", str(tmp_path / "images")])
