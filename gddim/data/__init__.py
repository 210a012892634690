"""Data sets as random-access sources, and the batches drawn from them (design §5: batch i is a function of i)."""

from .folders import CelebA, ImageFolder
from .images import random_flip, to_uint8, to_unit
from .moments import moments, spectrum
from .official import CIFAR10, SVHN
from .pipeline import batch_indices, batches, prefetch
from .shards import Shards, prepare
from .sources import ArrayFile, ArraySource, Dataset, Digits, FiveRings, Source

__all__ = [
    "CIFAR10",
    "SVHN",
    "ArrayFile",
    "ArraySource",
    "CelebA",
    "Dataset",
    "Digits",
    "FiveRings",
    "ImageFolder",
    "Shards",
    "Source",
    "batch_indices",
    "batches",
    "moments",
    "prefetch",
    "prepare",
    "random_flip",
    "spectrum",
    "to_uint8",
    "to_unit",
]
