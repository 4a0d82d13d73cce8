"""Load the weights that --init names: of our models, or of checkpoints of the authors' code."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..nn.weight import is_of_mask
from .errors import UsageError
from .models import VGG, RowLSTM, WideBlock, WideResNet

_ACCEPTED = (
    "Accepted: a state dict of this model, also of the authors' code, as .safetensors or written "
    "by torch.save."
)
_GATES = "ifuo"  # the authors' letters in torch's order: input, forget, update (g), output


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict of the dense model, or of a masked one, whose thresholds a dense one drops.

    Names and shapes are the model's own or, for the paper's networks, those of the authors' code
    (`authors_layout`). Where a file has no thresholds, they start at 0. Only tensors and plain
    values are unpickled. Raises UsageError if the file is missing, damaged or of another model.
    """
    values = _read(path)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    known: Mapping[str, Tensor] = authors_layout(model, state)
    if not (known.keys() - state.keys()) & values.keys():
        known = state
    if not any(is_of_mask(name, "threshold") for name in known):
        values = {
            name: value for name, value in values.items() if not is_of_mask(name, "threshold")
        }
    for name, value in values.items():
        if is_of_mask(name, "threshold") and name in known and value.shape[:1] == known[name].shape:
            values[name] = value.flatten()  # [out, 1] is one for each row, too
    needed = {name for name in known if name in values or not is_of_mask(name, "threshold")}
    for problem, names in (
        ("lacks", needed - set(values)),
        ("has", set(values) - set(known)),
        (
            "has another shape of",
            {n for n in needed & set(values) if known[n].shape != values[n].shape},
        ),
    ):
        if names:
            found = reprlib.repr(sorted(names))[1:-1]
            raise UsageError(f"--init {str(path)!r} {problem} {found}. {_ACCEPTED}")
    for name, value in values.items():
        known[name].copy_(value)
    model.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            values = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes both raise many types
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"--init {str(path)!r} cannot be read: {reason}. {_ACCEPTED}") from error
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise UsageError(f"--init {str(path)!r} is not a mapping of names to tensors. {_ACCEPTED}")
    return dict(values)


def authors_layout(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of a model's state dict with the names and shapes of the authors' code.

    What is written into a view is in `state`, which may have thresholds or not. Source of the
    names: github.com/junjieliu2910/DynamicSparseTraining.

    | model | name in `state` | the authors' name |
    |---|---|---|
    | LeNets, and networks that the authors have not | any | the same |
    | VGG | N.weight | feature.N.weight; behind the average pool classifier.0, .1, .3 |
    | WideResNet | 0, then 1, 2, ... for each block | conv1, block1.layer.0, block1.layer.1, ... |
    | WideResNet | in a block norm1, norm2, shortcut | bn1, bn2, convShortcut |
    | WideResNet | the last norm and linear layer | bn1, fc |
    | RowLSTM | lstm.weight_ih_l0 [4 units, inputs] | lstm1.cell.weight_xi, _xf, _xu, _xo [inputs, units] |
    | RowLSTM | lstm.weight_hh_l0 | lstm1.cell.weight_hi, _hf, _hu, _ho |
    | RowLSTM | lstm.threshold_ih_l0, _hh_l0 | lstm1.cell.threshold_xi, ..., lstm1.cell.threshold_hi, ... |
    | RowLSTM | lstm.bias_ih_l0 | lstm1.cell.bias_i, _f, _u, _o |
    | RowLSTM | lstm.bias_hh_l0 | none: it is 0, since torch adds both biases |
    """  # noqa: E501
    if isinstance(model, RowLSTM):
        return _lstm_layout(state)
    if isinstance(model, VGG):
        pool = next(i for i, module in enumerate(model) if isinstance(module, nn.AvgPool2d))
        prefixes = [f"feature.{i}" for i in range(pool + 2)]  # the pool and Flatten have no tensors
        prefixes += [f"classifier.{i}" for i in range(len(model) - pool - 2)]
    elif isinstance(model, WideResNet):
        blocks = sum(isinstance(module, WideBlock) for module in model)
        of_group = blocks // 3
        prefixes = [f"block{1 + i // of_group}.layer.{i % of_group}" for i in range(blocks)]
        prefixes = ["conv1", *prefixes, "bn1"]
        prefixes += ["fc"] * (
            len(model) - len(prefixes)
        )  # the last module; those between have none
    else:
        return dict(state)
    layout = {}
    for name, value in state.items():
        index, rest = name.split(".", 1)
        rest = rest.replace("norm", "bn").replace("shortcut", "convShortcut")
        layout[f"{prefixes[int(index)]}.{rest}"] = value
    return layout


def _lstm_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layout = {}
    for name, value in state.items():
        module, _, rest = name.partition(".")
        if module != "lstm":
            layout[name] = value
            continue
        kind, source, layer = rest.split("_")  # weight, ih, l0
        if (kind, source) == ("bias", "hh"):
            continue
        source = "" if kind == "bias" else {"ih": "x", "hh": "h"}[source]
        for gate, part in zip(_GATES, value.chunk(len(_GATES)), strict=True):
            theirs = f"lstm{int(layer[1:]) + 1}.cell.{kind}_{source}{gate}"
            layout[theirs] = part.T if kind == "weight" else part
    return layout
