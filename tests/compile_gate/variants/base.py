"""What a variant is, and what making one takes."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from dst_kernels.backends.triton.masking import ALONG_C, ALONG_R, ELEMENT, LAYER

__all__ = [
    "AUTOCAST",
    "FLOAT32",
    "SIXTEEN_BIT",
    "Variant",
    "granularities",
    "is_of_ampere",
    "unit_strides",
    "variant",
]


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration, and what its binary must show."""

    name: str
    kernel: triton.JITFunction
    signature: dict[str, str]  # runtime argument -> Triton's type
    constexprs: dict[str, object]
    warps: int
    stages: int
    aligned: tuple[str, ...]  # arguments divisible by 16
    tensor_cores: bool = False
    operand_a_in_registers: bool = False
    wide_accesses: bool = False
    architectures: tuple[int, ...] = (90, 80)


# Stored weight and activations under autocast, with 16-bit parameters, and in float32.
AUTOCAST = (("fp32", "bf16"), ("fp32", "fp16"))
SIXTEEN_BIT = (("bf16", "bf16"), ("fp16", "fp16"))
FLOAT32 = (("fp32", "fp32"),)


def is_of_ampere(weight: str, x: str, precision: str) -> bool:
    """Whether kernels are compiled for Ampere with these dtypes, too."""
    return weight == "fp32" and (x == "bf16" or precision == "tf32")


# Integers that are just numbers, so of any divisibility; least_pruned may exceed 32 bits.
_PLAIN = {
    "number_of_counts", "number_of_thresholds", "slabs", "parts", "least_pruned",
    "taps", "taps_h", "taps_w", "in_h", "in_w", "out_h", "out_w",
    "scale_h", "scale_w", "origin_h", "origin_w", "step_h", "step_w",
}  # fmt: skip


def variant(
    name: str,
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    constexprs: dict[str, object],
    *,
    warps: int,
    stages: int,
    **expected: bool,
) -> Variant:
    """What is neither a pointer nor a constant is an integer."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument not in constexprs:
            signature[argument] = "i64" if argument == "least_pruned" else "i32"
    aligned = tuple(argument for argument in signature if argument not in _PLAIN)
    return Variant(name, kernel, signature, constexprs, warps, stages, aligned, **expected)


def unit_strides(*strides: str) -> dict[str, int]:
    """Strides of 1, which Triton compiles in."""
    return {f"stride_{stride}": 1 for stride in strides}


def granularities(transposed: bool) -> dict[str, tuple[int, dict[str, int]]]:
    """Name -> (THRESHOLD, strides of 1)."""
    unit = "tr" if transposed else "tc"
    row = (ALONG_C.value, "tc") if transposed else (ALONG_R.value, "tr")
    return {
        "row": (row[0], unit_strides(row[1])),
        "layer": (LAYER.value, {}),
        "element": (ELEMENT.value, unit_strides(unit)),
    }
