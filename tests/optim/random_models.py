"""Random small networks, and how to build each of their parts from a random generator."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConvTranspose1d,
    MaskedGRU,
    MaskedLinear,
    MaskedLSTM,
    MaskedRNN,
)
from dst_kernels.reference.surrogate import SURROGATES

CLASSES = 4


class LastStep(nn.Module):
    """Gives a recurrent module a signal [batch, channels, length], and returns its last step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, signal: Tensor) -> Tensor:
        return self.module(signal.permute(2, 0, 1))[0][-1]


class RandomNetwork(nn.Module):
    """A chain of layers, in which a layer may stand twice, or share its weight with another."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.options = self._masking()
        start = chance.choice([self._vector, self._signal, self._signal, self._image, self._image])
        layers, width = start()
        layers += self._linear_part(width)
        self.layers = nn.ModuleList(layers)
        self._freeze_some()
        del self.chance, self.options
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    # -- parts ---------------------------------------------------------------------------------

    def _vector(self) -> tuple[list[nn.Module], int]:
        self.input_shape = (self.chance.randint(3, 7),)
        return [], self.input_shape[0]

    def _signal(self) -> tuple[list[nn.Module], int]:
        chance, channels, length = self.chance, self.chance.choice([2, 4]), 7
        self.input_shape = (channels, length)
        layers = []
        for _ in range(chance.randint(0, 2)):
            out = chance.choice([2, 4, 6])
            mode = chance.choice(["zeros", "circular", "reflect", "replicate"])
            layers += self._conv(
                self._layer(
                    nn.Conv1d, MaskedConv1d, channels, out, 3, padding=1, padding_mode=mode,
                    groups=self._groups(channels, out), bias=chance.random() < 0.5,
                ), nn.BatchNorm1d(out, eps=0.1),
            )  # fmt: skip
            channels = out
        if chance.random() < 0.3:
            layers.append(self._layer(nn.ConvTranspose1d, MaskedConvTranspose1d, channels, 3, 2))
            channels, length = 3, length + 1
        if chance.random() < 0.6:
            kind = chance.choice([MaskedLSTM, MaskedGRU, MaskedRNN])
            options = {"num_layers": chance.choice([1, 1, 2]), "bidirectional": self._flip(0.3)}
            if kind is MaskedLSTM and self._flip(0.3):
                options["proj_size"] = 3
            masking = {**self._masking(), "path": "auto"}
            units = options.get("proj_size", 5) * (1 + options["bidirectional"])
            return [*layers, LastStep(kind(channels, 5, **options, **masking))], units
        return [*layers, nn.Flatten()], channels * length

    def _image(self) -> tuple[list[nn.Module], int]:
        chance, channels, sides = self.chance, self.chance.choice([2, 4]), (4, 5)
        self.input_shape = (channels, *sides)
        layers = []
        for _ in range(chance.randint(1, 2)):
            out = chance.choice([2, 4, 6])
            options = chance.choice([
                {"padding": 1}, {"padding": "same", "padding_mode": "circular"},
                {"padding": 1, "padding_mode": "reflect"}, {"padding": 2, "dilation": 2},
                {"padding": (1, 1), "padding_mode": "replicate"},
            ])  # fmt: skip
            layers += self._conv(
                self._layer(
                    nn.Conv2d, MaskedConv2d, channels, out, 3, **options,
                    groups=self._groups(channels, out), bias=chance.random() < 0.5,
                ), nn.BatchNorm2d(out, eps=0.1),
            )  # fmt: skip
            channels = out
        return [*layers, nn.Flatten()], channels * sides[0] * sides[1]

    def _linear_part(self, width: int) -> list[nn.Module]:
        chance, layers = self.chance, []
        out = chance.randint(5, 8)
        layers += [self._layer(nn.Linear, MaskedLinear, width, out), nn.Tanh()]
        square = MaskedLinear(out, out, **self._masking())
        what = chance.choice(["twice", "tied", "tied to others", "tied to dense", "none", "none"])
        if what == "twice":
            layers += [square, nn.Tanh(), square, nn.Tanh()]
        elif what != "none":
            other = nn.Linear(out, out)
            if what != "tied to dense":
                masking = self._masking() if what == "tied to others" else _options(square)
                for name in ("granularity", "reset_ratio"):  # of the threshold they share
                    masking[name] = getattr(square, name)
                other = MaskedLinear(out, out, **masking)
                other.threshold = square.threshold
            other.weight = square.weight
            layers += [square, nn.Tanh(), other, nn.Tanh()]
        if self._flip(0.5):
            layers += [nn.Linear(out, out, bias=False), nn.BatchNorm1d(out, eps=0.1), nn.Softplus()]
        return [*layers, MaskedLinear(out, CLASSES, **self._masking())]  # so that one is masked

    def _conv(self, conv: nn.Module, norm: nn.Module) -> list[nn.Module]:
        """Leave out biases before a normalisation, whose gradients would be rounding errors alone.

        AdamW would enlarge those, as would a normalisation with a small eps or a ReLU behind it.
        """
        return [conv, nn.Tanh()] if conv.bias is not None else [conv, norm, nn.Softplus()]

    # -- options -------------------------------------------------------------------------------

    def _flip(self, probability: float) -> bool:
        return self.chance.random() < probability

    def _groups(self, channels: int, out: int) -> int:
        return self.chance.choice([1, 2])

    def _layer(self, dense: type, masked: type, *args, **options) -> nn.Module:
        if self._flip(0.2):
            return dense(*args, **options)
        masking = self._masking()
        if "Transpose" in dense.__name__:
            masking["path"] = "auto"
        return masked(*args, **options, **masking)

    def _masking(self) -> dict:
        chance = self.chance
        if hasattr(self, "options") and self._flip(0.6):
            return dict(self.options)  # layers with the same options make larger groups
        return {
            "granularity": chance.choice(["row", "row", "row", "layer", "element"]),
            "reset_ratio": chance.choice([0.01, 0.01, 0.3, None]),
            "surrogate": chance.choice(SURROGATES),
            "structure_gradient": self._flip(0.7),
            "backend": chance.choice(["auto", "auto", "reference"]),
            "path": chance.choice(["auto", "auto", "sparse", "packed", "fused", "mixed"]),
        }

    def _freeze_some(self) -> None:
        for name, parameter in self.named_parameters():
            if "threshold" in name:
                nn.init.uniform_(parameter, 0, self.chance.choice([0.05, 0.15]))
            parameter.requires_grad_(not self._flip(0.07))
        self.layers[-1].weight.requires_grad_()


def _options(layer: nn.Module) -> dict:
    names = "granularity", "reset_ratio", "surrogate", "structure_gradient", "backend", "path"
    return {name: getattr(layer, name) for name in names}


def data_for(model: RandomNetwork, count: int = 6, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(count, size, *model.input_shape, dtype=torch.float64)
    return list(zip(inputs, torch.randint(0, CLASSES, (count, size)), strict=True))
