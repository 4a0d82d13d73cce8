from __future__ import annotations

import os
import pickle

import pytest
import torch

from dst_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from dst_kernels.training.errors import UsageError
from dst_kernels.training.files import write_atomically

LOSSES = {"lr": 0.1, "train_loss": 2.0, "test_loss": 2.1}
CONTENTS = {
    "config": {"epochs": 2},
    "history": [
        {
            "epoch": 1,
            **LOSSES,
            "test_accuracy": 0.5,
            "remaining_ratio": 0.5,
            "layers": {"fc1": 0.5},
        }
    ],
    "seconds": 1.5,
    "model": {"weight": torch.arange(4.0)},
    "best": {},
    "controller": {},
    "method": {},
    "ever": {},
    "restore": {},
    "optimizer": {"state": {}, "param_groups": []},
    "rng": {"cpu": torch.get_rng_state()},
}


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "c.pt", CONTENTS)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert torch.equal(loaded["model"].pop("weight"), torch.arange(4.0))
    assert loaded["history"] == CONTENTS["history"]
    assert loaded["seconds"] == 1.5
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_file_is_complete_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    replace = os.replace

    def watch(source, target):
        seen.append((path.exists(), source.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write_atomically(path, lambda file: file.write(b"new"))
    assert seen == [(False, b"new")]
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_reported_as_such(tmp_path):
    def fail(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left on device"):
        write_atomically(tmp_path / "file", fail)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "foreign", "tensor", "newer", "evil"])
def test_damaged_and_foreign_files_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.pt"
    save_checkpoint(path, CONTENTS)
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("epoch,lr\n1,0.1\n")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "newer":
        torch.save({"format": "dst_kernels.training/99", **CONTENTS}, path)
    else:
        path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match=r"--resume: .*c\.pt:? .*Accepted"):
        load_checkpoint(path)
    assert not (tmp_path / "evil").exists()
