"""The planner's table from measured rows, and the planner's own look into it."""

import json

import torch
from made_up_rows import MADE_UP, environment, measured, times, write_rows
from typer.testing import CliRunner

from bench.cases import ConvCase, LinearCase
from bench.commands import app
from bench.plan import plan_markdown, write_plan
from dst_kernels.plan import table as plan_lookup

CASE, CONV = LinearCase(128, 1024, 2048), ConvCase(256, 56, 256, 512, 1, stride=2, groups=2)
PASSES = ("forward", "grad_input", "grad_weight")


def _rows(case, **seconds):
    return [row for name in PASSES for row in times(case, name, **seconds)]


def test_the_planner_reads_the_table(tmp_path, monkeypatch):
    rows = _rows(CASE, fused=1.0, packed=2.0, mixed=9.0) + _rows(CONV, fused=3.0, packed=2.0)
    rows += times(CASE, "forward", "graph_time", fused=0.5, packed=0.25)
    rows += times(CASE, "grad_input", "graph_time", fused=0.5)  # of packed there is none
    rows += times(LinearCase(16, 1024, 2048), "forward", fused=1.0, packed=1.0)  # incomplete
    table = write_plan(measured(tmp_path / "results.csv", rows), tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == table
    about = {"gpu": MADE_UP, "torch": "2.99", "triton": "3.99", "commit": "abc"}
    assert about.items() <= table.items() and table["date"] == "2000-01-01T00:00:00Z"
    assert (len(table["cases"]), len(table["convs"])) == (1, 1)
    text = plan_markdown(table)
    assert "| M=128 N=1024 K=2048 float32 bfloat16 | 2.00 | 0.50 | 0.50 | fused |" in text
    assert "C=128 kernel=[1, 1] float32 bfloat16 | 1.50 | 1.50 | 1.50 | packed |" in text
    monkeypatch.setattr(plan_lookup, "_tables", lambda: {MADE_UP: table})
    dtypes = torch.bfloat16, torch.float32
    found = plan_lookup.measured_costs(MADE_UP, 128, 1024, 2048, *dtypes)
    assert (found["fused_forward"], found["packed_forward"]) == (0.5, 0.25)
    assert (found["fused_grad_input"], found["packed_grad_input"]) == (1.0, 2.0)
    # Channels are those of one group, the second size of a weight: dst_kernels/autograd/conv.py.
    N, C, *kernel = CONV.shapes[1]
    found = plan_lookup.measured_conv_costs(MADE_UP, CONV.M, N, C, *dtypes, kernel, (2, 2), 2)
    assert found == {f"{p}_{n}": s for n in PASSES for p, s in (("fused", 3.0), ("packed", 2.0))}
    assert table["convs"][0]["C"] == C == 128


def test_no_table_without_times(tmp_path):
    csv, out = tmp_path / "results.csv", tmp_path / "x.json"
    for gpu, why in ("cpu: x", "all rows are of a CPU"), (MADE_UP, "no case with the times"):
        write_rows(csv, times(CASE, "forward", fused=1.0, packed=1.0), environment(gpu))
        result = CliRunner().invoke(app, ["plan", str(csv), "--out", str(out)])
        assert result.exit_code == 2 and why in result.output and not out.exists()
