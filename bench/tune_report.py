"""tiles.md: how far the chosen tiles are from the fastest, and how simple rules would do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .errors import UsageError
from .files import write_text
from .measurements import geometric_mean
from .tables import duration, markdown_table, ratio_text
from .tile_rows import TileRow, read_tiles

__all__ = ["tiles_markdown", "write_tiles"]

_NOTE = (
    "Times with cold L2, over that of the fastest tile measured; 1 is best. A rule is of use where "
    "its mean is below that of the chosen tiles over the same cases."
)

Rule = Callable[["_Tuned"], "TileRow | None"]
"""The row that a rule would take, None where it was not measured."""


class _Tuned:
    """The rows with a time of one product of one case.

    Attributes:
        rows, fastest; chosen: what the library takes, None where it has no time.
    """

    def __init__(self, rows: Sequence[TileRow]) -> None:
        self.rows = rows
        self.fastest = min(rows, key=lambda row: row.figure)
        self.chosen = next((row for row in rows if row.is_chosen), None)

    def loss(self, row: TileRow | None) -> float | None:
        """Its time over that of the fastest."""
        return None if row is None else row.figure / self.fastest.figure

    def find(self, tile: str, split: int) -> TileRow | None:
        return next((row for row in self.rows if (row.tile, int(row.split)) == (tile, split)), None)


def write_tiles(paths: Sequence[Path], out: Path) -> None:
    """Write the summary of several tiles.csv. Raises UsageError where they have no rows."""
    rows = [row for path in paths for row in read_tiles(path)]
    if not rows:
        raise UsageError(
            f"no tiles in {', '.join(map(str, paths))}. Accepted: what python -m bench tune wrote."
        )
    write_text(out, tiles_markdown(rows))


def tiles_markdown(rows: Iterable[TileRow]) -> str:
    """The whole summary: a section for each device, in it one for each product and dtype."""
    parts = ["# Tiles", _NOTE]
    for gpu, of_gpu in _grouped(rows, lambda row: row.gpu).items():
        newest = _newest(of_gpu)
        timed = [row for row in newest if row.figure is not None]
        products = {
            title: [_Tuned(of_case) for of_case in _grouped(group, lambda row: row.case).values()]
            for title, group in _grouped(timed, lambda row: (row.product, row.dtype)).items()
        }
        parts += [f"## {gpu}", f"{_versions(newest)}.", _overview(products)]
        for (product, dtype), tuned in products.items():
            parts += [f"### {product}, {dtype}", _by_case(tuned), _rules(tuned)]
        parts += _without_times(newest)
    return "\n\n".join(part for part in parts if part) + "\n"


def _grouped(rows: Iterable[TileRow], key: Callable) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _newest(rows: Iterable[TileRow]) -> list[TileRow]:
    """Of a product of a case only the last run at one commit: times of two are not compared."""
    kept: list[TileRow] = []
    for group in _grouped(rows, lambda row: row.key[:2]).values():
        last = max(group, key=lambda row: row.date)
        same = [row for row in group if (row.commit, row.triton) == (last.commit, last.triton)]
        by_tile = {row.key: row for row in sorted(same, key=lambda row: row.date)}
        kept += by_tile.values()
    return kept


def _versions(rows: Iterable[TileRow]) -> str:
    rows = list(rows)

    def all_of(column: str) -> str:
        return ", ".join(sorted({getattr(row, column) for row in rows}))

    return f"torch {all_of('torch')}, triton {all_of('triton')}, commit {all_of('commit')}"


def _overview(products: dict[tuple[str, str], list[_Tuned]]) -> str:
    lines = []
    for (product, dtype), tuned in products.items():
        losses = {one.rows[0].case: one.loss(one.chosen) for one in tuned if one.chosen}
        worst = max(losses, key=losses.get, default="-")
        cells = [
            product,
            dtype,
            f"{len(losses)} of {len(tuned)}",
            *_mean_and_worst(losses.values()),
        ]
        lines.append([*cells, worst])
    return markdown_table(
        ["product", "dtype", "cases", "chosen ÷ fastest", "worst", "in case"], lines
    )


def _by_case(tuned: Sequence[_Tuned]) -> str:
    lines = []
    for one in sorted(tuned, key=lambda one: -(one.loss(one.chosen) or float("inf"))):
        chosen = one.chosen
        lines.append(
            [
                one.fastest.case,
                _name(one.fastest),
                duration(one.fastest.figure),
                "-" if chosen is None else _name(chosen),
                "-" if chosen is None else duration(chosen.figure),
                ratio_text(one.loss(chosen)),
                "-" if chosen is None else f"{float(chosen.spread) / chosen.figure:.0%}",
            ]
        )
    head = ["case", "fastest", "time", "chosen", "time", "chosen ÷ fastest", "its spread"]
    return markdown_table(head, lines)


def _name(row: TileRow) -> str:
    return row.tile if row.split == "1" else f"{row.tile}, split {row.split}"


def _rules(tuned: Sequence[_Tuned]) -> str:
    """How simple rules would do, each beside the chosen tiles of the cases it has a time in."""
    lines = []
    for name, rule in _rules_of(tuned).items():
        both = [(one, row) for one in tuned if one.chosen and (row := rule(one)) is not None]
        if not both:
            continue
        theirs, ours = (
            [one.loss(row) for one, row in both],
            [one.loss(one.chosen) for one, _ in both],
        )
        lines.append(
            [name, f"{len(both)} of {len(tuned)}", *_mean_and_worst(theirs), *_mean_and_worst(ours)]
        )
    head = ["rule", "cases", "÷ fastest", "worst", "chosen there ÷ fastest", "its worst"]
    return markdown_table(head, lines) if lines else ""


def _rules_of(tuned: Sequence[_Tuned]) -> dict[str, Rule]:
    """Other splits of the chosen tile, then one tile for all cases."""
    rules: dict[str, Rule] = {}
    if any(row.split != "1" for one in tuned for row in one.rows):
        rules = {
            "chosen tile, not split": lambda one: one.find(one.chosen.tile, 1),
            "chosen tile, half the split": _with_split(lambda split: split / 2),
            "chosen tile, twice the split": _with_split(lambda split: 2 * split),
            "chosen tile, its best split": lambda one: _best(one, one.chosen.tile),
        }
    for tile in dict.fromkeys(row.tile for one in tuned for row in one.rows):
        rules[f"always {tile}, its best split"] = lambda one, tile=tile: _best(one, tile)
    return rules


def _with_split(change: Callable[[int], float]) -> Rule:
    return lambda one: one.find(one.chosen.tile, change(int(one.chosen.split)))


def _best(one: _Tuned, tile: str) -> TileRow | None:
    rows = [row for row in one.rows if row.tile == tile]
    return min(rows, key=lambda row: row.figure, default=None)


def _mean_and_worst(losses: Iterable[float]) -> tuple[str, str]:
    losses = list(losses)
    if not losses:
        return "-", "-"
    return ratio_text(geometric_mean(losses)), ratio_text(max(losses))


def _without_times(rows: Iterable[TileRow]) -> list[str]:
    lines = [
        f"- `{row.case}`, {row.product}, {_name(row)}: {row.reason}" for row in rows if row.reason
    ]
    return ["### Without times", "\n".join(lines)] if lines else []
