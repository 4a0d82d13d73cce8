"""Writes predictions as rows of results.csv, so that what reads measurements reads them, too.

Written before anything is measured: what came can then be held against what was expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .cases import LINEAR, AnyCase, ListCase, ModelCase
from .ceilings import CEILING, COPY, GEMM
from .environment import Environment, is_predicted
from .errors import UsageError
from .goals import GOALS
from .kinds import providers_for
from .machine import Figure, Machine
from .measurements import Measurements
from .predict_layers import predict_layer, predict_list
from .predict_models import predict_model
from .results import SKIPPED, ResultsFile, Row, Run, read_results
from .suites import SUITES

__all__ = ["predict", "predict_case"]

_SUITES = ("model", "steps", "streaming", "linear", "conv")
_NO_PROLOGUE = "no estimate of the product that Inductor would make"
_NO_RECURRENT = "nothing to count: cuDNN runs a sequence in kernels of its own"


def predict(machine: Machine, folder: Path, *, goals_only: bool = False) -> Path:
    """Write FOLDER/results.csv for one machine; earlier predictions there are replaced.

    `goals_only` leaves out what no goal reads, which is most. Raises UsageError where the file
    holds measurements.
    """
    path = folder / "results.csv"
    if path.exists():
        measured = sorted({row.gpu for row in read_results(path) if not is_predicted(row.gpu)})
        if measured:
            raise UsageError(
                f"--out is {folder}, whose results.csv was measured on {', '.join(measured)}. "
                "Accepted: a folder for predictions alone."
            )
        path.unlink()
    with ResultsFile(path) as file:
        run = Run(file, Environment.of_prediction(machine.name))
        for name in _SUITES:
            run.add(name, COPY, CEILING, "forward", "bandwidth", machine.copy, "B/s")
            run.add(name, GEMM, CEILING, "forward", "flops", machine.bf16, "FLOP/s")
            for case in SUITES[name].cases:
                for provider, reason in _not_predicted(case).items():
                    run.add(name, case, provider, "", SKIPPED, reason)
                if not _is_recurrent(case):
                    for figure in predict_case(case, machine):
                        run.add(name, case, *figure)
    if goals_only:
        _keep_what_goals_read(path)
    return path


def _not_predicted(case: AnyCase) -> dict[str, str]:
    """Providers that somebody might look for, and why they are not there."""
    if _is_recurrent(case):
        return dict.fromkeys((one.name for one in providers_for(case.op)), _NO_RECURRENT)
    return {"dst_compiled_forced_prologue": _NO_PROLOGUE} if case.op == LINEAR else {}


def _is_recurrent(case: AnyCase) -> bool:
    return isinstance(case, ModelCase) and case.model.startswith("lstm-")


def predict_case(case: AnyCase, machine: Machine) -> Iterator[Figure]:
    """The figures of all providers."""
    if isinstance(case, ModelCase):
        return predict_model(case, machine)
    if isinstance(case, ListCase):
        return predict_list(case, machine)
    return predict_layer(case, machine)


class _Read(Measurements):
    """Notes which figures are asked for."""

    def __init__(self, gpu: str, rows: Sequence[Row]) -> None:
        super().__init__(gpu, rows)
        self.asked: set[tuple[str, str, str, str]] = set()

    def figures(self, case: str, provider: str, pass_name: str, metric: str) -> dict[str, float]:
        self.asked.add((case, provider, pass_name, metric))
        return super().figures(case, provider, pass_name, metric)


def _keep_what_goals_read(path: Path) -> None:
    rows = read_results(path)
    found = _Read(rows[0].gpu, rows)
    for goal in GOALS:
        goal.figure(found)
    whose = {key[:2] for key in found.asked}
    path.unlink()
    with ResultsFile(path) as file:
        for row in rows:
            asked = (row.case, row.provider, row.pass_, row.metric) in found.asked
            if asked or (row.metric == SKIPPED and (row.case, row.provider) in whose):
                file.add(row)
