"""`--init`: a run that starts from weights of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dst_kernels.training.config import RunConfig
from dst_kernels.training.models import build_model

SHORT = ("--epochs", 1, "--alpha", 0)


def start(tmp_path, **options):
    """The state dict of a model with weights of seed 7."""
    torch.manual_seed(7)
    weights = build_model(RunConfig(dense=True), (1, 28, 28), 10).state_dict()
    torch.save(weights, tmp_path / "dense.pt")
    save_file(weights, tmp_path / "dense.safetensors")
    return weights


@pytest.mark.parametrize("file", ["dense.pt", "dense.safetensors"])
@pytest.mark.parametrize("dense", [False, True])
def test_training_begins_with_these_weights(cli, tmp_path, file, dense):
    weights = start(tmp_path)
    options = ("--dense",) if dense else ()
    result = cli("train", *SHORT, "--lr", 1e-12, "--init", file, "--out", "run", *options)
    assert result.exit_code == 0, result.output
    trained = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
    (tmp_path / file).unlink()  # resuming needs it no longer
    assert cli("train", "--resume", "run", "--epochs", 2).exit_code == 0
    assert cli("evaluate", "run").exit_code == 0


def test_both_twins_begin_with_the_weights_of_a_masked_model(cli, run_of, tmp_path):
    run = run_of("--epochs", 2, to=tmp_path / "before")
    masked = load_file(run / "model.safetensors")
    file = run / "model.safetensors"
    result = cli("train", *SHORT, "--lr", 1e-12, "--compare", "--init", file, "--out", "run")
    assert result.exit_code == 0, result.output
    for twin in ("dense", "sparse"):
        trained = load_file(tmp_path / "run" / twin / "model.safetensors")
        assert set(trained) == {n for n in masked if twin == "sparse" or "threshold" not in n}
        for name, value in trained.items():
            torch.testing.assert_close(value, masked[name], rtol=0, atol=1e-6)
    summary = json.loads((tmp_path / "run" / "sparse" / "summary.json").read_text())
    assert summary["remaining_ratio"] < 0.8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("fc3.bias"), "lacks 'fc3.bias'"),
        (lambda w: w.update(more=torch.zeros(1)), "has 'more'"),
        (lambda w: w.update({"fc1.bias": torch.zeros(3)}), "has another shape of 'fc1.bias'"),
        (lambda w: w.update(epoch=3), "is not a mapping of names to tensors"),
    ],
)
def test_weights_of_another_model_are_named(cli, tmp_path, change, said):
    weights = dict(start(tmp_path))
    change(weights)
    torch.save(weights, tmp_path / "dense.pt")
    result = cli("train", *SHORT, "--init", "dense.pt", "--out", "run")
    assert result.exit_code == 2
    assert f"--init 'dense.pt' {said}" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["nowhere.pt", "nowhere.safetensors", "text.pt"])
def test_files_that_cannot_be_read_are_named(cli, tmp_path, file):
    (tmp_path / "text.pt").write_text("no weights")
    result = cli("train", *SHORT, "--init", file, "--out", "run")
    assert result.exit_code == 2
    assert f"--init '{file}' cannot be read" in result.stderr
