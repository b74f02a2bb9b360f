"""The demo's scoring on small wds_* folders."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffdis_platform.demo.report import ZeroShotSet, table, verdict, write_report, zero_shot
from diffdis_platform.recipes.demo import demo

NAMES = [f"colour {i}" for i in range(30)]


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (4 * index, 255 - 4 * index, 100)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    """wds_heldout_style and wds_heldout_names with one single-color image per class; and train with the same images."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    with webdataset.TarWriter(str(tmp_path / "data" / "train" / "0.tar")) as tar:
        for i, name in enumerate(NAMES):
            tar.write({"__key__": f"s{i:07d}", "png": png(i), "txt": name})
    for split in ("heldout_style", "heldout_names"):
        folder = tmp_path / "data" / f"wds_{split}" / "test"
        folder.mkdir(parents=True)
        (folder.parent / "classnames.txt").write_text("\n".join(NAMES) + "\n")
        (folder.parent / "zeroshot_classification_templates.txt").write_text("{c}\n")
        with webdataset.TarWriter(str(folder / "0.tar")) as tar:
            for i in range(len(NAMES)):
                tar.write({"__key__": f"s{i:07d}", "png": png(i), "cls": str(i).encode()})
    return tmp_path / "data"


def test_a_perfect_model_scores_one_and_its_shuffled_images_do_not(data):
    """Uses a stub model whose image query is the embedding of the correct class, to test only the scoring."""
    loaded = ZeroShotSet.read(data / "wds_heldout_style")
    assert len(loaded.images) == loaded.labels.numel() == len(NAMES)
    import torch

    perfect = SimpleNamespace(
        embed_image=lambda images, **kw: torch.eye(len(NAMES))[[int(np.asarray(i)[0, 0, 0]) // 4 for i in images]],
        embed_classes=lambda names, templates: torch.eye(len(NAMES)),
    )
    scores, top3 = zero_shot(perfect, loaded)
    assert top3[:, 0].tolist() == loaded.labels.tolist()
    assert scores["acc1"] == scores["acc1_100way"] == 1.0
    assert scores["acc1_shuffled_images"] < 0.15
    assert scores["chance"] == 1 / len(NAMES)


@pytest.mark.ranks
def test_the_report_of_an_untrained_model_is_complete_and_at_chance(data, tiny_model, tmp_path):
    import torch

    from diffdis.config import ObjectiveConfig
    from diffdis.task import DiffDisTask

    torch.manual_seed(1)
    task = DiffDisTask(tiny_model, ObjectiveConfig())
    output = tmp_path / "out"
    task.save_pretrained(task.module.state_dict(), output / "export")
    losses = {"loss_generation": 1.0, "loss_alignment": 4.0}
    training = {
        "num_workers": 2, "zero_stage": 2, "num_steps": 1, "num_samples_seen": 8, "samples_per_second": 1.0, "seconds": 8.0,
        "first": losses, "last": losses, "skipped": {}, "export_dir": str(output / "export"),
    }  # fmt: skip
    (output / "train_summary.json").write_text(json.dumps(training))
    uri = f"sqlite:///{output / 'mlflow.db'}"
    (output / "mlflow.json").write_text(json.dumps({"tracking_uri": uri, "experiment": "x", "run_id": ""}))
    summary = write_report(output, data, ("red heart", NAMES[0]))
    assert json.loads((output / "summary.json").read_text()) == summary
    for scores in summary["zero_shot"].values():
        # 30 images of 30 classes: at chance, 8 or more correct images have a probability of 1e-5.
        assert max(scores[name] for name in ("acc1", "acc1_shuffled_images", "acc1_untrained")) < 8 / len(NAMES)
        assert scores["num_classes"] == scores["num_images"] == len(NAMES)
    assert 0 <= summary["color"]["fraction_nearer_to_own"] <= 1
    assert (
        summary["quality"]["num_images"] == summary["quality"]["num_reference"] == summary["color"]["num_captions"] == len(NAMES)
    )
    # The training images are those of the held-out style here, so the floor is 0; an untrained model is far above it.
    assert abs(summary["quality"]["fd_floor"]) < 1e-3 < summary["quality"]["fd"]
    assert "heldout_names" in table(summary)
    assert all(Image.open(summary[figure]).width > 100 for figure in ("grid", "recognition"))


def summary_with(acc1: float, shuffled: float = 0.001, own_color: float = 50.0):
    scores = {"acc1": acc1, "acc1_shuffled_images": shuffled, "chance": 0.001, "num_images": 1732}
    color = {"distance_to_own_caption": own_color, "distance_to_random_caption": 70.0}
    return {"zero_shot": {"a": scores, "b": scores}, "color": color, "quality": {"fd": 9.0, "fd_floor": 1.0}}


def test_the_verdict_follows_the_scores_and_their_controls():
    good, at_chance, leak, gray = (summary_with(*values) for values in ((0.05,), (0.002,), (0.05, 0.04), (0.05, 0.001, 71.0)))
    assert "50 times" in verdict(good)
    assert "not recognize" in verdict(at_chance)
    assert "not sound" in verdict(leak)
    assert "not sound" not in verdict(summary_with(0.05, 3 / 1732)), "one is expected, and three are no rare event"
    assert "do not have their captions' colors" in verdict(gray)
    assert "do not have their captions' colors" not in verdict(good)


def test_the_recipe_weights_a_channel_by_the_root_of_its_deviation():
    """Between equal weights of the standardized channels and equal weights of the pixels."""
    config = demo()
    deviations = np.array(config.model.autoencoder.haar_std)
    assert config.model.schedule.prediction_type == "sample"
    np.testing.assert_allclose(np.array(config.objective.channel_weights) ** 2 / deviations, 1.0, rtol=2e-3)
