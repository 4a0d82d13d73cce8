"""The planner's table from measured rows."""

from __future__ import annotations

import json

import pytest
import torch
from made_up_rows import environment, times, write_rows
from typer.testing import CliRunner

from bench.cases import Case, ConvCase
from bench.commands import app
from dst_kernels.plan import table as plan_table

CONV = ConvCase(256, 56, 256, 512, 1, "bf16-autocast", stride=2)
CASE = Case("linear", 128, 1024, 2048, "bf16-autocast")
PIECES = ("forward", "grad_input", "grad_weight")


def _plan(tmp_path, path):
    out = tmp_path / "tables" / "device.json"
    result = CliRunner().invoke(app, ["plan", str(path), "--out", str(out)])
    return result, out


def test_the_table(tmp_path):
    rows = [
        row
        for index, name in enumerate(PIECES)
        for row in times(CASE, name, fused=1e-5 + index, packed=2e-5 + index, mixed=9.0, dense=9.0)
    ]
    rows += [
        (CASE, path, "forward", "graph_time", value)
        for path, value in (("fused", 5e-6), ("packed", 6e-6))
    ]
    rows.append((CASE, "fused", "grad_input", "graph_time", 5e-6))  # of packed there is none
    incomplete = Case("linear", 16, 1024, 2048, "bf16-autocast")
    rows += times(incomplete, "forward", fused=1.0, packed=1.0)
    path = write_rows(tmp_path / "results.csv", rows)
    result, out = _plan(tmp_path, path)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text()) == {
        "gpu": "made-up device",
        "torch": "2.99",
        "triton": "3.99",
        "commit": "abc",
        "date": "2000-01-01T00:00:00Z",
        "cases": [
            {
                "M": 128,
                "N": 1024,
                "K": 2048,
                "input_dtype": "bfloat16",
                "weight_dtype": "float32",
                "tf32": False,
                "forward": {"fused": 5e-6, "packed": 6e-6},
                "grad_input": {"fused": 1.00001, "packed": 1.00002},
                "grad_weight": {"fused": 2.00001, "packed": 2.00002},
            }
        ],
        "convs": [],
    }


@pytest.mark.parametrize("others", [[], [CASE]])
def test_convolutions_have_a_list_of_their_own(tmp_path, others):
    rows = [
        row
        for case in (*others, CONV)
        for name in PIECES
        for row in times(case, name, fused=1.0, packed=2.0, conv=0.5)
    ]
    result, out = _plan(tmp_path, write_rows(tmp_path / "results.csv", rows))
    assert result.exit_code == 0 and f"{1 + len(others)} cases in" in result.output
    table = json.loads(out.read_text())
    assert len(table["cases"]) == len(others)
    assert table["convs"] == [
        {
            "M": 256 * 28 * 28,
            "N": 512,
            "C": 256,
            "kernel": [1, 1],
            "stride": [2, 2],
            "groups": 1,
            "input_dtype": "bfloat16",
            "weight_dtype": "float32",
            "tf32": False,
            **{name: {"fused": 1.0, "packed": 2.0} for name in PIECES},
        }
    ]


def test_the_planner_reads_it(tmp_path, monkeypatch):
    rows = [
        row
        for case, seconds in ((CASE, 1.0), (CONV, 3.0))
        for index, name in enumerate(PIECES)
        for row in times(case, name, fused=seconds + index, packed=seconds + index + 0.5)
    ]
    _, out = _plan(tmp_path, write_rows(tmp_path / "results.csv", rows))
    table = json.loads(out.read_text())
    monkeypatch.setattr(plan_table, "_tables", lambda: {table["gpu"]: table})
    dtypes = torch.bfloat16, torch.float32
    linear = plan_table.measured_costs(table["gpu"], 128, 1024, 2048, *dtypes)
    conv = plan_table.measured_conv_costs(
        table["gpu"], 256 * 28 * 28, 512, 256, *dtypes, (1, 1), (2, 2), 1
    )
    for costs, seconds in ((linear, 1.0), (conv, 3.0)):
        assert costs == {
            f"{path}_{name}": seconds + index + more
            for index, name in enumerate(PIECES)
            for path, more in (("fused", 0.0), ("packed", 0.5))
        }


def test_both_paths_are_of_one_run(tmp_path):
    path = tmp_path / "results.csv"
    for day, seconds in (("01", {"fused": 1.0, "packed": 2.0}), ("02", {"fused": 7.0})):
        rows = [row for name in PIECES for row in times(CASE, name, **seconds)]
        write_rows(path, rows, environment(date=f"2000-01-{day}"))
    _, out = _plan(tmp_path, path)
    (case,) = json.loads(out.read_text())["cases"]
    assert case["forward"] == {"fused": 1.0, "packed": 2.0}


@pytest.mark.parametrize(
    ("gpu", "message"),
    [("cpu", "rows of a CPU only"), ("made-up device", "no case with the times")],
)
def test_no_table_without_times(tmp_path, gpu, message):
    rows = times(CASE, "forward", fused=1.0, packed=1.0)
    path = write_rows(tmp_path / "results.csv", rows, environment(gpu))
    result, out = _plan(tmp_path, path)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()
