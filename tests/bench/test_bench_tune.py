"""The sweep over tiles: everything is timed once, nothing wrong gets a time, all of it is kept."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_rows import environment
from typer.testing import CliRunner

from bench import tune
from bench.cases import Case, ConvCase
from bench.commands import app
from bench.display import Display
from bench.environment import ROOT
from bench.errors import UsageError
from bench.problem import Problem
from bench.suites import SUITES, Suite
from bench.tile_rows import TilesFile, read_tiles
from bench.timing import Timing
from bench.tune import Sweep, tuned_cases
from bench.tune_compile import Compilation
from bench.tune_products import calls, in_tile, launches_of
from bench.workers import Finished

pytest.importorskip("triton.language")

from dst_kernels.backends.triton import conv, linear, tiles

LINEAR = Case("linear", 20, 24, 40, "fp32")
CONV = ConvCase(2, 5, 4, 8, 3, "fp32", stride=2)
WEIGHT = Case("masked_weight", 0, 12, 5000, "bf16-autocast")


@pytest.fixture
def sweep(tmp_path, device, monkeypatch):
    """Makes a sweep, whose times are numbers from 1 upwards; it ends with the test."""
    count = iter(range(1, 1000))

    def device_time(call, where):
        assert where == device
        call()
        return Timing(next(count), 0.5)

    monkeypatch.setattr(tune, "device_time", device_time)
    with TilesFile(tmp_path / "tiles.csv") as file, Display() as display:
        yield lambda **options: Sweep(file, environment(), device, display, **options)


def _rows(sweep, *cases):
    sweep.measure(cases)
    return read_tiles(sweep.file.path)


def _tiles(rows, product):
    return {(row.tile, int(row.split)) for row in rows if row.product == product}


def _texts(candidates):
    return {(str(tile), getattr(tile, "split", 1)) for tile in candidates}


def _assert_chosen(rows, product, tile):
    (chosen,) = [row for row in rows if row.product == product and row.is_chosen]
    assert (chosen.tile, int(chosen.split)) == (str(tile), getattr(tile, "split", 1))


def test_every_tile_of_a_linear_layer_is_timed(sweep, device):
    rows = _rows(sweep(), LINEAR)
    traits = linear.traits_of(torch.empty(0, device=device))
    for product, sizes in (("forward", (20, 24, 40)), ("grad_input", (20, 40, 24))):
        chosen = tiles.product_tile(*sizes, traits)
        candidates = tiles.product_candidates(chosen, traits)
        assert _tiles(rows, product) == _texts([chosen, *candidates])
        _assert_chosen(rows, product, chosen)
    chosen = tiles.grad_weight_tile(20, 24, 40, traits, False)
    candidates = tiles.grad_weight_candidates(chosen, traits, False)
    assert _tiles(rows, "grad_weight") == _texts([chosen, *candidates])
    _assert_chosen(rows, "grad_weight", chosen)
    assert [row.figure for row in rows] == list(range(1, len(rows) + 1)), "each in its own time"
    assert {(row.case, row.dtype, row.spread, row.reason) for row in rows} == {
        (LINEAR.name, "fp32", "0.5", "")
    }
    assert {(row.gpu, row.torch, row.commit) for row in rows} == {("made-up device", "2.99", "abc")}


def test_every_tile_of_a_convolution_is_timed(sweep, device):
    rows = _rows(sweep(), CONV)
    with CONV.mode.precision():
        traits = linear.traits_of(torch.empty(0, device=device), convolution=True)
    for product, positions in (("forward", 2 * 3 * 3), ("grad_input", 2 * 3 * 3)):
        assert _tiles(rows, product) == _texts(tiles.conv_product_tiles(traits))
        _assert_chosen(rows, product, tiles.conv_product_tile(positions, traits))
    chosen = tiles.conv_grad_weight_tile(2 * 3 * 3, 8, 4, 9, traits)
    candidates = tiles.conv_grad_weight_candidates(chosen, traits)
    assert _tiles(rows, "grad_weight") == _texts([chosen, *candidates])
    _assert_chosen(rows, "grad_weight", chosen)
    assert not [row for row in rows if row.reason]


def test_all_launches_of_a_product_are_in_the_same_tile(device, monkeypatch):
    """The gradient of a strided convolution's input has one for each residue of the stride."""
    call = calls(Problem(CONV, device))["grad_input"]
    launches, ran = launches_of(call), []
    monkeypatch.setattr(conv, "conv_product", lambda *args, **_: ran.append(args[-2]))
    for tile in launches.tiles:
        for run in (launches, functools.partial(in_tile, call)):
            ran.clear()
            run(tile)
            assert ran == [tile] * 4


def test_every_tile_of_the_passes_over_a_weight_is_timed(sweep):
    rows = _rows(sweep(), WEIGHT)
    for product, chosen in (("pack", tiles.pack_tile(5000, 1)), ("post", tiles.post_tile(5000, 1))):
        assert _tiles(rows, product) == _texts([chosen, *tiles.stream_candidates(chosen)])
        _assert_chosen(rows, product, chosen)
    assert not [row for row in rows if row.reason]


def _sabotage(monkeypatch, act):
    """`act(result)` becomes of every product in the smallest tile, which is not the chosen one."""
    original = linear.masked_product

    def product(x, weight, threshold, bias, tile, *args, **options):
        result = original(x, weight, threshold, bias, tile, *args, **options)
        return act(result) if tile.block_m == 16 else result

    monkeypatch.setattr(linear, "masked_product", product)


def _fail(result):
    raise RuntimeError("out of registers\nand more")


def _break_one(result):
    result[-1, -1] += result.abs().max() / 1000
    return result


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_fail, "RuntimeError: out of registers"),
        (_break_one, "from that in the chosen tile"),
        (torch.empty_like, "result 0 is nan from"),  # what lay there before was right
    ],
)
def test_a_tile_that_fails_or_is_wrong_is_recorded_without_a_time(sweep, monkeypatch, act, reason):
    _sabotage(monkeypatch, act)
    one = sweep()
    rows = _rows(one, LINEAR)
    bad = [row for row in rows if row.reason]
    assert {row.tile.split("x")[0] for row in bad} == {"16"}
    assert {row.product for row in bad} == {"forward", "grad_input"}
    for row in bad:
        assert reason in row.reason and "\n" not in row.reason
        assert row.seconds == row.spread == "" and not row.is_chosen
    assert one.without == len(bad) and one.timed == len(rows) - len(bad) > len(bad)
    products = [row for row in rows if row.product != "grad_weight" and not row.reason]
    assert {row.tile.split("x")[0] for row in products} == {"32"}


def test_where_the_chosen_tile_fails_nothing_can_be_compared(sweep, monkeypatch):
    monkeypatch.setattr(linear, "masked_product", lambda *args, **options: _fail(None))
    rows = _rows(sweep(), LINEAR)
    failed = [row for row in rows if row.reason]
    assert [(row.product, row.is_chosen) for row in failed] == [
        ("forward", True),
        ("grad_input", True),
    ]
    assert {row.product for row in rows if not row.reason} == {"grad_weight"}
    again = sweep(known=rows)
    assert len(_rows(again, LINEAR)) == len(rows), "and is not tried again"


def test_a_case_without_room_is_recorded(sweep, monkeypatch):
    def too_big(case, device):
        raise MemoryError("no room")

    monkeypatch.setattr(tune, "Problem", too_big)
    rows = _rows(sweep(), WEIGHT)
    assert [(row.product, row.reason) for row in rows] == [
        (name, "no data: MemoryError: no room") for name in ("pack", "post")
    ]


def test_nothing_is_begun_after_the_deadline(sweep, monkeypatch):
    one, device_time = sweep(), tune.device_time

    def last(call, device):
        timing = device_time(call, device)
        one.deadline = 0.0 if timing.median == 3 else one.deadline
        return timing

    monkeypatch.setattr(tune, "device_time", last)
    rows = _rows(one, LINEAR, WEIGHT)
    assert [row.figure for row in rows] == [1, 2, 3]
    names = [f"{LINEAR.name}: {name}" for name in ("forward", "grad_input", "grad_weight")]
    assert one.left_out == [*names, f"{WEIGHT.name}: pack", f"{WEIGHT.name}: post"]


def test_a_sweep_goes_on_where_another_ended(sweep):
    rows = _rows(sweep(), WEIGHT)
    assert {environment().made(row) for row in rows} == {True}
    assert {environment(gpu="another").made(row) for row in rows} == {False}
    again = sweep(known=rows[:-2])
    assert _rows(again, WEIGHT)[len(rows) :] == [
        type(row)(**{**vars(row), "seconds": f"{len(rows) + 1 + index}"})
        for index, row in enumerate(rows[-2:])
    ]
    assert again.timed == 2


def test_a_tile_that_kills_the_compiler_is_never_run(sweep, monkeypatch):
    """Whether the chosen one, without which a product cannot be compared, or another."""
    pack, post = tiles.pack_tile(5000, 1), tiles.post_tile(5000, 1)
    killers = [
        Compilation(WEIGHT, "pack", pack, True),
        Compilation(WEIGHT, "post", tiles.stream_candidates(post)[0], False),
    ]
    harmless = Compilation(WEIGHT, "post", post, True)

    def run_each(function, tasks, jobs, end):
        assert (tasks, jobs) == ([*killers, harmless], 5)
        yield from (Finished(task, "ended its process", died=True) for task in killers)
        yield Finished(harmless, "RuntimeError: no room to compile it here")
        raise RuntimeError("no more processes")

    monkeypatch.setattr(tune, "compilations", lambda cases: [*killers, harmless])
    monkeypatch.setattr(tune, "run_each", run_each)
    one = sweep()
    one.compile_ahead([WEIGHT], jobs=5)
    rows = _rows(one, WEIGHT)
    assert [(row.product, row.is_chosen) for row in rows if row.reason] == [
        ("pack", True),
        ("post", False),
    ]
    assert {row.reason for row in rows[:2]} == {"compiling it ended its process"}
    assert {row.product for row in rows[2:]} == {"post"}
    assert len(_tiles(rows, "post")) == len(rows) - 1, "each once"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it pretends a GPU")
def test_what_is_compiled_ahead_is_what_launches_look_for(tmp_path):
    script = Path(__file__).with_name("compile_without_gpu.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-3000:]}"
    assert "17 products, all the same" in result.stdout


def _invoke(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_the_command(tmp_path, device, monkeypatch):
    monkeypatch.setitem(SUITES, "cpu", Suite("cpu", (WEIGHT, LINEAR)))
    monkeypatch.setattr(tune, "device_time", lambda call, device: Timing(1e-3, 1e-4))
    path = tmp_path / "tiles.csv"
    command = ["tune", "--out", tmp_path, "--suite", "cpu", "--device", device.type]
    command += ["--case", "masked_weight", "--commit", "abc"]
    code, output = _invoke(*command, "--minutes", "0")
    assert code == 0 and "0 tiles timed" in output and not (tmp_path / "tiles.md").exists()
    assert f"{WEIGHT.name}: pack" in output and LINEAR.name not in output
    code, output = _invoke(*command)
    rows = read_tiles(path)
    assert code == 0 and f"{len(rows)} tiles timed, 0 without" in output
    assert {(row.case, row.commit) for row in rows} == {(WEIGHT.name, "abc")}
    assert "### pack, bf16-autocast" in (tmp_path / "tiles.md").read_text()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]) + lines[-3][:20])
    assert "3 tiles timed" in _invoke(*command)[1]
    assert "0 tiles timed" in _invoke(*command)[1]
    assert f"{len(rows)} tiles timed" in _invoke(*command, "--again")[1]
    for commit in ("def", "abc-dirty", "abc-dirty"):
        assert f"{len(rows)} tiles timed" in _invoke(*command[:-1], commit)[1]


def test_cases_are_those_asked_for():
    names = [case.name for case in tuned_cases(("linear", "conv"), "cuda")]
    assert names[0] == SUITES["linear"].cases[0].name and len(names) == len(set(names))
    assert set(names) == {case.name for name in ("linear", "conv") for case in SUITES[name].cases}
    assert {case.op for case in tuned_cases(("streaming",), "cuda")} == {"masked_weight"}
    parts = ("m16-n4096-k4096", "c96")
    assert len(tuned_cases(("linear", "conv"), "cuda", parts)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("fast",), "cuda"), "--suite 'fast' is unknown. Accepted: smoke"),
        ((("steps",), "cuda"), "--suite steps has no single layer or weight. Accepted: smoke"),
        ((("conv",), "cpu", ("conv", "c77")), "--case 'c77' is in no case's name. Accepted: part"),
    ],
)
def test_cases_that_there_are_not(arguments, message):
    with pytest.raises(UsageError, match=message):
        tuned_cases(*arguments)


def test_without_kernels_there_is_nothing_to_tune(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code, output = _invoke("tune", "--out", tmp_path, "--device", "cpu")
    assert code == 2 and "--device is 'cpu', where Triton's kernels cannot run" in output
    assert "TRITON_INTERPRET=1" in output


@pytest.mark.parametrize("command", ["tune", "tiles"])
def test_a_file_of_something_else(tmp_path, device, command):
    path = tmp_path / "tiles.csv"
    path.write_text("epoch,loss\n")
    options = ["--out", tmp_path, "--device", device.type] if command == "tune" else [path]
    code, output = _invoke(command, *options)
    assert code == 2 and "has the header 'epoch,loss'" in output
    assert "as written by python -m bench tune" in output
    assert path.read_text() == "epoch,loss\n"
