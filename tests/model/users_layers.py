"""Subclasses of torch's layers as users write them, with inputs, and models that hold layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WithMethods(nn.Linear):
    """Has a method and attributes of its own."""

    kind = "relevance"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.scale, self.notes = 0.5, ["kept"]

    def relprop(self, relevance: Tensor) -> Tensor:
        return relevance @ self.weight * self.scale


class Scaled(nn.Linear):
    """Scales its output in `__call__`."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) * 3


class Plain(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class OldSuper(nn.Linear):
    def forward(self, input):
        return super(OldSuper, self).forward(input)  # noqa: UP008


class Around(nn.Linear):
    """Does something before and after the layer's own forward."""

    def forward(self, input):
        return super().forward(input.tanh()).relu() + 1


class Direct(nn.Linear):
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class ByClass(nn.Linear):
    def forward(self, input):
        return nn.Linear.forward(self, input)


class Twice(nn.Linear):
    """Reads its weight twice and calls itself."""

    def forward(self, input, again=True):
        output = F.linear(input, self.weight, self.bias)
        return output + (self(2 * input, again=False) if again else self.weight.sum())


class Further(Around):
    """Inherits a forward of its own and adds to it."""

    def forward(self, input):
        return super().forward(input) - self.weight.mean()


class Standardised(nn.Conv2d):
    """Standardises its weight before the convolution."""

    def forward(self, input):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (self.weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return self._conv_forward(input, weight, self.bias)


class Padded(nn.Conv1d):
    """Pads on the left only, as causal convolutions do."""

    def forward(self, input):
        return super().forward(F.pad(input, (2, 0)))


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) * 2


class Up(nn.ConvTranspose1d):
    def forward(self, input):
        return super().forward(input).relu()


class OnlyOutput(nn.LSTM):
    """Returns the output alone."""

    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


class Told(nn.GRU):
    def remembered(self):
        return self.hidden_size


INPUTS = {
    nn.Linear: (4, 6),
    nn.Conv1d: (2, 6, 7),
    nn.Conv2d: (2, 6, 5, 4),
    nn.ConvTranspose1d: (2, 6, 5),
    nn.LSTM: (3, 2, 6),
    nn.GRU: (3, 2, 6),
}
ARGUMENTS = {nn.Linear: (6, 5), nn.LSTM: (6, 5), nn.GRU: (6, 5)}
LAYERS = (
    WithMethods, Scaled, Plain, OldSuper, Around, Direct, ByClass, Twice, Further, Standardised,
    Padded, OwnConvolution, Up, OnlyOutput, Told, nn.Linear, nn.Conv2d, nn.LSTM,
)  # fmt: skip


def torchs(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if base in INPUTS)


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(*ARGUMENTS.get(torchs(kind), (6, 5, 3))).double()


def input_of(kind: type[nn.Module], requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = INPUTS[torchs(kind)]
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=requires_grad)


def output_of(layer: nn.Module, input: Tensor) -> Tensor:
    output = layer(input)
    return output if isinstance(output, Tensor) else output[0]


def forward_in_a_process(model, inputs, queue) -> None:
    """Put the outputs of a Sequential's layers into a queue, as the target of a process."""
    torch.set_num_threads(1)
    queue.put([output_of(layer, x).tolist() for layer, x in zip(model, inputs, strict=True)])


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Give all thresholds other values in the midst of the weights'."""
    for name, parameter in model.named_parameters():
        if "threshold" in name:
            parameter.uniform_(0.03, 0.1)
    return model


class Held(nn.Module):
    """Calls layers that it reaches through Python's own containers, aliases and closures."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(4, 4) for _ in range(6))
        self.module_list = nn.ModuleList([self.a, Direct(4, 4)])
        self.list = [self.a]
        self.dict = {"b": (self.b, "a tuple")}
        self.alias = self.c
        self.nested = [[{"d": self.d}]]
        held = self.e
        self.closure = lambda x: held(x)
        self.call = self.f.__call__
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.list[0](x).tanh()
        x = self.dict["b"][0](x).tanh()
        x = self.alias(x).tanh()
        x = self.nested[0][0]["d"](x).tanh()
        x = self.call(self.closure(x).tanh()).tanh()
        return self.module_list[1](x)
