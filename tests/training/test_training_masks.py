"""What runs record of their masks: changes, weights ever kept, dead rows, restarts."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from dst_kernels.nn import MaskedLinear
from dst_kernels.training.masks import Masks, was_restarted


def test_masks_are_followed_from_epoch_to_epoch():
    model = nn.Sequential(MaskedLinear(4, 3, reset_ratio=None))
    weights = torch.arange(1.0, 13).view(3, 4)
    with torch.no_grad():
        model[0].weight.copy_(weights)
    masks = Masks(model, {})

    def after(*thresholds):
        with torch.no_grad():
            model[0].threshold.copy_(torch.tensor(thresholds))
        return masks.update(model)

    # Rows are 1 to 4, 5 to 8, 9 to 12. Counting starts at the end of the first epoch.
    assert after(2.0, 4.0, 20.0) == (6 / 12, 6 / 12)
    assert after(2.0, 6.0, 10.0) == (4 / 12, 8 / 12)
    assert after(3.0, 6.0, 10.0) == (1 / 12, 8 / 12)
    again = Masks(model, masks.packed())
    for name, ever in masks.ever.items():
        assert torch.equal(again.ever[name], ever) and ever.sum() == 8
    assert again.update(model) == (0.0, 8 / 12)
    assert {name: bits.numel() for name, bits in masks.packed().items()} == {"0": 2}


@pytest.mark.parametrize(
    ("before", "now", "restarted"),
    [(0.011, 0.97, True), (0.011, 0.3, True), (0.04, 0.19, False), (0.06, 1.0, False)],
)
def test_restarts_are_told_from_regrowth(before, now, restarted):
    assert was_restarted(before, now) is restarted


def test_a_stop_changes_nothing_of_it(cli, run_of, tmp_path):
    options = ("--alpha", 0.05, "--lr", 0.05)
    whole = run_of("--epochs", 3, *options)
    begun = run_of("--epochs", 2, *options, to=tmp_path / "begun")
    assert cli("train", "--resume", begun, "--epochs", 3).exit_code == 0
    assert (begun / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    with open(whole / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first, *_, last = rows
    assert float(first["churn"]) == pytest.approx(1 - float(first["remaining_ratio"]))
    assert float(last["ever_active"]) > float(last["remaining_ratio"])
