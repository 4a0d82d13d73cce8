"""Language models on the characters of a text file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_training_bad_input import refusal
from test_training_cli import read_csv
from torch.nn.functional import cross_entropy

import dst_kernels
from dst_kernels.training.config import RunConfig
from dst_kernels.training.data import load_data
from dst_kernels.training.gpt import GPT
from dst_kernels.training.models import load_model
from dst_kernels.training.state import new_state
from dst_kernels.training.tasks import LANGUAGE
from dst_kernels.training.text import TextBatches, read_text

CPU = torch.device("cpu")
TEXT = "".join(f"{number} geteilt durch 7 läßt {number % 7} übrig.\r\n" for number in range(90))
FAST = ("--batch-size", 8, "--threads", 1)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def text_run_of(run_of, text):
    def run(*options, to=None):
        return run_of("--dataset", "text", "--data-dir", text, *FAST, *options, to=to)

    return run


def test_a_run_measures_perplexity_and_keeps_its_vocabulary(text_run_of):
    run = text_run_of("--epochs", 2)
    names = {path.name for path in run.iterdir()}
    assert {"perplexity_and_ratio.png", "layer_ratios.png", "vocabulary.json"} < names
    assert "vocabulary.json" in (run / "SHA256SUMS").read_text()
    last = read_csv(run / "metrics.csv")[-1]
    assert list(last)[:6] == [
        *("epoch", "lr", "train_loss", "test_loss", "test_perplexity", "remaining_ratio")
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_perplexity"] == math.exp(summary["test_loss"])
    assert summary["test_perplexity"] == float(last["test_perplexity"])
    assert "test_accuracy" not in summary
    assert summary["remaining_ratio"] < 1

    # The files are enough to use the model: what they give on the end of the text was measured.
    vocabulary = json.loads((run / "vocabulary.json").read_text())["characters"]
    assert vocabulary == "".join(sorted(set(TEXT)))
    held_out = TEXT[-(len(TEXT) // 10) :]
    ids = torch.tensor([vocabulary.index(character) for character in held_out])
    (context,) = summary["input_shape"]
    windows = (len(ids) - 1) // context
    with torch.no_grad():
        logits = load_model(run)(ids[: windows * context].view(windows, context))
    loss = cross_entropy(logits.flatten(0, 1), ids[1 : windows * context + 1])
    assert summary["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_resumed_run_ends_the_same(cli, text_run_of, tmp_path):
    text_run_of("--epochs", 1, to=tmp_path / "run")
    assert cli("train", "--resume", "run", "--epochs", 2).exit_code == 0
    whole = text_run_of("--epochs", 2)
    for name in ("metrics.csv", "model.safetensors", "config.json", "perplexity_and_ratio.png"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


@pytest.mark.parametrize("change", ["another", "more"])
def test_a_text_with_other_characters_is_not_resumed(cli, text, text_run_of, tmp_path, change):
    run = text_run_of("--epochs", 1, to=tmp_path / "run")
    before = text.read_bytes()
    text.write_bytes(before.replace(b"7", b"x") if change == "another" else before + b"!")
    try:
        message = refusal(cli("train", "--resume", "run", "--epochs", 2))
    finally:
        text.write_bytes(before)
    assert "run/vocabulary.json does not have the" in message
    assert len(read_csv(run / "metrics.csv")) == 1


def test_a_comparison_and_a_report_show_perplexity(cli, run_of, text, tmp_path):
    options = ("--dataset", "text", "--data-dir", text, *FAST, "--epochs", 1)
    result = cli("train", *options, "--compare", "--out", "both")
    assert result.exit_code == 0, result.output
    both = json.loads((tmp_path / "both" / "comparison.json").read_text())
    dense, sparse = (both[name]["test_perplexity"] for name in ("dense", "sparse"))
    assert both["perplexity_difference"] == sparse - dense
    for part in (f"{dense:.2f}", f"{sparse:.2f}", f"{sparse - dense:+.2f}"):
        assert part in result.output
    assert "accuracy" not in result.output
    drawn = (tmp_path / "both" / "comparison.png").read_text()  # its numbers, by a fixture
    assert f"[[1.0, {dense!r}]]" in drawn and f"[[1.0, {sparse!r}]]" in drawn
    result = cli("report", "both")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output and f"{sparse:.2f}" in result.output
    images = run_of("--epochs", 1)
    assert "in perplexity" in refusal(cli("report", "both", images))


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        (None, "cannot be read: No such file"),
        (b"", "has 0 characters"),
        (b"too short", "has 9 characters"),
        (b"\xff" + b"x" * 5000, "is not UTF-8: byte 0 is invalid start byte"),
        (".", "cannot be read: Is a directory"),
    ],
)
def test_files_that_hold_no_text_are_refused(cli, tmp_path, contents, problem):
    if isinstance(contents, bytes):
        (tmp_path / "file").write_bytes(contents)
    name = contents if isinstance(contents, str) else "file"
    message = refusal(cli("train", "--preset", "text", "--data-dir", name, "--out", "run"))
    assert f"--data-dir '{name}' {problem}" in message
    assert "a text file in UTF-8 of at least 1,290 characters" in message
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("x" * 1290)
    read_text(str(tmp_path / "file"), CPU)  # which is enough


@pytest.mark.parametrize(
    "options", [("--preset", "text", "--model", "lenet-5"), ("--model", "gpt-mini")]
)
def test_models_and_data_that_do_not_fit_are_refused(cli, options):
    assert f"--model '{options[-1]}' does not fit --dataset" in refusal(cli("train", *options))


def test_windows_are_drawn_from_everywhere_and_targets_come_next():
    batches = TextBatches(torch.arange(1001, dtype=torch.int32), batch_size=8, context=10)
    assert len(batches) == 13
    for generator in (None, torch.Generator().manual_seed(0)):
        epoch = list(batches.epoch(generator))
        inputs = torch.cat([inputs for inputs, *_ in epoch])
        assert len(epoch) == len(batches) and inputs.shape == (100, 10)
        assert torch.equal(torch.cat([targets for _, targets, _ in epoch]), inputs + 1)
        if generator is None:
            assert torch.equal(inputs.flatten(), torch.arange(1000))
        else:
            assert len(inputs[:, 0].unique()) > 80 and len((inputs[:, 0] % 10).unique()) == 10
    again = torch.cat([i for i, *_ in batches.epoch(torch.Generator().manual_seed(0))])
    assert torch.equal(again, inputs)
    shortest = TextBatches(torch.arange(11), batch_size=8, context=10)
    ((window, *_),) = shortest.epoch(torch.Generator())
    assert window.tolist() == [list(range(10))]


def test_the_model_sees_only_what_came_before_and_all_its_products_are_masked():
    model = dst_kernels.sparsify_(GPT((12,), 7).eval())
    ids = torch.randint(7, (2, 12))
    changed = ids.clone()
    changed[:, 8:] = (ids[:, 8:] + 1) % 7
    before, after = model(ids), model(changed)
    assert before.shape == (2, 12, 7)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).all(-1).any()
    masked = dst_kernels.sparsity_report(model).total
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 2
    )
    assert masked == matrices - 7 * 128 - 12 * 128 == 4 * 12 * 128**2 + 7 * 128


def test_mixed_precision_and_losses_beyond_all_perplexities(text):
    config = RunConfig.from_preset("text", data_dir=str(text), amp="bf16")
    state = new_state(config, load_data(config, CPU), CPU)
    assert 700_000 < sum(p.numel() for p in state.model.parameters()) < 1_200_000
    assert LANGUAGE.measure(1000.0, 0.0) == math.inf  # told as divergence, not as an overflow
