"""The emulation notices what it is there for; what the kernels ask of the GPU; no order matters."""

from __future__ import annotations

import subprocess

import cuda_cases
import pytest
import torch
from cuda_emulation import build
from cuda_ops import NAMES, masked_segments, prepare, small_segments
from torch.profiler import ProfilerActivity, profile

from dst_kernels import reference
from dst_kernels.backends import unavailable
from dst_kernels.nn import MaskedLinear

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

F32 = torch.float32

MISTAKES = {
    "missing barrier": "wrong",
    "divergent barrier": "divergent barrier",
    "barrier after exit": "divergent barrier",
    "divergent warp": "different operations",
    "misaligned": "misaligned access",
}


def run_mistake(name: str) -> str:
    program = build.build_program(build.HERE / "mistakes.cu")
    result = subprocess.run([program, name], capture_output=True, text=True)
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name):
    assert MISTAKES[name] in run_mistake(name)


def test_what_is_right_passes():
    assert run_mistake("right") == ""


def everything() -> list[torch.Tensor]:
    """The results of all ops."""
    library = cuda_cases.emulated()
    torch.manual_seed(0)
    results = []
    for name in NAMES:
        prepared = prepare(library, name, small_segments())
        prepared.run()
        results += prepared.tensors()
    return results


@pytest.fixture(scope="module")
def in_order():
    return everything()


@pytest.mark.parametrize("order", ["reversed", "1", "2"])
def test_nothing_depends_on_the_order_of_threads(order, in_order, monkeypatch):
    monkeypatch.setenv("DST_EMULATION_ORDER", order)
    for ours, theirs in zip(everything(), in_order, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# -- launches --------------------------------------------------------------------------------------


@pytest.fixture
def ops():
    ops = cuda_cases.emulated().ops
    yield ops
    ops.on_stream(0, False)


def asked(ops, run) -> list[int]:
    """Launches, clears and copies of memory."""
    before = ops.seen()
    run()
    return [now - then for now, then in zip(ops.seen(), before, strict=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 40], ids=["small table", "large table"])
def test_one_launch_for_any_number_of_layers(name, count, ops):
    prepared = prepare(cuda_cases.emulated(), name, masked_segments([(6, 40)] * count), ("row",))
    expected = 2 if name in ("regularization", "grad_norm") else 1  # partial sums are added up
    assert asked(ops, prepared.run) == [expected, 0, 0]


@pytest.mark.skipif(unavailable("cpu") is not None, reason="needs a library for its schemas")
@pytest.mark.parametrize("level", [0.1, 9.0], ids=["trained", "collapsed"])
def test_a_forward_in_training_is_two_launches(level, ops, monkeypatch):
    """The pack and the product: nothing copies a reset into the threshold."""
    from dst_kernels.backends.compiled import weight

    monkeypatch.setattr(weight, "_pack", ops.pack.default)
    layer = MaskedLinear(40, 6, bias=False, backend="cpu", path="packed")
    layer.reset_threshold(level)
    input, version = torch.ones(3, 40), layer.threshold._version
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        assert asked(ops, lambda: layer(input)) == [1, 0, 0]
    names = [event.name for event in profiled.events()]
    assert names.count("aten::mm") == 1
    assert not {"aten::copy_", "aten::clone", "aten::zero_", "aten::fill_"} & {*names}
    assert bool((layer.threshold == (level if level < 1 else 0)).all())
    assert layer.threshold._version > version, "what was made from the old one is stale"


def test_counters_are_zero_and_a_calls_own(ops):
    """On streams in turn and in captures, until no more counters are left to be given away."""
    weight, threshold = torch.randn(9, 300), torch.rand(9)
    kept = int(reference.threshold_mask(weight, threshold).sum())
    cleared = []
    for i in range(36):
        ops.on_stream(i % 4, i % 2 == 1)
        collapsed = kept - i // 2 % 2
        empty = [torch.empty(0, 4)] * (1000 * (i % 2))  # a call takes counters for all its layers

        def run(collapsed=collapsed, empty=empty):
            (masked, *_), (effective, *_) = ops.pack(
                [weight, *empty], [threshold, *(each[:, 0] for each in empty)],
                [collapsed, 0, *[-1, 0] * len(empty)],
            )  # fmt: skip
            assert torch.equal(effective, threshold * (collapsed < kept))
            assert torch.equal(masked, reference.masked_weight(weight, effective, None, F32)[0])

        cleared.append(asked(ops, run)[1])
    captured, eager = cleared[1::2], cleared[::2]
    assert not any(eager), "each stream has got its own"
    assert captured == sorted(captured) and captured[-1] == 1 and sum(captured) < len(captured) / 2
