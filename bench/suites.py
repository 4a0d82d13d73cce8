"""Which cases are measured together, in order of priority."""

from __future__ import annotations

from dataclasses import dataclass

from .cases import LINEAR, MASKED_WEIGHT, AnyCase, Case, ConvCase, ListCase, ModelCase
from .errors import require_one_of

__all__ = ["SUITES", "Suite", "suite_named"]


@dataclass(frozen=True)
class Suite:
    """Cases, the most valuable first, so that a run with a time limit gets those.

    Args:
        name: on the command line and in results.
        cases: for a GPU.
        small: for a CPU, so that the same code runs there; None: `cases`.
        compiled: how many of them, from the first, are for providers that go through
            torch.compile, too (None: all). A compilation with autotuning takes as long as
            everything else of many cases.
        compiled_small: the same of `small`.
    """

    name: str
    cases: tuple[AnyCase, ...]
    small: tuple[AnyCase, ...] | None = None
    compiled: int | None = None
    compiled_small: int | None = None

    def cases_on(self, device_type: str) -> tuple[AnyCase, ...]:
        return self.small if self._is_small_on(device_type) else self.cases

    def compiled_cases_on(self, device_type: str) -> tuple[AnyCase, ...]:
        count = self.compiled_small if self._is_small_on(device_type) else self.compiled
        return self.cases_on(device_type)[:count]

    def _is_small_on(self, device_type: str) -> bool:
        return device_type == "cpu" and self.small is not None


_TOKENS = (16, 128, 1024, 8192, 65536)
# The shape that most goals speak of first, then from small to large.
_SHAPES = ((4096, 4096), (1024, 1024), (4096, 14336), (14336, 4096), (8192, 8192))
_SIDES = (4096, 8192, 16384, 2048, 1024)  # of square weights: 1 M to 256 M, those of goals first
_AMP = "bf16-autocast"

# (side, C, N, kernel, stride): of ResNet-50, of VGG-16 and WRN-28-8 for CIFAR.
_RESNET = (
    (56, 64, 64, 3, 1),
    (56, 256, 64, 1, 1),
    (28, 128, 128, 3, 1),
    (14, 256, 256, 3, 1),
    (14, 1024, 256, 1, 1),
    (7, 512, 512, 3, 1),
    (7, 2048, 512, 1, 1),
    (56, 256, 512, 1, 2),
    (56, 128, 128, 3, 2),
    (224, 3, 64, 7, 2),
)
_CIFAR = (
    (32, 64, 64, 3, 1),
    (8, 256, 256, 3, 1),
    (4, 512, 512, 3, 1),
    (2, 512, 512, 3, 1),
    (32, 128, 128, 3, 1),
    (16, 256, 256, 3, 1),
    (8, 512, 512, 3, 1),
)


def _linear(M: int, N: int, K: int, dtype: str) -> Case:
    return Case(LINEAR, M, N, K, dtype)


def _weights(N: int, K: int, dtype: str) -> Case:
    return Case(MASKED_WEIGHT, 0, N, K, dtype)


def _conv(batch: int, side: int, C: int, N: int, kernel: int, stride: int) -> ConvCase:
    return ConvCase(batch, side, C, N, kernel, _AMP, stride)


_SMALL_CONV = ConvCase(4, 9, 8, 16, 3, _AMP, stride=2)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "smoke",
            (
                _linear(128, 1024, 1024, _AMP),
                _weights(1024, 1024, _AMP),
                _linear(100, 1000, 520, _AMP),  # no tile divides these
                _linear(1024, 1024, 1024, "fp16-autocast"),
                _SMALL_CONV,
                ModelCase("lenet-300-100", 128, _AMP),
                ListCase("small", _AMP),
            ),
            compiled=0,
        ),
        Suite(
            "streaming",
            (
                ListCase("4x4096x4096", _AMP),
                ListCase("resnet-50", _AMP),
                *(_weights(side, side, _AMP) for side in _SIDES),
                _weights(4096, 4096, "bf16"),
            ),
            small=(ListCase("small", _AMP), _weights(128, 96, _AMP)),
            compiled=3,  # the first single weight; nothing compiles lists
        ),
        Suite(
            "steps",
            tuple(ModelCase("linear-4096", tokens, _AMP) for tokens in (1024, 8192, 128)),
            small=(ModelCase("linear-64", 32, "fp32"),),
            compiled=1,
        ),
        Suite(
            "model",
            (
                ModelCase("vgg-16", 128, _AMP),
                ModelCase("wrn-28-8", 128, _AMP),
                ModelCase("resnet-50", 256, _AMP),
                ModelCase("gpt", 8, _AMP),
                ModelCase("convnext-t", 128, _AMP),
                ModelCase("vit-b-16", 128, _AMP),
                ModelCase("lenet-5", 128, _AMP),
                ModelCase("lenet-300-100", 128, _AMP),
                ModelCase("lstm-a", 100, _AMP),
            ),
            small=(
                ModelCase("lenet-300-100", 64, "fp32"),
                ModelCase("lenet-5", 64, "fp32"),
                ModelCase("vgg-small", 8, "fp32"),
                ModelCase("wrn-small", 8, "fp32"),
                ModelCase("resnet-small", 8, "fp32"),
                ModelCase("convnext-small", 8, "fp32"),
                ModelCase("vit-small", 8, "fp32"),
                ModelCase("gpt-small", 4, "fp32"),
                ModelCase("lstm-small", 8, "fp32"),
            ),
            compiled_small=1,
        ),
        Suite(
            "linear",
            (
                *(_linear(M, *_SHAPES[0], _AMP) for M in _TOKENS),
                _linear(4096, 4096, 4096, "tf32"),
                _linear(4096, 4096, 4096, "bf16"),
                *(_linear(M, *shape, _AMP) for shape in _SHAPES[1:] for M in _TOKENS),
            ),
        ),
        Suite(
            "conv",
            (
                *(_conv(256, *shape) for shape in _RESNET),
                *(_conv(128, *shape) for shape in _CIFAR),
                ConvCase(128, 56, 96, 96, 7, _AMP, groups=96),  # of ConvNeXt-T
            ),
            small=(
                ConvCase(4, 8, 16, 24, 3, _AMP),
                _SMALL_CONV,
                ConvCase(4, 8, 24, 16, 1, "fp32"),
                ConvCase(2, 8, 16, 16, 7, "fp32", groups=16),
            ),
            compiled=4,
            compiled_small=1,
        ),
        Suite(
            "cpu",
            (
                _linear(32, 96, 64, _AMP),
                _weights(128, 96, _AMP),
                ModelCase("lenet-300-100", 64, "fp32"),
                ListCase("small", _AMP),
                _linear(32, 96, 64, "fp32"),
                _linear(33, 70, 50, "bf16"),
                _SMALL_CONV,
            ),
            compiled=2,
        ),
    )
}


def suite_named(name: str) -> Suite:
    """Raises UsageError for an unknown name."""
    require_one_of("--suite", name, list(SUITES))
    return SUITES[name]
