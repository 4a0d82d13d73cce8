"""Check what users pass in: every error names the argument, what was given and what is accepted.

TypeError is for the wrong kind of thing, ValueError for a value out of range. This is for where
options and models come in, never for a layer's forward. Imports torch only.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REAL = "float16, bfloat16, float32 or float64"


def require(accepts: bool, name: str, accepted: str, value: object) -> None:
    """Raise TypeError unless `accepts`; the message describes what was given."""
    if not accepts:
        raise TypeError(f"{name} must be {accepted}, but is {described(value)}")


def described(value: object) -> str:
    """Describe a value in an error: a plain one by its repr, any other by its kind."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (tuple, list)) and len(value) <= 4:
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"


def require_module(model: object, name: str = "model") -> None:
    """Raise TypeError unless `model` is a torch.nn.Module."""
    require(isinstance(model, nn.Module), name, "a torch.nn.Module", model)


def require_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    require(isinstance(value, bool), name, "True or False", value)


def require_integer(name: str, value: object, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `least`."""
    integer = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    require(integer, name, f"an integer of at least {least}", value)
    if not value >= least:  # type: ignore[operator]  # it is an integer
        raise ValueError(f"{name} must be at least {least}, but is {value}")


def require_number(name: str, value: object, *, positive: bool = False) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number, 0 or more (or positive)."""
    range_of = "positive" if positive else "at least 0"
    number = isinstance(value, Real) and not isinstance(value, bool)
    require(number, name, f"a number, {range_of} and finite", value)
    inside = value > 0 if positive else value >= 0  # type: ignore[operator]  # it is a number
    if not (inside and math.isfinite(value)):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be {range_of} and finite, but is {value}")


def require_tensors(**tensors: object) -> None:
    """Raise TypeError unless all are dense tensors (layout torch.strided)."""
    for name, value in tensors.items():
        require(isinstance(value, Tensor), name, "a torch.Tensor", value)
        layout = value.layout  # type: ignore[attr-defined]
        if layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor (torch.strided), but its layout is {layout}: "
                "use its to_dense()"
            )
