"""Small kernels that break one rule of the gate each. Run as a module: the gate on all of them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import triton
import triton.language as tl

from .__main__ import main


@triton.jit
def masked_product(x, w, y, N, K, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """yᵀ = (w ⊙ [|w| > 0.1]) xᵀ for one tile: the masked operand stays in registers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, STEP)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    # With one step in each iteration, Triton 3.6 and 3.8 overwrite the operand before it was used.
    for start in tl.range(0, K, STEP, loop_unroll_factor=2):
        weights = tl.load(w + rows[:, None] * K + (start + columns)[None, :])
        inputs = tl.load(x + tokens[:, None] * K + (start + columns)[None, :])
        weights = tl.where(tl.abs(weights) > 0.1, weights, 0.0).to(tl.bfloat16)
        acc = tl.dot(weights, inputs.T, acc)
    tl.store(y + tokens[:, None] * N + rows[None, :], acc.to(tl.bfloat16).T)


@triton.jit
def plain_product(x, w, y, N, K, TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """The same without a mask: the operand goes from shared memory to the tensor cores."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    columns = tl.arange(0, STEP)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(0, K, STEP):
        weights = tl.load(w + rows[:, None] * K + (start + columns)[None, :])
        inputs = tl.load(x + tokens[:, None] * K + (start + columns)[None, :])
        acc = tl.dot(weights, inputs.T, acc)
    tl.store(y + tokens[:, None] * N + rows[None, :], acc.to(tl.bfloat16).T)


@triton.jit
def masked_tile(w, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile, loaded and stored through tensor descriptors made on the host."""
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    weights = w.load([row, column])
    y.store([row, column], tl.where(tl.abs(weights) > 0.1, weights, 0.0).to(tl.bfloat16))


@triton.jit
def masked_rows(w, t, y, K, BLOCK: tl.constexpr):
    """One row: wide where the row's length is a multiple of 16, with one scalar beside it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    weights = tl.load(w + row * K + columns, mask=inside, other=0.0)
    threshold = tl.load(t + row)
    weights = tl.where(tl.abs(weights) > threshold, weights, 0.0)
    tl.store(y + row * K + columns, weights.to(tl.bfloat16), mask=inside)


class Crash:
    """In place of a kernel: ends the process, as a failed assertion in the compiler does."""

    @property
    def arg_names(self):
        os.abort()


@dataclass(frozen=True)
class Variant:
    """Stands in for the library's own, so that these tests need none of its kernels."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    warps: int = 8
    stages: int = 3
    tensor_cores: bool = False
    operand_a_in_registers: bool = False
    wide_accesses: bool = False
    architectures: tuple[int, ...] = field(default=(90,))


def product(name, kernel=masked_product, tile=(128, 128), weight="*fp32:16", **options):
    arguments = {"x": "*bf16:16", "w": weight, "y": "*bf16:16", "N": "i32:16", "K": "i32:16"}
    arguments |= {"TOKENS": tile[0], "ROWS": tile[1], "STEP": 32}
    rules = {"tensor_cores": True, "operand_a_in_registers": True}
    return Variant(name, kernel, arguments, **(rules | options))


def streaming(name, block=4096, columns="i32:16", **options):
    arguments = {"w": "*fp32:16", "t": "*fp32:16", "y": "*bf16:16", "K": columns, "BLOCK": block}
    options = {"wide_accesses": True, "stages": 1} | options
    return Variant(name, masked_rows, arguments, **options)


VARIANTS = [
    product("good product", architectures=(90, 80)),
    streaming("good streaming", architectures=(90, 80)),
    Variant(
        "good descriptors",
        masked_tile,
        {
            "w": "tensordesc<fp32[64,128]>",
            "y": "tensordesc<bf16[64,128]>",
            "ROWS": 64,
            "COLUMNS": 128,
        },
    ),
    # 256 accumulators for each thread
    product("bad spill", tile=(256, 128), warps=4),
    product("bad shared memory", stages=7, architectures=(90, 80)),
    product("bad operand", plain_product, weight="*bf16:16"),
    streaming("bad dot", tensor_cores=True, architectures=(90, 80)),
    streaming("bad alignment", columns="i32"),
    streaming("bad block", block=1024),
    # before the last one, which must be measured all the same
    Variant("bad compiler", Crash(), {}),
    Variant("bad arguments", masked_rows, {"w": "*fp32", "BLOCK": 1024}),
]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], VARIANTS))
