"""With thresholds at -1, which prune nothing and silence the surrogate, layers are their parents.

The samples are those that torch tests its own layers with, and every padding mode on top.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

from dst_kernels.nn import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose1d,
    MaskedConvTranspose2d,
    MaskedConvTranspose3d,
    MaskedLinear,
)

MASKED = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
    nn.ConvTranspose1d: MaskedConvTranspose1d,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.ConvTranspose3d: MaskedConvTranspose3d,
}
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
every_parent = pytest.mark.parametrize("parent", MASKED, ids=lambda cls: cls.__name__)
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# In a process of its own: to import torch's test helpers is to change global settings of torch.
WRITE_SAMPLES = """
import sys, torch
from torch import nn
from torch.testing._internal import common_modules

samples = {}
for name in sys.argv[2:]:
    parent = getattr(nn, name)
    (info,) = [info for info in common_modules.module_db if info.module_cls is parent]
    for dtype in (torch.float32, torch.float64):
        for training in (True, False):
            samples[name, dtype, training] = [
                (
                    sample.constructor_input.args,
                    sample.constructor_input.kwargs,
                    [*sample.forward_input.args, *sample.forward_input.kwargs.values()],
                )
                for sample in info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=False, training=training
                )
            ]
torch.save(samples, sys.argv[1])
"""


@pytest.fixture(scope="module")
def torch_samples(tmp_path_factory):
    """{(parent's name, dtype, training): [(constructor args, kwargs, [input])]}."""
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    names = [parent.__name__ for parent in MASKED]
    subprocess.run([sys.executable, "-c", WRITE_SAMPLES, path, *names], check=True, timeout=120)
    return torch.load(path)


def assert_same_as_parent(parent, args, kwargs, input, training, **options):
    """Build both from the same arguments; compare outputs bit for bit and all gradients closely."""
    dense = parent(*args, **kwargs, dtype=input.dtype).train(training)
    masked = MASKED[parent](*args, **kwargs, dtype=input.dtype).train(training)
    masked.load_state_dict(dense.state_dict())
    masked.reset_threshold(-1.0)
    inputs = [input.detach().clone().requires_grad_() for _ in range(2)]
    expected, actual = dense(inputs[0], **options), masked(inputs[1], **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    tolerance = TOLERANCE[input.dtype]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **tolerance)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(
            masked.get_parameter(name).grad, parameter.grad, msg=name, **tolerance
        )
    assert torch.count_nonzero(masked.threshold.grad) == 0


@pytest.mark.slow  # its fixture
@every_parent
def test_torchs_own_samples(torch_samples, parent):
    for dtype, training in itertools.product(TOLERANCE, (True, False)):
        samples = torch_samples[parent.__name__, dtype, training]
        assert len(samples) >= 2
        for args, kwargs, (input,) in samples:
            assert_same_as_parent(parent, args, kwargs, input, training)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["valid", "same", 1, "per_dimension"])
@pytest.mark.parametrize("batched", [True, False])
@every_dtype
def test_every_padding_mode(spatial, padding_mode, padding, batched, dtype):
    parent = CONVS[spatial - 1]
    if padding == "per_dimension":
        padding = (2, 0, 1)[:spatial]
    torch.manual_seed(0)
    input = torch.randn(*([2] if batched else []), 4, *(6, 5, 7)[:spatial], dtype=dtype)
    kernel = (4, 3, 2)[:spatial]  # even sizes: "same" pads one side more than the other
    kwargs = {"padding": padding, "padding_mode": padding_mode, "bias": batched}
    assert_same_as_parent(parent, (4, 6, kernel), kwargs, input, training=True)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_stride_dilation_groups(spatial):
    parent = CONVS[spatial - 1]
    torch.manual_seed(0)
    input = torch.randn(2, 4, *(9, 8, 7)[:spatial], dtype=torch.float64)
    for stride, dilation, groups in itertools.product([1, 2], [1, 2], [1, 2, 4]):
        args = (4, 8, 3, stride, 1, dilation, groups)
        assert_same_as_parent(parent, args, {}, input, training=True)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_geometry_of_transposed_convolutions(spatial, batched):
    parent = TRANSPOSED[spatial - 1]
    torch.manual_seed(0)
    input = torch.randn(*([2] if batched else []), 4, *(3, 2, 4)[:spatial], dtype=torch.float64)
    for stride, padding, dilation, groups in itertools.product([1, 2], [0, 1], [1, 2], [1, 2, 4]):
        for extra in range(max(stride, dilation)):
            args = (4, 8, (3, 2, 3)[:spatial], stride, padding, extra, groups, batched, dilation)
            assert_same_as_parent(parent, args, {}, input, training=True)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_the_output_s_size_can_be_asked_for(spatial):
    parent = TRANSPOSED[spatial - 1]
    input = torch.randn(2, 4, *(5,) * spatial, dtype=torch.float64)
    args = (4, 6, 3, 2, 1)
    for size in (9, 10):
        options = {"output_size": [size] * spatial}
        assert_same_as_parent(parent, args, {}, input, training=True, **options)
        assert MASKED[parent](*args).double()(input, **options).shape[2:] == (size,) * spatial
    for size in (8, 11):
        with pytest.raises(ValueError, match="requested an output size"):
            MASKED[parent](*args)(input, [size] * spatial)


@pytest.mark.parametrize("parent", TRANSPOSED)
def test_transposed_convolutions_pad_with_zeros_only_as_their_parents(parent):
    for cls in (parent, MASKED[parent]):
        with pytest.raises(ValueError, match=r"Only.*zeros"):
            cls(2, 2, 3, padding_mode="circular")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "spatial, channels_last", [(2, torch.channels_last), (3, torch.channels_last_3d)]
)
def test_channels_last_model_and_input(spatial, channels_last, transposed):
    parent = (TRANSPOSED if transposed else CONVS)[spatial - 1]
    dense = parent(4, 8, 3, groups=2).to(memory_format=channels_last)
    masked = MASKED[parent].from_dense(dense)
    masked.reset_threshold(-1.0)
    input = torch.randn(2, 4, *(5, 6, 7)[:spatial]).to(memory_format=channels_last)
    expected, actual = dense(input), masked(input)
    assert actual.stride() == expected.stride()
    assert transposed or actual.is_contiguous(memory_format=channels_last)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_linear_takes_any_leading_dimensions():
    dense = nn.Linear(3, 5)
    masked = MaskedLinear.from_dense(dense)
    masked.reset_threshold(-1.0)
    for shape in [(3,), (1, 3), (0, 3), (2, 4, 3), (2, 0, 3), (2, 3, 4, 3)]:
        input = torch.randn(shape)
        torch.testing.assert_close(masked(input), dense(input), rtol=0, atol=0)


@every_parent
def test_outputs_may_be_modified_in_place(parent):
    """`nn.ReLU(inplace=True)` and `x += y` after a layer; an output that is a view would refuse."""
    for bias in (True, False):
        if parent is nn.Linear:
            args, shapes = (4, 4), [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)]
        else:
            args, spatial = (4, 4, 2), (5,) * int(parent.__name__[-2])
            shapes = [(4, *spatial), (2, 4, *spatial)]
        for shape in shapes:
            layer = MASKED[parent](*args, bias=bias)
            input = torch.randn(shape)
            expected = (layer(input) + 1).relu()
            actual = nn.functional.relu_(layer(input).add_(1))
            assert torch.equal(actual, expected)
            actual.sum().backward()
            assert layer.weight.grad is not None
