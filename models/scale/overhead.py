"""What a unit pays for running through core: the same training by core and by Keras alone, in pairs.

python -m models.scale.overhead                                  24 pairs, some minutes
python -m models.scale.overhead --record models/scale/results/overhead.json

By core: `core.run` with its folder, lock, seed and record, `core.data.batches`, a checkpoint an epoch, a line of
progress an epoch.  By Keras: `set_random_seed`, `compile` and `fit` on a `tf.data` stream of the same batches, nothing
saved.  Both build the network anew, so that all a unit would pay is in it, and both must lose the same in their first
epoch: else they did not do the same work, and no ratio is given.

The two of a pair follow one another, and which comes first changes from pair to pair; the first pair, in which
TensorFlow is still being loaded, does not count.  The ratio is the median over pairs: a machine that stands still for
some seconds during one training spoils a mean.  Its 95 % interval is that of the sign test.  The exit status is 1 where
the ratio is above the bound; where the interval reaches over it, the machine was too busy or the pairs too few.  The
same is told of the processor's seconds, of all threads: other programs, which the clock counts, hardly change those.
"""

import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time

import numpy as np

from course.core import InputError, bounds, cli, files, flags, runtime
from course.core.bounds import Ratio
from course.core.experiment import Options, run, to_json

BOUND = 1.03  # at most: seconds of a training by core / by Keras alone
CLOCKS = {"seconds": time.perf_counter, "processor": time.process_time}
SAME = 1e-4  # largest relative difference of the first epoch's losses; with several threads later ones drift apart


@dataclasses.dataclass
class Overhead:
    """The training that is timed, and how often."""

    pairs: int = 24  # that count
    data: str = "fashion_mnist_12k"  # data set, as core.data knows it
    images: int = 6_400  # of its training part
    width: int = 8  # channels of the network's first convolution
    batch: int = 64  # images a step
    epochs: int = 4  # of each training; each ends with a checkpoint
    seed: int = 0  # of the initial weights, dropout and the order of the batches
    record: str = dataclasses.field(default="", metadata={"where": True})  # JSON file for the figures


def build(x, classes, width):
    """The compiled network: a small residual one, as day 25 trains, by SGD."""
    import keras

    from models.convnets import small_resnet

    mean, variance = x.mean(axis=(0, 1, 2)).tolist(), x.var(axis=(0, 1, 2)).tolist()
    model = small_resnet(x.shape[1:], classes, width, mean, variance)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, metrics=["accuracy"], jit_compile=runtime.jit())
    return model


def by_core(x, y, classes, options, folder):
    """Train as a unit does; the mean loss of each epoch."""
    from course import core

    with run("overhead", Options("overhead", runs=folder, fresh=True), options, typed="models.scale.overhead") as own:
        model = build(x, classes, options.width)
        resume = own.checkpoint(model)
        stream = core.data.batches((x, y), options.batch, seed=options.seed, first_epoch=resume.epoch,
                                   epochs=options.epochs)  # fmt: skip
        model.fit(stream, steps_per_epoch=len(x) // options.batch, initial_epoch=resume.epoch, epochs=options.epochs,
                  verbose=0, callbacks=[resume, core.Progress()])  # fmt: skip
        own.record["history"] = resume.history
        own.record["metrics"] = {"loss": resume.history["loss"][-1]}
    return resume.history["loss"]


def by_keras(x, y, classes, options, orders):
    """Train with Keras alone on the batches that `orders` [steps, batch] names; the loss of each epoch."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(options.seed)
    model = build(x, classes, options.width)
    x, y = tf.constant(x), tf.constant(y)
    stream = tf.data.Dataset.from_tensor_slices(orders)
    stream = stream.map(lambda rows: (tf.gather(x, rows), tf.gather(y, rows)), num_parallel_calls=tf.data.AUTOTUNE)
    fitted = model.fit(stream.prefetch(tf.data.AUTOTUNE), steps_per_epoch=len(x) // options.batch,
                       epochs=options.epochs, verbose=0)  # fmt: skip
    return fitted.history["loss"]


def orders_of(count, options):
    """The rows of every batch of the training, [steps, batch], as `core.data.batches` gives them."""
    from course import core

    stream = core.data.batches((np.arange(count, dtype=np.int32),), options.batch, seed=options.seed,
                               epochs=options.epochs)  # fmt: skip
    return np.stack([rows for (rows,) in stream.as_numpy_iterator()])


def measure(options):
    """Of each training of each pair that counts: {"seconds": {"core": [pairs], "keras": [pairs]}, "processor": same}.

    Raises `RuntimeError` where the two of a pair lose differently in the first epoch.
    """
    import keras

    from course import core

    data = core.data.load(options.data)
    if not options.batch <= options.images <= len(data.x_train):
        raise InputError(f"--images {options.images}: give from one batch, {options.batch}, to {len(data.x_train)}")
    x, y = data.x_train[: options.images], data.y_train[: options.images]
    orders, found = orders_of(len(x), options), {kind: {"core": [], "keras": []} for kind in CLOCKS}
    with tempfile.TemporaryDirectory() as folder:
        both = {
            "core": lambda: by_core(x, y, len(data.labels), options, folder),
            "keras": lambda: by_keras(x, y, len(data.labels), options, orders),
        }
        for pair in range(options.pairs + 1):
            losses, spent = {}, {}
            for name in sorted(both, reverse=bool(pair % 2)):
                keras.backend.clear_session()
                began = {kind: clock() for kind, clock in CLOCKS.items()}
                with contextlib.redirect_stdout(io.StringIO()):
                    losses[name] = both[name]()
                spent[name] = {kind: clock() - began[kind] for kind, clock in CLOCKS.items()}
            first = {name: curve[0] for name, curve in losses.items()}
            if not abs(first["core"] / first["keras"] - 1) <= SAME:
                raise RuntimeError(f"the two trainings did not do the same: their first epochs' losses are {first}")
            if pair:
                for kind, pairs in found.items():
                    for name, values in pairs.items():
                        values.append(spent[name][kind])
                own, bare = (spent[name]["seconds"] for name in ("core", "keras"))
                print(f"pair {pair}/{options.pairs}: {bare:.2f} s, by core {own / bare:.3f} times", flush=True)
    return found


def summary(found):
    """{"ratio", "low", "high"}: median of the pairs' ratios and its 95 % interval (None for less than six pairs).

    `found`: {"core": [pairs], "keras": [pairs]}, and so below.
    """
    from scipy import stats

    ratios = np.divide(found["core"], found["keras"])
    interval = stats.quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    low, high = (None if np.isnan(end) else float(end) for end in interval)
    return {"ratio": float(np.median(ratios)), "low": low, "high": high}


def target(found):
    """The bound on the median ratio; of its two figures the second is the median of the times by Keras."""
    seconds = statistics.median(found["keras"])
    return Ratio("a training", "core / Keras alone", summary(found)["ratio"] * seconds, seconds, BOUND, False)


def markdown(record):
    """A record as the table of a README."""
    hardware, options = record["hardware"], record["options"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    lines = [
        f"{device}; {options['pairs']} pairs of {options['epochs']} epochs of {options['images']:,} images."
        f" `{record['command']}`",
        "",
        "| | Keras alone, s | core, s | ratio | 95 % | bound | |",
        "|---" * 7 + "|",
    ]
    met = "met" if record["met"] else "**missed**"
    for kind, title, bound in (("seconds", "by the clock", f"{BOUND} | {met}"), ("processor", "of the processor", "|")):
        told = record["summary"][kind]
        keras, core = (statistics.median(record[kind][name]) for name in ("keras", "core"))
        interval = "" if told["low"] is None else f"{told['low']:.3f} to {told['high']:.3f}"
        lines.append(f"| {title} | {keras:.2f} | {core:.2f} | {told['ratio']:.3f} | {interval} | {bound} |")
    return "\n".join(lines)


def main(argv):
    """Measure, show, record, and tell by the exit status whether the bound is kept."""
    options = flags.read(Overhead(), argv, prog="python -m models.scale.overhead", description=__doc__)
    for name in ("pairs", "images", "width", "batch", "epochs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    before = os.getloadavg()
    found = measure(options)
    ratio, told = target(found["seconds"]), {kind: summary(pairs) for kind, pairs in found.items()}
    if options.record:
        record = {
            **found, "summary": told, "bound": BOUND, "met": ratio.met, "load": before,
            "options": dataclasses.asdict(options), "hardware": runtime.hardware(), "versions": runtime.versions(),
            "commit": runtime.commit(), "command": " ".join(["python -m models.scale.overhead", *argv]),
        }  # fmt: skip
        files.write_atomic(options.record, to_json(record))
    bounds.show([ratio], unit="s")
    for kind, one in told.items():
        interval = "" if one["low"] is None else f", 95 % interval {one['low']:.3f} to {one['high']:.3f}"
        print(f"{kind}: {one['ratio']:.3f}{interval}")
    bounds.conclude([ratio])


if __name__ == "__main__":
    cli(main)
