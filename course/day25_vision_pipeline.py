"""Day 25 - Full pipeline for vision: from raw image files to a blessed, compressed and served model in one command.

Paper:     Baylor et al. 2017, "TFX: A TensorFlow-Based Production-Scale Machine Learning Platform", KDD 2017
Task:      classify pictures of a folder a class; refuse whatever is worse than the version that serves
Shapes:    image file -> uint8 [B,H,W,C] -> logits [B,classes] -> {label [B], score [B], probabilities [B,classes]}
Reference: none: the claim is that every step is there and can refuse, not a figure
Run:       python -m course.day25_vision_pipeline --data <folder of class folders>
Departs:   1. TFX itself cannot be installed beside this TensorFlow: the steps are ours, under TFX's names
           2. one machine: the orchestrator is the order of the calls in `main`; Beam's place is taken by tf.data
"""

# %%
import dataclasses
import functools
import json
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

from compression import lite
from course import core
from course.core import export, plots
from course.core.timing import time_calls
from serving import pipeline
from serving.client import Client

UNIT = "day25_vision_pipeline"
REFERENCE = {}


@dataclasses.dataclass
class Config:
    """What is computed; the fields with metadata say where things go and change no result."""

    seed: int = 0
    data: str = "fashion_mnist"  # a set of pictures by name, or a folder that holds a folder of pictures a class
    limit: int = 0  # pictures used of each class; 0: all
    skip_corrupt: bool = False  # leave files that cannot be decoded out (and report them) where one would stop the run
    size: int = 0  # side of the model's input in pixels; 0: the pictures' median side, at most 64
    width: int = 24  # channels of the first convolution
    steps: int = 3_200  # training steps, whatever the size of the data: the time is known beforehand
    batch: int = 128
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # learning rates that the tuner tries
    trial_steps: int = 100  # steps of one trial
    flip: bool = True  # mirror pictures while training; switch off where left and right differ (digits, letters)
    max_drop: float = (
        0.01  # accuracy that a new version may lose against the last, and a compressed one against its own
    )
    max_slice_drop: float = 0.1  # the same for one slice of at least 50 pictures
    worse: bool = False  # stop training at a twentieth of the steps: a candidate that the blessing has to refuse
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that versions are pushed to
    rest_port: int = dataclasses.field(default=8501, metadata={"where": True})  # 0: any free port
    grpc_port: int = dataclasses.field(default=8500, metadata={"where": True})  # 0: any free port
    serve: bool = dataclasses.field(default=False, metadata={"where": True})  # keep endpoint and demo up until Ctrl-C


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", limit=40, width=8, steps=40, batch=32, rates=(3e-3,), trial_steps=4),
    "cpu": dict(data="fashion_mnist_12k"),
    "full": {},
}


# %% [markdown]
# ## What can go wrong, and which step says no
# A model that does well in a notebook has taken one step of many.  The data may hold the same picture on both sides of
# the split, or a class that is empty, or look different from last month's.  The preprocessing of the training script
# may differ from the server's.  The new model may be better on average and useless on one class.  The file may not load
# in the server.  And the process may be killed half-way through replacing a model that people are using.
#
# A pipeline gives each of these a *component* whose output is an artefact, and whose answer may be no:
#
# | component | artefact | says no when |
# |---|---|---|
# | ExampleGen | TFRecord shards, checksums | a file cannot be decoded, a class is empty |
# | StatisticsGen, SchemaGen, ExampleValidator | schema, anomalies | data contradicts the last version's schema |
# | Tuner, Trainer | a Keras model with its preprocessing inside | - |
# | Evaluator | metrics by slice, a *blessing* | worse than a floor, or than the version that serves |
# | InfraValidator | an *infra blessing* | a real server cannot load it or answers differently |
# | Pusher | a version folder | either blessing is missing |


# %% [markdown]
# ## The model
# Everything between the file and the logits is part of the graph, so that training and serving cannot disagree: the
# decoder and the resizing stand in the exported signature (`core.export.decode_image`, the function that the training
# data goes through as well), the normalisation is the network's first layer, with the training split's own mean and
# variance.  Augmentation is not: it wraps the classifier while it is being trained and is left behind.


# %%
def convolution(x, width, size=3, strides=1):
    """Convolution, batch normalisation, ReLU; [B,H,W,C] -> [B,H/strides,W/strides,width]."""
    x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.Activation("relu")(x)


def build_model(cfg, shape, classes, mean, variance):
    """A residual network (He et al. 2016) of two stages: pixels 0..255 `[B, *shape]` -> logits [B, classes]."""
    image = keras.Input(shape, name="pixels")
    x = layers.Normalization(mean=mean, variance=variance)(image)
    x = convolution(x, cfg.width, *((5, 2) if shape[0] > 40 else (3, 1)))
    x = layers.MaxPooling2D()(x)
    for width in (2 * cfg.width, 4 * cfg.width):
        x = convolution(x, width)
        x = layers.Add()([x, convolution(x, width)])
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(classes, dtype="float32", name="logits")(x), name="classifier")


def trainable(cfg, classifier, rate, steps):
    """`classifier` inside its augmentation, compiled: AdamW, warm-up and cosine decay over `steps`, smoothed labels."""
    augment = [layers.RandomFlip("horizontal")] if cfg.flip else []
    augment.append(layers.RandomErasing(factor=0.5, scale=(0.02, 0.2), value_range=(0, 255)))
    model = keras.Sequential([keras.Input(classifier.input_shape[1:]), *augment, classifier])
    warm = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(0.0, max(1, steps - warm), warmup_target=rate, warmup_steps=warm)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.02),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.05),
        metrics=["accuracy"],
        jit_compile=core.runtime.jit(),
    )
    return model


@dataclasses.dataclass
class Data:
    """Pictures at the model's size (uint8 [N,H,W,C]) and labels (int32 [N]); the test split stays in its shards."""

    x: np.ndarray
    y: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    labels: list

    @property
    def moments(self):
        """Mean and variance of the training pixels, a number a channel."""
        part = self.x[:5000].astype("float64")
        return part.mean(axis=(0, 1, 2)).tolist(), np.maximum(part.var(axis=(0, 1, 2)), 1.0).tolist()

    def one_hot(self, y):
        return keras.utils.to_categorical(y, len(self.labels))


def tune(cfg, data, shape):
    """The Tuner: each learning rate for a few steps from the same start; the lowest validation loss wins."""
    losses = {}
    for rate in cfg.rates:
        keras.utils.set_random_seed(cfg.seed)
        model = trainable(cfg, build_model(cfg, shape, len(data.labels), *data.moments), rate, cfg.trial_steps)
        fit(cfg, model, data, cfg.trial_steps, verbose=0)
        loss, _ = model.evaluate(data.x_val[:2000], data.one_hot(data.y_val[:2000]), batch_size=256, verbose=0)
        losses[rate] = float(loss)
    best = min(losses, key=losses.get)
    tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
    return {"rate": best, "losses": losses, "says": f"learning rate {best:g} (validation loss {tried})"}


def fit(cfg, model, data, steps, resume=None, **options):
    """Train for `steps` steps, counted in whole epochs; continues where `resume` says.  Returns the history."""
    batch = min(cfg.batch, len(data.x))
    each = min(steps, len(data.x) // batch)
    epochs, first = max(1, round(steps / each)), resume.epoch if resume else 0
    stream = core.data.batches((data.x, data.one_hot(data.y)), batch, seed=cfg.seed, first_epoch=first, epochs=epochs)
    model.fit(stream, steps_per_epoch=each, epochs=epochs, initial_epoch=first, **options)
    return resume.history if resume else model.history.history


def train(cfg, run, data, shape, rate):
    """The Trainer: the classifier, trained with a checkpoint an epoch and saved as `classifier.keras`."""
    keras.utils.set_random_seed(cfg.seed)
    classifier = build_model(cfg, shape, len(data.labels), *data.moments)
    steps = max(1, cfg.steps // 20) if cfg.worse else cfg.steps
    model = trainable(cfg, classifier, rate, steps)
    resume = run.checkpoint(model)
    held_out = (data.x_val, data.one_hot(data.y_val)) if len(data.y_val) else None
    history = fit(cfg, model, data, steps, resume, verbose=0, callbacks=[resume, core.Progress()],
                  validation_data=held_out, validation_batch_size=256)  # fmt: skip
    with core.files.atomic_path(run.folder / "classifier.keras") as temporary:
        classifier.save(temporary)
    last = {name: values[-1] for name, values in history.items()}
    return {"history": history, "says": f"{classifier.count_params():,} parameters, accuracy {last['accuracy']:.4f} in "
            f"training, {last.get('val_accuracy', float('nan')):.4f} in validation"}  # fmt: skip


# %% [markdown]
# ## Evaluate what will be served, and say no
# The Evaluator does not ask the Keras model in memory: it asks the exported folder, through the signature that takes
# files.  The last pushed version is asked the same questions about the same pictures, and the difference decides, for
# the whole and for every slice (`pipeline.judge`, `pipeline.bless`).  The compressed files pass the same gate, with the
# uncompressed one as their baseline; the smallest that passes is pushed beside the float model.


# %%
def serve(classifier, shape, labels):
    """The graph to export: files' bytes, or decoded pixels, in; label, score and probabilities out."""
    return export.image_signatures(classifier, shape, labels)


def compress(cfg, folder, classifier, data, test, shape):
    """LiteRT files of four kinds, measured on the test split; the smallest that passes the gate is the best."""
    named = keras.Model(classifier.input, {"probabilities": layers.Softmax()(classifier.output)})
    x, original = pipeline.pixels(test, shape).astype("float32"), None

    def gate(probabilities):
        nonlocal original
        quality = pipeline.evaluate(probabilities, test, data.labels)
        original = original or quality  # the first kind, float32
        verdict = pipeline.bless(quality, original, floor=0.0, max_drop=cfg.max_drop, max_slice_drop=cfg.max_slice_drop)
        return {"accuracy": quality["accuracy"], "verdict": verdict["verdict"]}

    rows = lite.compare(named, folder, data.x[:300], x, gate)
    best = min(
        (kind for kind in rows if rows[kind]["verdict"] == pipeline.BLESSED), key=lambda kind: rows[kind]["bytes"]
    )
    smaller = rows["float"]["bytes"] / rows[best]["bytes"]
    return {"rows": rows, "best": best, "smaller": smaller,
            "says": f"{best} is {smaller:.1f} times smaller, accuracy {rows[best]['accuracy']:.4f}"}  # fmt: skip


def candidate(folder, name, classifier, content, data, test, shape, schema):
    """Write the version to be judged, float and compressed, under one number: the second it was made."""
    number = int(time.time())
    files = np.array(list(pipeline.contents(test).take(2).as_numpy_iterator()), dtype=object)
    pixels = pipeline.pixels(test, shape, count=2)
    export.export(classifier, folder / name / str(number), serve(classifier, shape, data.labels), labels=data.labels,
                  sample={"serving_default": {"image_bytes": files}, "pixels": {"pixels": pixels}},
                  extra={"schema.json": json.dumps(schema)})  # fmt: skip
    lite.export(content, folder / f"{name}_lite" / str(number), pixels.astype("float32"), data.labels)
    return {"version": number, "says": f"version {number}"}


def rehearse(cfg, data, test, shape, metrics):
    """The same network after a tuner's trial, held against the new version: the refusal that this lesson promises."""
    weak = trainable(cfg, build_model(cfg, shape, len(data.labels), *data.moments), cfg.rates[0], cfg.trial_steps)
    fit(cfg, weak, data, cfg.trial_steps, verbose=0)
    logits = weak.predict(pipeline.pixels(test, shape), batch_size=256, verbose=0)
    quality = pipeline.evaluate(np.asarray(keras.ops.softmax(logits)), test, data.labels)
    verdict = pipeline.bless(quality, metrics, floor=0.0, max_drop=cfg.max_drop, max_slice_drop=cfg.max_slice_drop)
    return verdict | {"says": f"{verdict['verdict']}: {'; '.join(verdict['reasons'][:1])}"}


# %% [markdown]
# ## The endpoint
# A process of its own serves the pushed folders over TensorFlow Serving's protocol from the first second of the run, so
# that a new version replaces the old one under way, and a refused one changes nothing.  The stock container takes the
# same folder: `docker run -p 8501:8501 -v $PWD/exports/day25_vision_pipeline:/models/m -e MODEL_NAME=m
# tensorflow/serving`.  A client sends a file's bytes, base64-encoded, over REST, or a tensor over gRPC.


# %%
def ask(endpoint, name, test, shape):
    """Query the endpoint by every route: its answers for 16 test pictures, and milliseconds a call.

    Raises `RuntimeError` where REST and gRPC answer differently.
    """
    client, small = (Client(endpoint.url, endpoint.grpc_target, model=model) for model in (name, f"{name}_lite"))
    files = list(pipeline.contents(test).take(16).as_numpy_iterator())
    answers = client.predict(instances=files)  # bytes travel as {"b64": ...}
    remote = client.predict_grpc({"image_bytes": np.array(files, dtype=object)})
    if not np.allclose([row["probabilities"] for row in answers], remote["probabilities"], atol=1e-5):
        raise RuntimeError("REST and gRPC answer differently for the same pictures")
    one, pixels = np.array(files[:1], dtype=object), pipeline.pixels(test, shape, count=1)
    latency = {
        "REST, file": time_calls(lambda: client.predict(instances=files[:1])),
        "gRPC, file": time_calls(lambda: client.predict_grpc({"image_bytes": one})),
        "REST, pixels": time_calls(lambda: client.predict(instances=pixels, signature="pixels")),
        "REST, pixels, compressed": time_calls(lambda: small.predict(instances=pixels)),
    }
    version = max(int(state["version"]) for state in client.status() if state["state"] == "AVAILABLE")
    medians = ", ".join(f"{route} {row['p50_ms']:.1f} ms" for route, row in latency.items())
    return {"answers": answers, "latency": latency, "version": version, "says": f"version {version}; median {medians}"}


def demo(predict):
    """A Gradio page over `predict(bytes) -> {"probabilities": {label: p}, "version": v, "milliseconds": t}`."""
    import gradio as gr

    def show(path):
        if path is None:
            return None, "Choose a picture first."
        answer = predict(Path(path).read_bytes())
        return answer["probabilities"], f"Version {answer['version']} answered in {answer['milliseconds']:.1f} ms."

    picture = gr.Image(type="filepath", label="picture (PNG, JPEG, GIF or BMP)")
    outputs = [gr.Label(num_top_classes=5, label="class"), gr.Markdown()]
    return gr.Interface(
        show, picture, outputs, title="Day 25: the pushed model, through its endpoint", flagging_mode="never"
    )


# %% [markdown]
# ## All of it, in order


# %%
def examine(cfg, run, base, step):
    """ExampleGen to ExampleValidator: raw files -> `Data`, the test examples, the model's input shape, the schema."""

    def source():
        return Path(cfg.data) if Path(cfg.data).is_dir() else core.data.extract_images(cfg.data, run.folder / "raw")

    options = dict(seed=cfg.seed, limit=cfg.limit, skip_corrupt=cfg.skip_corrupt)
    splits, labels, schema, found = pipeline.examine(source, run.folder / "examples", base, step, **options)
    run.record["data"] = pipeline.provenance(run.folder)
    side = cfg.size or min(64, int(found["side"]["median"]))
    shape = (side, side, schema["channels"])
    x, x_val = pipeline.pixels(splits["train"], shape), pipeline.pixels(splits["val"], shape)
    return Data(x, splits["train"].label, x_val, splits["val"].label, labels), splits["test"], shape, schema


def report(run, data, history, judged, lighter, asked, pictures, truth):
    """Figures, and the metrics of the record."""
    metrics, rows = judged["metrics"], lighter["rows"]
    run.figure("training", plots.panels({
        name: {part: history[key] for part, key in (("training", name), ("validation", f"val_{name}")) if key in history}
        for name in ("loss", "accuracy")
    }))  # fmt: skip
    run.figure("confusion", plots.confusion(metrics["confusion"], data.labels, title="float model, test split"))
    run.figure("slices", plots.bars({name: part["accuracy"] for name, part in metrics["slices"].items()},
                                    title="accuracy by slice", size=(8, 3.4)))  # fmt: skip
    run.figure("compression", plots.pareto({name: (row["bytes"] / 1e3, row["accuracy"]) for name, row in rows.items()},
                                           xlabel="file, kB", ylabel="test accuracy", title="post-training"))  # fmt: skip
    run.record["tables"] = {"compression": [{"kind": name} | row for name, row in rows.items()]}
    run.record["metrics"] = {
        "test_accuracy": metrics["accuracy"],
        "compressed_accuracy": rows[lighter["best"]]["accuracy"],
        "times_smaller": lighter["smaller"],
        "calibration_error": metrics["calibration_error"],
    }
    if asked:
        answers, right = asked["answers"], [data.labels[i] for i in truth]
        titles = [f"{answer['label']} {answer['score']:.2f}" for answer in answers]
        colours = [
            "black" if answer["label"] == label else "#D55E00" for answer, label in zip(answers, right, strict=True)
        ]
        run.figure("served", plots.image_grid(pictures, titles, colours=colours, cell=1.25,
                                              title=f"what version {asked['version']} answered over REST"))  # fmt: skip
        run.record["tables"]["latency"] = [{"route": route} | row for route, row in asked["latency"].items()]
        run.record["metrics"] |= {"rest_p50_ms": asked["latency"]["REST, file"]["p50_ms"],
                                  "grpc_p50_ms": asked["latency"]["gRPC, file"]["p50_ms"]}  # fmt: skip


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    name = UNIT if not Path(cfg.data).is_dir() else f"day25_{core.data.slug(Path(cfg.data).resolve().name)}"
    bases = {model: Path(cfg.exports) / model for model in (name, f"{name}_lite")}
    ports = dict(rest_port=cfg.rest_port, grpc_port=cfg.grpc_port)
    with core.run(UNIT, options, cfg) as run, pipeline.endpoint(bases, run.folder, **ports) as endpoint:
        run.record["lineage"] = lineage = []
        step = functools.partial(pipeline.component, run, lineage)
        data, test, shape, schema = examine(cfg, run, bases[name], step)
        rate = step("Tuner", lambda: tune(cfg, data, shape))["rate"]
        history = step("Trainer", lambda: train(cfg, run, data, shape, rate))["history"]
        classifier = keras.models.load_model(run.folder / "classifier.keras")
        lighter = step("Compressor", lambda: compress(cfg, run.folder / "lite", classifier, data, test, shape))
        content = (run.folder / "lite" / f"{lighter['best']}.tflite").read_bytes()
        made = step("Exporter", lambda: candidate(run.folder / "candidate", name, classifier, content, data, test,
                                                  shape, schema))["version"]  # fmt: skip
        folders = {model: run.folder / "candidate" / model / str(made) for model in bases}
        limits = dict(max_drop=cfg.max_drop, max_slice_drop=cfg.max_slice_drop)
        judged = step("Evaluator", lambda: pipeline.judge(folders[name], bases[name], test, data.labels, **limits))
        blessed = judged["verdict"] == pipeline.BLESSED
        if blessed:
            infra = step("InfraValidator", lambda: pipeline.infra_validate(folders))
            blessed = infra["verdict"] == pipeline.INFRA_BLESSED
        if blessed:
            step("Pusher", lambda: pipeline.push_all(folders, bases))
            pipeline.wait_available(endpoint, bases, made)
            step("Rehearsal", lambda: rehearse(cfg, data, test, shape, judged["metrics"]))
        else:
            print(f"REFUSED: version {made} is not pushed; version {judged['baseline']} keeps serving")
        asked = step("Endpoint", lambda: ask(endpoint, name, test, shape)) if pipeline.versions(bases[name]) else None
        step("DriftMonitor", lambda: pipeline.monitor(test, schema))
        report(run, data, history, judged, lighter, asked, pipeline.pixels(test, shape, count=16), test.label[:16])
        if cfg.serve:
            from serving import demos

            demos.launch({UNIT: name}, endpoint.url)
    print(f"demo: python -m serving.demos {UNIT}" + (f" --model {name}" if name != UNIT else ""))
    return run.record


if __name__ == "__main__":
    core.cli(main)
