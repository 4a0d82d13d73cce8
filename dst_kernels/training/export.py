"""Export a finished run's model as one small file, and read such a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import dst_kernels

from ..model.finalize import FORMATS
from ..model.load import load_into
from ..model.sparse_file import SparseFile, SparseFileError, read_sparse
from ..nn.find import masked_by_key
from ..nn.sparse import SparseLayer
from .config import RunConfig
from .display import percent
from .errors import UsageError, require_one_of
from .files import (
    SECONDS,
    SUMS,
    TWINS,
    cannot_write,
    is_finished,
    read_config,
    read_summary,
    read_vocabulary,
    sizes_of,
)
from .models import build_model, load_model
from .rules import Rule, check, integer

_ACCEPTED = "Accepted: a file that dst-kernels export wrote."
_ONNX = "onnx"  # the format that makes another kind of file


class Exported(NamedTuple):
    """Hold what a file has: the model, in eval mode on the CPU, and the run's figures.

    `config` is that of the dense twin. `record` has the `epochs` of the run and, of the last one,
    `test_loss` and the quality.
    """

    path: Path
    model: nn.Module
    config: RunConfig
    shape: tuple[int, ...]
    classes: int
    vocabulary: str
    record: dict[str, Any]


def export(directory: Path, format: str, file: Path | None, console: Console) -> None:
    """Write the final model of the run in `directory` to `file`, and print what became of it.

    `format` is that of `finalize_`, or "onnx": compact, as an ONNX file for any batch size. Raises
    UsageError for a run that is not finished, a file that is something else, or cannot be written,
    and where a package is missing.
    """
    require_one_of("--format", format, (*FORMATS, _ONNX))
    _check_run(directory)
    onnx = format == _ONNX
    file = directory / ("model.onnx" if onnx else "sparse.safetensors") if file is None else file
    if not onnx:
        _check_free(file)
    elif file.suffix != ".onnx":
        raise UsageError(
            f"--out {str(file)!r} is no name for --format onnx. Accepted: one that ends in .onnx."
        )
    config, summary = read_config(directory), read_summary(directory)
    shape, classes = tuple(summary["input_shape"]), summary["classes"]
    model = load_model(directory)
    masked = {key: part.mask() for key, part in masked_by_key(model).items()}
    input = example(shape, classes, 2)
    dst_kernels.finalize_(model, "compact" if onnx else format, input)
    notes = {
        "config": config.to_dict(),
        "input_shape": list(shape),
        "classes": classes,
        "vocabulary": read_vocabulary(directory),
        **{key: summary[key] for key in _figures(config)},
    }
    try:
        if onnx:
            any_batch = ({0: torch.export.Dim.AUTO},)
            dst_kernels.save_onnx(model, file, input, dynamic_shapes=any_batch)
        else:
            dst_kernels.save_sparse(model, file, notes)
    except ImportError as error:
        raise UsageError(f"--format {format} cannot be written: {error}") from error
    except OSError as error:
        raise cannot_write(file, error) from error
    _show(console, model, masked, file, dense_bytes(dense_model(config, shape, classes)))
    if onnx:
        console.print(
            "onnxruntime multiplies by the zeros that are left: smaller, not faster",
            highlight=False,
        )


def _check_run(directory: Path) -> None:
    twins = [name for name in TWINS if (directory / name).is_dir()]
    if twins:
        named = " or ".join(str(directory / name) for name in twins)
        raise UsageError(f"DIR {str(directory)!r} has two runs. Accepted: {named}.")
    if not is_finished(directory):
        raise UsageError(
            f"DIR {str(directory)!r} has no finished run, or its results have changed since "
            f"(sha256sum -c {SUMS}). Accepted: a folder in which dst-kernels train has finished."
        )


def _check_free(file: Path) -> None:
    """Raise UsageError where there is something that an export must not replace."""
    if not file.exists():
        return
    try:
        read_sparse(file)
    except (SparseFileError, OSError) as error:
        raise UsageError(
            f"--out {str(file)!r} is there, and no file of dst-kernels export. Accepted: a new "
            "name, or such a file, which is then replaced."
        ) from error


def _show(
    console: Console, model: nn.Module, masked: dict[str, Tensor], file: Path, dense: int
) -> None:
    """Print what became of each masked weight, given its mask, and the sizes in bytes."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("weight", overflow="fold")
    for name in ("shape", "kept", "remaining"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("exported as", no_wrap=True)
    table.add_column("not zero", justify="right", no_wrap=True)
    for key, mask in masked.items():
        name, _, attribute = key.rpartition(".")
        layer: Any = model.get_submodule(name)
        weight = getattr(layer, attribute)
        weight = weight() if isinstance(layer, SparseLayer) else weight
        kept, left = int(mask.sum()), int(weight.count_nonzero())
        table.add_row(
            key,
            _shape(mask),
            f"{kept:,}",
            percent(kept / mask.numel()),
            f"{type(layer).__name__} {_shape(weight)}",
            percent(left / weight.numel()),
        )
    if masked:
        console.print(table)
    size = file.stat().st_size
    console.print(
        f"written  {escape(str(file))}  {size:,} bytes, [bold]{percent(size / dense)}[/] of the "
        f"{dense:,} of the dense model",
        highlight=False,
        soft_wrap=True,
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def dense_bytes(model: nn.Module) -> int:
    """Return the size of a model's state dict as a safetensors file."""
    from safetensors.torch import save

    return len(save({name: value.clone() for name, value in model.state_dict().items()}))


def dense_model(config: RunConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the network without masks, whole and with new weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        return build_model(dataclasses.replace(config, dense=True), shape, classes).eval()


def example(shape: tuple[int, ...], classes: int, batch: int) -> Tensor:
    """Return random inputs: images of a shape [C, H, W], or ids of characters of [context]."""
    random = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return torch.randint(classes, (batch, *shape), generator=random)
    return torch.randn(batch, *shape, generator=random)


def _figures(config: RunConfig) -> dict[str, Rule]:
    task = config.task
    return {"epochs": integer(1), "test_loss": SECONDS, task.key: task.values}


def read_export(path: Path) -> Exported:
    """Return what a file of `export` has.

    Raises UsageError for any other file, for one that is damaged, and one that cannot be read.
    """
    try:
        found = read_sparse(path)
    except OSError as error:
        raise UsageError(f"FILE {path} cannot be read: {error.strerror}. {_ACCEPTED}") from error
    except SparseFileError as error:
        raise UsageError(f"FILE {error}. {_ACCEPTED}") from error
    return _exported(path, found)


def _exported(path: Path, found: SparseFile) -> Exported:
    notes = found.notes
    try:
        if not isinstance(notes.get("config"), dict):
            raise UsageError("it has no configuration of a run.")
        config = RunConfig.from_dict(notes["config"])
        form = {
            "config": Rule("a mapping", lambda value: isinstance(value, dict)),
            "input_shape": sizes_of(config.task),
            "classes": integer(1),
            "vocabulary": Rule("a text", lambda value: isinstance(value, str)),
            **_figures(config),
        }
        check("its notes:", notes, form)
        shape, classes = tuple(notes["input_shape"]), notes["classes"]
        model = dense_model(config, shape, classes)
        load_into(model, found)
    except SparseFileError as error:
        raise UsageError(f"FILE {error}. {_ACCEPTED}") from error
    except UsageError as error:
        raise UsageError(f"FILE {path}: {error} {_ACCEPTED}") from error
    record = {name: notes[name] for name in _figures(config)}
    config = dataclasses.replace(config, dense=True)
    return Exported(path, model, config, shape, classes, notes["vocabulary"], record)
