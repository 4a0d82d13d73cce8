"""Choose how `sparsify_` converts a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..arguments import require, require_flag, require_integer
from ..autograd import check_options
from ..nn import MaskOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsifyConfig:
    """Hold the options of the masked layers, and say which layers stay dense.

    granularity, reset_ratio, surrogate, structure_gradient, backend, path: see `nn.MaskedLinear`.
    skip_first, skip_last: leave the first, the last convertible layer dense, in the order of
        `model.named_modules()`.
    skip_depthwise: leave convolutions dense in which every input channel is its own group.
    min_numel: leave layers with fewer weights dense.
    parameters: also mask single parameters of modules that have no masked twin: attention's
        projections, experts, routers, cells, bilinear and parametrized layers.
    embeddings: with `parameters`, also mask embeddings, with one threshold for each row.

    The defaults are the paper's: every linear and convolutional layer is masked. Raises ValueError
    or TypeError for a value that an option cannot have.
    """

    granularity: str = "row"
    reset_ratio: float | None = 0.01
    surrogate: str = "long_tailed"
    structure_gradient: bool = True
    backend: str = "auto"
    path: str = "auto"
    skip_first: bool = False
    skip_last: bool = False
    skip_depthwise: bool = False
    min_numel: int = 0
    parameters: bool = True
    embeddings: bool = False

    def __post_init__(self) -> None:
        check_options(self.mask_options())
        require_integer("min_numel", self.min_numel, 0)
        for name in ("skip_first", "skip_last", "skip_depthwise", "parameters", "embeddings"):
            require_flag(name, getattr(self, name))

    @classmethod
    def paper(cls, **changes: Any) -> SparsifyConfig:
        """Return the paper's choice, which is the default: all masked, a threshold per row."""
        return cls(**changes)

    @classmethod
    def careful(cls, **changes: Any) -> SparsifyConfig:
        """Return a choice that leaves layers dense where sparsity saves little but costs accuracy.

        These are the first and the last layer, depthwise convolutions and layers with fewer than
        1024 weights.
        """
        careful = {"skip_first": True, "skip_last": True, "skip_depthwise": True, "min_numel": 1024}
        return cls(**{**careful, **changes})

    def mask_options(self) -> MaskOptions:
        """Return the options of the masked layers, as in their attribute `masking`."""
        return MaskOptions(**{name: getattr(self, name) for name in MaskOptions._fields})

    def layer_options(self) -> dict[str, Any]:
        """Return the keyword-only arguments of the masked layers."""
        return self.mask_options()._asdict()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SparsifyConfig:
        """Return the configuration that `to_dict` described; raise ValueError for unknown keys."""
        require(isinstance(values, dict), "values", "a dict, as `to_dict` makes it", values)
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"values has unknown keys: {', '.join(unknown)}")
        return cls(**values)
