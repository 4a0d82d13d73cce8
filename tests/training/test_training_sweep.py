"""`dst-kernels sweep`: which runs there are, what their means are, stops and failures."""

from __future__ import annotations

import csv
import json
import shutil
from statistics import mean, stdev

import pytest

from dst_kernels.training.sweep import _Job

SET = ("--methods", "set", "--densities", "0.1")
OPTIONS = ("--epochs", 1, "--alphas", "1e-3,5e-2", "--seeds", "0-1,3", "--jobs", 2, "--out", "all")
NAMES = [f"alpha-{alpha}-seed-{seed}" for alpha in ("0.001", "0.05") for seed in (0, 1, 3)]


@pytest.fixture
def in_process(cli, monkeypatch):
    """Runs are started here, one after the other: a process of its own takes seconds to start."""
    started = []

    class Process:
        def __init__(self, command):
            started.append(command[3:])
            self.returncode = cli(*command[3:]).exit_code

        def poll(self):
            return self.returncode

        def send_signal(self, number):
            self.returncode = -number

        def wait(self):
            return self.returncode

    def start(job):
        job.started, job.process = 0.0, Process(job.command)

    monkeypatch.setattr(_Job, "start", start)
    monkeypatch.setattr(_Job, "last_error", lambda job: "Error: why it failed")
    return started


def table_of(output):
    """Numbers of the printed table, by alpha."""
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if row and row[0] in ("0.001", "0.05")}


def test_all_combinations_are_trained_and_averaged(cli, in_process, tmp_path):
    result = cli("sweep", "digits", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(
        [*NAMES, "layers.png", "sweep.csv", "sweep.png"]
    )
    summaries = [json.loads((tmp_path / "all" / n / "summary.json").read_text()) for n in NAMES]
    assert [(s["alpha"], s["seed"]) for s in summaries] == [
        (alpha, seed) for alpha in (1e-3, 5e-2) for seed in (0, 1, 3)
    ]
    with open(tmp_path / "all" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for key in ("alpha", "seed", "test_accuracy", "remaining_ratio", "test_loss"):
        assert [float(row[key]) for row in rows] == [summary[key] for summary in summaries]
    for alpha, group in (("0.001", summaries[:3]), ("0.05", summaries[3:])):
        expected = ["3"]
        for key in ("test_accuracy", "remaining_ratio"):
            values = [100 * summary[key] for summary in group]
            expected += [f"{mean(values):.2f}", "%", f"{stdev(values):.2f}", "%"]
        loss = f"{mean(summary['test_loss'] for summary in group):.4f}"
        assert table_of(result.output)[alpha] == [*expected, loss]


def test_methods_and_densities_are_axes(cli, in_process, tmp_path):
    options = ("--methods", "dst,set", "--densities", "0.4,0.2", "--seeds", "0-1", "--epochs", 1)
    result = cli("sweep", "digits", *options, "--out", "all")
    assert result.exit_code == 0, result.output
    names = [f"{m}-density-{d}-seed-{s}" for m in ("dst", "set") for d in (0.4, 0.2) for s in "01"]
    files = {path.name for path in (tmp_path / "all").iterdir()}
    assert files == {*names, "layers.png", "sweep.csv", "sweep.png"}
    with open(tmp_path / "all" / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, name in zip(rows, names, strict=True):
        assert f"{row['method']}-density-{row['density']}-seed-{row['seed']}" == name
        summary = json.loads((tmp_path / "all" / name / "summary.json").read_text())
        assert float(row["test_accuracy"]) == summary["test_accuracy"]
        assert float(row["remaining_ratio"]) == pytest.approx(float(row["density"]), abs=1e-5)
    lines = [line.split() for line in result.output.splitlines()]
    table = [line for line in lines if line and line[0] in ("dst", "set") and len(line) > 9]
    assert [line[:3] for line in table] == [
        [method, density, "2"] for method in ("dst", "set") for density in ("0.4", "0.2")
    ]
    for line, group in zip(table, (rows[i : i + 2] for i in range(0, 8, 2)), strict=True):
        values = [100 * float(row["test_accuracy"]) for row in group]
        assert line[3:7] == [f"{mean(values):.2f}", "%", f"{stdev(values):.2f}", "%"]
        assert float(line[-1]) == round(mean(float(row["seconds"]) for row in group), 1)


def test_the_same_command_goes_on_and_keeps_what_is_finished(cli, in_process, tmp_path):
    assert cli("sweep", "digits", *OPTIONS).exit_code == 0
    before = (tmp_path / "all" / NAMES[1] / "summary.json").stat().st_mtime_ns
    for name in ("SHA256SUMS", "summary.json"):  # stopped before the results were written
        (tmp_path / "all" / NAMES[0] / name).unlink()
    shutil.rmtree(tmp_path / "all" / NAMES[5])
    in_process.clear()
    result = cli("sweep", "digits", *OPTIONS)
    assert result.exit_code == 0 and "6 runs in all, 4 of them finished" in result.output
    first, last = in_process
    assert first == ["train", "--resume", f"all/{NAMES[0]}"]
    assert last[:2] == ["train", "--preset=digits"] and last[-1] == f"all/{NAMES[5]}"
    assert (tmp_path / "all" / NAMES[1] / "summary.json").stat().st_mtime_ns == before
    refused = cli("sweep", "digits", *OPTIONS, "--lr", 0.5)
    assert refused.exit_code == 2 and "is a run with other options" in refused.output


def test_a_run_that_fails_is_named_and_the_others_go_on(cli, in_process, tmp_path):
    options = ("--epochs", 2, "--out", "all", "--lr", 1e20, "--seeds", "0,1")
    result = cli("sweep", "digits", "--alphas", "1e-3", *options)
    assert result.exit_code == 1
    assert "1/2  alpha-0.001-seed-0  failed: Error: why it failed" in result.output
    message = " ".join(result.output.split())
    assert "2 of 2 runs failed, the first of them alpha-0.001-seed-0: Error: why" in message


def test_ctrl_c_says_how_to_go_on(cli, in_process, monkeypatch):
    begin, seen = _Job.start, []

    def stop(job):
        seen.append(job)
        if len(seen) > 2:
            raise KeyboardInterrupt
        begin(job)

    monkeypatch.setattr(_Job, "start", stop)
    options = [each if each != 2 else 1 for each in OPTIONS]
    result = cli("sweep", "digits", *options)
    assert result.exit_code == 130
    assert (
        "Interrupted: 2 of 6 runs are finished. To go on, give the same command." in result.output
    )
    monkeypatch.setattr(_Job, "start", begin)
    assert "2 of them finished" in cli("sweep", "digits", *options).output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (),
            "--methods is None, --densities is None. Accepted: --alphas, or --targets",
        ),
        (
            ("--alphas", "1", "--targets", "0.1"),
            "Accepted: --alphas, or --targets, or --methods",
        ),
        (("--alphas", "x"), "--alpha is 'x'"),
        (("--targets", "0.1,2"), "--target is 2.0"),
        (("--alphas", "1", "--seeds", "0-"), "--seeds is '0-'"),
        (("--alphas", "1", "--jobs", "0"), "--jobs is 0"),
        (("--alphas", "1", "--model", "lenet"), "--model"),
        (("--methods", "dst,set"), "--density is None. Accepted with --method set"),
        (("--methods", "dst", "--alphas", "1"), "--alphas is '1', --methods is 'dst'. Accepted"),
        (
            ("--methods", "str", "--densities", "0.1"),
            "--density 0.1 with --method str, which finds",
        ),
        ((*SET, "--alpha-schedule", "linear"), "--alpha-schedule with --method set, which"),
        ((*SET, "--method-options", "rate=2"), "--method set: rate must be at most 1"),
        (
            ("--methods", "dst,set", "--densities", "0.1", "--method-options", "rate=0.1"),
            "--method-options with --methods dst,set. Accepted: one method",
        ),
    ],
)
def test_wrong_input_ends_before_anything_is_written(cli, tmp_path, options, words):
    result = cli("sweep", "digits", *options)
    assert result.exit_code == 2 and words in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_processes(cli, tmp_path):
    result = cli("sweep", "digits", "--epochs", 3, "--targets", 0.5, "--seeds", "0-1", "--jobs", 2)
    assert result.exit_code == 0, result.output
    assert "2/2" in result.output and "remaining 50.00 %" in result.output
