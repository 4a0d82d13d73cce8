"""A hundred steps against the reference in float64, with resets by the guard on the way.

Gradients are given, not computed from the weights, so that roundings do not grow; in float64 both
then make the same decisions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cpu_cases import needs_library, ops, same
from cpu_steps import Segment, call_of, written

from dst_kernels import reference

pytestmark = needs_library

STEPS = 100
SIZE = 6 * 40
# lr, weight decay, maximize, has alpha, alpha, ...
SGD = [
    (0.02, decay, maximize, 1, 1.0, *rest)
    for decay, maximize in ((0.0, 0), (0.01, 1))
    for rest in ((0.0, 0.0, 0), (0.9, 0.0, 0), (0.9, 0.0, 1), (0.8, 0.2, 0))
]
ADAMW = [
    (0.02, decay, maximize, 1, 1.0, *rest)
    for decay, maximize in ((0.0, 0), (0.1, 1))
    for rest in ((0.9, 0.999, 1e-8), (0.5, 0.9, 1e-3))
]
CASES = [("sgd", row) for row in SGD] + [("adamw", row) for row in ADAMW]


def trajectory(rule, row, dtype, step):
    """The call after STEPS steps of it, and after how many of them the guard had fired."""
    # Maximising turns the regulariser around: it pushes thresholds down, unless alpha is negative.
    row = (*row[:4], row[4] * (-1 if row[2] else 1), *row[5:])
    surrogates = itertools.product(range(4), (0, 1))
    segments = [
        Segment((6, 40), dtype, dtype, dtype, None, False, (0, 0), *kind, collapsed=SIZE // 4,
                first=True)
        for kind in surrogates
    ]  # fmt: skip
    segments.append(Segment((30,), dtype, dtype, plain=True, hypers=(0, -1), first=True))
    torch.manual_seed(3)
    call = call_of(rule, segments, hypers=[row])
    generator = torch.Generator().manual_seed(4)
    resets = 0
    for i in range(STEPS):
        for grad in call["grads"]:
            grad.copy_(0.1 * torch.randn(grad.shape, generator=generator, dtype=torch.float64))
        for k in range(len(segments)):
            call["settings"][7 * k + 5 : 7 * k + 7] = [int(i == 0)] * 2
        step(*call.values.values())
        resets += sum(not t.any() for t in call["thresholds"] if t.numel())
    return call, resets


@pytest.mark.parametrize(("rule", "row"), CASES, ids=str)
def test_float64_follows_the_reference_and_float32_is_as_close_to_it(rule, row):
    """As the reference's float32, without masked weights: one a rounding from t may be pruned."""
    by_library = getattr(ops(), f"{rule}_step")
    by_reference = getattr(reference.step, f"{rule}_step_")
    ours, resets = trajectory(rule, row, torch.float64, by_library)
    expected, also = trajectory(rule, row, torch.float64, by_reference)
    assert resets == also > 0
    for name in [*written(rule), "masked"]:
        for mine, truth in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11, equal_nan=True)
    same(ours["kept"], expected["kept"])
    ours, _ = trajectory(rule, row, torch.float32, by_library)
    plain, _ = trajectory(rule, row, torch.float32, by_reference)
    for name in written(rule):
        for mine, theirs, truth in zip(ours[name], plain[name], expected[name], strict=True):
            if truth.numel() == 0 or truth.isnan().all():  # absent; buffers without momentum
                continue
            allowed = 2 * (theirs - truth).abs().max() + 1e-6 * truth.abs().max()
            assert (mine - truth).abs().max() <= allowed, name


def test_steps_are_counted():
    ours, _ = trajectory("adamw", ADAMW[0], torch.float32, ops().adamw_step)
    assert all(step == STEPS for step in ours["steps"])
    assert all(step == STEPS for step in ours["threshold_steps"][:-1])
