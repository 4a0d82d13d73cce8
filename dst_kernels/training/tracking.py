"""Write what --track asks for: scalars and histograms of thresholds, for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import RunConfig
from .errors import UsageError
from .files import TRACKED, Record, cannot_write
from .loop import Observer
from .masks import COLUMNS
from .results import thresholds_by_layer
from .state import State

_LARGEST = 1e20  # the end of the histograms' last bin


def require_tracker(config: RunConfig) -> None:
    """Raise UsageError if the package that --track needs is not installed."""
    if config.track != "none":
        _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--track 'tensorboard' needs the package tensorboard, which cannot be imported here "
            f"({error}). Accepted: 'tensorboard' after pip install 'dst_kernels[tensorboard]', "
            "or none."
        ) from error
    return SummaryWriter


@contextmanager
def track(config: RunConfig, directory: Path, state: State) -> Iterator[Observer]:
    """Give an observer that writes each epoch into the run's folder, if --track asks for it."""
    if config.track == "none":
        yield Observer()
        return
    tracker = _TensorBoard(config, directory / TRACKED, state)
    try:
        yield tracker
    finally:
        tracker.writer.close()


class _TensorBoard(Observer):
    """Write each epoch's figures, and the thresholds, as events that TensorBoard reads."""

    def __init__(self, config: RunConfig, directory: Path, state: State) -> None:
        self.task, self.state, self.directory = config.task, state, directory
        # TensorBoard drops what a stopped run wrote from this epoch on.
        finished = len(state.history)
        try:
            self.writer = _writer()(str(directory), purge_step=finished or None)
        except OSError as error:
            raise cannot_write(directory, error) from error
        if finished:  # the run may have been stopped between saving this epoch and writing it
            self.epoch(state.history[-1])

    def epoch(self, record: Record) -> None:
        epoch, task = record["epoch"], self.task
        scalars = {
            "learning rate": record["lr"],
            "remaining ratio": record["remaining_ratio"],
            **{f"masks/{name}": record[name] for name in COLUMNS if name in record},
            **{f"remaining ratio by layer/{name}": r for name, r in record["layers"].items()},
        }
        for split in ("train", "validation", "test"):
            if f"{split}_loss" in record:
                scalars[f"loss/{split}"] = record[f"{split}_loss"]
            if f"{split}_{task.quality}" in record:
                scalars[f"{task.quality}/{split}"] = record[f"{split}_{task.quality}"]
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, epoch)
            for name, threshold in thresholds_by_layer(self.state).items():
                values = threshold.float().flatten()
                values = values[values.abs() < _LARGEST]  # not NaN either
                if len(values):
                    self.writer.add_histogram(f"thresholds/{name}", values, epoch)
            self.writer.flush()
        except OSError as error:
            raise cannot_write(self.directory, error) from error
