"""Run layers whose weight is stored without its zeros, for inference.

What is stored are plain buffers, in the format that `reference/sparse.py` describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..arguments import REAL, REAL_DTYPES, require
from ..autograd import product_dtype, sparse_product
from ..backends import direct, unavailable
from ..ops import is_watched
from ..ops.checks import check_value
from ..ops.conv_checks import check_shapes
from ..ops.geometry import resolve_padding
from ..reference.conv import Geometry
from ..reference.sparse import dense_weight

_any_autocast = torch._C._is_any_autocast_enabled
_MOST_UINT16 = 1 << 16  # columns
_MOST = (1 << 31) - 1  # weights


class SparseWeight:
    """Make the dense weight of a sparse layer when called.

    What models ask of a weight without computing with it (`layer.proj.weight.dtype`) needs no call.
    """

    requires_grad = False
    dtype = property(lambda self: self._layer.values.dtype)
    device = property(lambda self: self._layer.values.device)
    is_cuda = property(lambda self: self._layer.values.is_cuda)
    shape = property(
        lambda self: torch.Size((len(self._layer.row_starts) - 1, *self._layer._row_shape))
    )
    ndim = property(lambda self: len(self.shape))

    def __init__(self, layer: SparseLayer) -> None:
        self._layer = layer

    def __call__(self) -> Tensor:
        """Return the weight as a new dense tensor, of the shape in the dense layer."""
        layer = self._layer
        return dense_weight(layer.values, layer.columns, layer.row_starts, layer._row_shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of weights, zeros included."""
        return self.shape.numel()


class SparseLayer(nn.Module):
    """Hold a weight without its zeros in buffers, and what the sparse layers share.

    The weight, flattened to [rows, columns], is in `values` [kept], `columns` [kept] (uint16, or
    int32 where a row has more than 65,536 columns) and `row_starts` [rows + 1] (int32): row i is
    `values[row_starts[i]:row_starts[i + 1]]`, in ascending `columns`. `bias` [rows] is a buffer,
    too, or None. A new layer has no weights until a state dict brings some; their number may differ
    from the layer's.

    A pruned weight has no part in the output: where the input is infinite or NaN, it gives 0, while
    a stored 0 gives NaN. The input has a gradient, values and bias have none: call `to_dense` to
    train.
    """

    dense_type: ClassVar[type[nn.Module]]
    arguments: ClassVar[tuple[str, ...]]  # of the constructor, and attributes
    _more: ClassVar[tuple[str, ...]] = ()

    values: Tensor
    columns: Tensor
    row_starts: Tensor
    bias: Tensor | None
    _row_shape: tuple[int, ...]

    def _become(self, dense: Any, device: torch.device | str | None) -> None:
        """Take over attributes, shapes and dtype of a dense layer, without its weights."""
        super().__init__()
        weight = dense.weight
        require(weight.dtype in REAL_DTYPES, "dtype", REAL, weight.dtype)
        for name in (*self.arguments, *self._more):
            setattr(self, name, getattr(dense, name))
        rows, *row_shape = weight.shape
        self._row_shape = tuple(row_shape)
        small = math.prod(row_shape) <= _MOST_UINT16
        of_columns = torch.uint16 if small else torch.int32

        def zeros(size: int, dtype: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.register_buffer("values", zeros(0))
        self.register_buffer("columns", zeros(0, of_columns))
        self.register_buffer("row_starts", zeros(rows + 1, torch.int32))
        self.register_buffer("bias", None if dense.bias is None else zeros(rows))

    @classmethod
    @torch.no_grad()
    def from_dense(cls, module: Any):
        """Return a sparse layer with the weights of `module` that are not 0, copied.

        `module` is of the dense class itself. Raises TypeError for another one and for a dtype
        other than float16, bfloat16, float32 and float64, ValueError for a weight on the meta
        device, or with 2^31 or more elements that are not 0.
        """
        name = f"torch.nn.{cls.dense_type.__name__}"
        require(type(module) is cls.dense_type, "module", f"a {name} (and no subclass)", module)
        weight: Any = module.weight
        if weight.is_meta:
            raise ValueError("module must have its weights in memory, but they are on 'meta'")
        layer = cls.__new__(cls)
        layer._become(module, weight.device)
        flat = weight.flatten(1)
        rows, columns = flat.nonzero(as_tuple=True)
        if len(rows) > _MOST:
            raise ValueError(f"module has {len(rows)} weights that are not 0: at most {_MOST}")
        layer.values = flat[rows, columns]
        layer.columns = columns.to(layer.columns.dtype)
        layer.row_starts[1:] = torch.bincount(rows, minlength=len(flat)).cumsum(0)
        if module.bias is not None:
            layer.bias = module.bias.detach().clone()
        return layer.train(module.training)

    @torch.no_grad()
    def to_dense(self) -> Any:
        """Return a torch.nn layer of the same function, with Parameters that are copies."""
        arguments = {name: getattr(self, name) for name in self.arguments}
        dense: Any = self.dense_type(**arguments, bias=self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone())
        return dense.train(self.training)

    @property
    def weight(self) -> SparseWeight:
        """`weight()` is a new dense tensor; its shape, dtype and device are there without it."""
        return SparseWeight(self)

    def _parts(self, input: Tensor) -> tuple[Tensor, ...]:
        """Return (input, values, columns, row_starts, bias), in the dtype of the product."""
        buffers: dict[str, Any] = self._buffers
        values, bias = buffers["values"], buffers["bias"]
        if input.dtype is not values.dtype or _any_autocast():
            dtype = product_dtype(input, values)
            input, values = input.to(dtype), values.to(dtype)
        return input, values, buffers["columns"], buffers["row_starts"], bias

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *others):
        names = ("values", "columns", "row_starts")
        given = [state_dict.get(prefix + name) for name in names]
        if all(isinstance(tensor, Tensor) for tensor in given):
            reason = self._why_no_weight(*given)
            if reason is not None:
                others[-1].append(f"{prefix}{reason}")
                return
            for name, tensor in zip(names[:2], given, strict=False):
                mine = getattr(self, name)
                if mine.shape != tensor.shape:
                    setattr(self, name, mine.new_empty(tensor.shape))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *others)

    def _why_no_weight(self, values: Tensor, columns: Tensor, row_starts: Tensor) -> str | None:
        """Return what keeps these tensors from being a weight of this layer, or None."""
        rows, width = len(self.row_starts) - 1, math.prod(self._row_shape)
        if values.dim() != 1 or columns.shape != values.shape:
            return (
                "values and columns must be as long as each other, but their shapes are "
                f"{list(values.shape)} and {list(columns.shape)}"
            )
        if columns.dtype != self.columns.dtype:
            return f"columns must be {self.columns.dtype}, but are {columns.dtype}"
        if row_starts.dtype != torch.int32 or row_starts.shape != (rows + 1,):
            return (
                f"row_starts must be torch.int32 of shape [{rows + 1}], but are {row_starts.dtype} "
                f"of shape {list(row_starts.shape)}"
            )
        if any(tensor.is_meta for tensor in (values, columns, row_starts)):
            return None
        ends = row_starts[[0, -1]].tolist()
        if ends != [0, len(values)] or bool((row_starts.diff() < 0).any()):
            return f"row_starts must ascend from 0 to the {len(values)} values, but they do not"
        if len(values):
            wide = columns.to(torch.int64)
            least, most = wide.min().item(), wide.max().item()
            if least < 0 or most >= width:
                return f"columns must be from 0 to {width - 1}, but are from {least} to {most}"
            first = torch.zeros(len(values) + 1, dtype=torch.bool, device=columns.device)
            first[row_starts.to(torch.int64)] = True
            if bool(((wide.diff() <= 0) & ~first[1:-1]).any()):
                return "columns must ascend within each row, but they do not"
        return None

    def __getstate__(self) -> dict[str, Any]:
        # torch's tensors of uint16 cannot be read from a plain pickle.
        return self._with_columns(self.__dict__, torch.uint16, torch.int16)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(self._with_columns(state, torch.int16, torch.uint16))

    @staticmethod
    def _with_columns(state: dict, before: torch.dtype, after: torch.dtype) -> dict[str, Any]:
        columns = state["_buffers"]["columns"]
        if columns.dtype is not before:
            return state
        return state | {"_buffers": state["_buffers"] | {"columns": columns.view(after)}}

    def extra_repr(self) -> str:
        described = [f"{name}={getattr(self, name)!r}" for name in self.arguments]
        kept, size = len(self.values), (len(self.row_starts) - 1) * math.prod(self._row_shape)
        share = f" ({kept / size:.1%})" if size else ""
        return ", ".join([*described, f"bias={self.bias is not None}", f"kept={kept}{share}"])


class SparseLinear(SparseLayer):
    """Run `torch.nn.Linear` with a weight that is stored without its zeros.

    The forward takes [..., in] and returns [..., out]. Make one with `from_dense`, or by this
    constructor, for a state dict to be loaded. `SparseLayer` describes the buffers.

    Args:
        in_features, out_features, bias, device, dtype: as in `torch.nn.Linear`.
    """

    dense_type = nn.Linear
    arguments = ("in_features", "out_features")

    in_features: int
    out_features: int

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        self._become(nn.Linear(in_features, out_features, bias, "meta", dtype), device)

    def forward(self, input: Tensor) -> Tensor:
        buffers: dict[str, Any] = self._buffers
        values, shape = buffers["values"], input.shape
        if (
            shape
            and shape[-1] == self.in_features
            and input.dtype is values.dtype
            and type(input) is Tensor
            and not (input.requires_grad or _any_autocast())
            and not is_watched()
        ):  # the usual case: the way through the ops takes longer than a small product
            run = direct("sparse_linear", input.device, input.dtype)
            return run(input, values, buffers["columns"], buffers["row_starts"], buffers["bias"])
        features = self.in_features
        check_value(
            bool(shape) and shape[-1] == features,
            lambda: f"input must have shape [..., {features}], but its shape is {list(shape)}",
        )
        return sparse_product(ops.sparse_linear, self._row_shape, *self._parts(input), "auto")


class SparseConv(SparseLayer):
    """Run `torch.nn.{parent}` with a weight that is stored without its zeros.

    Make one with `from_dense`, or by this constructor, for a state dict to be loaded: arguments and
    shapes are those of the parent. Elements [in/groups, *kernel] of one filter are a row of
    `SparseLayer`. The output is contiguous, or channels last where the input is.
    """

    arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    )  # fmt: skip
    _more = ("_reversed_padding_repeated_twice",)

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *geometry: Any,
        device=None,
        **options: Any,
    ) -> None:
        dense = self.dense_type(
            in_channels, out_channels, kernel_size, *geometry, device="meta", **options
        )
        self._become(dense, device)

    def forward(self, input: Tensor) -> Tensor:
        padding: str | tuple[int, ...] | int = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        kernel_size, stride, dilation = self.kernel_size, self.stride, self.dilation
        batched = input.dim() != len(kernel_size) + 1
        input, *parts = self._parts(input if batched else input.unsqueeze(0))
        input, padding = resolve_padding(input, padding, kernel_size, stride, dilation)
        geometry = Geometry(stride, padding, dilation, self.groups)
        if not torch.compiler.is_compiling():  # there the compiler's own checks of shapes serve
            check_shapes(input.shape, (self.out_channels, *self._row_shape), geometry)
        output = sparse_product(
            ops.sparse_conv, self._row_shape, input, *parts, kernel_size, *geometry, "auto"
        )
        return output if batched else output.squeeze(0)


_DOC = SparseConv.__doc__ or ""  # python -OO drops docstrings


class SparseConv1d(SparseConv):
    __doc__ = _DOC.format(parent="Conv1d")
    dense_type = nn.Conv1d


class SparseConv2d(SparseConv):
    __doc__ = _DOC.format(parent="Conv2d")
    dense_type = nn.Conv2d


def wins(
    rows: int,
    columns: int,
    kept: int,
    device: torch.device | str,
    dtype: torch.dtype,
    kind: str = "linear",
    positions: int | None = None,
) -> bool:
    """Return whether a sparse layer is known to be at least as fast as the dense one.

    The weight, as `values` sees it, is [rows, columns] with `kept` elements; `kind` is "linear",
    "conv1d" or "conv2d". `positions`: how many a convolution computes of one image; None: at least
    49 (7 x 7), since with fewer a small convolution can be slower. Holds for any number of inputs.
    Measured on a CPU with AVX-512, one thread; nothing is known of other devices. Raises ValueError
    for another kind.
    """
    if kind not in ("linear", "conv1d", "conv2d"):
        raise ValueError(f"kind must be 'linear', 'conv1d' or 'conv2d', but is {kind!r}")
    library = unavailable("cpu") is None
    limits = _LIMITS.get((library, kind == "linear", dtype))
    if limits is None or torch.device(device).type != "cpu":
        return False
    if kind != "linear" and positions is not None and positions < _FEWEST_POSITIONS:
        return False
    size = rows * columns
    most = min(limits.share * size + limits.spare - limits.per_row * rows, limits.most * size)
    return size >= limits.size and min(rows, columns) >= limits.side and kept < most


_FEWEST_POSITIONS = 49


class _Limits(NamedTuple):
    """Say which weights make a sparse layer as fast: they have `size` elements, `side` by `side`.

    With fewer, what is done once for each call, input or output outlasts the product. Kept may be a
    `share` of the elements, and `spare` ones, since torch's own call takes its time, too; `per_row`
    fewer for each row, which costs time without any; but never more than the share `most`.
    """

    share: float
    size: int
    side: int = 1
    spare: int = 0
    per_row: int = 0
    most: float = 1.0


# Keys: the library is there, a linear layer, dtype. In bfloat16 the dense product has instructions
# of its own.
_LIMITS = {
    (True, True, torch.float32): _Limits(0.21, 1 << 14, 24, 2500, 10, most=0.32),
    (True, True, torch.bfloat16): _Limits(0.1, 1 << 16, 256),
    (True, False, torch.float32): _Limits(0.08, 1 << 14),
    (True, False, torch.bfloat16): _Limits(0.04, 1 << 14),
    (False, True, torch.float32): _Limits(0.05, 1 << 20),
}
