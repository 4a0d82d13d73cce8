"""Against the authors' rule and the optimizers', written out: no line comes from the package."""

from __future__ import annotations

import pytest
import torch

from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD, DSTAdamW
from tests.ops import authors

ROWS, COLUMNS, STEPS = 5, 7, 40
LR, MOMENTUM, DECAY, THRESHOLD_DECAY, ALPHA = 0.1, 0.8, 0.01, 0.002, 0.05
BETAS, EPS = (0.8, 0.95), 1e-6


class Sgd:
    def __init__(self):
        self.buffers = {}

    def update(self, key, value, gradient, decay):
        gradient = gradient + decay * value
        if key in self.buffers:
            gradient = gradient + MOMENTUM * self.buffers[key]
        self.buffers[key] = gradient
        return value - LR * gradient


class AdamW:
    def __init__(self):
        self.averages = {}

    def update(self, key, value, gradient, decay):
        m, v, n = self.averages.get(key, (0.0, 0.0, 0))
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        n += 1
        self.averages[key] = m, v, n
        value = value - LR * decay * value
        m_hat, v_hat = m / (1 - BETAS[0] ** n), v / (1 - BETAS[1] ** n)
        return value - LR * m_hat / (v_hat.sqrt() + EPS)


class Layer:
    """W and t as tensors without gradients of their own."""

    def __init__(self, weight, rule):
        self.weight, self.threshold, self.rule = weight, weight.new_zeros(ROWS), rule
        self.resets = 0

    def guard(self):
        """As the authors have it in their forward."""
        if authors.collapsed(self.weight, self.threshold):
            self.threshold = torch.zeros_like(self.threshold)
            self.resets += 1

    def masked(self):
        self.guard()
        return authors.masked_weight(self.weight, self.threshold)

    def step(self, dense):
        """`dense` is G; the mask is that of the forward before."""
        of_weight, of_threshold = authors.gradients(dense, self.weight, self.threshold)
        threshold = self.threshold.clone().requires_grad_()
        (of_penalty,) = torch.autograd.grad(authors.regularizer([threshold]), threshold)
        of_threshold = of_threshold + ALPHA * of_penalty
        self.weight = self.rule.update("weight", self.weight, of_weight, DECAY)
        self.threshold = self.rule.update("t", self.threshold, of_threshold, THRESHOLD_DECAY)


@pytest.mark.parametrize(
    "rule, ours, options",
    [(Sgd, DSTSGD, {"momentum": MOMENTUM}), (AdamW, DSTAdamW, {"betas": BETAS, "eps": EPS})],
    ids=["sgd", "adamw"],
)
def test_numbers(rule, ours, options, backend):
    """The loss is sum(C * (X W' + b)), so that G = C' X without any autograd."""
    layer = MaskedLinear(COLUMNS, ROWS, backend=backend, dtype=torch.float64)
    groups = [
        {"params": [layer.weight, layer.bias], "weight_decay": DECAY},
        {"params": [layer.threshold], "weight_decay": THRESHOLD_DECAY},
    ]
    optimizer = ours(layer, groups, lr=LR, alpha=ALPHA, backend=backend, **options)
    expected = Layer(layer.weight.detach().clone(), rule())
    for step in range(STEPS):
        if step in (12, 25):  # nothing is left
            with torch.no_grad():
                layer.threshold.add_(5)
            expected.threshold = expected.threshold + 5
        inputs = torch.randn(6, COLUMNS, dtype=torch.float64)
        factors = torch.randn(6, ROWS, dtype=torch.float64) / 6
        output = layer(inputs) - layer.bias.detach()
        assert_close(output, inputs @ expected.masked().t())
        (output * factors).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.step(factors.t() @ inputs)
        expected.guard()  # a reset that is due
        assert_close(layer.weight, expected.weight)
        assert_close(layer.threshold, expected.threshold)
    assert expected.resets >= 2


def assert_close(ours, expected):
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-11, atol=1e-12)
