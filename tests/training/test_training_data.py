from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F

from dst_kernels.training.config import RunConfig
from dst_kernels.training.data import _CIFAR_STATISTICS, FolderBatches, TensorBatches, load_data
from dst_kernels.training.errors import UsageError
from dst_kernels.training.sharing import Share
from dst_kernels.training.text import TextBatches

CPU = torch.device("cpu")


def whole(batches):
    images, labels, _ = zip(*batches.epoch(None), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_are_the_documented_split():
    data = load_data(RunConfig(), CPU)
    (images, labels), (test_images, test_labels) = whole(data.train), whole(data.test)
    assert (data.shape, data.classes) == ((1, 28, 28), 10)
    assert (len(images), len(test_images), len(data.train)) == (1437, 360, 23)
    assert images.min() == 0
    assert images.max() <= 1
    # Stratified: every class keeps its share, to one image.
    share = test_labels.bincount() / (labels.bincount() + test_labels.bincount())
    assert (share - 0.2).abs().max() < 0.006
    # Every image of scikit-learn's, enlarged, is in exactly one split with its own label.
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
    enlarged = F.interpolate(digits, (28, 28), mode="bilinear")
    index = {image.numpy().tobytes(): i for i, image in enumerate(enlarged)}
    found = [index[image.numpy().tobytes()] for image in torch.cat([images, test_images])]
    assert sorted(found) == list(range(1797))
    assert load_digits().target[found].tolist() == torch.cat([labels, test_labels]).tolist()


def test_the_split_does_not_follow_the_seed():
    first, second = (load_data(RunConfig(seed=seed), CPU) for seed in (0, 1))
    assert torch.equal(whole(first.test)[0], whole(second.test)[0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_an_epoch_is_shuffled_by_its_generator_alone():
    batches = TensorBatches(torch.rand(20, 1, 2, 2), torch.arange(20), 6)

    def order(seed):
        generator = None if seed is None else seeded(seed)
        return torch.cat([labels for _, labels, _ in batches.epoch(generator)]).tolist()

    torch.manual_seed(1)
    first = order(5)
    torch.manual_seed(2)
    assert order(5) == first
    assert order(6) != first
    assert sorted(first) == list(range(20))
    assert order(None) == list(range(20))
    for images, labels, _ in batches.epoch(seeded(5)):
        assert torch.equal(images, batches.images[labels])


@pytest.mark.parametrize("kind", ["tensor", "folder"])
def test_a_last_batch_of_one_image_is_left_out_of_training_only(kind):
    images, labels = torch.rand(9, 1, 2, 2), torch.arange(9)
    if kind == "tensor":
        batches = TensorBatches(images, labels, 4)
    else:
        batches = FolderBatches(list(zip(images, labels, strict=True)), 4, 0, CPU)
    assert len(batches) == 2
    assert [len(labels) for _, labels, _ in batches.epoch(seeded(0))] == [4, 4]
    assert [len(labels) for _, labels, _ in batches.epoch(None)] == [4, 4, 1]


def test_augmentation_crops_the_padded_image_and_flips_about_half():
    images = torch.randint(1, 256, (200, 3, 8, 6), dtype=torch.uint8)
    labels = torch.arange(200)
    statistics = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    batches = TensorBatches(images, labels, 50, statistics, padding=2)
    padded = F.pad(images, (2, 2, 2, 2))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    flipped, corners = 0, set()
    for batch, indices, _ in batches.epoch(seeded(3)):
        pixels = ((batch * deviation + mean) * 255).round().to(torch.uint8)
        for image, index in zip(pixels, indices, strict=True):
            found = [
                (flip, top, left)
                for flip in (False, True)
                for top in range(5)
                for left in range(5)
                if torch.equal(
                    image.flip(-1) if flip else image,
                    padded[index, :, top : top + 8, left : left + 6],
                )
            ]
            assert len(found) == 1
            flipped += found[0][0]
            corners.add(found[0][1:])
    assert 60 < flipped < 140
    assert len(corners) == 25
    plain = torch.cat([batch for batch, *_ in batches.epoch(None)])
    torch.testing.assert_close(plain, (images.float() / 255 - mean) / deviation)


def test_mnist_is_read_from_its_raw_files_and_scaled_only(mnist_dir):
    data = load_data(RunConfig(dataset="mnist", data_dir=str(mnist_dir)), CPU)
    images, labels = whole(data.train)
    assert (data.shape, data.classes, len(images)) == ((1, 28, 28), 10, 40)
    assert images.max() == 1
    assert labels.tolist() == [i % 10 for i in range(40)]
    for image, label in zip(images, labels, strict=True):
        assert (image[0, 2 * label : 2 * label + 3] == 1).all()
    assert len(whole(data.test)[0]) == 20


def test_gray_images_are_repeated_for_models_that_want_three_channels(mnist_dir):
    config = RunConfig(dataset="mnist", data_dir=str(mnist_dir))
    gray, colour = load_data(config, CPU), load_data(config, CPU, channels=3)
    assert colour.shape == (3, 28, 28)
    assert torch.equal(whole(colour.train)[0], whole(gray.train)[0].expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_normalised_and_augmented_in_training(name, classes, tmp_path, monkeypatch):
    import torchvision.datasets as available

    kind = {"cifar10": available.CIFAR10, "cifar100": available.CIFAR100}[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(available.cifar, "check_integrity", lambda *args: True)
    pixels = np.full((4, 3072), 255, dtype=np.uint8)
    pixels[:, :1024] = 0  # no red
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    key = "labels" if name == "cifar10" else "fine_labels"
    for file, _ in [*kind.train_list, *kind.test_list]:
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: [0, 1, 2, 3]}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: ["x"] * classes}))
    data = load_data(RunConfig(dataset=name, data_dir=str(tmp_path)), CPU)
    images, labels = whole(data.test)
    assert (data.shape, data.classes, len(images)) == ((3, 32, 32), classes, 4)
    assert labels.tolist() == [0, 1, 2, 3]
    expected = torch.tensor([-0.4914 / 0.2023, (1 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010])
    torch.testing.assert_close(images, expected.view(3, 1, 1).expand_as(images))
    (batch, *_), *_ = data.train.epoch(seeded(0))
    assert batch[:, 1].min() < 0  # black padding has come in
    assert data.test.padding == 0


@pytest.fixture
def cifar_dir(tmp_path):
    """Write two images of CIFAR's size for each of so many classes into both splits."""

    def write(classes, ending="png"):
        random = np.random.default_rng(0)
        for split in ("train", "test"):
            for number in range(2 * classes):
                folder = tmp_path / split / f"class {number // 2:03}"
                folder.mkdir(parents=True, exist_ok=True)
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04}.{ending}")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "classes", "ending"), [("cifar10", 10, "jpg"), ("cifar100", 100, "png")]
)
def test_cifar_is_read_from_folders_of_images(name, classes, ending, cifar_dir):
    folder = cifar_dir(classes, ending)
    data = load_data(RunConfig(dataset=name, data_dir=str(folder)), CPU)
    assert (data.shape, data.classes) == ((3, 32, 32), classes)
    for split, batches in (("train", data.train), ("test", data.test)):
        files = sorted((folder / split).rglob(f"*.{ending}"))
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
        assert batches.images.dtype == torch.uint8
        assert torch.equal(batches.images, pixels.permute(0, 3, 1, 2))
        assert batches.labels.tolist() == [i // 2 for i in range(2 * classes)]
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in _CIFAR_STATISTICS)
    wanted = (data.test.images.float() / 255 - mean) / deviation
    torch.testing.assert_close(whole(data.test)[0], wanted)
    assert (data.train.padding, data.test.padding) == (4, 0)


def save(size, mode):
    return lambda path: Image.new(mode, size).save(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b"no image"), "cannot be read as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:60] + b"?" * 900), "cannot be read as"),
        (save((32, 28), "RGB"), r"is an image of 32x28 in mode RGB\. Accepted: images of 32x32"),
        (save((32, 32), "L"), r"is an image of 32x32 in mode L\. Accepted: images of 32x32"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_is_not_cifars_is_named(cifar_dir, split, change, said):
    folder = cifar_dir(10)
    change(folder / split / "class 003" / "0007.png")
    with pytest.raises(UsageError, match=rf"--data-dir: \S+{split}/class 003/0007\.png {said}"):
        load_data(RunConfig(dataset="cifar10", data_dir=str(folder)), CPU)


@pytest.mark.parametrize(
    ("classes", "removed", "said"),
    [
        (11, None, "has 11 classes. Accepted: 10 folders in train and in test"),
        (10, "test/class 004", "the classes class 004 are in only one of train and test"),
        (10, "train", "has no train folder"),
        (10, "test", "has no test or val folder"),
    ],
)
def test_folders_that_are_not_cifar_are_refused(cifar_dir, classes, removed, said):
    folder = cifar_dir(classes)
    if removed:
        shutil.rmtree(folder / removed)
    with pytest.raises(UsageError, match=rf"--data-dir '{folder}':? {said}"):
        load_data(RunConfig(dataset="cifar10", data_dir=str(folder)), CPU)


def some_batches(kind, image_dir):
    if kind == "text":
        return TextBatches(torch.arange(231, dtype=torch.int32), batch_size=6, context=10)
    if kind == "tensors":
        return TensorBatches(torch.rand(23, 1, 6, 6), torch.arange(23), 6, padding=2)
    config = RunConfig(dataset="image-folder", data_dir=str(image_dir), image_size=16, batch_size=6)
    return load_data(config, CPU).test


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("processes", "parts"), [(2, 1), (3, 1), (1, 2), (2, 2), (7, 1)])
@pytest.mark.parametrize("kind", ["text", "tensors", "folder"])
def test_the_parts_of_all_processes_are_the_batches(kind, processes, parts, training, image_dir):
    """Each sample once, in the same order, and weights that add up to the mean of a batch."""
    batches = some_batches(kind, image_dir)
    every = processes * parts
    shares = [Share(rank * parts, parts, every) for rank in range(processes)]
    epochs = [[*batches.epoch(seeded(0) if training else None, share)] for share in shares]
    plain = [*batches.epoch(seeded(0) if training else None)]
    for number, batch in enumerate(plain):
        mine = [part for epoch in epochs for part in epoch[number * parts : (number + 1) * parts]]
        counted = [part for part in mine if part.weight]
        assert len(mine) == every and min(len(part.targets) for part in mine) >= 2
        for name in ("inputs", "targets"):
            parts_of_it = torch.cat([getattr(part, name) for part in counted])
            assert torch.equal(parts_of_it, getattr(batch, name))
        shared = sum(part.weight * part.targets.float().mean() for part in counted) / processes
        torch.testing.assert_close(shared, batch.targets.float().mean())
    assert all(len(epoch) == len(plain) * parts for epoch in epochs)


def test_image_folders_are_streamed_reproducibly(image_dir):
    config = RunConfig(
        dataset="image-folder", data_dir=str(image_dir), image_size=16, batch_size=5, workers=2
    )
    data = load_data(config, CPU)
    assert (data.shape, data.classes, len(data.train)) == ((3, 16, 16), 2, 3)

    def epoch(seed):
        images, labels, _ = zip(*data.train.epoch(seeded(seed)), strict=True)
        torch.rand(1)  # the global generator moves on, and does not matter
        return torch.cat(images), torch.cat(labels)

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert first[0].shape == (15, 3, 16, 16)  # 16 images, the last alone in its batch
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    images, labels = whole(data.test)
    assert labels.tolist() == [0] * 4 + [1] * 4
    above = images[:, :, :8].mean((1, 2, 3)) > images[:, :, 8:].mean((1, 2, 3))
    assert above.tolist() == [True] * 4 + [False] * 4


def test_an_unreadable_picture_is_named(image_dir):
    (image_dir / "val" / "above" / "0.png").write_bytes(b"not a picture")
    config = RunConfig(dataset="image-folder", data_dir=str(image_dir), image_size=16)
    with pytest.raises(UsageError, match=r"0\.png cannot be read as an image"):
        whole(load_data(config, CPU).test)
