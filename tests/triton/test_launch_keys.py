"""A batch of another size compiles no other kernel: not in mid-training, not during a capture."""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton_cases import normal, thresholds

from dst_kernels import ops
from dst_kernels.backends.triton import conv, linear
from dst_kernels.backends.triton.tiles import GradWeightTile, ProductTile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces launches")

PRODUCT = ProductTile(block_m=16, block_r=16, block_c=16, warps=4, stages=2, split=2)
GRADIENT = GradWeightTile(block_r=16, block_c=16, block_m=16, warps=4, stages=2)
SPLIT = GradWeightTile(block_r=16, block_c=16, block_m=16, warps=4, stages=2, split=4)
LONG_TAILED = "long_tailed", True


@pytest.fixture
def keys(monkeypatch):
    """What Triton would compile, by kernel; nothing is launched."""
    found: dict[str, set[str]] = {}
    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def launch(self, *args, grid, warmup, **options):
        kernel = JITFunction(self.fn, do_not_specialize=self.kwargs["do_not_specialize"])
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **options)
        found.setdefault(self.fn.__name__, set()).add(f"{specialization} {options}")

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(linear, "product_tile", lambda *_: PRODUCT)
    monkeypatch.setattr(conv, "conv_product_tile", lambda *_: PRODUCT)
    return found


@pytest.fixture(params=[GRADIENT, SPLIT], ids=["whole", "split"])
def gradient_tile(request, monkeypatch):
    """Also where the tokens are split, into as many slabs as there are steps or fewer."""
    monkeypatch.setattr(linear, "grad_weight_tile", lambda *_: request.param)
    monkeypatch.setattr(conv, "conv_grad_weight_tile", lambda *_: request.param)
    return request.param


def linear_layer(tokens: int, inputs: int = 64) -> None:
    x, grad, weight = normal(tokens, inputs), normal(tokens, 48), normal(48, inputs)
    threshold = thresholds(weight.shape, "row")
    ops.masked_linear(x, weight, threshold, None, 0.01, "triton")
    ops.masked_linear_grad_input(grad, weight, threshold, "triton")
    ops.masked_linear_grad_weight(grad, x, weight, threshold, *LONG_TAILED, "triton")


def convolution(batch: int, height: int, width: int, channels: int = 16) -> None:
    weight = normal(32, channels, 3, 3)
    x = normal(batch, channels, height, width).to(memory_format=torch.channels_last)
    grad = normal(batch, 32, height, width).to(memory_format=torch.channels_last)
    threshold, geometry = thresholds(weight.shape, "row"), ((1, 1), (1, 1), (1, 1), 1)
    ops.masked_conv(x, weight, threshold, None, None, *geometry, "triton")
    ops.masked_conv_grad_input(grad, x.shape, weight, threshold, *geometry, "triton")
    ops.masked_conv_grad_weight(grad, x, weight, threshold, *geometry, *LONG_TAILED, "triton")


def assert_compiled_once(keys, run, first, *others) -> None:
    """All kernels have the same keys after the others as after the first."""
    run(*first)
    before = {name: set(found) for name, found in keys.items()}
    for sizes in others:
        run(*sizes)
    assert keys == before


def test_a_linear_layer_compiles_once_for_all_numbers_of_tokens(keys, gradient_tile):
    assert_compiled_once(keys, linear_layer, (1024,), (1000,), (17,), (1,))
    gradients = (
        {"slabs_kernel", "post_kernel"} if gradient_tile == SPLIT else {"grad_weight_kernel"}
    )
    assert keys.keys() == {"product_kernel", "finish_kernel"} | gradients
    assert len(keys["product_kernel"]) == 2, "forward, and dX"
    linear_layer(1024, inputs=60)
    assert len(keys["product_kernel"]) == 4, "a length that is no multiple of 16 is another kernel"


def test_a_convolution_compiles_once_for_all_images(keys, gradient_tile):
    assert_compiled_once(keys, convolution, (16, 16, 16), (1, 16, 16), (3, 17, 9), (1, 1, 5))
    assert len(keys["conv_product_kernel"]) == 2
    convolution(16, 16, 16, channels=12)
    assert len(keys["conv_product_kernel"]) == 4
