"""Real files in the formats which the training command reads, but tiny."""

from __future__ import annotations

import gzip
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from dst_kernels.training.commands import app


def numbers_of(figure: Figure, file, **options: object) -> None:
    """What is drawn, as text: equal where the pictures would be, and at no cost."""
    for axes in figure.axes:
        for line in axes.lines:
            file.write(f"{line.get_label()} {line.get_xydata().tolist()}\n".encode())
        for area in axes.patches:
            file.write(f"{area.get_path().vertices.tolist()}\n".encode())


@pytest.fixture
def pictures():
    """Keeps them; drawing them takes most of a short run."""


@pytest.fixture
def cli(tmp_path, monkeypatch, request):
    """Run `dst-kernels ARGS...` in an empty folder; the result has exit_code and output."""
    monkeypatch.chdir(tmp_path)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", numbers_of)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def run_of(tmp_path_factory) -> Callable[..., Path]:
    """A finished run with these options, the same whenever it is asked for.

    Copied to `to`, where a test may change it; else nobody may.
    """
    runs: dict[tuple[str, ...], Path] = {}

    def run(*options: object, to: Path | None = None) -> Path:
        given = tuple(map(str, options))
        if given not in runs:
            runs[given] = tmp_path_factory.mktemp("runs") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Figure, "savefig", numbers_of)
                result = CliRunner().invoke(app, ["train", *given, "--out", str(runs[given])])
            assert result.exit_code == 0, result.output
        return runs[given] if to is None else Path(shutil.copytree(runs[given], to))

    return run


@pytest.fixture
def mnist_dir(tmp_path) -> Path:
    """MNIST's raw idx files, 40 training and 20 test images in which the label can be read."""
    raw = tmp_path / "mnist-data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 3] = 255
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        _write_idx(raw / f"{stem}-images-idx3-ubyte", header + images.tobytes())
        _write_idx(
            raw / f"{stem}-labels-idx1-ubyte", struct.pack(">II", 0x801, count) + bytes(labels)
        )
    return tmp_path / "mnist-data"


def _write_idx(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    path.with_suffix(".gz").write_bytes(gzip.compress(contents))


@pytest.fixture
def image_dir(tmp_path) -> Path:
    """An image folder with two classes: bright above, and bright below."""
    root = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("above", "below")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (40, 40, 3), dtype=np.uint8)
                pixels[20 * label : 20 * label + 20] += 180
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root
