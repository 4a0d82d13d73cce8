"""sgd_step, adamw_step and grad_norm of the CPU library against the reference, one step each."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cpu_cases import DTYPES, SHAPES, SURROGATES, needs_library, ops, same
from cpu_steps import ABSENT, HYPERS, STATE, Segment, call_of, check, check_masks, written
from hypothesis import given, settings
from hypothesis import strategies as st

from dst_kernels import reference

pytestmark = needs_library

RULES = list(STATE)
of_both_rules = pytest.mark.parametrize("rule", RULES)
FLOAT32 = torch.float32


def unchanged(call, ours):
    for name in [*written(call.rule), "masked"]:
        for mine, before in zip(ours[name], call[name], strict=True):
            same(mine, before)
    same(ours["kept"], call["kept"])


def check_norm(call):
    double = call.double().norm(reference.step.grad_norm_)
    torch.testing.assert_close(call.norm(ops().grad_norm), double, rtol=3e-6, atol=1e-30)


@of_both_rules
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_shapes_surrogates_and_dtypes_of_gradients_and_outputs(rule, dtype):
    mixes = itertools.cycle(itertools.product(SURROGATES, (0, 1), DTYPES, DTYPES))
    for plain, first in itertools.product((False, True), (False, True)):
        segments = []
        for i, (shape, mix) in enumerate(zip(SHAPES, mixes, strict=False)):
            surrogate, structure, grad, masked = mix
            segment = Segment(
                shape, dtype, grad, masked, (None, grad)[i % 2], plain,
                (i % 4, (i + 1) % 4), surrogate, structure, first=first,
            )  # fmt: skip
            segments.append(segment)
        call = call_of(rule, segments)
        check(call)
        check_norm(call)


@of_both_rules
@pytest.mark.parametrize("row", range(4))
def test_all_hypers(rule, row):
    shapes = [(4, 6), (3, 700), (2, 33000)]
    segments = [Segment(shape, hypers=(row, row), first=first) for shape in shapes
                for first in (True, False)]  # fmt: skip
    segments += [dataclasses.replace(segment, plain=True) for segment in segments]
    check(call_of(rule, segments))


@of_both_rules
def test_scale_clip_rates_and_alphas(rule):
    segments = [
        Segment((3, 5), threshold_grad=FLOAT32), Segment((2, 33000), hypers=(2, 3)),
        Segment((3, 5), plain=True), Segment((9,), plain=True, hypers=(3, -1)),
    ]  # fmt: skip
    for options in (
        {"grad_scale": 1024.0}, {"grad_scale": 3.0, "clip": 0.25}, {"clip": 0.5, "found_inf": 0.0},
        {"rates": [None, 0.3, 0.2]}, {"alphas": [0.5, 0.5, 0.5, None]},
        {"alphas": [None, None, 0.0], "rates": [0.0] * 4},
    ):  # fmt: skip
        call = call_of(rule, segments, **options)
        check(call)
        check_norm(call)


@of_both_rules
@pytest.mark.parametrize("collapsed", [-1, 10])
def test_nothing_changes_where_an_infinity_was_found(rule, collapsed):
    shapes = [(3, 4), (2, 33000)]
    segments = [Segment(shape, collapsed=collapsed) for shape in shapes]
    call = call_of(rule, [*segments, Segment(plain=True)], found_inf=1.0)
    call["grads"][0][1, 1] = float("inf")
    unchanged(call, call.run())


@of_both_rules
def test_absent_gradients_and_frozen_parameters(rule):
    """All combinations; among them a weight that only gets masked anew."""
    segments = []
    for shape, grad, threshold_grad, masked in itertools.product(
        [(3, 5), (2, 33000)], [None, FLOAT32], [None, FLOAT32], [None, FLOAT32]
    ):
        for hypers in itertools.product((-1, 1), (-1, 0, 2)):
            segments.append(Segment(shape, FLOAT32, grad, masked, threshold_grad, hypers=hypers))
    segments += [Segment(grad=grad, plain=True, hypers=(row, -1))
                 for grad in (None, FLOAT32) for row in (-1, 0, 2)]  # fmt: skip
    call = call_of(rule, segments)
    for name in written(rule)[2:]:  # state that is not needed may be absent
        for i, segment in enumerate(segments):
            of_threshold = name.startswith("threshold_")
            if segment.hypers[of_threshold] < 0:
                call[name][i] = ABSENT
    ours = check(call)
    check_norm(call)
    for i, segment in enumerate(segments):
        if segment.hypers[0] < 0:
            same(ours["weights"][i], call["weights"][i])
        if segment.hypers[1] < 0 and not segment.plain:
            same(ours["thresholds"][i], call["thresholds"][i])


@of_both_rules
def test_an_empty_list_is_one_of_absent_tensors(rule):
    full = call_of(rule, [Segment(hypers=(1, 3)), Segment((4, 9), plain=True, hypers=(2, 2))])
    short = full.clone()
    for name in ("threshold_grads", "rates", "alphas", "scales"):
        assert not any(tensor.numel() for tensor in full[name])
        short.values[name] = []
    for one, other in ((full.run(), short.run()), (full.refer(), short.refer())):
        for name in [*written(rule), "masked"]:
            for pair in zip(one[name], other[name], strict=True):
                same(*pair)
    for function in (ops().grad_norm, reference.step.grad_norm_):
        assert full.norm(function) == short.norm(function)


def test_sgd_without_momentum_needs_no_buffers():
    call = call_of("sgd", [Segment(hypers=(0, 0)), Segment(plain=True, hypers=(0, -1))])
    for name in ("buffers", "threshold_buffers"):
        call.values[name] = [ABSENT, ABSENT]
    check(call)


@of_both_rules
@pytest.mark.parametrize("shape", [(5, 7), (2, 33000)])
def test_the_guard_fires_up_to_its_count(rule, shape):
    """Guards below, at and above the count that the same step leaves without one."""
    torch.manual_seed(1)
    count = int(check(call_of(rule, [Segment(shape)]))["kept"][0])
    assert 0 < count < shape[0] * shape[1]
    for collapsed in (0, count - 1, count, count + 1):
        torch.manual_seed(1)
        call = call_of(rule, [Segment(shape, collapsed=collapsed)])
        ours = check(call)
        fired = not ours["thresholds"][0].any()
        assert fired == (collapsed >= count)
        assert int(ours["kept"][0]) == (shape[0] * shape[1] if fired else count)


@of_both_rules
def test_a_step_of_nothing(rule):
    call = call_of(rule, [])
    call.run()
    assert call.norm(ops().grad_norm) == 0


@of_both_rules
def test_hypers_that_no_segment_names(rule):
    check(call_of(rule, [Segment(hypers=(3, 3))], hypers=HYPERS[rule] * 2))


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@of_both_rules
def test_any_mix(rule, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    dtypes = st.sampled_from(DTYPES)
    some = st.one_of(st.none(), dtypes)
    segments = []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 1200)))
        options = {
            "shape": st.just(shape),
            "dtype": dtypes,
            "grad": some,
            "masked": some,
            "threshold_grad": some,
            "plain": st.booleans(),
            "hypers": st.tuples(st.integers(-1, 3), st.integers(-1, 3)),
            "surrogate": st.sampled_from(SURROGATES),
            "structure": st.integers(0, 1),
            "collapsed": st.sampled_from([-1, shape[0] * shape[1]]),
        }
        segments.append(data.draw(st.builds(Segment, **options)))
    scales = st.sampled_from([None, 2.0])
    call = call_of(rule, segments, grad_scale=data.draw(scales), clip=data.draw(scales))
    check(call)
    check_norm(call)


@of_both_rules
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_gradient_is_as_visible_as_in_the_reference(rule, value):
    segments = [Segment((3, 5), surrogate=i % 4, structure=i // 4) for i in range(8)]
    call = call_of(rule, segments)
    for weight, threshold, grad in zip(
        call["weights"], call["thresholds"], call["grads"], strict=True
    ):
        weight[1] = torch.tensor([3.0, -3.0, 0.5, -0.1, 0.7])  # beyond the support and within
        threshold[:] = 0.6
        grad[1] = value
    ours, expected = call.run(), call.refer()
    for name in ("weights", "thresholds"):
        for result, truth in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(result, truth, equal_nan=True)
            assert not result[1].isfinite().all() and result[[0, 2]].isfinite().all()


@of_both_rules
def test_nan_weights_and_thresholds_stay_visible(rule):
    call = call_of(rule, [Segment((3, 5), masked=torch.bfloat16, collapsed=1)])
    call["weights"][0][0, 0] = float("nan")
    call["thresholds"][0][1] = float("nan")
    ours = call.run()
    masked = ours["masked"][0]
    assert masked[0, 0].isnan() and masked[1].isnan().all() and not masked[2].isnan().any()
    check_masks(call, ours)


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
], ids=str)  # fmt: skip
def test_plain_parameters_follow_torch_sgd(options):
    parameter = torch.nn.Parameter(torch.randn(40, 50))
    ours, buffer = parameter.detach().clone(), torch.full((40, 50), float("nan"))
    optimizer = torch.optim.SGD([parameter], lr=0.1, **options)
    names = "weight_decay", "maximize", "", "", "momentum", "dampening", "nesterov"
    row = [0.1, *(options.get(name, 0) for name in names)]
    for step in range(10):
        parameter.grad = torch.randn(40, 50)
        optimizer.step()
        first = int(step == 0)
        ops().sgd_step(
            [ours], [parameter.grad], [buffer], [ABSENT], [ABSENT], [ABSENT], [ABSENT],
            torch.zeros(1, dtype=torch.int64), [0, -1, 0, 0, -1, first, first],
            torch.tensor([row], dtype=torch.float64), [ABSENT], [ABSENT], [ABSENT] * 3,
        )  # fmt: skip
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.95), "eps": 1e-3, "maximize": True}],
                         ids=str)  # fmt: skip
def test_plain_parameters_follow_torch_adamw(options):
    parameter = torch.nn.Parameter(torch.randn(40, 50))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1, **options)
    ours, step = parameter.detach().clone(), torch.zeros(())
    average, square = torch.zeros(40, 50), torch.zeros(40, 50)
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    row = [0.01, 0.1, options.get("maximize", 0), 0, 0, beta1, beta2, options.get("eps", 1e-8)]
    for _ in range(10):
        parameter.grad = torch.randn(40, 50)
        optimizer.step()
        ops().adamw_step(
            [ours], [parameter.grad], [average], [square], [step], [ABSENT], [ABSENT], [ABSENT],
            [ABSENT], [ABSENT], [ABSENT], torch.zeros(1, dtype=torch.int64),
            [0, -1, 0, 0, -1, 0, 0], torch.tensor([row], dtype=torch.float64), [ABSENT], [ABSENT],
            [ABSENT] * 3,
        )  # fmt: skip
    assert step == 10
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-6)
