"""The README's table of how much of well-known models is masked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dst_kernels import sparsify_
from dst_kernels.nn.find import named_masked_weights

README = Path(__file__).parents[2] / "README.md"


def torchvision_model(name: str) -> nn.Module:
    return pytest.importorskip("torchvision").models.get_model(name)


def timm_model(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name)


def transformers_model(name: str) -> nn.Module:
    cls = getattr(pytest.importorskip("transformers"), name)
    return cls(cls.config_class())


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "transformers": transformers_model,
}


def rows() -> list[tuple[str, str, float]]:
    """Read (library, model, percent) of every model in the table."""
    found = re.findall(r"^\| (\w+) (`[^|]+) \| ([\d.]+) % \|", README.read_text(), re.MULTILINE)
    return [
        (library, name, float(percent))
        for library, names, percent in found
        for name in re.findall(r"`(\w+)`", names)
    ]


def masked_share(model: nn.Module) -> float:
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = named_masked_weights(sparsify_(model))
    return sum({id(part.weight): part.weight.numel() for _, part in parts}.values()) / total


def test_the_table_is_found():
    assert len(rows()) >= 8


@pytest.mark.parametrize(("library", "name", "percent"), rows())
def test_the_share_that_the_readme_names(library, name, percent):
    with torch.device("meta"):
        model = BUILDERS[library](name)
    assert masked_share(model) * 100 == pytest.approx(percent, abs=0.15)
