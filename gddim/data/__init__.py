"""Data sets as random-access sources, and the batches drawn from them: batch i is a function of i."""

from gddim.data.content import identity
from gddim.data.folders import CelebA, ImageFolder, holds_images, whole_images
from gddim.data.images import random_flip, to_uint8, to_unit
from gddim.data.moments import moments, spectrum
from gddim.data.official import CIFAR10, SVHN
from gddim.data.pipeline import batch_indices, batches, prefetch
from gddim.data.shards import Shards, prepare
from gddim.data.sources import ArrayFile, ArraySource, Dataset, Digits, FiveRings, OnDisk, Source

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
    "OnDisk",
    "Shards",
    "Source",
    "batch_indices",
    "batches",
    "holds_images",
    "identity",
    "moments",
    "prefetch",
    "prepare",
    "random_flip",
    "spectrum",
    "to_uint8",
    "to_unit",
    "whole_images",
]
