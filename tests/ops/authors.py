"""The authors' training rule, transcribed on its own: no line of it comes from the package.

A layer keeps the weights whose magnitude lies strictly above the threshold of their row. Every
forward, in training or not, looks at the share that is left; at one hundredth or less it writes
zeros into the threshold parameter and masks again. The step function has a made-up derivative.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Step(torch.autograd.Function):
    """1 above zero, else 0; backwards the long-tailed estimator."""

    @staticmethod
    def forward(ctx, q):
        ctx.save_for_backward(q)
        return (q > 0).to(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        distance = q.abs()
        slope = torch.zeros_like(q)
        slope[distance <= 1.0] = 0.4
        near = distance <= 0.4
        slope[near] = 2.0 - 4.0 * distance[near]
        return grad * slope


class AuthorsLayer(nn.Module):
    """Takes over copies of a dense or masked layer's weight and bias; thresholds start at 0."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone())
        self.threshold = nn.Parameter(like.weight.new_zeros(like.weight.shape[0]))
        self.resets = 0

    def mask(self):
        rows = self.weight.flatten(1)
        return Step.apply(rows.abs() - self.threshold[:, None]).view_as(self.weight)

    def masked_weight(self):
        mask = self.mask()
        if mask.sum().item() / mask.numel() <= 0.01:
            self.threshold.data[:] = 0.0
            self.resets += 1
            mask = self.mask()
        return self.weight * mask


class AuthorsLinear(AuthorsLayer):
    def forward(self, x):
        return F.linear(x, self.masked_weight(), self.bias)


class AuthorsConv(AuthorsLayer):
    def __init__(self, like: nn.Module):
        super().__init__(like)
        self.convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[like.weight.dim()]
        self.geometry = (like.stride, like.padding, like.dilation, like.groups)

    def forward(self, x):
        return self.convolution(x, self.masked_weight(), self.bias, *self.geometry)


class AuthorsConvTranspose(AuthorsLayer):
    """Theirs has none; their rule with one threshold for each output channel.

    Keeps the kernel with the output channels first, as the rule wants rows, and turns the masked
    one into what torch's transposed convolution takes, group by group.
    """

    def __init__(self, like: nn.Module):
        super().__init__(like)
        self.groups, self.like = like.groups, like
        rows = [part.transpose(0, 1) for part in self.weight.detach().chunk(self.groups)]
        self.weight = nn.Parameter(torch.cat(rows))
        self.threshold = nn.Parameter(self.weight.new_zeros(like.out_channels))

    def stored(self, kernel):
        """[out, in/groups, ...] in torch's order."""
        return torch.cat([part.transpose(0, 1) for part in kernel.chunk(self.groups)])

    def forward(self, x):
        transposed = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
        like = self.like
        return transposed[x.dim()](
            x, self.stored(self.masked_weight()), self.bias, like.stride, like.padding,
            like.output_padding, like.groups, like.dilation,
        )  # fmt: skip


def regularizer(layers) -> torch.Tensor:
    """Sum of exp(-t) over all thresholds of all layers."""
    return sum(torch.exp(-layer.threshold).sum() for layer in layers)
