"""The documented result of the default preset, on the real data."""

from __future__ import annotations

import json
from statistics import mean

import pytest

SEEDS = range(5)


@pytest.mark.slow
def test_default_preset_keeps_the_dense_accuracy_with_a_twenty_fifth_of_the_weights(cli, tmp_path):
    summaries = {}
    for kind, option in (("sparse", ()), ("dense", ("--dense",))):
        for seed in SEEDS:
            out = f"{kind}-{seed}"
            result = cli("train", "--seed", seed, "--out", out, *option)
            assert result.exit_code == 0, result.output
            summary = json.loads((tmp_path / out / "summary.json").read_text())
            summaries.setdefault(kind, []).append(summary)
    accuracies = [summary["test_accuracy"] for summary in summaries["sparse"]]
    assert mean(accuracies) >= 0.963
    assert min(accuracies) >= 0.955
    assert mean(s["test_accuracy"] for s in summaries["dense"]) - mean(accuracies) <= 0.005
    assert max(summary["remaining_ratio"] for summary in summaries["sparse"]) <= 0.04
