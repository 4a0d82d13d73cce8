"""`--target`, `--warmup-epochs` and `--freeze-epoch`: what is reached, and resumed bit for bit."""

from __future__ import annotations

import csv
import json
import math
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from dst_kernels.training import loop
from dst_kernels.training.config import RunConfig

TARGET = ("--target", 0.2, "--ramp-epochs", 3)
RESTORE = ("--alpha", 0.05, "--lr", 0.05, "--restore-collapsed", "--validation", 0.2)
FREEZE = (
    "--validation",
    0.2,
    "--alpha",
    0.05,
    "--lr",
    0.05,
    "--warmup-epochs",
    1,
    "--freeze-epoch",
    3,
)


def rows_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("way", [(), ("--layer-by-layer",), ("--optimizer", "adamw")])
def test_what_is_asked_for_is_reached_and_stays(run_of, way):
    run = run_of("--epochs", 4, *TARGET, *way)
    ratios = [row["remaining_ratio"] for row in rows_of(run)]
    asked = round(0.2 * 266_200) / 266_200
    assert ratios[2:] == [asked] * 2 and ratios[0] > 2 * asked
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["target"], summary["remaining_ratio"]) == (0.2, asked)
    weights = load_file(run / "model.safetensors")
    assert sum(weights[f"fc{i}.fixed_mask"].sum() for i in (1, 2, 3)) == round(0.2 * 266_200)


def test_thresholds_wait_for_the_warm_up_and_stop_with_the_masks(run_of):
    warm, pruned, fixed, last = rows_of(run_of("--epochs", 4, *FREEZE))
    assert warm["remaining_ratio"] == 1 > pruned["remaining_ratio"]
    layers = [key for key in warm if key.startswith("remaining_ratio")]
    assert [fixed[key] for key in layers] == [last[key] for key in layers]
    assert last["train_loss"] != fixed["train_loss"], "the weights train on"


def test_alpha_follows_its_schedule():
    common = {"alpha": 0.4, "epochs": 5, "warmup_epochs": 1}
    for schedule, expected in {
        "constant": [0, 0.4, 0.4, 0.4, 0.4],
        "linear": [0, 0.1, 0.2, 0.3, 0.4],
        "cosine": [0, 0.4, 0.2 + 0.2 * math.sqrt(0.5), 0.2, 0.2 - 0.2 * math.sqrt(0.5)],
    }.items():
        config = RunConfig(alpha_schedule=schedule, **common)
        assert [config.alpha_at(epoch) for epoch in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize("way", [(), ("--layer-by-layer",)])
def test_a_rising_alpha_prunes_later(run_of, way):
    options = ("--epochs", 4, "--alpha", 0.02, *way)
    constant = rows_of(run_of(*options))
    rising = rows_of(run_of(*options, "--alpha-schedule", "linear"))
    assert rising[0]["remaining_ratio"] > constant[0]["remaining_ratio"] + 0.1


@pytest.mark.parametrize("options", [TARGET, FREEZE, RESTORE], ids=["target", "freeze", "restore"])
@pytest.mark.parametrize("stop", [2, 3])
def test_a_stop_in_the_ramp_or_after_it_changes_no_bit(cli, run_of, tmp_path, options, stop):
    whole = run_of("--epochs", 4, *options)
    begun = tmp_path / "begun"
    config = json.loads((whole / "config.json").read_text())
    if stop == 2:
        with interrupted_in_the_third_epoch():
            assert cli("train", "--epochs", 4, *options, "--out", begun).exit_code == 130
    else:
        assert cli("train", "--epochs", 3, *options, "--out", begun).exit_code == 0
    assert cli("train", "--resume", begun, "--epochs", 4).exit_code == 0
    assert json.loads((begun / "config.json").read_text()) == config
    expected, actual = (load_file(run / "model.safetensors") for run in (whole, begun))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert rows_of(begun) == rows_of(whole)


@contextmanager
def interrupted_in_the_third_epoch():
    seen, original = [], loop._train_epoch

    def train_epoch(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_train_epoch", train_epoch)
        yield


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", 0.1, "--alpha", 1), "--alpha and --target contradict"),
        (("--ramp-epochs", 3), "--ramp-epochs 3 without --target"),
        (("--target", 0.1, "--freeze-epoch", 3), "--freeze-epoch 3 with --target"),
        (("--restore-collapsed", "--fsdp"), "--restore-collapsed with --fsdp"),
        (("--target", 1), "--target is 1.0. Accepted: a number above 0 and below 1"),
        (("--warmup-epochs", 5, "--epochs", 4), "--warmup-epochs 5 and --ramp-epochs None are"),
        ((*TARGET, "--warmup-epochs", 2, "--epochs", 4), "--warmup-epochs 2 and --ramp-epochs 3"),
    ],
)
def test_contradictions_are_refused(cli, options, words):
    result = cli("train", *options)
    assert result.exit_code == 2 and words in " ".join(result.output.split())
