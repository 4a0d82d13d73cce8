"""sgd_step, adamw_step and grad_norm of the CUDA library against the reference."""

from __future__ import annotations

import itertools
from dataclasses import replace

import cuda_cases
import pytest
import torch
from cuda_cases import DTYPES, same
from cuda_ops import NAMES, prepare, small_segments
from cuda_steps import HYPERS, OPS, REFERENCES, STATES, Segment, call_of
from ops.tolerance import assert_as_accurate

from dst_kernels import reference

library = cuda_cases.library

every_rule = pytest.mark.parametrize("rule", ["sgd", "adamw"])
of_any_alignment = pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
ROWS = (
    (1, 1), (5, 7), (17, 8), (9, 300), (6,), (3, 1024), (3, 1025), (2, 1032), (2, 2052), (2, 4097),
    (2, 9000), (4, 3, 3, 3), (16, 8, 3, 3),
)  # fmt: skip
PLAIN = ((), (1,), (10,), (64,), (33, 65), (4096,), (4097,), (3, 20000))
SOURCES = [  # (weight, gradient)
    *itertools.product([torch.float32], DTYPES),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def run(library, call, *, shift=0):
    """The call after the op ran on it."""
    placed, memory = call.place(library, shift)
    getattr(library.ops, OPS[call.rule])(*placed.arguments())
    memory.check()
    return placed.map(torch.Tensor.cpu)


def expected(call):
    """What the reference makes of it, as given and in float64."""
    plain, exact = call.clone(), call.double()
    for one in (plain, exact):
        REFERENCES[call.rule](*one.arguments())
    return plain, exact


def kept_count(weight, threshold):
    return int(reference.threshold_mask(weight, threshold).sum())


def compare(ours, call):
    plain, exact = expected(call)
    for name in STATES[call.rule]:
        for i, old in enumerate(call[name]):
            results = ours[name][i], plain[name][i], exact[name][i]
            assert results[0].stride() == results[1].stride()
            if results[1].isnan().any():  # a buffer that is not initialised and not used
                assert torch.equal(results[0].isnan(), results[1].isnan())
            else:
                # What an update leaves may be much smaller than what it began with.
                flat = [torch.cat([r.flatten(), old.flatten().to(r)]).nan_to_num() for r in results]
                assert_as_accurate(*flat)
    for name in ("steps", "threshold_steps") if call.rule == "adamw" else ():
        for result, close in zip(ours[name], plain[name], strict=True):
            assert torch.equal(result, close)
    masks_follow(ours, call)


def masks_follow(ours, call):
    """W * M and the counts are those of the new weight and threshold, exactly."""
    for i, masked in enumerate(ours["masked"]):
        if masked.numel() == 0:
            assert ours["kept"][i] == call["kept"][i]
            continue
        weight, threshold = ours["weights"][i], ours["thresholds"][i]
        same(masked, reference.masked_weight(weight, threshold, None, masked.dtype)[0])
        assert ours["kept"][i] == kept_count(weight, threshold)


def all_segments(dtype, grad_dtype):
    """Every shape, cycling through hypers, surrogates, dtypes of W * M and what may be absent."""
    segments = []
    for i, shape in enumerate(ROWS):
        segments.append(
            Segment(
                shape, dtype, grad_dtype,
                masked_dtype=[*DTYPES, None][i % 4],
                threshold_grad=i % 3 == 0,
                weight_hyper=i % 5 - (i % 5 == 4) * 5,  # -1 in turn
                threshold_hyper=i % 4 if i % 7 else -1,
                surrogate=i % 4,
                structure=i // 2 % 2,
                fresh=i % 2 == 0,
                channels_last=len(shape) == 4 and i % 2 == 0,
            )
        )  # fmt: skip
    for i, shape in enumerate(PLAIN):
        segments.append(
            Segment(shape, dtype, grad_dtype, masked=False, weight_hyper=i % 4, fresh=i % 3 == 0)
        )
    return segments


@of_any_alignment
@pytest.mark.parametrize("dtypes", SOURCES, ids=lambda pair: "{}-{}".format(*pair))
@every_rule
def test_a_step_is_as_accurate_as_the_reference(library, rule, dtypes, shift):
    call = call_of(rule, all_segments(*dtypes))
    compare(run(library, call, shift=shift), call)


@every_rule
def test_numbers_on_the_device_and_gradients_of_all_dtypes(library, rule):
    segments = [segment for pair in SOURCES for segment in all_segments(*pair)]
    call = call_of(
        rule, segments, rates={0: 0.03, 2: 0.2}, alphas={2: 0.5, 0: 3.0},
        grad_scale=96.0, found_inf=0.0, clip=0.3,
    )  # fmt: skip
    compare(run(library, call), call)


@every_rule
def test_nothing_happens_where_infinity_was_found(library, rule):
    segments = [replace(s, collapsed=10**6) for s in all_segments(torch.float32, torch.float16)]
    call = call_of(rule, segments, grad_scale=4.0, found_inf=1.0)
    ours = run(library, call)
    for name, value in call.values.items():
        if isinstance(value, list) and name != "settings":
            for result, before in zip(ours[name], value, strict=True):
                same(result, before)
    same(ours["kept"], call["kept"])


@pytest.mark.parametrize("alpha", [False, True])
@every_rule
def test_what_is_absent(library, rule, alpha):
    """No gradient of the weight, of the threshold, of either; no W * M; frozen halves."""
    row = 2 if alpha else 1
    base = Segment((5, 40), weight_hyper=row, threshold_hyper=row)
    segments = [
        replace(
            base, grad_dtype=grad, threshold_grad=with_grad, masked_dtype=masked,
            weight_hyper=weight, threshold_hyper=threshold,
        )
        for grad, with_grad, masked, weight, threshold in itertools.product(
            [torch.bfloat16, None], [False, True], [torch.bfloat16, None], [row, -1], [row, -1]
        )
    ]  # fmt: skip
    for weight in (row, -1):
        for grad in (torch.float32, None):
            segments.append(Segment((70,), masked=False, grad_dtype=grad, weight_hyper=weight))
    segments.append(replace(base, shape=(4, 0), threshold_grad=True))
    call = call_of(rule, segments)
    compare(run(library, call), call)


@pytest.mark.parametrize("shape", [(5, 40), (2, 4100), (300, 64)])
@every_rule
def test_the_guard_fires_at_its_count_and_not_one_above(library, rule, shape):
    base = Segment(shape, grad_dtype=torch.bfloat16)
    torch.manual_seed(3)
    count = int(run(library, call_of(rule, [base]))["kept"])
    guards = [-1, 0, count - 1, count, count + 1, 10**9]
    calls = []
    for i, collapsed in enumerate(guards):
        torch.manual_seed(3)  # the same numbers for each
        calls.append(
            call_of(rule, [replace(base, collapsed=collapsed, masked_dtype=DTYPES[i % 3])])
        )
    for call, collapsed in zip(calls, guards, strict=True):
        ours = run(library, call)
        assert bool((ours["thresholds"][0] == 0).all()) is (count <= collapsed)
        compare(ours, call)
    together = calls[0].clone()
    for name, value in together.values.items():
        if isinstance(value, list) and name not in ("rates", "alphas", "scales"):
            together.values[name] = [one for call in calls for one in call[name]]
    together.values["kept"] = torch.full((len(guards),), -7)
    ours = run(library, together)
    for i, collapsed in enumerate(guards):
        assert bool((ours["thresholds"][i] == 0).all()) is (count <= collapsed)
    compare(ours, together)


@every_rule
def test_more_segments_and_groups_than_a_table_holds(library, rule):
    """A step's table is full after some 200 segments of a dtype, or 8 groups; a norm's, 355."""
    hypers = [(lr / 100, *HYPERS[rule][lr % 4][1:]) for lr in range(1, 61)]

    def segment(i, groups):
        dtype, grad_dtype = SOURCES[i % 3 if groups < 32 else i % 5]
        return Segment(
            (1 + i % 4, 1 + i % 9), dtype, grad_dtype, masked=i % 3 > 0,
            weight_hyper=i % groups, threshold_hyper=i * 7 % groups, collapsed=i % 6 - 1,
        )  # fmt: skip

    segments = [segment(i, 4) for i in range(230)] + [segment(i, 60) for i in range(60)]
    call = call_of(rule, segments, hypers=hypers)
    compare(run(library, call), call)
    check_norm(library, call_of(rule, [*segments, *segments[:150]], hypers=hypers))


@every_rule
def test_trajectories_over_many_steps(library, rule):
    """Weights, thresholds, counts and resets stay together with the reference's."""
    segments = [
        Segment((12, 30), collapsed=40, weight_hyper=2, threshold_hyper=2, fresh=True),
        Segment((6, 33), collapsed=10, weight_hyper=2, threshold_hyper=2, fresh=True),
        Segment((50,), masked=False, weight_hyper=2, fresh=True),
    ]
    call = call_of(rule, segments, alphas={2: 0.4})
    ours, memory = call.place(library)
    theirs = call.clone()
    resets = 0
    for _ in range(70):
        for i, grad in enumerate(theirs["grads"]):
            new = 0.1 * theirs["weights"][i] + 0.2 * torch.randn_like(grad)
            ours["grads"][i].copy_(grad.copy_(new))
        getattr(library.ops, OPS[rule])(*ours.arguments())
        REFERENCES[rule](*theirs.arguments())
        if rule == "sgd":
            for one in (ours, theirs):
                one["settings"][5::7] = one["settings"][6::7] = [0] * len(segments)
        counts = ours["kept"].cpu()
        resets += int(bool((theirs["thresholds"][0] == 0).all()))
        torch.testing.assert_close(counts[:2], theirs["kept"][:2], rtol=0, atol=1)
    memory.check()
    assert resets, "the guard took part"
    for name in STATES[rule]:
        for result, other in zip(ours[name], theirs[name], strict=True):
            # A weight that meets its threshold may be kept here and pruned there for a step.
            close = torch.isclose(result.cpu(), other, rtol=1e-4, atol=1e-5)
            assert close.sum() >= 0.99 * close.numel(), name


def check_norm(library, call, shift=0):
    placed, memory = call.place(library, shift)
    library.ops.grad_norm(*placed.norm())
    memory.check()
    plain, exact = call.clone(), call.double()
    for one in (plain, exact):
        reference.step.grad_norm_(*one.norm())
    assert_as_accurate(placed["norm"].cpu(), plain["norm"], exact["norm"])
    return placed["norm"].cpu()


@of_any_alignment
@pytest.mark.parametrize("dtypes", SOURCES, ids=lambda pair: "{}-{}".format(*pair))
def test_norm(library, dtypes, shift):
    for segment in all_segments(*dtypes):  # one at a time, so that each counts
        check_norm(library, call_of("adamw", [segment]), shift)
    check_norm(library, call_of("adamw", all_segments(*dtypes)), shift)


def test_norm_of_scaled_gradients_and_without_any(library):
    segments = [segment for pair in SOURCES for segment in all_segments(*pair)]
    check_norm(library, call_of("sgd", segments, alphas={2: 0.5}, grad_scale=96.0, clip=0.1))
    frozen = [replace(s, weight_hyper=-1, threshold_hyper=-1) for s in segments]
    assert check_norm(library, call_of("sgd", frozen)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_results_repeat_bit_by_bit(library, name):
    prepared = prepare(library, name, small_segments())
    before = prepared.snapshot()
    prepared.run()
    expected = prepared.snapshot()
    prepared.restore(before)
    prepared.run()
    for ours, other in zip(prepared.tensors(), expected, strict=True):
        same(ours, other.cpu())


@every_rule
def test_what_the_kernels_do_not_take(library, rule):
    call, _ = call_of(rule, [Segment((3, 4), torch.bfloat16, torch.float32)]).place(library)
    with pytest.raises(RuntimeError, match=r"grads\[0\] is float32, expected bfloat16"):
        getattr(library.ops, OPS[rule])(*call.arguments())
    call, _ = call_of(rule, [Segment((3, 4), torch.float64)]).place(library)
    with pytest.raises(RuntimeError, match=r"weights\[0\] has an unsupported dtype"):
        getattr(library.ops, OPS[rule])(*call.arguments())
