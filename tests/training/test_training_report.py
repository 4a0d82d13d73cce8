from __future__ import annotations

import re

import pytest
from test_training_cli import assert_is_a_picture


@pytest.fixture
def two_runs(run_of, tmp_path):
    for seed in (0, 1):
        run_of("--epochs", 2, "--seed", seed, to=tmp_path / f"seed-{seed}")
    return tmp_path


@pytest.mark.usefixtures("pictures")
def test_runs_are_compared_in_a_table_and_a_plot(cli, two_runs):
    result = cli("report", "seed-0", "seed-1")
    assert result.exit_code == 0, result.output
    rows = re.findall(
        r"seed-(\d)\s+0\.004\s+(\d)\s+2\s+([\d.]+) %\s+([\d.]+) %\s+[\d.]+", result.output
    )
    assert [(name, seed) for name, seed, *_ in rows] == [("0", "0"), ("1", "1")]
    means = [sum(float(row[i]) for row in rows) / 2 for i in (2, 3)]
    shown = re.search(r"mean of 2 seeds\s+0\.004\s+2\s+([\d.]+) %\s+([\d.]+) %", result.output)
    assert [float(value) for value in shown.groups()] == pytest.approx(means, abs=0.011)
    assert_is_a_picture(two_runs / "report.png")
    assert "plot written: report.png" in result.output
    (two_runs / "seed-1").rename(two_runs / "$^$")  # which matplotlib would read as mathematics
    again = cli("report", "seed-0", "$^$", "--plot", "report.png")
    assert "plot replaced: report.png" in again.output


def test_a_comparison_counts_as_two_runs_and_unfinished_ones_say_so(cli, run_of, two_runs):
    run_of("--epochs", 2, "--compare", to=two_runs / "both")
    for seed in (0, 1):  # which only together could be averaged
        config = two_runs / f"seed-{seed}" / "config.json"
        config.write_text(config.read_text().replace('"epochs": 2', '"epochs": 9'))
    result = cli("report", "both", "seed-0", "seed-1")
    assert result.exit_code == 0, result.output
    assert re.search(r"both/dense\s+dense\s+0\s+2\s+[\d.]+ %\s+100\.00 %", result.output)
    assert re.search(r"both/sparse\s+0\.004", result.output)
    assert "2 of 9" in result.output
    assert "mean of" not in result.output


def test_runs_of_different_recipes_are_not_averaged(cli, run_of, two_runs):
    options = ("--epochs", 1, "--seed", 1)
    run_of(*options, "--model", "lenet-5", to=two_runs / "lenet-5")
    run_of(*options, "--alpha", 0.01, to=two_runs / "stricter")
    result = cli("report", "seed-0", "lenet-5", "stricter")
    assert "lenet-5 on digits" in result.output
    assert "lenet-300-100 on digits" in result.output
    assert re.search(r"stricter\s+lenet-300-100 on digits\s+0\.01", result.output)
    assert "mean of" not in result.output


@pytest.mark.parametrize("broken", ["missing", "empty", "config", "metrics", "plot", "no picture"])
def test_bad_input(cli, two_runs, broken):
    arguments = ["seed-0", "seed-1"]
    if broken == "missing":
        arguments[1] = "nowhere"
    elif broken == "empty":
        (two_runs / "hollow").mkdir()
        arguments[1] = "hollow"
    elif broken == "config":
        (two_runs / "seed-1" / "config.json").write_text("{}")
    elif broken == "metrics":
        (two_runs / "seed-1" / "metrics.csv").write_text("epoch,lr\n1,x\n")
    elif broken == "plot":
        arguments += ["--plot", "no/such/folder/report.png"]
    else:
        arguments += ["--plot", "seed-0/config.json"]
    result = cli("report", *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert "Accepted" in result.output
    culprit = {"missing": "nowhere", "empty": "hollow", "plot": "report.png"}
    culprit["no picture"] = "--plot is 'seed-0/config.json'"
    assert culprit.get(broken, "seed-1") in result.output


def test_at_least_one_directory_is_needed(cli):
    result = cli("report")
    assert result.exit_code == 2
    assert "DIR" in result.output
