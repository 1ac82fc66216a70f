"""Named data sets: listed, fetched, cached and loaded with their provenance.

`load(name)` gives an `ImageSet`; `python -m course.core.data` lists the names.  Importing this package is light:
TensorFlow is imported by what feeds it, not by what reads data.
"""

from course.core.data import fetch, unpickle
from course.core.data.batches import batches
from course.core.data.idx import read_idx
from course.core.data.images import (
    SETS,
    Entry,
    ImageSet,
    Splits,
    extract_images,
    load,
    split,
    stratified_order,
    three_way,
)

__all__ = [
    "SETS",
    "Entry",
    "ImageSet",
    "Splits",
    "batches",
    "extract_images",
    "fetch",
    "load",
    "read_idx",
    "split",
    "stratified_order",
    "three_way",
    "unpickle",
]
