from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dst_kernels.training import cli as entry
from dst_kernels.training.commands import app

PLOTS = ("accuracy_and_ratio.png", "layer_ratios.png", "masks.png", "thresholds.png")


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_is_a_picture(path):
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    drawn = (pixels < 250).any(-1)
    assert 0.005 < drawn.mean() < 0.9
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # several colours, smoothed lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with real pictures, which no test changes, and what it printed."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    options = ["--epochs", "3", "--out", str(directory), "--seed", "4"]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["train", *options])
    assert result.exit_code == 0, result.output
    return directory, result.output


def test_a_run_writes_config_metrics_summary_model_and_plots(finished):
    directory, _ = finished
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "metrics.csv",
        "summary.json",
        "model.safetensors",
        "checkpoint.pt",
        "SHA256SUMS",
        "train.log",
        *PLOTS,
    }
    config = json.loads((directory / "config.json").read_text())
    assert (config["preset"], config["epochs"], config["seed"]) == ("digits", 3, 4)
    rows = read_csv(directory / "metrics.csv")
    assert list(rows[0]) == [
        *("epoch", "lr", "train_loss", "test_loss", "test_accuracy", "remaining_ratio"),
        *("churn", "ever_active", "dead_rows"),
        *("remaining_ratio/fc1", "remaining_ratio/fc2", "remaining_ratio/fc3"),
    ]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    summary, last = json.loads((directory / "summary.json").read_text()), rows[-1]
    for name in ("test_accuracy", "remaining_ratio", "test_loss", "train_loss"):
        assert summary[name] == float(last[name])
    assert 0 < summary["remaining_ratio"] < 1
    assert 0.3 < summary["test_accuracy"] <= 1
    assert summary["layers"] == {n: float(last[f"remaining_ratio/{n}"]) for n in summary["layers"]}
    kept = sum(
        summary["layers"][n] * size
        for n, size in zip(("fc1", "fc2", "fc3"), (235_200, 30_000, 1_000), strict=True)
    )
    assert summary["kept_weights"] == pytest.approx(kept)
    assert (summary["masked_weights"], summary["thresholds"]) == (266_200, 410)
    assert (summary["seed"], summary["epochs"], summary["device"]) == (4, 3, "cpu")
    assert summary["seconds"] > 0
    assert {"python", "torch", "dst_kernels"} <= set(summary["versions"])
    tensors = load_file(directory / "model.safetensors")
    assert tensors["fc1.weight"].shape == (300, 784)
    assert tensors["fc1.threshold"].shape == (300,)


@pytest.mark.parametrize("name", PLOTS)
def test_plots_are_pictures(finished, name):
    assert_is_a_picture(finished[0] / name)


def test_piped_output_is_plain_lines_and_a_closing_table(finished):
    _, output = finished
    assert "\x1b" not in output
    lines = [line for line in output.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert re.search(r"fc1\s+300x784\s+[\d.]+ %\s+[\d,]+\s+235,200", output)
    assert re.search(r"test accuracy\s+[\d.]+ %", output)


def test_an_lstm_with_a_dense_last_layer(cli, tmp_path):
    options = ("--model", "lstm-a", "--optimizer", "adam", "--lr", 1e-3, "--skip-last")
    result = cli("train", *options, "--epochs", 2, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "lstm.weight_hh_l1" in result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["masked_weights"], summary["thresholds"]) == (210_944, 2_048)


@pytest.mark.slow
def test_a_terminal_gets_a_live_view_of_every_layer(tmp_path):
    """Under a real pseudo-terminal, where rich draws."""
    script = pytest.importorskip("pty")
    import os

    pid, terminal = script.fork()
    if pid == 0:
        os.environ.update(COLUMNS="100", LINES="40", TERM="xterm-256color", OMP_NUM_THREADS="1")
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", COMMAND, "train", "--epochs", "6"])
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"epoch [1-6]/6 ━+", text)
    live = text.split("empty rows")[0]
    for name in ("fc1", "fc2", "fc3", "model"):
        assert re.search(rf"{name}.*[\d.]+ %.*█", live)


COMMAND = "from dst_kernels.training.cli import main; main()"


@pytest.mark.usefixtures("pictures")
def test_dense_twin(cli, tmp_path):
    result = cli("train", "--epochs", 1, "--dense", "--out", "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dense"] is True
    assert summary["remaining_ratio"] == 1.0
    assert summary["masked_weights"] == 0
    assert "fc1.threshold" not in load_file(tmp_path / "run" / "model.safetensors")
    assert_is_a_picture(tmp_path / "run" / "accuracy_and_ratio.png")


@pytest.mark.usefixtures("pictures")
def test_compare_trains_both_and_shows_the_difference(cli, run_of, tmp_path):
    result = cli("train", "--epochs", 2, "--compare", "--out", "both")
    assert result.exit_code == 0, result.output
    both = json.loads((tmp_path / "both" / "comparison.json").read_text())
    for name in ("dense", "sparse"):
        assert json.loads((tmp_path / "both" / name / "summary.json").read_text()) == both[name]
    assert (both["dense"]["dense"], both["sparse"]["dense"]) == (True, False)
    difference = both["sparse"]["test_accuracy"] - both["dense"]["test_accuracy"]
    assert both["accuracy_difference"] == difference
    assert f"{100 * difference:+.2f} points" in result.output
    assert_is_a_picture(tmp_path / "both" / "comparison.png")
    # Each twin is what a run of its own gives.
    for kind, options in (("dense", ("--dense",)), ("sparse", ("--seed", 0))):
        alone = run_of("--epochs", 2, *options)
        for name in ("metrics.csv", "model.safetensors"):
            assert (alone / name).read_bytes() == (tmp_path / "both" / kind / name).read_bytes()


def test_a_seed_repeats_a_run_exactly_and_another_does_not(cli, run_of, tmp_path):
    assert cli("train", "--epochs", 2, "--seed", 1, "--out", "again").exit_code == 0
    runs = (
        run_of("--epochs", 2, "--seed", 1),
        tmp_path / "again",
        run_of("--epochs", 2, "--seed", 0),
    )
    for name in ("metrics.csv", "model.safetensors", "layer_ratios.png"):
        a, b, c = ((run / name).read_bytes() for run in runs)
        assert a == b
        assert a != c


def test_default_directory_is_named_after_the_preset(cli, tmp_path):
    for _ in range(2):  # within a second: the second gets a name of its own
        assert cli("train", "--epochs", 1).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all(re.fullmatch(r"digits-\d{8}-\d{6}(-2)?", name) for name in names)


def test_mnist_with_its_preset_from_raw_files(cli, tmp_path, mnist_dir):
    result = cli(
        *("train", "--dataset", "mnist", "--data-dir", mnist_dir, "--model", "lenet-5"),
        *("--epochs", 2, "--batch-size", 8, "--out", "run"),
    )
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["preset"], config["alpha"]) == ("mnist", 5e-4)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["masked_weights"], summary["thresholds"]) == (430_500, 580)
    assert (summary["model"], summary["dataset"]) == ("lenet-5", "mnist")


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_image_folder_with_a_torchvision_model(cli, tmp_path, image_dir):
    result = cli(
        *("train", "--dataset", "image-folder", "--data-dir", image_dir, "--image-size", 32),
        *("--model", "squeezenet1_1", "--epochs", 2, "--batch-size", 5, "--workers", 1),
        *("--optimizer", "adam", "--lr", 0.001, "--amp", "bf16", "--skip-last", "--out", "run"),
    )
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["classes"], summary["input_shape"]) == (2, [3, 32, 32])
    assert "features.12.squeeze" in summary["layers"]
    assert "classifier.1" not in summary["layers"]
    for name in PLOTS:  # with 25 layers instead of 3
        assert_is_a_picture(tmp_path / "run" / name)


def test_help_lists_the_options_and_needs_no_data(cli):
    result = cli("train", "--help")
    assert result.exit_code == 0
    for name in ("--alpha", "--threshold-weight-decay", "--resume", "--compare", "--amp"):
        assert name in result.output
    assert "CIFAR" in result.output


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(entry, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "needs rich" in message
    assert "pip install 'dst_kernels[train]'" in message


@pytest.mark.slow
def test_the_installed_command_answers():
    found = subprocess.run(
        [sys.executable, "-c", COMMAND, "--help"], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0
    assert "train" in found.stdout
    assert "report" in found.stdout


def test_the_package_runs_as_the_command(tmp_path):
    command = [sys.executable, "-m", "dst_kernels", "evaluate", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere has no checkpoint.pt" in done.stderr
