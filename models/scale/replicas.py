"""What day 10 measures of its strategies, and draws; the strategies themselves stand in the unit."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import tensorflow as tf

from course.core import plots, runtime, timing

# --- time ------------------------------------------------------------------------------------------------------------


def speed(strategy, step, batch, cfg, model):
    """Row of a strategy's speed: replicas, images/s, and of a step (median, ms) the all-reduce and its share (%).

    `step` takes `batch`, one element of a distributed data set, of `cfg.batch` images in all, and is called
    `cfg.steps` times; the weights are then put back.  The all-reduce is timed alone, of arrays like the gradients: the
    share is that of a step that hides none of it behind its computation.
    """
    weights = model.get_weights()
    whole = timing.time_calls(lambda: float(step(*batch)), cfg.steps, 2)["p50_ms"]
    model.set_weights(weights)
    alone = timing.time_calls(all_reduce(strategy, model.trainable_variables), cfg.steps, 2)["p50_ms"]
    return {"replicas": strategy.num_replicas_in_sync, "images_per_second": 1e3 * cfg.batch / whole, "step_ms": whole,
            "all_reduce_ms": alone, "communication_share": 100 * alone / whole}  # fmt: skip


def all_reduce(strategy, variables):
    """A call that sums arrays of the shapes of `variables` over the replicas of `strategy`, and waits for the sums."""

    def on_each():
        # drawn in the graph: constants would be summed while it is built
        mine = [tf.random.stateless_uniform(variable.shape, (1, 2)) for variable in variables]
        sums = tf.distribute.get_replica_context().all_reduce("SUM", mine)
        return tf.add_n([tf.reduce_sum(one) for one in sums])

    @tf.function
    def summed():
        return strategy.reduce("SUM", strategy.run(on_each), axis=None)

    return lambda: float(summed())


def efficiency(rows):
    """Adds to rows of speed {"efficiency"}: images/s of a replica, in % of those of the first row."""
    one = rows[0]["images_per_second"] / rows[0]["replicas"]
    return [row | {"efficiency": 100 * row["images_per_second"] / row["replicas"] / one} for row in rows]


# --- data and state --------------------------------------------------------------------------------------------------


def moments(images):
    """Mean and variance of each channel of uint8 images [N,H,W,C], two arrays [C]."""
    pixels = images / 255.0
    return 255 * pixels.mean((0, 1, 2)), 255**2 * pixels.var((0, 1, 2))


def augmented(stream, first, seed, steps):
    """A data set of batches (x, y) that begins at epoch `first`, of `steps` steps each, with `moved` images.

    What happens to a batch depends on the seed and the number of its step alone: a run that is resumed sees the same.
    """
    numbered = tf.data.Dataset.zip(stream, tf.data.Dataset.counter(first * steps))
    return numbered.map(lambda batch, step: (moved(batch[0], (seed, step)), batch[1]), tf.data.AUTOTUNE).prefetch(2)


def moved(x, seed):
    """x uint8 [B,H,W,C] -> each picture mirrored by chance and shifted by up to 4 pixels, black coming in.

    seed: two integers or scalars, of which the result is a function.
    """
    x = tf.image.stateless_random_flip_left_right(x, seed)
    count, height, width = (tf.shape(x)[i] for i in range(3))
    by = tf.random.stateless_uniform((2, count, 1), seed, 0, 9, tf.int32)
    x = tf.pad(x, [[0, 0], [4, 4], [4, 4], [0, 0]])
    x = tf.gather(x, by[0] + tf.range(height), axis=1, batch_dims=1)
    return tf.gather(x, by[1] + tf.range(width), axis=2, batch_dims=1)


def accuracy(model, x, y):
    """% of pictures classified as they are labelled; called by one process of several, it needs no other."""
    logits = [model(x[i : i + 500], training=False) for i in range(0, len(x), 500)]
    return 100 * float((np.concatenate(logits).argmax(axis=1) == y).mean())


def restore(run, name, model, optimizer):
    """The checkpoint `name` of a run, which has restored both."""
    return run.checkpoint(model, name, optimizer=optimizer)


def split(model, places):
    """A network with blocks cut into one stage a place: models on those devices, with copies of the weights.

    `model`: as `cifar_resnet` makes it; each stage but the last ends with a block.
    """
    blocks = [layer for layer in model.layers if layer.name.startswith("block")]
    cuts = [blocks[len(blocks) * s // len(places) - 1].output for s in range(1, len(places))]
    stages = []
    for place, ends in zip(places, itertools.pairwise([model.input, *cuts, model.output]), strict=True):
        part = keras.Model(*ends)
        with tf.device(place):
            stages.append(keras.models.clone_model(part))
            stages[-1].set_weights(part.get_weights())
    return stages


# --- comparisons -----------------------------------------------------------------------------------------------------


def difference(curve, reference):
    """Largest difference of two curves, or lists of arrays, of equal length."""
    return float(np.abs(np.subtract(curve, reference)).max())


def distance(gradients, reference):
    """Length of the difference of two lists of gradients, as a share of the second's length."""
    square = sum(np.square(np.subtract(a, b)).sum() for a, b in zip(gradients, reference, strict=True))
    return float(np.sqrt(square / sum(np.square(one).sum() for one in reference)))


def possible(counts):
    """Of numbers of replicas those that this machine has devices for: where there are GPUs, one for each."""
    gpus = len(tf.config.list_physical_devices("GPU"))
    return [count for count in counts if not gpus or count <= gpus]


@runtime.policy("float32")  # what should be equal up to rounding is not to be rounded to 16 bits
def strategies(run, cfg, data, first_losses, fit_loss):
    """Each strategy and normalisation beside one device: rows, rows of speed, what they differ by, metrics.

    What they differ by: "strategy, normalisation" -> the difference of its loss from one device's at each step.  What
    should be equal is compared in float64 as well, to tell rounding, which the steps magnify, from error.
    """
    counts = possible(cfg.replicas)
    names = ["one", *(f"mirrored:{n}" for n in counts), *(f"central:{n}" for n in counts[:1])]
    arms = [(name, norm) for norm in ("group", "group, float64") for name in names]
    several = ["one", *(f"mirrored:{n}" for n in counts[-1:])]
    arms += [(name, norm) for norm in ("batch", "sync", "sync, float64") for name in several]
    rows, speeds, alone, apart = [], [], {}, {}
    for name, norm in arms:
        own = dataclasses.replace(cfg, norm=norm.partition(",")[0])
        with runtime.policy("float64" if norm.endswith("float64") else "float32"):
            call = functools.partial(first_losses, runtime.strategy(name), own, data)
            curve, fast = run.once(f"{name}-{norm}", call)
        alone.setdefault(norm, curve)  # the first of each normalisation is of one device
        rows.append({"strategy": name, "norm": norm, "replicas": fast["replicas"], "last_loss": curve[-1],
                     "difference": difference(curve, alone[norm])})  # fmt: skip
        if name != "one":
            apart[f"{name}, {norm}"] = np.abs(np.subtract(curve, alone[norm])).tolist()
        if norm == "group":
            speeds.append({"strategy": name} | fast)
    for name in names[:2]:
        mean = run.once(f"{name}-fit", lambda name=name: fit_loss(runtime.strategy(name), cfg, data))
        rows.append({"strategy": f"{name}, fit", "norm": "group", "replicas": None, "last_loss": None,
                     "difference": abs(mean - float(np.mean(alone["group"])))})  # fmt: skip
    worst = {norm: max(row["difference"] for row in rows if row["norm"] == norm) for norm in alone}
    return rows, efficiency(speeds), apart, {
        "worst_loss_difference": worst["group"], "worst_loss_difference_float64": worst["group, float64"],
        "batch_norm_difference": worst["batch"], "sync_batch_norm_difference": worst["sync"],
        "sync_batch_norm_difference_float64": worst["sync, float64"],
    }  # fmt: skip


@runtime.policy("float32")
def gradients(cfg, data, places, build, gradient, accumulated, pipelined):
    """Rows: the gradient of a batch in shares, and over stages, against the whole one's: its `distance`, and its ms."""
    model, _ = build(tf.distribute.get_strategy(), cfg, data, cfg.lr)
    x, y = tf.constant(data.x_train[: cfg.batch]), tf.constant(data.y_train[: cfg.batch])
    stages = split(model, places)
    ways = {
        "whole": lambda x, y: gradient(model, x, y, cfg.batch)[1],
        "accumulated": lambda x, y: accumulated(model, x, y, cfg.micro),
        "pipeline": lambda x, y: pipelined(stages, places, x, y, cfg.micro)[1],
    }
    rows, whole = [], None
    for name, way in ways.items():
        call = tf.function(way)
        found = [np.asarray(one) for one in call(x, y)]
        whole = whole or found
        idle = (len(places) - 1) / (cfg.micro + len(places) - 1)
        taken = timing.time_calls(lambda call=call: call(x, y)[0].numpy(), cfg.steps, 1)
        rows.append({"gradient": name, "norm": cfg.norm, "micro_batches": 1 if name == "whole" else cfg.micro,
                     "distance": distance(found, whole), "idle": 100 * idle if name == "pipeline" else None,
                     "ms": taken["p50_ms"]})  # fmt: skip
    return rows


def ring(all_reduce, seed):
    """Of `all_reduce(arrays)` -> sums, bytes sent, among eight devices: its error, and how many arrays one sends."""
    arrays = list(np.random.default_rng(seed).normal(size=(8, 1_000)))
    sums, sent = all_reduce(arrays)
    return {"ring_error": difference(sums, [np.sum(arrays, axis=0)] * 8), "ring_sent": max(sent) / arrays[0].nbytes}


def arms(run, cfg, data, train, several):
    """Train each arm, {name: (strategy's name, settings)}: rows of its loss, its curve and validation accuracy."""

    def row(name, strategy, changed):
        own = dataclasses.replace(cfg, **changed)
        print(f"{name}:", flush=True)
        model, curve, _ = train(runtime.strategy(strategy), own, data, lambda *both: restore(run, name, *both))
        return {"arm": name, "batch": own.batch, "lr": own.lr, "loss": curve[-1], "curve": curve,
                "val_accuracy": accuracy(model, data.x_val, data.y_val)}  # fmt: skip

    return [run.once(f"arm {name}", lambda name=name, of=of: row(name, *of)) for name, of in several.items()]


def large_batches(run, cfg, data, train):
    """Rows of the batch, and of one that is `cfg.large` times as large: at its rate, at as many times it, warmed up."""
    batch, rate = cfg.large * cfg.batch, cfg.large * cfg.lr
    return arms(run, cfg, data, train, {
        f"{cfg.batch}": ("one", dict(warm_up=0)),
        f"{batch}, same rate": ("one", dict(warm_up=0, batch=batch)),
        f"{batch}, {cfg.large} times": ("one", dict(warm_up=0, batch=batch, lr=rate)),
        f"{batch}, {cfg.large} times, warm-up": ("one", dict(warm_up=max(1, cfg.warm_up), batch=batch, lr=rate)),
    })  # fmt: skip


def few_images(run, cfg, data, train):
    """Rows of each normalisation where a replica has `cfg.share` images, and of batch normalisation over all."""
    counts = possible(cfg.replicas)[-1:]
    batch = cfg.share * max(cfg.replicas)
    setting = dict(batch=batch, lr=cfg.lr * batch / cfg.batch, warm_up=0)
    several = {f"batch norm, 1 replica of {batch}": ("one", setting | dict(norm="batch"))}
    for count in counts:
        for norm in ("batch", "sync", "group"):
            several[f"{norm} norm, {count} replicas"] = (f"mirrored:{count}", setting | dict(norm=norm))
    return arms(run, cfg, data, train, several)


def rounding(apart):
    """Figure of the differences at each step, {"strategy, normalisation": curve}; a difference of 0 has no point."""
    at = {name: np.flatnonzero(one) for name, one in apart.items() if not name.endswith("batch")}
    found = {name: np.asarray(apart[name])[steps] for name, steps in at.items() if len(steps)}
    steps = {name: at[name] + 1 for name in found}
    title = "difference from one device's loss"
    return plots.curves(found, x=steps, xlabel="step", ylabel=title, yscale="log", size=(7, 4.4))


def draw(run, tables, apart, curves):
    """The unit's figures: of its tables, of the differences of each step, and of the workers' losses; name -> curve."""
    run.figure("rounding", rounding(apart))
    rows = tables["speed"]
    for name, title in ("images_per_second", "images a second"), ("efficiency", "efficiency, %"):
        run.figure(name, plots.bars({row["strategy"]: row[name] for row in rows}, ylabel=title))
    large = {row["arm"]: row["curve"] for row in tables["large batches"]}
    run.figure("large_batches", plots.curves(large, ylabel="training loss"))
    small = {row["arm"]: row["val_accuracy"] for row in tables["few images a replica"]}
    run.figure("normalisation", plots.bars(small, ylabel="validation accuracy, %"))
    if curves:
        run.figure("workers", plots.curves(curves, ylabel="training loss"))
