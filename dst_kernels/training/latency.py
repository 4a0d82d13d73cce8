"""Time an exported model on the CPU, beside the dense network and onnxruntime."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from .display import percent
from .export import dense_bytes, dense_model, example, read_export

_BATCHES = (1, 8, 64)
_TURN = 0.0005  # seconds of one contender, before the next one's turn
_ROUNDS, _FEWEST_ROUNDS = 201, 5
_LONGEST = 10.0  # seconds for all rounds of one batch size, if the fewest allow it

Call = Callable[[], object]


def bench(file: Path, threads: int, console: Console) -> None:
    """Print how long a forward of the model in `file` takes, and how large the file is.

    The dense network has the same layers, whole and without zeros; onnxruntime, where it is
    installed, runs that one. Raises UsageError for a file that was not exported.
    """
    exported = read_export(file)
    dense = dense_model(exported.config, exported.shape, exported.classes)
    torch.set_num_threads(threads)
    table = Table(box=SIMPLE_HEAD, header_style="dim")
    others = ("dense", "onnxruntime")
    for name in ("batch", "this file", *others, *(f"{name} ÷ file" for name in others)):
        table.add_column(name, justify="right", no_wrap=True)
    left_out = ""
    for batch in _BATCHES:
        input = example(exported.shape, exported.classes, batch)
        calls = {"file": _in_torch(exported.model, input), "dense": _in_torch(dense, input)}
        if not left_out:
            made = _in_onnxruntime(dense, input, threads)
            if isinstance(made, str):
                left_out = made
            else:
                calls["onnxruntime"] = made
        rounds = take_turns(calls)
        times = {name: 1e6 * median(seconds) for name, seconds in rounds.items()}
        faster = {
            name: median(a / b for a, b in zip(seconds, rounds["file"], strict=True))
            for name, seconds in rounds.items()
        }
        table.add_row(
            str(batch),
            *(f"{times[name]:,.0f} µs" if name in times else "-" for name in ("file", *others)),
            *(f"[bold]{faster[name]:.2f}[/]" if name in faster else "-" for name in others),
        )
    console.print(f"\n[bold]{escape(str(file))}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"{exported.config.model}, one forward on {threads} CPU thread{'s' * (threads > 1)}, "
        "medians; where a quotient is above 1, this file is faster",
        highlight=False,
    )
    console.print(table)
    if left_out:
        console.print(f"onnxruntime: {left_out}", highlight=False)
    size, whole = file.stat().st_size, dense_bytes(dense)
    console.print(
        f"on disk: {size:,} bytes, [bold]{percent(size / whole)}[/] of the {whole:,} of the dense "
        "model",
        highlight=False,
    )


def take_turns(calls: dict[str, Call], turn: float = _TURN) -> dict[str, list[float]]:
    """Return the seconds of one call in each round, by name.

    In a round every contender is called for about `turn` seconds, in an order of its own, so that
    what else the machine does, and what a call leaves in caches to the next, meets all of them.
    """
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, round(turn / _seconds(call, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    started = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= _FEWEST_ROUNDS and time.perf_counter() - started > _LONGEST:
            break
        random.Random(done).shuffle(order)
        for name in order:
            seconds[name].append(_seconds(calls[name], counts[name]))
    return seconds


def _seconds(call: Call, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _in_torch(model: nn.Module, input: Tensor) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(input)

    return call


def _in_onnxruntime(model: nn.Module, input: Tensor, threads: int) -> Call | str:
    """Return a call of the model in onnxruntime, or why there is none."""
    missing = [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        return f"not timed, as these are not installed: {', '.join(missing)}"
    import onnxruntime

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(model, (input,), dynamo=True, verbose=False)
        file = program.model_proto.SerializeToString()
        options: Any = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        inputs = {session.get_inputs()[0].name: input.numpy()}
        session.run(None, inputs)
    except Exception as error:  # of any kind: an exporter and an engine for every network
        return f"not timed, since it cannot run this network ({type(error).__name__})"
    return lambda: session.run(None, inputs)
