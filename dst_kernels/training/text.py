"""Read a text file as the ids of its characters, and cut windows from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .errors import UsageError
from .sharing import WHOLE, Batch, Share

CONTEXT = 128  # characters that a language model sees at once
HELD_OUT = 0.1  # share of the file, at its end, that is not trained on
_ACCEPTED = "Accepted: a text file in UTF-8 of at least {} characters."


class TextBatches:
    """Keep a part of a text on the device, as ids [length] (int32) of its characters.

    Batches are inputs and targets [N, context] (int64): each target is the next character.
    Shuffled windows start anywhere, in number as many as the part holds; those in order follow
    each other, and a rest shorter than a window is left out.
    """

    def __init__(self, ids: Tensor, batch_size: int, context: int = CONTEXT) -> None:
        self.ids, self.batch_size, self.context = ids, batch_size, context
        self.windows = (len(ids) - 1) // context

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size)

    def epoch(self, generator: torch.Generator | None, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield inputs and targets; the generator chooses the windows, without one in order."""
        device = self.ids.device
        if generator is None:
            starts = torch.arange(self.windows) * self.context
        else:
            most = len(self.ids) - self.context
            starts = torch.randint(most, (self.windows,), generator=generator)
        offsets = torch.arange(self.context + 1, device=device)
        batches = starts.to(device).split(self.batch_size)
        for first, weight in (part for batch in batches for part in share.of(batch)):
            windows = self.ids[first[:, None] + offsets].long()
            yield Batch(windows[:, :-1], windows[:, 1:], weight)


def read_text(path: str, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Return the ids of the part to train on and of that held out, and the vocabulary.

    The vocabulary has each character of the file once, in the order of Unicode; an id is the place
    in it. Raises UsageError if the file cannot be read, is not UTF-8 or is too short.
    """
    least = next(n for n in range(CONTEXT, 100 * CONTEXT) if n - _train_length(n) > CONTEXT)
    accepted = _ACCEPTED.format(f"{least:,}")
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"--data-dir {path!r} cannot be read: {error.strerror}. {accepted}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data-dir {path!r} is not UTF-8: byte {error.start:,} is {error.reason}. {accepted}"
        ) from error
    if len(text) < least:
        raise UsageError(f"--data-dir {path!r} has {len(text):,} characters. {accepted}")
    codes = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    vocabulary, ids = codes.unique(return_inverse=True)
    train, test = ids.int().to(device).tensor_split([_train_length(len(ids))])
    return train, test, "".join(map(chr, vocabulary.tolist()))


def _train_length(characters: int) -> int:
    return characters - int(HELD_OUT * characters)
