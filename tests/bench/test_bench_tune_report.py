"""The summary of a sweep, from rows that nobody measured."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from bench.commands import app
from bench.tile_rows import TileRow, TilesFile
from bench.tune_report import tiles_markdown

A, B, C = "linear-a", "linear-b", "linear-c"


def _row(case, tile, split, seconds, chosen="no", *, product="forward", **more):
    row = {
        "case": case,
        "dtype": "bf16",
        "product": product,
        "tile": tile,
        "split": str(split),
        "chosen": chosen,
        "seconds": "" if seconds is None else str(seconds),
        "spread": "" if seconds is None else str(seconds / 10),
        "reason": "too big" if seconds is None else "",
        "gpu": "made-up device",
        "torch": "2.99",
        "triton": "3.99",
        "commit": "abc",
        "date": "2000-01-01T00:00:00Z",
    }
    return TileRow(**row | more)


ROWS = [
    _row(A, "small", 1, 4e-6),
    _row(A, "small", 2, 2e-6, "yes"),
    _row(A, "small", 4, 1e-6),
    _row(A, "large", 1, 2e-6),
    _row(B, "small", 1, None),
    _row(B, "large", 1, 3e-6, "yes"),
    _row(B, "large", 2, 6e-6),
    _row(C, "large", 1, 5e-6, product="pack"),
    _row(C, "small", 1, None, "yes", product="pack"),
]

TEXT = """\
| product | dtype | cases | chosen ÷ fastest | worst | in case |
| ---: | ---: | ---: | ---: | ---: | ---: |
| forward | bf16 | 2 of 2 | 1.41 | 2.00 | linear-a |
| pack | bf16 | 0 of 1 | - | - | - |

### forward, bf16

| case | fastest | time | chosen | time | chosen ÷ fastest | its spread |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| linear-a | small, split 4 | 1 µs | small, split 2 | 2 µs | 2.00 | 10% |
| linear-b | large | 3 µs | large | 3 µs | 1.00 | 10% |

| rule | cases | ÷ fastest | worst | chosen there ÷ fastest | its worst |
| ---: | ---: | ---: | ---: | ---: | ---: |
| chosen tile, not split | 2 of 2 | 2.00 | 4.00 | 1.41 | 2.00 |
| chosen tile, half the split | 1 of 2 | 4.00 | 4.00 | 2.00 | 2.00 |
| chosen tile, twice the split | 2 of 2 | 1.41 | 2.00 | 1.41 | 2.00 |
| chosen tile, its best split | 2 of 2 | 1.00 | 1.00 | 1.41 | 2.00 |
| always small, its best split | 1 of 2 | 1.00 | 1.00 | 2.00 | 2.00 |
| always large, its best split | 2 of 2 | 1.41 | 2.00 | 1.41 | 2.00 |

### pack, bf16

| case | fastest | time | chosen | time | chosen ÷ fastest | its spread |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| linear-c | large | 5 µs | - | - | - | - |

### Without times

- `linear-b`, forward, small: too big
- `linear-c`, pack, small: too big
"""


def test_the_summary():
    text = tiles_markdown(ROWS)
    assert text.startswith("# Tiles\n")
    assert "## made-up device\n\ntorch 2.99, triton 3.99, commit abc.\n" in text
    assert text.endswith(TEXT)


def test_devices_and_dtypes_are_apart():
    rows = [*ROWS, _row(A, "small", 1, 9e-6, "yes", gpu="another"), _row(B, "s", 1, 1.0, dtype="x")]
    text = tiles_markdown(rows)
    assert TEXT.splitlines()[2] in text, "nothing of the other device or dtype is in it"
    assert "| forward | x | 0 of 1 |" in text and "### forward, x" in text
    _, another = text.split("## another")
    assert "| forward | bf16 | 1 of 1 | 1.00 |" in another


def test_only_the_last_code_counts_and_the_last_time_of_a_tile():
    newer = {"commit": "def", "date": "2000-01-02T00:00:00Z"}
    rows = [
        _row(A, "small", 1, 7e-6, "yes", **newer),
        *ROWS[:4],
        _row(A, "large", 1, 5e-6, **newer | {"date": "2000-01-03T00:00:00Z"}),
        _row(A, "large", 1, 9e-6, **newer),
    ]
    text = tiles_markdown(rows)
    assert "| linear-a | large | 5 µs | small | 7 µs | 1.40 |" in text
    assert "split 4" not in text and "commit def." in text


def test_a_failure_takes_back_a_time():
    late = {"date": "2000-01-02T00:00:00Z"}
    text = tiles_markdown([*ROWS[:4], _row(A, "small", 4, None, **late)])
    assert "| linear-a | small, split 2 | 2 µs | small, split 2 |" in text
    assert "- `linear-a`, forward, small, split 4: too big" in text


def _tiles(*arguments):
    result = CliRunner().invoke(app, ["tiles", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command(tmp_path):
    paths = [tmp_path / name / "tiles.csv" for name in ("one", "two")]
    for path, rows in zip(paths, (ROWS[:5], ROWS[5:]), strict=True):
        with TilesFile(path) as file:
            for row in rows:
                file.add(row)
    assert _tiles(*paths)[0] == 0
    assert (tmp_path / "one" / "tiles.md").read_text() == tiles_markdown(ROWS)
    assert _tiles(paths[0], "--out", tmp_path / "else.md")[0] == 0
    assert (tmp_path / "else.md").read_text() == tiles_markdown(ROWS[:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": "perhaps"}, "line 2: chosen is 'perhaps', not yes or no"),
        ({"split": "two"}, "line 2: invalid literal"),
        ({"seconds": "fast"}, "line 2: could not convert string to float"),
    ],
)
def test_rows_that_are_none(tmp_path, changes, message):
    with TilesFile(tmp_path / "tiles.csv") as file:
        file.add(dataclasses.replace(_row(A, "small", 1, 1.0), **changes))
    code, output = _tiles(file.path)
    assert code == 2 and message in output


def test_files_without_rows(tmp_path):
    with TilesFile(tmp_path / "tiles.csv") as file:
        pass
    code, output = _tiles(file.path)
    assert code == 2 and "no tiles in" in output and "python -m bench tune" in output
    code, output = _tiles(tmp_path / "missing.csv")
    assert code == 2 and "missing.csv cannot be read" in output
