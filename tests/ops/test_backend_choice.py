"""Which backend serves: names, the environment's say, and no silent replacement."""

from __future__ import annotations

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels import _backends, reference
from dst_kernels._backends import ENVIRONMENT_VARIABLE, implementation, resolve, unavailable
from dst_kernels.nn import MaskedConv2d, MaskedLinear

CPU = torch.device("cpu")
UNAVAILABLE = ["triton", "cuda"]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it lets Triton serve CPU tensors


def runs(**backend):
    """Calls of every public op that takes a backend, as functions without arguments."""
    weight, threshold = torch.ones(4, 3), torch.zeros(4)
    return [
        lambda: dst.effective_threshold(weight, threshold, **backend),
        lambda: dst.masked_linear(torch.ones(2, 3), weight, threshold, **backend),
        lambda: dst.masked_conv1d(torch.ones(1, 3, 2), weight[..., None], threshold, **backend),
        lambda: dst.masked_conv2d(
            torch.ones(1, 3, 2, 2), weight[..., None, None], threshold, **backend
        ),
        lambda: dst.masked_conv3d(
            torch.ones(1, 3, 2, 2, 2), weight[..., None, None, None], threshold, **backend
        ),
    ]


@pytest.mark.parametrize("backend", [None, "auto", "reference"])
def test_these_always_serve(backend):
    for run in runs(**({} if backend is None else {"backend": backend})):
        assert run().isfinite().all()
    MaskedLinear(3, 4, backend=backend or "auto")


@pytest.mark.parametrize("name", ["numpy", "", "Reference", "cpu"])
def test_unknown_name(name):
    for run in runs(backend=name):
        with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*but is"):
            run()
    for layer in (
        lambda: MaskedLinear(3, 4, backend=name),
        lambda: MaskedConv2d(3, 4, 1, backend=name),
    ):
        with pytest.raises(ValueError, match=f"but is {name!r}"):
            layer()


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_unavailable_backend_says_why_and_what_to_do(name):
    expected = f"backend='{name}' cannot serve: .+ Use backend='auto' or 'reference'"
    for run in runs(backend=name):
        with pytest.raises(RuntimeError, match=expected):
            run()
    if unavailable(name) is not None:  # on any device: a layer may still move to another
        with pytest.raises(RuntimeError, match=expected):
            MaskedLinear(3, 4, backend=name)


def test_environment_overrides_auto(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    for run in runs():
        assert run().isfinite().all()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    for run in runs():
        assert run().isfinite().all()


def test_environment_with_an_unknown_name(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fastest")
    for run in runs():
        with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE} must be one of .*'fastest'"):
            run()


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_environment_with_an_unavailable_backend(monkeypatch, name):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    for run in runs():
        with pytest.raises(RuntimeError, match=f"{ENVIRONMENT_VARIABLE}='{name}' cannot serve"):
            run()


@pytest.mark.parametrize("value", ["fastest", *UNAVAILABLE])
def test_a_backend_named_in_the_call_wins_over_the_environment(monkeypatch, value):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
    for run in runs(backend="reference"):
        assert run().isfinite().all()


def test_the_devices_triton_serves(monkeypatch):
    assert "CUDA device, but these are on cpu" in unavailable("triton", CPU)
    assert "but these are on meta" in unavailable("triton", torch.device("meta"))
    assert unavailable("triton", torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable("triton", CPU) is None


def test_auto_takes_triton_on_a_gpu_and_the_reference_elsewhere(monkeypatch):
    assert resolve("auto", torch.device("cuda")) == "triton"
    assert resolve("auto", CPU) == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("auto", CPU) == "reference", "an interpreter is no choice but one by name"


def test_a_gpu_that_is_too_old_is_refused_with_its_capability(monkeypatch):
    monkeypatch.setattr(_backends, "capability", lambda device: (7, 5))
    assert "8.0 or higher, but cuda:1 has 7.5" in unavailable("triton", torch.device("cuda:1"))
    assert resolve("auto", torch.device("cuda:1")) == "reference"


def test_environment_is_read_at_the_call_not_at_import(monkeypatch):
    first = implementation("auto", CPU, "masked_linear")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert implementation("auto", CPU, "masked_linear") is reference.masked_linear
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert implementation("auto", CPU, "masked_linear") is first
