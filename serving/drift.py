"""Drift: what a served model is asked, and what it answers, held against what it was trained on.

A version carries the statistics of its training data (`assets.extra/statistics.json`: a histogram for each feature)
and the thresholds (`schema.json`).  The monitor measures the same features of logged requests (`server.request_log`)
and gives a verdict for each, by the two measures of TensorFlow Data Validation:

    jensen_shannon   divergence of two histograms in bits, 0 (alike) to 1 (disjoint), for numbers
    l_infinity       the largest difference of two shares, 0 to 1, for categories

Few requests differ from the training data by chance alone.  So each feature has a *noise floor*: what 99.9 % of samples
of that size, drawn from training's own distribution, stay below.  An alarm rings only above both the floor and the
threshold, whatever the number of examples; that all is well is said only from the number on at which the floor has sunk
below the threshold, and until then there are too few.  That takes requests to be independent: a picture that comes
again is counted once, as in the training data, but a client's burst of similar pictures is not seen through.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np

from course.core import files, flags
from course.core.errors import InputError
from course.core.experiment import to_json
from serving import pictures

STATISTICS, SCHEMA = "statistics.json", "schema.json"  # in a version's assets.extra
PREDICTED = "predicted class"
PIXELS = "brightness of pixels"  # of pictures that the client has fitted to the model; of files it is "brightness"
FEW = 30  # examples: fewer are no traffic, even where chance is out of the question
DRIFT, NO_DRIFT, TOO_FEW = "DRIFT", "NO_DRIFT", "TOO_FEW_REQUESTS"
_LEVEL, _DRAWS, _MOST = 0.999, 10_000, 100_000
_COLUMNS = 256  # of an input with more, such as text or sound, no feature is made


# --- measures --------------------------------------------------------------------------------------------------------


def jensen_shannon(counts, reference):
    """Jensen-Shannon divergence in bits of histograms [..., K] with the same bins: H((P+Q)/2) - (H(P)+H(Q))/2."""
    p, q = _shares(counts), _shares(reference)

    def entropy(shares):
        return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=-1)

    return np.maximum(0.0, entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def l_infinity(counts, reference):
    """The largest difference of the shares in histograms [..., K] with the same bins."""
    return np.abs(_shares(counts) - _shares(reference)).max(axis=-1)


MEASURES = {"jensen_shannon": jensen_shannon, "l_infinity": l_infinity}


def _shares(counts):
    counts = np.asarray(counts, dtype=float)
    return counts / np.maximum(1, counts.sum(axis=-1, keepdims=True))


def noise_floor(reference, size, measure):
    """What the measure stays below for 99.9 % of samples of `size` from the distribution that `reference` [K] shows.

    A parametric bootstrap: `reference` is itself a sample, so it is drawn again too.
    """
    rng = np.random.default_rng(0)  # one floor for one question
    shares, total = _shares(reference), int(np.sum(reference))
    drawn = rng.multinomial(size, shares, _DRAWS), rng.multinomial(total, shares, _DRAWS)
    return float(np.quantile(MEASURES[measure](*drawn), _LEVEL))


@functools.cache
def examples_needed(reference, measure, threshold):
    """The least number of examples whose noise floor is below the threshold; None where `reference` is too small.

    `reference` is a tuple of counts: whoever watches a version asks this once.
    """
    low, high = 0, FEW
    while noise_floor(reference, high, measure) >= threshold:
        low, high = high, 2 * high
        if high > _MOST:
            return None
    while low and high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if noise_floor(reference, middle, measure) < threshold else (middle, high)
    return high


# --- statistics ------------------------------------------------------------------------------------------------------


def summarise(features, edges=None):
    """Histograms of a data set's features: name -> values (numbers, or strings), one an example.

    Numbers are counted between their tenths, or the `edges` given (name -> [K]), as {"edges": [K],
    "counts": [K + 2]}: the outer two intervals are open, and the last count is of what is no number.  Strings are
    counted as {"counts": {value: count}}.
    """
    found = {}
    for name, values in features.items():
        values = np.asarray(values)
        if values.dtype.kind in "OUS":
            found[name] = {"counts": _count(values.tolist())}
        elif name in (edges or {}):
            found[name] = numeric(values, edges[name])
        else:
            numbers = values[np.isfinite(values)].astype(float)
            tenths = np.unique(np.quantile(numbers, np.linspace(0, 1, 11)[:-1])) if len(numbers) else []
            top = [np.nextafter(numbers.max(), math.inf)] if len(numbers) else []  # what is larger is new
            found[name] = numeric(values, [*tenths, *top])
    return found


def numeric(values, edges):
    """The histogram of numbers over given inner edges, as `summarise` gives it."""
    values, edges = np.asarray(values, dtype=float), [float(edge) for edge in edges]
    bins = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="right"))
    return {"edges": edges, "counts": np.bincount(bins, minlength=len(edges) + 2).tolist()}


def columns(name, array):
    """The features of an input [N, ...] of numbers: `name`, or `name[i]` for each of its columns."""
    rows = np.asarray(array).reshape(len(array), -1) if np.ndim(array) else np.asarray(array).reshape(1, 1)
    if rows.shape[1] > _COLUMNS:
        return {}
    return {name if rows.shape[1] == 1 else f"{name}[{i}]": rows[:, i] for i in range(rows.shape[1])}


def thresholds(features):
    """The thresholds of a new schema, for features as `summarise` gives them: 0.1 in the measure that suits each."""
    measure = {name: "jensen_shannon" if "edges" in entry else "l_infinity" for name, entry in features.items()}
    return {name: {"measure": measure[name], "threshold": 0.1} for name in features}


def _count(values):
    counts = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    return counts


BRIGHTNESS_EDGES = [16.0 * i for i in range(1, 16)]  # sixteen bins of 0..256


def summarise_pictures(examples):
    """`summarise` for the features of pictures, of `Examples` as `pictures.read` gives them."""
    side = np.minimum(examples.height, examples.width)
    named = [str(number) for number in examples.channels]
    features = {"brightness": examples.brightness, "side": side, "channels": named, "format": examples.format}
    return summarise(features, {"brightness": BRIGHTNESS_EDGES})


# --- requests --------------------------------------------------------------------------------------------------------


def measure(log, known, labels, seen=None):
    """Name -> values (one a row of the request) of the features in `known` that one `PredictionLog` tells.

    Image files and pixels [N, H, W, 1 or 3], where the training data were pictures; other inputs and outputs by their
    columns; the features of tf.Examples by their names; and the class that was answered, of `labels`.  Where the set
    `seen` is given, a row of a Predict call whose inputs are in it is passed over, and those of the others are added.
    """
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        from serving.server import tensors

        call, found = log.predict_log, {}
        inputs = {alias: tensors.from_proto(tensor) for alias, tensor in call.request.inputs.items()}
        outputs = {alias: tensors.from_proto(tensor) for alias, tensor in call.response.outputs.items()}
        new = [] if seen is None else _new_rows(inputs, seen)
        if len(new) and not new.any():
            return {}
        if len(new) and not new.all():
            inputs, outputs = (
                {alias: array[new] if array.shape[:1] == new.shape else array for alias, array in arrays.items()}
                for arrays in (inputs, outputs)
            )
        for alias, array in inputs.items():
            _add(found, _input_features(alias, array, known))
        for alias, array in outputs.items():
            if array.dtype != object:
                _add(found, columns(alias, array))
        found |= {PREDICTED: _answered(outputs, labels)}
    elif kind in ("classify_log", "regress_log"):
        call = getattr(log, kind)
        found = _example_features(call.request.input, known)
        rows = call.response.result.classifications if kind == "classify_log" else ()
        best = [max(row.classes, key=lambda entry: entry.score).label for row in rows if row.classes]
        found[PREDICTED] = [name for name in best if name]
    else:
        found = _example_features(log.multi_inference_log.request.input, known)
    return {name: values for name, values in found.items() if name in known and len(values)}


def _new_rows(inputs, seen):
    """bool [N]: which rows of a Predict call's inputs are not in `seen`, to which they are added; [] without rows."""
    counts = {array.shape[:1] for array in inputs.values()}
    if len(counts) != 1 or counts == {()}:
        return np.zeros(0, bool)
    ((count,),) = counts
    new = np.zeros(count, bool)
    for i in range(count):
        digest = hashlib.sha256()
        for alias, array in sorted(inputs.items()):
            parts = [*array[i : i + 1].reshape(-1)] if array.dtype == object else [array[i].tobytes()]
            digest.update(repr((alias, array.shape[1:], array.dtype.str, [*map(len, parts)])).encode())
            digest.update(b"".join(parts))
        new[i] = digest.digest() not in seen
        seen.add(digest.digest())
    return new


def _add(found, features):
    for name, values in features.items():
        found.setdefault(name, []).extend(values)


def _input_features(alias, array, known):
    of_pictures, found = "brightness" in known, {}
    if array.dtype == object and of_pictures:
        import tensorflow as tf

        for content in array.reshape(-1):
            with contextlib.suppress(tf.errors.InvalidArgumentError):  # a caption beside the picture
                _add(found, {name: [value] for name, value in pictures.look(content)[1].items()})
        return found
    if array.dtype == object:
        return {alias: [content.decode("utf-8", "replace") for content in array.reshape(-1)]}
    if of_pictures and array.ndim == 4 and array.shape[-1] in (1, 3):
        for pixels in array:
            _add(found, {PIXELS: [pictures.measures(pictures.canonical(pixels))["brightness"]]})
        return found
    return columns(alias, array)


def _answered(outputs, labels):
    """The classes that a Predict call answered: its `label`s, or the places of the largest of as many scores."""
    if "label" in outputs and outputs["label"].dtype == object:
        return [name.decode("utf-8", "replace") for name in outputs["label"].reshape(-1)]
    for array in outputs.values():
        if array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] == len(labels) > 1:
            return [labels[i] for i in array.argmax(axis=1)]
    return []


def _example_features(message, known):
    from tensorflow.core.example.example_pb2 import Example

    from serving.server.operations import examples_of

    found = {}
    for content in examples_of(message):
        for name, feature in Example.FromString(content).features.feature.items():
            kind = feature.WhichOneof("kind")
            values = list(getattr(feature, kind).value) if kind else []
            if kind == "bytes_list":
                for value in values:
                    _add(found, _input_features(name, np.array([value], object), known))
            elif values:
                _add(found, columns(name, [values]))
    return found


# --- the verdict -----------------------------------------------------------------------------------------------------


def compare(name, reference, values, limit):
    """The verdict on one feature: `reference` as `summarise` gives it, `values` of the requests, `limit` of the schema.

    "alarm" is true where the measure is above both its threshold and the noise floor, false where it is not although
    the floor is below the threshold, and None where there are too few values, or too little reference, to say so.
    """
    if "edges" in reference:
        edges = [f"{edge:.4g}" for edge in reference["edges"]]
        between = [f"{low} to {high}" if low != high else low for low, high in itertools.pairwise(edges)]
        bins = [f"below {edges[0]}", *between, f"{edges[-1]} and above", "no number"] if edges else ["any", "no number"]
        trained, asked = reference["counts"], numeric(values, reference["edges"])["counts"]
    else:
        found = _count(values)
        bins = sorted({*reference["counts"], *found})
        trained, asked = ([counts.get(name, 0) for name in bins] for counts in (reference["counts"], found))
    measured = {name: float(function(asked, trained)) for name, function in MEASURES.items()}
    needed = examples_needed(tuple(trained), limit["measure"], limit["threshold"])
    entry = {"examples": len(values), "needed": needed, **limit, **measured, "noise_floor": None, "alarm": None}
    if len(values):
        floor = entry["noise_floor"] = noise_floor(trained, len(values), limit["measure"])
        if len(values) >= FEW and entry[limit["measure"]] > max(floor, limit["threshold"]):
            entry["alarm"] = True
        elif needed is not None and len(values) >= needed:
            entry["alarm"] = False
    return entry | {"says": _line(name, entry), "bins": bins, "training": trained, "requests": asked}


def _line(name, entry):
    word = {"jensen_shannon": "Jensen-Shannon divergence", "l_infinity": "L-infinity distance"}[entry["measure"]]
    if not entry["examples"]:
        return f"{name}: not in the requests"
    few = f"too few, {entry['needed']} are needed" if entry["needed"] else "too few in the training data to tell"
    rings = {True: "ALARM", False: "no alarm", None: few}[entry["alarm"]]
    floor = f"the noise floor {entry['noise_floor']:.3f}"
    value = f"{word} {entry[entry['measure']]:.3f} over {entry['examples']:,} examples"
    return f"{name}: {value}, the alarm {entry['threshold']:g}, {floor}: {rings}"


def monitor(version, logs):
    """Hold logged requests (`PredictionLog`s) against the training statistics of a version's folder.

    Returns {"verdict", "says", "records", "features": name -> `compare`'s answer}.  DRIFT: a feature's alarm rings;
    TOO_FEW_REQUESTS: none could be judged.  `InputError` where the version carries no statistics.
    """
    assets = Path(version) / "assets.extra"
    try:
        reference = json.loads((assets / STATISTICS).read_text())["features"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{assets / STATISTICS} is missing or damaged: a version pushed anew has it") from error
    limits = _limits(assets / SCHEMA, reference)
    labels = (assets / "labels.txt").read_text().splitlines() if (assets / "labels.txt").exists() else []
    values, times, seen = {name: [] for name in reference}, [], set()
    for log in logs:
        times.append(log.log_metadata.timestamp_secs)
        _add(values, measure(log, reference, labels, seen if "brightness" in reference else None))
    found = {name: compare(name, reference[name], values[name], limits[name]) for name in reference}
    ringing = [name for name, entry in found.items() if entry["alarm"]]
    judged = [name for name, entry in found.items() if entry["alarm"] is not None]
    verdict = DRIFT if ringing else NO_DRIFT if judged else TOO_FEW
    what = f"in {', '.join(ringing)}" if ringing else f"{len(judged)} of {len(found)} features judged"
    says = f"{verdict}: {what}, by {len(times):,} logged requests"
    span = {"first": min(times), "last": max(times)} if times else {}
    return {"verdict": verdict, "says": says, "records": len(times), **span, "features": found}


def _limits(path, reference):
    """The schema's drift thresholds, and those of `thresholds` for features of which it has none."""
    try:
        limits = thresholds(reference) | (json.loads(path.read_text()).get("drift", {}) if path.exists() else {})
        bad = [name for name, limit in limits.items()
               if limit.get("measure") not in MEASURES or not 0 < limit.get("threshold", 0) < 1]  # fmt: skip
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: a version pushed anew has it whole") from error
    if bad:
        raise InputError(f"{path}: drift of {bad[0]} needs a measure and a threshold")
    return limits


def figure(verdict, title=""):
    """Shares of training and of the requests for every feature of a verdict; the title of one that rings is red."""
    from matplotlib import pyplot as plt

    from course.core import plots  # noqa: F401  sets the style

    shown = []
    for name, entry in verdict["features"].items():
        used = [i for i, pair in enumerate(zip(entry["training"], entry["requests"], strict=True)) if any(pair)]
        if entry["examples"] and len(used) > 1:  # where all are of one kind there is nothing to see
            shown.append((name, entry, used))
    drawn, axes = plt.subplots(1, max(1, len(shown)), figsize=(1 + 2.9 * max(1, len(shown)), 2.9), squeeze=False)
    for axis, (name, entry, used) in zip(axes[0], shown, strict=False):
        places = np.arange(len(used))
        for shift, part in ((-0.2, "training"), (0.2, "requests")):
            axis.bar(places + shift, _shares(entry[part])[used], 0.4, label=part)
        axis.set_xticks(places, [entry["bins"][i] for i in used], rotation=60, ha="right", rotation_mode="anchor")
        axis.tick_params(axis="x", labelsize=6)
        colour = "#b00020" if entry["alarm"] else "black"
        axis.set_title(f"{name}: {entry[entry['measure']]:.2f} (alarm {entry['threshold']:g})", color=colour, size=9)
        axis.set_ylabel("share")
        axis.grid(visible=False, axis="x")
    if shown:
        axes[0, 0].legend()
    drawn.suptitle(title)
    return drawn


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """Hold logged requests against the training statistics of the version that answered them."""

    log: str = ""  # filename_prefix of the request log, as models.config has it
    version: int = 0  # the version that answered; 0: the newest pushed one
    model: str = ""  # the model's name in the log, where several share it
    last: int = 10_000  # of the logged requests, the newest so many
    output: str = ""  # the JSON verdict, and beside it the figure; default: PREFIX.drift.json


def select(logs, version, model="", last=None):
    """The newest `last` records that a version of a model answered.

    `InputError` where there are none, or where no `model` is named and the log is of several.
    """
    answered, others, names = collections.deque(maxlen=last), set(), set()
    for log in logs:
        spec = log.log_metadata.model_spec
        if model in ("", spec.name):
            names.add(spec.name)
            others.add(spec.version.value)
            if spec.version.value == version:
                answered.append(log)
    if len(names) > 1:
        raise InputError(f"the log is of several models ({', '.join(sorted(names))}): name one with --model")
    if not answered:
        had = ", ".join(map(str, sorted(others))) or "none"
        raise InputError(f"no request that version {version} answered is in the log (versions in it: {had})")
    return list(answered)


def watch(version, prefix, model, *, count, since, timeout=60):
    """`monitor` for the newest `count` requests to `model` that were logged from the second `since` (of 1970's) on.

    They are waited for, as the log is written after the answers have been sent.  Those that do not come (their server
    was killed, its disk is full) are told of, and the others judged.
    """
    from serving.server import request_log

    logs, seen = collections.deque(maxlen=count), {}
    deadline, wanted = time.monotonic() + timeout, (model, int(Path(version).name))
    while True:
        for log in request_log.read(prefix, seen):
            about = log.log_metadata
            if (about.model_spec.name, about.model_spec.version.value) == wanted and about.timestamp_secs >= since:
                logs.append(log)
        if len(logs) == count or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    verdict = monitor(version, logs)
    lost = f"; {count - len(logs):,} that were sent are not in the log" if len(logs) < count else ""
    return verdict | {"says": verdict["says"] + lost}


def rehearse(version, prefix, model, url, files):
    """`watch` on image files that are asked with half the light: an alarm that never rings is not known to work."""
    from serving.client import Client

    since = int(time.time())
    with Client(url, model=model) as client:
        for content in files:
            client.predict(instances=[pictures.darkened(content)], version=int(Path(version).name))
    return watch(version, prefix, model, count=len(files), since=since)


def command(bases, words, prog):
    """`python -m serving.pipeline drift exports/<model> --log PREFIX`."""
    from serving import pipeline

    options = flags.read(Options(), words, prog=prog, description=Options.__doc__)
    base = pipeline.only(bases)
    if not options.log:
        raise InputError("say where the requests are logged: --log PREFIX, the filename_prefix in models.config")
    if options.last < 1:
        raise InputError(f"--last is {options.last}: it must be at least 1")
    from serving.server import request_log

    if not request_log.shards(options.log):
        raise InputError(f"no request is logged at {options.log}-*.tfrecord")
    number = options.version or pipeline.pushed([base])[base][-1]
    logs = select(request_log.read(options.log), number, options.model, options.last)
    verdict = {"version": number, "log": options.log} | monitor(base / str(number), logs)
    target = Path(options.output or f"{options.log}.drift.json")
    files.write_atomic(target, to_json(verdict))
    drawn = figure(verdict, title=f"{base.name} version {number}: training and {len(logs):,} logged requests")
    with files.atomic_path(target.with_suffix(".png")) as temporary:
        drawn.savefig(temporary, dpi=110, bbox_inches="tight")
    for entry in verdict["features"].values():
        print(f"  {entry['says']}")
    print(f"{verdict['says']} ({target})")
