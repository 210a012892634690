"""Data sets as random-access sources, and the batches drawn from them: batch i is a function of the seed and i.

A data set of your own is a frozen dataclass, whose fields become options: the `shape` of its data, known before any is
read, and the sources `train` and `test`. Here records are images and their classes, which a network is handed as
`cond["label"]`; for images alone give `ArraySource` the array, and leave out `classes`.

>>> import dataclasses, numpy as np
>>> @dataclasses.dataclass(frozen=True)
... class Stripes:
...     count: int = 100
...     shape = (8, 8, 3)
...     classes = 2
...     def train(self):
...         label = np.arange(self.count, dtype=np.int32) % 2
...         rows, columns = np.indices((8, 8)) % 2 * np.uint8(255)
...         images = np.where(label[:, None, None], rows, columns)[..., None].repeat(3, -1)
...         return ArraySource({"x0": images.astype(np.uint8), "label": label})
...     test = train
>>> batch = next(batches(Stripes().train(), batch_size=10, seed=0))
>>> batch["x0"].shape, batch["label"].shape
((10, 8, 8, 3), (10,))

A source is anything with `shape`, `dtype`, `flip`, a length, and `source[indices]`: see `Source`.
"""

from gddim.data.arrays import ArrayFile
from gddim.data.augmentation import AUGMENT, NUMBERS, augmented
from gddim.data.content import identity
from gddim.data.folders import CelebA, ImageFolder, holds_images, whole_images
from gddim.data.images import random_flip, to_uint8, to_unit
from gddim.data.labels import check_labels, class_counts, classes_of, cond_of
from gddim.data.moments import moments, spectrum
from gddim.data.official import CIFAR10, SVHN
from gddim.data.pipeline import batch_indices, batches, prefetch
from gddim.data.shards import Shards, holds_shards, prepare
from gddim.data.sources import (
    DATA,
    LABEL,
    ArraySource,
    Dataset,
    Digits,
    FiveRings,
    OnDisk,
    Records,
    Source,
    data_alone,
    x0_and_cond,
)

NAMED = {"digits": Digits, "five-rings": FiveRings, "cifar10": CIFAR10, "svhn": SVHN, "celeba": CelebA}
"""The data sets that command lines have a word for."""

__all__ = [
    "AUGMENT",
    "CIFAR10",
    "DATA",
    "LABEL",
    "NAMED",
    "NUMBERS",
    "SVHN",
    "ArrayFile",
    "ArraySource",
    "CelebA",
    "Dataset",
    "Digits",
    "FiveRings",
    "ImageFolder",
    "OnDisk",
    "Records",
    "Shards",
    "Source",
    "augmented",
    "batch_indices",
    "batches",
    "check_labels",
    "class_counts",
    "classes_of",
    "cond_of",
    "data_alone",
    "holds_images",
    "holds_shards",
    "identity",
    "moments",
    "prefetch",
    "prepare",
    "random_flip",
    "spectrum",
    "to_uint8",
    "to_unit",
    "whole_images",
    "x0_and_cond",
]
