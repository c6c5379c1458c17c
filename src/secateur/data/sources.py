"""The data sets that go by a name: one function each, and the table of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.data.augmenting import Augmentation
from secateur.data.caching import cached, identity_of
from secateur.data.decoding import decode_folders, decode_hub, decode_parquet
from secateur.data.sets import Decoded, Splits, make_splits
from secateur.errors import DataError, InputError, UnknownNameError

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def digits(*, seed: int = 0, validation: float = 0.1) -> Splits:
    """1,797 handwritten digits, 8x8 grey, bundled with scikit-learn (UCI optdigits, its test part).

    The test set is a fixed fifth. The 17 grey levels are spread over 0 to 255.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError("the digits need scikit-learn: pip install 'secateur[data]'.") from error
    raw = load_digits()
    images = torch.from_numpy(raw.images * 255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(raw.target).to(torch.int64)
    source = Decoded({"train": (images, labels)}, tuple(str(digit) for digit in range(10)))
    # A mirrored digit is no digit, and one pixel of eight is far.
    moves = Augmentation(crop=1, flip=False, padding="zero")
    return make_splits(source, "digits", validation=validation, seed=seed, augmentation=moves)


def cifar10(
    data_dir: Path | str | None = None, *, seed: int = 0, validation: float = 0.1, cache_dir: Path | str | None = None
) -> Splits:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs of 32x32 in 10 classes.

    From `cifar10/train-*.parquet` and `cifar10/test-*.parquet` (columns img, label) in `data_dir` or SECATEUR_DATA,
    else from the Hub. By default 5,000 of the training images become the validation set.
    """
    source = _parquet_or_hub("cifar10", "uoft-cs/cifar10", "label", data_dir, cache_dir)
    return make_splits(source, "cifar10", validation=validation, seed=seed, augmentation=Augmentation())


def cifar100(
    data_dir: Path | str | None = None, *, seed: int = 0, validation: float = 0.1, cache_dir: Path | str | None = None
) -> Splits:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine classes; found like `cifar10`, label column fine_label."""
    source = _parquet_or_hub("cifar100", "uoft-cs/cifar100", "fine_label", data_dir, cache_dir)
    return make_splits(source, "cifar100", validation=validation, seed=seed, augmentation=Augmentation())


def image_folder(
    path: Path | str, *, size: int, seed: int = 0, validation: float = 0.1, cache_dir: Path | str | None = None
) -> Splits:
    """Images in class folders: `path/<class>/*`, or `path/train/<class>/*` with val/ or test/ beside it.

    Every image is scaled so that its shorter side is `size`, and its centre cut out: uint8 (N, 3, size, size), all in
    memory. val/ is the test set where there is no test/ (the validation set is then taken from train/); a single
    folder loses a fixed fifth for one.
    """
    if size < 1:
        raise InputError(f"size is the side of the images in pixels, at least 1; got {size}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}: expected one with a folder of images per class in it.")
    files = [file for file in root.rglob("*") if file.suffix.lower() in PICTURES]
    if not files:
        raise DataError(f"no images below {root}: expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.")
    key = [size, identity_of(files)]
    source = cached(f"{root.name}-{size}", key, lambda: decode_folders(root, size), cache_dir)
    moves = Augmentation(crop=size // 8)
    return make_splits(source, root.name, validation=validation, seed=seed, augmentation=moves)


def _digits(data_dir: Path | str | None, *, cache_dir: Path | str | None = None, **options: Any) -> Splits:
    return digits(**options)  # bundled: needs neither folder


def _image_folder(data_dir: Path | str | None, folder: str = "", **options: Any) -> Splits:
    root = data_folder(data_dir)
    if root is None:
        raise DataError("imagefolder needs the folder: pass data_dir (--data-dir), or set SECATEUR_DATA.")
    if not (root / folder).resolve().is_relative_to(root.resolve()):
        raise DataError(f"imagefolder: folder is a path inside {root}; got {folder!r}.")
    return image_folder(root / folder, **{"size": 224, **options})


SOURCES: Mapping[str, Callable[..., Splits]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": _digits,
    "imagefolder": _image_folder,
}


def load_data(
    name: str,
    data_dir: Path | str | None = None,
    *,
    seed: int = 0,
    validation: float = 0.1,
    cache_dir: Path | str | None = None,
    **options: Any,
) -> Splits:
    """The data set of that name, split for the given seed.

    Args:
        name: one of `SOURCES`.
        data_dir: folder to look in; default SECATEUR_DATA. Where neither is given, the Hugging Face Hub is asked.
        seed: decides which training images become the validation set, and nothing else.
        validation: the fraction of the training images that do.
        cache_dir: where decoded images are kept; default SECATEUR_CACHE, else the platform's folder for caches.
        options: of that data set's function; of an image folder `size`, and `folder`, where it lies inside `data_dir`.

    Raises:
        UnknownNameError: there is no data set of that name.
        DataError: it is missing, empty or malformed; the message says what was looked for, and where.
    """
    if name not in SOURCES:
        raise UnknownNameError("data set", name, SOURCES)
    return SOURCES[name](data_dir, seed=seed, validation=validation, cache_dir=cache_dir, **options)


def parquet_files(name: str, patterns: Mapping[str, str], data_dir: Path | str | None) -> dict[str, list[Path]] | None:
    """The files of a data set, by part: those in the folder `name` of `data_dir` (default SECATEUR_DATA) that match.

    None where no folder is given: the Hub is to be asked. Raises DataError where a part has no file.
    """
    root = data_folder(data_dir)
    if root is None:
        return None
    files = {part: sorted((root / name).glob(pattern)) for part, pattern in patterns.items()}
    for part, found in files.items():
        if not found:
            what = "is no such folder" if not (root / name).is_dir() else "are no such files in it"
            raise DataError(
                f"{name}: looked for {root / name}/{patterns[part]}, but there {what}. Pass the folder that holds "
                f"{name}/ as data_dir (--data-dir) or in SECATEUR_DATA; without either the Hub is asked."
            )
    return files


def _parquet_or_hub(
    name: str, repository: str, label: str, data_dir: Path | str | None, cache_dir: Path | str | None
) -> Decoded:
    files = parquet_files(name, {part: f"{part}-*.parquet" for part in ("train", "test")}, data_dir)
    if files is None:
        return cached(name, ["hub", repository], lambda: decode_hub(repository, "img", label, name), cache_dir)
    every = [file for found in files.values() for file in found]
    return cached(name, identity_of(every), lambda: decode_parquet(files, "img", label, name), cache_dir)


def data_folder(given: Path | str | None) -> Path | None:
    """The folder of the data sets: `given`, else SECATEUR_DATA; None where there is neither."""
    chosen = given if given is not None else os.environ.get("SECATEUR_DATA") or None
    return None if chosen is None else Path(chosen).expanduser()
