"""Which cases are measured together: a new shape, network or list of weights is added here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .cases import Case, ConvCase, LinearCase, ModelCase, TrainingCase, WeightsCase


@dataclass(frozen=True)
class Suite:
    """Cases for a GPU that are measured together, the most valuable first.

    On a CPU the same code runs on the `small` ones, if there are some.
    """

    name: str
    cases: tuple[Case, ...]
    small: tuple[Case, ...] = ()

    def cases_on(self, device_type: str) -> tuple[Case, ...]:
        """Return the cases for "cuda" or "cpu"."""
        return self.small if device_type == "cpu" and self.small else self.cases


def _linear() -> Iterator[Case]:
    """Yield linear layers: the goals' shape first, what takes longest and least last."""
    shapes = ((4096, 4096), (1024, 1024), (4096, 14336), (14336, 4096), (8192, 8192))
    for N, K in shapes:
        for M in (16, 128, 1024, 8192):
            yield LinearCase(M, N, K)
        if N == K == 4096:
            yield LinearCase(4096, N, K, dtype="tf32")
            yield LinearCase(4096, N, K, dtype="bf16")
    for N, K in shapes:
        yield LinearCase(65536, N, K)


def _conv() -> Iterator[Case]:
    """Yield convolutions of known networks, by side, C, N, kernel, and stride where it is not 1."""
    resnet_50 = [(56, 64, 64, 3), (56, 256, 64, 1), (28, 128, 128, 3), (14, 256, 256, 3)]
    resnet_50 += [(14, 1024, 256, 1), (7, 512, 512, 3), (7, 2048, 512, 1)]
    resnet_50 += [(56, 256, 512, 1, 2), (56, 128, 128, 3, 2), (224, 3, 64, 7, 2)]
    vgg_16 = [(32, 64, 64, 3), (8, 256, 256, 3), (4, 512, 512, 3), (2, 512, 512, 3)]
    wrn_28_8 = [(32, 128, 128, 3), (16, 256, 256, 3), (8, 512, 512, 3)]
    for batch, network in ((256, resnet_50), (128, vgg_16), (128, wrn_28_8)):
        for sizes in network:
            yield ConvCase(batch, *sizes)
    yield ConvCase(128, 56, 96, 96, 7, groups=96)  # depthwise, of ConvNeXt-T


def _models(batches: dict[str, int], **options: str) -> tuple[Case, ...]:
    return tuple(ModelCase(model, batch, **options) for model, batch in batches.items())


_MODELS = {"vgg-16": 128, "wrn-28-8": 128, "resnet-50": 256, "gpt": 8, "convnext-t": 128}
_MODELS |= {"vit-b-16": 128, "lenet-5": 128, "lenet-300-100": 128, "lstm-a": 100}
_SMALL_MODELS = {"lenet-300-100": 64, "lenet-5": 64, "vgg-small": 8, "wrn-small": 8}
_SMALL_MODELS |= {"resnet-small": 8, "convnext-small": 8, "vit-small": 8, "gpt-small": 4}
_SMALL_MODELS |= {"lstm-small": 8}
_STEPS = tuple(ModelCase("linear-4096", tokens) for tokens in (1024, 8192, 128))

_MATRICES = tuple(WeightsCase(f"{side}x{side}") for side in (4096, 8192, 16384, 2048, 1024))
_WEIGHTS = (WeightsCase("4x4096x4096"), WeightsCase("resnet-50"), *_MATRICES)
_WEIGHTS += (WeightsCase("4096x4096", dtype="bf16"),)


def _trainings(threads: tuple[int, ...], **percents: tuple[int, ...]) -> tuple[Case, ...]:
    """Return steps of models, with the percents of weights that remain."""
    every = [
        (model.replace("_", "-"), percent) for model in percents for percent in percents[model]
    ]
    ways = itertools.product(threads, every)
    return tuple(
        TrainingCase(m, 64, n, dtype="fp32", remaining_ratio=p / 100) for n, (m, p) in ways
    )


_LINEAR, _ODD = LinearCase(32, 96, 64), LinearCase(33, 70, 50, dtype="bf16")
_CONV, _LIST = ConvCase(4, 9, 8, 16, 3, 2), WeightsCase("small")
_SMALL_CONVS = (ConvCase(4, 8, 16, 24, 3), _CONV, ConvCase(4, 8, 24, 16, 1, dtype="fp32"))
_SMALL_CONVS += (ConvCase(2, 8, 16, 16, 7, groups=16, dtype="fp32"),)

# A small one of each kind; no tile divides the second.
_SMOKE = (LinearCase(128, 1024, 1024), LinearCase(100, 1000, 520))
_SMOKE += (LinearCase(1024, 1024, 1024, dtype="fp16-autocast"), _CONV)
_SMOKE += (ModelCase("lenet-300-100", 128), _LIST)
_SMALL_SMOKE = (_LINEAR, ModelCase("lenet-300-100", 16, dtype="fp32"), _LIST, _ODD, _CONV)

# Sizes that people train on a CPU.
_CPU = (LinearCase(64, 300, 784, dtype="fp32"), LinearCase(256, 1024, 1024, dtype="fp32"))
_CPU += (LinearCase(256, 1024, 1024), ConvCase(16, 32, 64, 64, 3, dtype="fp32"))
_CPU += (ConvCase(16, 16, 64, 128, 1, dtype="fp32"), WeightsCase("1024x1024", dtype="fp32"))
_CPU += (WeightsCase("resnet-50", dtype="fp32"),)

_PEERS = {"lenet_300_100": (10, 8, 5, 3, 2), "mlp_4096": (10, 5, 2), "resnet_18": (5,)}
_SWEEP = dict.fromkeys(("lenet_300_100", "mlp_4096"), (100, 50, 30, 20, 10, 5, 2, 1))

_SUITES = (
    Suite("linear", tuple(_linear()), (_LINEAR, LinearCase(32, 96, 64, dtype="fp32"), _ODD)),
    Suite("model", _models(_MODELS), _models(_SMALL_MODELS, dtype="fp32")),
    Suite("conv", tuple(_conv()), _SMALL_CONVS),
    Suite("steps", _STEPS, (ModelCase("linear-64", 32, dtype="fp32"),)),
    Suite("streaming", _WEIGHTS, (_LIST, WeightsCase("128x96"))),
    Suite("smoke", _SMOKE, _SMALL_SMOKE),
    Suite("cpu", _CPU),
    Suite("sparse-training", _trainings((1, 2), **_PEERS)),
    Suite("sparse-sweep", _trainings((1,), **_SWEEP)),
)
SUITES = {suite.name: suite for suite in _SUITES}
