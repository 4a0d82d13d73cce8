"""`--track tensorboard`: what is written is what training recorded, once for each epoch."""

from __future__ import annotations

import csv
import importlib.util
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from dst_kernels.training.config import RunConfig
from dst_kernels.training.models import build_model
from dst_kernels.training.state import State
from dst_kernels.training.tracking import track

TRACKED = ("--track", "tensorboard", "--validation", 0.2)
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def events_in(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "histograms": 0})
    return events.Reload()


@needs_tensorboard
def test_each_epoch_is_written_once_through_stops(cli, run_of, tmp_path):
    run = run_of("--epochs", 2, *TRACKED, to=tmp_path / "run")
    assert cli("train", "--resume", "run", "--epochs", 3).exit_code == 0
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {
        "learning rate": "lr",
        "remaining ratio": "remaining_ratio",
        **{f"remaining ratio by layer/fc{i}": f"remaining_ratio/fc{i}" for i in (1, 2, 3)},
        "loss/train": "train_loss",
        **{f"masks/{name}": name for name in ("churn", "ever_active", "dead_rows")},
        **{f"loss/{split}": f"{split}_loss" for split in ("validation", "test")},
        **{f"accuracy/{split}": f"{split}_accuracy" for split in ("validation", "test")},
    }
    events = events_in(run)
    assert set(events.Tags()["scalars"]) == set(columns)
    for name, column in columns.items():
        written = [(each.step, each.value) for each in events.Scalars(name)]
        assert [step for step, _ in written] == [1, 2, 3]
        values = torch.tensor([float(row[column]) for row in rows])  # float32, as TensorBoard's
        assert [value for _, value in written] == values.tolist(), name
    weights = load_file(run / "model.safetensors")
    for layer in ("fc1", "fc2", "fc3"):
        histograms = events.Histograms(f"thresholds/{layer}")
        assert [each.step for each in histograms] == [1, 2, 3]
        last, thresholds = histograms[-1].histogram_value, weights[f"{layer}.threshold"]
        assert (last.num, last.min, last.max) == (
            thresholds.numel(),
            thresholds.min().item(),
            thresholds.max().item(),
        )
    untracked = run_of("--epochs", 3, *TRACKED[2:])
    assert (run / "metrics.csv").read_bytes() == (untracked / "metrics.csv").read_bytes()
    assert not (untracked / "tensorboard").exists()


@needs_tensorboard
def test_an_epoch_that_a_stop_kept_from_being_written_is_written(cli, run_of, tmp_path):
    run = run_of("--epochs", 2, *TRACKED, to=tmp_path / "run")
    shutil.rmtree(run / "tensorboard")
    assert cli("train", "--resume", "run", "--epochs", 3).exit_code == 0
    assert [each.step for each in events_in(run).Scalars("loss/test")] == [2, 3]
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("in the way")
    result = cli("train", "--resume", "run", "--epochs", 4)
    assert result.exit_code == 2
    assert "run/tensorboard cannot be written: File exists" in result.stderr


@needs_tensorboard
@pytest.mark.parametrize("values", [[torch.nan], [torch.inf, -torch.inf], [1e30], [0.1, torch.nan]])
def test_thresholds_that_no_bin_holds_are_left_out(tmp_path, values):
    config = RunConfig(track="tensorboard")
    model = build_model(config, (1, 28, 28), 10)
    with torch.no_grad():
        model.fc1.threshold[:] = torch.tensor(values).repeat(300)[:300]
    record = {"epoch": 1, "lr": 0.1, "remaining_ratio": 1.0, "layers": {}, "train_loss": 1.0}
    state = State(model, torch.optim.SGD(model.parameters()), {}, weights=model.state_dict())
    with track(config, tmp_path, state) as tracker:
        tracker.epoch(record)
    shown = {name: h[0].histogram_value.num for name, h in _histograms(tmp_path).items()}
    finite = {"thresholds/fc1": 150} if 0.1 in values else {}
    assert shown == {"thresholds/fc2": 100, "thresholds/fc3": 10, **finite}


def _histograms(run):
    events = events_in(run)
    return {name: events.Histograms(name) for name in events.Tags()["histograms"]}


def test_without_the_package_the_error_says_what_to_install(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for option in ("--dense", "--compare"):
        result = cli("train", *TRACKED, option, "--out", "run")
        assert result.exit_code == 2 and not (tmp_path / "run").exists()
        assert "after pip install 'dst_kernels[tensorboard]'" in result.stderr
    assert "Accepted: none, tensorboard" in cli("train", "--track", "wandb").stderr
