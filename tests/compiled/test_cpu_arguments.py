"""Arguments that the CPU library refuses, each with the words that say what is wrong."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import needs_library, ops
from cpu_steps import ABSENT, Segment, call_of

pytestmark = needs_library

DOUBLE = torch.float64


def pack_arguments():
    weight, threshold = torch.randn(3, 4), torch.rand(3)
    return {
        "weights": [weight], "thresholds": [threshold], "settings": [-1, 0],
        "masked": [torch.empty(3, 4)], "effective": [torch.empty(3)],
        "kept": torch.empty(1, dtype=torch.int64),
    }  # fmt: skip


def post_arguments():
    return {
        "grads": [torch.randn(3, 4)], "weights": [torch.randn(3, 4)],
        "thresholds": [torch.rand(3)], "settings": [0, 1],
        "grad_weights": [torch.empty(3, 4)], "grad_thresholds": [torch.empty(3)],
    }  # fmt: skip


STRIDED = torch.empty(3, 8)[:, ::2]
OVERLAPPING = torch.empty(12).as_strided((3, 2, 2), (4, 0, 3))
INTEGERS = torch.ones(3, 4, dtype=torch.int32)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("thresholds", [], "pack: thresholds has 0 entries, expected 1 for 1 weights"),
    ("settings", [1], "settings has 1 entries, expected 2"),
    ("masked", [], "masked has 0 entries"),
    ("effective", [], "effective has 0 entries"),
    ("kept", torch.empty(2, dtype=torch.int64), "kept has 2 elements, expected 1"),
    ("kept", torch.empty(1), "kept must be int64"),
    ("weights", [torch.randn(3, 5)], r"masked\[0\] has 12 elements, expected 15"),
    ("weights", [torch.tensor(1.0)], r"weights\[0\] must have at least 1 dimension"),
    ("weights", [STRIDED], r"weights\[0\] has 12 elements within 23"),
    ("weights", [torch.randn(4, 3).t()], r"weights\[0\] has stride 1 between rows of 4"),
    ("weights", [INTEGERS], r"weights\[0\] has an unsupported dtype, expected float32"),
    ("weights", [torch.randn(3, 4, dtype=DOUBLE)], r"thresholds\[0\] is float32, expected float64"),
    ("thresholds", [torch.rand(3, dtype=DOUBLE)], r"thresholds\[0\] is float64, expected float32"),
    ("thresholds", [torch.rand(3).half()], r"thresholds\[0\] is float16, expected float32"),
    ("thresholds", [torch.rand(4)], r"has 4 elements, expected 3 .*row.*1 \(layer\) or 12"),
    ("thresholds", [torch.rand(6)[::2]], r"thresholds\[0\] has 3 elements within 5"),
    ("masked", [STRIDED], r"masked\[0\] has 12 elements within 23"),
    ("effective", [torch.empty(1)], r"effective\[0\] has 1 elements, expected 3"),
    ("effective", [torch.empty(3, dtype=DOUBLE)], r"effective\[0\] is float64"),
])  # fmt: skip
def test_pack(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops().pack(*(pack_arguments() | {name: value}).values())


@pytest.mark.parametrize(("name", "value", "message"), [
    ("grads", [], "post: grads has 0 entries"),
    ("settings", [0], "settings has 1 entries"),
    ("settings", [4, 0], "surrogate of segment 0 is 4, expected 0 to 3"),
    ("settings", [-1, 0], "surrogate of segment 0 is -1"),
    ("grads", [torch.randn(3, 3)], r"grads\[0\] has 9 elements, expected 12"),
    ("grads", [STRIDED], r"grads\[0\] has 12 elements within 23"),
    ("grads", [INTEGERS], r"grads\[0\] has an unsupported dtype"),
    ("thresholds", [torch.rand(4)], r"thresholds\[0\] has 4 elements"),
    ("thresholds", [torch.rand(3).bfloat16()], r"thresholds\[0\] is bfloat16"),
    ("grad_weights", [torch.empty(3, 4, dtype=DOUBLE)], r"grad_weights\[0\] is float64, expected"),
    ("grad_weights", [torch.empty(2, 4)], r"grad_weights\[0\] has 8 elements"),
    ("grad_weights", [STRIDED], r"grad_weights\[0\] has 12 elements within 23"),
    ("grad_thresholds", [torch.empty(1)], r"grad_thresholds\[0\] has 1 elements"),
    ("grad_thresholds", [torch.empty(3).half()], r"grad_thresholds\[0\] is float16"),
])  # fmt: skip
def test_post(name, value, message):
    with pytest.raises(RuntimeError, match=message):
        ops().post(*(post_arguments() | {name: value}).values())


@pytest.mark.parametrize(("arguments", "message"), [
    (([torch.rand(3)], torch.empty(()), []), "slopes has 0 entries"),
    (([torch.rand(3)], torch.empty(2), [torch.empty(3)]), "value.* has 2 elements, expected 1"),
    (([torch.rand(3)], torch.empty((), dtype=DOUBLE), [torch.empty(3)]), "value.* is float64"),
    (([torch.rand(3)], torch.empty(()), [torch.empty(4)]), r"slopes\[0\] has 4 elements"),
    (([torch.rand(6)[::2]], torch.empty(()), [torch.empty(3)]), "3 elements within 5"),
    (([torch.rand(3)], torch.empty(()), [torch.empty(6)[::2]]), "3 elements within 5"),
    (([torch.rand(3).half()], torch.empty(()), [torch.empty(3)]), r"thresholds\[0\] is float16"),
    (([torch.rand(3)], torch.empty(()), [torch.empty(3).half()]), r"slopes\[0\] is float16"),
])  # fmt: skip
def test_regularization(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        ops().regularization(*arguments)


SCALAR = torch.tensor(1.0)


@pytest.mark.parametrize(("rule", "name", "value", "message"), [
    ("sgd", "grads", [], "sgd_step: grads has 0 entries"),
    ("adamw", "thresholds", [], "adamw_step: thresholds has 0 entries"),
    ("sgd", "buffers", [], "buffers has 0 entries"),
    ("adamw", "threshold_squares", [], "threshold_squares has 0 entries"),
    ("adamw", "steps", [], "steps has 0 entries"),
    ("sgd", "masked", [], "masked has 0 entries"),
    ("sgd", "settings", [0] * 6, "settings has 6 entries, expected 7"),
    ("sgd", "settings", [4, 0, 0, 0, 0, 0, 0], "names row 4 of hypers, which has 4"),
    ("sgd", "settings", [0, -2, 0, 0, 0, 0, 0], "names row -2 of hypers"),
    ("sgd", "settings", [0, 0, 9, 0, 0, 0, 0], "surrogate of segment 0 is 9"),
    ("sgd", "hypers", torch.zeros(4, 8), r"hypers must be a contiguous float64 tensor \[h, 8\]"),
    ("sgd", "hypers", torch.zeros(4, 7, dtype=DOUBLE), "hypers must be"),
    ("sgd", "rates", [ABSENT], "rates has 1 entries, expected 4, one per row of hypers"),
    ("sgd", "alphas", [ABSENT] * 5, "alphas has 5 entries"),
    ("sgd", "rates", [torch.ones(2)] * 4, r"rates\[0\] has 2 elements, expected 1"),
    ("sgd", "alphas", [SCALAR.double()] * 4, r"alphas\[0\] is float64, expected float32"),
    ("sgd", "scales", [ABSENT], "scales has 1 entries, expected none or 3"),
    ("sgd", "scales", [ABSENT, SCALAR.half(), ABSENT], r"scales\[1\] is float16"),
    ("sgd", "grads", [torch.randn(3, 5)], r"grads\[0\] has 15 elements, expected 12 \(or none\)"),
    ("sgd", "grads", [STRIDED], r"grads\[0\] has 12 elements within 23"),
    ("sgd", "grads", [OVERLAPPING], r"grads\[0\] has 12 elements within 12; .* or overlaps"),
    ("sgd", "threshold_grads", [torch.zeros(1).expand(3)], r"threshold_grads\[0\] has 3 el"),
    ("sgd", "thresholds", [torch.rand(1)], r"thresholds\[0\] has 1 elements, expected 3"),
    ("sgd", "thresholds", [torch.rand(3).half()], r"thresholds\[0\] is float16"),
    ("sgd", "threshold_grads", [torch.rand(2)], r"threshold_grads\[0\] has 2 elements"),
    ("sgd", "masked", [torch.empty(2, 4)], r"masked\[0\] has 8 elements"),
    ("sgd", "masked", [STRIDED], r"masked\[0\] has 12 elements within 23"),
    ("sgd", "buffers", [ABSENT], r"buffers\[0\] has 0 elements, expected 12"),
    ("sgd", "buffers", [torch.zeros(3, 4).half()], r"buffers\[0\] is float16, expected float32"),
    ("sgd", "threshold_buffers", [ABSENT], r"threshold_buffers\[0\] has 0 elements"),
    ("adamw", "averages", [STRIDED], r"averages\[0\] has 12 elements within 23; they must be de"),
    ("adamw", "squares", [torch.zeros(3, 4).double()], r"squares\[0\] is float64"),
    ("adamw", "steps", [ABSENT], r"steps\[0\] is missing"),
    ("adamw", "threshold_steps", [ABSENT], r"threshold_steps\[0\] is missing"),
    ("adamw", "steps", [SCALAR.double()], r"steps\[0\] is float64"),
    ("adamw", "kept", torch.zeros(2, dtype=torch.int64), "kept has 2 elements"),
])  # fmt: skip
def test_steps(rule, name, value, message):
    call = call_of(rule, [Segment((3, 4), hypers=(1, 1))])
    call.values[name] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(ops(), f"{rule}_step")(*call.values.values())


@pytest.mark.parametrize("name", ["weights", "grads", "buffers"])
def test_plain_parameters_are_dense(name):
    call = call_of("sgd", [Segment((3, 4), plain=True)])
    call.values[name] = [torch.zeros(1, 4).expand(3, 4)]
    with pytest.raises(RuntimeError, match=rf"{name}\[0\] has 12 elements within 4"):
        ops().sgd_step(*call.values.values())


def test_plain_parameters_may_have_any_dense_layout():
    call = call_of("sgd", [Segment((3, 4), plain=True)])
    for name in ("weights", "grads", "buffers"):
        (tensor,) = call[name]
        call.values[name] = [tensor.t().contiguous().t()]
    expected = call.refer()
    ops().sgd_step(*call.values.values())
    torch.testing.assert_close(call["weights"][0], expected["weights"][0])


def test_a_plain_parameter_has_no_masked_weight():
    call = call_of("sgd", [Segment((3, 4), plain=True)])
    call.values["masked"] = [torch.empty(3, 4)]
    with pytest.raises(RuntimeError, match=r"masked\[0\] is given for a parameter without thresh"):
        ops().sgd_step(*call.values.values())


@pytest.mark.parametrize(("norm", "message"), [
    (torch.empty(2), "norm.* has 2 elements"), (torch.empty(1, dtype=DOUBLE), "norm.* is float64"),
])  # fmt: skip
def test_grad_norm(norm, message):
    with pytest.raises(RuntimeError, match=message):
        call_of("sgd", [Segment()]).norm(lambda *arguments: ops().grad_norm(*arguments[:-1], norm))


def test_a_list_of_counters_that_are_one():
    call = call_of("sgd", [Segment((3, 4), hypers=(1, 1)), Segment((3, 4), hypers=(1, 1))])
    call.values["kept"] = torch.zeros(1, dtype=torch.int64).expand(2)
    with pytest.raises(RuntimeError, match=r"kept\[0\] has 2 elements within 1"):
        ops().sgd_step(*call.values.values())
