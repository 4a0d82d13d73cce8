"""pack, post and regularization of the CUDA library against the reference."""

from __future__ import annotations

import itertools

import cuda_cases
import pytest
import torch
from cuda_cases import (
    DTYPES,
    GRANULARITIES,
    Memory,
    gradient_along,
    pack,
    post,
    same,
    settings_of,
    threshold_like,
    weights_of,
)
from ops.tolerance import assert_as_accurate

from dst_kernels import reference
from dst_kernels.reference.regularization import sparse_regularization_and_slope

library = cuda_cases.library

NO_GUARD = (-1, 0)
F32 = torch.float32
SURROGATES = range(len(reference.SURROGATES))
of_any_alignment = pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])


def mixed_operands(dtype):
    """Weights of all shapes with thresholds of all granularities, and the latter."""
    weights = [weight for weight in weights_of(dtype) for _ in GRANULARITIES]
    granularities = list(GRANULARITIES) * (len(weights) // len(GRANULARITIES))
    return weights, [threshold_like(w, g) for w, g in zip(weights, granularities, strict=True)]


def kept_count(weight, threshold):
    return int(reference.threshold_mask(weight, threshold).sum())


@of_any_alignment
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "{}-{}".format(*pair)
)
def test_pack_is_exactly_the_reference(library, dtypes, shift):
    dtype, masked_dtype = dtypes
    weights, thresholds = mixed_operands(dtype)
    count = len(weights)
    masked, effective, kept, stored = pack(
        library, Memory(library, shift), weights, thresholds, [NO_GUARD] * count,
        [masked_dtype] * count,
    )  # fmt: skip
    for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
        same(masked[i], reference.masked_weight(weight, threshold, None, masked_dtype)[0])
        same(effective[i], threshold)
        same(stored[i], threshold)
        assert kept[i] == kept_count(weight, threshold)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_pack_of_special_values(library, granularity):
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1e-40, -1e-40, inf, -inf, nan, 3e38])
    bounds = torch.tensor([0.0, -0.0, 1.0, 0.5, -1.0, inf, -inf, nan, 1e-40])
    if granularity == "row":
        weights, thresholds = [values.repeat(len(bounds), 1)], [bounds]
    elif granularity == "layer":
        weights = [values.reshape(3, 4) for _ in bounds]
        thresholds = list(bounds.reshape(-1, 1))
    else:
        weights = [values.repeat(len(bounds), 1)]
        thresholds = [bounds[:, None].expand_as(weights[0]).contiguous()]
    for dtype in DTYPES:
        masked, _, kept, _ = pack(
            library, Memory(library), weights, thresholds, [NO_GUARD] * len(weights),
            [dtype] * len(weights),
        )  # fmt: skip
        for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
            same(masked[i], reference.masked_weight(weight, threshold, None, dtype)[0])
            assert kept[i] == kept_count(weight, threshold)


@pytest.mark.parametrize("commit", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 1024), (2, 4100), (40, 1000)])
def test_the_guard_fires_at_its_count_and_not_one_above(library, shape, granularity, commit):
    """All segments share one call: the same layer under guards below, at and above its count."""
    weight = torch.randn(shape)
    weight[0, 0], weight[-1, -1] = 0.0, float("nan")
    threshold = threshold_like(weight, granularity)
    count = kept_count(weight, threshold)
    guards = [-1, 0, count - 1, count, count + 1, weight.numel()]
    dtypes = [DTYPES[i % 3] for i in range(len(guards))]
    masked, effective, kept, stored = pack(
        library, Memory(library), [weight] * len(guards), [threshold] * len(guards),
        [(collapsed, commit) for collapsed in guards], dtypes,
    )  # fmt: skip
    for i, collapsed in enumerate(guards):
        fires = count <= collapsed
        under = torch.zeros_like(threshold) if fires else threshold
        same(masked[i], reference.masked_weight(weight, under, None, dtypes[i])[0])
        same(effective[i], under)
        same(stored[i], under if commit else threshold)
        assert kept[i] == kept_count(weight, under)


def test_layers_that_share_a_threshold(library):
    """A reset of one, whose weights are small, is not seen by the other in the same call."""
    weights = [0.1 * torch.rand(40, 1000), torch.randn(40, 1000)]
    stored = torch.full((40,), 0.5)
    placed = Memory(library).place(stored)
    masked, effective = library.ops.pack(
        Memory(library).place_all(weights), [placed] * 2, settings_of([(400, 1)] * 2)
    )
    expected = reference.masked_weights(weights, [stored] * 2, [0.01] * 2, [True] * 2, F32)
    found = *masked, *effective, placed
    for ours, theirs in zip(found, (*expected[0], *expected[1], stored), strict=True):
        same(ours, theirs)


def lanes(library, runs):
    """Functions that enqueue each of `runs` on a stream of its own, every second as a graph."""

    def lane(i, run):
        if library.device.type == "cpu":
            return lambda: (library.ops.on_stream(i, i % 2 == 1), run())
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()
        if i % 2:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            run = graph.replay

        def enqueue():
            with torch.cuda.stream(stream):
                run()

        return enqueue

    return [lane(*each) for each in enumerate(runs)]


def test_the_guard_again_and_again_on_several_streams(library):
    """Layers that collapse and layers that do not, in turn, while other streams do the same."""
    on_gpu = library.device.type == "cuda"
    shapes = [(4096, 1024), (8, 50000), (300,)] if on_gpu else [(40, 64), (2, 4100), (30,)]
    wrong = []

    def run_of(index):
        torch.manual_seed(index)
        weights = [torch.randn(shape, device=library.device) for shape in shapes]
        stored = [torch.full((shape[0],), 1.0, device=library.device) for shape in shapes]
        under = [torch.empty_like(threshold) for threshold in stored]
        kept = torch.empty(len(shapes), dtype=torch.int64, device=library.device)
        every = [(w.abs() > 1).sum().item() for w in weights]
        cases = []
        for parity in range(2):
            stays = [(i + parity) % 2 for i in range(len(shapes))]
            settings = [(count - one, 1) for count, one in zip(every, stays, strict=True)]
            limits = [one * threshold for one, threshold in zip(stays, stored, strict=True)]
            pairs = [*zip(weights, limits, strict=True)]
            expected = [reference.masked_weight(*pair, None, torch.bfloat16)[0] for pair in pairs]
            counts = torch.stack([reference.threshold_mask(*pair).sum() for pair in pairs])
            cases.append((settings_of(settings), expected, limits, counts))
        differs = torch.zeros((), dtype=torch.int64, device=library.device)
        wrong.append(differs)
        outputs = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
        effective = [torch.empty_like(t) for t in stored]

        def run():
            for settings, expected, limits, counts in cases:
                torch._foreach_copy_(under, stored)
                library.ops.pack(weights, under, settings, outputs, effective, kept)
                found = *outputs, *effective, *under, kept
                for ours, theirs in zip(found, (*expected, *limits, *limits, counts), strict=True):
                    differs.add_((ours != theirs).any())

        return run

    enqueue = lanes(library, [run_of(i) for i in range(4)])
    for _ in range(500 if on_gpu else 3):
        for each in enqueue:
            each()
    if on_gpu:
        torch.cuda.synchronize()
    else:
        library.ops.on_stream(0, False)
    assert [int(each) for each in wrong] == [0] * 4


def test_more_segments_than_a_table_holds_of_all_dtypes(library):
    weights, thresholds, settings, dtypes, grads = [], [], [], [], []
    for i in range(460):  # some 390 of a dtype fill a table
        weight = torch.randn(1 + i % 5, 1 + i % 11).to(DTYPES[i % 3 * (i % 5 == 0)])
        weights.append(weight)
        thresholds.append(threshold_like(weight, GRANULARITIES[i % 4 % 3]))
        settings.append((weight.numel() // 3, i % 2))
        dtypes.append(DTYPES[i % 5 % 3])
        grads.append(gradient_along(weight, weight.dtype))
    masked, effective, kept, _ = pack(
        library, Memory(library), weights, thresholds, settings, dtypes
    )
    for i, (weight, threshold) in enumerate(zip(weights, thresholds, strict=True)):
        if kept_count(weight, threshold) <= settings[i][0]:
            threshold = torch.zeros_like(threshold)
        same(masked[i], reference.masked_weight(weight, threshold, None, dtypes[i])[0])
        same(effective[i], threshold)
        assert kept[i] == kept_count(weight, threshold)
    grad_weights, grad_thresholds = post(
        library, Memory(library), grads, weights, thresholds, [(0, 1)] * len(weights)
    )
    for i, operands in enumerate(zip(grads, weights, thresholds, strict=True)):
        compare_gradients(*operands, (0, 1), grad_weights[i], grad_thresholds[i])


def compare_gradients(grad, weight, threshold, setting, *ours):
    surrogate, structure = reference.SURROGATES[setting[0]], bool(setting[1])
    plain = reference.masked_weight_backward(grad, weight, threshold, surrogate, structure)
    exact = reference.masked_weight_backward(
        grad.double(), weight.double(), threshold.double(), surrogate, structure
    )
    for result, close, truth in zip(ours, plain, exact, strict=True):
        assert result.stride() == close.stride()
        assert_as_accurate(result.cpu(), close, truth)


@of_any_alignment
@pytest.mark.parametrize(
    "dtypes", list(itertools.product(DTYPES, DTYPES)), ids=lambda pair: "{}-{}".format(*pair)
)
def test_post_is_as_accurate_as_the_reference(library, dtypes, shift):
    grad_dtype, dtype = dtypes
    weights, thresholds = mixed_operands(dtype)
    grads = [gradient_along(weight, grad_dtype) for weight in weights]
    kinds = list(itertools.product(SURROGATES, [0, 1]))
    settings = [kinds[i % len(kinds)] for i in range(len(weights))]
    results = post(library, Memory(library, shift), grads, weights, thresholds, settings)
    for operands in zip(grads, weights, thresholds, settings, *results, strict=True):
        compare_gradients(*operands)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("structure", [0, 1])
def test_post_of_special_values(library, surrogate, structure):
    """Every pair of weight and threshold, with a threshold of its own: no sum hides anything."""
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 0.4, 0.9, inf, -inf, nan])
    bounds = torch.tensor([0.0, -0.5, 0.5, 1.0, 2.0, -1.0, inf, -inf, nan])
    weight = values.repeat(len(bounds), 1)
    threshold = bounds[:, None].expand_as(weight).contiguous()
    for value in (1.0, -2.0, 0.0, inf, nan):
        grad = torch.full_like(weight, value)
        ours = post(
            library, Memory(library), [grad], [weight], [threshold], [(surrogate, structure)]
        )
        expected = reference.masked_weight_backward(
            grad, weight, threshold, reference.SURROGATES[surrogate], bool(structure)
        )
        for (result,), truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(result.cpu(), truth, rtol=1e-6, atol=0, equal_nan=True)


def test_post_gives_a_segment_the_same_bits_alone_and_among_others(library):
    weights, thresholds = mixed_operands(torch.float32)
    grads = [gradient_along(weight, torch.bfloat16) for weight in weights]
    settings = [(0, 1)] * len(weights)
    together = post(library, Memory(library), grads, weights, thresholds, settings)
    backwards = post(
        library, Memory(library), grads[::-1], weights[::-1], thresholds[::-1], settings
    )
    for i in range(len(weights)):
        alone = post(
            library, Memory(library), [grads[i]], [weights[i]], [thresholds[i]], [settings[i]]
        )
        for one, all_, reverse in zip(alone, together, backwards, strict=True):
            assert torch.equal(one[0], all_[i]) and torch.equal(one[0], reverse[-1 - i])


@of_any_alignment
def test_regularization(library, shift):
    thresholds = [torch.empty(n).uniform_(-3, 3) for n in (1, 7, 4096, 4097, 20000, 0)]
    thresholds.append(torch.tensor([-100.0, -64.0, 1000.0, 1e6, -63.5]))
    thresholds.append(torch.rand(1000))
    check_regularization(library, thresholds[:6], shift)
    check_regularization(library, thresholds, shift)
    check_regularization(library, [torch.rand(3, 3) for _ in range(2000)], shift)
    check_regularization(library, [], shift)


def check_regularization(library, thresholds, shift):
    memory = Memory(library, shift)
    value = memory.unwritten(torch.zeros(()))
    slopes = [memory.unwritten(threshold) for threshold in thresholds]
    library.ops.regularization(memory.place_all(thresholds), value, slopes)
    memory.check()
    together = torch.cat([t.reshape(-1) for t in thresholds]) if thresholds else torch.zeros(0)
    plain, plain_slopes = sparse_regularization_and_slope(together)
    exact, exact_slopes = sparse_regularization_and_slope(together.double())
    assert_as_accurate(value.cpu(), plain, exact)
    if thresholds:
        ours = torch.cat([slope.reshape(-1).cpu() for slope in slopes])
        torch.testing.assert_close(ours, plain_slopes, rtol=5e-7, atol=0)
        assert_as_accurate(ours, plain_slopes, exact_slopes)


def test_a_call_without_segments(library):
    kept = torch.empty(0, dtype=torch.int64, device=library.device)
    library.ops.pack([], [], [], [], [], kept)


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_outputs_that_are_not_given_are_made(library, dtype):
    weights, thresholds = mixed_operands(torch.bfloat16)
    grads = [gradient_along(weight, torch.float32) for weight in weights]
    count, memory = len(weights), Memory(library)
    settings, rules = [(i, 0) for i in range(count)], [(0, 1)] * count
    operands = memory.place_all(weights), memory.place_all(thresholds)
    made = library.ops.pack(*operands, settings_of(settings), dtype=dtype)
    made += library.ops.post(memory.place_all(grads), *operands, settings_of(rules))
    dtypes = [dtype or torch.bfloat16] * count
    expected = pack(library, Memory(library), weights, thresholds, settings, dtypes)[:2]
    expected += post(library, Memory(library), grads, weights, thresholds, rules)
    for ours, theirs in zip(itertools.chain(*made), itertools.chain(*expected), strict=True):
        same(ours, theirs.cpu())


def test_what_the_kernels_do_not_take(library):
    weight = torch.randn(3, 4, dtype=torch.float64, device=library.device)
    kept = torch.empty(1, dtype=torch.int64, device=library.device)
    threshold = torch.rand(3, dtype=torch.float64, device=library.device)
    with pytest.raises(RuntimeError, match=r"pack: weights\[0\] has an unsupported dtype.*float64"):
        library.ops.pack(
            [weight], [threshold], [-1, 0], [weight.clone()], [threshold.clone()], kept
        )
    strided = torch.randn(3, 8, device=library.device)[:, ::2]
    with pytest.raises(RuntimeError, match=r"weights\[0\] has 12 elements within 23"):
        library.ops.pack(
            [strided], [threshold.float()], [-1, 0], [torch.empty_like(strided)],
            [threshold.float()], kept,
        )  # fmt: skip
