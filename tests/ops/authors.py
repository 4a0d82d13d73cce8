"""The authors' training rule, transcribed from the method: no line of it comes from the package.

This is the only transcription. A step function whose derivative is made up stands between weights
and mask, and autograd does the rest, as in the authors' code:

    mask = S(|W| - t)    output = product with W * mask    regulariser = sum of exp(-t)

Every forward looks at the share of weights that is left; at one hundredth or less it writes zeros
into the threshold parameter and masks again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def long_tailed(q: Tensor) -> Tensor:
    """The authors' derivative of the step."""
    distance = q.abs()
    slope = torch.zeros_like(q)
    slope[distance <= 1.0] = 0.4
    near = distance <= 0.4
    slope[near] = 2.0 - 4.0 * distance[near]
    return slope


SURROGATES = {
    "long_tailed": long_tailed,
    # Not the authors', but those of other papers that the package offers in its place.
    "rectangular": lambda q: (q.abs() <= 0.5).to(q.dtype),
    "triangular": lambda q: (1.0 - q.abs()).clamp(min=0.0),
    "straight_through": torch.ones_like,
}


class Step(torch.autograd.Function):
    """0 at and below zero, else 1; NaN is above."""

    @staticmethod
    def forward(ctx, q, surrogate):
        ctx.save_for_backward(q)
        ctx.surrogate = surrogate
        return (~(q <= 0)).to(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        return grad * SURROGATES[ctx.surrogate](q), None


def spread(threshold: Tensor, shape: torch.Size) -> Tensor:
    """The threshold of every single weight: one for each row, for all, or for each already."""
    if threshold.numel() == 1 and threshold.dim() <= 1:
        return threshold.reshape(()).expand(shape)
    if threshold.dim() == 1:
        return threshold.reshape(shape[0], *[1] * (len(shape) - 1)).expand(shape)
    return threshold


def masked_weight(
    weight: Tensor,
    threshold: Tensor,
    surrogate: str = "long_tailed",
    structure_gradient: bool = True,
) -> Tensor:
    """W * M, with a gradient for both; the mask may be left out of the weight's."""
    magnitude = (weight if structure_gradient else weight.detach()).abs()
    return weight * Step.apply(magnitude - spread(threshold, weight.shape), surrogate)


def mask(weight: Tensor, threshold: Tensor) -> Tensor:
    """What is kept, as a boolean tensor; both arguments compared as the numbers they are."""
    weight, threshold = weight.detach().double(), threshold.detach().double()
    return Step.apply(weight.abs() - spread(threshold, weight.shape), "long_tailed") != 0


def gradients(grad: Tensor, weight: Tensor, threshold: Tensor, *options) -> tuple[Tensor, Tensor]:
    """(dW, dt) in float64 from the gradient of W * M; `options` as of `masked_weight`."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (weight, threshold)]
    return torch.autograd.grad(masked_weight(*leaves, *options), leaves, grad.double())


def collapsed(weight: Tensor, threshold: Tensor, reset_ratio: float | None = 0.01) -> bool:
    """Whether the guard resets the thresholds of this weight; None is no guard."""
    if reset_ratio is None or not weight.numel():
        return False
    return mask(weight, threshold).sum().item() / weight.numel() <= reset_ratio


def effective(weight: Tensor, threshold: Tensor, reset_ratio: float | None = 0.01) -> Tensor:
    """The threshold after the guard."""
    threshold = threshold.detach().clone()
    return threshold.zero_() if collapsed(weight, threshold, reset_ratio) else threshold


def regularizer(thresholds) -> Tensor:
    """Sum of exp(-t) over all of them."""
    return sum(torch.exp(-threshold).sum() for threshold in thresholds)


def transposed(kernel: Tensor, groups: int) -> Tensor:
    """[in, out/groups, ...], as torch's transposed convolutions have it, with rows of outputs.

    That is [out, in/groups, ...], and the way back is the same.
    """
    return torch.cat([part.transpose(0, 1) for part in kernel.chunk(groups)])


class AuthorsLayer(nn.Module):
    """Takes over copies of a dense or masked layer's weight and bias; thresholds start at 0."""

    def __init__(self, like: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(like.weight.detach().clone())
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone())
        self.threshold = nn.Parameter(like.weight.new_zeros(like.weight.shape[0]))
        self.resets = 0

    def masked_weight(self):
        if collapsed(self.weight, self.threshold):
            self.threshold.data[:] = 0.0
            self.resets += 1
        return masked_weight(self.weight, self.threshold)


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

    Keeps the kernel with the output channels first, as the rule wants rows.
    """

    def __init__(self, like: nn.Module):
        super().__init__(like)
        self.like = like
        self.weight = nn.Parameter(transposed(self.weight.detach(), like.groups))
        self.threshold = nn.Parameter(self.weight.new_zeros(like.out_channels))

    def stored(self, rows):
        return transposed(rows, self.like.groups)

    def forward(self, x):
        functions = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
        like = self.like
        return functions[x.dim()](
            x, self.stored(self.masked_weight()), self.bias, like.stride, like.padding,
            like.output_padding, like.groups, like.dilation,
        )  # fmt: skip
