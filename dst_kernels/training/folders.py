"""Find the splits of a folder of images, and read small images into memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError

LAYOUT = "a folder with train/<class>/ and test/<class>/ (or val/<class>/) of images"
_HELD_OUT = ("test", "val")


def is_image_folder(root: Path) -> bool:
    """Return whether the folder has one of the splits."""
    return any((root / name).is_dir() for name in ("train", *_HELD_OUT))


def open_folder(
    data_dir: str,
    train_transform: Callable[[Any], Any] | None = None,
    test_transform: Callable[[Any], Any] | None = None,
) -> tuple[Any, Any]:
    """Return the two splits as torchvision's ImageFolder.

    Raises UsageError if one is missing, a class is empty, or they have not the same classes.
    """
    from torchvision.datasets import ImageFolder

    root, layout = Path(data_dir), f"Accepted: {LAYOUT}."
    held_out = next((root / name for name in _HELD_OUT if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        missing = "train" if not (root / "train").is_dir() else " or ".join(_HELD_OUT)
        state = f"has no {missing} folder" if root.is_dir() else "is not a folder"
        raise UsageError(f"--data-dir {data_dir!r} {state}. {layout}")
    try:
        train = ImageFolder(root / "train", train_transform, loader=read_image)
        test = ImageFolder(held_out, test_transform, loader=read_image)
    except FileNotFoundError as error:
        raise UsageError(f"--data-dir {data_dir!r}: {error}. {layout}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes).symmetric_difference(test.classes))
        raise UsageError(
            f"--data-dir {data_dir!r}: the classes {', '.join(odd)} are in only one of "
            f"train and {held_out.name}. Accepted: the same classes in both."
        )
    return train, test


def read_small_images(
    data_dir: str, side: int, classes: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images [N, 3, side, side] (uint8) and labels [N] (int64) of both splits.

    Labels follow the names of the classes. Raises UsageError as `open_folder` does, and for
    another number of classes or a file that is no RGB image of that size.
    """
    from PIL import Image

    splits = open_folder(data_dir)
    found = len(splits[0].classes)
    if found != classes:
        raise UsageError(
            f"--data-dir {data_dir!r} has {found} classes. "
            f"Accepted: {classes} folders in train and in test, one for each class."
        )

    def pixels(path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                found = f"{image.width}x{image.height} in mode {image.mode}"
                if found == f"{side}x{side} in mode RGB":
                    return np.asarray(image)
        except Exception as error:
            raise _unreadable(path, error) from error
        raise UsageError(
            f"--data-dir: {path} is an image of {found}. "
            f"Accepted: images of {side}x{side} in mode RGB."
        )

    def whole(split: Any) -> tuple[Tensor, Tensor]:
        paths = [path for path, _ in split.samples]
        images = torch.from_numpy(np.stack([*pool.map(pixels, paths)]))
        return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)

    with ThreadPoolExecutor() as pool:  # the threads wait for the disk together
        train, test = map(whole, splits)
    return train, test


def read_image(path: str) -> Any:
    """Return the image in a file as RGB; raise UsageError, which names the file, if it cannot."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UsageError:
    # A damaged file makes Pillow raise many types.
    return UsageError(
        f"--data-dir: {path} cannot be read as an image: {error}. "
        "Accepted: files that Pillow can read."
    )
