"""Day 25 - Full pipeline for vision: from raw image files to a blessed, compressed and served model in one command.

Paper:     Baylor et al. 2017, "TFX: A TensorFlow-Based Production-Scale Machine Learning Platform", KDD 2017
Task:      classify pictures, one folder per class; refuse whatever is worse than the version that serves
Shapes:    image file -> uint8 [B,H,W,C] -> logits [B,classes] -> {label [B], score [B], probabilities [B,classes]}
Reference: none: the claim is that every step is there and can refuse, not a figure
Run:       python -m course.day25_vision_pipeline --preset cpu --seed 0, or --data FOLDER
Departs:   1. TFX itself cannot be installed beside this TensorFlow: the steps are ours, under TFX's names
           2. one machine: the orchestrator is the order of the calls in `main`; Beam's place is taken by tf.data
"""

# %%
import dataclasses
import functools
import itertools
import math
import shutil
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

from compression import lite
from course import core
from course.core import export, plots
from course.core.timing import time_calls
from models.convnets import small_resnet
from serving import demos, drift, pictures, pipeline
from serving.client import Client

UNIT = "day25_vision_pipeline"
REFERENCE = {}


@dataclasses.dataclass
class Config:
    """What is computed, and where it goes."""

    seed: int = 0  # of the initial weights, the augmentation and the order of the batches
    data: str = "fashion_mnist"  # a data set by name, or a folder with one folder of pictures per class
    limit: int = 0  # pictures used of each class; 0: all
    skip_corrupt: bool = False  # leave files that cannot be decoded out (and report them) where one would stop the run
    size: int = 0  # side of the model's input in pixels, at least 16; 0: the pictures' median side, at most 64
    width: int = 24  # channels of the first convolution
    steps: int = 12_000  # training steps, whatever the size of the data: the time is known beforehand
    batch: int = 128  # pictures a step
    rates: tuple[float, ...] = (0.05, 0.1, 0.2)  # learning rates that the tuner tries
    trial_steps: int = 100  # steps of one trial
    flip: bool = True  # mirror pictures while training; switch off where left and right differ (digits, letters)
    max_drop: float = 0.01  # accuracy a new version may lose to the last, and a compressed file to its original
    max_slice_drop: float = 0.1  # the same for one slice of at least 50 pictures
    worse: bool = False  # train for a twentieth of the steps: a candidate that the blessing has to refuse
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that versions are pushed to
    rest_port: int = dataclasses.field(default=8501, metadata={"where": True})  # 0: any free port
    grpc_port: int = dataclasses.field(default=8500, metadata={"where": True})  # 0: any free port

    @property
    def limits(self):
        return {"max_drop": self.max_drop, "max_slice_drop": self.max_slice_drop}


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", limit=40, width=8, steps=120, batch=32, rates=(0.1,), trial_steps=4),
    "cpu": dict(data="fashion_mnist_12k", steps=3_200),
    "full": {},
}


# %% [markdown]
# ## What can go wrong, and which step says no
# A model that does well in a notebook has taken one step of many.  The data may hold one picture on both sides of the
# split, or look different from last month's.  The new model may be better on average and useless on one class; its file
# may not load; the process may be killed half-way.  Each of these has a *component* whose answer may be no:
#
# | component | artefact | says no when |
# |---|---|---|
# | ExampleGen | TFRecord shards, checksums | a file cannot be decoded, a class is empty |
# | StatisticsGen, SchemaGen, ExampleValidator | schema, anomalies | data contradicts the last version's schema |
# | Tuner, Trainer, Compressor, Exporter | a Keras model, LiteRT files, a version folder | - |
# | Evaluator | metrics by slice, a *blessing* | worse than a floor, or than the version that serves |
# | InfraValidator | an *infra blessing* | a real server cannot load it or answers differently |
# | Pusher | a version folder | either blessing is missing |
# | Rehearsal, Endpoint, DriftMonitor | would a weak network pass? what is answered? how far from training? | - |


# %% [markdown]
# ## The model
# All between the file and the logits is part of the graph, so that training and serving cannot disagree: decoder and
# resizing stand in the exported signature (the training data goes through it as well), normalisation is the network's
# first layer.  Augmentation wraps the classifier in training and is left behind.


# %%
@dataclasses.dataclass
class Data:
    """Pictures at the model's size, and what is known of them; the test split stays in its shards."""

    x: np.ndarray  # uint8 [N, *shape]
    y: np.ndarray  # int32 [N]
    x_val: np.ndarray
    val: pictures.Examples
    test: pictures.Examples
    labels: list
    shape: tuple  # (H, W, C) of the model's input
    schema: dict
    training: dict  # statistics of the training split
    strategy: object  # of tf.distribute; networks are built and trained in its scope


def build_model(cfg, data):
    """The classifier of `models.convnets`, with the training pixels' own moments: pixels 0..255 -> logits."""
    part = data.x[:2000]
    mean, variance = part.mean(axis=(0, 1, 2), dtype="float64"), part.var(axis=(0, 1, 2), dtype="float64")
    return small_resnet(data.shape, len(data.labels), cfg.width, mean.tolist(), np.maximum(variance, 1).tolist())


def augmented(cfg, classifier, rate, steps):
    """`classifier` inside its augmentation, compiled: SGD with Nesterov's momentum, warm-up and cosine over `steps`."""
    augment = [layers.RandomFlip("horizontal", dtype="float32")] * cfg.flip  # drawn in float32 at any precision
    augment.append(layers.RandomTranslation(0.04, 0.04, fill_mode="nearest", dtype="float32"))
    augment.append(layers.RandomErasing(0.5, (0.02, 0.2), value_range=(0, 255), fill_value=0.0, dtype="float32"))
    model = keras.Sequential([keras.Input(classifier.input_shape[1:]), *augment, classifier])
    warm = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warm), warmup_target=rate, warmup_steps=warm)
    model.compile(
        core.runtime.scaled(keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=5e-4)),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.05),
        metrics=["accuracy"],
        jit_compile=core.runtime.jit(),
    )
    return model


def learn(cfg, data, rate, steps, run=None):
    """The network of the seed after about `steps` steps, in whole epochs: classifier, validation loss, history."""
    n = data.strategy.num_replicas_in_sync  # every replica gets its equal share of a batch
    batch = max(n, min(cfg.batch, len(data.x)) // n * n)
    passes = math.ceil(50 * batch / len(data.x))  # of a small set, between two checkpoints
    each = min(steps, passes * (len(data.x) // batch))
    epochs, some = max(1, round(steps / each)), len(data.x_val) // n * n
    held_out = (data.x_val[:some], keras.utils.to_categorical(data.val.label[:some], len(data.labels)))
    with data.strategy.scope():
        keras.utils.set_random_seed(cfg.seed)
        classifier = build_model(cfg, data)
        model = augmented(cfg, classifier, rate, each * epochs)
        resume = run.checkpoint(model) if run else None
        first, callbacks = (resume.epoch, [resume, core.Progress()]) if run else (0, [])
        arrays = (data.x, keras.utils.to_categorical(data.y, len(data.labels)))
        stream = core.data.batches(arrays, batch, seed=cfg.seed, first_epoch=first * passes, epochs=epochs * passes)
        model.fit(stream, steps_per_epoch=each, epochs=epochs, initial_epoch=first, callbacks=callbacks, verbose=0,
                  validation_data=held_out if run else None, validation_batch_size=256)  # fmt: skip
        loss, _ = model.evaluate(*held_out, batch_size=256, verbose=0)
    return classifier, loss, resume.history if run else None


def tune(cfg, data):
    """The Tuner: every learning rate for a few steps; the lowest validation loss wins."""
    losses = {rate: learn(cfg, data, rate, cfg.trial_steps)[1] for rate in cfg.rates}
    best = min(losses, key=losses.get)
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    return {"rate": best, "says": f"learning rate {best:g} (validation loss {tried})"}


def train(cfg, run, data, rate):
    """The Trainer: the classifier, trained with a checkpoint an epoch and saved as `classifier.keras`."""
    classifier, _, history = learn(cfg, data, rate, max(1, cfg.steps // 20) if cfg.worse else cfg.steps, run)
    with core.files.atomic_path(run.folder / "classifier.keras") as temporary:
        classifier.save(temporary)
    says = f"{classifier.count_params():,} parameters, validation accuracy {history['val_accuracy'][-1]:.4f}"
    return {"history": history, "says": says}


# %% [markdown]
# ## Evaluate what will be served, and say no
# The Evaluator asks the exported folder, not the model in memory, and the last pushed version; the difference decides,
# whole and for every slice (`pipeline.bless`).  Compressed files pass the same gate; the smallest is pushed too.


# %%
def serve(classifier, data):
    """The graph to export: files' bytes, or decoded pixels, in; label, score and probabilities out."""
    return export.image_signatures(classifier, data.shape, data.labels)


def compress(cfg, folder, classifier, data):
    """LiteRT files of four kinds; of those that pass the gate on the validation split, the smallest is the best."""
    named = keras.Model(classifier.input, {"probabilities": layers.Softmax(dtype="float32")(classifier.output)})
    x, x_test = data.x_val.astype("float32"), pictures.pixels(data.test, data.shape).astype("float32")
    rows = lite.compare(named, folder, data.x[:300], {"val": x, "test": x_test})
    found = {kind: pipeline.evaluate(row.pop("val"), data.val, data.labels) for kind, row in rows.items()}
    tested = {kind: pipeline.evaluate(row.pop("test"), data.test, data.labels) for kind, row in rows.items()}
    for kind, row in rows.items():
        row["accuracy"] = tested[kind]["accuracy"]  # shown, not judged
        row |= pipeline.bless(found[kind], found["float"], **cfg.limits)
    passed = {kind: row["bytes"] for kind, row in rows.items() if row["verdict"] == pipeline.BLESSED}
    best = min(passed, key=passed.get)
    smaller = passed["float"] / passed[best]
    says = f"{best} is {smaller:.1f} times smaller, test accuracy {rows[best]['accuracy']:.4f}"
    return dict(rows=rows, best=best, smaller=smaller, confusion=tested["float"]["confusion"], says=says)


def write_candidate(folder, bases, classifier, content, data, kept):
    """Write the version to be judged, float and compressed, under one number: the second it was made."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier or a killed run
    names, number = [*bases], pipeline.next_version(bases.values())
    files = np.array(pictures.first(data.test, 4), dtype=object)
    pixels = pictures.pixels(data.test, data.shape, count=4)
    sample = {"serving_default": {"image_bytes": files}, "pixels": {"pixels": pixels}}
    export.export(classifier, folder / names[0] / number, serve(classifier, data), sample=sample, labels=data.labels,
                  **kept)  # fmt: skip
    lite.export(content, folder / names[1] / number, pixels.astype("float32"), data.labels)
    return {"version": number, "says": f"version {number}"}


def rehearse(cfg, data, metrics):
    """The network after one of the tuner's trials, held against the new version: the gate should say no."""
    weak = export.in_float32(learn(cfg, data, cfg.rates[0], cfg.trial_steps)[0])
    logits = weak.predict(pictures.pixels(data.test, data.shape), batch_size=256, verbose=0)
    quality = pipeline.evaluate(np.asarray(keras.ops.softmax(logits)), data.test, data.labels)
    verdict = pipeline.bless(quality, metrics, **cfg.limits)
    says = f"a network of {cfg.trial_steps} steps would be {verdict['verdict']}: {'; '.join(verdict['reasons'][:1])}"
    return verdict | {"says": says}


# %% [markdown]
# ## The endpoint
# A process of its own serves the pushed folders over TensorFlow Serving's protocol from the first second on: a new
# version replaces the old one under way, a refused one changes nothing.  Its request log feeds the DriftMonitor.


# %%
def ask(endpoint, name, twin, data):
    """Query the endpoint by every route: its answers for 16 test pictures, milliseconds a call from one client."""
    with Client(endpoint.url, endpoint.grpc_target, name) as client, Client(endpoint.url, model=twin) as small:
        began, files = int(time.time()), pictures.first(data.test, 256)
        answers = [client.predict(instances=[file])[0] for file in files[:16]]  # bytes travel as {"b64": ...}
        remote = client.predict_grpc({"image_bytes": np.array(files[:16], dtype=object)})
        if not np.allclose([row["probabilities"] for row in answers], remote["probabilities"], atol=1e-5):
            raise RuntimeError("REST and gRPC answer differently for the same pictures")
        shape = [int(size) for size in client.input_shape("pixels")[1:]]  # of the version that serves
        fitted, each = pictures.pixels(data.test, shape, count=len(files)), dict(calls=200, warm_up=20)
        places = itertools.cycle(range(len(files)))  # another picture for every call: the DriftMonitor sees them
        routes = {
            "REST, file": lambda i: client.predict(instances=files[i : i + 1]),
            "gRPC, file": lambda i: client.predict_grpc({"image_bytes": np.array([files[i]], dtype=object)}),
            "REST, pixels": lambda i: client.predict(instances=fitted[i : i + 1], signature="pixels"),
            "REST, pixels, compressed": lambda i: small.predict(instances=fitted[i : i + 1]),
        }
        latency = {route: time_calls(lambda call=call: call(next(places)), **each) for route, call in routes.items()}
        logged, version = len(answers) + 1 + 3 * sum(each.values()), client.available()[-1]
        medians = ", ".join(f"{route} {row['p50_ms']:.1f} ms" for route, row in latency.items())
        return {"answers": answers, "latency": latency, "version": version, "began": began, "logged": logged,
                "says": f"version {version}; median {medians}"}  # fmt: skip


def demo(predict, examples=()):
    """The page that `python -m serving.demos day25_vision_pipeline` shows; `predict` calls the endpoint."""
    return core.pages.image_classifier(predict, "Day 25: the pushed model", examples)


def examine(cfg, run, base, step):
    """ExampleGen to ExampleValidator: raw files -> `Data`."""

    def source():
        return Path(cfg.data) if Path(cfg.data).is_dir() else core.data.extract_images(cfg.data, run.folder / "raw")

    # the split belongs to the data: another seed must not put the last version's training pictures into the test
    options = dict(seed=0, limit=cfg.limit, val_share=0.05, skip_corrupt=cfg.skip_corrupt)
    splits, labels, schema, found = pipeline.examine(source, run.folder / "examples", base, step, **options)
    side = cfg.size or max(16, min(64, int(found["side"]["median"])))
    shape = (side, side, schema["channels"])
    train, val, test = splits.values()
    x, x_val = (pictures.pixels(part, shape) for part in (train, val))
    return Data(x, train.label, x_val, val, test, labels, shape, schema, found, run.strategy)


def report(run, data, history, judged, lighter, asked):
    """Figures, and the metrics of the record."""
    metrics, rows = judged["metrics"], lighter["rows"]
    curves = {key: {"training": history[key], "validation": history[f"val_{key}"]} for key in ("loss", "accuracy")}
    run.figure("training", plots.panels(curves))
    run.figure("confusion", plots.confusion(metrics["confusion"], data.labels, title="float model, test split"))
    slices = {name: part["accuracy"] for name, part in metrics["slices"].items()}
    run.figure("slices", plots.bars(slices, title="accuracy by slice of the test split"))
    points = {name: (row["bytes"] / 1e3, row["accuracy"]) for name, row in rows.items()}
    run.figure("compression", plots.pareto(points, xlabel="file, kB", ylabel="test accuracy"))
    run.record["tables"] = {"compression": [{"kind": name} | row for name, row in rows.items()]}
    run.record["metrics"] = {"test_accuracy": metrics["accuracy"], "times_smaller": lighter["smaller"],
                             "compressed_accuracy": rows[lighter["best"]]["accuracy"],
                             "calibration_error": metrics["calibration_error"]}  # fmt: skip
    if asked:
        answers, title, took = asked["answers"], f"what version {asked['version']} answered over REST", asked["latency"]
        captions = [f"{answer['label']} {answer['score']:.2f}" for answer in answers]
        right = [answer["label"] == data.labels[i] for answer, i in zip(answers, data.test.label, strict=False)]
        shown = pictures.pixels(data.test, data.shape, count=len(right))
        run.figure("served", plots.predictions(shown, captions, right, title=title))
        run.record["tables"]["latency"] = [{"route": route} | row for route, row in took.items()]
        run.record["metrics"] |= {f"{way.lower()}_p50_ms": took[f"{way}, file"]["p50_ms"] for way in ("REST", "gRPC")}


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if not Path(cfg.data).is_dir() and cfg.data not in core.data.SETS:
        raise core.InputError(f"--data {cfg.data} is neither a folder nor a data set of `python -m course.core.data`")
    name = pipeline.model_name("day25", cfg.data) if Path(cfg.data).is_dir() else UNIT
    bases = {model: Path(cfg.exports) / model for model in (name, f"{name}_lite")}
    ports = dict(rest_port=cfg.rest_port, grpc_port=cfg.grpc_port, logged=[name])
    outside = dict(scope=False, inputs=pipeline.inputs(cfg.data, cfg.exports))
    with core.run(UNIT, options, cfg, **outside) as run, pipeline.endpoint(bases, run.folder, **ports) as endpoint:
        step = functools.partial(pipeline.component, run, lineage := [])
        data = examine(cfg, run, bases[name], step)
        run.record["data"] = pipeline.provenance(run.folder)
        rate = step("Tuner", lambda: tune(cfg, data))["rate"]
        history = run.record["history"] = step("Trainer", lambda: train(cfg, run, data, rate))["history"]
        classifier = export.in_float32(keras.models.load_model(run.folder / "classifier.keras", compile=False))
        lighter = step("Compressor", lambda: compress(cfg, run.folder / "lite", classifier, data))
        content, candidate = (run.folder / "lite" / f"{lighter['best']}.tflite").read_bytes(), run.folder / "candidate"
        kept = {"extra": pipeline.notes(data.schema, data.training, data.x, lighter["confusion"])}
        kept |= {"trained_on": {"unit": UNIT, "data": cfg.data}}
        made = step("Exporter", lambda: write_candidate(candidate, bases, classifier, content, data, kept))["version"]
        folders = {model: candidate / model / made for model in bases}
        sides = folders[name], bases[name], data.test, data.labels
        judged = step("Evaluator", lambda: pipeline.judge(*sides, **cfg.limits))
        if blessed := judged["verdict"] == pipeline.BLESSED:
            infra = step("InfraValidator", lambda: pipeline.infra_validate(folders))
            blessed = infra["verdict"] == pipeline.INFRA_BLESSED
        if blessed:
            step("Pusher", lambda: pipeline.push_all(folders, bases))
            step("Rehearsal", lambda: rehearse(cfg, data, judged["metrics"]))
        else:
            reasons = "; ".join((judged["reasons"] or infra["reasons"])[:3])
            print(f"REFUSED: {made} is not pushed ({reasons}); {judged['baseline'] or 'nothing'} keeps serving")
        pipeline.wait_available(endpoint, bases)
        asked = step("Endpoint", lambda: ask(endpoint, *bases, data)) if pipeline.versions(bases[name]) else None
        if asked:
            log = bases[name] / str(asked["version"]), run.folder / "requests" / name, name
            step("DriftMonitor", lambda: drift.watch(*log, count=asked["logged"], since=asked["began"]))
            dark = step("DriftRehearsal", lambda: drift.rehearse(*log, endpoint.url, pictures.first(data.test, 256)))
            run.figure("drift", drift.figure(dark, title="training, and requests that were darkened"))
        report(run, data, history, judged, lighter, asked)
        run.record["tables"]["lineage"] = lineage
    if pipeline.versions(bases[name]):
        print(f"demo: {demos.command(UNIT, name, cfg.exports)}")
    return run.record


if __name__ == "__main__":
    core.cli(main)
