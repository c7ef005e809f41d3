"""The study's data: splits, augmentation, and what is said about a wrong path."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from benchmarks.compression import cifar10 as cifar10_module
from benchmarks.compression import datasets
from benchmarks.compression.augmentation import crop_and_flip
from benchmarks.compression.cifar10 import cifar10
from benchmarks.compression.image_folder import image_folder
from benchmarks.compression.models import IMAGE_MODELS, build
from benchmarks.compression.sentences import sentences
from benchmarks.compression.splits import TensorSplit
from benchmarks.compression.text import LENGTH, python_files, text


def test_batches_are_whole_and_in_order_unless_shuffled() -> None:
    split = TensorSplit(torch.arange(10.0), torch.arange(10))
    assert [labels.tolist() for _, labels in split.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shuffled = [labels for _, labels in split.batches(4, torch.Generator().manual_seed(0))]
    assert [len(labels) for labels in shuffled] == [4, 4]  # the last, smaller one is left out
    assert len(torch.cat(shuffled).unique()) == 8
    assert torch.cat(shuffled).tolist() != list(range(8))
    again = [labels for _, labels in split.batches(4, torch.Generator().manual_seed(0))]
    assert all(map(torch.equal, shuffled, again))


def test_bytes_are_normalized() -> None:
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, deviation = images.float().mean((0, 2, 3)), images.float().std((0, 2, 3))
    ((inputs, _),) = TensorSplit(images, torch.zeros(50), mean, deviation).batches(50)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3))


def test_crops_are_windows_of_the_padded_image() -> None:
    """Every augmented image is one of the 2 x 9 x 9 that cropping and mirroring can give."""
    images = torch.arange(1, 1 + 20 * 3 * 6 * 6, dtype=torch.float32).reshape(20, 3, 6, 6)
    augmented = crop_and_flip(images, torch.Generator().manual_seed(0))
    assert augmented.shape == images.shape
    kinds = set()
    for image, result in zip(images, augmented, strict=True):
        padded = torch.nn.functional.pad(image, (4,) * 4)
        possible = {
            (down, right, is_mirrored): padded[:, down : down + 6, right : right + 6].flip([2] if is_mirrored else [])
            for down in range(9)
            for right in range(9)
            for is_mirrored in (False, True)
        }
        found = [kind for kind, window in possible.items() if torch.equal(window, result)]
        assert found
        kinds.add(found[0])
    assert len(kinds) > 10
    assert {kind[2] for kind in kinds} == {False, True}


def _write_cifar10(folder: Path, per_class: int) -> None:
    """Images of one colour each, which is 25 times their class."""
    for part in ("train", "test"):
        labels = numpy.repeat(numpy.arange(10), per_class)
        files = []
        for label in labels:
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (int(label) * 25,) * 3).save(file, "JPEG")
            files.append(file.getvalue())
        offset = numpy.cumsum([0, *map(len, files)])
        jpeg = numpy.frombuffer(b"".join(files), dtype=numpy.uint8)
        numpy.savez(folder / f"cifar10_{part}.npz", jpeg=jpeg, offset=offset, label=labels)


def test_cifar10_is_split_by_class_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_module, "VALIDATION_PER_CLASS", 2)
    _write_cifar10(tmp_path, per_class=6)
    data = cifar10(tmp_path, tmp_path / "cache", subset=30)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [30, 20, 60]
    for split in (data.train, data.validation, data.test):
        assert (split.inputs.float().mean((1, 2, 3)) / 25).round().tolist() == split.labels.tolist()
        assert torch.bincount(split.labels).unique().numel() == 1
    monkeypatch.setattr(Image, "open", None)  # The second time nothing is decoded.
    again = cifar10(tmp_path, tmp_path / "cache", subset=30)
    assert torch.equal(again.train.inputs, data.train.inputs)


def test_cifar10_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data: expected a folder with cifar10_train\.npz"):
        cifar10(tmp_path, tmp_path / "cache")
    numpy.savez(tmp_path / "cifar10_train.npz", jpeg=numpy.zeros(3, dtype=numpy.uint8), label=numpy.zeros(1))
    with pytest.raises(ValueError, match=r"--data: expected the arrays .* but offset is missing"):
        cifar10(tmp_path, tmp_path / "cache")
    numpy.savez(
        tmp_path / "cifar10_train.npz", jpeg=numpy.zeros(3, dtype=numpy.uint8), label=[0], offset=numpy.array([0, 2])
    )
    with pytest.raises(ValueError, match="one more offset than labels"):
        cifar10(tmp_path, tmp_path / "cache")
    monkeypatch.setattr(cifar10_module, "VALIDATION_PER_CLASS", 2)
    _write_cifar10(tmp_path, per_class=6)
    with pytest.raises(ValueError, match="subset: expected 1 to 40 training images, got 41"):
        cifar10(tmp_path, tmp_path / "cache", subset=41)


def test_image_folder(tmp_path: Path) -> None:
    for part, count in (("train", 40), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 30), (255 * label,) * 3).save(folder / f"{index:02}.png")
    data = image_folder(tmp_path, 24)
    assert (data.classes, data.shape) == (2, (3, 24, 24))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [76, 4, 6]
    ((inputs, labels),) = data.test.batches(10)
    assert inputs.shape == (6, 3, 24, 24)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(inputs[:, 0, 0, 0], ((labels - 0.485) / 0.229).float())
    ((inputs, labels), *_) = data.train.batches(30, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inputs[:, 1, 5, 7], ((labels - 0.456) / 0.224).float())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([], "there is no folder"),
        (["train"], "one folder for each class"),
        (["train/cat", "val/dog"], "the same classes"),
        (["train/cat", "val/cat"], "expected images"),
    ],
)
def test_image_folder_says_what_is_wrong(made: list[str], message: str, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises((FileNotFoundError, ValueError), match=f"--data: .*{message}"):
        image_folder(tmp_path, 24)


@pytest.mark.parametrize(
    ("name", "has_folder", "subset", "message"),
    [
        ("mnist", False, None, "data: expected one of digits, cifar10"),
        ("digits", True, None, "--data: expected none"),
        ("digits", False, 5, "subset: expected none"),
        ("cifar10", False, None, "--data: expected a folder with cifar10, got none"),
    ],
)
def test_datasets_say_what_is_wrong(
    name: str, has_folder: bool, subset: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(name, tmp_path if has_folder else None, tmp_path, subset)
    with pytest.raises(FileNotFoundError, match="--data: expected a folder, but there is none"):
        datasets.load("cifar10", tmp_path / "nowhere", tmp_path, None)


def _write_sources(folder: Path) -> None:
    for index in range(60):
        module = f'"""Module {index} holds nothing of value to anyone. It is here to be read."""\n' + "x = 1\n" * 100
        (folder / f"module{index:02}.py").write_text(module)


def test_text_is_next_bytes_of_whole_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data: expected a folder of at least 40 Python files"):
        text(tmp_path)
    _write_sources(tmp_path)
    data = text(tmp_path, subset=7)
    joined = {name: "".join(path.read_text() for path in paths) for name, paths in python_files(tmp_path).items()}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        inputs, labels = next(split.batches(5))
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        assert all(bytes(sequence.tolist()).decode() in joined[name] for sequence in inputs)
    assert "Module 20 " in joined["validation"]
    assert "Module 21 " in joined["test"]
    assert len(data.validation) == len(joined["validation"]) // LENGTH
    assert len(data.train) == 7


def test_sentences_are_of_one_split_each(tmp_path: Path) -> None:
    _write_sources(tmp_path)
    found = sentences(tmp_path)
    assert found["validation"][0] == "Module 0 holds nothing of value to anyone."
    assert len(found["train"]) == 54
    everything = [line for lines in found.values() for line in lines]
    assert len(everything) == len(set(everything)) == 60
    assert everything.count("It is here to be read.") == 0  # shorter than a sentence must be


@pytest.mark.parametrize("name", IMAGE_MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_networks_suit_their_images(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, 7, 0.25).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)
    wider = build(name, shape, 7, 0.5)
    assert sum(map(torch.numel, wider.parameters())) > 1.5 * sum(map(torch.numel, model.parameters()))


def test_transformer_does_not_see_what_comes() -> None:
    model = build("transformer", (16,), 256, 0.25).eval()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("VGG", (3, 32, 32), 10, 1.0), "model: expected one of"),
        (("ResNet-18", (3, 32, 32), 10, 0.0), "width: expected a positive number"),
        (("ResNet-18", (128,), 10, 1.0), "inputs of 3 dimensions"),
    ],
)
def test_models_say_what_is_wrong(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*arguments)
