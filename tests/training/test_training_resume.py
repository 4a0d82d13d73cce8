from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from dst_kernels.training import display
from dst_kernels.training.checkpoint import save_checkpoint
from dst_kernels.training.config import RunConfig
from dst_kernels.training.start import start

SAME = ("model.safetensors", "metrics.csv", "config.json", "layer_ratios.png", "thresholds.png")


def assert_same_run(one, other, names=SAME):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def interrupt_in(monkeypatch, epoch, step):
    """Ctrl-C in the given step (from 1) of the given epoch (from 1)."""
    watch = display.watch

    def watching(*args):
        manager = watch(*args)
        observer = manager.__enter__()
        counter = {"epoch": len(args[2]) + 1, "step": 0}

        class Interrupting:
            def step(self, total, samples):
                counter["step"] += 1
                if (counter["epoch"], counter["step"]) == (epoch, step):
                    raise KeyboardInterrupt

            def epoch(self, record):
                observer.epoch(record)
                counter.update(epoch=record["epoch"] + 1, step=0)

        class Manager:
            def __enter__(self):
                return Interrupting()

            def __exit__(self, *failure):
                return manager.__exit__(None, None, None)

        return Manager()

    monkeypatch.setattr(display, "watch", watching)


@pytest.mark.usefixtures("pictures")
def test_two_epochs_and_two_more_are_four_bit_for_bit(cli, tmp_path):
    options = ("--momentum", 0.8, "--milestones", "1,3", "--gamma", 0.5)
    assert cli("train", "--epochs", 4, "--out", "straight", *options).exit_code == 0
    assert cli("train", "--epochs", 2, "--out", "resumed", *options).exit_code == 0
    first = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert cli("train", "--resume", "resumed", "--epochs", 4).exit_code == 0
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    second = json.loads((tmp_path / "resumed" / "summary.json").read_text())
    assert second["epochs"] == 4
    assert second["seconds"] > first["seconds"]
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]
        for name in ("straight", "resumed")
    ]
    for key, value in states[0]["state"].items():
        assert torch.equal(value["momentum_buffer"], states[1]["state"][key]["momentum_buffer"])


@pytest.mark.parametrize("extra", [("--optimizer", "adam", "--lr", 1e-3), ("--dense",)])
def test_resuming_other_kinds_of_runs(cli, tmp_path, extra):
    names = ("model.safetensors", "metrics.csv")
    assert cli("train", "--epochs", 2, "--out", "straight", *extra).exit_code == 0
    assert cli("train", "--epochs", 1, "--out", "resumed", *extra).exit_code == 0
    assert cli("train", "--resume", "resumed", "--epochs", 2).exit_code == 0
    assert_same_run(tmp_path / "straight", tmp_path / "resumed", names)


@pytest.mark.slow
def test_resuming_a_streamed_and_augmented_run_with_dropout_and_batch_norm(
    cli, tmp_path, image_dir
):
    options = ("--dataset", "image-folder", "--data-dir", image_dir, "--image-size", 32)
    options += ("--model", "mobilenet_v3_small", "--batch-size", 8, "--lr", 0.01, "--workers", 1)
    assert cli("train", "--epochs", 2, "--out", "straight", *options).exit_code == 0
    assert cli("train", "--epochs", 1, "--out", "resumed", *options).exit_code == 0
    assert cli("train", "--resume", "resumed", "--epochs", 2).exit_code == 0
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize(("epoch", "step", "kept"), [(3, 5, 2), (1, 5, 0)])
def test_ctrl_c_keeps_the_last_finished_epoch(
    cli, run_of, tmp_path, monkeypatch, epoch, step, kept
):
    straight = run_of("--epochs", 4)
    with monkeypatch.context() as patch:
        interrupt_in(patch, epoch, step)
        result = cli("train", "--epochs", 4, "--out", "stopped")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert (f"{kept} of 4 epochs are kept" if kept else "no epoch was finished") in result.output
    assert "dst-kernels train --resume stopped" in result.output
    if kept:
        metrics = (tmp_path / "stopped" / "metrics.csv").read_text().splitlines()
        assert metrics == (straight / "metrics.csv").read_text().splitlines()[:3]
    assert not (tmp_path / "stopped" / "summary.json").exists()
    result = cli("train", "--resume", "stopped")
    assert result.exit_code == 0, result.output
    assert f"epoch {kept + 1}/4" in result.output
    assert f"epoch {kept}/4" not in result.output
    assert_same_run(straight, tmp_path / "stopped")


def test_ctrl_c_in_a_comparison_resumes_the_comparison(cli, run_of, tmp_path, monkeypatch):
    straight = run_of("--epochs", 2, "--compare")
    with monkeypatch.context() as patch:
        interrupt_in(patch, 2, 3)
        result = cli("train", "--epochs", 2, "--compare", "--out", "stopped")
    assert result.exit_code == 130
    assert result.output.rstrip().endswith("--resume stopped")
    result = cli("train", "--resume", "stopped")
    assert result.exit_code == 0, result.output
    for name in ("dense", "sparse"):
        names = ("model.safetensors", "metrics.csv")
        assert_same_run(straight / name, tmp_path / "stopped" / name, names)
    assert (tmp_path / "stopped" / "comparison.json").exists()
    assert (tmp_path / "stopped" / "comparison.png").exists()


def test_ctrl_c_while_a_checkpoint_is_written_loses_nothing(cli, run_of, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def stop_in_the_third(contents, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half")
            raise KeyboardInterrupt
        save(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop_in_the_third)
        result = cli("train", "--epochs", 4, "--out", "stopped")
    assert result.exit_code == 130
    assert "2 of 4 epochs are kept" in result.output
    assert cli("train", "--resume", "stopped").exit_code == 0
    assert_same_run(run_of("--epochs", 4), tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob(".*"))


@pytest.mark.slow
def test_a_real_interrupt_signal_ends_with_130_and_can_be_resumed(cli, tmp_path):
    assert cli("train", "--epochs", 12, "--out", "straight").exit_code == 0
    command = "from dst_kernels.training.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "train", "--epochs", "12", "--out", "stopped"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell put into the background ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped" / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "dst-kernels train --resume stopped" in errors
    result = cli("train", "--resume", "stopped")
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_finished_run_is_said_to_be_finished_and_left_alone(cli, run_of, tmp_path):
    run_of("--epochs", 4, to=tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    result = cli("train", "--resume", "run")
    assert result.exit_code == 0
    assert "run is finished: 4 of 4 epochs" in result.output
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()} == before


def test_a_run_stopped_before_its_results_were_written_gets_them(cli, run_of, tmp_path):
    whole = run_of("--epochs", 4)
    run_of("--epochs", 4, to=tmp_path / "run")
    for name in ("summary.json", "model.safetensors", "thresholds.png"):
        (tmp_path / "run" / name).unlink()
    assert cli("train", "--resume", "run").exit_code == 0
    assert_same_run(whole, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.usefixtures("cli")
def test_the_configuration_given_is_not_changed(tmp_path):
    config = RunConfig(epochs=1)
    before = config.to_dict()
    with open(os.devnull, "w") as nowhere:
        start(config, tmp_path / "run", Console(file=nowhere))
    assert config.to_dict() == before


@pytest.fixture
def stopped(run_of, tmp_path):
    """A run whose results were not written."""
    run = run_of("--epochs", 1, to=tmp_path / "run")
    (run / "summary.json").unlink()
    return run


def refusal(result):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Accepted" in result.output
    return result.output


@pytest.mark.parametrize(
    "extra",
    [
        *(("--lr", 0.1), ("--alpha", 0), ("--seed", 0), ("--out", "other"), ("--dense",)),
        *(("--preset", "digits"), ("--compare",), ("--reset-ratio", "none"), ("--download",)),
    ],
)
def test_other_options_contradict_resume(cli, stopped, extra):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    message = refusal(cli("train", "--resume", "run", *extra))
    assert f"{extra[0]} cannot be given with --resume" in message
    assert "--epochs, --device" in message
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 not really", b"x" * 1000])
def test_corrupt_checkpoints_are_refused(cli, stopped, contents):
    (stopped / "checkpoint.pt").write_bytes(contents)
    message = refusal(cli("train", "--resume", "run"))
    assert "checkpoint.pt is damaged or not a checkpoint" in message


def test_foreign_checkpoints_are_refused(cli, stopped):
    torch.save({"state_dict": {}, "epoch": 3}, stopped / "checkpoint.pt")
    message = refusal(cli("train", "--resume", "run"))
    assert "checkpoint.pt is not a checkpoint of dst-kernels train" in message


def test_checkpoints_of_another_model_are_refused(cli, stopped):
    path = stopped / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["model"]["fc3.threshold"]
    save_checkpoint(path, checkpoint)
    message = refusal(cli("train", "--resume", "run"))
    assert "model lacks 'fc3.threshold'" in message
    assert "does not fit the model 'lenet-300-100'" in message


def test_an_edited_configuration_is_refused(cli, stopped):
    path = stopped / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.5}))
    message = refusal(cli("train", "--resume", "run"))
    assert "lr 0.5" in message
    assert "trained with 0.01" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"epochs": 3}'])
def test_a_damaged_configuration_is_refused(cli, stopped, text):
    (stopped / "config.json").write_text(text)
    assert "config.json" in refusal(cli("train", "--resume", "run"))


def test_fewer_epochs_than_trained_are_refused(cli, run_of, tmp_path):
    run_of("--epochs", 4, to=tmp_path / "run")
    message = refusal(cli("train", "--resume", "run", "--epochs", 2))
    assert "--epochs 2 is less than the 4 epochs" in message
    assert "--epochs is 0" in refusal(cli("train", "--resume", "run", "--epochs", 0))


def test_folders_without_a_run_are_refused(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "'empty' holds no run" in refusal(cli("train", "--resume", "empty"))
    assert "'nowhere' is not a folder" in refusal(cli("train", "--resume", "nowhere"))
