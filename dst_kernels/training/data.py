"""Load data sets: small ones and texts are kept in memory, image folders are streamed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from .config import RunConfig
from .errors import UsageError
from .folders import LAYOUT, is_image_folder, open_folder, read_image, read_small_images
from .sharing import WHOLE, Batch, Share
from .text import CONTEXT, TextBatches, read_text

_CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TEST_BATCH, _TEST_WINDOWS = 1000, 64


class Batches(Protocol):
    """Describe one split of a data set."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch of training."""

    def epoch(self, generator: torch.Generator | None, share: Share = WHOLE) -> Iterator[Batch]:
        """Yield batches on the device: images [N, C, H, W] and labels [N] (int64).

        Of a text, ids of characters and of those that follow, both [N, context] (int64). The
        generator shuffles them; without one they come in order. Of each batch come the parts that
        `share` takes.
        """


@dataclass(frozen=True)
class Data:
    """Hold the splits, the shape of an input and the number of classes.

    The shape is [C, H, W] for images. For a text it is [context], the classes are the characters,
    and the vocabulary has them in the order of their ids. `validation` is what --validation holds
    out of the training set, if it is given.
    """

    train: Batches
    test: Batches
    shape: tuple[int, ...]
    classes: int
    vocabulary: str = ""
    validation: Batches | None = None


class TensorBatches:
    """Keep a split on the device, as bytes if it was stored as bytes.

    `statistics`: mean and standard deviation by channel, to normalise with. `padding` (pixels) > 0
    augments: zero-pad, crop at random to the old size, flip half of the images.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        padding: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.padding = batch_size, padding
        self.statistics = None
        if statistics is not None:
            self.statistics = tuple(
                torch.tensor(values, device=images.device).view(-1, 1, 1) for values in statistics
            )

    def __len__(self) -> int:
        return _batch_count(len(self.labels), self.batch_size)

    def epoch(self, generator: torch.Generator | None, share: Share = WHOLE) -> Iterator[Batch]:
        # Draw all random numbers of an epoch at once: one transfer to the device, not one per step.
        count, device = len(self.labels), self.images.device
        if generator is None:
            order = torch.arange(count)
        else:
            order = torch.randperm(count, generator=generator)
            if self.padding:
                corners = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
                flips = torch.rand(count, generator=generator) < 0.5
                corners, flips = corners.to(device), flips.to(device)
        order = order.to(device)
        batches = order.split(self.batch_size)[: None if generator is None else len(self)]
        for index, weight in (part for batch in batches for part in share.of(batch)):
            images = self.images[index]
            if generator is not None and self.padding:
                images = _crop_and_flip(images, self.padding, corners[index], flips[index])
            if not images.is_floating_point():
                images = images.float().div_(255)
            if self.statistics is not None:
                mean, deviation = self.statistics
                images = (images - mean) / deviation
            yield Batch(images, self.labels[index], weight)


def _batch_count(samples: int, batch_size: int) -> int:
    # Training skips a last batch of one image, which batch normalisation cannot use.
    return -(-samples // batch_size) - (samples > 1 and samples % batch_size == 1)


def _crop_and_flip(images: Tensor, padding: int, corners: Tensor, flips: Tensor) -> Tensor:
    _, channels, height, width = images.shape
    device = images.device
    rows = corners[:, :1] + torch.arange(height, device=device)
    columns = corners[:, 1:] + torch.arange(width, device=device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    return F.pad(images, (padding,) * 4)[
        torch.arange(len(images), device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class FolderBatches:
    """Stream a split from image files through a DataLoader."""

    def __init__(self, images: Any, batch_size: int, workers: int, device: torch.device) -> None:
        self.images, self.batch_size, self.workers = images, batch_size, workers
        self.device = device

    def __len__(self) -> int:
        return _batch_count(len(self.images), self.batch_size)

    def epoch(self, generator: torch.Generator | None, share: Share = WHOLE) -> Iterator[Batch]:
        training, images = generator is not None, self.images
        order = RandomSampler(images, generator=generator) if training else range(len(images))
        drop_last = training and len(self) * self.batch_size < len(images)
        batches = BatchSampler(order, self.batch_size, drop_last)
        # One loader per epoch: workers draw their seeds from the generator when they start.
        loader = DataLoader(
            images,
            batch_sampler=_Parts(batches, share),
            generator=generator or torch.Generator(),  # not the global one, which training uses
            worker_init_fn=functools.partial(_seed_worker, share.first),
            num_workers=self.workers,
            pin_memory=self.device.type in ("cuda", "xpu"),
        )
        sizes = [
            min(self.batch_size, len(images) - i * self.batch_size) for i in range(len(batches))
        ]
        weights = (weight for size in sizes for _, weight in share.of(range(size)))
        for (inputs, labels), weight in zip(loader, weights, strict=True):
            yield Batch(
                inputs.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
                weight,
            )


def _seed_worker(first: int, worker: int) -> None:
    """Let the workers of each process draw other numbers; torch gives those of all the same."""
    torch.manual_seed((torch.initial_seed() + (first << 32)) % 2**63)


class _Parts:
    """Yield the indices of a share of each batch, to read no other images."""

    def __init__(self, batches: BatchSampler, share: Share) -> None:
        self.batches, self.share = batches, share

    def __iter__(self) -> Iterator[list[int]]:
        return (part for batch in self.batches for part, _ in self.share.of(batch))


def load_data(
    config: RunConfig, device: torch.device, channels: int | None = None, download: bool = False
) -> Data:
    """Read the configured data set; repeat gray images to `channels`, if given.

    Raises UsageError if the data set is missing or unreadable.
    """
    if config.dataset == "image-folder":
        return _image_folder(config, device)
    if config.dataset == "text":
        ids, test_ids, vocabulary = read_text(config.data_dir, device)
        held_out = None
        if config.validation is not None:
            # Both parts need a window and one character more, which follows it.
            count = _held_out(config.validation, len(ids), "characters", CONTEXT + 1)
            ids, held_out = ids.tensor_split([len(ids) - count])
        return Data(
            TextBatches(ids, config.batch_size),
            TextBatches(test_ids, _TEST_WINDOWS),
            (CONTEXT,),
            len(vocabulary),
            vocabulary,
            None if held_out is None else TextBatches(held_out, _TEST_WINDOWS),
        )
    if config.dataset == "digits":
        splits, statistics, padding = _digits(), None, 0
    elif config.dataset in ("mnist", "fashion-mnist"):
        splits, statistics, padding = _torchvision(config, download), None, 0
    else:
        splits, statistics, padding = _cifar(config, download), _CIFAR_STATISTICS, 4

    (images, labels), (test_images, test_labels) = splits
    if channels is not None and images.shape[1] == 1:
        images, test_images = (part.expand(-1, channels, -1, -1) for part in (images, test_images))
    validation = None
    if config.validation is not None:
        kept, held_out = split(labels, config.validation, config.seed)
        validation = _in_order(images[held_out], labels[held_out], device, statistics)
        images, labels = images[kept], labels[kept]
    train = TensorBatches(
        images.to(device), labels.to(device), config.batch_size, statistics, padding
    )
    test = _in_order(test_images, test_labels, device, statistics)
    shape = images.shape[1], images.shape[2], images.shape[3]
    return Data(train, test, shape, _classes(config.dataset), validation=validation)


def _in_order(
    images: Tensor, labels: Tensor, device: torch.device, statistics: Any
) -> TensorBatches:
    return TensorBatches(images.to(device), labels.to(device), _TEST_BATCH, statistics)


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the ascending indices of what is trained on, and of what --validation holds out.

    Of `labels` [N] (int64) the seed chooses round(share * N), of each class its share up to one.
    Raises UsageError if that leaves nothing to hold out, or fewer than two to train on.
    """
    held_out = _held_out(share, len(labels), "images", 1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]  # class after class, shuffled within each
    # As evenly spaced as integers can be, so that each class gives its share.
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[torch.arange(held_out) * len(labels) // held_out]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _held_out(share: float, count: int, unit: str, least: int) -> int:
    """Return how many of `count` are held out; raise UsageError where either part is too small."""
    held_out, trained = round(share * count), max(least, 2)  # batch normalisation needs two images
    if held_out < least or count - held_out < trained:
        raise UsageError(
            f"--validation {share!r} holds out {held_out:,} of {count:,} {unit} and trains on "
            f"{count - held_out:,}. Accepted: a share that holds out {least:,} or more and leaves "
            f"{trained:,} or more."
        )
    return held_out


_Splits = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def _digits() -> _Splits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    images = F.interpolate(small, size=(28, 28), mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    # The split is part of the data set, so it does not depend on --seed.
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=digits.target, random_state=0
    )
    return (images[train], labels[train]), (images[test], labels[test])


def _classes(dataset: str) -> int:
    return 100 if dataset == "cifar100" else 10


def _cifar(config: RunConfig, download: bool) -> _Splits:
    """Read torchvision's files or, where there are none but folders of images, those."""
    root = Path(config.data_dir)
    files = any((root / name).exists() for name in ("cifar-10-batches-py", "cifar-100-python"))
    if is_image_folder(root) and not files:
        return read_small_images(config.data_dir, 32, _classes(config.dataset))
    return _torchvision(config, download)


def _torchvision(config: RunConfig, download: bool) -> _Splits:
    import torchvision.datasets as available

    kind = {
        "mnist": available.MNIST,
        "fashion-mnist": available.FashionMNIST,
        "cifar10": available.CIFAR10,
        "cifar100": available.CIFAR100,
    }[config.dataset]
    root = Path(config.data_dir)
    folders = f", or {LAYOUT}" if config.dataset.startswith("cifar") else ""
    accepted = (
        f"Accepted: a folder that holds {config.dataset} as torchvision stores it{folders}; "
        "add --download to fetch it there."
    )
    if not root.is_dir() and not download:
        raise UsageError(f"--data-dir {config.data_dir!r} is not a folder. {accepted}")
    splits = []
    for train in (True, False):
        try:
            split = kind(root, train=train, download=download)
        except Exception as error:  # a missing, truncated or wrong file raises many types
            reason = str(error).split(". You can use")[0].strip().rstrip(".")
            raise UsageError(
                f"--data-dir {config.data_dir!r} does not yield {config.dataset}: {reason}. "
                f"{accepted}"
            ) from error
        images = torch.as_tensor(split.data)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        splits.append((images.contiguous(), torch.as_tensor(split.targets).long()))
    return splits[0], splits[1]


def _image_folder(config: RunConfig, device: torch.device) -> Data:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    size = config.image_size
    finish = [transforms.ToTensor(), transforms.Normalize(*_IMAGENET_STATISTICS)]
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *finish]
    )
    center = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *finish]
    )
    train, test = open_folder(config.data_dir, augment, center)

    def batches(images: Any) -> FolderBatches:
        return FolderBatches(images, config.batch_size, config.workers, device)

    trained_on: Any = train
    validation = None
    if config.validation is not None:
        kept, chosen = split(torch.tensor(train.targets), config.validation, config.seed)
        # The same files once more, but cut like the test's.
        whole = ImageFolder(train.root, center, loader=read_image)
        validation = batches(torch.utils.data.Subset(whole, chosen.tolist()))
        trained_on = torch.utils.data.Subset(train, kept.tolist())
    shape = (3, size, size)
    return Data(
        batches(trained_on), batches(test), shape, len(train.classes), validation=validation
    )
