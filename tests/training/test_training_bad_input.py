from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from dst_kernels.training.models import RowLSTM


def refusal(result):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Accepted" in result.output
    return result.output


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        (("--model", "lenet-300"), ["lenet-300-100, lenet-5", "Did you mean lenet-300-100"]),
        (("--model", "resnet81"), ["torchvision.models.list_models()", "Did you mean resnet18"]),
        (("--dataset", "imagenet"), ["digits, mnist, fashion-mnist, cifar10, cifar100"]),
        (("--preset", "digit"), ["digits, mnist, mnist-lenet-5, mnist-lstm-a, mnist-lstm-b"]),
        (("--surrogate", "sigmoid"), ["long_tailed, rectangular, triangular, straight_through"]),
        (("--granularity", "column"), ["row, layer, element"]),
        (("--optimizer", "lion"), ["sgd, adam"]),
        (("--amp", "fp16"), ["none, bf16"]),
        (("--device", "gpu"), ["auto, cpu, cuda"]),
        (("--device", "meta"), ["auto, cpu, cuda"]),
        (("--device", "cuda:99"), ["no such device", "auto, cpu, cuda"]),
        (("--alpha", "-1"), ["at least 0"]),
        (("--alpha", "nan"), ["at least 0"]),
        (("--epochs", "0"), ["at least 1"]),
        (("--lr", "0"), ["above 0"]),
        (("--batch-size", "1"), ["at least 2"]),
        (("--milestones", "80;120"), ["80,120"]),
        (("--milestones", "120,80"), ["ascending"]),
        (("--reset-ratio", "never"), ["0 to 1, or none"]),
        (("--reset-ratio", "2"), ["0 to 1, or none"]),
        (("--seed", "-1"), ["at least 0"]),
        (("--seed", "1.5"), ["an integer"]),
        (("--epochs", "many"), ["an integer of at least 1"]),
        (("--alpha", "4e-3x"), ["a number"]),
        (("--reset-ratio", ""), ["0 to 1, or none"]),
        (("--threads", "100000"), ["at least 0 and at most 1024"]),
        (("--workers", "100000"), ["at least 0 and at most 256"]),
        (("--epochs", "1000000000"), ["at least 1 and at most 1000000"]),
        (("--batch-size", "1000000000000"), ["at least 2 and at most 1048576"]),
        (("--image-size", "1000000"), ["at least 8 and at most 4096"]),
        (("--lr", "1e+300"), ["above 0 and at most 1e30"]),
        (("--weight-decay", "1e+300"), ["at least 0 and at most 1e30"]),
    ],
)
def test_bad_values_are_named_with_what_is_accepted(cli, tmp_path, given, accepted):
    message = refusal(cli("train", *given, "--out", "run"))
    name, value = given
    assert name in message
    for part in re.findall(r"\w+", value):
        assert part in message
    for text in accepted:
        assert text in message
    assert not (tmp_path / "run").exists()


def test_a_learning_rate_that_milestones_raise_beyond_float32_is_refused(cli):
    message = refusal(cli("train", "--gamma", 1e20, "--milestones", "1,2"))
    assert "--gamma is 1e+20, which 2 milestones raise" in message


def test_mixed_precision_that_torch_has_not_is_named(cli, tmp_path, monkeypatch):
    """As on CPUs without AVX-512, where torch has no LSTM in bfloat16."""

    forward = RowLSTM.forward

    def fail(self, images):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("could not create a primitive descriptor. Run with ONEDNN_VERBOSE")
        return forward(self, images)

    monkeypatch.setattr(RowLSTM, "forward", fail)
    message = refusal(cli("train", "--model", "lstm-a", "--amp", "bf16", "--out", "run"))
    assert "--amp bf16" in message and "lstm-a" in message and "--amp none" in message
    assert "could not create a primitive descriptor" in message
    assert not (tmp_path / "run").exists()


def test_compare_and_dense_contradict(cli):
    message = refusal(cli("train", "--compare", "--dense"))
    assert "--compare and --dense" in message


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize("folder", ["missing", "empty"])
def test_missing_data_is_refused_with_the_way_to_get_it(cli, tmp_path, dataset, folder):
    (tmp_path / "empty").mkdir()
    result = cli("train", "--dataset", dataset, "--model", "lenet-5", "--data-dir", folder)
    message = refusal(result)
    assert f"--data-dir '{folder}'" in message
    assert dataset in message
    assert "--download" in message
    assert not (tmp_path / "runs").exists()
    assert not list((tmp_path / "empty").rglob("*.gz"))


def test_damaged_data_is_refused(cli, mnist_dir):
    path = mnist_dir / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    message = refusal(cli("train", "--preset", "mnist", "--data-dir", mnist_dir))
    assert f"--data-dir '{mnist_dir}' does not yield mnist" in message


@pytest.mark.parametrize(
    ("remove", "problem"),
    [
        (".", "is not a folder"),
        ("train", "has no train folder"),
        ("val", "has no test or val folder"),
        ("val/below", "classes below are in only one of train and val"),
        ("train/above/*", "above"),
    ],
)
def test_incomplete_image_folders_are_refused(cli, image_dir, remove, problem):
    if remove == ".":
        image_dir = Path("nowhere")
    for path in [] if remove == "." else image_dir.glob(remove):
        for part in sorted(path.rglob("*"), reverse=True):
            part.rmdir() if part.is_dir() else part.unlink()
        path.rmdir() if path.is_dir() else path.unlink()
    message = refusal(
        cli("train", "--dataset", "image-folder", "--data-dir", image_dir, "--model", "lenet-5")
    )
    assert "--data-dir" in message
    assert problem in message


def test_images_too_small_for_the_model_are_refused(cli, image_dir):
    options = ("--dataset", "image-folder", "--data-dir", image_dir, "--image-size", 12)
    message = refusal(cli("train", *options, "--model", "lenet-5"))
    assert "--model 'lenet-5' does not take the 3x12x12 images of image-folder" in message


def test_a_directory_that_holds_a_run_is_never_overwritten(cli, run_of, tmp_path):
    run_of("--epochs", 1, to=tmp_path / "run")
    run_of("--epochs", 2, "--compare", to=tmp_path / "both")
    for out in ("run", "both"):
        files = [path for path in sorted((tmp_path / out).rglob("*")) if path.is_file()]
        before = [path.read_bytes() for path in files]
        for extra in ((), ("--compare",)):
            message = refusal(cli("train", "--epochs", 1, "--out", out, *extra))
            assert f"--out '{out}' already holds a run" in message
            assert f"--resume {out}" in message
        assert [p for p in sorted((tmp_path / out).rglob("*")) if p.is_file()] == files
        assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("lone", ["metrics.csv", "model.safetensors", "checkpoint.pt"])
def test_a_part_of_a_run_is_not_overwritten_either(cli, tmp_path, lone):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lone).write_text("precious")
    refusal(cli("train", "--epochs", 1, "--out", "run"))
    assert (tmp_path / "run" / lone).read_text() == "precious"


def test_a_folder_with_other_files_is_refused(cli, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("a", "layer_ratio.png", "c", "d"):
        (tmp_path / "run" / name).write_text("mine")
    for extra in ((), ("--compare",)):
        message = refusal(cli("train", "--epochs", 1, "--out", "run", *extra))
        assert "'run' is not empty: it has 'a', 'c', 'd' and 1 more" in message
    assert {path.read_text() for path in (tmp_path / "run").iterdir()} == {"mine"}
    assert len(list((tmp_path / "run").iterdir())) == 4


def test_a_path_from_a_variable_that_is_not_set_is_refused(cli, tmp_path):
    for command in (("train", "--out"), ("train", "--resume"), ("report", "--plot", "x.png")):
        assert " is ''" in refusal(cli(*command, ""))
    assert "--plot is ''" in refusal(cli("report", "run", "--plot", ""))
    assert "--out is ' '" in refusal(cli("train", "--out", " "))
    assert "--out is 'a\\udcff': it is no text" in refusal(cli("train", "--out", "a\udcff"))
    assert "File name too long" in refusal(cli("train", "--out", "x" * 999))
    assert not list(tmp_path.iterdir())


def test_unwritable_directories_are_refused(cli, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for out in ("file", "file/run"):
        message = refusal(cli("train", "--epochs", 1, "--out", out))
        assert f"--out '{out}' cannot be made" in message
    assert (tmp_path / "file").read_text() == "not a folder"


def test_directories_without_permission_are_refused(cli, tmp_path, monkeypatch):
    """Simulated, because the superuser may write anywhere."""
    make, open_file = os.mkdir, open

    def refuse_mkdir(path, *args, **kwargs):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse_mkdir)
    message = refusal(cli("train", "--epochs", 1, "--out", "locked"))
    assert "--out 'locked' cannot be made: Permission denied" in message

    def refuse_open(path, *args, **kwargs):
        if Path(path).parent.name == "readonly":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *args, **kwargs)

    (tmp_path / "readonly").mkdir()
    monkeypatch.setattr("builtins.open", refuse_open)
    message = refusal(cli("train", "--epochs", 1, "--out", "readonly"))
    assert "cannot be written: Permission denied" in message
    assert "--out" in message


def test_folder_names_are_shown_as_they_are(cli, tmp_path):
    name = "run[bold]"  # markup for rich, but also a name
    result = cli("train", "--epochs", 1, "--out", name)
    assert result.exit_code == 0
    assert result.output.count(name) == 2
    assert f"{name} is finished" in cli("train", "--resume", name).output
    assert name in cli("report", name).output


def test_divergence_ends_with_1_and_keeps_the_run(cli, tmp_path):
    result = cli("train", "--epochs", 5, "--lr", 1e12, "--out", "run")
    assert result.exit_code == 1
    assert "training diverged" in result.output
    assert "--lr is 1e+12" in result.output
    assert "Traceback" not in result.output
