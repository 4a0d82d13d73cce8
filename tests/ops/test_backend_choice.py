"""Which backend serves: names, the environment's say, and no silent replacement."""

from __future__ import annotations

import pytest
import torch

import dst_kernels.functional as dst
from dst_kernels import reference
from dst_kernels.backends import ENVIRONMENT_VARIABLE, choice, implementation, serving, unavailable
from dst_kernels.backends.compiled import library
from dst_kernels.nn import MaskedConv2d, MaskedLinear

try:
    from dst_kernels.backends import triton  # before a fixture takes TRITON_INTERPRET away
except ImportError:
    triton = None

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
UNAVAILABLE = ["triton", "cuda"]  # to tensors on a CPU
BEST = "reference" if library.unavailable("cpu") else "cpu"


@pytest.fixture
def libraries(monkeypatch):
    """Both as if they were there; or those that a call of the fixture names."""

    def there(*names):
        reasons = {"cpu": "no library for the CPU", "cuda": "no library for CUDA"}
        for name in names:
            reasons[name] = None
        monkeypatch.setattr(library, "unavailable", reasons.get)
        choice.forget()

    there("cpu", "cuda")
    return there


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it lets Triton serve CPU tensors
    choice.forget()
    yield
    choice.forget()


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


@pytest.mark.parametrize("name", ["numpy", "", "Reference", "gpu"])
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


def test_the_devices_that_each_serves(monkeypatch, libraries):
    for name in ("triton", "cuda"):
        assert "CUDA device, but these are on cpu" in unavailable(name, CPU)
        assert "but these are on meta" in unavailable(name, META)
        assert unavailable(name, CUDA) is None
    assert unavailable("cpu", CPU) is None
    assert unavailable("cpu", CUDA) == "it needs tensors on a CPU, not on cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert unavailable("triton", CPU) is None


def test_auto_takes_the_best_that_is_there(monkeypatch, libraries):
    assert serving("auto", CUDA) == ("cuda", "triton")
    assert serving("auto", CPU) == ("cpu",)
    assert serving("auto", META) == serving("auto", None) == ("reference",)
    libraries()
    assert serving("auto", CUDA) == ("triton",)
    assert serving("auto", CPU) == ("reference",)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert serving("auto", CPU) == ("reference",), "an interpreter is no choice but one by name"


@pytest.mark.skipif(BEST != "cpu", reason="the library for the CPU is not built")
@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_auto_takes_the_best_for_each_op(libraries):
    from dst_kernels.backends.compiled import ops

    for device in (CPU, CUDA):
        for op in ("masked_weight", "masked_weight_backward", "effective_threshold"):
            assert implementation("auto", device, op) is getattr(ops, op)
        for op in ("masked_weights", "masked_weights_backward"):
            assert implementation("auto", device, op) is getattr(ops, op)
    for op in ("masked_linear", "masked_conv"):
        assert implementation("auto", CUDA, op) is getattr(triton, op)
        assert implementation("auto", CPU, op) is getattr(reference, op)


@pytest.mark.skipif(BEST != "cpu", reason="the library for the CPU is not built")
@pytest.mark.parametrize("backend, device", [("cpu", CPU), ("cuda", CUDA)])
def test_compiled_backends_have_no_fused_products(monkeypatch, libraries, backend, device):
    expected = f"the {backend} backend has no fused masked_linear: use path='packed' or"
    with pytest.raises(RuntimeError, match=expected):
        implementation(backend, device, "masked_linear")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    with pytest.raises(RuntimeError, match=expected):
        implementation("auto", device, "masked_linear")


def test_float64_on_a_gpu_is_refused_by_name_and_served_otherwise_by_auto(libraries):
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot serve: .*not float64"):
        implementation("cuda", CUDA, "masked_weight", double=True)
    assert serving("auto", CUDA, double=True) == ("triton",)
    assert serving("auto", CPU, double=True) == ("cpu",)


@pytest.mark.skipif(BEST != "cpu", reason="the library for the CPU is not built")
@pytest.mark.parametrize("compiled", [False, True])
def test_path_auto_serves_with_the_cpu_backend_and_a_fused_one_is_refused(compiled):
    def run(path):
        linear = MaskedLinear(3, 4, backend="cpu", path=path)
        convolution = MaskedConv2d(3, 4, 1, backend="cpu", path=path)
        for layer, shape in ((linear, [2, 3]), (convolution, [1, 3, 2, 2])):
            call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
            call(torch.ones(shape)).sum().backward()
            assert layer.threshold.grad is not None

    run("auto")
    run("packed")
    for path in ("fused", "mixed"):
        with pytest.raises(RuntimeError, match=r"cpu backend has no fused \w+: use path="):
            run(path)


def test_a_gpu_that_is_too_old_is_refused_with_its_capability(monkeypatch, libraries):
    monkeypatch.setattr(choice, "capability", lambda device: (7, 5))
    device = torch.device("cuda:1")
    for name in ("triton", "cuda"):
        assert "8.0 or higher, but cuda:1 has 7.5" in unavailable(name, device)
    assert serving("auto", device) == ("reference",)


def test_environment_is_read_at_the_call_not_at_import(monkeypatch):
    first = implementation("auto", CPU, "masked_weight")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert implementation("auto", CPU, "masked_weight") is reference.masked_weight
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert implementation("auto", CPU, "masked_weight") is first
