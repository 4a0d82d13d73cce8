"""Compiles a sweep's kernels for a GPU that is not there; run without Triton's interpreter.

A meta tensor must lead to the binary that a tensor with numbers leads to: Triton specialises on
addresses and strides.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.cases import Case, ConvCase
from bench.problem import Problem
from bench.tune_compile import _launching_by, compilations, compile_kernels
from bench.tune_products import PRODUCTS, calls, in_tile, launches_of
from dst_kernels.backends.triton.post import post_kernel

CASES = (
    Case("linear", 64, 256, 128, "bf16-autocast"),
    Case("linear", 65, 200, 100, "tf32"),
    ConvCase(2, 9, 16, 32, 3, "bf16-autocast", stride=2),
    ConvCase(2, 8, 16, 24, 1, "bf16"),
    ConvCase(2, 9, 3, 32, 7, "fp16-autocast", stride=2),
    Case("masked_weight", 0, 256, 512, "bf16-autocast"),
)
launchers = []


def launched(*_) -> None:
    raise AssertionError("nothing is launched")


driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: launchers.append(metadata) or launched,
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        ),
    )
)
cache = Path(os.environ["TRITON_CACHE_DIR"])
launch = JITFunction.run


def binaries() -> set[str]:
    return {path.name for path in cache.rglob("*.cubin")}


def with_numbers(task, run) -> None:
    with task.case.mode.precision(), _launching_by(run):
        in_tile(calls(Problem(task.case, torch.device("cpu")))[task.product], task.tile)


def compile_only(self, *args, grid, warmup, **options) -> None:
    launch(self, *args, grid=grid, warmup=True, **options)


(task,) = [one for one in compilations(CASES) if one.product == "post" and one.chosen]
compile_kernels(task)
assert len(binaries()) == len(launchers) == 1, (binaries(), launchers)
compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}
post_kernel.device_caches.clear()  # as in another process
with_numbers(task, compile_only)
assert compiled == {path: path.stat().st_mtime_ns for path in cache.rglob("*.*")}

# The same for all kinds of cases, by the keys of Triton's cache in memory.
post_kernel.device_caches.clear()
keys: set[tuple[str, str]] = set()


def note(self, key, *_) -> None:
    keys.add((self.__name__, str(key)))


JITFunction._do_compile = note
products = 0
for case in CASES:
    for name in PRODUCTS[case.op]:
        found = []
        for device in ("meta", "cpu"):
            keys.clear()
            with case.mode.precision(), _launching_by(compile_only):
                launches = launches_of(calls(Problem(case, torch.device(device)))[name])
            assert launches.error is None and len(launches.tiles) > 1, (case, name, launches.error)
            found.append(set(keys))
        assert found[0] == found[1] != set(), (case, name, found[0] ^ found[1])
        products += 1
print(f"{products} products, all the same")
