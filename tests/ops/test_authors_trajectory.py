"""Training side by side with the authors' rule: every weight, threshold and loss of every step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLayer,
    MaskedLinear,
)

from .authors import (
    AuthorsConv,
    AuthorsConvTranspose,
    AuthorsLayer,
    AuthorsLinear,
    mask,
    regularizer,
)

GENTLE, ALL = 40, 120  # steps with a weak regulariser, then with one that empties layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.usefixtures("each_backend"),
]


def stack():
    return nn.Sequential(
        MaskedLinear(12, 20), nn.ReLU(), MaskedLinear(20, 16, bias=False), nn.ReLU(),
        MaskedLinear(16, 4),
    ), (12,)  # fmt: skip


def conv1d():
    return nn.Sequential(
        MaskedConv1d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
        MaskedConv1d(6, 8, 2, dilation=2, groups=2), nn.ReLU(),
        nn.Flatten(), MaskedLinear(24, 4),
    ), (4, 10)  # fmt: skip


def conv2d():
    return nn.Sequential(
        MaskedConv2d(2, 6, 3, stride=(2, 1), padding=(1, 0)), nn.ReLU(),
        MaskedConv2d(6, 9, (2, 3), padding="same", dilation=(1, 2), groups=3, bias=False),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), MaskedLinear(36, 4),
    ), (2, 8, 6)  # fmt: skip


def conv3d():
    return nn.Sequential(
        MaskedConv3d(2, 4, (1, 2, 3), stride=(1, 1, 2), padding=(0, 1, 1)), nn.ReLU(),
        MaskedConv3d(4, 6, 2, dilation=(1, 2, 1), groups=2), nn.ReLU(),
        nn.Flatten(), MaskedLinear(72, 4),
    ), (2, 3, 4, 5)  # fmt: skip


def transposed1d():
    return nn.Sequential(
        MaskedConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
        MaskedConv1d(6, 5, 2), nn.ReLU(), nn.Flatten(), MaskedLinear(45, 4),
    ), (4, 5)  # fmt: skip


def transposed2d():
    return nn.Sequential(
        MaskedConv2d(2, 6, 3, stride=2), nn.ReLU(),
        MaskedConvTranspose2d(
            6, 9, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=3, bias=False
        ), nn.ReLU(),
        MaskedConvTranspose2d(9, 4, 2, dilation=2, padding=2), nn.ReLU(),
        nn.Flatten(), MaskedLinear(32, 4),
    ), (2, 7, 7)  # fmt: skip


def transposed3d():
    return nn.Sequential(
        MaskedConvTranspose3d(4, 6, (1, 2, 2), stride=(1, 2, 1), groups=2), nn.ReLU(),
        nn.Flatten(), MaskedLinear(144, 4),
    ), (4, 2, 2, 2)  # fmt: skip


def authors_version(model):
    model = copy.deepcopy(model)
    for index, layer in enumerate(model):
        if isinstance(layer, MaskedLinear):
            model[index] = AuthorsLinear(layer)
        elif "Transpose" in type(layer).__name__:
            model[index] = AuthorsConvTranspose(layer)
        elif isinstance(layer, MaskedLayer):
            model[index] = AuthorsConv(layer)
    return model


every_network = pytest.mark.parametrize(
    "network", [stack, conv1d, conv2d, conv3d, transposed1d, transposed2d, transposed3d]
)


def layers_of(model):
    return [module for module in model if isinstance(module, (MaskedLayer, AuthorsLayer))]


@every_network
def test_training_follows_the_authors_rule(network):
    ours, shape = network()
    ours.double()
    theirs = authors_version(ours)
    batches = torch.randn(8, 16, *shape, dtype=torch.float64)
    targets = torch.randint(0, 4, (8, 16))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    for step in range(ALL):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batches[step % 8]), targets[step % 8])
            penalty = regularizer(layer.threshold for layer in layers_of(model))
            loss = loss + (1e-2 if step < GENTLE else 0.4) * penalty
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        close(losses[0], losses[1], step, "loss")
        for number, (mine, yours) in enumerate(
            zip(layers_of(ours), layers_of(theirs), strict=True)
        ):
            for name in ("weight", "threshold", "bias"):
                a, b = getattr(mine, name), getattr(yours, name)
                assert (a is None) == (b is None)
                if name == "weight" and isinstance(yours, AuthorsConvTranspose):
                    b = yours.stored(b)
                if a is not None:
                    close(a.detach(), b.detach(), step, f"{name} of layer {number}")
        if step == GENTLE - 1:
            assert not any(layer.resets for layer in layers_of(theirs))
            masks = [mask(layer.weight, layer.threshold) for layer in layers_of(theirs)]
            assert not all(each.all() for each in masks), "some weights are pruned by now"
    assert all(layer.resets > 1 for layer in layers_of(theirs))


def close(a, b, step, what):
    scale = b.abs().max().item()
    torch.testing.assert_close(
        a, b, rtol=1e-10, atol=1e-10 * scale, msg=lambda m: f"{what} at step {step}: {m}"
    )


def test_evaluation_between_training_steps_gives_the_authors_outputs():
    ours, shape = stack()
    ours.double()
    theirs = authors_version(ours)
    x = torch.randn(16, *shape, dtype=torch.float64)
    with torch.no_grad():
        for mine, yours in zip(layers_of(ours), layers_of(theirs), strict=True):
            limit = mine.weight.abs().max() * torch.rand(mine.threshold.shape) * 1.2
            mine.threshold.copy_(limit)
            yours.threshold.copy_(limit)
        layers_of(ours)[1].threshold.fill_(5.0)
        layers_of(theirs)[1].threshold.fill_(5.0)
        ours.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)
    assert [layer.resets for layer in layers_of(theirs)] == [0, 1, 0]
    assert bool((layers_of(ours)[1].threshold == 5.0).all()), "an evaluation wrote a threshold"
