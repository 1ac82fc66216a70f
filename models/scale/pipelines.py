"""How much of a training step is waiting for data, in the vision units' own input pipelines.

python -m models.scale.pipelines                                     every unit below, minutes each
python -m models.scale.pipelines --units day04_cnn --seconds 1       one of them, roughly
python -m models.scale.pipelines --record models/scale/results/pipelines.json

A unit's own training function is called, and stopped where it hands its model and its data to `fit`: what is measured
is what the unit trains with, not a copy of it.  A step takes the next batch and trains on it until the loss is known,
both in one compiled function, as in `fit`; the share of it that passes before the batch is there is *waiting*, and has
a bound of 5 %.  On a CPU a pipeline costs
more than that, since it works on the cores that train: *slower* is the whole step over that on one batch that is there
already, the two in turns.

The same is measured of the pipeline with parts of it taken away: the batches made ahead (`prefetch`), the parallel
workers whose number tf.data tunes by itself (AUTOTUNE), and the decoded pictures kept in memory (a cache: without it
each is decoded from a PNG file's bytes when its batch is made).  The exit status is 1 where a unit's own pipeline keeps
it waiting for more than the bound.
"""

import contextlib
import dataclasses
import gc
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from course.core import InputError, bounds, cli, files, flags, runtime
from course.core.bounds import Ratio
from course.core.experiment import to_json

BOUND = 0.05  # at most: waiting / step, of a unit's own pipeline
OWN = "as it is"
VARIANTS = {  # name -> what is taken away
    OWN: (),
    "no prefetch": ("prefetch",),
    "no prefetch, one worker": ("prefetch", "workers"),
    "not cached": ("cache",),
    "not cached, no prefetch, one worker": ("cache", "prefetch", "workers"),
}


@dataclasses.dataclass
class Pipelines:
    """What is measured, and for how long."""

    units: tuple[str, ...] = ()  # by module name; none: all that there are
    variants: tuple[str, ...] = ()  # of the pipeline, by name; none: all of them
    preset: str = "cpu"  # of each unit's settings
    rounds: int = 3  # turns of each variant
    seconds: float = 3.0  # of steps in each turn, and as many on a batch that is there; at least 5 steps
    record: str = ""  # JSON file for the figures


# --- the units' own trainings -----------------------------------------------------------------------------------------


class _Captured(Exception):
    """Thrown by the `fit` that is not to train."""


def captured(train, *arguments, **options):
    """What `train(*arguments, **options)` would do with Keras's `fit`, which does not run: (make_step, begin).

    make_step(batch): the `Step` that `stepper` makes; begin(): an iterator over the data, without end.  Raises
    `RuntimeError` where `fit` is never called, or on something else than a `tf.data.Dataset`.
    """
    import keras
    import tensorflow as tf

    found = []

    def fit(model, data=None, *_, **__):
        found.extend([model, data])
        raise _Captured

    with mock.patch.object(keras.Model, "fit", fit), contextlib.suppress(_Captured):
        train(*arguments, **options)
    if not found or not isinstance(found[1], tf.data.Dataset):
        raise RuntimeError(f"{train.__module__}.{train.__name__} does not fit a model to a tf.data.Dataset")
    model, stream = found
    stream = stream.repeat()  # a short setting's epochs would end in the middle of a turn
    return lambda batch: stepper(model, batch), lambda: iter(stream)


def _run():
    """What the units' training functions ask of a `course.core.experiment.Run`; nothing is saved in it."""
    fresh = SimpleNamespace(epoch=0, history={})
    folder = Path(tempfile.gettempdir()) / f"pipelines-{os.getpid()}"  # no checkpoint is there, and none is made
    return SimpleNamespace(folder=folder, checkpoint=lambda *_, **__: fresh, strategy=_one())


def _one():
    import tensorflow as tf

    return tf.distribute.get_strategy()


def _parts(cfg, validation):
    """A unit's data set, divided as it does: `Splits`, number of classes."""
    from course import core

    images = core.data.load(cfg.data, stand_in=getattr(cfg, "stand_in", ""))
    return core.data.three_way(images, cfg.train, validation, 1), len(images.labels)


def day04(unit, cfg):
    parts, classes = _parts(cfg, cfg.val)
    model = unit.build_model(unit.BEST, cfg.best_width, parts.x_train.shape[1:], classes)
    return captured(unit.train, _run(), cfg, "best", model, unit.BEST, parts, cfg.train, cfg.epochs, every=1)


def day10(unit, cfg):
    """Its loop is written by hand: it is stopped where it has made its step and asks for its batches."""
    parts, found = _parts(cfg, cfg.val)[0], {}
    replicated_step, distributed = unit.replicated_step, unit.distributed

    def make_step(*given):
        return found.setdefault("step", replicated_step(*given))

    def begin(*given):
        found["begin"] = lambda: distributed(*given)
        raise _Captured

    with (
        mock.patch.object(unit, "replicated_step", make_step),
        mock.patch.object(unit, "distributed", begin),
        contextlib.suppress(_Captured),
    ):
        unit.train(_one(), cfg, parts, lambda *_: _run().checkpoint())
    own = found["step"]
    return lambda batch: by_hand(lambda batch: float(own(*batch)), batch), found["begin"]


def day11(unit, cfg):
    import numpy as np
    from keras import ops

    from models import schedules

    parts, classes = _parts(cfg, cfg.validation)
    halved = {part: ops.convert_to_numpy(ops.average_pool(np.float32(getattr(parts, part)), cfg.halve))
              for part in ("x_train", "x_val")}  # fmt: skip
    parts = dataclasses.replace(parts, **halved)
    model, steps = unit.build_model(parts, classes, cfg), len(parts.x_train) // cfg.batch
    rates = np.full(10**6, 0.01)  # a rate for each step that a measurement could take
    schedules.ready(model, len(rates), steps)
    return captured(unit.train, model, parts, rates, rates, cfg.seed, cfg.epochs, cfg)


def day21(unit, cfg):
    from course import core

    scenes = importlib.import_module("models.capsules.scenes")
    data = core.data.load(cfg.data, limit=cfg.limit, seed=cfg.seed)
    trainer = unit.build_trainer(cfg, unit.build_encoder(cfg), unit.build_decoder())
    pair = (data.x_train, data.y_train)
    return captured(unit.train, _run(), cfg, trainer, "capsnet", pair, scenes.SINGLE, cfg.epochs)


def day22(unit, cfg):
    from course import core

    data = unit.sets.of_set(core.data.load(cfg.data, stand_in=cfg.stand_in))
    return captured(unit.train, _run(), cfg, unit.sets.part(data, "train", cfg.limit, cfg.seed))


def day25(unit, cfg):
    import numpy as np

    from course import core

    data = core.data.load(cfg.data)
    count = len(data.x_train) * 9 // 10
    held = SimpleNamespace(
        x=data.x_train[:count], y=np.int32(data.y_train[:count]), x_val=data.x_train[count:],
        val=SimpleNamespace(label=data.y_train[count:]), labels=data.labels, shape=data.x_train.shape[1:],
        strategy=_one(),
    )  # fmt: skip
    return captured(unit.learn, cfg, held, cfg.rates[0], cfg.steps)


def a2_convnet(unit, cfg):
    parts, classes = _parts(cfg, cfg.validation)
    return captured(unit.train_deep, _run(), parts, cfg, classes)


UNITS = {
    "day04_cnn": day04, "day10_distributed": day10, "day11_lr_schedules": day11, "day21_capsnet": day21,
    "day22_compression": day22, "day25_vision_pipeline": day25, "a2_convnet": a2_convnet,
}  # fmt: skip


# --- pipelines with parts taken away ----------------------------------------------------------------------------------


@contextlib.contextmanager
def without(parts):
    """For a `with` block in which a pipeline is built: `core.data.batches` and `tf.data` without these `parts`.

    parts: of "prefetch" (batches made ahead), "workers" (parallel calls of a map), "cache" (pictures in memory,
    decoded).  They are taken from the library's own functions, so that whatever a unit adds to its pipeline loses them
    as well.
    """
    import tensorflow as tf

    from course.core import data

    batches, mapped = data.batches, tf.data.Dataset.map
    with contextlib.ExitStack() as stack:
        if "prefetch" in parts:
            stack.enter_context(mock.patch.object(tf.data.Dataset, "prefetch", lambda stream, *_, **__: stream))
        if "workers" in parts:
            one = lambda stream, function, *_, **__: mapped(stream, function)  # noqa: E731
            stack.enter_context(mock.patch.object(tf.data.Dataset, "map", one))
        if "cache" in parts:
            undecoded = lambda arrays, *words, **named: _from_files(batches, arrays, *words, **named)  # noqa: E731
            stack.enter_context(mock.patch.object(data, "batches", undecoded))
        yield


def _from_files(batches, arrays, *words, transform=None, **named):
    """`core.data.batches`, but its pictures uint8 [N,H,W,C], C 1 or 3, are held as the bytes of PNG files.

    Raises `InputError` where the arrays hold no such pictures: what a network computes on cannot be put into a file.
    """
    import numpy as np
    import tensorflow as tf

    pictures = [i for i, array in enumerate(arrays) if np.ndim(array) == 4 and array.dtype == np.uint8]
    if len(pictures) != 1:
        raise InputError("its pictures are not held as pixels")
    (place,), shape = pictures, arrays[pictures[0]].shape[1:]
    files_of = np.array([tf.io.encode_png(picture).numpy() for picture in arrays[place]], object)

    def decode(content):
        return tf.ensure_shape(tf.io.decode_png(content, shape[2]), shape)

    def made(*rows):
        rows = list(rows)
        rows[place] = tf.map_fn(decode, rows[place], fn_output_signature=tf.uint8)
        return transform(*rows) if transform else tuple(rows)

    return batches((*arrays[:place], files_of, *arrays[place + 1 :]), *words, transform=made, **named)


# --- the measurement --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step, which returns when its loss is known."""

    on: Callable  # of a batch that is there: -> its loss
    on_next: Callable  # of the next batch of an iterator: -> seconds that passed before it was there


def stepper(model, batch):
    """A `Step` of `model`, compiled as Keras's `fit` does: it asks for the batch inside the graph."""
    import tensorflow as tf

    with model.distribute_strategy.scope():
        model.train_step(batch)  # once, uncompiled: makes the variables of the optimizer and of the metrics
        compiled = tf.function(model.train_step, jit_compile=model.jit_compile, reduce_retracing=True)

    @tf.function(reduce_retracing=True)
    def following(batches):
        asked = tf.timestamp()
        with tf.control_dependencies([asked]):
            batch = batches.get_next()
        with tf.control_dependencies(tf.nest.flatten(batch)):
            there = tf.timestamp()
        return compiled(batch)["loss"], there - asked

    def on_next(batches):
        loss, waited = following(batches)
        float(loss)  # until it is known
        return float(waited)

    step = Step(lambda batch: float(compiled(batch)["loss"]), on_next)
    step.on(batch)  # now it is compiled
    return step


def by_hand(train, batch):
    """The `Step` of a loop in Python, which takes each batch and calls `train(batch)`; already called on `batch`."""

    def on_next(batches):
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        train(batch)
        return waited

    train(batch)
    return Step(train, on_next)


def turn(once, seconds, least=5):
    """Calls of `once()`, which tells the seconds that it waited, for at least `seconds`: (waited, spent, calls)."""
    waiting, count, began = 0.0, 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or count < least:
        waiting += once()
        count += 1
    return waiting, spent, count


def measure(step, begin, ready, rounds, seconds):
    """One variant of a `Step`'s stream: {"step_ms", "waiting_ms", "waiting", "slower", "slower_least", "slower_most"}.

    Each round begins the stream anew (`begin()`), lets it run a quarter of the time uncounted, so that what was made
    ahead of the first step does not count for long, and then trains in turn on it and on the `ready` batch.  waiting:
    share of all steps; slower: median over rounds of the step on the stream over that on the ready batch.
    """
    waited = spent = count = 0.0
    ratios = []

    def at_once():
        step.on(ready)
        return 0.0

    for _ in range(rounds):
        batches = begin()
        turn(lambda batches=batches: step.on_next(batches), seconds / 4, least=2)
        own = turn(lambda batches=batches: step.on_next(batches), seconds)
        del batches
        gc.collect()  # the stream's threads end with its iterator
        _, other, steps = turn(at_once, seconds)
        waited, spent, count = waited + own[0], spent + own[1], count + own[2]
        ratios.append(own[1] / own[2] / (other / steps))
    return {
        "step_ms": 1e3 * spent / count, "waiting_ms": 1e3 * waited / count, "waiting": waited / spent,
        "slower": statistics.median(ratios), "slower_least": min(ratios), "slower_most": max(ratios),
    }  # fmt: skip


def of_unit(name, options):
    """The rows of one unit: {"unit", "variant", "input" (shape), ...} as `measure` gives them, or "why" there is none.

    All variants train the same network in turns, each on a stream that the unit built without those parts.
    """
    import keras

    unit = importlib.import_module(f"course.{name}")
    cfg = unit.Config(**unit.PRESETS[options.preset])
    runtime.seed(cfg.seed)
    step, rows = None, []
    for variant in options.variants or VARIANTS:
        row = {"unit": name, "variant": variant}
        try:
            with without(VARIANTS[variant]):
                make_step, begin = UNITS[name](unit, cfg)
                ready = next(begin())
        except InputError as error:
            if variant == OWN:
                raise
            rows.append(row | {"why": str(error)})
            continue
        step = step or make_step(ready)

        def begin_so(begin=begin, parts=VARIANTS[variant]):
            with without(parts):
                return begin()

        row |= {"input": list(keras.tree.flatten(ready)[0].shape)}
        rows.append(row | measure(step, begin_so, ready, options.rounds, options.seconds))
        print(f"{name}, {variant}: {100 * rows[-1]['waiting']:.1f} % waiting", flush=True)
    keras.backend.clear_session()
    return rows


def targets(rows):
    """The bound of each unit's own pipeline."""
    return [Ratio(row["unit"], "waiting / step", row["waiting_ms"], row["step_ms"], BOUND, False)
            for row in rows if row["variant"] == OWN]  # fmt: skip


# --- shown ------------------------------------------------------------------------------------------------------------


def show(rows):
    """The rows as a table on the terminal."""
    lines = [
        (row["unit"], row["variant"], f"{row['step_ms']:.1f}", f"{row['waiting_ms']:.2f}",
         f"{100 * row['waiting']:.2f} %", f"{row['slower']:.2f}")
        for row in rows if "why" not in row
    ]  # fmt: skip
    columns = ("unit", "pipeline", "step ms", "waiting ms", "waiting", "slower")
    bounds.table("input pipelines", columns, lines)
    for row in rows:
        if "why" in row:
            print(f"{row['unit']}, {row['variant']}: not measured: {row['why']}")


def markdown(record):
    """A record as the table of a README: a line a unit, the share of waiting of each variant."""
    hardware, rows = record["hardware"], {}
    for row in record["rows"]:
        rows.setdefault(row["unit"], {})[row["variant"]] = row
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    shown = [name for name in VARIANTS if any(name in own for own in rows.values())]

    def cell(row):
        if row is None or "why" in row:
            return ""
        return f"{100 * row['waiting']:.1f} % / {row['slower']:.2f}"

    lines = [
        f"{device}. `{record['command']}`",
        "",
        f"| unit | input | step, ms | {' | '.join(shown)} | waiting at most {100 * BOUND:g} % |",
        "|---" * (4 + len(shown)) + "|",
    ]
    for name, own in rows.items():
        whole = own.get(OWN)
        met = "" if whole is None else "met" if whole["waiting"] <= BOUND else "**missed**"
        first = whole or next(row for row in own.values() if "why" not in row)
        cells = " | ".join(cell(own.get(variant)) for variant in shown)
        size = "x".join(map(str, first["input"]))
        lines.append(f"| {name} | {size} | {first['step_ms']:.1f} | {cells} | {met} |")
    return "\n".join(lines)


def check(options):
    """Raise `InputError` for a unit, variant or preset that there is not."""
    for what, given, known in (("units", options.units, UNITS), ("variants", options.variants, VARIANTS)):
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"--{what} {unknown[0]} is not known: choose from {', '.join(known)}")
    if options.preset not in ("smoke", "cpu", "full"):
        raise InputError(f"--preset {options.preset} is not known: choose one of smoke, cpu, full")
    if options.rounds < 1 or options.seconds < 0:
        raise InputError("--rounds must be at least 1 and --seconds not negative")


def main(argv):
    """Measure, show, record, and tell by the exit status whether every unit keeps the bound."""
    options = flags.read(Pipelines(), argv, prog="python -m models.scale.pipelines", description=__doc__)
    check(options)
    before = os.getloadavg()
    rows = [row for name in options.units or UNITS for row in of_unit(name, options)]
    found = targets(rows)
    show(rows)
    if options.record:
        record = {
            "rows": rows, "bound": BOUND, "met": all(ratio.met for ratio in found), "load": before,
            "options": dataclasses.asdict(options), "hardware": runtime.hardware(), "versions": runtime.versions(),
            "commit": runtime.commit(), "command": " ".join(["python -m models.scale.pipelines", *argv]),
        }  # fmt: skip
        files.write_atomic(options.record, to_json(record))
    bounds.show(found, unit="ms")
    bounds.conclude(found)


if __name__ == "__main__":
    cli(main)
