"""What is to be compressed: a unit's newest export or model, an exported version, or a .keras file."""

import dataclasses
import hashlib
import importlib
import json
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
from keras import layers

from course.core import catalogue
from course.core.errors import InputError
from course.core.export import SOURCE, TRAINED_ON
from serving import pipeline

SMALLEST = 1e-6  # probability that a logarithm is taken of; float16 stores much smaller ones badly


@dataclasses.dataclass
class Target:
    """A classifier, inputs [N, ...] -> logits [N, classes], and what is known of it."""

    name: str
    model: keras.Model
    layered: bool  # false: a SavedModel, whose layers are not to be had; it can be converted, not trained on
    data: str  # name of the set that it was trained on, for `compression.data.load`; "": not known
    labels: list[str] | None  # in the order of the logits; None: not known
    source: Path  # the file or the version's folder

    @property
    def shape(self):
        """Of one input: (H, W, C) for pictures."""
        return tuple(self.model.input_shape[1:])

    def sha256(self):
        """Hex digest of the weights and the architecture."""
        digest = hashlib.sha256(str(self.source if not self.layered else self.model.to_json()).encode())
        for weight in self.model.get_weights():
            digest.update(np.ascontiguousarray(weight))
        return digest.hexdigest()


def find(what, exports="exports", runs="runs"):
    """The `Target` that `what` names: a .keras file, a version's folder or its model's (the newest version), or a unit,
    whose newest export is taken, or, where it has none, the model of its newest run.

    Raises `InputError` where there is nothing, more than one, or no classifier.
    """
    path, short = Path(what), what.removeprefix("course.")
    if path.suffix == ".keras":
        if not path.is_file():
            raise InputError(f"{path} is not there: give a .keras file, an exported folder or a unit's name")
        return _from_keras(path, path.stem, unit=None)
    if path.is_dir():
        return _from_export(_version(path))
    if not short.isidentifier():
        raise InputError(f"{path} is neither a .keras file nor a folder nor a unit")
    unit = catalogue.find(short, catalogue.units()).name
    base = Path(exports) / unit
    if pipeline.versions(base):
        return _from_export(_version(base))
    return _from_run(unit, Path(runs))


def _version(path):
    """The newest version in a model's folder, or the folder itself where it is a version."""
    if (path / "saved_model.pb").exists() or (path / "assets.extra" / SOURCE).exists():
        return path
    if numbers := pipeline.versions(path):
        return path / str(numbers[-1])
    raise InputError(f"{path} holds no exported version: a version has a saved_model.pb")


def _from_export(version):
    """A version: its Keras model where it carries one, else its SavedModel as one layer."""
    assets = version / "assets.extra"
    labels = assets / "labels.txt"
    labels = labels.read_text().splitlines() if labels.exists() else []
    note = assets / TRAINED_ON
    note = json.loads(note.read_text()) if note.exists() else {}
    name = version.resolve().parent.name if version.name.isdecimal() else version.resolve().name
    known = {"data": note.get("data", ""), "labels": labels or None}
    if known["data"].startswith("./"):  # a file of the version itself
        known["data"] = str(assets / known["data"])
    if (assets / SOURCE).exists():
        return dataclasses.replace(_from_keras(assets / SOURCE, name, note.get("unit")), source=version, **known)
    if not (version / "saved_model.pb").exists():
        raise InputError(f"{version} holds a compressed file only: give the version that it was made from")
    return Target(name, opaque(version), False, source=version, **known)


def _from_run(unit, runs):
    """The model of a unit's newest run."""
    found = sorted((runs / unit).glob("*/*.keras"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{unit} has neither an export nor a run with a .keras file: python -m course.{unit} first")
    newest = sorted(found[-1].parent.glob("*.keras"))
    if len(newest) > 1:
        raise InputError(f"the newest run of {unit} has several models: name one of {', '.join(map(str, newest))}")
    target = _from_keras(newest[0], unit, unit)
    record = newest[0].with_name("result.json")
    name = json.loads(record.read_text()).get("data", {}).get("name", "") if record.exists() else ""
    return dataclasses.replace(target, data=name)


def _from_keras(path, name, unit):
    model = as_logits(load(path, unit))
    return Target(name, model, True, data="", labels=None, source=path)


def load(path, unit=None):
    """A .keras file as a model that computes in float32; the units that its layers come from are imported first."""
    from course.core import export

    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json").decode()
        for module in _modules(text, unit):
            importlib.import_module(module)
        return export.in_float32(keras.models.load_model(path, compile=False))
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile, ImportError) as error:
        raise InputError(f"{path} cannot be read as a Keras model: {' '.join(str(error).split())[:200]}") from error


def _modules(config, unit=None):
    """Our modules that a saved configuration names: those of its layers, the units whose packages they were registered
    under ("course.day21>DigitCapsules"), and `unit`, where it is one of ours."""
    named = set(re.findall(r'"module": "((?:course|models|compression)\.[\w.]+)"', config))
    units = [unit.name for unit in catalogue.units()]
    named |= {f"course.{unit}"} if unit in units else set()
    for package in re.findall(r'"registered_name": "course\.(\w+)>', config):
        named |= {f"course.{unit}" for unit in units if unit == package or unit.startswith(f"{package}_")}
    return named


def as_logits(model):
    """`model` with one output of logits: a closing softmax is left out, a dict of one output is opened.

    Raises `InputError` where it is no functional or Sequential classifier of one input and one output [N, classes].
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise InputError(f"{model.name} is no functional or Sequential model: its layers cannot be followed")
    if len(model.inputs) != 1 or len(model.outputs) != 1 or len(model.outputs[0].shape) != 2:
        shapes = ", ".join(str(tensor.shape) for tensor in model.outputs)
        raise InputError(f"{model.name} has {len(model.inputs)} inputs and outputs {shapes}: a classifier has one of "
                         "each, [N, classes]")  # fmt: skip
    output = model.outputs[0]
    last = output._keras_history.operation
    if isinstance(last, layers.Softmax) or (isinstance(last, layers.Activation) and _is_softmax(last)):
        output = last.input
    elif _is_softmax(last):
        return _without_activation(model, last.name)
    return keras.Model(model.inputs[0], output, name=model.name)


def _is_softmax(layer):
    return getattr(layer, "activation", None) is keras.activations.softmax


def _without_activation(model, name):
    def copy(layer):
        changed = {"activation": "linear"} if layer.name == name else {}
        return type(layer).from_config(layer.get_config() | changed)

    clone = keras.models.clone_model(model, clone_function=copy)
    clone.set_weights(model.get_weights())
    return keras.Model(clone.inputs[0], clone.outputs[0], name=model.name)


def opaque(version):
    """A SavedModel of whose making nothing is known, as a Keras model of one layer: inputs -> its scores.

    Its signature of arrays is taken: `pixels` where it has one, else `serving_default`; of several outputs, the one
    called `logits` or `probabilities`, of a single one whatever it is called.  Of probabilities the logarithm is taken:
    a softmax gives them back.
    """
    import tensorflow as tf

    signatures = tf.saved_model.load(str(version)).signatures
    name = "pixels" if "pixels" in signatures else "serving_default"
    if name not in signatures:
        raise InputError(f"{version} has no signature called pixels or serving_default")
    inputs, outputs = signatures[name].structured_input_signature[1], signatures[name].structured_outputs
    known = [output for output in ("logits", "probabilities") if output in outputs] or list(outputs)
    (key, spec), *others = inputs.items()
    if others or (len(known) > 1 and known[0] != "logits"):
        raise InputError(f"{version}: {name} takes {', '.join(inputs)} and gives {', '.join(outputs)}: the classifier "
                         "must have one input, and its scores must be called logits or probabilities")  # fmt: skip
    if spec.dtype == tf.string or None in spec.shape[1:]:
        raise InputError(f"{version}: {name} takes {spec.dtype.name} {spec.shape}: an array of fixed size is needed")
    given = keras.Input(spec.shape[1:], name=key)
    called = layers.TFSMLayer(str(version), call_endpoint=name)
    scores = _Scores(called, known[0], spec.dtype.name, int(outputs[known[0]].shape[-1]), name="saved_model")(given)
    return keras.Model(given, scores, name="saved_model")


class _Scores(layers.Layer):
    """Logits of a SavedModel's signature: one of its outputs; its input is cast to the signature's own type."""

    def __init__(self, called, output, dtype_in, classes, **kwargs):
        super().__init__(**kwargs)
        self.called, self.output_name, self.dtype_in, self.classes = called, output, dtype_in, classes

    def call(self, inputs):
        scores = self.called(keras.ops.cast(inputs, self.dtype_in))[self.output_name]
        if self.output_name != "probabilities":
            return scores
        return keras.ops.log(keras.ops.maximum(scores, SMALLEST))

    def compute_output_shape(self, shape):
        return (shape[0], self.classes)
