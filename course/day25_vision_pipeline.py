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
import json
import math
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
from serving import demos, pipeline
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
    size: int = 0  # side of the model's input in pixels; 0: the pictures' median side, at most 64
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
# A model that does well in a notebook has taken one step of many.  The data may hold the same picture on both sides of
# the split, or a class that is empty, or look different from last month's.  The preprocessing of the training script
# may differ from the server's.  The new model may be better on average and useless on one class.  The file may not load
# in the server.  And the process may be killed half-way through replacing a model that people are using.
#
# A pipeline gives each of these a *component* with an output, and whose answer may be no:
#
# | component | artefact | says no when |
# |---|---|---|
# | ExampleGen | TFRecord shards, checksums | a file cannot be decoded, a class is empty |
# | StatisticsGen, SchemaGen, ExampleValidator | schema, anomalies | data contradicts the last version's schema |
# | Tuner, Trainer | a Keras model with its preprocessing inside | - |
# | Compressor, Exporter | LiteRT files, a version folder | - |
# | Evaluator | metrics by slice, a *blessing* | worse than a floor, or than the version that serves |
# | InfraValidator | an *infra blessing* | a real server cannot load it or answers differently |
# | Pusher | a version folder | either blessing is missing |
#
# After the push, a *rehearsal* sees whether the gate would refuse a half-trained network, the *endpoint* is queried as
# a client would, and a *drift monitor* compares pictures with those of training.


# %% [markdown]
# ## The model
# Everything between the file and the logits is part of the graph, so that training and serving cannot disagree: the
# decoder and the resizing stand in the exported signature (`core.export.decode_image`, which the training data goes
# through as well), the normalisation is the network's first layer, with the training split's own mean and variance.
# Augmentation is not part of it: it wraps the classifier while it is being trained and is left behind.


# %%
@dataclasses.dataclass
class Data:
    """Pictures at the model's size, and what is known of them; the test split stays in its shards."""

    x: np.ndarray  # uint8 [N, *shape]
    y: np.ndarray  # int32 [N]
    x_val: np.ndarray
    val: pipeline.Examples
    test: pipeline.Examples
    labels: list
    shape: tuple  # (H, W, C) of the model's input
    schema: dict

    def one_hot(self, y):
        return keras.utils.to_categorical(y, len(self.labels))


def build_model(cfg, data):
    """The classifier of `models.convnets`, with the training pixels' own moments: pixels 0..255 -> logits."""
    part = data.x[:5000].astype("float64")
    mean, variance = part.mean(axis=(0, 1, 2)), np.maximum(part.var(axis=(0, 1, 2)), 1.0)
    return small_resnet(data.shape, len(data.labels), cfg.width, mean.tolist(), variance.tolist())


def augmented(cfg, classifier, rate, steps):
    """`classifier` inside its augmentation, compiled: SGD with Nesterov's momentum, warm-up and cosine over `steps`."""
    augment = [layers.RandomFlip("horizontal")] if cfg.flip else []
    augment.append(layers.RandomTranslation(0.04, 0.04, fill_mode="nearest"))
    augment.append(layers.RandomErasing(factor=0.5, scale=(0.02, 0.2), value_range=(0, 255), fill_value=0.0))
    model = keras.Sequential([keras.Input(classifier.input_shape[1:]), *augment, classifier])
    warm = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warm), warmup_target=rate, warmup_steps=warm)
    model.compile(
        keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, weight_decay=5e-4),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.05),
        metrics=["accuracy"],
        jit_compile=core.runtime.jit(),
    )
    return model


def fit(cfg, model, data, steps, resume=None, **options):
    """Train for `steps` steps, counted in whole epochs; continues where `resume` says."""
    batch = min(cfg.batch, len(data.x))
    passes = math.ceil(50 * batch / len(data.x))  # of a small set, between two checkpoints
    each = min(steps, passes * (len(data.x) // batch))
    epochs, first = max(1, round(steps / each)), resume.epoch if resume else 0
    stream = core.data.batches((data.x, data.one_hot(data.y)), batch, seed=cfg.seed, first_epoch=first * passes,
                               epochs=epochs * passes)  # fmt: skip
    model.fit(stream, steps_per_epoch=each, epochs=epochs, initial_epoch=first, verbose=0, **options)
    return model


def trial(cfg, data, rate):
    """A network from the seed's own start, trained for a few steps."""
    keras.utils.set_random_seed(cfg.seed)
    return fit(cfg, augmented(cfg, build_model(cfg, data), rate, cfg.trial_steps), data, cfg.trial_steps)


def tune(cfg, data):
    """The Tuner: every learning rate for a few steps; the lowest validation loss wins."""
    held_out = (data.x_val[:2000], data.one_hot(data.val.label[:2000]))
    losses = {rate: trial(cfg, data, rate).evaluate(*held_out, batch_size=256, verbose=0)[0] for rate in cfg.rates}
    best = min(losses, key=losses.get)
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    return {"rate": best, "says": f"learning rate {best:g} (validation loss {tried})"}


def train(cfg, run, data, rate):
    """The Trainer: the classifier, trained with a checkpoint an epoch and saved as `classifier.keras`."""
    keras.utils.set_random_seed(cfg.seed)
    classifier = build_model(cfg, data)
    steps = max(1, cfg.steps // 20) if cfg.worse else cfg.steps
    model = augmented(cfg, classifier, rate, steps)
    resume = run.checkpoint(model)
    held_out = (data.x_val, data.one_hot(data.val.label))
    fit(cfg, model, data, steps, resume, callbacks=[resume, core.Progress()], validation_data=held_out,
        validation_batch_size=256)  # fmt: skip
    with core.files.atomic_path(run.folder / "classifier.keras") as temporary:
        classifier.save(temporary)
    last = {name: values[-1] for name, values in resume.history.items()}
    says = f"{classifier.count_params():,} parameters, validation accuracy {last['val_accuracy']:.4f}"
    return {"history": resume.history, "says": says}


# %% [markdown]
# ## Evaluate what will be served, and say no
# The Evaluator asks the exported folder, not the model in memory, and the last pushed version about the same pictures;
# the difference decides, for the whole and for every slice (`pipeline.judge`, `pipeline.bless`).  Compressed files pass
# the same gate, the uncompressed one their baseline; the smallest that passes is pushed beside the float model.


# %%
def serve(classifier, data):
    """The graph to export: files' bytes, or decoded pixels, in; label, score and probabilities out."""
    return export.image_signatures(classifier, data.shape, data.labels)


def compress(cfg, folder, classifier, data):
    """LiteRT files of four kinds; of those that pass the gate on the validation split, the smallest is the best."""
    named = keras.Model(classifier.input, {"probabilities": layers.Softmax()(classifier.output)})
    x, x_test = data.x_val.astype("float32"), pipeline.pixels(data.test, data.shape).astype("float32")
    rows = lite.compare(named, folder, data.x[:300], {"val": x, "test": x_test})
    found = {kind: pipeline.evaluate(row.pop("val"), data.val, data.labels) for kind, row in rows.items()}
    for kind, row in rows.items():
        row["accuracy"] = pipeline.evaluate(row.pop("test"), data.test, data.labels)["accuracy"]  # shown, not judged
        row |= pipeline.bless(found[kind], found["float"], **cfg.limits)
    passed = {kind: row["bytes"] for kind, row in rows.items() if row["verdict"] == pipeline.BLESSED}
    best = min(passed, key=passed.get)
    smaller = passed["float"] / passed[best]
    says = f"{best} is {smaller:.1f} times smaller, test accuracy {rows[best]['accuracy']:.4f}"
    return {"rows": rows, "best": best, "smaller": smaller, "says": says}


def write_candidate(folder, names, classifier, content, data):
    """Write the version to be judged, float and compressed, under one number: the second it was made."""
    number = str(int(time.time()))
    files = np.array(list(pipeline.contents(data.test).take(4).as_numpy_iterator()), dtype=object)
    pixels = pipeline.pixels(data.test, data.shape, count=4)
    sample = {"serving_default": {"image_bytes": files}, "pixels": {"pixels": pixels}}
    export.export(classifier, folder / names[0] / number, serve(classifier, data), sample=sample, labels=data.labels,
                  extra={"schema.json": json.dumps(data.schema)})  # fmt: skip
    lite.export(content, folder / names[1] / number, pixels.astype("float32"), data.labels)
    return {"version": number, "says": f"version {number}"}


def rehearse(cfg, data, metrics):
    """The network after one of the tuner's trials, held against the new version: the gate should say no."""
    logits = trial(cfg, data, cfg.rates[0]).predict(pipeline.pixels(data.test, data.shape), batch_size=256, verbose=0)
    quality = pipeline.evaluate(np.asarray(keras.ops.softmax(logits)), data.test, data.labels)
    verdict = pipeline.bless(quality, metrics, **cfg.limits)
    says = f"a network of {cfg.trial_steps} steps would be {verdict['verdict']}: {'; '.join(verdict['reasons'][:1])}"
    return verdict | {"says": says}


# %% [markdown]
# ## The endpoint
# A process of its own serves the pushed folders over TensorFlow Serving's protocol from the first second of the run: a
# new version replaces the old one under way, and a refused one changes nothing.  A client sends a file's bytes,
# base64-encoded, over REST, or a tensor over gRPC; the README has the line for the stock container.


# %%
def ask(endpoint, names, data):
    """Query the endpoint by every route: its answers for 16 test pictures, milliseconds a call from one client."""
    client, small = (Client(endpoint.url, endpoint.grpc_target, model=name) for name in names)
    files = list(pipeline.contents(data.test).take(16).as_numpy_iterator())
    answers = client.predict(instances=files)  # bytes travel as {"b64": ...}
    remote = client.predict_grpc({"image_bytes": np.array(files, dtype=object)})
    if not np.allclose([row["probabilities"] for row in answers], remote["probabilities"], atol=1e-5):
        raise RuntimeError("REST and gRPC answer differently for the same pictures")
    one, pixels = np.array(files[:1], dtype=object), pipeline.pixels(data.test, data.shape, count=1)
    latency = {
        "REST, file": time_calls(lambda: client.predict(instances=files[:1])),
        "gRPC, file": time_calls(lambda: client.predict_grpc({"image_bytes": one})),
        "REST, pixels": time_calls(lambda: client.predict(instances=pixels, signature="pixels")),
        "REST, pixels, compressed": time_calls(lambda: small.predict(instances=pixels)),
    }
    version = max(int(state["version"]) for state in client.status() if state["state"] == "AVAILABLE")
    medians = ", ".join(f"{route} {row['p50_ms']:.1f} ms" for route, row in latency.items())
    return {"answers": answers, "latency": latency, "version": version, "says": f"version {version}; median {medians}"}


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
    side = cfg.size or min(64, int(found["side"]["median"]))
    shape = (side, side, schema["channels"])
    x, x_val = pipeline.pixels(splits["train"], shape), pipeline.pixels(splits["val"], shape)
    return Data(x, splits["train"].label, x_val, splits["val"], splits["test"], labels, shape, schema)


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
        answers, title = asked["answers"], f"what version {asked['version']} answered over REST"
        captions = [f"{answer['label']} {answer['score']:.2f}" for answer in answers]
        right = [answer["label"] == data.labels[i] for answer, i in zip(answers, data.test.label, strict=False)]
        pictures = pipeline.pixels(data.test, data.shape, count=len(right))
        run.figure("served", plots.predictions(pictures, captions, right, title=title))
        run.record["tables"]["latency"] = [{"route": route} | row for route, row in asked["latency"].items()]
        for route in ("REST", "gRPC"):
            run.record["metrics"][f"{route.lower()}_p50_ms"] = asked["latency"][f"{route}, file"]["p50_ms"]


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if not Path(cfg.data).is_dir() and cfg.data not in core.data.SETS:
        raise core.InputError(f"--data {cfg.data} is neither a folder nor a data set of `python -m course.core.data`")
    name = UNIT if not Path(cfg.data).is_dir() else f"day25_{core.data.slug(Path(cfg.data).resolve().name)}"
    bases = {model: Path(cfg.exports) / model for model in (name, f"{name}_lite")}
    ports = dict(rest_port=cfg.rest_port, grpc_port=cfg.grpc_port)
    with core.run(UNIT, options, cfg) as run, pipeline.endpoint(bases, run.folder, **ports) as endpoint:
        step = functools.partial(pipeline.component, run, lineage := [])
        data = examine(cfg, run, bases[name], step)
        run.record["data"] = pipeline.provenance(run.folder)
        rate = step("Tuner", lambda: tune(cfg, data))["rate"]
        history = run.record["history"] = step("Trainer", lambda: train(cfg, run, data, rate))["history"]
        classifier = keras.models.load_model(run.folder / "classifier.keras")
        lighter = step("Compressor", lambda: compress(cfg, run.folder / "lite", classifier, data))
        content, candidate = (run.folder / "lite" / f"{lighter['best']}.tflite").read_bytes(), run.folder / "candidate"
        made = step("Exporter", lambda: write_candidate(candidate, [*bases], classifier, content, data))["version"]
        folders = {model: candidate / model / made for model in bases}
        sides = folders[name], bases[name], data.test, data.labels
        judged = step("Evaluator", lambda: pipeline.judge(*sides, **cfg.limits))
        if blessed := judged["verdict"] == pipeline.BLESSED:
            infra = step("InfraValidator", lambda: pipeline.infra_validate(folders))
            blessed = infra["verdict"] == pipeline.INFRA_BLESSED
        if blessed:
            step("Pusher", lambda: pipeline.push_all(folders, bases))
            pipeline.wait_available(endpoint, bases, int(made))
            step("Rehearsal", lambda: rehearse(cfg, data, judged["metrics"]))
        else:
            reasons = "; ".join((judged["reasons"] or infra["reasons"])[:3])
            print(f"REFUSED: {made} is not pushed ({reasons}); {judged['baseline'] or 'nothing'} keeps serving")
        asked = step("Endpoint", lambda: ask(endpoint, [*bases], data)) if pipeline.versions(bases[name]) else None
        step("DriftMonitor", lambda: pipeline.monitor(data.test, data.schema))
        report(run, data, history, judged, lighter, asked)
        run.record["tables"]["lineage"] = lineage
    if pipeline.versions(bases[name]):
        print(f"demo: {demos.command(UNIT, name, cfg.exports)}")
    return run.record


if __name__ == "__main__":
    core.cli(main)
