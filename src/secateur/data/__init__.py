"""Data sets as functions: name -> decoded images in a training, a validation and a test part."""

from secateur.data.augmenting import NOTHING, Augmentation, augment
from secateur.data.batching import Batches
from secateur.data.sets import Dataset, Splits, hold_out
from secateur.data.sources import SOURCES, cifar10, cifar100, digits, image_folder, load_data

__all__ = [
    "NOTHING",
    "SOURCES",
    "Augmentation",
    "Batches",
    "Dataset",
    "Splits",
    "augment",
    "cifar10",
    "cifar100",
    "digits",
    "hold_out",
    "image_folder",
    "load_data",
]
