"""What only a GPU can show: nothing waits for it, steps can be captured, memory stays in bounds."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.nn import MaskedConv2d, MaskedLinear

pytestmark = pytest.mark.gpu
PATHS = pytest.mark.parametrize("path", ["fused", "packed", "mixed", "auto"])


def layer_and_input(path, tokens=96, features=512):
    layer = MaskedLinear(features, features, path=path, device="cuda")
    layer.reset_threshold(0.02)
    return layer, torch.randn(tokens, features, device="cuda", requires_grad=True)


def step(layer, input):
    """Gradients of everything, under autocast, from nothing."""
    for tensor in (input, *layer.parameters()):
        tensor.grad = None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = layer(input)
    output.float().square().mean().backward()
    return output


@PATHS
def test_a_step_never_waits_for_the_gpu(path):
    layer, input = layer_and_input(path)
    step(layer, input)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, input)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PATHS
@pytest.mark.parametrize("collapsed", [False, True])
def test_a_captured_step_does_what_an_eager_one_does(path, collapsed):
    layer, input = layer_and_input(path)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for tensor in (input, *layer.parameters()):
        tensor.grad = None
    with torch.cuda.graph(graph):
        output = step(layer, input)
    with torch.no_grad():
        input.copy_(torch.randn_like(input))
        layer.weight.copy_(torch.randn_like(layer.weight) / 20)
        layer.threshold.fill_(10.0 if collapsed else 0.03)
    graph.replay()
    captured = [output, input.grad, *(p.grad for p in layer.parameters()), layer.threshold]
    captured = [tensor.detach().clone() for tensor in captured]
    assert bool((layer.threshold == 0).all()) is collapsed, "the guard decides in the replay"

    with torch.no_grad():
        layer.threshold.fill_(10.0 if collapsed else 0.03)
    eager = step(layer, input)
    expected = [eager, input.grad, *(p.grad for p in layer.parameters()), layer.threshold]
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@PATHS
def test_memory_of_a_step_is_at_most_that_of_the_dense_layer(path):
    """And a threshold's worth of small change: no mask, one copy of the weight at most."""

    def peak(layer, input):
        step(layer, input)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(layer, input)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    masked, input = layer_and_input(path, tokens=256, features=2048)
    dense = torch.nn.Linear(2048, 2048, device="cuda")
    assert peak(masked, input) <= peak(dense, input) + 64 * 2048 * 4


def test_a_layer_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = MaskedLinear(64, 64, device="cuda:1")
    output = layer(torch.randn(8, 64, device="cuda:1"))
    assert output.device.index == 1 and bool(output.isfinite().all())


@PATHS
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution(memory_format, kernel, stride, path):
    geometry = {"stride": stride, "padding": kernel // 2, "device": "cuda"}
    layer = MaskedConv2d(32, 64, kernel, **geometry, path=path)
    layer = layer.to(memory_format=memory_format)
    twin = MaskedConv2d(32, 64, kernel, **geometry, backend="reference")
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(4, 32, 14, 14, device="cuda").to(memory_format=memory_format)
    with torch.backends.cudnn.flags(allow_tf32=False):
        for module in (layer, twin):
            module.reset_threshold(0.03)
            module(input).square().mean().backward()
        torch.testing.assert_close(layer(input), twin(input))
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=2e-5)
