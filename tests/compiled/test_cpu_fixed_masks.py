"""Kept weights under a fixed mask: the library's ops against the reference and float64."""

import pytest
import torch

from dst_kernels import reference
from dst_kernels.backends import implementation

CPU = torch.device("cpu")


def library(name):
    return implementation("cpu", CPU, name)


def random_mask(rows, columns, density):
    mask = torch.rand(rows, columns) < density
    mask[::5] = False
    if rows:
        mask[-1] = True
    return mask


SIZES = [(1, 1, 1), (5, 9, 3), (13, 200, 64), (30, 3000, 77), (7, 70_000, 9), (3, 5, 0), (0, 4, 2)]


@pytest.mark.parametrize("rows, columns, _", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_taken_out_and_put_back_as_in_the_reference(rows, columns, _, dtype):
    torch.manual_seed(0)
    mask, weight = random_mask(rows, columns, 0.1), torch.randn(rows, columns).to(dtype)
    where, expected = library("kept_places")(mask), reference.kept_places(mask)
    assert where.kept == expected.kept == int(mask.sum())
    assert torch.equal(where.places, expected.places)
    assert where.columns.dtype == (torch.uint16 if columns <= 1 << 16 else torch.int32)
    assert torch.equal(where.flat(), mask.view(-1).nonzero().view(-1))
    values = library("kept_values")(weight, where)
    assert torch.equal(values, weight[mask])
    assert torch.equal(values, reference.kept_values(weight, expected))
    for dense in (library("kept_dense"), reference.kept_dense):
        assert torch.equal(dense(values, where, weight.shape), torch.where(mask, weight, 0))


@pytest.mark.parametrize("rows, columns, inputs", [*SIZES, (20, 40, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_kept_weights(rows, columns, inputs, dtype):
    torch.manual_seed(0)
    where = reference.kept_places(random_mask(rows, columns, 0.3))
    grad = torch.randn(inputs, rows).to(dtype)
    input = torch.randn(inputs, columns).to(dtype)
    found = library("kept_linear_grad_weight")(grad, input, where)
    exact = reference.kept_linear_grad_weight(grad.double(), input.double(), where)
    if not exact.numel():
        assert found.numel() == 0
        return
    torchs = reference.kept_linear_grad_weight(grad, input, where)
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    error = (found.double() - exact).abs().max()
    assert error <= 2 * (torchs.double() - exact).abs().max() + rounding
    threads = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(found, library("kept_linear_grad_weight")(grad, input, where))
    finally:
        torch.set_num_threads(threads)


def test_padding_of_the_last_block_adds_nothing_to_infinite_inputs():
    where = reference.kept_places(torch.ones(1, 1, dtype=torch.bool))
    input = torch.tensor([[1.0], [float("inf")]])
    found = library("kept_linear_grad_weight")(torch.ones(2, 1), input, where)
    assert found.item() == float("inf")


def test_arguments_that_do_not_fit():
    where = reference.kept_places(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"kept_linear_grad_weight: grad must be \[..., 2\]"):
        library("kept_linear_grad_weight")(torch.ones(4, 3), torch.ones(4, 3), where)
    with pytest.raises(RuntimeError, match=r"input must be \[..., 3\], with as many rows as grad"):
        library("kept_linear_grad_weight")(torch.ones(4, 2), torch.ones(5, 3), where)
    with pytest.raises(RuntimeError, match=r"kept_dense: places\[1\] are 3 and 6, but there are 5"):
        library("kept_dense")(torch.ones(5), where, (2, 3))
    with pytest.raises(RuntimeError, match="kept_values: columns has 6 elements, expected 8"):
        library("kept_values")(torch.ones(2, 4), where)
