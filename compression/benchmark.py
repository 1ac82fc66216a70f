"""Every compression technique on one model, in one run, on the same inputs: what each saves and what it costs.

    python -m compression.benchmark day04_cnn                       post-training conversion of its newest export
    python -m compression.benchmark day04_cnn --preset full         everything, retraining included
    python -m compression.benchmark model.keras --data fashion_mnist --arms int8 pruned
    python -m compression.benchmark exports/policy/17 --data observations.npz

Each arm is made once; an interrupted run goes on from there.  Files, figures and `result.json` stand in the folder
runs/compression/<model>/.
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
import time
import traceback

from compression import report
from compression.quiet import quiet
from compression.report import ORIGINAL
from course import core
from course.core import bounds


@dataclasses.dataclass
class Config:
    """What is tried, and how it is measured."""

    seed: int = 0  # of training, and of the order of the measurements
    data: str = ""  # data set's name, a .npz file or a folder of pictures; "": the one that the export names
    arms: tuple[str, ...] = ()  # by name; none: all of the preset's
    limit: int = 0  # training examples of the arms that train; 0: all
    tests: int = 0  # test examples; 0: all
    representative: int = 300  # training inputs on which full int8 measures ranges
    epochs: int = 8  # of training on, in each technique
    lr: float = 0.01  # highest learning rate of training on
    aware_lr: float = 0.001  # the same where quantisation is trained
    batch: int = 128  # examples a step
    flip: bool = False  # mirror pictures while training; not where left and right differ
    shift: float = 0.0  # move pictures while training by up to this share of their sides
    sparsity: float = 0.8  # share of zeros of the pruned arms
    filters: float = 0.5  # share of filters removed
    clusters: int = 16  # values that a layer's weights share
    width: float = 0.5  # student's width over the teacher's, in its widest layer
    taper: float = 1.0  # narrower layers keep less: (own / widest) ** taper of that share
    student_epochs: int = 30  # of distillation, and of the same network without a teacher
    student_lr: float = 0.2  # highest learning rate of those
    temperature: float = 4.0  # of distillation
    rounds: int = 20  # turns in which every file is timed
    calls: int = 50  # calls of a file in a turn
    served_seconds: float = 0.5  # of requests to each served file in each of five turns; 0: nothing is served
    max_drop: float = 0.01  # accuracy that the gate lets a compressed file lose
    max_slice_drop: float = 0.1  # the same for one slice of at least 50 examples
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder where units export to
    record: str = dataclasses.field(default="", metadata={"where": True})  # JSON file to copy the record to


PRESETS = {
    "quick": {"arms": ("float", "float16", "dynamic", "int8")},  # post-training: minutes
    "full": {},
}

# settings -> what they must be; NaN is none of it
LIMITS = (
    (("sparsity", "filters"), lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    (("shift", "max_drop", "max_slice_drop"), lambda value: 0 <= value <= 1, "a share from 0 to 1"),
    (("width",), lambda value: 0 < value <= 1, "a share above 0, at most 1"),
    (("clusters",), lambda value: 2 <= value <= 256, "a number from 2 to 256"),  # their numbers are coded as bytes
    (("temperature",), lambda value: 0 < value < math.inf, "a number above 0"),
    (("representative", "batch", "rounds", "calls"), lambda value: value >= 1, "a number of at least 1"),
    (
        (*("limit", "tests", "epochs", "student_epochs", "lr", "aware_lr", "student_lr"),
         *("taper", "served_seconds")),
        lambda value: 0 <= value < math.inf,
        "a number of at least 0",
    ),
)  # fmt: skip


# --- making -----------------------------------------------------------------------------------------------------------


def build(run, target, data, cfg, steps):
    """The model after a chain of techniques, made once and kept as `models/<chain>.keras`.

    Returns {"file", "train_seconds", "params", "flops"}, train_seconds of every sitting.  What a technique raises goes
    through: `InputError` where it does not apply to the model, anything else where it failed.
    """
    from compression import arms, legacy
    from models import costs

    name = stem("-".join(steps) or "original")

    def make():
        if steps and not target.layered:
            raise core.InputError(f"{target.source} is a SavedModel without its Keras model: no layers to train on")
        before = build(run, target, data, cfg, steps[:-1]) if steps else None
        seconds, start, model = 0.0, time.perf_counter(), opened(run, target, before)
        if steps:
            checkpoint = run.folder / "checkpoints" / name
            seconds = before["train_seconds"] + earlier(checkpoint)
            core.runtime.seed(cfg.seed)
            model = arms.TECHNIQUES[steps[-1]](model, data, cfg, checkpoint)
            seconds += time.perf_counter() - start
        extra = {}
        if isinstance(model, legacy.Made):
            extra, content, model = {"toolkit": model.report}, model.content, model.model
            if content:  # the rounding is in this file alone, not in the model that came back
                seconds -= extra["toolkit"]["convert_seconds"]
                extra["content"] = f"{name}.tflite"
                core.files.write_atomic(run.folder / "models" / extra["content"], content)
        path = run.folder / "models" / f"{name}.keras"
        if target.layered:
            with core.files.atomic_path(path) as temporary:
                model.save(temporary)
        try:
            flops = costs.flops(model)
        except core.InputError:  # a loop or a branch: cannot be counted
            flops = None
        return {"file": path.name, "train_seconds": seconds, "params": model.count_params(), "flops": flops} | extra

    return run.once(f"model-{name}", make)


def earlier(folder):
    """Seconds that interrupted sittings spent on the training whose checkpoints lie in `folder`, each up to the last it
    saved: there the next goes on.  Notes that another sitting begins now."""
    note, seconds = folder / "sittings.json", 0.0
    if note.exists():
        last = json.loads(note.read_text())
        saved = max((path.stat().st_mtime for path in folder.rglob("state.npz")), default=0.0)
        seconds = last["seconds"] + max(0.0, saved - last["began"])
    core.files.write_atomic(note, json.dumps({"seconds": seconds, "began": time.time()}))
    return seconds


def opened(run, target, made):
    """The Keras model of `build`'s answer; None stands for the original."""
    import keras

    if made is None or not target.layered:
        return target.model
    return keras.models.load_model(run.folder / "models" / made["file"], compile=False)


def convert(run, target, data, cfg, name):
    """The file of an arm, made once; a row of what is known of it so far.  Raises as `build` does, `InputError` where
    LiteRT's converter refuses the model, and `RuntimeError` where the file is not its source (`lite.parity`)."""
    from tensorflow.lite.python.convert_phase import ConverterError

    from compression import arms, cluster, lite, measure, quantize

    arm = arms.ARMS[name]

    def make():
        made = build(run, target, data, cfg, arm.steps)
        model, start = opened(run, target, made), time.perf_counter()
        path = run.folder / "files" / (stem(name) if arm.kind == arms.SAVED else f"{stem(name)}.tflite")
        if arm.kind == arms.SAVED:
            shutil.rmtree(path, ignore_errors=True)
            with core.files.atomic_folder(path, last="saved_model.pb") as temporary, quiet():
                model.export(temporary, verbose=False)
        elif "content" in made:
            core.files.write_atomic(path, (run.folder / "models" / made["content"]).read_bytes())
        else:
            pixels = data.x_train.dtype == "uint8"
            samples = quantize.representative(data, cfg.representative, cfg.seed)
            try:
                core.files.write_atomic(path, lite.convert(model, arm.kind, samples, pixels=pixels))
            except ConverterError as error:  # an operation that it does not have
                raise core.InputError(f"LiteRT's converter refuses it: {one_line(error)}") from error
        seconds = time.perf_counter() - start
        if "content" in made:  # held against the toolkit's model, which rounds
            seconds, found = made["toolkit"]["convert_seconds"], made["toolkit"]
        else:
            found = lite.parity(path, model, data.x_test[:1000], arm.kind)
        row = made | {"model": made["file"], "file": path.name, "kind": arm.kind, "steps": list(arm.steps)}
        row |= {"convert_seconds": seconds, "parity": found["max_difference"], "agreement": found["agreement"]}
        if any("cluster" in step for step in arm.steps):  # what a reader of our own could make of it
            row["huffman"] = cluster.coded_bytes(model) if arm.kind == "float" else measure.huffman(path)
        weights = measure.stored(model) if arm.kind == arms.SAVED else measure.weights(path)
        return row | measure.size(path) | {"sparsity": measure.sparsity(weights)}

    return run.once(f"file-{stem(name)}", make)


def attempt(run, target, data, cfg, name):
    """`convert`'s row, or {"why": one line}: why the technique does not apply to this model or, behind `report.FAILED`,
    what went wrong.  Neither is kept: the next sitting tries again.  A failure of the original goes through."""
    try:
        return convert(run, target, data, cfg, name)
    except core.InputError as error:
        why = one_line(error)
    except Exception as error:  # of whatever kind: the other arms are worth having, and `report.conclude` names it
        if name == ORIGINAL:
            raise
        traceback.print_exception(error)
        why = f"{report.FAILED}{type(error).__name__}: {one_line(error)}"
    print(f"{name}: not made: {why}", flush=True)
    return {"why": why}


def one_line(error):
    return " ".join(str(error).split())[:300]


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(run, data, cfg, rows):
    """Accuracy of every file on the test part, beside the original's on the same examples, and the gate's verdict.

    The gate is the pipeline's Evaluator, `serving.pipeline.bless`, with the compressed file as the candidate and the
    original as the baseline.
    """
    import numpy as np

    from compression import measure
    from serving import pipeline

    examples, found = measure.examples(data), {}
    limits = {"max_drop": cfg.max_drop, "max_slice_drop": cfg.max_slice_drop}
    for name in [ORIGINAL, *(name for name in rows if name != ORIGINAL)]:

        def ask(name=name):
            logits = measure.predict(run.folder / "files" / rows[name]["file"], data.x_test)
            quality = pipeline.evaluate(measure.softmax(logits), examples, data.labels)
            return {"guess": logits.argmax(axis=1).tolist(), "quality": quality}

        found[name] = run.once(f"answers-{stem(name)}", ask)
    first, truth = np.array(found[ORIGINAL]["guess"]), data.y_test
    for name, row in rows.items():
        guess, quality = np.array(found[name]["guess"]), found[name]["quality"]
        row |= {key: quality[key] for key in ("accuracy", "interval", "calibration_error")}
        row |= measure.paired(guess == truth, first == truth) | {"disagreement": float((guess != first).mean())}
        verdict = pipeline.bless(quality, found[ORIGINAL]["quality"], **limits)
        row |= {"gate": verdict["verdict"], "reasons": verdict["reasons"]}


def time_and_serve(run, data, cfg, rows):
    """Latency, memory and the served latency of every file, added to its row; `run.record["load"]` holds the machine's
    load averages (of 1, 5 and 15 minutes) before and after the latencies."""
    from compression import measure

    paths = {name: run.folder / "files" / row["file"] for name, row in rows.items()}
    sample = data.x_test[:1]
    for name in progress(rows, "memory"):

        def look(path=paths[name]):
            return measure.memory(path, sample.shape[1:]) | {"xnnpack": measure.delegates(path)}

        rows[name] |= run.once(f"memory-{stem(name)}", look)

    def clock():
        load = {"before": os.getloadavg()}  # others' work slows ours, and not every file alike
        times = measure.latencies(paths, sample, rounds=cfg.rounds, calls=cfg.calls, seed=cfg.seed,
                                  track=lambda it: progress(it, "latency"))  # fmt: skip
        return {"times": times, "load": load | {"after": os.getloadavg()}}

    timed = run.once("timing", clock)
    run.record["load"] = timed["load"]
    for name, row in rows.items():
        row |= timed["times"][name]
    if not cfg.served_seconds:
        return

    def ask():
        stems = {stem(name): path for name, path in paths.items()}
        made = measure.versions(stems, run.folder / "served", sample, data.labels)
        verdicts = measure.infra_validate(made)
        good = {name: folder for name, folder in made.items() if verdicts[name]["verdict"] == "INFRA_BLESSED"}
        asked = measure.served(good, sample, rounds=5, seconds=cfg.served_seconds, seed=cfg.seed,
                               track=lambda it: progress(it, "serving")) if good else {}  # fmt: skip
        return {name: {"infra": verdicts[name]["verdict"], "infra_reasons": verdicts[name]["reasons"],
                       **asked.get(name, {})} for name in made}  # fmt: skip

    answers = run.once("served", ask)
    for name, row in rows.items():
        row |= answers[stem(name)]


def benchmark(run, target, data, cfg, names):
    """Run the arms `names` of `arms.ARMS` on a `target` and its `data`; fills `run.record` and returns the rows of the
    table, those of arms that could not be made with their "why".  Where one failed, the command is to end with
    `report.conclude(rows)`.  Raises `InputError` where `check_settings` does, or there is no file to compare with."""
    check_settings(cfg)
    run.record["target"] = {"name": target.name, "sha256": target.sha256(), "layered": target.layered}
    wanted = [ORIGINAL, *(name for name in names if name != ORIGINAL)]
    rows = {}
    for name in progress(wanted, "making"):
        rows[name] = {"arm": name} | attempt(run, target, data, cfg, name)
        if "why" in rows[ORIGINAL]:
            raise core.InputError(f"{target.name} cannot be converted to LiteRT: {rows[ORIGINAL]['why']}")
    made = {name: row for name, row in rows.items() if "why" not in row}
    compare(run, data, cfg, made)
    time_and_serve(run, data, cfg, made)
    first = made[ORIGINAL]
    for row in made.values():
        row |= {f"times_smaller{of}": first[key] / row[key] for of, key in (("", "bytes"), ("_gzip", "gzip"))}
        if "huffman" in row:  # weights against weights
            row["times_smaller_huffman"] = 4 * first["params"] / row["huffman"]
    listed = list(rows.values())
    run.record["tables"] = {"arms": listed}
    run.record["data"] = data.provenance
    run.record["metrics"] = report.headline(made)
    run.record["targets"] = report.judged(rows, data.provenance["name"])
    report.draw(run, made)
    return listed


# --- the command ----------------------------------------------------------------------------------------------------


def stem(name):
    """An arm's name as a file's."""
    return "".join(c if c.isalnum() else "_" for c in name)


def progress(items, text):
    """`items` with a bar on the terminal, which goes away."""
    from rich.progress import track

    items, console = list(items), bounds.console()
    return track(items, text, total=len(items), transient=True, console=console, disable=not console.is_terminal)


def check_settings(cfg):
    """Raise `InputError` where a setting can be of no use to any model, before anything is made."""
    for names, fits, wanted in LIMITS:
        for name in names:
            if not fits(getattr(cfg, name)):
                raise core.InputError(f"{name} is {getattr(cfg, name)}: give {wanted}")


def check_numbering(model, data):
    """Raise `InputError` where the classes of the test part, in another order, would fit the answers of `model` far
    better."""
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    guess = model.predict(data.x_test, batch_size=250, verbose=0).argmax(axis=1)
    confusion = np.zeros((len(data.labels), len(data.labels)), int)  # rows: the true class
    np.add.at(confusion, (data.y_test, guess), 1)
    best = confusion[linear_sum_assignment(-confusion)].sum() / confusion.sum()
    found = np.trace(confusion) / confusion.sum()
    if best > found + 0.2:
        raise core.InputError(
            f"{100 * found:.0f} % of the answers are right, and {100 * best:.0f} % would be with the classes in "
            "another order: give the exported version, which has the labels, or data in the model's order"
        )


def prepare(what, cfg, runs):
    """The `Target` and its `Data`, its classes in the order of the model's logits."""
    from compression import data, target

    found = target.find(what, cfg.exports, runs)
    if not (cfg.data or found.data):
        raise core.InputError(f"{found.source} does not say what it was trained on: give --data")
    given = data.load(cfg.data or found.data, cfg.limit, cfg.seed, shape=found.shape, labels=found.labels)
    if given.x_test.shape[1:] != found.shape:
        raise core.InputError(f"{found.source} takes {list(found.shape)}, the data is {list(given.x_test.shape[1:])}")
    classes = found.model.output_shape[-1]
    if len(given.labels) > classes:
        raise core.InputError(f"{found.source} knows {classes} classes, the data has {len(given.labels)}")
    unseen = [str(i) for i in range(len(given.labels), classes)]  # classes that the data has no example of
    given = dataclasses.replace(given, labels=[*given.labels, *unseen])
    given = data.part(given, "test", cfg.tests, cfg.seed)
    check_numbering(found.model, given)
    return found, given


def on_one_device(options):
    """The options for a run of arms: on one device and in float32, unless another precision was asked for, so that they
    compare; LiteRT's files know no mixed precision.  Raises `InputError` where another strategy was asked for."""
    if options.strategy not in ("auto", "one"):
        raise core.InputError(f"--strategy {options.strategy}: the arms train on one device, so that they compare")
    exact = {"precision": "float32"} if options.precision == "auto" else {}
    return dataclasses.replace(options, strategy="one", **exact)


def main(argv=None):
    """Read the command, find the model and its data, run the arms, show and record them."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if "--preset" not in argv and not any(word.startswith("--preset=") for word in argv):
        argv += ["--preset", "quick"]
    what = argv.pop(0) if argv and not argv[0].startswith("-") else ""
    options, cfg = core.parse(Config, PRESETS, argv, unit="compression.benchmark MODEL")
    if not what:
        raise core.InputError(
            "say what to compress: a unit, an exported folder or a .keras file; --help lists the flags"
        )
    options = on_one_device(options)
    from compression import arms

    if unknown := sorted(set(cfg.arms) - set(arms.ARMS)):
        raise core.InputError(f"--arms: there is no {', '.join(unknown)}: choose from {', '.join(arms.ARMS)}")
    check_settings(cfg)
    target, data = prepare(what, cfg, options.runs)
    inputs = {"model": target.sha256(), "data": data.provenance}
    typed = shlex.join(["python", "-m", "compression.benchmark", what, *argv])
    with core.run(f"compression/{target.name}", options, cfg, scope=False, inputs=inputs, typed=typed) as run:
        names = cfg.arms or [name for name, arm in arms.ARMS.items() if target.layered or not arm.steps]
        if not target.layered:
            print(f"{target.source} is a SavedModel without its Keras model: it is converted, and not trained on")
        rows = benchmark(run, target, data, cfg, names)
        report.show(rows, run.record["targets"], run.record["load"])
    if cfg.record:
        core.files.write_atomic(cfg.record, (run.folder / "result.json").read_text())
    report.conclude(rows)
    return run.record


if __name__ == "__main__":
    core.cli(main)
