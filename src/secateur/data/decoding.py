"""Files or a hub name -> images and labels as tensors, through the `datasets` library."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.sets import Decoded
from secateur.errors import DataError


def decode_parquet(files: Mapping[str, Sequence[Path]], image: str, label: str, name: str) -> Decoded:
    """Decode parquet files, by part ("train", "test"), with an image column and a class-label column."""
    with tempfile.TemporaryDirectory() as scratch:  # `datasets` keeps a second copy of everything it opens
        found = {}
        for part, paths in files.items():  # one by one: together, all parts would be read by the train part's classes
            found[part] = load_parts(name, "parquet", data_files=[str(path) for path in paths], cache_dir=scratch)[
                "train"
            ]
        return decode_parts(found, image, label, name)


def decode_hub(repository: str, image: str, label: str, name: str) -> Decoded:
    """Download a data set of the Hugging Face Hub, or take it from the Hub's own cache, and decode it."""
    return decode_parts(hub_parts(name, repository), image, label, name)


def decode_folders(path: Path, size: int) -> Decoded:
    """Decode a folder of class folders, or one that holds such folders named train, val(idation), test."""
    with tempfile.TemporaryDirectory() as scratch:
        found = load_parts(path.name, "imagefolder", data_dir=str(path), cache_dir=scratch)
        if len(found) == 1:
            found = {"train": next(iter(found.values()))}
        elif "train" not in found:
            raise DataError(f"{path}: found the parts {', '.join(found)} but no train folder to learn from.")
        elif "test" not in found:
            found = {"train": found["train"], "test": found["validation"]}  # val is looked at last, like any test set
        return decode_parts(found, "image", "label", path.name, size)


def decode_parts(found: Mapping[str, Any], image: str, label: str, name: str, size: int | None = None) -> Decoded:
    """Decode the parts of a `datasets.DatasetDict`. With `size`, images are scaled and cropped to that square."""
    names = _class_names(found["train"], image, label, name)
    pairs = {}
    for part, rows in found.items():
        if _class_names(rows, image, label, name) != names:
            raise DataError(f"{name}: the {part} part has other classes than the train part.")
        pairs[part] = _decoded_rows(rows, image, label, f"{name}/{part}", size)
    return Decoded(pairs, names)


def hub_parts(name: str, repository: str) -> dict[str, Any]:
    """The parts of a data set of the Hugging Face Hub. Raises DataError, with the ways out, where it cannot be had."""
    try:
        return load_parts(name, repository)
    except DataError as error:
        raise DataError(
            f"{name}: no local folder was given, and {repository!r} could not be had from the Hub: {error.__cause__}. "
            "Pass --data-dir or set SECATEUR_DATA to a folder that holds it, or go online."
        ) from error


def load_parts(name: str, *args: Any, **options: Any) -> dict[str, Any]:
    """The parts of a data set by `datasets.load_dataset`. Raises DataError where it cannot be read."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError("data sets need the packages datasets and pillow: pip install 'secateur[data]'.") from error
    try:
        with _quiet(datasets):
            return dict(datasets.load_dataset(*args, **options))
    except Exception as error:  # the library raises many kinds; to a reader they all mean that the data is no good
        root = error  # "an error occurred while generating" is wrapped around what happened
        while isinstance(root.__cause__, Exception):
            root = root.__cause__
        raise DataError(f"{name}: the data could not be read: {type(root).__name__}: {root}") from root


def _class_names(rows: Any, image: str, label: str, name: str) -> tuple[str, ...]:
    missing = [column for column in (image, label) if column not in rows.features]
    if missing:
        raise DataError(f"{name}: no column {missing[0]!r}; the columns are {', '.join(rows.features)}.")
    names = getattr(rows.features[label], "names", None)
    return tuple(names) if names else tuple(str(value) for value in range(max(rows[label][:], default=0) + 1))


def _decoded_rows(rows: Any, image: str, label: str, name: str, size: int | None) -> tuple[Tensor, Tensor]:
    import datasets

    if not len(rows):
        raise DataError(f"{name}: there is no image in it.")
    encoded = rows.cast_column(image, datasets.Image(decode=False))[:]
    pixels: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    for position, cell in enumerate(encoded[image]):
        decoded = _decoded_image(cell, f"{name}, row {position}", size)
        if pixels is None:
            pixels = np.empty((len(rows), *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            raise DataError(
                f"{name}, row {position}: an image of {decoded.shape[1]}x{decoded.shape[0]} among images of "
                f"{pixels.shape[2]}x{pixels.shape[1]} pixels. Load a folder of such images with a size."
            )
        pixels[position] = decoded
    assert pixels is not None  # there is a first row
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(encoded[label], dtype=torch.int64)


def _decoded_image(cell: Mapping[str, Any], where: str, size: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image, ImageOps

    try:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]
        with Image.open(source) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where} ({cell['path']}): not an image that can be decoded: {error}") from error
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8)


class _quiet:  # noqa: N801 - used as a statement
    """No progress bars of the `datasets` library inside the block."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.shown = not library.are_progress_bars_disabled()

    def __enter__(self) -> None:
        self.library.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.library.enable_progress_bars()
