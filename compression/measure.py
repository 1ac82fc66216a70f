"""What a compressed file costs and what it answers: size, sparsity, accuracy beside the original's, time, memory.

A "file" is a .tflite, or the folder of a SavedModel where LiteRT cannot hold the model.
"""

import collections
import contextlib
import dataclasses
import gzip
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np

from compression.quiet import quiet

THREADS = (1, 2)
PERCENTILES = (50, 90, 95, 99)
ROOT = Path(__file__).parents[1]


# --- the file itself --------------------------------------------------------------------------------------------------


def predict(path, inputs):
    """Outputs float32 [N, classes] of a file for `inputs` [N, ...]."""
    if path.suffix == ".tflite":
        from compression import lite

        return lite.predict(path.read_bytes(), inputs).astype(np.float32)
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    call, (name, spec) = _signature(loaded)
    parts = [
        next(iter(call(**{name: tf.constant(inputs[i : i + 250], spec.dtype)}).values())).numpy()
        for i in range(0, len(inputs), 250)
    ]
    return np.concatenate(parts).astype(np.float32)


def _signature(loaded):
    call = loaded.signatures["serving_default"]
    ((name, spec),) = call.structured_input_signature[1].items()
    return call, (name, spec)


def size(path):
    """Bytes, as they are and as gzip -9 makes them; a SavedModel's are its graph's and its variables'."""
    inside = [p for p in sorted(path.rglob("*")) if p.is_file() and "assets" not in str(p.relative_to(path))]
    contents = [part.read_bytes() for part in ([path] if path.is_file() else inside)]
    packed = sum(len(gzip.compress(content, 9, mtime=0)) for content in contents)
    return {"bytes": sum(map(len, contents)), "gzip": packed}


def constants(path):
    """What a .tflite file holds beside its operations: (array, its scales' number) of every constant tensor of float32,
    float16, int8, uint8 or int32, as they are stored.  The converter that is used here writes no int4."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    types_of = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        for tensor in (graph.Tensors(i) for i in range(graph.TensorsLength())):
            buffer, kind = model.Buffers(tensor.Buffer()), types_of[tensor.Type()]
            if buffer.DataLength() and kind in ("float32", "float16", "int8", "uint8", "int32"):
                rounding = tensor.Quantization()
                shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else ()
                yield buffer.DataAsNumpy().view(kind).reshape(shape), rounding.ScaleLength() if rounding else 0


def weights(path):
    """The weights in a .tflite file: constants with two axes or more that are no indices."""
    return [array for array, _ in constants(path) if array.ndim > 1 and array.dtype != np.int32]


def stored(model):
    """The weights, with two axes or more, of a Keras model that is exported as a SavedModel, whose own file names its
    variables by number alone.  None of an int4 one: each block stores its zeros as another number, its zero point."""
    if any(getattr(layer, "quantization_mode", None) == "int4" for layer in model._flatten_layers()):
        return []
    return [np.asarray(w) for w in model.weights if len(w.shape) > 1 and not w.name.endswith("_scale")]


def sparsity(weights):
    """Share of zeros among arrays of weights, those of `weights` or `stored`; None where there are none."""
    return float(sum((w == 0).sum() for w in weights) / sum(w.size for w in weights)) if weights else None


def huffman(path):
    """Bytes of the constants of a .tflite file with its int8 kernels in Huffman's code (`cluster.coded`), their scales
    and all other constants as they are; what describes the operations is not counted."""
    from compression import cluster

    found = 0
    for array, scales in constants(path):
        is_kernel = array.ndim > 1 and array.dtype == np.int8
        found += 4 * scales + (cluster.coded(array)["bytes"] if is_kernel else array.nbytes)
    return found


def delegates(path):
    """Which operations of a .tflite file XNNPACK runs, and which LiteRT's own kernels: {"ops": name -> count of all,
    "delegated": number of those on XNNPACK, "left": name -> count of the others}; None for a SavedModel.

    XNNPACK has the kernels that are made for the processor.  An interpreter lists the file's operations and, behind
    them, one called DELEGATE for each part of the graph that was handed over, with that part's inputs and outputs: what
    lies between these is in the part.  Of the main graph only: the bodies of loops are not looked into.
    """
    if path.suffix != ".tflite":
        return None
    from compression import lite

    listed = lite.interpreter(path.read_bytes())._get_ops_details()
    operations = [entry for entry in listed if entry["op_name"] != "DELEGATE"]
    made_by = {int(tensor): i for i, entry in enumerate(operations) for tensor in entry["outputs"]}
    taken = set()
    for part in (entry for entry in listed if entry["op_name"] == "DELEGATE"):
        given, wanted = {*map(int, part["inputs"])}, [*map(int, part["outputs"])]
        while wanted:
            tensor = wanted.pop()
            if tensor not in given and tensor in made_by and made_by[tensor] not in taken:
                taken.add(made_by[tensor])
                wanted += map(int, operations[made_by[tensor]]["inputs"])
    left = [entry["op_name"] for i, entry in enumerate(operations) if i not in taken]
    ops = collections.Counter(entry["op_name"] for entry in operations)
    return {"ops": dict(ops), "delegated": len(taken), "left": dict(collections.Counter(left))}


# --- accuracy ---------------------------------------------------------------------------------------------------------


def paired(right, reference):
    """Accuracy of one model against another's on the same examples; both bool [N]: which answers are right.

    "difference" of the shares, with its 95 % interval by Agresti and Min 2005 (half an example is added to each of the
    four cells of the table of both), and "p", McNemar's exact two-sided test of the examples that only one has right.
    """
    from scipy.stats import binomtest

    gained, lost = int((right & ~reference).sum()), int((~right & reference).sum())
    n, more, less = len(right) + 2, gained + 0.5, lost + 0.5
    middle = (more - less) / n
    half = 1.96 * np.sqrt((more + less) / n - middle**2) / np.sqrt(n)
    return {
        "difference": (gained - lost) / len(right),
        "difference_interval": [float(middle - half), float(middle + half)],
        "gained": gained,
        "lost": lost,
        "p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def examples(data):
    """The test part as `serving.pipeline.evaluate` takes it; brightness is an input's mean."""
    axes = tuple(range(1, data.x_test.ndim))
    return types.SimpleNamespace(label=data.y_test, brightness=data.x_test.mean(axis=axes, dtype=np.float64))


def softmax(logits):
    """Logits [N, C] -> probabilities [N, C], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


# --- time -------------------------------------------------------------------------------------------------------------


def caller(path, sample, threads):
    """A function of no arguments that runs a file once on `sample` [1, ...], in the file's own type of number."""
    if path.suffix == ".tflite":
        from ai_edge_litert.interpreter import Interpreter

        runner = Interpreter(model_path=str(path), num_threads=threads)
        runner.allocate_tensors()
        entry, answer = runner.get_input_details()[0], runner.get_output_details()[0]["index"]
        place, ready = entry["index"], np.ascontiguousarray(sample, dtype=entry["dtype"])

        def call():
            runner.set_tensor(place, ready)
            runner.invoke()
            return runner.get_tensor(answer)

        return call
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature, (name, spec) = _signature(loaded)
    ready = tf.constant(sample, spec.dtype)
    return lambda loaded=loaded: next(iter(signature(**{name: ready}).values())).numpy()


def _timed(files, sample, threads, pipe):
    """In a child: answer (name, calls) on `pipe` with the milliseconds of that many calls of a file."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(threads)
    with quiet():
        calls = {name: caller(Path(path), sample, threads) for name, path in files.items()}
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        name, count = asked
        for _ in range(3):  # what the other files' turns have pushed out of the caches
            calls[name]()
        times = np.empty(count)
        for i in range(count):
            start = time.perf_counter()
            calls[name]()
            times[i] = 1e3 * (time.perf_counter() - start)
        pipe.send(times)


def latencies(files, sample, *, rounds, calls, seed, track=iter):
    """Milliseconds of one input through every file (name -> path): {name: {"p50_ms_1", "p90_ms_1", ...}}, the
    `PERCENTILES` for one thread and for two; the first file is the one the others are compared with.

    A process for each number of threads holds all files.  They are asked in turns of `calls` calls, in another order
    every round, so that a busy spell of the machine meets them all; percentiles are of all calls.  "times_faster_1" is
    the median over the rounds of the first file's median over this file's; "times_faster_1_range" has its quartiles.
    """
    context, found, first = multiprocessing.get_context("spawn"), {name: {} for name in files}, next(iter(files))
    order = np.random.default_rng(seed)
    pairs, processes = {}, []
    try:
        for threads in THREADS:
            here, there = context.Pipe()
            arguments = ({name: str(path) for name, path in files.items()}, sample, threads, there)
            processes.append(context.Process(target=_timed, args=arguments, daemon=True))
            processes[-1].start()
            there.close()
            pairs[threads] = here
        for here in pairs.values():
            here.recv()
        times = {(name, threads): [] for name in files for threads in THREADS}
        turns = [turn for _ in range(rounds) for turn in order.permutation(len(times))]
        keys = list(times)
        for turn in track(turns):
            name, threads = keys[turn]
            pairs[threads].send((name, calls))
            times[name, threads].append(pairs[threads].recv())
    finally:
        for here in pairs.values():
            with contextlib.suppress(OSError):
                here.send(None)
        for process in processes:
            process.join(10)
            process.kill()
    for (name, threads), measured in times.items():
        of_rounds = np.median(measured, axis=1)
        ratio = np.median(times[first, threads], axis=1) / of_rounds
        found[name] |= {f"p{q}_ms_{threads}": float(np.percentile(measured, q)) for q in PERCENTILES}
        found[name] |= {f"times_faster_{threads}": float(np.median(ratio)),
                        f"times_faster_{threads}_range": np.percentile(ratio, (25, 75)).tolist()}  # fmt: skip
    return found


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(path, shape):
    """Peak resident memory in MiB of a fresh process that loads a file and runs it ten times on one input of `shape`:
    {"peak_mib": of all, "own_mib": above what the runtime took before the file was loaded}."""
    command = [sys.executable, "-m", "compression.measure", str(Path(path).absolute()), *map(str, shape)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if answer.returncode:
        raise RuntimeError(f"{path} could not be run by itself: {answer.stderr.strip().splitlines()[-1:]}")
    return json.loads(answer.stdout)


def _footprint(path, *shape):
    """In that process."""
    sample = np.zeros((1, *map(int, shape)), np.uint8)
    if path.suffix == ".tflite":
        from ai_edge_litert import interpreter  # noqa: F401 - its memory is not the file's
    else:
        import tensorflow as tf

        tf.constant(0) + 1
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: that of the imports may be higher
    before = _resident("VmRSS")
    call = caller(path, sample, threads=1)
    for _ in range(10):
        call()
    print(json.dumps({"peak_mib": _resident("VmHWM"), "own_mib": _resident("VmHWM") - before}))


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# --- served -----------------------------------------------------------------------------------------------------------


def versions(files, folder, sample, labels):
    """Every file as a version that the server takes, `folder`/<name>/1; returns name -> that folder."""
    from compression import lite
    from course.core import export

    shutil.rmtree(folder, ignore_errors=True)
    made = {}
    for name, path in files.items():
        made[name] = folder / name / "1"
        if path.suffix == ".tflite":
            lite.export(path.read_bytes(), made[name], sample, labels)
            continue
        shutil.copytree(path, made[name])
        assets = made[name] / "assets.extra"
        assets.mkdir(exist_ok=True)
        export.write_sample(assets, export.request({"inputs": sample}), {"logits": predict(path, sample)})
    return made


def infra_validate(made):
    """`serving.pipeline.infra_validate` of every version (name -> folder): all in one server, and each in one of its
    own where that fails, to find out which; name -> verdict."""
    from serving import pipeline

    whole = pipeline.infra_validate(made)
    if whole["verdict"] == pipeline.INFRA_BLESSED:
        return {name: {"verdict": whole["verdict"], "reasons": []} for name in made}
    each = {name: pipeline.infra_validate({name: version}) for name, version in made.items()}
    return {name: {"verdict": one["verdict"], "reasons": one["reasons"]} for name, one in each.items()}


def served(made, sample, *, rounds, seconds, seed, track=iter):
    """Milliseconds of one client's request of one input, as JSON over loopback: name -> {"served_p50_ms",
    ..., "served_p99_ms"}; one server holds all versions, which are asked in turns."""
    from serving import load, pipeline, server

    body, order = json.dumps({"instances": sample.tolist()}).encode(), np.random.default_rng(seed)
    names, times = list(made), {name: [] for name in made}
    folder = made[names[0]].parents[1]
    config = folder / "models.config"
    config.write_text(pipeline.models_config({name: version.parent for name, version in made.items()}))
    with server.spawn(names[0], model_config_file=config) as running:
        for name in names:
            dataclasses.replace(running, model_name=name).wait_available(1, timeout=600)
        port = int(running.url.rpartition(":")[2])
        for turn in track([turn for _ in range(rounds) for turn in order.permutation(len(names))]):
            asked = load.Load("127.0.0.1", port, body, f"/v1/models/{names[turn]}:predict", 1, seconds, warm_up=0.1)
            measured = load.generate(asked)
            if not measured.statuses:  # not one answer: the machine was busy with something else
                measured = load.generate(dataclasses.replace(asked, seconds=20 * seconds))
            if measured.failed or not len(measured.latencies):
                raise RuntimeError(f"{names[turn]} did not answer every request: {measured.statuses}")
            times[names[turn]].append(measured.latencies)
    joined = {name: np.concatenate(parts) for name, parts in times.items()}
    return {name: {f"served_p{q}_ms": float(np.percentile(parts, q)) for q in PERCENTILES}
            for name, parts in joined.items()}  # fmt: skip


if __name__ == "__main__":
    _footprint(Path(sys.argv[1]), *sys.argv[2:])
