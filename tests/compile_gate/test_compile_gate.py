"""The ahead-of-time gate passes what is shipped, and fails whatever breaks one of its rules.

The gate compiles, so it runs in processes of its own: in these tests Triton interprets.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from pathlib import Path

import forked
import pytest
import torch

from .__main__ import main
from .baseline import Baseline
from .binary import Measurement
from .rules import violations
from .widths import tile_accesses

pytest.importorskip("triton.language")

ROOT = Path(__file__).parents[2]
KERNELS = "tests.compile_gate.rule_breakers"


@pytest.fixture(scope="module")
def run():
    """As `python -m`, where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with forked.Server(environment, preload=("torch", "triton.language")) as server:
        yield functools.partial(server.run, folder=ROOT, timeout=580)


@pytest.mark.slow
def test_everything_shipped_passes(run):
    result = run("tests.compile_gate")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-5000:]}"


@pytest.mark.slow
def test_sizes_of_one_unaligned_and_beyond_32_bits_compile(run):
    result = run("tests.compile_gate.odd_variants")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-5000:]}"
    assert "0 of" in result.stdout and not result.stdout.startswith("0 of 0")


def test_every_tile_is_compiled_for_hopper_and_every_kernel_for_ampere():
    from dst_kernels.backends.triton import tiles

    from .variants import shipped

    names: dict[int, list[str]] = {}
    kernels: dict[int, set[str]] = {}
    for variant in shipped():
        for architecture in variant.architectures:
            names.setdefault(architecture, []).append(variant.name)
            kernels.setdefault(architecture, set()).add(variant.kernel.__name__)
    assert kernels[80] == kernels[90] and len(kernels[90]) == 10
    bf16, tf32, float32 = (
        tiles.Traits(dtype, tf32, hopper=True)
        for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False))
    )
    products, gradients = tiles.conv_product_tiles, tiles.conv_grad_weight_tiles
    for traits, product_tiles, gradient_tiles in (
        (bf16, tiles.PRODUCT_TILES[90], tiles.GRAD_WEIGHT_TILES[90]),
        (bf16, tiles.MORE_PRODUCT_TILES, tiles.MORE_GRAD_WEIGHT_TILES),
        (tf32, tiles.PRODUCT_TILES[90], tiles.TF32_GRAD_WEIGHT_TILES),
        (float32, tiles.FLOAT32_PRODUCT_TILES, tiles.FLOAT32_GRAD_WEIGHT_TILES),
    ):
        x = "bf16" if traits is bf16 else "fp32"
        found = {
            *((f"{purpose} fp32->{x}", tile) for tile in product_tiles
              for purpose in ("forward", "grad_input")),
            *((f"conv {purpose} fp32->{x}", tile) for tile in products(traits)
              for purpose in ("forward", "grad_input")),
            *((f"grad_weight fp32,{x}", tile) for tile in gradient_tiles),
            *((f"conv grad_weight fp32,{x}", tile) for tile in gradients(traits)),
        }  # fmt: skip
        for purpose, tile in found:
            begin = f"{purpose} {traits.precision} row"
            assert any(n.startswith(begin) and n.endswith(f" {tile}") for n in names[90]), begin


@pytest.fixture(scope="module")
def gate(run, tmp_path_factory):
    """The gate's output on kernels that break its rules."""
    missing = tmp_path_factory.mktemp("aot") / "no_baseline.json"
    result = run(KERNELS, "--baseline", str(missing), "--jobs", "2")
    assert result.returncode == 1, f"{result.stdout}\n{result.stderr[-5000:]}"
    return result.stdout


@pytest.mark.parametrize(
    "violation",
    [
        r"spill, sm_90: \d+ bytes spilled and reloaded per thread, \d+ instructions",
        r"spill, sm_90: ptxas C75\d\d wgmma\S* instructions are serialized",
        r"shared memory, sm_90: \d\d\d,\d\d\d bytes of shared memory, at most 232,448",
        r"shared memory, sm_80: \d\d\d,\d\d\d bytes of shared memory, at most 166,912",
        r"operand, sm_90: (\d+) of \1 wgmma take operand A from shared memory",
        r"dot, sm_90: no wgmma",
        r"dot, sm_80: no tensor-core instruction",
        r"alignment, sm_90: load in rule_breakers.py:\d+: 16 of 16 accesses have 4 bytes, not 16",
        r"alignment, sm_90: store in rule_breakers.py:\d+: 16 of 16 accesses have 2 bytes, not 16",
        r"block, sm_90: store in rule_breakers.py:\d+: the tile of 1024 elements has 8 bytes for",
        r"arguments, sm_90: does not compile: ValueError: K, t, y: missing",
        r"compiler, sm_90: the compiler crashed",
    ],
)
def test_each_violation_is_reported_once_by_name(gate, violation):
    found = re.findall(rf"^  bad {violation}", gate, re.MULTILINE)
    assert len(found) == 1, gate


def test_what_is_good_is_not_reported(gate):
    _, _, violations = gate.partition("violations in")
    assert "bad" in violations
    assert "good" not in violations


def test_the_table_has_a_row_for_each_binary(gate):
    rows = re.findall(r"^((?:good|bad) .*?)\s+(90|80) .* (ok|FAIL)$", gate, re.MULTILINE)
    verdicts = {(name, arch): verdict for name, arch, verdict in rows}
    assert verdicts["good product", "90"] == verdicts["good product", "80"] == "ok"
    assert verdicts["good streaming", "90"] == verdicts["good descriptors", "90"] == "ok"
    assert len(verdicts) == 15
    assert all((verdict == "ok") == name.startswith("good") for name, _, verdict in rows)


def test_a_missing_baseline_is_said(gate):
    assert "No baseline for Triton" in gate


def test_a_baseline_is_written_and_compared_with(run, tmp_path):
    path = tmp_path / "baseline.json"
    arguments = (KERNELS, "--baseline", str(path), "--filter", "GOOD streaming", "--arch", "90")
    assert run(*arguments, "--update-baseline").returncode == 0
    text = path.read_text()
    assert re.fullmatch(r"\d+", re.findall(r'"registers": (\d+)', text)[0])

    path.write_text(re.sub(r'"registers": (\d+)', '"registers": 1', text))
    result = run(*arguments)
    assert result.returncode == 1
    assert re.search(r"good streaming, sm_90: \d+ registers, 1 before; run with", result.stdout)


def test_a_baseline_needs_a_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "missing" / "baseline.json"
    assert main(["--update-baseline", "--baseline", str(path)], []) == 2
    assert f"no folder {path.parent}" in capsys.readouterr().err


def test_no_baseline_is_written_of_what_violates(run, tmp_path):
    path = tmp_path / "baseline.json"
    result = run(KERNELS, "--baseline", str(path), "--filter", "bad arg", "--update-baseline")
    assert result.returncode == 1
    assert not path.exists()


MEASURED = Measurement(
    registers=100,
    spilled=0,
    local=0,
    shared=1000,
    hgmma=4,
    hgmma_a_in_registers=4,
    hmma=0,
    loop=200,
    loop_mma=4,
    tma=0,
    loads={},
    stores={},
    serialised=(),
    hazards=(),
    accesses=(),
    threads=256,
    seconds=1.0,
)


@pytest.fixture
def baseline(tmp_path):
    baseline = Baseline(tmp_path / "baseline.json", "3.9.1")
    baseline.update({("a", 90): MEASURED, ("b", 80): MEASURED}, complete=True)
    return Baseline(baseline.path, "3.9.0")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 108}, None),
        ({"registers": 109}, "109 registers, 100 before"),
        ({"shared": 1001}, "1001 bytes of shared memory, 1000 before"),
        ({"hgmma": 2}, None),
        ({"hgmma": 0}, "no tensor-core instruction, 4 before"),
        ({"hgmma": 0, "hmma": 8}, None),
        ({"loop": 220}, None),
        (
            {"loop": 221, "loop_mma": 2},
            "221 instructions per iteration (2 on tensor cores), 200 before (4)",
        ),
    ],
)
def test_regressions(baseline, changes, problem):
    found = baseline.regressions("a", 90, dataclasses.replace(MEASURED, **changes))
    assert [text.partition(";")[0] for text in found] == ([problem] if problem else [])


def test_hazards_are_violations():
    from .rule_breakers import Variant

    variant = Variant("a", None, {})
    found = dataclasses.replace(MEASURED, hazards=("MOV R40, RZ writes", "another"))
    assert violations(variant, 90, MEASURED) == []
    assert violations(variant, 90, found) == ["MOV R40, RZ writes (1 more such accesses)"]


def test_what_is_not_in_the_baseline_is_a_regression(baseline):
    (problem,) = baseline.regressions("a", 80, MEASURED)
    assert problem.startswith("not in the baseline; run with --update-baseline")


def test_a_version_without_entries_has_no_regressions(baseline):
    newer = Baseline(baseline.path, "3.10.0")
    assert baseline.known and not newer.known
    assert newer.regressions("new", 90, MEASURED) == []


def test_an_update_keeps_what_was_not_measured(baseline):
    changed = dataclasses.replace(MEASURED, registers=50)
    baseline.update({("c", 90): changed}, complete=False)
    again = Baseline(baseline.path, "3.9.0")
    assert again.regressions("a", 90, MEASURED) == []
    assert again.regressions("c", 90, MEASURED) != []
    again.update({("c", 90): changed}, complete=True)
    assert again.gone({"c"}) == ["b"]
    assert again.regressions("a", 90, MEASURED) != []
    other = Baseline(baseline.path, "3.10.0")
    other.update({("a", 90): MEASURED}, complete=True)
    assert list(_versions(baseline.path)) == ["3.9", "3.10"]


def _versions(path: Path) -> list[str]:
    return re.findall(r'^  "(\S+)"', path.read_text(), re.MULTILINE)


def test_positions_inside_inline_assembler_do_not_count():
    ttgir = """
    %w = tt.load %p, %m : tensor<2x512x!tt.ptr<f32>, #blocked> loc(#loc3)
    %t = tt.load %q : !tt.ptr<f32> loc(#loc4)
    tt.store %o, %w : tensor<1024x!tt.ptr<bf16>, #blocked> loc(#loc5)
#loc1 = loc("/pkg/a.py":7:9)
#loc2 = loc("a.py":20:5)
#loc3 = loc("w"(#loc1))
#loc4 = loc("a.py":8:9)
#loc5 = loc(callsite(#loc2 at #loc1))
"""
    ptx = """
    .loc 1 7 9
    // begin inline asm
    .loc 1 8 9
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    // end inline asm
    .loc 1 8 9
    ld.global.b32 { %r5 }, [ %rd2 + 0 ];
    .loc 1 20 5
    st.global.v2.b32 [ %rd3 + 0 ], { %r6, %r7 };
    st.global.b16 [ %rd3 + 8 ], { %rs1 };
"""
    load, store = tile_accesses(ttgir, ptx)
    assert (load.operation, load.place, load.bytes, load.widths) == ("load", "a.py:7", 4096, (16,))
    assert (store.operation, store.place, store.bytes) == ("store", "a.py:20", 2048)
    assert store.widths == (8, 2)


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--arch", "70"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments, [])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([], []) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_without_triton_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert main([], []) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_a_filter_that_matches_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["--filter", "no such kernel"], []) == 2
    assert "no variant matches 'no such kernel'" in capsys.readouterr().err


def test_names_must_be_different(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    named = dataclasses.make_dataclass("Named", ["name"])
    assert main([], [named("a"), named("b"), named("a")]) == 2
    assert "several variants are named a" in capsys.readouterr().err
