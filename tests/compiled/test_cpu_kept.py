"""Kept rows in C++: exactly the reference's rows, products as exact as torch's, refused input."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import needs_library, ops, same
from cpu_steps import ABSENT, Segment, call_of
from torch.nn import functional as F

from dst_kernels import reference
from dst_kernels.reference import KeptRows
from dst_kernels.reference.kept import dense_rows

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from tolerance import assert_as_accurate

pytestmark = needs_library


def masked_weight(rows, columns, kept, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < kept
    weight[rows // 3 : rows // 2] = 0
    return weight.to(dtype)


def kept_rows(masked, most=sys.maxsize):
    rows = reference.new_kept_rows(masked)
    rows.values.fill_(math.nan)  # nobody may read what is not kept
    rows.columns.view(torch.int16 if rows.columns.dtype == torch.uint16 else torch.int32).fill_(-1)
    return rows if ops().kept_rows(masked, most, *rows) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (13, 7), (30, 8), (9, 8, 5, 5), (40, 521), (3, 70_000)])
def test_rows_are_exactly_what_is_not_zero(shape, dtype):
    for kept in (0.0, 0.04, 0.5, 1.0):
        masked = masked_weight(shape[0], math.prod(shape[1:]), kept, dtype).view(shape)
        masked.view(-1)[-1] = math.nan
        rows, counts = kept_rows(masked), (masked != 0).flatten(1).sum(1)
        assert torch.equal(rows.places[:, 1] - rows.places[:, 0], counts.to(torch.int32))
        torch.testing.assert_close(dense_rows(rows), masked, rtol=0, atol=0, equal_nan=True)


def test_a_weight_that_keeps_too_much_is_left_alone():
    masked = masked_weight(90, 40, 0.5)
    count = int((masked != 0).sum())
    assert kept_rows(masked, count // 2) is None
    assert kept_rows(masked, 2 * count) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [5, 97, 2100, 70_000])
def test_products_are_as_exact_as_torchs(columns, dtype):
    for kept in (0.02, 0.4):
        masked = masked_weight(37, columns, kept, dtype)
        rows, wide = kept_rows(masked), masked.double()
        for inputs in (1, 2, 9, 33, 64, 130):
            input, grad = torch.randn(inputs, columns).to(dtype), torch.randn(inputs, 37).to(dtype)
            bias = [None, torch.randn(37), torch.randn(37).to(dtype)][inputs % 3]
            exact_bias = None if bias is None else bias.double()
            assert_as_accurate(
                ops().kept_linear(input, *rows, bias),
                reference.kept_linear(input, reference.kept_rows(masked, sys.maxsize), bias),
                F.linear(input.double(), wide, exact_bias),
                F.linear(input.double().abs(), wide.abs()),
            )
            assert_as_accurate(
                ops().kept_linear_grad_input(grad, *rows),
                grad @ masked,
                grad.double() @ wide,
                grad.double().abs() @ wide.abs(),
            )


def test_any_number_of_threads_gives_the_same_bits():
    masked = masked_weight(700, 900, 0.2)
    input, grad = torch.randn(96, 900), torch.randn(96, 700)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            rows = kept_rows(masked)
            outputs.append((
                dense_rows(rows),
                ops().kept_linear(input, *rows, None),
                ops().kept_linear_grad_input(grad, *rows),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(map(torch.equal, outputs[0], others))


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("masked", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_writes_the_rows_of_what_it_would_write(rule, masked):
    segments = [
        Segment((40, 521), masked=masked),
        Segment((5, 7), plain=True, masked=None),
        Segment((30, 6, 3, 3), masked=masked, collapsed=10**6),  # the guard resets it
        Segment((8, 600), masked=masked),
        Segment((20, 600), torch.bfloat16, masked=masked),
        Segment((8, 60), torch.float64, masked=torch.float64),
    ]
    dense = call_of(rule, segments)
    dense.values["thresholds"][0][3] = math.inf
    other = dense.clone()
    rows = [reference.new_kept_rows(m) if m.numel() else None for m in other.values["masked"]]
    rows[3] = None  # as it is, beside the rows of others
    lists = [[ABSENT if each is None else each[k] for each in rows] for k in (1, 2)]
    other.values["masked"] = [*other.values["masked"], *lists[0], *lists[1]]
    for one, two in ((dense.run(), other.run()), (dense.refer(), other.refer())):
        expected, found = one.values, two.values
        for i, each in enumerate(rows):
            made = found["masked"][i :: len(rows)]
            same(made[0] if each is None else dense_rows(KeptRows(*made)), expected["masked"][i])
        for name in ("kept", "weights", "thresholds"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"places": torch.zeros(3, 2, dtype=torch.int32)}, "columns must have 3 rows"),
    ({"places": torch.tensor([[0, 29]] * 4, dtype=torch.int32)}, r"places\[0\] are 0 and 29"),
    ({"places": torch.tensor([[2, 1]] * 4, dtype=torch.int32)}, r"places\[0\] are 2 and 1"),
    ({"columns": torch.zeros(4, 6, dtype=torch.int32)}, "columns has 24 elements, expected 28"),
    ({"values": torch.zeros(4, 7).double()}, "values has an unexpected dtype"),
])  # fmt: skip
def test_rows_that_cannot_be_are_refused(change, message):
    rows = kept_rows(masked_weight(4, 7, 0.5))._asdict() | change
    with pytest.raises(RuntimeError, match=message):
        ops().kept_linear(torch.randn(2, 7), *rows.values(), None)
