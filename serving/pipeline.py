"""From raw files to a pushed version: the steps of a production pipeline under TFX's names, each a plain function.

    ExampleGen        pictures.ingest   raw image files -> TFRecord shards with checksums, split without leakage
    StatisticsGen     statistics        what the examples look like
    SchemaGen         infer_schema      what later examples must look like
    ExampleValidator  validate          anomalies of a data set against the schema
    Evaluator         evaluate, bless   quality by slice; the verdict against the last pushed version
    InfraValidator    infra_validate    the candidate loaded and queried in a server of its own
    Pusher            push, roll_back   one rename makes a version visible, one takes it back

Once a version serves, `serving.drift` watches what it is asked and `serving.canary` lets another one take its place.
Transform and Trainer belong to the unit: preprocessing stands in the exported graph.  Artefacts are folders and JSON
files, written whole or not at all, so a killed pipeline is continued by the same command.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np

from course.core import files, flags
from course.core.data.images import slug
from course.core.errors import InputError, cli
from course.core.experiment import to_json
from serving import drift, pictures
from serving.server.status import StatusError

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
        "features": drift.summarise_pictures(examples),
    }


def examine(source, folder, base, step, **options):
    """ExampleGen, StatisticsGen, SchemaGen and ExampleValidator as components of `step` (see `component`).

    `source()` gives the folder of raw pictures, `folder` is the examples', `base` the model's pushed versions, whose
    newest one's schema the data is held against; `options` are `ingest`'s.  Returns split -> `Examples`, the labels,
    the schema and training's statistics.
    """

    def generate():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed between the shards and its record
        return pictures.ingest(source(), folder, **options)

    manifest = step("ExampleGen", generate)
    splits = {name: pictures.read(folder, name) for name in pictures.SPLITS}
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
        "drift": drift.thresholds(training["features"] | {drift.PREDICTED: {"counts": training["classes"]}}),
    }


def notes(schema, training, inputs, confusion):
    """What a version carries for those who serve it, file name -> text: its schema, and the statistics that the drift
    monitor holds requests against.

    `training`: the training split's statistics; `inputs` uint8 [N, H, W, C]: its pictures as the network sees them;
    `confusion` [C, C]: the model's on the test split, for how often it answers each class.  Answers are compared with
    answers: what a model gets wrong is no drift.
    """
    light = drift.numeric(inputs.mean(axis=(1, 2, 3)), drift.BRIGHTNESS_EDGES)
    answered = dict(zip(training["classes"], np.sum(confusion, axis=0).tolist(), strict=True))
    features = training["features"] | {drift.PIXELS: light, drift.PREDICTED: {"counts": answered}}
    statistics = {"examples": training["examples"], "features": features}
    return {drift.SCHEMA: to_json(schema), drift.STATISTICS: to_json(statistics)}


def schema_of(base):
    """The schema that the newest pushed version in `base` was trained under; None where nothing has been pushed."""
    have = versions(base)
    if not have:
        return None
    path = Path(base) / str(have[-1]) / "assets.extra" / drift.SCHEMA
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is missing or damaged: roll it back, or push anew to another --exports") from error


def _shares(counts):
    total = max(1, sum(counts.values()))
    return {name: count / total for name, count in counts.items()}


def validate(found, schema, split="train"):
    """Anomalies of a split's statistics `found` against `schema`, as dicts of anomaly, severity and text.

    "error" stops the pipeline; "warning" is reported.
    """
    anomalies = []

    def add(name, severity, text):
        anomalies.append(pictures.anomaly(name, severity, f"{split}: {text}"))

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
    moved = float(drift.jensen_shannon(found["brightness"]["histogram"], schema["brightness"]))
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


# --- Evaluator -------------------------------------------------------------------------------------------------------


def answers(version, examples):
    """Probabilities [N, C] that an exported version gives for a split's image files, and the names of its classes.

    The folder is asked, not the model in memory, through the signature that takes bytes: what is measured is what will
    be pushed.
    """
    import tensorflow as tf

    call = tf.saved_model.load(str(version)).signatures["serving_default"]
    parts = [call(image_bytes=part)["probabilities"].numpy() for part in pictures.contents(examples).batch(32)]
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
                    with client.Client(sandbox.url, model=name) as connection:
                        wrong = _plays_sample(connection, Path(version), tolerance)
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
    """Version numbers in a model's folder, oldest first; unfinished and withdrawn ones have other names.

    A number with zeros in front is none of ours: a path made of it would lead nowhere.
    """
    base = Path(base)
    names = [path.name for path in base.iterdir()] if base.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


@contextlib.contextmanager
def _pushing(base):
    """One pusher at a time in a model's folder; what a killed one left unfinished is removed."""
    files.make_folder(base)
    with (base / ".pusher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        files.sweep(base)
        yield


@contextlib.contextmanager
def _pushing_all(bases):
    """`_pushing` in several folders at once, in one order for all, so that no two commands wait for each other."""
    with contextlib.ExitStack() as stack:
        for base in sorted(bases, key=Path.resolve):
            if base.is_dir():  # a folder that is misspelt is not to be made
                stack.enter_context(_pushing(base))
        yield


def _once_each(bases):
    """Folders as paths, without those that are another one's second spelling."""
    return [*{Path(base).resolve(): Path(base) for base in bases}.values()]


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
def endpoint(bases, folder, *, rest_port, grpc_port, logged=()):
    """A server process for several models (name -> base folder, which may still be empty), for a `with` block.

    `models.config` is written to `folder`; every request to a model in `logged` is kept at `folder`/requests/<model>.
    `InputError` for a taken port.
    """
    from serving import server

    for flag, port in (("--rest-port", rest_port), ("--grpc-port", grpc_port)):
        free_port(port, flag)
    for base in bases.values():
        files.make_folder(base)
    config = folder / "models.config"
    files.write_atomic(config, models_config(bases, {name: folder / "requests" / name for name in logged}))
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


def next_version(bases):
    """The number of the next version of several models: the second of now, or one above the newest there is."""
    return str(max([int(time.time()), *(number + 1 for base in bases for number in versions(base))]))


def wait_available(running, bases):
    """Wait until the newest pushed version of every model (name -> base folder) serves at an endpoint."""
    for name, base in bases.items():
        if have := versions(base):
            dataclasses.replace(running, model_name=name).wait_available(have[-1])


def withdrawn(base):
    """Withdrawn versions in a model's folder: number -> the folder of its latest withdrawal."""
    names = [re.fullmatch(r"withdrawn-([0-9]+)-([0-9]+)", path.name) for path in Path(base).glob("withdrawn-*")]
    latest_last = sorted(filter(None, names), key=lambda name: int(name[2]))
    return {int(name[1]): Path(base) / name[0] for name in latest_last}


def withdraw(base, number):
    """Hide one version, under a name `withdrawn-<version>-<time>` that no server takes for a version."""
    base = Path(base)
    with _pushing(base):
        _hide(base, number)


def _hide(base, number):
    (base / str(number)).rename(base / f"withdrawn-{number}-{time.time_ns()}")


def roll_back(*bases):
    """Withdraw the newest version, so that servers return to the one before; returns (withdrawn, now serving).

    Several folders (a model and its compressed twin) go back together.  `InputError`, and nothing is changed, where one
    of them would be left without a version, or where their newest ones are not the same.
    """
    bases = _once_each(bases)
    with _pushing_all(bases):
        have = {base: versions(base) for base in bases}
        for base, numbers in have.items():
            if len(numbers) < 2:
                raise InputError(f"{base} holds {len(numbers)} version(s): there is none to roll back to")
        if len({(numbers[-2], numbers[-1]) for numbers in have.values()}) > 1:
            newest = ", ".join(f"{numbers[-2]} and {numbers[-1]} in {base}" for base, numbers in have.items())
            raise InputError(f"the two newest versions differ ({newest}): roll these back one at a time")
        previous, newest = have[bases[0]][-2:]
        for base in bases:
            _hide(base, newest)
    return newest, previous


def restore(*bases, number=None):
    """Bring a withdrawn version back, the newest where none is named; returns its number.

    `InputError`, and nothing is changed, where one of the folders has not withdrawn it or holds one of that number.
    """
    bases = _once_each(bases)
    with _pushing_all(bases):
        found = {base: withdrawn(base) for base in bases}
        for base, away in found.items():
            if not away:
                raise InputError(f"{base} has no withdrawn version")
        number = number or max(max(away) for away in found.values())
        for base, away in found.items():
            if number not in away:
                raise InputError(f"{base} has not withdrawn version {number} (but {', '.join(map(str, sorted(away)))})")
            if number in versions(base):
                raise InputError(f"{base} holds a version {number} already")
        for base, away in found.items():
            away[number].rename(base / str(number))
    return number


def models_config(models, logs=None):
    """The text of a `models.config` for name -> base path, as stock TensorFlow Serving reads it.

    `logs`: name -> filename prefix of the log that the embedded server keeps of every request to that model.
    """
    from google.protobuf import text_format
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    config = ModelServerConfig()
    for name, base in models.items():
        entry = config.model_config_list.config.add(name=name, base_path=str(Path(base).resolve()))
        entry.model_platform = "tensorflow"
        if prefix := (logs or {}).get(name):
            collector = entry.logging_config.log_collector_config
            collector.type, collector.filename_prefix = "tfrecord", str(Path(prefix).resolve())
            entry.logging_config.sampling_config.sampling_rate = 1.0
    return text_format.MessageToString(config)


# --- commands --------------------------------------------------------------------------------------------------------

USAGE = """usage: python -m serving.pipeline COMMAND exports/<model> [...] [--flags]
  versions   list what is pushed and what is withdrawn
  roll-back  withdraw the newest version of the models named
  restore    bring a withdrawn version back
  canary     serve a new version beside the stable one, compare, then promote it or roll it back
  drift      hold logged requests against the training statistics
  warm-up    make logged requests the warm-up file of exports/<model>/<version>
COMMAND --help lists a command's flags"""


@dataclasses.dataclass
class RollBack:
    """Withdraw the newest version, so that servers return to the one before."""

    url: str = ""  # REST address of a running server: wait until it serves the version before
    config: str = ""  # the models.config that pins the versions, after a canary; needs --url
    grpc: str = ""  # gRPC address, to have that file read at once
    model: str = ""  # the model's name at the server, where it is not the folder's
    timeout: float = 60.0  # seconds to wait for the server


@dataclasses.dataclass
class Restore:
    """Bring a withdrawn version back."""

    version: int = 0  # the version; 0: the newest withdrawn one
    url: str = ""  # REST address of a running server: wait until it serves the newest version
    model: str = ""  # the model's name there, where it is not the folder's
    timeout: float = 60.0  # seconds to wait for the server


@dataclasses.dataclass
class WarmUp:
    """Make logged requests the warm-up file of a version, which must not be serving yet."""

    log: str = ""  # filename_prefix of the request log, as models.config has it
    model: str = ""  # the model's name in the log, where several share it
    limit: int = 100  # requests, the newest distinct ones; at most 1000


def main(argv):
    """`python -m serving.pipeline COMMAND exports/<model> ...`; `USAGE` lists the commands."""
    from serving import canary

    commands = {
        "versions": _list, "roll-back": _roll_back, "restore": _restore,
        "canary": canary.command, "drift": drift.command, "warm-up": _warm_up,
    }  # fmt: skip
    if argv in (["--help"], ["-h"]):
        print(USAGE)
        return
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders_needed = 0 if {"--help", "-h"} & {*argv} else 1
    if count < 1 + folders_needed or argv[0] not in commands:
        raise InputError("usage: python -m serving.pipeline COMMAND exports/<model> [...]; --help lists the commands")
    commands[argv[0]](argv[1:count], argv[count:], f"python -m serving.pipeline {argv[0]} exports/<model>")


def pushed(bases):
    """Folder -> its versions; `InputError` for one that holds none."""
    have = {base: versions(base) for base in bases}
    for base, numbers in have.items():
        if not numbers:
            raise InputError(f"{base} holds no pushed version: push one first, for example with make run")
    return have


def only(bases):
    """The folder of a command that takes one."""
    if len(bases) > 1:
        raise InputError(f"give one folder, not {len(bases)}")
    return Path(bases[0])


def _list(bases, words, prog):
    if words in (["--help"], ["-h"]):
        print(USAGE)
        return
    if words:
        raise InputError(f"{words[0]} is not known: versions takes folders only")
    for base in bases:
        away = ", ".join(map(str, sorted(withdrawn(base))))
        numbers = versions(base) if away else pushed([base])[base]
        print(f"{base}{f' ({away} withdrawn)' if away else ''}: {' '.join(map(str, numbers)) or 'nothing serves'}")


def _roll_back(bases, words, prog):
    from serving import canary

    options = flags.read(RollBack(), words, prog=prog, description=RollBack.__doc__)
    pushed(bases)
    if options.config:
        place = canary.Place(options.config, options.url, options.grpc, options.model, options.timeout)
        if not options.url:
            raise InputError("--config goes with --url, the address of the server that reads it")
        newest, previous = canary.roll_back(only(bases), place)
        print(f"{only(bases)}: version {newest} is withdrawn; {previous} serves at {options.url}")
        return
    names = _served_as(bases, options)
    newest, previous = roll_back(*names)
    try:
        says = {base: _now_serves(name, previous, options) for base, name in names.items()}
    except InputError as error:
        restore(*names, number=newest)  # or nothing would serve
        raise InputError(
            f"version {newest} is not withdrawn: {error}; where models.config pins the versions, give --config"
        ) from error
    for base, line in says.items():
        print(f"{base}: version {newest} is withdrawn; {line}")


def _restore(bases, words, prog):
    options = flags.read(Restore(), words, prog=prog, description=Restore.__doc__)
    names = _served_as(bases, options)
    number = restore(*names, number=options.version)
    for base, name in names.items():
        try:
            print(f"{base}: version {number} is back; {_now_serves(name, versions(base)[-1], options)}")
        except InputError as error:
            raise InputError(
                f"version {number} is back in {base}, but {error}; where models.config pins the versions, a canary of "
                "that version has it served"
            ) from error


def _served_as(bases, options):
    """Folder -> the name under which a server has its model."""
    bases = _once_each(bases)
    if options.model and len(bases) > 1:
        raise InputError("--model goes with one folder")
    return {base: options.model or base.resolve().name for base in bases}


def _now_serves(name, number, options):
    """Which version of a model serves, asked of a running server where one is named, once it is `number`."""
    from serving.client import Client, ServingError

    if not options.url:
        return f"{number} serves wherever the latest version is served"
    start, serving, why = time.monotonic(), [], ""
    deadline = start + options.timeout
    with Client(options.url, model=name) as connection:
        while True:
            try:
                states = {int(entry["version"]): entry["state"] for entry in connection.status()}
                serving = sorted(version for version, state in states.items() if state == "AVAILABLE")
                if {*states.values()} <= {"END"}:  # nothing serves, or is about to: do not leave it so for long
                    deadline = min(deadline, time.monotonic() + 2)
            except ServingError as error:
                serving, why = [], f" ({error})"
            if serving[-1:] == [number]:  # the highest is what is asked; a policy may have older ones serve on
                return f"{number} serves at {options.url}"
            if time.monotonic() > deadline:
                found = f"{', '.join(map(str, serving)) or 'nothing'}{why}"
                waited = f"after {time.monotonic() - start:.1f} s"
                raise InputError(f"{waited} {options.url} serves {found} and not {number}")
            time.sleep(0.1)


def _warm_up(bases, words, prog):
    from serving.server import request_log

    options = flags.read(WarmUp(), words, prog=prog, description=WarmUp.__doc__)
    if not options.log:
        raise InputError("say where the requests are logged: --log PREFIX, the filename_prefix in models.config")
    count = request_log.write_warmup(options.log, only(bases), options.model, options.limit)
    print(f"{only(bases) / request_log.warmup.FILE}: {count} requests")


if __name__ == "__main__":
    cli(main)
