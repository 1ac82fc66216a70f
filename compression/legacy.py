"""TensorFlow's own toolkit, tensorflow-model-optimization: pruning, clustering and quantisation-aware training.

It knows the older `tf_keras` alone, and sets a flag that every later import of Keras in the process reads.  So it works
in a process of its own (`legacy_worker`), on a copy of the network in `tf_keras`: the graph and the weights go over in
files, and what has become of the weights comes back.  Nothing here imports it.

What our own pruning, clustering and quantisation do is held against it in the benchmark.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from compression import quantize
from compression.channels import replay
from compression.prune import copy_of
from compression.training import Training
from course.core import InputError

TECHNIQUES = ("prune", "cluster", "quantise")
CLOSE = 1e-4  # of outputs of the copy and of the original, relative to the largest
EXAMPLES = 200  # on which they are compared


@dataclasses.dataclass
class Legacy:
    """One technique of the toolkit; combinations are one after another, on the model that the one before gave."""

    technique: str = "prune"  # prune (magnitude, polynomial schedule), cluster (linear start) or quantise (aware, int8)
    sparsity: float = 0.8  # of each kernel that prune leaves
    clusters: int = 16  # different values in each kernel that cluster leaves
    keep_zeros: bool = False  # cluster, quantise: weights that are zero stay so (with clusters, "PCQAT")
    keep_clusters: bool = False  # quantise: weights that share a value keep sharing it
    pixels: bool = True  # quantise: inputs are 0..255, each its own quantised value; False: their range is measured
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class Made:
    """What the toolkit made of a model.

    `report` of quantise: max_difference and agreement of the file with the toolkit's model, which rounds, and
    convert_seconds, how long of the whole the file was made from it.
    """

    model: keras.Model  # with the weights as they came back; of quantise without the rounding: that is in `content`
    content: bytes | None  # of quantise: the full int8 file, which takes uint8 pixels, or float32 where they are none
    report: dict  # over, back: largest difference of the copy's outputs; of quantise more, of the file


def optimise(model, data, settings):
    """Run one technique of the toolkit on `model` (functional, its layers in `FIELDS`) -> `Made`; `model` stays.

    data: `compression.data.Data`.  quantise changes the network beforehand: what prepares the input becomes a 1 x 1
    depthwise convolution, because the toolkit rounds no `Normalization`.  There is no checkpoint: a call that is
    interrupted starts over.  Raises one line: `InputError` where a layer is not known or the toolkit is missing or
    refuses the network (a `ValueError` of its), `RuntimeError` where it crashes.
    """
    if settings.technique not in TECHNIQUES:
        raise InputError(f"technique {settings.technique!r} is not known: choose one of {', '.join(TECHNIQUES)}")
    quantises = settings.technique == "quantise"
    source = quantize.fold(model, batch_norm=False) if quantises else copy_of(model)
    steps, inner = described(source)
    x = data.x_val[:EXAMPLES]
    with tempfile.TemporaryDirectory(prefix="compression-") as name:
        folder = Path(name)
        request = {"steps": steps, "settings": dataclasses.asdict(settings)}
        (folder / "request.json").write_text(json.dumps(request))
        _write_weights(folder / "weights.npz", [layer.get_weights() for layer in inner])
        for key in ("x_train", "y_train", "x_val", "y_val"):
            np.save(folder / f"{key}.npy", getattr(data, key))
        _work(folder)
        report = json.loads((folder / "report.json").read_text())
        before, after = np.load(folder / "before.npy"), np.load(folder / "after.npy")
        report["over"] = _difference(before, source, x)
        with np.load(folder / "result.npz") as held:
            for i, layer in enumerate(inner):
                layer.set_weights([held[f"{i}/{j}"] for j in range(len(layer.get_weights()))])
        content = (folder / "model.tflite").read_bytes() if quantises else None
    report["back"] = _difference(after, source, x)
    return Made(source, content, report)


def _difference(theirs, model, x):
    ours = model.predict(x, verbose=0, batch_size=100)
    found = float(np.abs(ours - theirs).max())
    if not found <= CLOSE * max(1.0, float(np.abs(ours).max())):
        raise RuntimeError(
            f"the copy in tf_keras answers {found:.2g} otherwise than {model.name}: its weights were mixed up"
        )
    return found


def _write_weights(path, weights):
    np.savez(path, **{f"{i}/{j}": array for i, own in enumerate(weights) for j, array in enumerate(own)})


def _work(folder):
    """Run the worker on what lies in `folder`; its progress goes to the terminal."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TF_USE_LEGACY_KERAS": "1", "PYTHONPATH": paths}
    sys.stdout.flush()
    with (folder / "stderr.txt").open("w+", errors="replace") as errors:
        command = [sys.executable, "-m", "compression.legacy_worker", str(folder)]
        code = subprocess.run(command, env=environment, stderr=errors, check=False).returncode
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()]
    if code:
        refused = lines and re.match(r"(ValueError|ModuleNotFoundError):", lines[-1])
        kind = InputError if refused and code > 0 else RuntimeError
        raise kind(f"tensorflow-model-optimization's process {_why(code, lines)}")


def _why(code, lines):
    last = lines[-1] if lines else f"it gave no reason (status {code})"
    if code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (": it may have needed more memory than there is" if name == "SIGKILL" else "")
    if re.fullmatch(r"ModuleNotFoundError: No module named '(tensorflow_model_optimization|tf_keras)'", last):
        return f"lacks a package ({last}): pip install tensorflow-model-optimization==0.8.1 tf-keras==2.21.0"
    return f"failed: {last}"


# --- the network in words --------------------------------------------------------------------------------------------

POOLING = ("pool_size", "strides", "padding")
CONVOLUTION = ("kernel_size", "strides", "padding", "dilation_rate", "use_bias", "activation")
FIELDS = {  # of the layers' configurations, what makes a layer of tf_keras the same
    "Activation": ("activation",),
    "Add": (),
    "AveragePooling1D": POOLING,
    "AveragePooling2D": POOLING,
    "BatchNormalization": ("axis", "momentum", "epsilon", "center", "scale"),
    "Concatenate": ("axis",),
    "Conv1D": ("filters", "groups", *CONVOLUTION),
    "Conv2D": ("filters", "groups", *CONVOLUTION),
    "Cropping2D": ("cropping",),
    "Dense": ("units", "use_bias", "activation"),
    "DepthwiseConv2D": ("depth_multiplier", *CONVOLUTION),
    "Dropout": ("rate",),
    "Flatten": (),
    "GlobalAveragePooling1D": ("keepdims",),
    "GlobalAveragePooling2D": ("keepdims",),
    "GlobalMaxPooling1D": ("keepdims",),
    "GlobalMaxPooling2D": ("keepdims",),
    "MaxPooling1D": POOLING,
    "MaxPooling2D": POOLING,
    "Multiply": (),
    "Normalization": ("axis", "mean", "variance"),
    "Permute": ("dims",),
    "ReLU": ("max_value", "negative_slope", "threshold"),
    "Rescaling": ("scale", "offset"),
    "Reshape": ("target_shape",),
    "SeparableConv2D": ("filters", "depth_multiplier", *CONVOLUTION),
    "SpatialDropout2D": ("rate",),
    "UpSampling2D": ("size", "interpolation"),
    "ZeroPadding2D": ("padding",),
}


class _Place(int):
    """Where a step stands: told from the other numbers that a layer is called with."""


def described(model):
    """A functional model in words, [{kind, name, config, inputs: places in this list, trainable}], the input first and
    the output last, and the layers whose weights these are, in the same order (without the input)."""
    if not isinstance(model, keras.Model) or len(getattr(model, "inputs", None) or ()) != 1 or len(model.outputs) != 1:
        raise InputError(f"{model.name} is not a functional or Sequential model of one input and one output")
    steps, inner = [{"kind": "Input", "shape": list(model.inputs[0].shape[1:]), "name": "inputs"}], []

    def call(node, *args, **kwargs):
        layer, kind = node.operation, type(node.operation).__name__
        given = [value for value in keras.tree.flatten((args, kwargs)) if isinstance(value, _Place)]
        if kind not in FIELDS or not isinstance(layer, keras.layers.Layer) or layer in inner:
            raise InputError(
                f"layer {layer.name} ({kind}) has no counterpart in tf_keras that is known here, or is used twice: "
                "use our own technique instead"
            )
        config = layer.get_config()
        words = {key: config[key] for key in FIELDS[kind] if config.get(key) is not None}
        if not isinstance(words.get("activation", ""), str):
            raise InputError(f"layer {layer.name} has an activation of its own: use our own technique instead")
        inner.append(layer)
        steps.append({"kind": kind, "name": layer.name, "config": words, "inputs": given, "trainable": layer.trainable})
        return _Place(len(steps) - 1)

    if replay(model, [_Place(0)], call) != [len(steps) - 1]:
        raise InputError(f"{model.name} has layers behind its output: build the model without them")
    return steps, inner
