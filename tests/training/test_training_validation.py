"""`--validation SHARE`: what is held out, and that the best epoch is chosen on it alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dst_kernels.training import loop
from dst_kernels.training.config import RunConfig
from dst_kernels.training.data import load_data, split
from dst_kernels.training.errors import UsageError
from dst_kernels.training.text import CONTEXT

CPU = torch.device("cpu")
HELD_OUT = ("--validation", 0.1)


@pytest.mark.parametrize("share", [0.1, 0.29, 1 / 3, 0.9])
def test_each_class_gives_its_share(share):
    labels = torch.arange(4).repeat_interleave(torch.tensor([100, 37, 10, 53]))
    labels = labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    kept, held_out = split(labels, share, seed=3)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(200))
    assert len(held_out) == round(share * 200)
    counts = labels[held_out].bincount(minlength=4)
    assert ((counts - share * labels.bincount()).abs() <= 1).all()
    assert torch.equal(held_out, split(labels, share, seed=3)[1])
    assert not torch.equal(held_out, split(labels, share, seed=4)[1])


def test_images_are_in_one_split_only(image_dir):
    whole, parts = (load_data(RunConfig(validation=share, seed=5), CPU) for share in (None, 0.25))
    assert whole.validation is None
    kept, held_out = split(whole.train.labels, 0.25, seed=5)
    assert torch.equal(parts.train.images, whole.train.images[kept])
    assert torch.equal(parts.validation.images, whole.train.images[held_out])
    assert torch.equal(parts.validation.labels, whole.train.labels[held_out])
    assert torch.equal(parts.test.images, whole.test.images)

    options = {"dataset": "image-folder", "model": "resnet18", "image_size": 32}
    folder = load_data(RunConfig(data_dir=str(image_dir), validation=0.25, **options), CPU)
    both = [folder.train.images.indices, folder.validation.images.indices]
    assert sorted(both[0] + both[1]) == list(range(16)) and len(both[1]) == 4
    first, again = (next(folder.validation.epoch(None))[0] for _ in range(2))
    assert torch.equal(first, again)  # not augmented, while the images to train on are


def test_of_a_text_the_end_is_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(chr(97 + i * i % 26) for i in range(5000)))
    options = {"dataset": "text", "model": "gpt-mini", "data_dir": str(path)}
    whole, parts = (load_data(RunConfig(validation=share, **options), CPU) for share in (None, 0.1))
    joined = torch.cat([parts.train.ids, parts.validation.ids])
    assert torch.equal(joined, whole.train.ids) and len(parts.validation.ids) == 450
    assert torch.equal(parts.test.ids, whole.test.ids)
    for share in (0.01, 0.99):
        with pytest.raises(UsageError, match=rf"holds out {CONTEXT + 1} or more and leaves"):
            load_data(RunConfig(validation=share, **options), CPU)


@pytest.mark.parametrize("share", [1e-9, 0.9999])
def test_shares_that_leave_a_part_empty_are_refused(cli, tmp_path, share):
    result = cli("train", "--validation", share, "--out", "run")
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert f"--validation {share} holds out" in result.stderr
    assert "Accepted: a share that holds out 1 or more and leaves 2 or more" in result.stderr


def test_the_best_epoch_is_that_of_the_validation_loss(cli, run_of, tmp_path, monkeypatch):
    # The test loss falls to the end: if it had a say, the third epoch would be the best.
    losses = {144: [2.0, 1.0, 1.0], 360: [3.0, 2.0, 1.0]}

    def measured(model, config, batches):
        return losses[len(batches.labels)].pop(0), 0.5

    second = run_of("--epochs", 2, *HELD_OUT)
    monkeypatch.setattr(loop, "evaluate", measured)
    result = cli("train", "--epochs", 3, *HELD_OUT, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "of epoch 2, the best in validation" in result.output
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]
    assert (best["epoch"], best["validation_loss"], best["test_loss"]) == (2, 1.0, 2.0)
    weights = load_file(tmp_path / "run" / "best.safetensors")
    for name, value in load_file(second / "model.safetensors").items():
        assert torch.equal(weights[name], value), name
    assert not torch.equal(
        weights["fc1.weight"], load_file(tmp_path / "run" / "model.safetensors")["fc1.weight"]
    )
    assert "  best.safetensors\n" in (tmp_path / "run" / "SHA256SUMS").read_text()


def test_a_resumed_run_keeps_its_best_epoch(cli, run_of, tmp_path):
    straight = run_of("--epochs", 3, "--lr", 0.3, *HELD_OUT)
    resumed = run_of("--epochs", 2, "--lr", 0.3, *HELD_OUT, to=tmp_path / "run")
    assert cli("train", "--resume", "run", "--epochs", 3).exit_code == 0
    for name in ("metrics.csv", "model.safetensors", "best.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes(), name
    assert "validation_loss,validation_accuracy" in (resumed / "metrics.csv").read_text()
    assert cli("report", "run").exit_code == 0


def test_runs_from_before_the_option_go_on(cli, run_of, tmp_path):
    straight = run_of("--epochs", 2)
    run = run_of("--epochs", 1, to=tmp_path / "run")
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    config = json.loads((run / "config.json").read_text())
    del contents["best"], contents["config"]["validation"], config["validation"]
    torch.save({**contents, "format": "dst_kernels.training/1"}, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(config))
    result = cli("train", "--resume", "run", "--epochs", 2)
    assert result.exit_code == 0, result.output
    for name in ("metrics.csv", "model.safetensors"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    assert not (run / "best.safetensors").exists()


def test_a_checkpoint_without_what_its_options_ask_for_is_refused(cli, run_of, tmp_path):
    run = run_of("--epochs", 1, to=tmp_path / "run")
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    contents["config"]["validation"] = 0.1
    torch.save({**contents, "format": "dst_kernels.training/1"}, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(contents["config"]))
    result = cli("train", "--resume", "run", "--epochs", 2)
    assert result.exit_code == 2 and "best lacks" in result.stderr
