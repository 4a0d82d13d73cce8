"""Compares what a sweep compiles ahead with what launches look for; needs no GPU, no interpreter.

A meta tensor must lead to the binary that a tensor with numbers leads to: Triton specialises on
addresses and strides. Keys of Triton's cache in memory tell binaries apart.
"""

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.cases import ConvCase, LinearCase, WeightsCase
from bench.tune import PRODUCTS, launches_on

LAYERS = (LinearCase(64, 256, 128), LinearCase(65, 200, 100, dtype="tf32"))
CONVS = (ConvCase(2, 9, 16, 32, 3, stride=2), ConvCase(2, 8, 16, 24, 1, dtype="bf16"))
OTHERS = (ConvCase(2, 9, 3, 32, 7, stride=2, dtype="fp16-autocast"), WeightsCase("256x512"))
now = {"target": GPUTarget("cuda", 90, 32), "device": 0, "stream": 0}
now = {f"get_current_{name}": lambda *_, value=value: value for name, value in now.items()}
driver.set_active(SimpleNamespace(**now))
keys: set[tuple[str, str]] = set()
launch = JITFunction.run
JITFunction._do_compile = lambda self, key, *_: keys.add((self.__name__, str(key)))


def compile_only(self, *args, warmup, **options) -> None:
    launch(self, *args, warmup=True, **options)


pairs = [(case, name) for case in (*LAYERS, *CONVS, *OTHERS) for name in PRODUCTS[case.op]]
for pair in pairs:
    found = []
    for device in ("meta", "cpu"):
        keys.clear()
        assert len(launches_on(device, *pair, compile_only).tiles) > 1
        found.append(set(keys))
    assert found[0] == found[1] != set(), (pair, found[0] ^ found[1])
print(f"{len(pairs)} products, all the same")
