"""Every op of the CUDA library with arguments to run it on, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from cuda_cases import Library, Memory, gradient_along, settings_of, threshold_like
from cuda_steps import OPS, Segment, call_of
from torch import Tensor

NAMES = ("pack", "post", "regularization", "sgd_step", "adamw_step", "grad_norm")


@dataclass
class Prepared:
    """One op and its arguments, which it changes at each run."""

    op: Callable
    arguments: list

    def run(self) -> None:
        self.op(*self.arguments)

    def tensors(self) -> Iterator[Tensor]:
        for argument in self.arguments:
            for item in argument if isinstance(argument, list) else [argument]:
                if isinstance(item, Tensor):
                    yield item

    def snapshot(self) -> list[Tensor]:
        return [tensor.clone() for tensor in self.tensors()]

    def restore(self, snapshot: list[Tensor]) -> None:
        for tensor, copy in zip(self.tensors(), snapshot, strict=True):
            tensor.copy_(copy)


def masked_segments(shapes: list[tuple[int, ...]]) -> list[Segment]:
    """As a model under AMP has them."""
    return [
        Segment(shape, grad_dtype=torch.bfloat16, weight_hyper=2, threshold_hyper=2)
        for shape in shapes
    ]


def plain_segments(shapes: list[tuple[int, ...]]) -> list[Segment]:
    return [Segment(shape, masked=False, weight_hyper=1) for shape in shapes]


def prepare(
    library: Library,
    name: str,
    segments: list[Segment],
    granularities: tuple[str, ...] = ("row", "layer", "element"),
) -> Prepared:
    """Ops on weights alone take the masked segments, with these granularities in turn."""
    op = getattr(library.ops, name)
    place = Memory(library).place
    if name in OPS.values():
        rule = "sgd" if name == "sgd_step" else "adamw"
        call = call_of(rule, segments, grad_scale=64.0, found_inf=0.0, clip=0.5).map(place)
        return Prepared(op, call.norm() if name == "grad_norm" else call.arguments())
    masked = [segment for segment in segments if segment.masked]
    weights = [torch.randn(segment.shape).to(segment.dtype) for segment in masked]
    thresholds = [
        threshold_like(weight, granularities[i % len(granularities)])
        for i, weight in enumerate(weights)
    ]
    placed = [place(weight) for weight in weights], [place(t) for t in thresholds]
    if name == "regularization":
        value = place(torch.zeros(()))
        return Prepared(op, [placed[1], value, [place(t) for t in thresholds]])
    if name == "pack":
        guards = [(segment.collapsed, 1) for segment in masked]
        return Prepared(op, [
            *placed, settings_of(guards),
            [place(w.to(s.masked_dtype)) for w, s in zip(weights, masked, strict=True)],
            [place(t) for t in thresholds], place(torch.zeros(len(masked), dtype=torch.int64)),
        ])  # fmt: skip
    grads = [place(gradient_along(w, s.grad_dtype)) for w, s in zip(weights, masked, strict=True)]
    rules = [(segment.surrogate, segment.structure) for segment in masked]
    return Prepared(op, [
        grads, *placed, settings_of(rules),
        [place(weight) for weight in weights], [place(t) for t in thresholds],
    ])  # fmt: skip


def small_segments() -> list[Segment]:
    """Of all dtypes, short and long rows; one layer collapses."""
    segments = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for i, shape in enumerate([(5, 7), (9, 300), (40, 1024), (3, 2052), (2, 9000)]):
            segments.append(
                Segment(
                    shape, dtype, dtype, collapsed=10**9 if i == 1 else 2, threshold_hyper=i % 4
                )
            )
        segments += [Segment((333,), dtype, dtype, masked=False, weight_hyper=3)]
    return segments
