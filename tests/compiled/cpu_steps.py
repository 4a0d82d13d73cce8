"""Arguments for the CPU library's optimizer steps, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from cpu_cases import Memory, ops, real, same, weights_of
from torch import Tensor

from dst_kernels import reference

ABSENT = torch.empty(0)
STATE = {"sgd": ("buffers",), "adamw": ("averages", "squares", "steps")}

# lr, weight decay, maximize, has alpha, alpha; momentum, dampening, nesterov or beta1, beta2, eps
HYPERS = {
    "sgd": [
        (0.1, 0.0, 0, 0, 0.0, 0.0, 0.0, 0),
        (0.05, 0.01, 1, 0, 0.0, 0.9, 0.0, 0),
        (0.1, 0.0, 0, 1, 0.01, 0.9, 0.1, 0),
        (0.02, 0.001, 0, 1, 0.1, 0.8, 0.0, 1),
    ],
    "adamw": [
        (1e-3, 0.0, 0, 0, 0.0, 0.9, 0.999, 1e-8),
        (0.01, 0.1, 1, 0, 0.0, 0.9, 0.95, 1e-6),
        (0.1, 0.0, 0, 1, 0.01, 0.0, 0.99, 1e-8),
        (0.02, 0.01, 0, 1, 0.1, 0.8, 0.9999, 1e-3),
    ],
}


@dataclass(frozen=True)
class Segment:
    """A masked weight, or with `plain` any other parameter."""

    shape: Sequence[int] = (5, 7)
    dtype: torch.dtype = torch.float32
    grad: torch.dtype | None = torch.float32
    masked: torch.dtype | None = torch.float32
    threshold_grad: torch.dtype | None = None
    plain: bool = False
    hypers: tuple[int, int] = (1, 2)
    surrogate: int = 0
    structure: int = 1
    collapsed: int = -1
    first: bool = False


class Call:
    """The arguments of one step, by name; every list has an entry for each segment."""

    def __init__(self, rule: str, values: dict[str, list | Tensor]):
        self.rule = rule
        self.values = values

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        values = {}
        for name, value in self.values.items():
            if name == "settings":
                values[name] = value
            elif isinstance(value, list):
                values[name] = [change(tensor) for tensor in value]
            else:
                values[name] = change(value)
        return Call(self.rule, values)

    def clone(self) -> Call:
        return self.map(Tensor.clone)

    def double(self) -> Call:
        """In float64, but for what has its dtype by contract."""
        return self.map(lambda t: t.double() if t.is_floating_point() and t.dim() else t.clone())

    def __getitem__(self, name: str):
        return self.values[name]

    def run(self) -> Call:
        """The library's step on a copy, which is returned."""
        memory = Memory()
        copy = self.map(memory.copy)
        getattr(ops(), f"{self.rule}_step")(*copy.values.values())
        memory.check()
        return copy

    def refer(self) -> Call:
        """The reference's step on a copy, which is returned."""
        copy = self.clone()
        getattr(reference.step, f"{self.rule}_step_")(*copy.values.values())
        return copy

    def norm(self, function: Callable) -> Tensor:
        result = torch.full((), float("nan"))
        names = "weights", "grads", "thresholds", "threshold_grads"
        arguments = [self[name] for name in (*names, "settings", "hypers", "alphas", "scales")]
        function(*arguments, result)
        return result


def call_of(
    rule: str,
    segments: Sequence[Segment],
    *,
    hypers: Sequence[Sequence[float]] | None = None,
    rates: Sequence[float | None] = (),
    alphas: Sequence[float | None] = (),
    grad_scale: float | None = None,
    found_inf: float | None = None,
    clip: float | None = None,
) -> Call:
    """Random tensors. What a first step must not read, and outputs, are NaN."""
    state = STATE[rule]
    lists = {
        name: []
        for name in (
            "weights", "grads", *state, "thresholds", "threshold_grads",
            *(f"threshold_{name}" for name in state), "masked",
        )
    }  # fmt: skip
    settings = []
    for segment in segments:
        for name, tensor in _tensors(rule, segment).items():
            lists[name].append(tensor)
        settings += [*segment.hypers, segment.surrogate, segment.structure, segment.collapsed]
        settings += [segment.first, segment.first]
    table = torch.tensor(hypers or HYPERS[rule], dtype=torch.float64)
    return Call(
        rule,
        {
            **lists,
            "kept": torch.full([len(segments)], -7),
            "settings": [int(number) for number in settings],
            "hypers": table,
            "rates": _scalars(rates, len(table)),
            "alphas": _scalars(alphas, len(table)),
            "scales": _scalars([grad_scale, found_inf, clip], 3),
        },
    )


def _scalars(numbers: Sequence[float | None], count: int) -> list[Tensor]:
    numbers = [*numbers, *[None] * (count - len(numbers))]
    return [ABSENT if number is None else torch.tensor(number) for number in numbers]


def _tensors(rule: str, segment: Segment) -> dict[str, Tensor]:
    (weight,) = weights_of(segment.dtype, [segment.shape])
    made = {"weights": weight, "grads": _normal(weight, segment.grad), "masked": ABSENT}
    made |= _state(rule, weight, "", segment.first)
    if segment.plain:
        made |= dict.fromkeys(
            ["thresholds", "threshold_grads", *(f"threshold_{name}" for name in STATE[rule])],
            ABSENT,
        )
        return made
    threshold = torch.empty(weight.shape[0], dtype=real(segment.dtype)).uniform_(-0.1, 1.3)
    made["thresholds"] = threshold
    made["threshold_grads"] = _normal(threshold, segment.threshold_grad)
    if segment.masked is not None:
        made["masked"] = torch.full_like(weight, float("nan"), dtype=segment.masked)
    return made | _state(rule, threshold, "threshold_", segment.first)


def _normal(like: Tensor, dtype: torch.dtype | None) -> Tensor:
    return ABSENT if dtype is None else torch.empty_like(like, dtype=dtype).normal_()


def _state(rule: str, parameter: Tensor, prefix: str, first: bool) -> dict[str, Tensor]:
    if rule == "sgd":
        state = [parameter.clone().fill_(float("nan")) if first else parameter.clone().normal_()]
    else:
        average, square = parameter.clone().normal_(), parameter.clone().uniform_()
        state = [average, square, torch.tensor(7.0)]
        if first:
            state = [tensor.zero_() for tensor in state]
    return {prefix + name: tensor for name, tensor in zip(STATE[rule], state, strict=True)}


def written(rule: str) -> list[str]:
    """What a step changes, but for masked weights and their counts."""
    return [
        "weights", "thresholds", *STATE[rule], *(f"threshold_{name}" for name in STATE[rule]),
    ]  # fmt: skip


def _assert_as_accurate(
    ours: Tensor, plain: Tensor, exact: Tensor, before: Tensor, summands: int
) -> None:
    """Twice the error of plain PyTorch, half a unit in the last place of what is stored, and a few
    roundings of the arithmetic: relative to the largest number before or after the step, or, where
    normal numbers are summed up on the way, to the root of how many."""
    assert (ours.dtype, ours.stride()) == (plain.dtype, plain.stride())
    largest = max(exact.abs().max(), before.double().nan_to_num(0).abs().max(), summands**0.5)
    allowed = (
        2 * (plain.double() - exact).abs().max()
        + torch.finfo(ours.dtype).eps / 2 * exact.abs()
        + 8 * torch.finfo(real(ours.dtype)).eps * largest
        + torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
    )
    error = (ours.double() - exact).abs()
    assert bool((error <= allowed).all()), f"error {error.max():.3e}, allowed {allowed.max():.3e}"


def check(call: Call) -> Call:
    """The library's step against the reference's; returns what it left.

    Masked weights and counts must follow exactly from the new weights and thresholds: where those
    differ by a rounding, so may the mask.
    """
    ours, plain, exact = call.run(), call.refer(), call.double().refer()
    for name in written(call.rule):
        results = zip(ours[name], plain[name], exact[name], call[name], strict=True)
        for i, (mine, theirs, truth, before) in enumerate(results):
            weight = call["weights"][i]
            summands = weight.numel() // len(weight) if "threshold" in name and len(weight) else 0
            if truth.numel() == 0 or truth.isnan().any():  # left as it was
                same(mine, theirs)
            else:
                _assert_as_accurate(mine, theirs, truth.double(), before, summands)
    check_masks(call, ours)
    for name in ("grads", "threshold_grads", "hypers", "rates", "alphas", "scales"):
        for mine, before in zip(ours[name], call[name], strict=True):
            same(mine, before)
    return ours


def check_masks(call: Call, ours: Call) -> None:
    skipped = call["scales"][1].numel() and bool(call["scales"][1] == 1)
    for i, masked in enumerate(ours["masked"]):
        if masked.numel() == 0 or skipped:
            same(masked, call["masked"][i])
            assert ours["kept"][i] == call["kept"][i]
            continue
        weight, threshold = ours["weights"][i], ours["thresholds"][i]
        same(masked, reference.masked_weight(weight, threshold, None, masked.dtype)[0])
        assert ours["kept"][i] == reference.threshold_mask(weight, threshold).sum()
        collapsed = call["settings"][7 * i + 4]
        assert ours["kept"][i] > collapsed or not threshold.any()
