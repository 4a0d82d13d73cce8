"""Single layers and the weight side: nothing wrong gets a time; everything right does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from bench.cases import MODES, ConvCase, LinearCase, ModelCase, WeightsCase
from bench.contenders import Contender, contenders_for, problem_of
from bench.contenders.authors import BranchFreeConv2d, BranchFreeLinear, branch_free_masked_weight
from bench.contenders.layers import layer
from bench.measure.run import measure
from bench.measure.verify import Expectation
from bench.measure.work import PASSES, PIECES, STREAMS, flops, least_bytes, rates
from bench.results import WrongResultError
from bench.suites import SUITES

CPU = torch.device("cpu")
LINEAR = LinearCase(900, 270, 75)  # more tokens and rows than are sampled
CONV, DEPTHWISE = ConvCase(3, 8, 6, 70, 3), ConvCase(2, 9, 6, 6, 7, groups=6)
STRIDED = ConvCase(2, 9, 4, 8, 3, 2, dtype="fp32")
CONVS = CONV, DEPTHWISE, STRIDED
SMALL = WeightsCase("small")
SMOKE = [case for case in SUITES["smoke"].small if not isinstance(case, ModelCase)]
ON_CPU = sorted(MODES.keys() - {"tf32"})


def _figures(contender, case):
    """Return what is recorded: (pass, metric, value)."""
    found = []
    try:
        measure(contender, Expectation(case, CPU), lambda *figure: found.append(figure[:3]))
    except WrongResultError:
        found.append("raised")
    return found


@pytest.mark.parametrize(
    "case", [LINEAR, CONV, DEPTHWISE, STRIDED, SMALL], ids=lambda case: case.op
)
@pytest.mark.parametrize("dtype", ON_CPU)
def test_the_problem_is_what_the_case_says_and_right_contenders_pass(case, dtype):
    case = replace(case, dtype=dtype, remaining_ratio=0.25)
    expectation, again = Expectation(case, CPU), problem_of(case, CPU)
    known, once_more = ([*tree_leaves(vars(each))] for each in (expectation.problem, again))
    tensors = [one for one in known if isinstance(one, torch.Tensor)]
    assert all(map(torch.equal, tensors, (one for one in once_more if torch.is_tensor(one))))
    for tensor in tensors:
        assert (tensor == 0).float().mean() < 0.01
        assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    first = len(case.list) if case.op == "weights" else 1  # weights, then thresholds
    shapes = case.list if case.op == "weights" else case.shapes[1:2]
    for weight, threshold, shape in zip(tensors, tensors[first:], shapes, strict=False):
        assert (weight.shape, weight.dtype) == (shape, case.mode.weight)
        kept = (weight.flatten(1).abs() > threshold[:, None]).float().mean(1)
        assert kept.max() <= 0.27 and kept.mean() > 0.2  # 16-bit weights tie with the quantile
    for contender in contenders_for(case, compiled=False):
        expectation.verified(contender)


@pytest.mark.parametrize("dtype", sorted(MODES))
@pytest.mark.parametrize("case", [LINEAR, CONV, SMALL], ids=lambda case: case.op)
def test_what_is_allowed_is_a_few_roundings_of_the_dtype(case, dtype):
    """Also of TF32, whether torch uses it or, as on a CPU, does not."""
    exact, plain = Expectation(replace(case, dtype=dtype), CPU)._right(MODES[dtype])
    assert exact.keys() == plain.keys()
    for name, right in exact.items():
        error = ((plain[name] - right).abs().max() / right.abs().max()).item()
        assert error < {"tf32": 2e-3, "fp32": 2e-6, "fp16-autocast": 2e-3}.get(dtype, 2e-2), name
        if dtype == "tf32" and case is not SMALL and name != "bias":
            assert error > 1e-4, name


def _wrong(case, forward):
    """Return a layer whose forward gets itself, the input and the forward of a right one."""
    base = BranchFreeLinear if case is LINEAR else BranchFreeConv2d
    return type("Wrong", (base,), {"forward": lambda self, x: forward(self, x, base.forward)})


def _changed(where, by):
    """Return a forward whose output is right but there."""

    def forward(layer, x, right):
        factor = torch.ones_like(output := right(layer, x))
        factor[where] = by
        return output * factor

    return forward


def _threshold(used):
    """Return a right forward of a threshold that has no gradient, or zeros where it is used."""

    def forward(layer, x, right):
        weight = branch_free_masked_weight(layer.weight, layer.threshold.detach())
        output = F.linear(x, weight, layer.bias)
        return output + (0 * layer.threshold.sum()).to(output.dtype) if used else output

    return forward


def _last_filter_dense(layer, x, right):
    dense = layer._conv_forward(x, layer.weight, None)
    return torch.cat([right(layer, x)[:, :-1], dense[:, -1:]], 1)


def _sloppy(layer, x, right):
    output = right(layer, x)  # as exact as half the bits of bfloat16
    return output + (output * 2**-6).detach() * torch.randn_like(output).sign()


@pytest.mark.parametrize(
    ("forward", "case", "message"),
    [
        (lambda layer, x, _: F.linear(x, layer.weight, layer.bias), LINEAR, "output: error"),
        (_threshold(used=True), LINEAR, "threshold: error"),
        (_threshold(used=False), LINEAR, "threshold has no gradient"),
        (_changed(-1, by=1.1), LINEAR, "output: error"),
        (_changed((31, 7), by=torch.nan), LINEAR, "output is not finite"),
        (lambda layer, x, right: right(layer, x).float(), LINEAR, "output is torch.float32"),
        (_sloppy, LINEAR, "output: error"),
        *((_changed((..., -1), by=1.1), case, "output: error") for case in CONVS),
        *((_last_filter_dense, case, "output: error") for case in CONVS),
    ],
)
def test_a_wrong_layer_has_no_time(forward, case, message):
    error, raised = _figures(Contender("wrong", layer(_wrong(case, forward))), case)
    assert error[:2] == ("", "error") and error[2].startswith(message)
    assert raised == "raised"


@pytest.mark.parametrize(("name", "which"), [("pack", 0), ("post", 0), ("post", 1)])
def test_a_wrong_call_over_weights_has_no_time(name, which):
    (auto,) = (one for one in contenders_for(SMALL) if one.masked)

    def make(problem):
        work = auto.make(problem)
        results = work._calls[name]()
        for tensor in results[which]:
            tensor *= 1.01
        work._calls[name] = lambda: results
        return work

    error, raised = _figures(replace(auto, make=make), SMALL)
    message = f"{name}, {('weight', 'threshold')[which]} 0: error"
    assert raised == "raised" and error[:2] == ("", "error") and error[2].startswith(message)


def test_what_cannot_run_says_why_and_leaves_the_other_passes():
    def make(problem):
        raise RuntimeError("no such device\nsecond line")

    for case in (LINEAR, SMALL):
        found = _figures(Contender("absent", make), case)
        assert found == [("", "skipped", "RuntimeError: no such device")]

    no_backward = _wrong(LINEAR, lambda layer, x, right: right(layer, x).detach())
    found = _figures(Contender("dense", layer(no_backward), masked=False), LINEAR)
    assert [name for name, metric, _ in found if metric == "time"] == ["forward"]
    without = [name for name, metric, _ in found if metric == "skipped"]
    assert without == ["backward", "forward_backward"]


@pytest.mark.parametrize(
    ("case", "compiled"),
    [(case, False) for case in SMOKE]
    + [pytest.param(case, True, marks=pytest.mark.slow) for case in SMOKE],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_pass_of_every_contender_has_its_figures(case, compiled):
    for contender in contenders_for(case, compiled):
        found = _figures(contender, case)
        for name in contender.passes:
            prepared = contender.make(problem_of(case, CPU)).prepare(name)
            expected = {"time", "spread"} | {metric for metric, *_ in rates(case, name, prepared)}
            expected |= {"saved"} if name == "forward" else set()
            metrics = {metric for where, metric, _ in found if where == name}
            assert metrics == expected, (contender.name, name, found)
        assert all(value > 0 for _, metric, value in found if metric == "time")


def test_bytes_and_operations_of_a_pass():
    problem, numel = problem_of(LINEAR, CPU), LINEAR.N * LINEAR.K
    saved = {one.name: one.make(problem).saved_bytes() for one in contenders_for(LINEAR, False)}
    assert saved["dense"] == 2 * numel and saved["gemm"] == 0  # the weight as autocast made it
    assert saved["fused"] <= 4 * LINEAR.N and saved["packed"] <= 2 * numel + 4 * LINEAR.N
    product = 2 * 2 * 5 * 5 * 8 * 36
    assert [flops(STRIDED, name) for name in ("forward", "backward")] == [product, 2 * product]
    weight, images, outputs = 4 * 8 * 36, 4 * 2 * 4 * 81, 4 * 2 * 8 * 25
    forward, backward = weight + images + outputs, 2 * weight + 2 * images + outputs
    expected = [forward, backward, forward + backward, forward, forward + weight]
    assert [least_bytes(STRIDED, name) for name in PASSES + PIECES] == expected
    assert [least_bytes(SMALL, name) / SMALL.numel for name in STREAMS] == [6, 10]
