"""The tests of the kernels turn red when a kernel is wrong: each mistake below, made on purpose."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import forked
import pytest

import dst_kernels

pytest.importorskip("triton.language")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# file, what is right, what is wrong, the test that must notice
MUTANTS = {
    "the mask is dropped": (
        "masking.py",
        r"return tl\.where\(tl\.abs\(weight\) <= threshold, 0\.0, (.+)\)",
        r"return \1",
        "special_values::test_pack[row]",
    ),
    "ties are kept": (
        "masking.py",
        r"tl\.abs\(weight\) <= threshold",
        "tl.abs(weight) < threshold",
        "special_values::test_pack[row]",
    ),
    "gradients of ties are kept": (
        "masking.py",
        r"margin <= 0\.0",
        "margin < 0.0",
        "special_values::test_post[row]",
    ),
    "the surrogate ends before 1": (
        "masking.py",
        r"distance > 1\.0",
        "distance >= 1.0",
        "special_values::test_post[row]",
    ),
    "NaN is pruned": (
        "masking.py",
        r"weight \+ nan_or_zero",
        "weight",
        "special_values::test_pack[row]",
    ),
    "the structure gradient is left out": (
        "masking.py",
        r"if RULE\.structure_gradient:",
        "if False:",
        "linear_ops::test_all_surrogates[long_tailed]",
    ),
    "the product skips the tail of K": (
        "product.py",
        r"range\(begin, end, BLOCK_C",
        "range(begin, end - (end - begin) % BLOCK_C, BLOCK_C",
        "linear_ops::test_all_shapes_in_float32[row-(3, 63, 1)]",
    ),
    "the weight's gradient skips the tail of M": (
        "grad_weight.py",
        r"range\(begin, end, TILE\.block_m",
        "range(begin, end - (end - begin) % TILE.block_m, TILE.block_m",
        "linear_ops::test_all_shapes_in_float32[row-(3, 63, 1)]",
    ),
    "the convolution skips its last tap": (
        "conv_product.py",
        r"range\(0, steps,",
        "range(0, steps - 1,",
        "conv_ops::test_all_geometries",
    ),
    "the convolution runs over the edge of a line": (
        "conv_product.py",
        r" & \(w < geometry\.in_w\)",
        "",
        "conv_ops::test_all_geometries",
    ),
    "the input's gradient takes neighbouring outputs where stride and dilation differ": (
        "conv.py",
        r"-\(period \* dilation // stride\)",
        "-1",
        "conv_ops::test_all_geometries",
    ),
    "the gradient of a filter skips the tail of the images": (
        "conv_grad_weight.py",
        r"range\(begin, end, TILE\.block_m",
        "range(begin, end - (end - begin) % TILE.block_m, TILE.block_m",
        "conv_ops::test_all_geometries",
    ),
    "the last slab is not added": (
        "product.py",
        r"range\(parts\)",
        "range(parts - 1)",
        "tiles::test_products",
    ),
    "a slab of the gradient is not added": (
        "post.py",
        r"range\(1, dense\.number >> 1\)",
        "range(2, dense.number >> 1)",
        "tiles::test_weight_gradients",
    ),
    "the product counts ties as kept": (
        "product.py",
        r"tl\.abs\(w\) <= t",
        "tl.abs(w) < t",
        "special_values::test_the_guard_counts_whatever_the_threshold_is[row]",
    ),
    "a threshold of a row that is NaN is lost in a product": (
        "masking.py",
        r"return tl\.where\(of_rows != of_rows, of_rows, 0\.0\)",
        "return tl.zeros_like(of_rows)",
        "special_values::test_products_with_nan[row]",
    ),
    "a threshold of a column that is NaN is lost in a product": (
        "masking.py",
        r"nans \+= \(t != t\)",
        "nans += (t < t)",
        "special_values::test_products_with_nan[row]",
    ),
    "each program of the second launch takes one tile alone": (
        "product.py",
        r"tiles_r \* tiles_m, tl\.num_programs\(0\)\)",
        "tl.program_id(0) + 1)",
        "tiles::test_products",
    ),
    "pack counts ties as kept": (
        "pack.py",
        r"tl\.abs\(w\) <= t",
        "tl.abs(w) < t",
        "special_values::test_the_guard_counts_whatever_the_threshold_is[row]",
    ),
    "the guard fires one weight late": (
        "pack.py",
        r">= least_pruned",
        "> least_pruned",
        "weight_ops::test_the_guard_counts_exactly[(8, 3, 5)]",
    ),
    "a program counts its largest row only": (
        "pack.py",
        r"tl\.sum\(pruned, axis=0\)",
        "tl.max(pruned, axis=0)",
        "weight_ops::test_the_guard_counts_exactly[(130, 65)]",
    ),
    "a reset stays in the forward that found it": (
        "pack.py",
        r"if stored is not None",
        "if False",
        "weight_ops::test_a_forward_in_training_writes_a_reset_where_it_finds_it[row-False]",
    ),
    "pack leaves a hole": (
        "pack.py",
        r"(masked\(w, t\)\.to\(dtype\), mask=inside)",
        r"\1 & (c[None, :] > 0)",
        "weight_ops::test_pack_of_all_shapes[(5, 3, 3, 2)]",
    ),
}


@pytest.fixture(scope="module")
def server():
    with forked.Server() as server:
        yield server


def run_tests(server: forked.Server, root: Path, *tests: str) -> int:
    options = ("-n", 0, "-x", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={root} {ROOT}")
    named = [HERE / "test_{}.py::{}".format(*test.split("::")) for test in tests]
    environment = {"PYTHONPATH": str(root)}
    return server.run(
        "pytest", *options, *named, folder=root, path=[root], environment=environment
    ).returncode


def copied(root: Path) -> Path:
    """The folder with the kernels, of a copy of the package; these tests need no library."""
    package = Path(dst_kernels.__file__).parent
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(package, root / package.name, ignore=left_out)
    return root / package.name / "backends" / "triton"


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mistake_is_noticed(name, server, tmp_path):
    file, right, wrong, tests = MUTANTS[name]
    path = copied(tmp_path) / file
    source, replaced = re.subn(right, wrong, path.read_text())
    assert replaced, "the mutation must follow the kernel"
    path.write_text(source)
    assert run_tests(server, tmp_path, tests) == pytest.ExitCode.TESTS_FAILED


def test_a_copy_without_a_mistake_passes(server, tmp_path):
    copied(tmp_path)
    tests = {test for *_, test in MUTANTS.values() if test.endswith("]")}
    assert run_tests(server, tmp_path, *sorted(tests)) == pytest.ExitCode.OK
