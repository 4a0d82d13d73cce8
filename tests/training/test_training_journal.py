"""What a run says while it trains: in train.log, without a terminal, and of trouble."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from dst_kernels.training import journal
from dst_kernels.training.config import RunConfig
from dst_kernels.training.errors import DivergedError
from dst_kernels.training.journal import Journal, duration

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def test_long_epochs_say_how_far_they_are(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_EVERY", 0.0)
    result = cli("train", "--epochs", 1, "--out", "run")
    assert result.exit_code == 0, result.output
    cli("train", "--resume", "run", "--epochs", 2)
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert all(re.match(STAMP, line) for line in lines)
    texts = [re.sub(STAMP, "", line) for line in lines]
    assert [text for text in texts if "from epoch" in text] == [
        "lenet-300-100 on digits, from epoch 1",
        "lenet-300-100 on digits, from epoch 2",
    ]
    steps = [text for text in texts if "step" in text]
    pattern = r"epoch (\d)/\1  step (\d+)/23  train loss [\d.]+  [\d,]+ samples/s  \d+ s left"
    found = [tuple(map(int, re.fullmatch(pattern, text).groups())) for text in steps]
    assert found == [(epoch, step) for epoch in (1, 2) for step in range(1, 24)]
    assert steps[0] in result.output and len([t for t in texts if "test loss" in t]) == 2


def test_a_loss_that_is_not_finite_is_found_within_the_epoch(cli, monkeypatch):
    monkeypatch.setattr(journal, "_EVERY", 0.0)
    result = cli("train", "--lr", 1e20, "--out", "run")
    assert result.exit_code != 0
    assert re.search(r"mean loss of epoch 1 is (nan|inf) after \d+ of 23 steps", result.stderr)


@pytest.mark.parametrize(
    ("ratios", "config", "said"),
    [
        ([0.5, 0.0], {}, "a keeps no weight after epoch 2: try a smaller --alpha"),
        ([0.02, 1.0], {}, "a was restarted with all weights in epoch 2, since no more than"),
        ([1.0, 1.0, 1.0], {"alpha": 1e-9}, "--alpha 1e-09 leaves 100.00 % of the weights after 3"),
        ([1.0, 1.0, 1.0, 1.0], {}, ""),
        ([1.0, 1.0, 0.99], {}, ""),
        ([0.5, 0.02], {}, ""),
        ([1.0, 1.0, 1.0], {"dense": True}, ""),
    ],
)
def test_trouble_is_said_after_the_epoch(tmp_path, ratios, config, said):
    history, written = [], io.StringIO()
    config = RunConfig(epochs=9, **config)
    run = Journal(tmp_path, Console(file=written), config, history, steps=5)
    for epoch, ratio in enumerate(ratios, 1):
        written.truncate(0)
        history.append(
            {
                "epoch": epoch, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5,
                "remaining_ratio": ratio, "layers": {} if config.dense else {"a": ratio},
            }
        )  # fmt: skip
        run.epoch(history[-1])
    assert ("Warning" in written.getvalue()) == bool(said)
    assert said in written.getvalue()
    assert said in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("options", "epoch", "said"),
    [
        # The loss moves thresholds, too, so some weights are pruned whatever alpha is.
        (("--alpha", 1e-9), 3, "--alpha 1e-09 leaves 99."),
        (
            ("--threshold-lr", 0),
            1,
            "no threshold has moved in epoch 1: --threshold-lr is 0, --alpha 0.004: try larger",
        ),
        ((), 3, ""),
        (("--dense",), 3, ""),
    ],
)
def test_a_run_without_effect_is_warned_of(cli, tmp_path, options, epoch, said):
    result = cli("train", *options, "--epochs", epoch, "--out", "run")
    assert result.exit_code == 0, result.output
    warnings = re.findall("warning: (.*)", (tmp_path / "run" / "train.log").read_text())
    assert len(warnings) == bool(said)
    assert all(each.startswith(said) for each in warnings)


def test_durations():
    values = {0.4: "0 s", 89: "89 s", 91: "2 min", 3570: "1 h 00 min", 11_100: "3 h 05 min"}
    assert {seconds: duration(seconds) for seconds in values} == values


def test_the_error_says_what_to_try(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_EVERY", 0.0)
    run = Journal(tmp_path, Console(file=io.StringIO()), RunConfig(), [], steps=5)
    with pytest.raises(DivergedError, match=r"--lr is 0\.01, --alpha 0\.004: try smaller ones"):
        run.step(torch.tensor(float("nan")), 1)
