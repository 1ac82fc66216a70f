"""The data that a model is compressed with: to train on, to choose by, and to be measured on once."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from course.core import data as sets
from course.core import files
from course.core.data import Splits, fetch, images
from course.core.errors import InputError

VALIDATION_SHARE, VALIDATION_MOST = 0.1, 5_000  # of the training part


@dataclasses.dataclass(frozen=True)
class Data(Splits):
    """A divided set with its classes' names and where it came from.

    x: uint8 [N, H, W, C] for pictures (0..255), float32 [N, ...] for anything else; y: int32 [N], indexing `labels`.
    """

    labels: list[str]
    provenance: dict


def load(name, limit=0, seed=0, *, shape=None, labels=None):
    """`Data` by `name`: a set of `course.core.data`, a .npz file, or a folder with one folder of pictures a class.

    A named set keeps its test part; a tenth of its training part, from the end and at most 5,000, is for validation,
    as in day 4.  A .npz holds x_train, y_train, x_test, y_test, and may hold x_val, y_val and labels; where it brings
    no validation part, a stratified tenth is drawn; without labels its numbers are the model's.  A folder is split by
    the pictures' own hashes, as in day 25; files that cannot be decoded are left out.

    limit: training examples kept, of a stratified order fixed by `seed`; 0: all.  shape: (H, W, C) that a folder's
    pictures are fitted to.  labels: the class names in the order of the model's logits; the set's numbers are changed
    to theirs.  Raises `InputError` where the data cannot be had or the classes are others.
    """
    path = Path(name)
    if path.suffix == ".npz":
        found = _from_npz(path)
    elif path.is_dir():
        found = _from_folder(path, shape)
    else:
        found = of_set(sets.load(name))
    if limit < 0:
        raise InputError(f"limit is {limit}: give a number of training examples, or 0 for all")
    found = part(found, "train", limit, seed)
    if not found.labels:
        most = 1 + max(int(y.max()) for y in (found.y_train, found.y_val, found.y_test))
        found = dataclasses.replace(found, labels=list(labels or map(str, range(most))))
        if len(found.labels) < most:
            raise InputError(f"{name} has {most} classes, the model {len(found.labels)}: they do not fit")
    elif labels is not None:
        found = in_order_of(found, labels)
    return _counted(found)


def part(data, name, count, seed=0):
    """`data` with `count` examples of its part `name`, "train" or "test", of a stratified order; 0: all of them."""
    x, y = getattr(data, f"x_{name}"), getattr(data, f"y_{name}")
    if not 0 < count < len(x):
        return data
    kept = images.stratified_order(y, seed)[:count]
    return _counted(dataclasses.replace(data, **{f"x_{name}": x[kept], f"y_{name}": y[kept]}))


def _counted(data):
    """`data` whose provenance says how many examples its parts have."""
    counts = {part: len(getattr(data, f"y_{part}")) for part in ("train", "val", "test")}
    return dataclasses.replace(data, provenance=data.provenance | counts)


def in_order_of(data, labels):
    """`data` with its classes numbered as in `labels`; names are compared as folder names are ("T-shirt/top" and
    "t_shirt_top" are one).  Raises `InputError` where they are not the same classes."""
    theirs, ours = ([images.slug(label) or label for label in names] for names in (labels, data.labels))
    if sorted(theirs) != sorted(ours):
        raise InputError(
            f"the model's classes ({', '.join(labels[:4])}, ...) are not those of {data.provenance['name']} "
            f"({', '.join(data.labels[:4])}, ...): give --data with the set it was trained on"
        )
    place = np.array([theirs.index(label) for label in ours], np.int32)
    renumbered = {f"y_{part}": place[getattr(data, f"y_{part}")] for part in ("train", "val", "test")}
    return dataclasses.replace(data, labels=list(labels), **renumbered)


def of_set(found):
    """`Data` of an `ImageSet`: its test part; of its training part the last tenth, at most 5,000, for validation."""
    held = min(VALIDATION_MOST, round(VALIDATION_SHARE * len(found.x_train)))
    parts = sets.three_way(found, len(found.x_train) - held, held, len(found.x_test))
    return _counted(Data(**vars(parts), labels=list(found.labels), provenance=found.provenance))


def _from_npz(path):
    if not path.is_file():
        raise InputError(f"{path} is not there: --data takes a data set's name, a .npz file or a folder of pictures")
    held = fetch.read_npz(path)
    if missing := [key for key in images.ARRAYS if key not in held]:
        raise InputError(f"{path} has no {', '.join(missing)}: it needs {', '.join(images.ARRAYS)}")
    arrays = {key: held[key] for key in images.ARRAYS}
    if "x_val" in held and "y_val" in held:
        arrays |= {"x_val": held["x_val"], "y_val": held["y_val"]}
    else:
        (x, y), (x_val, y_val) = images.split(arrays["x_train"], arrays["y_train"], VALIDATION_SHARE, seed=0)
        arrays |= {"x_train": x, "y_train": y, "x_val": x_val, "y_val": y_val}
    for key, array in arrays.items():
        if key.startswith("x") and array.dtype != np.uint8:
            arrays[key] = array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise InputError(f"{path}: {key} holds values that are not finite")
        if key.startswith("y") and (array.dtype.kind not in "iu" or array.ndim != 1 or array.min(initial=0) < 0):
            raise InputError(f"{path}: {key} is {array.dtype} {list(array.shape)}; class numbers are integers [N]")
        if not len(array):
            raise InputError(f"{path}: {key} is empty")
    for part in ("train", "val", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if len(x) != len(y) or x.shape[1:] != arrays["x_train"].shape[1:]:
            raise InputError(f"{path}: x_{part} {list(x.shape)} does not fit y_{part} {list(y.shape)} or x_train")
        arrays[f"y_{part}"] = y.astype(np.int32)
    classes = 1 + max(int(arrays[f"y_{part}"].max()) for part in ("train", "val", "test"))
    labels = [str(label) for label in held["labels"]] if "labels" in held else []
    if "labels" in held and len(labels) < classes:
        raise InputError(f"{path}: class {classes - 1} has no name among the {len(labels)} labels")
    own = {"name": path.stem, "source": "own file", "sha256": files.sha256(path), "licence": "the owner's"}
    return Data(**arrays, labels=labels, provenance=own)


def _from_folder(path, shape):
    from serving import pictures

    if shape is None:
        raise InputError(f"the pictures in {path} have many sizes: the model's input shape must be known first")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "examples"
        # day 25's split: its test stays unseen
        manifest = pictures.ingest(path, folder, seed=0, val_share=0.05, skip_corrupt=True)
        parts = {part: pictures.read(folder, part) for part in pictures.SPLITS}
        arrays = {f"x_{part}": pictures.pixels(examples, shape) for part, examples in parts.items()}
    if broken := sum(anomaly["anomaly"] == "CORRUPT_IMAGE" for anomaly in manifest["anomalies"]):
        print(f"{path}: {broken} files that cannot be decoded were left out", flush=True)
    arrays |= {f"y_{part}": examples.label for part, examples in parts.items()}
    own = {"name": path.name, "source": "own folder", "sha256": manifest["sha256"], "licence": "the owner's"}
    return Data(**arrays, labels=manifest["labels"], provenance=own)
