"""The sweep over tiles: each is checked and timed once, and what is wrong gets no time."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from made_up_rows import bench

from bench import tune
from bench.cases import ConvCase, LinearCase, WeightsCase
from bench.measure.timing import Timing
from bench.results import ROOT, read_results
from bench.suites import SUITES, Suite

pytest.importorskip("triton.language")
from dst_kernels.backends.triton import linear, tiles

LINEAR, WEIGHTS = LinearCase(20, 24, 40, dtype="fp32"), WeightsCase("12x500")
CASES = (LINEAR, ConvCase(2, 5, 4, 8, 3, stride=2, dtype="fp32"), WEIGHTS)


@pytest.fixture
def sweep(tmp_path, device, monkeypatch):
    """Sweeps over cases, each tile taking a second longer than the last; returns all rows."""
    seconds = itertools.count(1)
    time_of = lambda call, where: (call(), Timing(float(next(seconds)), 0.5))[1]  # noqa: E731
    monkeypatch.setattr(tune, "device_time", time_of)
    for name, cases in ("linear", CASES), ("conv", ()), ("streaming", ()):
        monkeypatch.setitem(SUITES, name, Suite(name, cases))

    def run(text, code=0):
        where = ("--out", tmp_path, "--device", device.type, "--commit", "abc")
        ended, output = bench("tune", *where, "--filter", text)
        assert ended == code, output
        return output if code else read_results(tmp_path / "tiles.csv")

    return run


def _tiles(rows, product):
    return [row.provider for row in rows if (row.pass_, row.metric) == (product, "time")]


def test_every_tile_of_every_product_is_timed_once(sweep, device, tmp_path, monkeypatch):
    rows = sweep("linear|grad_input|pack")
    traits = linear.traits_of(torch.empty(0, device=device))
    chosen = tiles.product_tile(20, 24, 40, traits, False)
    every = dict.fromkeys((chosen, *tiles.product_candidates(chosen, traits)))
    names = [tune.Task(LINEAR, "forward", tile).key[1] for tile in every]
    mine = [row for row in rows if row.case == LINEAR.name]
    assert _tiles(mine, "forward") == [names[0], "chosen", *names[1:]]
    assert {row.pass_ for row in mine} == {"forward", "grad_input", "grad_weight"}
    assert len(_tiles([r for r in rows if r.case == CASES[1].name], "grad_input")) > 2
    assert {(row.suite, row.metric) for row in rows} == {("tune", "time"), ("tune", "spread")}
    assert len(sweep("linear|grad_input|pack")) == len(rows), "a second sweep has nothing to do"
    report = (tmp_path / "tiles" / "report.md").read_text()
    assert re.search(r"^\| 12x500 \| bf16-autocast \| \d+ s \| .+ \| 1\.00 \|$", report, re.M)
    assert "--filter 'nothing' is found in none" in sweep("nothing", code=2)
    if device.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert "a CPU with TRITON_INTERPRET=1" in sweep("linear", code=2)


def test_a_tile_that_fails_or_is_wrong_has_no_time(sweep, monkeypatch, tmp_path):
    original, fail = linear.masked_product, Mock(side_effect=RuntimeError("out of registers\nand"))
    for act, metric, reason in (
        (fail, "skipped", "RuntimeError: out of registers"),
        (lambda result: 1.001 * result, "error", "from that in the chosen tile"),
        (torch.empty_like, "error", "result 0 is nan from"),  # the right one lay there before
    ):

        def product(x, weight, threshold, bias, tile, *args, act=act, **options):
            result = original(x, weight, threshold, bias, tile, *args, **options)
            return act(result) if tile.block_m == 16 else result  # which is not the chosen one

        monkeypatch.setattr(linear, "masked_product", product)
        rows = sweep("linear.*/forward")
        bad = [row for row in rows if row.figure is None]
        assert {(row.provider[:3], row.metric) for row in bad} == {("16x", metric)}
        assert all(reason in row.value for row in bad)
        assert {name[:3] for name in _tiles(rows, "forward")} == {"32x", "cho"}
        (tmp_path / "tiles.csv").unlink()
    monkeypatch.setattr(linear, "masked_product", fail)
    (row,) = sweep("linear.*/grad_input")
    assert row.metric == "skipped", "without the chosen one nothing is compared"


def _obey(tasks, done):
    for task in tasks:
        if task == "die":
            os._exit(7)
        done.value += 1


@pytest.mark.slow
def test_a_process_that_dies_is_begun_again_after_what_killed_it():
    tasks, deadline = ["live", "live", "die", "live", "live", "die"], time.monotonic() + 100
    assert list(tune.compile_all(tasks, 2, deadline, _obey)) == ["die", "die"]
    assert list(tune.compile_all(tasks, 2, time.monotonic(), _obey)) == []


def test_a_tile_that_kills_its_compiler_is_never_run(sweep, monkeypatch):
    dead = tune.Task(WEIGHTS, "pack", tiles.pack_tile(500, 1), True)
    monkeypatch.setattr(tune, "compile_all", lambda *_: iter([dead]))
    original = tune._Sweep.run
    both = lambda one, pairs: (one.compile_ahead(pairs), original(one, pairs))  # noqa: E731
    monkeypatch.setattr(tune._Sweep, "run", both)
    rows = sweep("weights")
    assert [r.provider for r in rows if r.metric == "skipped"] == [dead.key[1], "chosen"]
    assert _tiles(rows, "pack") and dead.key[1] not in _tiles(rows, "pack")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it pretends a GPU")
def test_what_is_compiled_ahead_is_what_launches_look_for(tmp_path):
    script = Path(__file__).with_name("compile_without_gpu.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-3000:]}"
    assert "17 products, all the same" in result.stdout
