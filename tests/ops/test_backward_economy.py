"""What backward computes and what forward keeps for it: nothing that nobody asked for."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dst_kernels.functional as dst

pytestmark = pytest.mark.usefixtures("each_backend")


class OpsRun(TorchDispatchMode):
    """Names of the package's ops, in the order they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dst_kernels":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


LINEAR = (dst.masked_linear, (3, 6), (4, 6), "masked_linear")
CONV = (dst.masked_conv2d, (2, 3, 5, 5), (4, 3, 2, 2), "masked_conv")
PATHS = pytest.mark.parametrize("path", ["fused", "packed", "mixed", "auto"])
OPS = pytest.mark.parametrize(("run", "input", "weight", "name"), [LINEAR, CONV], ids=["l", "c"])


def leaves_of(input, weight, wanted):
    shapes = {"input": input, "weight": weight, "threshold": weight[:1], "bias": weight[:1]}
    return {
        name: torch.rand(shape).requires_grad_(name in wanted) for name, shape in shapes.items()
    }


ALL = {"input", "weight", "threshold", "bias"}


@PATHS
@OPS
def test_backward_runs_only_what_is_needed(run, input, weight, name, path):
    for wanted, ran in (
        (ALL, ["grad_input", "grad_weight"]),
        ({"weight", "threshold", "bias"}, ["grad_weight"]),
        ({"weight"}, ["grad_weight"]),
        ({"threshold"}, ["grad_weight"]),
        ({"input"}, ["grad_input"]),
        ({"input", "bias"}, ["grad_input"]),
        ({"bias"}, []),
    ):
        leaves = leaves_of(input, weight, wanted)
        output = run(**leaves, path=path)
        with OpsRun() as ops:
            output.sum().backward()
        packed = path in ("packed", "auto")
        expected = {
            "grad_input": f"{name}_grad_input" if path == "fused" else None,
            "grad_weight": "masked_weight_backward" if packed else f"{name}_grad_weight",
        }
        assert sorted(ops.names) == sorted(filter(None, map(expected.get, ran))), wanted
        for leaf_name, leaf in leaves.items():
            assert (leaf.grad is not None) == (leaf_name in wanted)


@PATHS
@OPS
def test_forward_is_one_op_and_saves_nothing_without_grad(run, input, weight, name, path):
    leaves = leaves_of(input, weight, {"weight", "threshold"})
    with OpsRun() as ops, torch.no_grad():
        output = run(**leaves, path=path)
    assert ops.names == [name if path == "fused" else "masked_weight"]
    assert not output.requires_grad


def saved_by(run, **arguments):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(**arguments)
    return saved


def is_leaf(tensor, leaf):
    return tensor.data_ptr() == leaf.data_ptr() and tensor.shape == leaf.shape


@PATHS
@OPS
def test_what_is_saved(run, input, weight, name, path):
    for wanted, kept in (
        (ALL, {"input", "weight", "effective", "packed"}),
        ({"weight", "threshold"}, {"input", "weight", "effective"}),
        ({"weight"}, {"input", "weight", "effective"}),
        ({"threshold"}, {"input", "weight", "effective"}),
        ({"input"}, {"packed"}),
        ({"bias"}, set()),
    ):
        if path == "fused" and "packed" in kept:
            kept = (kept - {"packed"}) | {"weight", "effective"}
        if path in ("packed", "auto") and name == "masked_conv":
            kept = kept | {"input", "packed"}  # torch's convolution saves both in any case
        leaves = leaves_of(input, weight, wanted)
        names = []
        for tensor in saved_by(run, **leaves, path=path):
            assert tensor.dtype != torch.bool
            matches = [name for name in ("input", "weight") if is_leaf(tensor, leaves[name])]
            if not matches and tensor.numel() == leaves["weight"].numel():
                matches = ["packed"]
            elif not matches:
                assert tensor.shape == leaves["threshold"].shape
                assert not is_leaf(tensor, leaves["threshold"]), "a commit would change it"
                matches = ["effective"]
            names += matches
        assert sorted(names) == sorted(kept), wanted


def test_masked_weight_saves_weight_and_effective_threshold():
    weight = torch.rand(4, 6, requires_grad=True)
    threshold = torch.rand(4, requires_grad=True)
    saved = saved_by(dst.masked_weight, weight=weight, threshold=threshold)
    assert sorted(tuple(t.shape) for t in saved) == [(4,), (4, 6)]
    assert all(t.dtype == torch.float32 for t in saved)


def test_masked_weight_gradients_only_where_wanted():
    for wanted in ({"weight"}, {"threshold"}):
        weight = torch.rand(4, 6, requires_grad="weight" in wanted)
        threshold = torch.rand(4, requires_grad="threshold" in wanted)
        with OpsRun() as ops:
            dst.masked_weight(weight, threshold).sum().backward()
        assert ops.names == ["masked_weight", "masked_weight_backward"]
        assert (weight.grad is None) == ("weight" not in wanted)
        assert (threshold.grad is None) == ("threshold" not in wanted)


@OPS
def test_changing_the_threshold_before_backward_does_no_harm(run, input, weight, name):
    leaves = leaves_of(input, weight, {"weight", "threshold"})
    output = run(**leaves)
    expected = torch.autograd.grad(output.sum(), leaves["threshold"], retain_graph=True)[0]
    with torch.no_grad():
        leaves["threshold"].add_(1.0)
    assert torch.equal(torch.autograd.grad(output.sum(), leaves["threshold"])[0], expected)


@OPS
def test_changing_the_weight_before_backward_is_an_error(run, input, weight, name):
    leaves = leaves_of(input, weight, {"weight"})
    output = run(**leaves)
    with torch.no_grad():
        leaves["weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class ConvolutionBackwards(TorchDispatchMode):
    """Addresses of what stood in for the input in torch's backward of a convolution."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            self.inputs.append(args[1].data_ptr())
        return function(*args, **(kwargs or {}))


def test_the_gradient_of_a_convolutions_input_takes_no_scratch_of_its_size():
    """It needs the input's shape alone, and the input is at hand."""
    leaves = leaves_of((2, 3, 5, 5), (4, 3, 2, 2), {"input", "weight", "threshold", "bias"})
    output = dst.masked_conv2d(**leaves, path="packed")
    with ConvolutionBackwards() as seen:
        output.sum().backward()
    assert seen.inputs == [leaves["input"].data_ptr()]


class EveryOp(TorchDispatchMode):
    """Names of all ops, in the order they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@PATHS
@OPS
def test_a_backward_makes_no_gradient_of_the_effective_threshold(run, input, weight, name, path):
    leaves = leaves_of(input, weight, {"input", "weight", "threshold", "bias"})
    output = run(**leaves, path=path)
    with EveryOp() as ops:
        output.backward(torch.ones_like(output))
    assert not any(name.startswith(("zeros", "new_zeros")) for name in ops.names)
