"""opcheck of every op on Triton, fake tensors, and layers under torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.library import opcheck
from triton_cases import check, crossed, every_granularity, normal, thresholds

from dst_kernels import ops
from dst_kernels.nn import MaskedConv1d, MaskedConv2d, MaskedLinear

F16, F32 = torch.float16, torch.float32
OPTIONS = ("long_tailed", True)
BACKEND = "triton"

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("ratio", [None, 1.0])
@every_granularity
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 3, 2)], ids=str)
def test_weight_ops(shape, granularity, ratio, device):
    weight, threshold = normal(*shape, device=device), thresholds(shape, granularity, device=device)
    opcheck(ops.effective_threshold, (weight, threshold, ratio, BACKEND))
    opcheck(ops.masked_weight, (weight, threshold, ratio, F16, BACKEND))
    grad = normal(*shape, dtype=F16, device=device)
    opcheck(ops.masked_weight_backward, (grad, weight, threshold, *OPTIONS, BACKEND))


@pytest.mark.parametrize(
    ("batch", "layout"),
    [*(((5,), layout) for layout in LAYOUTS), *((b, "contiguous") for b in ((), (2, 3), (0,)))],
    ids=str,
)
@pytest.mark.parametrize("of_threshold", ["row", "element"])
def test_linear_ops(batch, of_threshold, layout, device):
    arrange = LAYOUTS[layout]
    weight = arrange(normal(4, 6, device=device))
    threshold = thresholds((4, 6), of_threshold, device=device)
    input, grad = (normal(*batch, size, dtype=F16, device=device) for size in (6, 4))
    if len(batch) == 1:
        input, grad = arrange(input), arrange(grad)
    bias = normal(4, device=device)
    opcheck(ops.masked_linear, (input, weight, threshold, bias, 0.01, BACKEND))
    opcheck(ops.masked_linear_grad_input, (grad, weight, threshold, BACKEND))
    opcheck(ops.masked_linear_grad_weight, (grad, input, weight, threshold, *OPTIONS, BACKEND))


@crossed(
    ("kernel", "of_threshold", "layout"),
    {"2x1": ((2, 1), "row"), "1x1": ((1, 1), "element"), "2": ((2,), "row")},
    {layout: (layout,) for layout in LAYOUTS},
)
def test_conv_ops(kernel, of_threshold, layout, device):
    dimensions = len(kernel)
    arrange = LAYOUTS[layout]
    weight = arrange(normal(4, 3, *kernel, device=device))
    threshold = thresholds(weight.shape, of_threshold, device=device)
    input = arrange(normal(2, 3, *[3] * dimensions, dtype=F16, device=device))
    grad = arrange(normal(2, 4, *(4 - k for k in kernel), dtype=F16, device=device))
    geometry = [1] * dimensions, [0] * dimensions, [1] * dimensions, 1
    bias = normal(4, device=device)
    opcheck(ops.masked_conv, (input, weight, threshold, bias, 0.01, *geometry, BACKEND))
    shape = list(input.shape)
    opcheck(ops.masked_conv_grad_input, (grad, shape, weight, threshold, *geometry, BACKEND))
    opcheck(
        ops.masked_conv_grad_weight,
        (grad, input, weight, threshold, *geometry, *OPTIONS, BACKEND),
    )


@pytest.mark.parametrize(
    ("kernel", "channels", "filters"),
    [((1, 1), 3, 4), ((1, 1), 1, 4), ((1, 1), 3, 1), ((1,), 3, 4), ((1,), 3, 1)],
    ids=str,
)
def test_pointwise_convs_over_images_that_are_channels_last_in_one_way_or_another(
    kernel, channels, filters, device
):
    """Lines, and single channels, lie in two formats at once; the results do as the fake says."""
    weight = normal(filters, channels, *kernel, device=device)
    threshold = thresholds(weight.shape, "row", device=device)
    size = [3] * len(kernel)
    input = normal(2, *size, channels, dtype=F16, device=device).movedim(-1, 1)
    grad = normal(2, *size, filters, dtype=F16, device=device).movedim(-1, 1)
    geometry = [1] * len(kernel), [0] * len(kernel), [1] * len(kernel), 1
    for x, dy in ((input, grad), (input.contiguous(), grad.contiguous())):
        arguments = dy, list(x.shape), weight, threshold, *geometry
        opcheck(ops.masked_conv, (x, weight, threshold, None, 0.01, *geometry, BACKEND))
        opcheck(ops.masked_conv_grad_input, (*arguments, BACKEND))
        check("masked_conv", x, weight, threshold, None, 0.01, *geometry)
        check("masked_conv_grad_input", *arguments)


@pytest.mark.parametrize("path", ["fused", "packed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_functional_gradients_are_those_of_autograd(kind, path, device):
    options = {"backend": BACKEND, "path": path, "device": device}
    layer = MaskedLinear(3, 4, **options) if kind == "linear" else MaskedConv2d(3, 4, 2, **options)
    layer.reset_threshold(0.1)
    input = normal(2, 3, *[3] * (layer.weight.dim() - 2), device=device)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, input).square().sum()

    layer.eval()
    loss(dict(layer.named_parameters())).backward()
    for name, grad in torch.func.grad(loss)(parameters).items():
        torch.testing.assert_close(grad, layer.get_parameter(name).grad)


@pytest.mark.parametrize("kernel", [(2, 1), (1, 1), (2,), (1,)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_outputs_may_be_overwritten_and_gradients_are_kept_as_they_come(
    kernel, channels_last, device
):
    """By an activation in place, say; autograd copies gradients whose strides are not the
    weight's."""
    layer = {1: MaskedConv1d, 2: MaskedConv2d}[len(kernel)]
    layer = layer(3, 4, kernel, backend=BACKEND, path="fused", device=device)
    input = normal(2, *[5] * len(kernel), 3, device=device).movedim(-1, 1)
    if channels_last and len(kernel) == 2:
        layer = layer.to(memory_format=torch.channels_last)
    if not channels_last:
        input = input.contiguous()
    strides = []
    layer.weight.register_hook(lambda grad: strides.append(grad.stride()))
    layer(input).relu_().sum().backward()
    assert strides == [layer.weight.stride()]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Compiled, "auto" comes to "packed".
slow_unless_fused = [
    pytest.param(path, marks=[pytest.mark.slow] * (path != "fused"))
    for path in ("auto", "fused", "packed", "mixed")
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("path", slow_unless_fused)
def test_a_compiled_linear_layer_trains_as_the_eager_one(path, device):
    layer = MaskedLinear(6, 5, backend=BACKEND, path=path, device=device)
    layer.reset_threshold(0.1)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch in (3, 4):  # the second makes the size a symbol
        input = normal(batch, 6, device=device)
        for model in (layer, compiled):
            model(input).square().sum().backward()
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
    torch.testing.assert_close(twin.threshold.grad, layer.threshold.grad)
    torch.testing.assert_close(twin.bias.grad, layer.bias.grad)
    assert twin.threshold.grad.any()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_layer_commits_a_reset(device):
    layer = MaskedLinear(6, 5, backend=BACKEND, path="fused", device=device)
    layer.reset_threshold(9.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    input = normal(3, 6, device=device)
    torch.testing.assert_close(compiled(input), layer.to_dense()(input))
    assert not layer.threshold.any()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("path", "kernel"),
    [
        *(("fused", kernel) for kernel in (1, 2)),
        *(pytest.param(path, 2, marks=pytest.mark.slow) for path in ("auto", "packed", "mixed")),
    ],
)
def test_a_compiled_convolution_trains_as_the_eager_one(kernel, path, device):
    layer = MaskedConv2d(3, 4, kernel, stride=kernel, backend=BACKEND, path=path, device=device)
    layer = layer.to(memory_format=torch.channels_last)
    layer.reset_threshold(0.1)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second makes the size a symbol
        input = normal(batch, 3, 4, 4, device=device).to(memory_format=torch.channels_last)
        for model in (layer, compiled):
            model(input).square().sum().backward()
    for name, ours in layer.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name).grad, ours.grad)
    assert twin.threshold.grad.any()
