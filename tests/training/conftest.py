"""Real files in the formats which the training command reads, but tiny."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dst_kernels.training.commands import app


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run `dst-kernels ARGS...` in an empty folder; the result has exit_code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished run of one epoch: copy it, never change it."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    result = CliRunner().invoke(app, ["train", "--epochs", "1", "--out", str(directory)])
    assert result.exit_code == 0, result.output
    return directory


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
