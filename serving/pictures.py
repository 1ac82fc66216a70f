"""ExampleGen for folders of pictures: raw image files -> TFRecord shards with checksums, and the way back.

`look` tells of one picture what the statistics count; the drift monitor looks at requests with the same function.
"""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from course.core import files
from course.core.errors import InputError
from course.core.experiment import to_json

SPLITS = ("train", "val", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp"}  # what the serving graph's decoder reads
SHARD_BYTES = 16 * 2**20
_FORMATS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"BM": "bmp"}


@dataclasses.dataclass
class _Picture:
    path: Path
    part: str  # "train" or "test" where the folder is divided so, else ""
    label: str
    height: int = 0
    width: int = 0
    channels: int = 0  # 1 where every pixel is grey, whatever the file says
    brightness: float = 0.0  # mean of all pixels, 0..255
    format: str = ""  # by its first bytes, as a request tells it too
    pixels: str = ""  # sha256 of the decoded picture: equal for copies in another format or with other metadata


def ingest(source, folder, *, seed, limit=0, val_share=0.1, test_share=0.15, skip_corrupt=False):
    """Raw pictures in `source` -> TFRecord shards and `manifest.json` in `folder`, which appears whole or not at all.

    `source` holds a folder a class, or `train/` and `test/` with a folder a class each.  Pictures are grouped by the
    sha256 of their decoded pixels, and a group never crosses the split: a hash of (seed, pixels) decides where each
    one goes, so that adding pictures later to a class of three or more moves none from training to test.  Copies of
    one picture are kept once; where copies carry different labels none is kept.  Where `source` brings its own test
    part that part is kept, and copies of its pictures are taken out of training.  `limit`: files taken of each folder,
    0 for all.

    Returns the manifest.  Raises `InputError` for a missing or empty folder, a class without pictures, and, unless
    `skip_corrupt`, a file that the serving graph could not decode.
    """
    source, folder = Path(source), Path(folder)
    pictures = _find(source, limit)
    labels = sorted({picture.label for picture in pictures})
    with ThreadPoolExecutor() as pool:
        broken = [line for line in _progress(pool.map(_read, pictures), "reading pictures", len(pictures)) if line]
    if broken and not skip_corrupt:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise InputError(f"{broken[0]}{more}: mend or remove it, or leave such files out with --skip-corrupt")
    anomalies = [anomaly("CORRUPT_IMAGE", "warning", line) for line in broken]
    groups = {}
    for picture in pictures:
        if picture.pixels:
            groups.setdefault(picture.pixels, []).append(picture)
    kept, repeated, conflicting = _one_of_each(groups)
    if repeated:
        anomalies.append(anomaly("DUPLICATE", "info", f"{repeated} copies of a picture were left out"))
    for first, second in conflicting:
        text = f"{first.path} and {second.path} are one picture under two labels: none was kept"
        anomalies.append(anomaly("LABEL_CONFLICT", "warning", text))
    split = _split(kept, labels, seed, val_share, test_share)
    for label in labels:
        if not any(picture.label == label for picture in split["train"]):
            raise InputError(f"class {label} of {source} has no picture left for training: add pictures to it")
    counts = {name: len(part) for name, part in split.items()}
    for name in ("val", "test"):
        if not split[name]:
            raise InputError(f"{source} has too few pictures for a {name} split: give each class at least three")
    manifest = {"source": source.name, "seed": seed, "labels": labels, "anomalies": anomalies, "examples": counts}
    manifest["shards"] = {}
    with files.atomic_folder(folder, last="manifest.json") as temporary:
        for name, part in split.items():
            manifest["shards"] |= _write_shards(temporary, name, part, labels)
        digests = "".join(shard["sha256"] for shard in manifest["shards"].values())
        manifest["sha256"] = hashlib.sha256(digests.encode()).hexdigest()
        parts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        manifest["says"] = f"{parts} in {len(manifest['shards'])} shards, sha256 {manifest['sha256'][:12]}"
        (temporary / "manifest.json").write_text(to_json(manifest))
    return manifest


def _find(source, limit):
    """The picture files of a folder of class folders, in a fixed order."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: --data takes a folder that holds a folder of pictures a class")
    inside = {path.name: path for path in sorted(source.iterdir()) if path.is_dir() and path.name[0] not in "._"}
    parts = inside if set(inside) == {"train", "test"} else {"": source}
    if "train" in inside and parts is not inside:
        others = ", ".join(sorted(set(inside) - {"train"})) or "nothing"
        raise InputError(f"{source} holds train/ and {others}: give train/ and test/ alone, or the class folders alone")
    pictures = []
    for part in ("train", "test", ""):
        if part not in parts:
            continue
        for folder in sorted(path for path in parts[part].iterdir() if path.is_dir() and path.name[0] not in "._"):
            # names with a dot in front are other programs' (._picture.jpg of macOS, .thumbnails/)
            named = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
            found = sorted(p for p in named if not any(part[0] == "." for part in p.relative_to(folder).parts))
            if not found:
                kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
                raise InputError(f"class {folder.name} is empty: {folder} holds no {kinds} file; add some or remove it")
            for path in found:
                if not str(path).isprintable():
                    raise InputError(f"the name {str(path)!a} is not readable text: rename the file or folder")
            if limit:  # by a hash of the names: theirs is an order that may mean something
                found = sorted(found, key=lambda path: hashlib.sha256(path.name.encode()).digest())[:limit]
            pictures += [_Picture(path, part, folder.name) for path in found]
    if len({picture.label for picture in pictures}) < 2:
        raise InputError(f"{source} holds fewer than two class folders: put the pictures of each class in its own")
    return pictures


def look(content):
    """(pixels uint8 [H, W, 1 or 3], features) of an image file's bytes, decoded as the served graph does it.

    One channel where every pixel is grey, whatever the file says.  Raises `tf.errors.InvalidArgumentError`.
    """
    import tensorflow as tf

    decoded = tf.io.decode_image(content, expand_animations=False).numpy()
    pixels = canonical(decoded)
    kind = next((name for start, name in _FORMATS.items() if content.startswith(start)), "other")
    height, width = decoded.shape[:2]
    return pixels, measures(pixels) | {"height": height, "width": width, "side": min(height, width), "format": kind}


def canonical(decoded):
    """Decoded pixels [H, W, C] without what tells nothing: an alpha channel, and colour where every pixel is grey."""
    colour = decoded[..., :3]
    grey = colour.shape[-1] < 3 or bool((colour == colour[..., :1]).all())
    return np.ascontiguousarray(colour[..., :1] if grey else colour)


def darkened(content):
    """A picture with half the light, as a PNG: what a drift alarm is rehearsed with."""
    import tensorflow as tf

    return tf.io.encode_png(look(content)[0] // 2).numpy()


def measures(pixels):
    """The features that pixels [H, W, 1 or 3], 0..255, tell, whatever file they came in."""
    return {"brightness": float(pixels.mean()), "channels": str(pixels.shape[-1])}


def _read(picture):
    """Fill in a picture from its file; returns a line about what is wrong with it, or None."""
    import tensorflow as tf

    try:
        pixels, found = look(picture.path.read_bytes())
    except (OSError, tf.errors.InvalidArgumentError) as error:
        empty = picture.path.exists() and not picture.path.stat().st_size
        reason = "the file is empty" if empty else type(error).__name__
        return f"{picture.path} cannot be decoded ({reason})"
    picture.height, picture.width, picture.channels = pixels.shape
    picture.brightness, picture.format = found["brightness"], found["format"]
    shape = "x".join(map(str, pixels.shape))
    picture.pixels = hashlib.sha256(shape.encode() + pixels.tobytes()).hexdigest()
    return None


def _one_of_each(groups):
    """One picture of each group of equal ones; the number of copies left out; pairs that disagree on the label."""
    kept, repeated, conflicting = [], 0, []
    for copies in groups.values():
        other = next((copy for copy in copies if copy.label != copies[0].label), None)
        if other:
            conflicting.append((copies[0], other))
            continue
        kept.append(next((copy for copy in copies if copy.part == "test"), copies[0]))
        repeated += len(copies) - 1
    return kept, repeated, conflicting


def _split(pictures, labels, seed, val_share, test_share):
    """Deal pictures to train, val and test by a number in 0..1 of their own, made from (seed, pixels)."""

    def chance(picture):
        digest = hashlib.sha256(f"{seed} {picture.pixels}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    split = {name: [] for name in SPLITS}
    given = any(picture.part == "test" for picture in pictures)
    for label in labels:
        mine = [picture for picture in pictures if picture.label == label]
        split["test"] += [picture for picture in mine if picture.part == "test"]
        mine = sorted((picture for picture in mine if picture.part != "test"), key=chance)
        # below its share is test, the next share is validation; where none fell there, the lowest does
        tests = 0 if given or len(mine) < 3 else max(1, sum(chance(picture) < test_share for picture in mine))
        share = val_share if given else test_share + val_share
        vals = max(1, sum(chance(picture) < share for picture in mine) - tests) if len(mine) - tests > 1 else 0
        split["test"] += mine[:tests]
        split["val"] += mine[tests : tests + vals]
        split["train"] += mine[tests + vals :]
    for part in split.values():  # mix the classes within the shards
        part.sort(key=chance)
    return split


def _write_shards(folder, split, pictures, labels):
    """Pictures -> `<split>-00000-of-0000N.tfrecord` files; returns name -> checksum, count and bytes."""
    import tensorflow as tf

    size = sum(picture.path.stat().st_size for picture in pictures)
    count = max(1, round(size / SHARD_BYTES))
    shards = {}
    for i in range(count):
        name = f"{split}-{i:05d}-of-{count:05d}.tfrecord"
        mine = pictures[i::count]
        with tf.io.TFRecordWriter(str(folder / name)) as writer:
            for picture in mine:
                writer.write(_example(picture, labels).SerializeToString())
        path = folder / name
        shards[name] = {"examples": len(mine), "bytes": path.stat().st_size, "sha256": files.sha256(path)}
    return shards


def _example(picture, labels):
    """A `tf.train.Example` with the feature names that TensorFlow's image sets have used since TF-Slim."""
    import tensorflow as tf

    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        if isinstance(value, float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    values = {
        "image/encoded": picture.path.read_bytes(),
        "image/format": picture.format.encode(),
        "image/filename": f"{picture.label}/{picture.path.name}".encode(),
        "image/height": picture.height,
        "image/width": picture.width,
        "image/channels": picture.channels,
        "image/brightness": picture.brightness,
        "image/sha256": picture.pixels.encode(),
        "image/class/label": labels.index(picture.label),
        "image/class/text": picture.label.encode(),
    }
    return tf.train.Example(features=tf.train.Features(feature={key: feature(value) for key, value in values.items()}))


@dataclasses.dataclass
class Examples:
    """One split without its pictures, which `contents` and `pixels` stream; lists and arrays of length N."""

    shards: list  # paths
    label: np.ndarray  # int32
    filename: list
    format: list
    bytes: np.ndarray  # of each file
    height: np.ndarray
    width: np.ndarray
    channels: np.ndarray
    brightness: np.ndarray


def read(folder, split):
    """The `Examples` of a split; `InputError` where a shard's checksum is not the manifest's."""
    import tensorflow as tf

    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = [str(folder / name) for name in manifest["shards"] if name.startswith(f"{split}-")]
    for path in map(Path, shards):
        if not path.exists() or files.sha256(path) != manifest["shards"][path.name]["sha256"]:
            raise InputError(f"the shard {path} is damaged or missing: run again with --fresh to ingest anew")
    text = ("filename", "format")
    numbers = ("class/label", "height", "width", "channels")
    spec = {f"image/{key}": tf.io.FixedLenFeature([], tf.string) for key in ("encoded", *text)}
    spec |= {f"image/{key}": tf.io.FixedLenFeature([], tf.int64) for key in numbers}
    spec["image/brightness"] = tf.io.FixedLenFeature([], tf.float32)

    def without_picture(record):
        features = tf.io.parse_single_example(record, spec)
        features["bytes"] = tf.strings.length(features.pop("image/encoded"))
        return {key.removeprefix("image/"): value for key, value in features.items()}

    stream = tf.data.TFRecordDataset(shards).map(without_picture, num_parallel_calls=tf.data.AUTOTUNE)
    parts = list(stream.batch(1024).as_numpy_iterator())
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
    if not columns:
        columns = {key: np.zeros(0, int) for key in (*text, *numbers, "brightness", "bytes")}
    columns |= {key: [value.decode() for value in columns[key]] for key in text}
    return Examples(shards, columns.pop("class/label").astype(np.int32), **columns)


def contents(examples):
    """The image files' bytes, in order, as a `tf.data.Dataset` of scalar strings."""
    import tensorflow as tf

    spec = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
    stream = tf.data.TFRecordDataset(examples.shards)
    return stream.map(lambda record: tf.io.parse_single_example(record, spec)["image/encoded"])


def first(examples, count):
    """The files' bytes of the first `count` pictures, which are in no order, as a list."""
    return list(contents(examples).take(count).as_numpy_iterator())


def pixels(examples, shape, count=None):
    """The first `count` pictures (all where None), decoded and fitted to `shape` (H, W, C) as the served graph does it
    -> uint8 [count, H, W, C]."""
    import tensorflow as tf

    from course.core.export import decode_image

    count = len(examples.label) if count is None else min(count, len(examples.label))
    decoded = np.empty((count, *shape), dtype=np.uint8)
    stream = contents(examples).take(count)
    stream = stream.map(lambda content: decode_image(content, shape), num_parallel_calls=tf.data.AUTOTUNE)
    position = 0
    for part in stream.batch(512).as_numpy_iterator():
        decoded[position : position + len(part)] = part
        position += len(part)
    return decoded


def anomaly(name, severity, text):
    """What is odd about data: a name, "error", "warning" or "info", and a line."""
    return {"anomaly": name, "severity": severity, "text": text}


def _progress(items, text, total):
    """`items` with a progress bar, shown where there is a terminal and the work takes a while."""
    from rich.progress import track

    return track(items, text, total=total, transient=True, update_period=0.5)
