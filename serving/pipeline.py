"""From raw files to a pushed version: the steps of a production pipeline under TFX's names, each a plain function.

    ExampleGen        ingest            raw image files -> TFRecord shards with checksums, split without leakage
    StatisticsGen     statistics        what the examples look like
    SchemaGen         infer_schema      what later examples must look like
    ExampleValidator  validate, drift   anomalies of a data set against the schema; training against serving
    Evaluator         evaluate, bless   quality by slice; the verdict against the last pushed version
    InfraValidator    infra_validate    the candidate loaded and queried in a server of its own
    Pusher            push, roll_back   one rename makes a version visible, one takes it back

Transform and Trainer belong to the unit: preprocessing stands in the exported graph.  Artefacts are folders and JSON
files, written whole or not at all, so a killed pipeline is continued by the same command.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from course.core import files
from course.core.data.images import slug
from course.core.errors import InputError, cli
from course.core.experiment import to_json
from serving.server.status import StatusError

SPLITS = ("train", "val", "test")
SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp"}  # what the serving graph's decoder reads
SHARD_BYTES = 16 * 2**20
BLESSED, NOT_BLESSED = "BLESSED", "NOT_BLESSED"
INFRA_BLESSED, INFRA_NOT_BLESSED = "INFRA_BLESSED", "INFRA_NOT_BLESSED"


def component(run, lineage, name, function):
    """Run one component of a pipeline, once: after a kill, the answer of one that had ended is read back.

    `run`: as `core.run` gives it.  `function` returns JSON; its "verdict" or "says" is printed and, with the seconds,
    becomes a row of `lineage`.
    """

    def timed():
        start = time.perf_counter()
        answer = function()
        return {"answer": answer, "seconds": time.perf_counter() - start}

    kept = run.once(name, timed)
    said = kept["answer"].get("says") or kept["answer"].get("verdict", "")
    lineage.append({"component": name, "says": said, "seconds": round(kept["seconds"], 1)})
    print(f"{name:<16} {kept['seconds']:6.1f} s  {said}", flush=True)
    return kept["answer"]


# --- ExampleGen ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Picture:
    path: Path
    part: str  # "train" or "test" where the folder is divided so, else ""
    label: str
    height: int = 0
    width: int = 0
    channels: int = 0  # 1 where every pixel is grey, whatever the file says
    brightness: float = 0.0  # mean of all pixels, 0..255
    pixels: str = ""  # sha256 of the decoded picture: equal for copies in another format or with other metadata


def ingest(source, folder, *, seed, limit=0, val_share=0.1, test_share=0.15, skip_corrupt=False):
    """Raw pictures in `source` -> TFRecord shards and `manifest.json` in `folder`, which appears whole or not at all.

    `source` holds a folder a class, or `train/` and `test/` with a folder a class each.  Pictures are grouped by the
    sha256 of their decoded pixels, and a group never crosses the split: a hash of (seed, pixels) decides where each
    one goes, so that adding pictures later moves none from training to test.  Copies of one picture are kept
    once; where copies carry different labels none is kept.  Where `source` brings its own test part that part is
    kept, and copies of its pictures are taken out of training.  `limit`: files taken of each folder, 0 for all.

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
    anomalies = [_anomaly("CORRUPT_IMAGE", "warning", line) for line in broken]
    groups = {}
    for picture in pictures:
        if picture.pixels:
            groups.setdefault(picture.pixels, []).append(picture)
    kept, repeated, conflicting = _one_of_each(groups)
    if repeated:
        anomalies.append(_anomaly("DUPLICATE", "info", f"{repeated} copies of a picture were left out"))
    for first, second in conflicting:
        text = f"{first.path} and {second.path} are one picture under two labels: none was kept"
        anomalies.append(_anomaly("LABEL_CONFLICT", "warning", text))
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


def model_name(prefix, folder):
    """The name under which a model of the user's own folder is pushed: `<prefix>_<folder>`, in letters and digits.

    Six digits of a hash follow where the folder's name leaves nothing, or could pass for another model's.
    """
    own = Path(folder).resolve().name
    plain = slug(own)
    if not plain or plain == "vision_pipeline" or plain.endswith("_lite") or not own.isascii():
        plain = "_".join(filter(None, [plain, hashlib.sha256(own.encode(errors="replace")).hexdigest()[:6]]))
    return f"{prefix}_{plain}"


def inputs(source, exports):
    """What a pipeline's run depends on outside its own folder: the pictures, where they are the user's own (names,
    sizes, times of change), and the place it pushes to.  An interrupted run is continued only over the same."""
    source = Path(source)
    paths = sorted(source.rglob("*")) if source.is_dir() else []
    found = [(str(path.relative_to(source)), path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]
    return [str(Path(exports).resolve()), hashlib.sha256(repr(found).encode(errors="replace")).hexdigest()]


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
            # names with a dot in front are other programs' notes (macOS: ._picture.jpg)
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
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


def _read(picture):
    """Fill in a picture from its file; returns a line about what is wrong with it, or None."""
    import tensorflow as tf

    try:
        content = picture.path.read_bytes()
        decoded = tf.io.decode_image(content, expand_animations=False).numpy()
    except (OSError, tf.errors.InvalidArgumentError) as error:
        empty = picture.path.exists() and not picture.path.stat().st_size
        reason = "the file is empty" if empty else type(error).__name__
        return f"{picture.path} cannot be decoded ({reason})"
    colour = decoded[..., :3]
    grey = colour.shape[-1] < 3 or bool((colour == colour[..., :1]).all())
    canonical = np.ascontiguousarray(colour[..., :1] if grey else colour)
    picture.height, picture.width = decoded.shape[:2]
    picture.channels = 1 if grey else 3
    picture.brightness = float(canonical.mean())
    shape = "x".join(map(str, canonical.shape))
    picture.pixels = hashlib.sha256(shape.encode() + canonical.tobytes()).hexdigest()
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
        "image/format": picture.path.suffix.lower().lstrip(".").encode(),
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


# --- StatisticsGen, SchemaGen, ExampleValidator ----------------------------------------------------------------------


def statistics(examples, labels):
    """What a split looks like: counts by class and format, sizes, brightness (a histogram of 16 bins as well)."""
    side = np.minimum(examples.height, examples.width)
    histogram, _ = np.histogram(examples.brightness, bins=16, range=(0, 256))
    names, counts = np.unique(examples.format, return_counts=True)
    return {
        "examples": len(examples.label),
        "classes": dict(zip(labels, np.bincount(examples.label, minlength=len(labels)).tolist(), strict=True)),
        "formats": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "bytes": int(examples.bytes.sum()),
        "side": {"min": int(side.min()), "median": float(np.median(side)), "max": int(side.max())},
        "channels": int(examples.channels.max()),
        "brightness": {
            "mean": float(examples.brightness.mean()),
            "std": float(examples.brightness.std()),
            "histogram": histogram.tolist(),
        },
    }


def examine(source, folder, base, step, **options):
    """ExampleGen, StatisticsGen, SchemaGen and ExampleValidator as components of `step` (see `component`).

    `source()` gives the folder of raw pictures, `folder` is the examples', `base` the model's pushed versions, whose
    newest one's schema the data is held against; `options` are `ingest`'s.  Returns split -> `Examples`, the labels,
    the schema and training's statistics.
    """

    def generate():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed between the shards and its record
        return ingest(source(), folder, **options)

    manifest = step("ExampleGen", generate)
    splits = {name: read(folder, name) for name in SPLITS}
    found = {name: statistics(part, manifest["labels"]) for name, part in splits.items() if len(part.label)}
    step("StatisticsGen", lambda: found | {"says": summary(found["train"])})
    known = schema_of(base)
    origin = {"says": "of the last version" if known else "inferred from the training split"}
    schema = step("SchemaGen", lambda: {"schema": known or infer_schema(found["train"])} | origin)["schema"]
    anomalies = [anomaly for name in found for anomaly in validate(found[name], schema, name)]
    step("ExampleValidator", lambda: verdict_on(manifest["anomalies"] + anomalies))
    return splits, manifest["labels"], schema, found["train"]


def provenance(folder):
    """Where the pictures of a run's folder come from: the named set's note, or the name of the user's own folder."""
    manifest = json.loads((folder / "examples" / "manifest.json").read_text())
    note = folder / "raw" / "provenance.json"
    own = {"name": manifest["source"], "source": "own folder", "sha256": manifest["sha256"], "licence": "the owner's"}
    return (json.loads(note.read_text()) if note.exists() else own) | {"examples": manifest["examples"]}


def summary(found):
    """One line about a split's statistics."""
    side, kind = found["side"], "grey" if found["channels"] == 1 else "colour"
    size = f"{side['min']}" if side["min"] == side["max"] else f"{side['min']} to {side['max']}"
    fewest, most = min(found["classes"].values()), max(found["classes"].values())
    return f"{len(found['classes'])} classes of {fewest} to {most} {kind} pictures, sides of {size} pixels"


def infer_schema(training):
    """A schema from the training split's statistics: what later data is held against."""
    return {
        "labels": list(training["classes"]),
        "formats": sorted(training["formats"]),
        "channels": training["channels"],
        "side": {"min": training["side"]["min"] // 2, "max": training["side"]["max"] * 2},
        "min_examples_per_class": 5,
        "max_imbalance": 20.0,  # largest class over smallest
        "max_class_skew": 0.1,  # L-infinity distance of class shares from training's
        "max_brightness_drift": 0.1,  # Jensen-Shannon divergence from training's histogram
        "class_shares": _shares(training["classes"]),
        "brightness": training["brightness"]["histogram"],
    }


def schema_of(base):
    """The schema that the newest pushed version in `base` was trained under; None where nothing has been pushed."""
    have = versions(base)
    return json.loads((Path(base) / str(have[-1]) / "assets.extra" / "schema.json").read_text()) if have else None


def _shares(counts):
    total = max(1, sum(counts.values()))
    return {name: count / total for name, count in counts.items()}


def _anomaly(name, severity, text):
    return {"anomaly": name, "severity": severity, "text": text}


def validate(found, schema, split="train"):
    """Anomalies of a split's statistics `found` against `schema`, as dicts of anomaly, severity and text.

    "error" stops the pipeline; "warning" is reported.
    """
    anomalies = []

    def add(name, severity, text):
        anomalies.append(_anomaly(name, severity, f"{split}: {text}"))

    for label in sorted(set(found["classes"]) - set(schema["labels"])):
        add("UNEXPECTED_LABEL", "error", f"class {label} is not in the schema")
    for label in sorted(set(schema["labels"]) - set(found["classes"])):
        add("MISSING_LABEL", "error", f"class {label} of the schema has no example")
    counts = {label: count for label, count in found["classes"].items() if label in schema["labels"]}
    for label, count in counts.items():
        if split == "train" and count < schema["min_examples_per_class"]:
            add("TOO_FEW_EXAMPLES", "warning", f"class {label} has {count} examples")
    if min(counts.values(), default=0) and max(counts.values()) > schema["max_imbalance"] * min(counts.values()):
        text = f"{max(counts.values())} examples in one class, {min(counts.values())} in another"
        add("CLASS_IMBALANCE", "warning", text)
    if found["channels"] > schema["channels"]:
        add("UNEXPECTED_CHANNELS", "error", "colour pictures where the schema has grey ones")
    for name in sorted(set(found["formats"]) - set(schema["formats"])):
        add("UNEXPECTED_FORMAT", "warning", f"{found['formats'][name]} files of format {name}")
    if found["side"]["min"] < schema["side"]["min"] or found["side"]["max"] > schema["side"]["max"]:
        low, high = found["side"]["min"], found["side"]["max"]
        text = f"sides of {low} to {high} pixels, the schema has {schema['side']['min']} to {schema['side']['max']}"
        add("SIZE_OUT_OF_DOMAIN", "warning", text)
    shares = _shares(counts)
    skew = max((abs(shares[name] - schema["class_shares"][name]) for name in shares), default=0.0)
    if skew > schema["max_class_skew"]:
        add("CLASS_SKEW", "warning", f"a class's share differs by {skew:.2f} from training's")
    moved = drift(found["brightness"]["histogram"], schema["brightness"])
    if moved > schema["max_brightness_drift"]:
        add("BRIGHTNESS_DRIFT", "warning", f"Jensen-Shannon divergence {moved:.2f} from training's brightness")
    return anomalies


def verdict_on(anomalies):
    """The ExampleValidator's answer: anomalies, and a line about them; an "error" among them is an `InputError`."""
    for anomaly in anomalies:
        if anomaly["severity"] == "error":
            raise InputError(
                f"{anomaly['anomaly']}: {anomaly['text']}; mend the data, or push it under another --exports"
            )
        print(f"  {anomaly['severity']}: {anomaly['anomaly']}: {anomaly['text']}")
    return {"anomalies": anomalies, "says": f"{len(anomalies)} anomalies" if anomalies else "no anomaly"}


def drift(histogram, reference):
    """Jensen-Shannon divergence in bits, 0 (alike) to 1 (disjoint), of two histograms with the same bins.

    The measure that TensorFlow Data Validation takes for numeric features: JSD(P, Q) = H((P+Q)/2) - (H(P)+H(Q))/2.
    """
    p, q = (np.asarray(values, dtype=float) / max(1, np.sum(values)) for values in (histogram, reference))

    def entropy(values):
        values = values[values > 0]
        return float(-(values * np.log2(values)).sum())

    return max(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def monitor(served, schema):
    """The drift monitor: brightness of the pictures `served` (an `Examples`) against training's, as they came and, to
    see that the alarm would ring, darkened by half."""
    moved = {}
    for name, factor in {"test pictures": 1.0, "darkened by half": 0.5}.items():
        histogram, _ = np.histogram(factor * served.brightness, bins=16, range=(0, 256))
        moved[name] = drift(histogram, schema["brightness"])
    alarm = schema["max_brightness_drift"]
    says = ", ".join(f"{name} {value:.3f}{' (would ring)' if value > alarm else ''}" for name, value in moved.items())
    return {"divergence": moved, "says": f"Jensen-Shannon divergence: {says}; the alarm is at {alarm:g}"}


# --- Evaluator -------------------------------------------------------------------------------------------------------


def answers(version, examples):
    """Probabilities [N, C] that an exported version gives for a split's image files, and the names of its classes.

    The folder is asked, not the model in memory, through the signature that takes bytes: what is measured is what will
    be pushed.
    """
    import tensorflow as tf

    call = tf.saved_model.load(str(version)).signatures["serving_default"]
    parts = [call(image_bytes=part)["probabilities"].numpy() for part in contents(examples).batch(32)]
    return np.concatenate(parts), (Path(version) / "assets.extra" / "labels.txt").read_text().splitlines()


def evaluate(probabilities, examples, labels):
    """Quality of `probabilities` [N, C] on a split, whole and by slice.

    Returns accuracy with its 95 % Wilson interval, cross-entropy in nats, the expected calibration error over 15 bins
    (Guo et al. 2017, eq. 3), the confusion matrix, and the accuracy and size of every slice: each class, and the
    quarters of the pictures by brightness.
    """
    truth = examples.label
    guess = probabilities.argmax(axis=1)
    right = guess == truth
    matrix = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(matrix, (truth, guess), 1)
    order = np.argsort(np.argsort(examples.brightness, kind="stable"), kind="stable")
    quarter = 4 * order // len(order)
    slices = {f"class={label}": truth == i for i, label in enumerate(labels)}
    shades = ("darkest", "dark", "light", "lightest")
    slices |= {f"brightness={name} quarter": quarter == i for i, name in enumerate(shades)}
    chosen = np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, 1)
    return {
        "examples": len(truth),
        "accuracy": float(right.mean()),
        "interval": wilson(int(right.sum()), len(truth)),
        "cross_entropy": float(-np.log(chosen).mean()),
        "calibration_error": calibration_error(probabilities.max(axis=1), right),
        "confusion": matrix.tolist(),
        "slices": {
            name: {"accuracy": float(right[mask].mean()), "examples": int(mask.sum())}
            for name, mask in slices.items()
            if mask.any()
        },
    }


def wilson(successes, trials, z=1.96):
    """Wilson's score interval for a proportion, as [low, high]; z = 1.96 gives 95 %."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return [centre - half, centre + half]


def calibration_error(confidence, right, bins=15):
    """Expected calibration error: sum over bins of (bin's share) * |accuracy - mean confidence| (Guo et al., eq. 3)."""
    place = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    total = 0.0
    for i in np.unique(place):
        mask = place == i
        total += mask.mean() * abs(np.mean(right[mask]) - np.mean(confidence[mask]))
    return float(total)


def judge(version, base, examples, labels, **thresholds):
    """A candidate version against the newest one in `base`, both asked about the same split: `bless`'s verdict, with
    the candidate's metrics and the baseline's number.

    The value threshold is what always answering the commonest class would reach; `thresholds` are `bless`'s others.
    Raises `InputError` where `base` serves other classes.
    """
    metrics = evaluate(answers(version, examples)[0], examples, labels)
    have, baseline = versions(base), None
    if have:
        probabilities, known = answers(Path(base) / str(have[-1]), examples)
        if known != labels:
            raise InputError(f"{base} serves other classes ({', '.join(known[:4])}, ...): push to another --exports")
        baseline = evaluate(probabilities, examples, labels)
    floor = float(np.bincount(examples.label).max() / len(examples.label))
    verdict = bless(metrics, baseline, floor=floor, **thresholds)
    against = f"{baseline['accuracy']:.4f} of version {have[-1]}" if have else "nothing: the first version"
    says = f"{verdict['verdict']}: accuracy {metrics['accuracy']:.4f} against {against}"
    return verdict | {"metrics": metrics, "baseline": have[-1] if have else None, "says": says}


def bless(candidate, baseline, *, floor=None, max_drop, max_slice_drop):
    """The Evaluator's verdict, as {"verdict", "reasons"}: `candidate` and `baseline` are answers of `evaluate` on the
    same test split, `baseline` None where nothing has been pushed yet (then only the value threshold counts).

    Value threshold: accuracy above `floor` (None: none).  Change thresholds: accuracy at most `max_drop` below the
    baseline's, and that of no slice of 50 examples or more at most `max_slice_drop` below.
    """
    reasons = []
    if floor is not None and not candidate["accuracy"] > floor:
        reasons.append(f"accuracy {candidate['accuracy']:.4f} is not above the floor of {floor:.4f}")
    if baseline is not None:
        drop = baseline["accuracy"] - candidate["accuracy"]
        if drop > max_drop:
            was, now = baseline["accuracy"], candidate["accuracy"]
            reasons.append(
                f"accuracy {now:.4f} is {drop:.4f} below the last version's {was:.4f} ({max_drop:g} is allowed)"
            )
        for name, was in baseline["slices"].items():
            now = candidate["slices"].get(name)
            if now and now["examples"] >= 50 and was["accuracy"] - now["accuracy"] > max_slice_drop:
                reasons.append(f"slice {name}: {now['accuracy']:.3f} against {was['accuracy']:.3f}")
    return {"verdict": NOT_BLESSED if reasons else BLESSED, "reasons": reasons}


# --- InfraValidator --------------------------------------------------------------------------------------------------


def infra_validate(candidates, *, tolerance=1e-3):
    """Load candidate versions in a server of their own and play each its sample request (LOAD_AND_QUERY).

    `candidates`: model name -> version folder, whose `assets.extra/` holds the request and the answer that the model
    gave in process; numbers may differ by `tolerance`.  A server that does not start, load or answer is a verdict, not
    an exception.  Returns {"verdict", "reasons", "says"}.
    """
    from serving import client, server

    reasons = []
    names = list(candidates)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "models.config"
        config.write_text(models_config({name: Path(path).parent for name, path in candidates.items()}))
        try:
            with server.spawn(names[0], model_config_file=config) as sandbox:
                for name, version in candidates.items():
                    dataclasses.replace(sandbox, model_name=name).wait_available(int(Path(version).name))
                    wrong = _plays_sample(client.Client(sandbox.url, model=name), Path(version), tolerance)
                    reasons += [f"{name}: {wrong}"] if wrong else []
        except (client.ServingError, InputError, StatusError) as error:
            reasons.append(" ".join(str(error).split())[:300])
    verdict = INFRA_NOT_BLESSED if reasons else INFRA_BLESSED
    says = f"{verdict}: " + ("; ".join(reasons) or f"{', '.join(names)} loaded and queried")
    return {"verdict": verdict, "reasons": reasons, "says": says}


def _plays_sample(connection, version, tolerance):
    """What is wrong with the served answer to a version's sample request; None where it is the expected one."""
    body, expected = (json.loads((version / "assets.extra" / f"sample_{name}.json").read_text())
                      for name in ("request", "response"))  # fmt: skip
    answer = connection.predict(
        instances=body["instances"], signature=body["signature_name"], version=int(version.name)
    )

    def same(a, b):
        if isinstance(b, dict):
            return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
        if isinstance(b, list):
            return isinstance(a, list) and len(a) == len(b) and all(map(same, a, b))
        return a == b if isinstance(b, str) else isinstance(a, int | float) and abs(a - b) <= tolerance

    return None if same(answer, expected["predictions"]) else "the served model answers its sample request differently"


# --- Pusher ----------------------------------------------------------------------------------------------------------


def versions(base):
    """Version numbers in a model's folder, oldest first; unfinished and withdrawn ones have other names."""
    base = Path(base)
    return sorted(int(path.name) for path in base.iterdir() if path.name.isdecimal()) if base.is_dir() else []


@contextlib.contextmanager
def _pushing(base):
    """One pusher at a time in a model's folder; what a killed one left unfinished is removed."""
    files.make_folder(base)
    with (base / ".pusher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files.sweep(base)
        yield


def push(version, base):
    """Copy a version folder into the model's folder `base`, where it appears by one rename; returns its path.

    A version that is there already is left alone, so pushing again after a kill does no harm.
    """
    version, base = Path(version), Path(base)
    target = base / version.name
    with _pushing(base):
        if not target.exists():
            with files.atomic_folder(target) as temporary:
                shutil.copytree(version, temporary, dirs_exist_ok=True)
    return target


def push_all(candidates, bases):
    """Push several models' versions (both arguments: name -> folder), the last one named first."""
    targets = [push(candidates[name], bases[name]) for name in reversed(candidates)]
    return {"pushed": targets, "says": f"version {targets[-1].name} in {', '.join(map(str, bases.values()))}"}


@contextlib.contextmanager
def endpoint(bases, folder, *, rest_port, grpc_port):
    """A server process for several models (name -> base folder, which may still be empty), for a `with` block.

    `models.config` is written to `folder`.  `InputError` for a taken port.
    """
    from serving import server

    for flag, port in (("--rest-port", rest_port), ("--grpc-port", grpc_port)):
        free_port(port, flag)
    for base in bases.values():
        files.make_folder(base)
    config = folder / "models.config"
    files.write_atomic(config, models_config(bases))
    name = next(iter(bases))
    with server.spawn(name, model_config_file=config, rest_port=rest_port, grpc_port=grpc_port) as running:
        yield running


def free_port(port, flag, host="127.0.0.1"):
    """`port`, or any free one where it is 0; `InputError` naming `flag` where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # that of a server which has just ended is free
        try:
            probe.bind((host, port))
            return probe.getsockname()[1]
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} is taken or not to be had: give another {flag}, or 0 for any") from error


def wait_available(running, bases):
    """Wait until the newest pushed version of every model (name -> base folder) serves at an endpoint."""
    for name, base in bases.items():
        if have := versions(base):
            dataclasses.replace(running, model_name=name).wait_available(have[-1])


def roll_back(base):
    """Withdraw the newest version, so that servers return to the one before; returns (withdrawn, now serving).

    The folder is kept under a name `withdrawn-<version>-...`, which no server takes for a version.
    """
    base = Path(base)
    if len(versions(base)) < 2:
        raise InputError(f"{base} holds {len(versions(base))} version(s): there is none to roll back to")
    with _pushing(base):
        have = versions(base)
        (base / str(have[-1])).rename(base / f"withdrawn-{have[-1]}-{time.time_ns()}")
    return have[-1], have[-2]


def models_config(models):
    """The text of a `models.config` for name -> base path, as stock TensorFlow Serving reads it."""
    entry = '  config {{ name: "{}" base_path: "{}" model_platform: "tensorflow" }}\n'
    entries = "".join(entry.format(name, Path(base).resolve()) for name, base in models.items())
    return f"model_config_list {{\n{entries}}}\n"


def _progress(items, text, total):
    """`items` with a progress bar, shown where there is a terminal and the work takes a while."""
    from rich.progress import track

    return track(items, text, total=total, transient=True, update_period=0.5)


def main(argv):
    """`python -m serving.pipeline versions|roll-back exports/<model> ...`: what is pushed, and the way back."""
    if len(argv) < 2 or argv[0] not in ("versions", "roll-back"):
        raise InputError("usage: python -m serving.pipeline versions|roll-back exports/<model> ...")
    for base in argv[1:]:
        if not versions(base):
            raise InputError(f"{base} holds no pushed version: push one first, for example with make run")
    for base in argv[1:]:
        if argv[0] == "versions":
            print(f"{base}: {' '.join(map(str, versions(base)))}")
        else:
            withdrawn, serving = roll_back(base)
            print(f"{base}: version {withdrawn} is withdrawn; {serving} serves")


if __name__ == "__main__":
    cli(main)
