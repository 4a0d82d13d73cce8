"""Against the rule written out in numbers, one weight at a time: no line comes from the package."""

from __future__ import annotations

import math

import pytest
import torch

from dst_kernels.nn import MaskedLinear
from dst_kernels.optim import DSTSGD, DSTAdamW

ROWS, COLUMNS, STEPS = 5, 7, 40
LR, MOMENTUM, DECAY, THRESHOLD_DECAY, ALPHA = 0.1, 0.8, 0.01, 0.002, 0.05
BETAS, EPS = (0.8, 0.95), 1e-6


def slope(q):
    """H: the long-tailed estimator."""
    q = abs(q)
    if q <= 0.4:
        return 2 - 4 * q
    return 0.4 if q <= 1 else 0.0


class Sgd:
    def __init__(self):
        self.buffers = {}

    def update(self, key, value, gradient, decay):
        gradient += decay * value
        if key in self.buffers:
            gradient += MOMENTUM * self.buffers[key]
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
        value -= LR * decay * value
        m_hat, v_hat = m / (1 - BETAS[0] ** n), v / (1 - BETAS[1] ** n)
        return value - LR * m_hat / (math.sqrt(v_hat) + EPS)


class Layer:
    """W and t as nested lists, trained by numbers alone."""

    def __init__(self, weight, rule):
        self.weight, self.threshold, self.rule = weight, [0.0] * ROWS, rule
        self.resets = 0

    def mask(self):
        """After the guard, as the authors have it in their forward."""
        mask = self._mask()
        if sum(map(sum, mask)) / (ROWS * COLUMNS) <= 0.01:
            self.threshold = [0.0] * ROWS
            self.resets += 1
            mask = self._mask()
        return mask

    def _mask(self):
        return [[int(abs(w) > self.threshold[i]) for w in self.weight[i]] for i in range(ROWS)]

    def masked(self):
        mask = self.mask()
        return [[self.weight[i][j] * mask[i][j] for j in range(COLUMNS)] for i in range(ROWS)]

    def step(self, dense):
        """`dense` is G; the mask is that of the forward before."""
        mask = self.mask()
        for i in range(ROWS):
            t, of_threshold = self.threshold[i], 0.0
            for j in range(COLUMNS):
                w, g = self.weight[i][j], dense[i][j]
                through = g * slope(abs(w) - t)
                of_threshold -= w * through
                of_weight = g * mask[i][j] + abs(w) * through
                self.weight[i][j] = self.rule.update((i, j), w, of_weight, DECAY)
            of_threshold -= ALPHA * math.exp(-t)
            self.threshold[i] = self.rule.update(i, t, of_threshold, THRESHOLD_DECAY)


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
    numbers = Layer(layer.weight.tolist(), rule())
    for step in range(STEPS):
        if step in (12, 25):  # nothing is left
            with torch.no_grad():
                layer.threshold.add_(5)
            numbers.threshold = [t + 5 for t in numbers.threshold]
        inputs = torch.randn(6, COLUMNS, dtype=torch.float64)
        factors = torch.randn(6, ROWS, dtype=torch.float64) / 6
        output = layer(inputs) - layer.bias.detach()
        assert_close(output, inputs @ torch.tensor(numbers.masked(), dtype=torch.float64).t())
        (output * factors).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        numbers.step((factors.t() @ inputs).tolist())
        numbers.mask()  # a reset that is due
        assert_close(layer.weight, numbers.weight)
        assert_close(layer.threshold, numbers.threshold)
    assert numbers.resets >= 2


def assert_close(ours, numbers):
    expected = torch.as_tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-11, atol=1e-12)
