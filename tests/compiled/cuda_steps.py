"""Arguments for sgd_step, adamw_step and grad_norm, and the reference's results for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from cuda_cases import Library, Memory, gradient_along
from torch import Tensor

from dst_kernels import reference

ABSENT = torch.empty(0)

# Names of the ops' arguments, in their order.
ARGUMENTS = {
    "sgd": (
        "weights", "grads", "buffers", "thresholds", "threshold_grads", "threshold_buffers",
        "masked", "kept", "settings", "hypers", "rates", "alphas", "scales",
    ),
    "adamw": (
        "weights", "grads", "averages", "squares", "steps", "thresholds", "threshold_grads",
        "threshold_averages", "threshold_squares", "threshold_steps",
        "masked", "kept", "settings", "hypers", "rates", "alphas", "scales",
    ),
    "norm": (
        "weights", "grads", "thresholds", "threshold_grads", "settings", "hypers", "alphas",
        "scales", "norm",
    ),
}  # fmt: skip
OPS = {"sgd": "sgd_step", "adamw": "adamw_step", "norm": "grad_norm"}
REFERENCES = {
    "sgd": reference.step.sgd_step_,
    "adamw": reference.step.adamw_step_,
    "norm": reference.step.grad_norm_,
}

# lr, weight decay, maximize, has alpha, alpha; momentum, dampening, nesterov or beta1, beta2, eps.
HYPERS = {
    "sgd": (
        (0.1, 0.0, 0, 0, 0.0, 0.0, 0.0, 0),
        (0.05, 0.01, 1, 0, 0.0, 0.9, 0.0, 0),
        (0.1, 0.0, 0, 1, 0.01, 0.9, 0.1, 0),
        (0.02, 0.001, 0, 1, 0.1, 0.8, 0.0, 1),
    ),
    "adamw": (
        (1e-3, 0.0, 0, 0, 0.0, 0.9, 0.999, 1e-8),
        (0.01, 0.1, 1, 0, 0.0, 0.9, 0.95, 1e-6),
        (0.1, 0.0, 0, 1, 0.01, 0.0, 0.99, 1e-8),
        (0.02, 0.01, 0, 1, 0.1, 0.8, 0.9999, 1e-3),
    ),
}


@dataclass
class Segment:
    """One parameter, masked or not."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = torch.float32
    masked: bool = True
    masked_dtype: torch.dtype | None = torch.bfloat16
    threshold_grad: bool = False
    weight_hyper: int = 0
    threshold_hyper: int = 1
    surrogate: int = 0
    structure: int = 1
    collapsed: int = -1
    fresh: bool = False
    channels_last: bool = False


@dataclass
class Call:
    """The arguments of one op: lists of tensors, and what is none."""

    rule: str
    values: dict = field(default_factory=dict)

    def map(self, tensor, list_of=None) -> Call:
        """With every tensor but hypers replaced."""
        list_of = list_of or (lambda tensors: [tensor(t) for t in tensors])
        made = {}
        for name, value in self.values.items():
            if isinstance(value, Tensor):
                made[name] = value if name == "hypers" else tensor(value)
            else:
                made[name] = value if name == "settings" else list_of(value)
        return Call(self.rule, made)

    def clone(self) -> Call:
        return self.map(Tensor.clone)

    def double(self) -> Call:
        """In float64, where all given numbers are exact."""
        return self.map(lambda t: t.double() if t.dtype.is_floating_point else t.clone())

    def place(self, library: Library, shift: int = 0) -> tuple[Call, Memory]:
        memory = Memory(library, shift)
        return self.map(memory.place), memory

    def arguments(self, rule: str | None = None) -> list:
        return [self.values[name] for name in ARGUMENTS[rule or self.rule]]

    def norm(self) -> list:
        return self.arguments("norm")

    def __getitem__(self, name: str):
        return self.values[name]


def call_of(
    rule: str,
    segments: Sequence[Segment],
    *,
    hypers: Sequence[Sequence[float]] | None = None,
    rates: dict[int, float] | None = None,
    alphas: dict[int, float] | None = None,
    grad_scale: float | None = None,
    found_inf: float | None = None,
    clip: float | None = None,
) -> Call:
    """Random tensors for these segments; outputs are NaN and -7."""
    hypers = torch.tensor(hypers or HYPERS[rule], dtype=torch.float64)
    lists: dict[str, list[Tensor]] = {name: [] for name in ARGUMENTS[rule]}
    settings: list[int] = []
    for segment in segments:
        _append(lists, settings, segment, rule, hypers)
    values: dict = {name: tensors for name, tensors in lists.items() if tensors}
    values["settings"], values["hypers"] = settings, hypers
    values["kept"] = torch.full((len(segments),), -7)
    values["rates"] = _scalars(len(hypers), rates or {})
    values["alphas"] = _scalars(len(hypers), alphas or {})
    values["scales"] = [
        ABSENT if number is None else torch.tensor([number])
        for number in (grad_scale, found_inf, clip)
    ]
    values["norm"] = torch.full((1,), -7.0)
    return Call(rule, values)


def _scalars(count: int, given: dict[int, float]) -> list[Tensor]:
    return [torch.tensor(given[i]) if i in given else ABSENT for i in range(count)]


def _append(lists, settings, segment: Segment, rule: str, hypers: Tensor) -> None:
    weight = torch.randn(segment.shape).to(segment.dtype)
    if segment.channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    threshold = torch.empty(segment.shape[0]).uniform_(-0.1, 1.3) if segment.masked else ABSENT
    lists["weights"].append(weight)
    grad_dtype = segment.grad_dtype
    lists["grads"].append(ABSENT if grad_dtype is None else gradient_along(weight, grad_dtype))
    lists["thresholds"].append(threshold)
    with_grad = segment.masked and segment.threshold_grad
    lists["threshold_grads"].append(torch.randn_like(threshold) if with_grad else ABSENT)
    masked = segment.masked and segment.masked_dtype is not None
    lists["masked"].append(
        torch.full_like(weight, float("nan"), dtype=segment.masked_dtype) if masked else ABSENT
    )
    for prefix, parameter, row in (
        ("", weight, segment.weight_hyper),
        ("threshold_", threshold, segment.threshold_hyper),
    ):
        if rule == "sgd":
            wanted = row >= 0 and hypers[row, 5] != 0 and parameter.numel()
            lists[f"{prefix}buffers"].append(_state(parameter, segment) if wanted else ABSENT)
        else:
            # Not near 0, where small errors of the square become large ones of the step.
            average, square = _state(parameter), torch.empty_like(parameter).uniform_(0.1, 2)
            steps = torch.randint(0, 50, (1,)).float()
            lists[f"{prefix}averages"].append(average)
            lists[f"{prefix}squares"].append(square)
            lists[f"{prefix}steps"].append(steps if parameter.numel() else ABSENT)
    settings += [
        segment.weight_hyper, segment.threshold_hyper if segment.masked else -1,
        segment.surrogate, segment.structure, segment.collapsed, segment.fresh, segment.fresh,
    ]  # fmt: skip
    settings[-7:] = map(int, settings[-7:])


def _state(parameter: Tensor, segment: Segment | None = None) -> Tensor:
    """Buffers that are not initialised are full of NaN."""
    if segment is not None and segment.fresh:
        return torch.full_like(parameter, float("nan"))
    return torch.randn_like(parameter)


STATES = {
    "sgd": ("weights", "thresholds", "buffers", "threshold_buffers"),
    "adamw": (
        "weights", "thresholds", "averages", "squares", "threshold_averages", "threshold_squares",
    ),
}  # fmt: skip
