"""`dst-kernels train` in two processes: what one process trains, and after a crash, too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner
from workers import run_workers

from dst_kernels.training import loop, processes, spread
from dst_kernels.training.commands import app
from dst_kernels.training.config import RunConfig
from dst_kernels.training.errors import UsageError
from dst_kernels.training.files import TWINS, read_metrics, read_summary
from dst_kernels.training.tasks import CLASSIFICATION, LANGUAGE

pytestmark = pytest.mark.slow

SPLIT = ("--accumulate", 3, "--clip-grad-norm", 0.3)  # parts of 10 and 11 images
RUNS = {
    "ddp": SPLIT,
    "grouped": ("--optimizer", "adam", "--weight-decay", 1e-4, "--lr", 1e-5, *SPLIT),
    "twins": ("--compare", "--validation", 0.2),
    "method": ("--method", "set", "--density", 0.2, "--accumulate", 3),
    "fsdp": ("--fsdp", "--validation", 0.2, *SPLIT),
    "fsdp layer by layer": ("--fsdp", "--layer-by-layer", "--accumulate", 3),
    "fsdp text": ("--fsdp", "--dataset", "text", "--data-dir", "book.txt", "--optimizer", "sgd"),
}
LONG = ("--epochs", "40")
NAMES = [*(name for name in RUNS if name != "twins"), *(f"twins/{twin}" for twin in TWINS)]


def command(*options):
    result = CliRunner().invoke(app, ["train", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def all_runs(prefix: str = ""):
    for name, options in RUNS.items():
        command("--epochs", 2, *options, "--out", prefix + name)


def resumed(prefix: str, begun: str):
    """Go on with what another number of processes has begun."""
    command("--resume", f"{prefix}{begun}", "--epochs", 2, *(["--fsdp"] if prefix else []))


def in_two(rank: int, folder: Path):
    os.chdir(folder)
    all_runs("two ")
    command("--epochs", 1, "--fsdp", *SPLIT, "--out", "begun by two")
    resumed("two ", "begun by one")
    command(*LONG, "--out", "long")
    for sharded in (), ("--fsdp",):
        out = " ".join(["target", *sharded])
        command("--epochs", 2, "--target", 0.3, "--ramp-epochs", 1, *sharded, "--out", out)
    return {"refused": refused(rank), "drawn": drawn(), "statistics": statistics(rank)}


def refused(rank: int):
    """What the first process cannot do ends the others, too."""

    def refuse():
        raise UsageError(f"process {rank} refuses")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.time, "sleep", lambda seconds: None)
        with pytest.raises((UsageError, SystemExit)) as caught:
            processes.from_first(refuse)
    return str(caught.value)


def drawn():
    """A process's order of samples, and its own random numbers."""
    torch.manual_seed(0)
    order = loop._order(RunConfig(), epoch=0)
    return torch.randperm(100, generator=order), torch.rand(100)


def statistics(rank: int):
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank)
    spread.average_buffers(model)
    return model.running_mean, model.num_batches_tracked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process writes, and under "two ..." what two write."""
    folder = tmp_path_factory.mktemp("runs")
    text = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(6000))
    (folder / "book.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        all_runs()
        command("--epochs", 1, *SPLIT, "--out", "two begun by one")
        torch.save(run_workers(in_two, folder, folder), folder / "seen.pt")
        resumed("", "begun by two")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_does(folder, name):
    one, two = folder / name, folder / f"two {name}"
    assert read_summary(two)["processes"] == 2
    assert_same_run(one, two, LANGUAGE if "text" in name else CLASSIFICATION)


@pytest.mark.parametrize("name", ["two begun by one", "begun by two"])
def test_any_number_of_processes_resumes(folder, name):
    assert_same_run(folder / "ddp", folder / name, CLASSIFICATION)


def assert_same_run(one, two, task):
    files = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == files
    for weights in files & {"model.safetensors", "best.safetensors"}:
        expected, actual = load_file(one / weights), load_file(two / weights)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for expected, actual in zip(read_metrics(one, task), read_metrics(two, task), strict=True):
        assert actual.pop("layers") == pytest.approx(expected.pop("layers"), abs=1e-4)
        assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["target", "target --fsdp"])
def test_a_target_is_reached_and_training_goes_on(folder, name):
    ratios = [row["remaining_ratio"] for row in read_metrics(folder / name, CLASSIFICATION)]
    assert ratios == [round(0.3 * 266_200) / 266_200] * 2


def test_processes_share_the_order_and_little_else(folder):
    first, second = torch.load(folder / "seen.pt", weights_only=False)
    assert (first["refused"], second["refused"]) == ("process 0 refuses", "2")
    assert torch.equal(first["drawn"][0], second["drawn"][0])
    assert not torch.equal(first["drawn"][1], second["drawn"][1])
    for mean, batches in (first["statistics"], second["statistics"]):
        assert mean.tolist() == [0.5] * 3 and batches == 0


def test_a_killed_process_costs_an_epoch_and_no_bit(folder, tmp_path):
    killed = tmp_path / "killed"
    launch = ("torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3")
    train = ("-m", "dst_kernels", "train", *LONG, "--out", killed)
    with subprocess.Popen([sys.executable, "-m", *launch, *train]) as launcher:
        while not (killed / "checkpoint.pt").exists():
            assert launcher.poll() is None
            time.sleep(0.02)
        os.kill(process_of(launcher.pid, rank=1), signal.SIGKILL)
        assert launcher.wait(120) == 0
    log = (killed / "train.log").read_text()
    assert log.count("from epoch") == 2 and "from epoch 1\n" in log
    for name in ("model.safetensors", "metrics.csv"):
        assert (killed / name).read_bytes() == (folder / "long" / name).read_bytes()


def process_of(launcher: int, rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except (OSError, ValueError):
            continue
    raise AssertionError("no such process")
