"""A run's files: one process at a time, whole or refused, and resumed to the same end."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

import dst_kernels
from dst_kernels.training import lock, run, start
from dst_kernels.training.checkpoint import load_checkpoint, save_checkpoint
from dst_kernels.training.commands import app
from dst_kernels.training.errors import UsageError
from dst_kernels.training.files import TWINS, write_json
from dst_kernels.training.lock import locked

NAMES = ("config.json", "metrics.csv", "model.safetensors", "layer_ratios.png", "thresholds.png")


def refusal(result):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Accepted" in result.output
    return result.output


def assert_same_end(one: Path, other: Path, names=NAMES):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]


def hold(folders, held):
    with locked(*folders):
        held.set()
        time.sleep(60)


def test_two_processes_cannot_write_one_folder_and_a_killed_one_leaves_nothing(
    cli, run_of, tmp_path
):
    run_of("--epochs", 1, to=tmp_path / "run")
    (tmp_path / "new").mkdir()
    # Forked, as importing torch anew takes seconds; the child only opens two files.
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    holder = fork.Process(target=hold, args=((tmp_path / "run", tmp_path / "new"), held))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        holder.start()
    try:
        assert held.wait(30)
        for arguments in (("--resume", "run", "--epochs", 2), ("--out", "new", "--epochs", 1)):
            message = refusal(cli("train", *arguments))
            assert f"{arguments[1]} is in use: process {holder.pid} on " in message
        assert [path.name for path in (tmp_path / "new").iterdir()] == [lock.LOCK]
    finally:
        holder.kill()
        holder.join()
    (tmp_path / "run" / ".checkpoint.pt.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "run" / ".mine.tmp").write_bytes(b"half")
    assert cli("train", "--resume", "run", "--epochs", 2).exit_code == 0
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".mine.tmp"]
    assert_same_end(run_of("--epochs", 2), tmp_path / "run")
    assert cli("train", "--out", "new", "--epochs", 1).exit_code == 0


def test_a_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    warned = pytest.warns(UserWarning, match="cannot be locked .*let no other process write there")
    with warned, locked(tmp_path):
        assert (tmp_path / lock.LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_checkpoint(cli, run_of, tmp_path):
    run_of("--epochs", 1, to=tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        message = refusal(cli("train", "--resume", "run", "--epochs", 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = os.strerror(errno.EFBIG)
    assert f"run/checkpoint.pt cannot be written: {reason}" in message
    assert not list((tmp_path / "run").glob(".*"))
    assert cli("train", "--resume", "run", "--epochs", 2).exit_code == 0
    assert_same_end(run_of("--epochs", 2), tmp_path / "run")


def test_every_flipped_bit_of_a_checkpoint_is_found(run_of, tmp_path):
    path, draw = tmp_path / "checkpoint.pt", random.Random(0)
    whole = (run_of("--epochs", 1) / "checkpoint.pt").read_bytes()
    ends = [len(whole) - offset for offset in range(1, 41, 3)]
    for place in (0, *(draw.randrange(len(whole)) for _ in range(20)), *ends):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UsageError, match=r"checkpoint\.pt is damaged .*checksum"):
            load_checkpoint(path)


def test_a_checkpoint_without_checksum_is_resumed_with_a_warning(cli, run_of, tmp_path):
    path = run_of("--epochs", 1, to=tmp_path / "run") / "checkpoint.pt"
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, "format": "dst_kernels.training/1"}, path)
    (tmp_path / "run" / "SHA256SUMS").unlink()
    result = cli("train", "--resume", "run", "--epochs", 2)
    assert result.exit_code == 0, result.output
    assert "Warning: run/checkpoint.pt is from an earlier version" in result.output
    assert_same_end(run_of("--epochs", 2), tmp_path / "run")
    assert load_checkpoint(path)["format"] == "dst_kernels.training/2"


WRONG = {  # what is put where, and what the message says
    "rng lacks 'cpu'": (("rng",), {}),
    "rng is None": (("rng",), None),
    "rng.cpu is a tensor of torch.uint8 [3]": (
        ("rng",),
        {"cpu": torch.zeros(3, dtype=torch.uint8)},
    ),
    "history is None": (("history",), None),
    "history is []": (("history",), []),
    "history[0] is 3": (("history",), [3]),
    "history[0].epoch is 2": (("history", 0, "epoch"), 2),
    "history[0].test_loss is nan": (("history", 0, "test_loss"), float("nan")),
    "history[0].layers is ['fc1']": (("history", 0, "layers"), ["fc1"]),
    "history[0].layers lacks 'fc1'": (("history", 0, "layers"), {}),
    "seconds is 'x'": (("seconds",), "x"),
    "config is 3": (("config",), 3),
    "config: missing or unknown are": (("config",), {"epochs": 1}),
    "config: --preset {} is unknown": (("config", "preset"), {}),
    "model is 3": (("model",), 3),
    "model.fc1.weight is a tensor of torch.float64 [2]": (
        ("model", "fc1.weight"),
        torch.zeros(2, dtype=torch.float64),
    ),
    "optimizer is []": (("optimizer",), []),
    "optimizer.state lacks 0": (("optimizer", "state"), {}),
    "optimizer.state.0 lacks 'momentum_buffer'": (("optimizer", "state", 0), {"step": 1}),
    "optimizer.state.0.momentum_buffer is None": (
        ("optimizer", "state", 0, "momentum_buffer"),
        None,
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_contents_of_a_checkpoint_are_named(cli, run_of, tmp_path, message):
    path = run_of("--epochs", 1, to=tmp_path / "run") / "checkpoint.pt"
    contents = load_checkpoint(path)
    (*parents, key), value = WRONG[message]
    target = contents
    for name in parents:
        target = target[name]
    target[key] = value
    save_checkpoint(path, contents)
    found = refusal(cli("train", "--resume", "run", "--epochs", 2))
    assert "run/checkpoint.pt" in found
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"preset": {}}', "missing or unknown"),
        ("[" * 5000 + "]" * 5000, "run/config.json"),
        (None, "--preset {} is unknown"),
    ],
)
def test_wrong_configurations_are_named(cli, run_of, tmp_path, text, message):
    path = run_of("--epochs", 1, to=tmp_path / "run") / "config.json"
    path.write_text(text or json.dumps({**json.loads(path.read_text()), "preset": {}}))
    for command in (("train", "--resume"), ("report",)):
        found = refusal(cli(*command, "run"))
        assert "run/config.json" in found and message in found


def test_a_wrong_summary_is_named_and_made_again(cli, run_of, tmp_path):
    whole = run_of("--epochs", 1)
    path = run_of("--epochs", 1, to=tmp_path / "run") / "summary.json"
    for value in ("x", -1, None, [[]]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": value}))
        message = refusal(cli("report", "run"))
        assert (
            f"run/summary.json: seconds is {value!r}. Accepted: a number of at least 0" in message
        )
        assert "dst-kernels train --resume run" in message
        assert cli("train", "--resume", "run").exit_code == 0
        assert path.read_bytes() == (whole / "summary.json").read_bytes()
    path.unlink()
    (tmp_path / "run" / "metrics.csv").write_text("epoch,lr\n1,0.1\n")
    assert "run/metrics.csv" in refusal(cli("report", "run"))
    assert cli("train", "--resume", "run").exit_code == 0
    assert_same_end(whole, tmp_path / "run")


def test_a_missing_checkpoint_is_named(cli, run_of, tmp_path):
    (run_of("--epochs", 1, to=tmp_path / "run") / "checkpoint.pt").unlink()
    assert "run/checkpoint.pt is missing" in refusal(cli("train", "--resume", "run"))


def test_a_comparison_that_was_killed_at_its_start_goes_on(cli, run_of, tmp_path, monkeypatch):
    """Before the first configuration, and between the two."""
    (tmp_path / "early" / "dense").mkdir(parents=True)
    (tmp_path / "early" / "dense" / ".config.json.0123abcd.tmp").write_text("{")
    message = refusal(cli("train", "--resume", "early"))
    assert "stopped before its configuration was written" in message
    assert cli("train", "--epochs", 2, "--compare", "--out", "early").exit_code == 0

    def stop(path, values):
        if path.parent.name == "sparse":
            raise KeyboardInterrupt
        write_json(path, values)

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", stop)
        result = cli("train", "--epochs", 2, "--compare", "--out", "late")
    assert result.exit_code == 130
    assert "no epoch was finished" in result.output
    assert cli("train", "--resume", "late").exit_code == 0
    for name in ("early", "late"):
        for twin in TWINS:
            names = ("config.json", "metrics.csv", "model.safetensors")
            assert_same_end(
                run_of("--epochs", 2, "--compare") / twin, tmp_path / name / twin, names
            )


def test_ctrl_c_in_the_first_write_names_a_command_that_works(cli, tmp_path, monkeypatch):
    def stop(path, values):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(start, "write_json", stop)
        result = cli("train", "--epochs", 1, "--out", "run")
    assert result.exit_code == 130
    assert "nothing was written yet. To start again, give the same command" in result.output
    assert cli("train", "--epochs", 1, "--out", "run").exit_code == 0


def test_printed_commands_are_quoted(cli, run_of, tmp_path):
    name = "my run :x: $b"
    run_of("--epochs", 1, to=tmp_path / name)
    message = refusal(cli("train", "--out", name))
    assert f"dst-kernels train --resume '{name}'" in message
    assert str(run.Interrupted(Path(name), 1, 2)).endswith(f"--resume '{name}'")


def test_masks_that_do_not_act_are_shown(cli, tmp_path, monkeypatch):
    problems = {"fc1": "is not used by this forward"}
    monkeypatch.setattr(dst_kernels, "check_masks", lambda *args, **kwargs: problems)
    result = cli("train", "--epochs", 1, "--out", "run")
    assert result.exit_code == 0
    assert "Warning: masks that do not act: fc1: is not used by this forward" in result.output
    problems.update(fc2="x", fc3="y")
    message = refusal(cli("train", "--epochs", 1, "--out", "other"))
    assert "--model 'lenet-300-100': no mask acts (fc1: is not used" in message
    assert not (tmp_path / "other").exists()


def test_a_damaged_run_ends_the_same_or_is_named(cli, run_of, tmp_path):
    whole, draw = run_of("--epochs", 1), random.Random(0)
    for name in ("config.json", "metrics.csv", "summary.json", "SHA256SUMS", "model.safetensors"):
        for _ in range(4):
            data = bytearray((whole / name).read_bytes())
            if draw.random() < 0.3:
                del data[draw.randrange(len(data)) :]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            target = run_of("--epochs", 1, to=tmp_path / f"{name}-{draw.random()}")
            (target / name).write_bytes(data)
            result = cli("train", "--resume", target)
            if result.exit_code == 0:
                assert_same_end(whole, target)
            else:
                assert name in refusal(result)


def train(folder, arguments):
    """Run the command in this process, which is the test's own and may be killed."""
    os.chdir(folder)
    Figure.savefig = lambda figure, file, **options: file.write(b"drawing takes long")
    raise SystemExit(CliRunner().invoke(app, ["train", *arguments]).exit_code)


@pytest.mark.slow
def test_a_comparison_that_is_killed_again_and_again_ends_the_same(run_of, tmp_path):
    whole, folder, draw = run_of("--epochs", 4, "--compare"), tmp_path / "killed", random.Random(0)
    fork = multiprocessing.get_context("forkserver")  # imports what takes seconds only once
    modules = ("pytest", "torch._dynamo", "sklearn.datasets", "dst_kernels.training.plots")
    fork.set_forkserver_preload([*modules, "dst_kernels.training.start"])
    for kills in range(9):
        begun = any((folder / name / "config.json").exists() for name in TWINS)
        start = ("--resume",) if begun else ("--epochs", "4", "--compare", "--out")
        process = fork.Process(target=train, args=(tmp_path, (*start, "killed")))
        process.start()
        while process.is_alive() and f"process {process.pid} " not in read(folder / lock.LOCK):
            time.sleep(0.001)
        if kills < 8:
            time.sleep(draw.uniform(0, 0.05 * (kills + 1)))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert process.exitcode == 0
    for twin in TWINS:
        names = ("config.json", "metrics.csv", "model.safetensors")
        assert_same_end(whole / twin, folder / twin, names)


def read(path):
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
