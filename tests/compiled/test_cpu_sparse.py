"""Sparse products in C++: the reference's results, for any number of threads, and refused input."""

from __future__ import annotations

import re

import pytest
import torch
from cpu_cases import needs_library, ops

from dst_kernels import reference
from dst_kernels.reference.conv import Geometry

pytestmark = needs_library


def sparse(rows, columns, kept, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < kept
    weight[rows // 3 : rows // 2] = 0
    at, found = weight.nonzero(as_tuple=True)
    starts = torch.zeros(rows + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(at, minlength=rows).cumsum(0)
    narrow = torch.uint16 if columns <= 1 << 16 else torch.int32
    return weight[at, found].to(dtype), found.to(narrow), starts


def agrees(output, expected, columns=100):
    """Up to the rounding of sums in another order, and of a result in 16 bits."""
    rtol = 1e-5 if output.dtype == torch.float32 else 0.016
    torch.testing.assert_close(output, expected, rtol=rtol, atol=1e-5 * columns**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [5, 97, 2100, 70_000])
def test_linear(columns, dtype):
    for kept in (0.02, 0.4):
        weight = sparse(37, columns, kept, dtype)
        for inputs in (1, 2, 8, 9, 33, 64, 65, 130):
            input = torch.randn(inputs, columns).to(dtype)
            bias = [None, torch.randn(37), torch.randn(37).to(dtype)][inputs % 3]
            output = ops().sparse_linear(input, *weight, bias)
            agrees(output, reference.sparse_linear(input, *weight, bias), columns)


GEOMETRIES = [  # kernel, stride, padding, dilation, groups
    ((1, 1), (1, 1), (0, 0), (1, 1), 1), ((3, 3), (1, 1), (0, 0), (1, 1), 1),
    ((3, 3), (1, 1), (1, 1), (1, 1), 2), ((1, 1), (2, 2), (0, 0), (1, 1), 1),
    ((3, 2), (2, 3), (1, 2), (1, 1), 4), ((3, 3), (1, 2), (4, 0), (2, 3), 1),
    ((5, 3), (4, 6), (2, 7), (2, 4), 2), ((7, 7), (2, 2), (3, 3), (1, 1), 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv(geometry, dtype):
    kernel, stride, padding, dilation, groups = geometry
    weight = sparse(12, 8 // groups * kernel[0] * kernel[1], 0.4, dtype)
    for size in ((9, 7), (14, 20), (30, 33)):
        input, bias = torch.randn(3, 8, *size).to(dtype), torch.randn(12)
        flat = (*kernel, *stride, *padding, *dilation, groups)
        output = ops().sparse_conv(input, *weight, bias, flat)
        expected = (kernel, Geometry(stride, padding, dilation, groups))
        agrees(output, reference.sparse_conv(input, *weight, bias, *expected))


def test_any_number_of_threads_gives_the_same_bits():
    weight, images = sparse(700, 900, 0.2), sparse(64, 32 * 9, 0.3)
    inputs = [torch.randn(count, 900) for count in (1, 2, 3, 300)]
    pictures, geometry = torch.randn(4, 32, 40, 40), (3, 3, 1, 1, 1, 1, 1, 1, 1)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outputs.append([ops().sparse_linear(input, *weight, None) for input in inputs])
            outputs[-1].append(ops().sparse_conv(pictures, *images, None, geometry))
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(map(torch.equal, others, outputs[0]))


def test_large_calls_are_cut_into_pieces():
    weight = sparse(9, 4000, 0.05)
    input = torch.randn(700, 4000)
    output = ops().sparse_linear(input, *weight, None)
    agrees(output, reference.sparse_linear(input, *weight, None))
    filters, images = sparse(5, 9, 0.7), torch.randn(5, 1, 600, 500)
    output = ops().sparse_conv(images, *filters, None, (3, 3, 1, 1, 1, 1, 1, 1, 1))
    expected = (3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)
    agrees(output, reference.sparse_conv(images, *filters, None, *expected))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"row_starts": lambda t: t.flip(0)}, "row_starts must ascend from 0"),
        ({"row_starts": lambda t: t * 2}, "row_starts must ascend from 0"),
        ({"row_starts": lambda t: t.long()}, "row_starts has an unexpected dtype"),
        ({"columns": lambda t: t[1:]}, "columns has"),
        ({"columns": lambda t: t.long()}, "columns has an unexpected dtype"),
        ({"values": lambda t: t.double()}, "values has an unexpected dtype"),
        ({"input": lambda t: t.double()}, "input must be float32 or bfloat16"),
        ({"values": lambda t: torch.stack((t, t), 1)[:, 0]}, "values must be contiguous"),
    ],
)
def test_refused(change, said):
    names = ("input", "values", "columns", "row_starts")
    given = dict(zip(names, (torch.randn(3, 20), *sparse(6, 20, 0.5)), strict=True))
    for name, spoil in change.items():
        given[name] = spoil(given[name])
    with pytest.raises(RuntimeError, match=re.escape(said)):
        ops().sparse_linear(*given.values(), None)
