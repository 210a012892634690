"""Data sets as random-access sources, and the batches drawn from them (design §5: batch i is a function of i)."""

from .images import random_flip, to_uint8, to_unit
from .pipeline import batch_indices, batches, prefetch
from .sources import ArraySource, Dataset, Digits, FiveRings, Source

__all__ = [
    "ArraySource",
    "Dataset",
    "Digits",
    "FiveRings",
    "Source",
    "batch_indices",
    "batches",
    "prefetch",
    "random_flip",
    "to_uint8",
    "to_unit",
]
