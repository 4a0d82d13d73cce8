"""What only a GPU can show of the CUDA library: launches, captures, waiting, sizes of real models.

The comparisons with the reference, in test_cuda_weights and test_cuda_steps, run there too.
"""

from __future__ import annotations

import cuda_cases
import pytest
import torch
from cuda_cases import Library, same
from cuda_ops import NAMES, masked_segments, plain_segments, prepare, small_segments
from ops.tolerance import assert_as_accurate
from test_cuda_steps import kept_count
from torch.profiler import ProfilerActivity, profile

from dst_kernels import reference

pytestmark = pytest.mark.gpu

every_op = pytest.mark.parametrize("name", NAMES)

# Each masked weight of a ResNet-50, roughly, with a norm's two parameters.
RESNET = [
    (64, 147), (64, 64), (64, 576), (256, 64), (128, 256), (128, 1152), (512, 128), (256, 512),
    (256, 2304), (1024, 256), (512, 1024), (512, 4608), (2048, 512), (1000, 2048),
] * 4  # fmt: skip
GPT = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
LARGE = [*GPT, (50257, 768), (4096, 4096), (1024, 14336), (16, 100003)]


@pytest.fixture
def library() -> Library:
    return cuda_cases.on_gpu()


def model(shapes):
    plain = [(shape[0],) for shape in shapes for _ in range(2)]
    return [*masked_segments(shapes), *plain_segments(plain)]


def launches(prepared) -> list[str]:
    """The kernels of one run."""
    prepared.run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        prepared.run()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events]


@pytest.mark.parametrize(
    "name, kernels",
    [
        ("pack", ["pack_kernel"]),
        ("post", ["post_kernel"]),
        ("regularization", ["regularization_kernel", "total_kernel"]),
        ("sgd_step", ["step_kernel"]),
        ("adamw_step", ["step_kernel"]),
        ("grad_norm", ["norm_kernel", "total_kernel"]),
    ],
)
def test_a_whole_model_is_one_or_two_launches(library, name, kernels):
    segments = model(RESNET)
    assert len(segments) >= 160
    seen = launches(prepare(library, name, segments, ("row",)))
    assert len(seen) == len(kernels), seen
    for kernel, full in zip(kernels, seen, strict=True):
        assert kernel in full


@every_op
def test_no_op_waits_for_the_gpu(library, name):
    prepared = prepare(library, name, small_segments())
    prepared.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_a_captured_op_does_what_an_eager_one_does(library, name):
    prepared = prepare(library, name, small_segments())
    before = prepared.snapshot()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prepared.run()
    torch.cuda.current_stream().wait_stream(stream)
    prepared.restore(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()
    for _ in range(2):  # the second time on other numbers: what the first has left
        start = prepared.snapshot()
        graph.replay()
        captured = prepared.snapshot()
        prepared.restore(start)
        prepared.run()
        for ours, eager in zip(captured, prepared.snapshot(), strict=True):
            same(ours, eager.cpu())


@every_op
def test_an_op_on_another_stream_waits_for_none(library, name):
    """Results are there when its stream is through; it uses no other."""
    prepared = prepare(library, name, small_segments())
    before = prepared.snapshot()
    prepared.run()
    expected = prepared.snapshot()
    prepared.restore(before)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        prepared.run()
    stream.synchronize()
    for ours, other in zip(prepared.tensors(), expected, strict=True):
        same(ours, other.cpu())


@every_op
def test_large_sizes_repeat_bit_by_bit(library, name):
    prepared = prepare(library, name, model(LARGE), ("row", "layer"))
    before = prepared.snapshot()
    prepared.run()
    expected = prepared.snapshot()
    for _ in range(5):
        prepared.restore(before)
        prepared.run()
        for ours, other in zip(prepared.tensors(), expected, strict=True):
            assert torch.equal(ours, other)


def test_pack_and_post_of_large_layers(library):
    prepared = prepare(library, "pack", masked_segments(LARGE), ("row", "layer", "element"))
    prepared.run()
    weights, thresholds, _, masked, effective, kept = prepared.arguments
    for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
        expected, _ = reference.masked_weight(weight, threshold, None, masked[i].dtype)
        assert torch.equal(masked[i], expected)
        assert torch.equal(effective[i], threshold)
        assert kept[i] == kept_count(weight, threshold)
    prepared = prepare(library, "post", masked_segments(LARGE), ("row", "layer", "element"))
    prepared.run()
    grads, weights, thresholds, settings, *results = prepared.arguments
    for i, operands in enumerate(zip(grads, weights, thresholds, strict=True)):
        rest = reference.SURROGATES[settings[2 * i]], bool(settings[2 * i + 1])
        plain = reference.masked_weight_backward(*operands, *rest)
        exact = reference.masked_weight_backward(*(t.double() for t in operands), *rest)
        for ours, close, truth in zip((r[i] for r in results), plain, exact, strict=True):
            assert_as_accurate(ours, close, truth)


@pytest.mark.parametrize("name", ["sgd_step", "adamw_step"])
def test_a_step_of_large_layers(library, name):
    prepared = prepare(library, name, model(LARGE))
    before = prepared.snapshot()
    prepared.run()
    ours = prepared.snapshot()
    prepared.restore(before)
    getattr(reference.step, f"{name}_")(*prepared.arguments)
    for one, other in zip(ours, prepared.tensors(), strict=True):
        if one.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        elif one.dtype == torch.int64:  # a weight may meet its new threshold
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2)


def test_tensors_on_another_device_than_the_current_one(library):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = Library(library.ops, torch.device("cuda:1"))
    for name in NAMES:
        prepared = prepare(other, name, small_segments())
        prepared.run()
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(1)


def test_workspaces_are_small_change(library):
    for name in NAMES:
        prepared = prepare(library, name, model(GPT), ("row",))
        prepared.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prepared.run()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= 1 << 20, name
