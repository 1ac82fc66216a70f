"""Keras models as LiteRT (TFLite) files: float, float16, dynamic-range int8 and full int8.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (affine quantisation, eq. 1); the LiteRT converter's post-training modes.
"""

from pathlib import Path

import numpy as np

from compression.quiet import quiet
from course.core import files
from course.core.export import request, write_sample
from course.core.timing import time_calls

KINDS = ("float", "float16", "dynamic", "int8")


def convert(model, kind, representative=None, pixels=True):
    """A Keras model with one input and one output (a dict of one names it) -> the bytes of a .tflite file.

    float:   float32 weights and arithmetic.          float16: float16 weights, float32 arithmetic.
    dynamic: int8 weights, activations quantised as they come (no data needed).
    int8:    int8 weights (per channel) and activations, whose ranges are measured on `representative` [N, ...] (a few
             hundred real pictures, 0..255); the file takes uint8 pixels as they are and gives float32: so that the
             input's range is all of 0..255, a copy of the first picture goes first, its first number 0 and its last
             255.  Inputs that are no `pixels` the file takes as float32, and rounds them itself.
    """
    import tensorflow as tf

    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {KINDS}")
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        if representative is None or not len(representative):
            raise ValueError("full int8 needs representative inputs to measure the activations' ranges on")
        samples = np.asarray(representative, "float32")
        if pixels:  # the input's scale is then 1; inside, the ranges are those of a real picture
            whole = samples[:1].copy()
            whole.flat[0], whole.flat[-1] = 0, 255
            samples = np.concatenate([whole, samples])
            converter.inference_input_type = tf.uint8
        converter.representative_dataset = lambda: ([row[None]] for row in samples)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    with quiet():
        content = converter.convert()
    if kind == "int8" and pixels and interpreter(content).get_input_details()[0]["quantization"] != (1.0, 0):
        raise RuntimeError("a pixel would not be its own quantised value: what clients send would be misread")
    return content


def interpreter(content, batch=None, threads=1):
    """An allocated LiteRT interpreter for a file's bytes, its batch dimension set to `batch` where given."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        runner = Interpreter(model_content=content, num_threads=threads)
        runner.allocate_tensors()
    if batch is not None:
        entry = runner.get_input_details()[0]
        runner.resize_tensor_input(entry["index"], [batch, *entry["shape"][1:]])
        runner.allocate_tensors()
    return runner


def run(runner, inputs):
    """One call: `inputs` [B, ...] in the model's own scale, of the interpreter's batch size -> outputs [B, ...].

    An integer input is quantised by the file's own scale and zero point: q = round(x / scale) + zero (Jacob, eq. 1).
    """
    entry, out = runner.get_input_details()[0], runner.get_output_details()[0]
    scale, zero = entry["quantization"]
    if np.issubdtype(entry["dtype"], np.integer):
        limits = np.iinfo(entry["dtype"])
        inputs = np.clip(np.round(inputs / scale) + zero, limits.min, limits.max)
    runner.set_tensor(entry["index"], inputs.astype(entry["dtype"]))
    runner.invoke()
    return runner.get_tensor(out["index"])


def predict(content, inputs, batch=100, threads=2):
    """Outputs [N, ...] of a file for `inputs` [N, ...], in batches."""
    outputs, runner, size = [], None, None
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        if len(part) != size:
            runner, size = interpreter(content, batch=len(part), threads=threads), len(part)
        outputs.append(run(runner, part))
    return np.concatenate(outputs)


def latency(content, sample, calls=200, threads=1):
    """Milliseconds of single calls on `sample` [1, ...]: {"p50_ms", "p90_ms", "p99_ms"}, after a warm-up."""
    runner = interpreter(content, batch=1, threads=threads)
    return time_calls(lambda: run(runner, sample), calls)


def parity(file, model, inputs, kind=""):
    """How far a file is from its source: the largest difference of outputs on real `inputs`, and the share of equal
    decisions (argmax).

    file: the bytes of a .tflite file, or the path of one or of a SavedModel's folder.  A conversion can go wrong
    without an error (weights lost, outputs NaN): raises `RuntimeError` where an output is not finite and, of the kinds
    that do not round, where the outputs are not the source's: "float" and "saved" may differ by a thousandth of the
    largest output (1e-4 where that is more), "float16" may decide otherwise on one input in a hundred (one in any
    case).  Other kinds round, each network otherwise: they have no bound.
    """
    if isinstance(file, bytes):
        named, ours = "the converted model", predict(file, inputs)
    else:
        from compression import measure

        named, ours = str(file), measure.predict(file, inputs)
    theirs = model.predict(inputs, verbose=0, batch_size=256)
    if isinstance(theirs, dict):  # a model that names its output
        (theirs,) = theirs.values()
    if not np.isfinite(ours).all():
        raise RuntimeError(f"{named} gives NaN or infinity: its weights were lost in conversion")
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    agreed = ours.argmax(-1) == theirs.argmax(-1)
    if kind in ("float", "saved") and not difference <= max(1e-3 * largest, 1e-4):
        raise RuntimeError(
            f"{named} differs from its Keras model by {difference:.2g}, whose largest output is {largest:.2g}"
        )
    if kind == "float16" and (~agreed).sum() > max(1, agreed.size / 100):
        raise RuntimeError(f"{named} decides as its Keras model on {agreed.mean():.2%} of the inputs: 99 % are needed")
    return {"max_difference": difference, "agreement": float(agreed.mean())}


def compare(model, folder, representative, splits):
    """Every kind of file of `model`, written to `folder` as `<kind>.tflite`; returns kind -> row.

    `splits`: name -> inputs [N, ...].  A row has bytes, agreement (of decisions with the source model, on the first
    split), p50_ms of one input on one thread, and the outputs [N, ...] for every split, under its name.
    """
    rows, inputs = {}, next(iter(splits.values()))
    for kind in KINDS:
        content = convert(model, kind, representative)
        files.write_atomic(Path(folder) / f"{kind}.tflite", content)
        rows[kind] = {
            "bytes": len(content),
            "agreement": parity(content, model, inputs[:1000], kind)["agreement"],
            "p50_ms": latency(content, inputs[:1])["p50_ms"],
            **{name: predict(content, split) for name, split in splits.items()},
        }
    return rows


def export(content, folder, sample, labels=()):
    """Write a version folder that the embedded server serves: `model.tflite`, the labels, a request and its answer.

    `sample` [B, ...]: the inputs of the sample request.
    """
    name = interpreter(content).get_signature_list()["serving_default"]["outputs"][0]
    with files.atomic_folder(folder, last="model.tflite") as temporary:
        assets = temporary / "assets.extra"
        assets.mkdir()
        (assets / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        takes = interpreter(content).get_input_details()[0]["dtype"]  # a server refuses 3.0 where it is to be uint8
        write_sample(assets, request({"inputs": sample.astype(takes)}), {name: predict(content, sample)})
        (temporary / "model.tflite").write_bytes(content)
