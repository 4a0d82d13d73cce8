"""Map each type of module to what it becomes: a masked layer, or itself with masked parameters."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedGRU,
    MaskedLinear,
    MaskedLSTM,
    MaskedModule,
    MaskedRNN,
)
from ..nn.parameters import Layout
from ..nn.weight import OUT_IN, TRANSPOSED
from ._weight_readers import calls_linear
from .config import SparsifyConfig

_MASKED = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
    nn.LSTM: MaskedLSTM,
    nn.GRU: MaskedGRU,
    nn.RNN: MaskedRNN,
}

_TRANSFORMERS_CONV1D = "transformers.pytorch_utils.Conv1D"

_ROWS = Layout()
_NAMES: dict[type[nn.Module], dict[str, Layout]] = {
    nn.MultiheadAttention: {
        "in_proj_weight": Layout(3),  # q, k and v
        **dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), _ROWS),
    },
    nn.Bilinear: {"weight": _ROWS},
    nn.LSTMCell: {"weight_ih": Layout(4), "weight_hh": Layout(4)},
    nn.GRUCell: {"weight_ih": Layout(3), "weight_hh": Layout(3)},
    nn.RNNCell: {"weight_ih": _ROWS, "weight_hh": _ROWS},
}
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
_PARAMETRIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layouts_of(module: nn.Module, config: SparsifyConfig) -> dict[str, Layout]:
    """Return the parameters to mask in a module without a masked twin, with their layouts."""
    if not config.parameters:
        return {}
    if is_parametrized(module):
        computed = [*module._modules["parametrizations"]._modules]  # type: ignore[union-attr]
        alone = computed == ["weight"] and isinstance(module, _PARAMETRIZED)
        return {"weight": _ROWS} if alone else {}
    for kind, names in _NAMES.items():
        if isinstance(module, kind):
            return _present(module, names)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"weight": _ROWS} if config.embeddings and not module.sparse else {}
    if type(module).__module__.startswith("torch."):
        return {}
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):  # transformers marks a module of experts with this attribute
        order = TRANSPOSED if transposed else OUT_IN
        return {
            name: Layout(len(parameter), order)
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 3 and name.endswith("_proj")
        }
    weight = module._parameters.get("weight")
    if isinstance(module, _LAYERS):  # these become masked layers
        return {}
    cls: type = type(module)
    if weight is not None and weight.dim() == 2 and calls_linear(cls):
        return {"weight": _ROWS}  # for example a router: `F.linear(x, self.weight)`
    return {}


def _present(module: nn.Module, names: dict[str, Layout]) -> dict[str, Layout]:
    return {
        name: layout for name, layout in names.items() if module._parameters.get(name) is not None
    }


def _base(module: nn.Module) -> type[nn.Module] | None:
    """Return the torch.nn class that `module` is an instance of and that has a masked twin."""
    for base in _MASKED:
        if isinstance(module, base):
            return base
    return None


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def has_twin(module: nn.Module) -> bool:
    """Return whether there is a masked layer that the module can become."""
    return _base(module) is not None or _qualified(type(module)) == _TRANSFORMERS_CONV1D


def masked_type(module: nn.Module) -> type[MaskedModule]:
    base = _base(module)
    if base is not None:
        return _MASKED[base]
    from ..nn.huggingface import MaskedTransformersConv1D

    return MaskedTransformersConv1D
