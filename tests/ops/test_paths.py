"""Every path on every backend computes the method's formulas, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import dst_kernels
import dst_kernels.functional as dst
from dst_kernels.nn import MaskedConv2d, MaskedLinear
from dst_kernels.plan import estimate

from . import authors
from .backends import TRITON, every_backend
from .tolerance import assert_as_accurate

PATHS = ("fused", "packed", "mixed", "auto")


GRANULARITIES = {"row": [17], "layer": [1], "element": [17, 33]}
every_granularity = pytest.mark.parametrize("granularity", list(GRANULARITIES))

M, N, K = 5, 17, 33


@pytest.fixture
def leaves(device):
    """(input, weight, threshold, bias) for a granularity."""

    def make(granularity, dtype=torch.float32):
        drawn = (
            torch.randn(M, K, dtype=torch.float64),
            torch.randn(N, K, dtype=torch.float64),
            0.3 + 0.5 * torch.rand(GRANULARITIES[granularity], dtype=torch.float64),
            torch.randn(N, dtype=torch.float64),
        )
        return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]

    return make


def results(leaves, cotangent, **options):
    output = dst.masked_linear(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))


def by_formula(leaves, cotangent, cast, product_dtype=None):
    """The method's formulas in the leaves' dtype after `cast`; products in `product_dtype`."""
    input, weight, threshold, bias = (leaf.detach() for leaf in leaves)
    mask = authors.mask(weight, threshold)
    operands = [cast(t) for t in (input, weight * mask, bias)]
    if product_dtype is not None:
        operands = [t.to(product_dtype) for t in operands]
    operands = [t.requires_grad_() for t in operands]
    output = F.linear(*operands)
    of_input, dense, of_bias = torch.autograd.grad(output, operands, cotangent.to(output.dtype))
    of_weight, of_threshold = authors.gradients(dense, weight, threshold)
    return output.detach(), of_input, of_weight, of_threshold, of_bias


@every_granularity
@every_backend(*PATHS)
def test_the_formulas(path, backend, granularity, leaves, device):
    arguments = leaves(granularity)
    cotangent = arguments[0].detach() @ arguments[1].detach().t() / K**0.5
    ours = results(arguments, cotangent, path=path, backend=backend)
    plain = by_formula(arguments, cotangent, torch.Tensor.float)
    exact = by_formula(arguments, cotangent, torch.Tensor.double)
    for result, close, truth in zip(ours, plain, exact, strict=True):
        assert_as_accurate(result, close.to(device, result.dtype), truth.to(device))


@every_granularity
@every_backend(*PATHS)
def test_under_autocast(path, backend, granularity, leaves, device):
    """Float32 masters and a float16 product."""
    arguments = leaves(granularity)
    cotangent = arguments[0].detach() @ arguments[1].detach().t() / K**0.5
    cotangent = cotangent.half()
    with torch.autocast(device.type, torch.float16):
        ours = results(arguments, cotangent, path=path, backend=backend)
    plain = by_formula(arguments, cotangent, torch.Tensor.float, torch.float16)
    exact = by_formula(arguments, cotangent, torch.Tensor.double)
    assert ours[0].dtype == torch.float16
    for result, close, truth in zip(ours, plain, exact, strict=True):
        assert_as_accurate(result, close.to(device, result.dtype), truth.to(device))


@every_backend(*PATHS)
def test_a_reset_reaches_every_product(path, backend, leaves):
    arguments = leaves("row")
    cotangent = torch.ones(M, N, device=arguments[0].device)
    with torch.no_grad():
        arguments[2].fill_(0.0)
    at_zero = results(arguments, cotangent, path=path, backend=backend)
    with torch.no_grad():
        arguments[2].fill_(9.0)
    after_reset = results(arguments, cotangent, path=path, backend=backend)
    for one, other in zip(at_zero, after_reset, strict=True):
        assert torch.equal(one, other)


@every_backend("packed", "auto")
def test_float64_where_the_path_has_it(path, backend, leaves):
    arguments = leaves("row", torch.float64)
    cotangent = torch.randn(M, N, dtype=torch.float64).to(arguments[0].device)
    ours = results(arguments, cotangent, path=path, backend=backend)
    expected = results(arguments, cotangent, path="fused", backend="reference")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("path", ["fused", "mixed"])
@pytest.mark.parametrize("backend", [TRITON])
def test_float64_is_refused_where_the_path_has_no_kernel_for_it(path, backend, leaves):
    arguments = leaves("row", torch.float64)
    cotangent = torch.ones(M, N, dtype=torch.float64).to(arguments[0].device)
    with pytest.raises(TypeError, match="path='packed' or 'auto'"):
        results(arguments, cotangent, path=path, backend=backend)


def conv_results(device, **options):
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(s, generator=generator) for s in ((2, 4, 6, 5), (6, 2, 3, 2), (6,), (6,))]
    leaves = [tensor.to(device).requires_grad_() for tensor in drawn]
    with torch.no_grad():
        leaves[2].abs_().mul_(0.5)
    geometry = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
    output = dst.masked_conv2d(*leaves, **geometry, **options)
    cotangent = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
    return output, *torch.autograd.grad(output, leaves, cotangent)


@every_backend(*PATHS)
def test_convolutions(path, backend, device, exact_float32):
    ours = conv_results(device, path=path, backend=backend)
    expected = conv_results(device, path="fused", backend="reference")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("path", ["fused", "mixed"])
def test_triton_says_that_it_has_no_fused_convolutions_over_three_dimensions(path, backend, device):
    input, weight = (torch.ones(1, 2, 3, 3, 3, device=device) for _ in range(2))
    threshold = torch.zeros(1, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="path='packed'"):
        dst.masked_conv3d(input, weight, threshold, path=path, backend=backend).sum().backward()


# -- the option's way through functions and layers -------------------------------------------------


@pytest.mark.parametrize("path", ["fastest", None])
def test_an_unknown_path_is_refused_with_the_accepted_names(path):
    weight, threshold = torch.ones(4, 3), torch.zeros(4)
    expected = f"path must be one of auto, fused, packed, mixed, sparse, but is {path!r}"
    for run in (
        lambda: dst.masked_linear(torch.ones(2, 3), weight, threshold, path=path),
        lambda: dst.masked_conv1d(torch.ones(1, 3, 2), weight[..., None], threshold, path=path),
        lambda: MaskedLinear(3, 4, path=path),
        lambda: MaskedConv2d(3, 4, 1, path=path),
        lambda: MaskedLinear.from_dense(torch.nn.Linear(3, 4), path=path),
        lambda: dst_kernels.SparsifyConfig(path=path),
        lambda: estimate.check_path(path),
    ):
        with pytest.raises(ValueError, match=expected):
            run()


def test_layers_take_it_and_say_it():
    for path in PATHS:
        for layer in (
            MaskedLinear(3, 4, path=path),
            MaskedConv2d(3, 4, 1, path=path),
            MaskedLinear.from_dense(torch.nn.Linear(3, 4), path=path),
        ):
            assert layer.path == path
            assert f"path={path}" in repr(layer)
            dense = layer.to_dense()
            assert not hasattr(dense, "path") and "path" not in repr(dense)
        assert MaskedLinear(3, 4).path == "auto"


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_hands_it_on(path):
    """All but the fused path keep the masked copy for the input's gradient."""
    layer = MaskedLinear(3, 4, path=path)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 3, requires_grad=True))
    shapes = {(4, 3), (3, 4)}  # torch's own operation saves its view for the product
    copies = [t for t in saved if t.shape in shapes and t.data_ptr() != layer.weight.data_ptr()]
    assert len(copies) == (0 if path == "fused" else 1)


def test_sparsify_hands_it_to_every_layer():
    for path in PATHS:
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
        )
        config = dst_kernels.SparsifyConfig(path=path)
        assert dst_kernels.SparsifyConfig.from_dict(config.to_dict()) == config
        dst_kernels.sparsify_(model, config)
        assert [model[0].path, model[2].path] == [path, path]
