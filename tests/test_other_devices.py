"""Devices that no kernel of ours is for: AMD's, Intel's and Apple's GPUs get the reference."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import dst_kernels
from dst_kernels import optim, reference
from dst_kernels.backends import choice, implementation, serving, unavailable
from dst_kernels.nn import MaskedConv2d, MaskedLayer, MaskedLinear, MaskedRNN, cudnn_buffer
from dst_kernels.nn.sources.grouped import can_be_grouped
from dst_kernels.training import device as of_training
from dst_kernels.training import state
from dst_kernels.training.errors import UsageError

HIP = torch.device("cuda", 0)


@pytest.fixture
def amd(monkeypatch):
    """A torch for ROCm: its devices are named "cuda", and an MI300 says that it is a 9.4."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(choice, "capability", lambda device: (9, 4))
    monkeypatch.setattr(choice.library, "unavailable", lambda name: None)
    choice.forget()
    yield
    monkeypatch.undo()
    choice.forget()


def test_an_amd_gpu_gets_the_reference(amd):
    assert serving("auto", HIP) == ("reference",)
    for op in ("masked_weight", "masked_weights_backward", "masked_linear", "sgd_step_"):
        assert implementation("auto", HIP, op) is getattr(reference, op)
    for name in ("triton", "cuda"):
        assert unavailable(name, HIP) == "its kernels are written for NVIDIA GPUs"
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot serve: .*NVIDIA GPUs"):
            serving(name, HIP)


def test_an_amd_gpu_s_recurrent_parameters_lie_apart(monkeypatch):
    """MIOpen has no function that flattens them, though `is_acceptable` says yes for it."""
    monkeypatch.setattr(torch, "_use_cudnn_rnn_flatten_weight", lambda: False)
    monkeypatch.setattr(cudnn_buffer, "cudnn_takes", lambda dtype, device: True)
    shapes = [torch.Size([8, 3]), torch.Size([8, 2])]
    made = cudnn_buffer.empty_parameters(nn.LSTM(3, 2), shapes, torch.float32, torch.device("cpu"))
    assert [tensor.shape for tensor in made] == shapes
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 2


@pytest.mark.parametrize("kind", ["xpu", "mps", "hpu", "meta"])
def test_other_kinds_of_devices_get_the_reference(kind):
    device = torch.device(kind, 0)
    assert serving("auto", device) == ("reference",)
    for name in ("triton", "cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"backend='{name}' cannot serve: .* on"):
            serving(name, device)


def test_runs_take_the_gpu_that_torch_finds(monkeypatch):
    def found(**counts):
        for kind in ("cuda", "xpu", "mps"):
            count = counts.get(kind, 0)
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)

    select = of_training.select_device
    found(xpu=2)
    assert select("auto") == torch.device("xpu") and select("xpu:1") == torch.device("xpu:1")
    found(cuda=1, xpu=1)
    assert select("auto") == torch.device("cuda")
    found(mps=1)
    assert select("auto") == torch.device("cpu"), "it lacks operations and dtypes: by name only"
    assert select("mps") == torch.device("mps")
    assert of_training.device_name(select("mps")) == "mps"
    for missing in ("xpu", "cuda", "mps:1"):
        with pytest.raises(UsageError, match=f"--device '{missing}': torch finds no such device"):
            select(missing)


def test_a_run_keeps_the_generators_of_its_device(monkeypatch):
    kept = torch.arange(16, dtype=torch.uint8)
    given = []
    monkeypatch.setattr(torch.xpu, "get_rng_state", lambda device: kept)
    monkeypatch.setattr(torch.xpu, "set_rng_state", given.append)
    states = state.rng_states(torch.device("xpu"))
    assert states["xpu"] is kept
    state.set_rng_states(states)
    assert not given, "there is no such device here"
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    state.set_rng_states(states)
    assert given == [kept]


# -- on a made-up device, in a process of its own --------------------------------------------------


def test_all_of_it_runs_on_a_device_without_kernels_and_without_float64():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


INPUT = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _network():
    torch.manual_seed(1)
    convolution = MaskedConv2d(3, 4, 3)
    linear = MaskedLinear(64, 16, granularity="element"), MaskedLinear(16, 5, granularity="layer")
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear[0], nn.ReLU(), linear[1])


def _trained(device: str, make, *, prepare=lambda model: None, autocast=False):
    """All parameters after three steps."""
    model = _network().to(device)
    kept = prepare(model)  # of a group
    groups = dst_kernels.parameter_groups(model, lr=0.05)
    optimizer = make(model, groups)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            output = model(INPUT.to(device))
        loss = output.float().square().mean()
        if not isinstance(optimizer, (optim.DSTSGD, optim.DSTAdamW)):
            loss = loss + 1e-3 * dst_kernels.sparse_regularization(model)
        loss.backward()
        if isinstance(optimizer, optim.DSTSGD):
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    del kept
    assert str(dst_kernels.sparsity_report(model))
    assert not dst_kernels.check_masks(model, INPUT.to(device))
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def _elsewhere() -> None:
    import elsewhere

    def sgd(model, groups):
        return torch.optim.SGD(groups, lr=0.05)

    def deferred(model, groups):
        rate = torch.tensor(0.05, device=next(model.parameters()).device)
        return optim.DSTSGD(model, [{**g, "lr": rate} for g in groups], lr=0.05, alpha=1e-3)

    cases = {
        "layer by layer": {"make": sgd},
        "grouped": {"make": sgd, "prepare": dst_kernels.group_},
        "in autocast": {"make": sgd, "autocast": True},
        "grouped in autocast": {"make": sgd, "prepare": dst_kernels.group_, "autocast": True},
        "deferred": {"make": deferred},
        "deferred AdamW": {
            "make": lambda model, groups: optim.DSTAdamW(model, groups, lr=0.01, alpha=1e-3)
        },
        "fixed masks": {"make": deferred, "prepare": dst_kernels.freeze_masks_},
    }
    for name, case in cases.items():
        expected = _trained("cpu", **case)
        rounding = 2e-2 if case.get("autocast") else 1e-6
        made = _trained(elsewhere.NAME, **case)
        torch.testing.assert_close(made, expected, rtol=rounding, atol=rounding, msg=name)

    model = _network().to(elsewhere.NAME)
    assert all(can_be_grouped(layer) for layer in model if isinstance(layer, MaskedLayer))
    for backend in ("triton", "cuda", "cpu"):
        layer = MaskedLinear(3, 4, device=elsewhere.NAME)
        layer.backend = backend
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot serve: .*elsewhere:0"):
            layer(torch.ones(2, 3, device=elsewhere.NAME))

    many = torch.ones(2**12, 2**12 + 1, device=elsewhere.NAME)
    at_limit = torch.ones(2**12, device=elsewhere.NAME)
    assert dst_kernels.functional.effective_threshold(many, at_limit).sum().item() == 0
    rnn = MaskedRNN(3, 4, device=elsewhere.NAME)
    rnn(torch.ones(2, 1, 3, device=elsewhere.NAME))[0].sum().backward()
    dst_kernels.finalize_(model.eval())


if __name__ == "__main__":
    _elsewhere()
