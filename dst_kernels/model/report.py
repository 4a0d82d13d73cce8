"""Measure how sparse a model is, layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.find import named_masked_weights
from ..nn.weight import MaskedWeight
from ..ops.dtensor import is_dtensor, rows_are_whole, sum_over_shards
from ..reference import threshold_mask
from ..reference.weight import largest_collapsed_count
from ..reference.wide import wide_dtype


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """Describe one masked weight: a layer's, or one of a recurrent module with all its gates.

    Thresholds are the effective ones, after the collapse guard; NaN where the mask is fixed.

    dead_rows: output neurons or filters with no weight left; dead_columns: input features or
    channels that no remaining weight reads.
    """

    name: str
    shape: tuple[int, ...]
    remaining_ratio: float
    kept: int
    total: int
    dead_rows: int
    dead_columns: int
    threshold_min: float
    threshold_mean: float
    threshold_max: float


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """Hold all masked layers and their totals; `print` shows a table.

    `kept` and `total` count masked weights only; `all_weights` counts every parameter of two
    dimensions or more (no thresholds), so that a ratio of a small part is seen as such. Shared
    weights count once.
    """

    layers: list[LayerSparsity]
    remaining_ratio: float
    kept: int
    total: int
    all_weights: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = (
            *("layer", "shape", "remaining", "kept", "total", "dead rows", "dead cols"),
            *("t min", "t mean", "t max"),
        )
        rows: list[tuple[str, ...]] = [
            (
                layer.name or "(root)",
                "x".join(map(str, layer.shape)),
                f"{layer.remaining_ratio:.2%}",
                f"{layer.kept:,}",
                f"{layer.total:,}",
                str(layer.dead_rows),
                str(layer.dead_columns),
                f"{layer.threshold_min:.4f}",
                f"{layer.threshold_mean:.4f}",
                f"{layer.threshold_max:.4f}",
            )
            for layer in self.layers
        ]
        model = ("model", "", f"{self.remaining_ratio:.2%}", f"{self.kept:,}", f"{self.total:,}")
        rows.append(model + ("",) * (len(header) - len(model)))
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        rule = tuple("-" * width for width in widths)
        lines = []
        for row in (header, rule, *rows[:-1], rule, rows[-1]):
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right).rstrip())
        share = self.total / self.all_weights if self.all_weights else float("nan")
        return "\n".join([*lines, f"{share:.1%} of all {self.all_weights:,} weights are masked"])


@torch.no_grad()
def sparsity_report(model: nn.Module) -> SparsityReport:
    """Measure every masked layer, with one device synchronisation for the whole model.

    With FSDP2 this is a collective call. Raises TypeError if `model` is no module, ValueError if it
    has no masked layers.
    """
    named = named_masked_weights(model)
    device = named[0][1].weight.device
    measured = [_measure(part).to(device, non_blocking=True) for _, part in named]
    values = torch.stack(measured).tolist()
    layers = []
    for (name, part), (kept, dead_rows, dead_columns, low, mean, high) in zip(
        named, values, strict=True
    ):
        total = part.weight.numel()
        layers.append(
            LayerSparsity(
                name=name,
                shape=tuple(part.weight.shape),
                remaining_ratio=kept / total if total else float("nan"),
                kept=int(kept),
                total=total,
                dead_rows=int(dead_rows),
                dead_columns=int(dead_columns),
                threshold_min=low,
                threshold_mean=mean,
                threshold_max=high,
            )
        )
    unique = {id(part.stored): entry for (_, part), entry in zip(named, layers, strict=True)}
    kept = sum(entry.kept for entry in unique.values())
    total = sum(entry.total for entry in unique.values())
    ratio = kept / total if total else float("nan")
    numbers = {id(part.stored): part.weight.numel() for _, part in named}
    thresholds = {id(part.threshold) for _, part in named}
    for parameter in model.parameters():
        if parameter.dim() >= 2 and id(parameter) not in thresholds:
            numbers[id(parameter)] = parameter.numel()
    return SparsityReport(layers, ratio, kept, total, sum(numbers.values()))


def _measure(part: MaskedWeight) -> Tensor:
    """Return [kept, dead rows, dead columns, threshold min, mean, max] in the widest dtype."""
    if part.fixed_mask is None:
        weight, effective = part.effective()
        rows = threshold_mask(weight, part.each_row(effective))
    else:
        rows, effective = part.rows(part.fixed_mask), torch.empty(0)
    groups = getattr(part.module, "groups", 1)
    columns = rows.reshape(groups, rows.shape[0] // groups, *rows.shape[1:])
    dead_rows = rows.shape[0] - rows.flatten(1).any(1).sum()
    alive_columns = columns.transpose(1, 2).flatten(2).any(2)
    dead_columns = alive_columns.numel() - alive_columns.sum()
    wide = wide_dtype(rows.device)
    counts = torch.stack([rows.sum(), dead_rows, dead_columns]).to(wide)
    if effective.numel() == 0:
        return torch.cat([counts, counts.new_full((3,), float("nan"))])
    spread = torch.stack([effective.amin(), effective.mean(), effective.amax()]).to(wide)
    return torch.cat([counts, spread])


@torch.no_grad()
def remaining_ratio(model: nn.Module) -> Tensor:
    """Return kept / all masked weights of the model, a 0-dim float32 tensor; no synchronisation.

    Weights that layers share count once. With FSDP2 this is a collective call: shards of whole rows
    are counted where they are and added up, all layers in one sum; other weights are gathered.
    Raises what `sparsity_report` does.
    """
    return ratio_of(kept_counts(model))


def ratio_of(counts: list[tuple[MaskedWeight, Tensor]]) -> Tensor:
    """Return the remaining ratio, 0-dim float32, from what `kept_counts` returned."""
    device = counts[0][0].weight.device
    kept = torch.cat([count.to(device, non_blocking=True) for _, count in counts]).sum()
    return kept.to(torch.float32) / sum(part.weight.numel() for part, _ in counts)


def kept_counts(model: nn.Module) -> list[tuple[MaskedWeight, Tensor]]:
    """Return each weight once, with how many of each of its matrices are kept: int64 [matrices].

    Collective with FSDP2, as `remaining_ratio` says.
    """
    parts = {id(part.stored): part for _, part in named_masked_weights(model)}.values()
    sharded: dict[object, list[MaskedWeight]] = {}
    found = []
    for part in parts:
        weight = part.weight
        if is_dtensor(weight) and rows_are_whole(weight) and _has_own_rows(part):
            sharded.setdefault((weight.device_mesh, weight.placements), []).append(part)
        else:
            mask = part.mask()
            rows = mask if part.matrices == 1 else part.rows(mask)
            found.append((part, rows.reshape(part.matrices, -1).sum(1)))
    for group in sharded.values():
        found += zip(group, _kept_of_shards(group).unbind(), strict=True)
    return found


def _has_own_rows(part: MaskedWeight) -> bool:
    """Return whether a sharded weight is one matrix, with thresholds cut at the same rows."""
    one = part.matrices == 1 and not part.experts and part.module.rows_first
    weight, threshold = part.weight, part.threshold
    alike = getattr(threshold, "placements", None) == getattr(weight, "placements", None)
    return one and alike and threshold.shape[0] == weight.shape[0] and part.fixed_mask is None


def _kept_of_shards(parts: list[MaskedWeight]) -> Tensor:
    """Return how many weights of each of `parts` are kept, [parts, 1], from one all-reduce."""

    def counts(local: list[Tensor]) -> Tensor:
        """Return [parts, 2]: what a shard keeps, and what it would if the guard reset the layer."""
        pairs = zip(local[: len(parts)], local[len(parts) :], strict=True)
        kept = [
            threshold_mask(weight, limit).sum()
            for weight, threshold in pairs
            for limit in (threshold, torch.zeros_like(threshold))
        ]
        return torch.stack(kept).view(-1, 2)

    shards: list[Any] = [*(part.weight for part in parts), *(part.threshold for part in parts)]
    found = []
    for part, (kept, reset) in zip(parts, sum_over_shards(shards, counts), strict=True):
        ratio = part.module.masking.reset_ratio
        if ratio is not None:
            collapsed = kept <= largest_collapsed_count(part.weight.numel(), ratio)
            kept = torch.where(collapsed, reset, kept)
        found.append(kept)
    return torch.stack(found)[:, None]
