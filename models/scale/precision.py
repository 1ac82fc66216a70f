"""What day 12 trains, counts and draws in 16 bits; the numbers, the loss scale and its step stand in the unit."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import losses, ops

from course.core import data, plots, runtime
from models.scale import replicas
from models.scale.resnet import cifar_resnet
from models.schedules import smooth

# --- what is trained -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with its data, the same at every call."""

    begin: Callable  # () -> model, optimizer
    batches: Callable  # () -> stream of (x, y)
    loss: Callable  # (y, output) -> scalar
    score: Callable  # model -> what validation says of it
    layers: tuple[str, ...]  # those whose gradients are looked at, in their order
    steps: int


def deep_task(cfg, parts, build):
    """The deep autoencoder `build(widths, size)` on grey pixels 0..1; scored by its loss."""
    x, x_val = (p.mean(axis=3).reshape(len(p), -1).astype(np.float32) / 255 for p in (parts.x_train, parts.x_val))

    def begin():
        runtime.seed(cfg.seed)
        return build(cfg.deep, x.shape[1]), keras.optimizers.Adam(cfg.deep_lr)

    def loss(y, output):
        return ops.mean((ops.sigmoid(output) - y) ** 2)

    def score(model):
        return float(loss(x_val, model.predict(x_val, batch_size=500, verbose=0)))

    def batches():
        return data.batches((x, x), cfg.deep_batch, seed=cfg.seed, epochs=cfg.deep_epochs)

    names = tuple(f"layer{i}" for i in range(1, 2 * len(cfg.deep)))
    task = Task(begin, batches, loss, score, names, len(x) // cfg.deep_batch * cfg.deep_epochs)
    return task, float(((x_val - x.mean(axis=0)) ** 2).mean())


def residual_task(cfg, parts, classes):
    """Day 10's network on pixels 0..255; scored by its accuracy in per cent."""
    mean, variance = replicas.moments(parts.x_train[:5_000])
    steps = len(parts.x_train) // cfg.batch * cfg.epochs

    def begin():
        runtime.seed(cfg.seed)
        model = cifar_resnet(parts.x_train.shape[1:], classes, mean, variance, cfg.depth, cfg.width)
        rate = keras.optimizers.schedules.CosineDecay(cfg.lr, steps)
        return model, keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)

    def loss(y, output):
        return ops.mean(losses.sparse_categorical_crossentropy(y, output, from_logits=True))

    def score(model):
        return 100 * float((model.predict(parts.x_val, batch_size=500, verbose=0).argmax(1) == parts.y_val).mean())

    def batches():
        return data.batches((parts.x_train, parts.y_train), cfg.batch, seed=cfg.seed, epochs=cfg.epochs)

    return Task(begin, batches, loss, score, tuple(f"block{i}" for i in range(1, (cfg.depth - 2) // 2 + 1)), steps)


def train(task, name, dtype_policy, scaling, make_step, lost):
    """One training: {losses, scales, skipped, steps, finite, score, lost} over its steps.

    `make_step(model, optimizer, loss, scaling)` -> a step that returns loss, whether the weights were updated, and the
    scale; `lost(weights, updates)` is asked once, half way.  A training whose
    loss has not been finite for 20 steps is over: `steps` tells.
    """
    with runtime.policy(dtype_policy):
        model, optimizer = task.begin()
    step = make_step(model, optimizer, task.loss, scaling)
    curve, scales, skipped, bad, swallowed = [], [], [], 0, None
    for k, (x, y) in enumerate(task.batches()):
        before = model.get_weights() if k == task.steps // 2 else None
        value, updated, scale = (ops.convert_to_numpy(part).item() for part in step(x, y))
        curve.append(value)
        scales.append(scale)
        skipped += [] if updated else [k]
        if before is not None and updated and math.isfinite(value):
            after = model.get_weights()
            swallowed = lost(before, [old - new for old, new in zip(before, after, strict=True)])
        bad = 0 if math.isfinite(value) else bad + 1
        if k % 100 == 99 or k == task.steps - 1:
            print(f"{name}: step {k + 1} of {task.steps}, loss {np.mean(curve[-50:]):.4f}, scale {scale:g}", flush=True)
        if bad == 20:
            print(f"{name}: the loss has not been finite for 20 steps: over after {k + 1} of {task.steps}", flush=True)
            break
    finite = bad == 0 and all(np.isfinite(weight).all() for weight in model.get_weights())
    return {"losses": curve, "scales": scales, "skipped": skipped, "steps": len(curve), "finite": finite,
            "score": task.score(model) if finite else None, "lost": swallowed}  # fmt: skip


def train_all(run, task_name, task, arms, make_step, lost):
    """`train` for each of `arms`, name -> (dtype policy, scaling); an interrupted run keeps those that are done."""
    return {
        name: run.once(f"{task_name}-{name}", partial(train, task, f"{task_name}, {name}", *arm, make_step, lost))
        for name, arm in arms.items()
    }


def table(found):
    """A row an arm: what came of it; None where it came to no finite number."""
    return [
        {"arm": name, "steps": one["steps"],
         "last training loss": float(np.mean(one["losses"][-20:])) if one["finite"] else None,
         "validation": one["score"], "steps left out": len(one["skipped"]), "last scale": one["scales"][-1]}
        for name, one in found.items()
    ]  # fmt: skip


# --- what it computes in ---------------------------------------------------------------------------------------------

KINDS = {"Conv2D", "Conv2DBackpropFilter", "Conv2DBackpropInput", "MatMul", "Mean", "SquaredDifference", "Rsqrt",
         "SparseSoftmaxCrossEntropyWithLogits"}  # fmt: skip


def operations(graph):
    """Operation -> dtypes that it computes in, of the kinds above, as a traced graph has them."""
    found = {}
    for op in graph.get_operations():
        if op.type in KINDS:
            found.setdefault(op.type, set()).add(op.outputs[0].dtype.name)
    return {kind: sorted(names) for kind, names in sorted(found.items())}


def dtypes(model):
    """A row a layer: its kind, and the dtypes of its weights, its computation and its output."""
    return [{"layer": layer.name, "kind": type(layer).__name__, "weights": layer.variable_dtype,
             "computes in": layer.compute_dtype, "output": keras.backend.standardize_dtype(layer.output.dtype)}
            for layer in model.layers if layer.weights]  # fmt: skip


def used(task, make_step, scaling):
    """The task's network under mixed_float16: rows of its layers, and of the operations of a traced step."""
    with runtime.policy("mixed_float16"):
        model, optimizer = task.begin()
        step = make_step(model, optimizer, task.loss, scaling)
    found = operations(step.get_concrete_function(*next(iter(task.batches()))).graph)
    return dtypes(model), [{"operation": name, "computes in": ", ".join(kinds)} for name, kinds in found.items()]


# --- where gradients go under ----------------------------------------------------------------------------------------

EDGES = np.arange(-60, 1)  # of the bins of log2


def underflow(task, deltas, half_least, least_normal):
    """What becomes of the first batch's deltas in the network as it was drawn: {"counts", "rows"}.

    `deltas(model, task, x, y, scale)` -> an array [numbers] for each of the task's layers.  counts: of log2 |delta| in
    float32, over all layers, those beyond the edges in the last bins.  rows: a layer's shares (%) of its numbers that
    are not 0: those less than `half_least`, those from there to `least_normal`, and those that *are* 0 when the same
    weights compute in float16, unscaled and with 2^15.
    """
    (x, y), found = next(iter(task.batches())), {}
    for name, kind, scale in (("exact", "float32", 1.0), ("unscaled", "mixed_float16", 1.0),
                              ("2^15", "mixed_float16", 2.0**15)):  # fmt: skip
        with runtime.policy(kind):
            found[name] = deltas(task.begin()[0], task, x, y, scale)
    rows = []
    for i, layer in enumerate(task.layers):
        there = found["exact"][i] != 0
        sizes = np.abs(found["exact"][i][there])
        rows.append({
            "layer": layer, "median, log2": float(np.median(np.log2(sizes))) if len(sizes) else None,
            "rounds to 0, %": _per_cent(sizes < half_least),
            "subnormal, %": _per_cent((sizes >= half_least) & (sizes < least_normal)),
            **{f"0 in float16, {name}, %": _per_cent(found[name][i][there] == 0) for name in ("unscaled", "2^15")},
        })  # fmt: skip
    every = np.abs(np.concatenate(found["exact"]))
    spread = np.clip(np.log2(every[every > 0]), EDGES[0], EDGES[-1])
    return {"counts": np.histogram(spread, EDGES)[0].tolist(), "rows": rows}


def _per_cent(which):
    return 100 * float(np.mean(which)) if len(which) else 0.0


def tables(formats, spacing, fragile, layers, operations, sunk, trained):
    """The record's tables; `fragile(NumPy dtype)` -> {what: (what it comes to, what it should be)}."""
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": tf.bfloat16.as_numpy_dtype}
    return {
        "formats": [{"format": name, "largest": form.largest, "least normal": form.least_normal, "least": form.least,
                     "spacing at 1": float(spacing(1.0, form))} for name, form in formats.items()],
        "what fails": [{"what": what, "computed in": name, "comes to": value if math.isfinite(value) else str(value),
                        "should be": wanted}
                       for name, kind in kinds.items() for what, (value, wanted) in fragile(kind).items()],
        "layers": layers, "operations": operations,
        **{f"deltas, {name}": one["rows"] for name, one in sunk.items()},
        **{f"trained, {name}": table(found) for name, found in trained.items()},
    }  # fmt: skip


def metrics(trained, sunk, mean_picture):
    """What the record says first: `train`'s scores (nan where a training diverged) and what went under."""
    right, error = ({name: math.nan if one["score"] is None else one["score"] for name, one in trained[task].items()}
                    for task in ("residual", "deep"))  # fmt: skip
    return {
        "float16_minus_float32": right["float16, dynamic"] - right["float32"],
        "deep_loss_unscaled": error["float16, unscaled"], "deep_loss_scaled": error["float16, dynamic"],
        "deep_loss_float32": error["float32"], "deep_loss_bfloat16": error["bfloat16"],
        "deep_loss_of_the_mean_picture": mean_picture,
        "accuracy_float32": right["float32"], "accuracy_bfloat16": right["bfloat16"],
        "accuracy_float16": right["float16, dynamic"], "accuracy_float16_unscaled": right["float16, unscaled"],
        "zero_deltas_unscaled": sunk["deep"]["rows"][0]["0 in float16, unscaled, %"],
        "zero_deltas_scaled": sunk["deep"]["rows"][0]["0 in float16, 2^15, %"],
        "updates_lost_in_float16": trained["residual"]["float32"]["lost"]["float16"],
    }  # fmt: skip


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(run, formats, spacing, sunk, trained, half_least, least_normal):
    """All figures.

    `formats`: name -> format; `spacing(x, format)`; `sunk`: task -> `underflow`'s answer; `trained`: task -> arm ->
    `train`'s.
    """
    x = 2.0 ** np.linspace(-30, 20, 1001)
    steps = {name: np.where(x <= form.largest, spacing(x, form) / x, np.nan) for name, form in formats.items()}
    run.figure(
        "spacing", plots.curves(steps, x=x, xscale="log", yscale="log", xlabel="number", ylabel="spacing / number")
    )

    shares = {name: np.array(one["counts"]) / max(1, sum(one["counts"])) for name, one in sunk.items()}
    figure = plots.histograms(shares, EDGES, xlabel="log2 |delta|, float32", ylabel="share", yscale="linear")
    axes = figure.axes[0]
    for at, name in ((half_least, "float16: below, 0"), (least_normal, "float16: below, fewer digits")):
        axes.axvline(np.log2(at), color="black", linestyle="--" if at == half_least else ":", label=name)
    axes.legend()
    run.figure("underflow", figure)

    for task, found in trained.items():
        curves = {name: smooth(np.array(one["losses"], float), 0.95) for name, one in found.items()}
        at = {name: np.arange(1, len(curve) + 1) for name, curve in curves.items()}
        title = f"{task}: training loss, smoothed"
        run.figure(task, plots.curves(curves, x=at, xlabel="step", ylabel="loss", title=title, size=(6.4, 4)))
    traces = {task: np.log2(found["float16, dynamic"]["scales"]) for task, found in trained.items()}
    at = {task: np.arange(1, len(trace) + 1) for task, trace in traces.items()}
    run.figure("scale", plots.curves(traces, x=at, xlabel="step", ylabel="log2 of the loss scale S"))
