"""torch.compile: one graph, eager's numbers forwards and backwards, one program for all batches."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dst_kernels.functional as dst


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def linear(input, weight, threshold, bias):
    return dst.masked_linear(input, weight, threshold, bias).relu()


def linear_3d(input, weight, threshold, bias):
    return dst.masked_linear(input.view(input.shape[0], 2, -1), weight, threshold, bias)


def conv2d(input, weight, threshold, bias):
    return dst.masked_conv2d(
        input.sin(), weight, threshold, bias, stride=(2, 1), padding=1, dilation=(1, 2), groups=2
    )


def conv2d_same(input, weight, threshold, bias):
    return dst.masked_conv2d(input, weight, threshold, bias, padding="same", groups=2)


def conv1d(input, weight, threshold, bias):
    return dst.masked_conv1d(input, weight, threshold, bias, padding=1)


def conv3d(input, weight, threshold, bias):
    return dst.masked_conv3d(input, weight, threshold, bias, padding=(1, 0, 1))


def conv_transpose2d(input, weight, threshold, bias):
    return dst.masked_conv_transpose2d(
        input, weight, threshold, bias, stride=2, padding=1, output_padding=1, groups=2
    )


def masked_weight(input, weight, threshold, bias):
    masked = dst.masked_weight(weight, threshold, reset_ratio=None, surrogate="triangular")
    return input @ masked.t() + bias


def with_regularizer(input, weight, threshold, bias):
    penalty = dst.sparse_regularization([threshold, threshold[:2]])
    return dst.masked_linear(input, weight, threshold, bias) + 1e-2 * penalty


def counted(input, weight, threshold, bias):
    ratio = dst.remaining_ratio(weight, threshold)
    mask = dst.threshold_mask(weight, threshold)
    return dst.masked_linear(input, weight, threshold, bias) * ratio + mask.sum()


SHAPES = {
    linear: ((3, 6), (4, 6)),
    linear_3d: ((3, 12), (4, 6)),
    conv2d: ((3, 4, 6, 7), (4, 2, 3, 2)),
    conv2d_same: ((3, 4, 5, 5), (4, 2, 2, 2)),
    conv1d: ((3, 4, 6), (4, 4, 3)),
    conv3d: ((3, 2, 4, 4, 4), (4, 2, 2, 2, 2)),
    conv_transpose2d: ((3, 4, 3, 2), (4, 2, 3, 2)),
    masked_weight: ((3, 6), (4, 6)),
    with_regularizer: ((3, 6), (4, 6)),
    counted: ((3, 6), (4, 6)),
}
FUNCTIONS = pytest.mark.parametrize("function", list(SHAPES), ids=lambda f: f.__name__)


def arguments(function, batch=3):
    input, weight = SHAPES[function]
    tensors = (
        torch.randn(batch, *input[1:]),
        torch.randn(weight),
        0.5 * torch.rand(weight[0]),
        torch.randn(weight[0]),
    )
    return tuple(tensor.requires_grad_() for tensor in tensors)


def results(function, leaves):
    output = function(*leaves)
    return (output, *torch.autograd.grad(output.square().sum(), leaves))


def assert_equal_to_eager(compiled, function, batch=3):
    leaves = arguments(function, batch)
    torch.testing.assert_close(results(compiled, leaves), results(function, leaves))


@pytest.mark.parametrize("path", ["fused", "packed", "mixed"])
@pytest.mark.parametrize("function", [linear, conv2d], ids=lambda f: f.__name__)
def test_every_path_is_one_graph(function, path, monkeypatch):
    chosen = {"path": path, "backend": "reference"}
    for name in ("masked_linear", "masked_conv2d"):
        monkeypatch.setattr(dst, name, functools.partial(getattr(dst, name), **chosen))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal_to_eager(compiled, function)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(function, marks=() if function in (linear, conv2d) else pytest.mark.slow)
        for function in SHAPES
    ],
    ids=lambda f: f.__name__,
)
def test_batch_size_marked_dynamic_compiles_once(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (3, 4, 2):
        leaves = arguments(function, batch)
        torch._dynamo.mark_dynamic(leaves[0], 0)
        torch.testing.assert_close(results(compiled, leaves), results(function, leaves))
    assert counter.frame_count == 1


@FUNCTIONS
def test_one_graph_equals_eager_and_changing_batch_sizes_recompile_once(function):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch in (3, 5, 2):
        assert_equal_to_eager(compiled, function, batch)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("how", ["marked", "dynamic=True"])
def test_dynamic_spatial_sizes_compile_once(how):
    def run(input, weight, threshold):
        return dst.masked_conv2d(input, weight, threshold, stride=2, padding=1)

    counter = CompileCounterWithBackend("aot_eager")
    dynamic = True if how == "dynamic=True" else None
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    weight, threshold = torch.randn(4, 3, 3, 3, requires_grad=True), torch.rand(4)
    counts = []
    for height, width in ((6, 7), (9, 5), (8, 12)):
        input = torch.randn(2, 3, height, width)
        if how == "marked":
            torch._dynamo.mark_dynamic(input, (2, 3))
        output = compiled(input, weight, threshold)
        torch.testing.assert_close(output, run(input, weight, threshold))
        output.sum().backward()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1, counts


def test_guard_reset_is_decided_inside_the_graph():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dst.masked_weight, fullgraph=True, backend=counter)
    weight = torch.rand(4, 50) + 0.1
    pruning, collapsing = torch.full((4,), 0.5), torch.full((4,), 9.0)
    for threshold in (pruning, collapsing, pruning):
        assert torch.equal(compiled(weight, threshold), dst.masked_weight(weight, threshold))
    assert torch.equal(compiled(weight, collapsing), weight)
    assert counter.frame_count == 1


def test_channels_last_strides_agree_with_eager():
    def run(input, weight, threshold):
        return dst.masked_conv2d(input.relu(), weight, threshold, padding=1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for which in range(3):
        input, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
        if which != 0:
            input = input.contiguous(memory_format=torch.channels_last)
        if which != 1:
            weight = weight.contiguous(memory_format=torch.channels_last)
        leaves = (input.requires_grad_(), weight.requires_grad_(), torch.rand(6).requires_grad_())
        eager, graph = results(run, leaves), results(compiled, leaves)
        torch.testing.assert_close(eager, graph)
        assert [t.stride() for t in eager] == [t.stride() for t in graph]


@pytest.mark.parametrize("path", ["fused", "packed", "mixed"])
def test_channels_last_and_a_changing_batch(path):
    """On torch 2.11 a result that `contiguous` hands through would lose its gradient here."""

    def run(input, weight, threshold):
        return dst.masked_conv2d(input, weight, threshold, stride=2, path=path)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    weight = torch.randn(6, 4, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    threshold = torch.rand(6).requires_grad_()
    for batch in (2, 3):
        input = torch.randn(batch, 4, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        leaves = input, weight, threshold
        torch.testing.assert_close(results(compiled, leaves), results(run, leaves))


def test_wrong_shapes_are_refused_while_compiling():
    compiled = torch.compile(dst.masked_linear, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="threshold must have shape"):
        compiled(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(5))


def test_autocast_inside_the_graph():
    def run(input, weight, threshold, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return dst.masked_linear(input, weight, threshold, bias)

    leaves = arguments(linear)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager, graph = results(run, leaves), results(compiled, leaves)
    assert graph[0].dtype == torch.bfloat16
    assert [t.dtype for t in graph] == [t.dtype for t in eager]
    torch.testing.assert_close(graph, eager)


@pytest.mark.slow
@pytest.mark.parametrize("function", [with_regularizer, conv2d], ids=lambda f: f.__name__)
def test_inductor_equals_eager(function):
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for batch in (3, 5, 4):
        leaves = arguments(function, batch)
        torch._dynamo.mark_dynamic(leaves[0], 0)
        torch.testing.assert_close(
            results(compiled, leaves), results(function, leaves), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
def test_inductor_with_transposed_weight_and_element_threshold():
    """Inductor asserts the strides that the fakes promise."""

    def run(input, weight, threshold):
        return dst.masked_linear(input, weight.t(), threshold.t())

    leaves = (torch.randn(2, 6), torch.randn(6, 4), torch.rand(6, 4))
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    compiled = torch.compile(run, fullgraph=True, backend="inductor")
    torch.testing.assert_close(results(compiled, leaves), results(run, leaves))
