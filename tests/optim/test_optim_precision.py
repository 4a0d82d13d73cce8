"""Float32, 16-bit parameters and autocast: as close to float64 as torch's own optimizers."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from networks import channels_last, linear
from ops.tolerance import assert_as_accurate
from twins import Twins, assert_same_dtypes, batches, masked_layers

import dst_kernels

OPTIONS = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "alpha": 1e-2},
    "adamw": {"lr": 0.01, "alpha": 1e-2},
}
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def compare(
    network, backend, rule, convert, steps, dtype=torch.float32, context=None, **more_options
):
    """With a run of torch's in float64 from the same start, which `convert` has rounded.

    Under autocast torch's run masks its layers together, too: then both sum the gradients of
    biases in the dtype of the product.
    """
    model, shape = network(backend=backend)
    model = convert(model)
    options = {**OPTIONS[rule], **more_options}
    exact = Twins(copy.deepcopy(model).double(), rule, backend="reference", **options)
    twins = Twins(model, rule, backend=backend, **options)
    if context is not None:
        dst_kernels.group_(twins.theirs.model)
    for input, target in (batches(shape, dtype=dtype) * steps)[:steps]:
        exact.step(input.double(), target)
        with contextlib.nullcontext() if context is None else context():
            twins.both(lambda side: side.optimizer.zero_grad())
            losses = twins.both(lambda side, i=input, t=target: side.loss(i, t))
        for side, loss in zip(twins.sides, losses, strict=True):
            (loss + side.regularizer(twins.alphas)).backward()
            side.optimizer.step()
    assert_same_dtypes(twins)
    rows = zip(
        *(side.model.named_parameters() for side in (*twins.sides, exact.theirs)), strict=True
    )
    for (name, ours), (_, plain), (_, reference) in rows:
        assert ours.dtype == plain.dtype, name
        assert_as_accurate(ours.detach(), plain.detach(), reference.detach())
    return twins


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("network", [linear, channels_last])
def test_float32(network, rule, backend):
    compare(network, backend, rule, lambda model: model.float(), steps=20)


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_parameters_of_16_bits(dtype, rule, backend):
    """Thresholds stay float32. AdamW's own eps is 0 in float16, and torch's result then NaN."""
    more = {"eps": 0.01} if rule == "adamw" else {}
    convert = lambda model: model.to(dtype)  # noqa: E731
    twins = compare(linear, backend, rule, convert, 4, dtype, **more)
    for layer in masked_layers(twins.ours.model):
        assert layer.weight.dtype == dtype and layer.threshold.dtype == torch.float32


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("network", [linear, channels_last])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_autocast(dtype, network, rule, backend):
    autocast = lambda: torch.autocast("cpu", dtype)  # noqa: E731
    compare(network, backend, rule, lambda model: model.float(), steps=6, context=autocast)
