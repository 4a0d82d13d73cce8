"""Single layers and the weight side: nothing wrong gets a time; everything right does."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from made_up_rows import CPU, check_figures, recorded
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from bench.cases import MODES, ConvCase, LinearCase, ModelCase, WeightsCase
from bench.contenders import CONTENDERS, Contender, contenders_for, problem_of
from bench.contenders.authors import BranchFreeConv2d, BranchFreeLinear, branch_free_masked_weight
from bench.contenders.layers import layer
from bench.contenders.work import PASSES, PIECES, STREAMS, flops, least_bytes
from bench.measure.verify import Expectation
from bench.suites import SUITES

LINEAR = LinearCase(900, 270, 75)  # more tokens and rows than are sampled
CONV, DEPTHWISE = ConvCase(3, 8, 6, 70, 3), ConvCase(2, 9, 6, 6, 7, groups=6)
STRIDED = ConvCase(2, 9, 4, 8, 3, 2, dtype="fp32")
CONVS = CONV, DEPTHWISE, STRIDED
SMALL = WeightsCase("small")
SMOKE = [case for case in SUITES["smoke"].small if not isinstance(case, ModelCase)]


@pytest.mark.parametrize("case", [LINEAR, *CONVS, SMALL], ids=lambda case: case.op)
@pytest.mark.parametrize("dtype", sorted(MODES.keys() - {"tf32"}))
def test_the_problem_is_what_the_case_says_and_right_contenders_pass(case, dtype):
    case = replace(case, dtype=dtype, remaining_ratio=0.25)
    expectation = Expectation(case, CPU)
    both = (tree_leaves(vars(each)) for each in (expectation.problem, problem_of(case, CPU)))
    tensors, again = ([*filter(torch.is_tensor, leaves)] for leaves in both)
    assert all(map(torch.equal, tensors, again))
    for tensor in tensors:
        assert (tensor == 0).float().mean() < 0.01
        assert tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    shapes = case.list if case.op == "weights" else case.shapes[1:2]
    for weight, threshold, shape in zip(tensors, tensors[len(shapes) :], shapes, strict=False):
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


def _changed(layer, x, right, where, by):
    factor = torch.ones_like(output := right(layer, x))
    factor[where] = by
    return output * factor


def _unaware(layer, x, right):
    weight = branch_free_masked_weight(layer.weight, layer.threshold.detach())
    return F.linear(x, weight, layer.bias)


def _zero_gradient(layer, x, right):
    return _unaware(layer, x, right) + (0 * layer.threshold.sum()).to(x.dtype)


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
        (_zero_gradient, LINEAR, "threshold: error"),
        (_unaware, LINEAR, "threshold has no gradient"),
        (partial(_changed, where=-1, by=1.1), LINEAR, "output: error"),
        (partial(_changed, where=(31, 7), by=torch.nan), LINEAR, "output is not finite"),
        (lambda layer, x, right: right(layer, x).float(), LINEAR, "output is torch.float32"),
        (_sloppy, LINEAR, "output: error"),
        *((partial(_changed, where=(..., -1), by=1.1), case, "output: error") for case in CONVS),
        *((_last_filter_dense, case, "output: error") for case in CONVS),
    ],
)
def test_a_wrong_layer_has_no_time(forward, case, message):
    wrong = Contender("wrong", layer(_wrong(case, forward)))
    error, raised = recorded(wrong, Expectation(case, CPU))
    assert raised == "raised" and error[:2] == ("", "error") and error[2].startswith(message)


@pytest.mark.parametrize(("name", "which"), [("pack", 0), ("post", 0), ("post", 1)])
def test_a_wrong_call_over_weights_has_no_time(name, which):
    def make(problem):
        work = CONTENDERS["weights"][-1].make(problem)
        for tensor in (results := work._calls[name]())[which]:
            tensor *= 1.01
        work._calls[name] = lambda: results
        return work

    error, raised = recorded(Contender("wrong", make, STREAMS), Expectation(SMALL, CPU))
    message = f"{name}, {('weight', 'threshold')[which]} 0: error"
    assert raised == "raised" and error[:2] == ("", "error") and error[2].startswith(message)


def test_what_cannot_run_says_why_and_leaves_the_other_passes():
    fail = Mock(side_effect=RuntimeError("no such device\nsecond line"))
    found = recorded(Contender("absent", fail), Expectation(SMALL, CPU))
    assert found == [("", "skipped", "RuntimeError: no such device")]
    no_backward = _wrong(LINEAR, lambda layer, x, right: right(layer, x).detach())
    found = recorded(Contender("dense", layer(no_backward), masked=False), Expectation(LINEAR, CPU))
    found = [(name, metric) for name, metric, _ in found if metric in ("time", "skipped")]
    assert [name for name, metric in found if metric == "time"] == ["forward"]
    assert found[1:] == [("backward", "skipped"), ("forward_backward", "skipped")]


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_pass_of_every_contender_has_its_figures(case, compiled):
    check_figures(case, CPU, compiled)


ON_GPU = [ConvCase(4, 8, 64, 64, 3), ConvCase(4, 9, 64, 32, 1, 2), LinearCase(256, 256, 128), SMALL]
ON_GPU += [ConvCase(4, 9, 32, 32, 7, groups=32), ModelCase("vgg-small", 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: case.name)
def test_every_pass_of_every_contender_has_its_figures_on_a_gpu(case):
    check_figures(case, torch.device("cuda"))


def test_shapes_bytes_and_operations_of_a_pass():
    problem, numel = problem_of(LINEAR, CPU), LINEAR.N * LINEAR.K
    saved = {one.name: one.make(problem).saved_bytes() for one in contenders_for(LINEAR, False)}
    assert saved["dense"] == 2 * numel and saved["gemm"] == 0  # the weight as autocast made it
    assert saved["fused"] <= 4 * LINEAR.N and saved["packed"] <= 2 * numel + 4 * LINEAR.N
    grouped = ConvCase(2, 9, 8, 16, 3, stride=2, groups=4)
    assert grouped.shapes == ((2, 8, 9, 9), (16, 2, 3, 3), (2, 16, 5, 5))
    assert (grouped.M, grouped.N, grouped.K) == (2 * 5 * 5, 16, 2 * 9)
    product = 2 * 2 * 5 * 5 * 8 * 36
    assert [flops(STRIDED, name) for name in ("forward", "backward")] == [product, 2 * product]
    weight, images, outputs = 4 * 8 * 36, 4 * 2 * 4 * 81, 4 * 2 * 8 * 25
    forward, backward = weight + images + outputs, 2 * weight + 2 * images + outputs
    expected = [forward, backward, forward + backward, forward, forward + weight]
    assert [least_bytes(STRIDED, name) for name in PASSES + PIECES] == expected
    assert [least_bytes(SMALL, name) / SMALL.numel for name in STREAMS] == [6, 10]
    assert WeightsCase("3x4x5").list == ((4, 5),) * 3
    assert WeightsCase("resnet-50").numel == 25_502_912
