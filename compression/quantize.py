"""Quantisation: training that knows of the rounding, weight-only storage, and the examples that ranges are measured on.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference"; Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference" (fine-tuning from a
trained network, ranges measured beforehand, section 3.2).

`lite.convert` makes the files: float16, dynamic and full int8 after training, and the full int8 file of a model that
`quantise` has trained.  Each operation of that file gives the numbers of this model's layers, but that one half-way
between two may go to the other: one in a thousand, of which the layers behind make more, the deeper the network.
"""

import dataclasses

import keras
import numpy as np
from keras import layers

from compression.channels import replay
from compression.layers import Computed, FakeQuant, assign, described
from compression.training import Training, fit
from course.core import InputError


@dataclasses.dataclass
class Quantisation:
    """Quantisation-aware training: full int8, a scale for each output channel of the weights."""

    pixels: bool = True  # inputs are 0..255, each its own quantised value; False: their range is measured
    examples: int = 500  # that the activations' ranges are measured on before training
    decay: float = 0.99  # of the moving averages that the ranges follow while training
    keep_zeros: bool = False  # weights that are zero stay so: of a pruned model
    keep_clusters: bool = False  # weights that share a value keep sharing it: of a clustered model
    training: Training = dataclasses.field(default_factory=lambda: Training(epochs=3, lr=0.001, weight_decay=0.0))


@dataclasses.dataclass
class WeightOnly:
    """Keras's own quantisation of what is stored; activations and arithmetic stay as they are."""

    mode: str = (
        "int8"  # int8: a scale for each output channel; int4: one for every `block` weights of it, two to a byte
    )
    block: int = 128  # of int4; -1: a scale for each output channel


# --- representative sets ---------------------------------------------------------------------------------------------


def representative(data, count=300, seed=0):
    """`count` training inputs [count, ...] float32 in which every class is as frequent as can be: ranges measured on
    them know every kind of input, the rare ones too."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.y_train))
    turn = np.empty(len(order), int)  # of each example among those of its class
    for label in np.unique(data.y_train):
        own = order[data.y_train[order] == label]
        turn[own] = np.arange(len(own))
    return data.x_train[order[np.argsort(turn[order], kind="stable")][:count]].astype(np.float32)


# --- weight-only -----------------------------------------------------------------------------------------------------


def weight_only(model, data=None, settings=None):
    """A copy of `model` whose weights Keras stores in 8 or 4 bits and multiplies out when they are used.

    Covers Dense, EinsumDense, Embedding and what is made of them (attention); convolutions and normalisation stay
    float: `coverage` says how much of a model that is.  Needs no data.  Saves and loads as .keras and exports as a
    SavedModel; LiteRT's converter does not take it.  Raises `InputError` where nothing of the model is covered.
    """
    settings = settings or WeightOnly()
    if settings.mode == "int8":
        weights = keras.quantizers.AbsMaxQuantizer(axis=0)
        config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=weights, activation_quantizer=None)
    elif settings.mode == "int4":
        config = keras.quantizers.Int4QuantizationConfig(block_size=settings.block)
    else:
        raise InputError(f"mode {settings.mode!r} is not known: choose int8 or int4")
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.quantize(config=config, filters=lambda layer: type(layer).quantize is not layers.Layer.quantize)
    if not coverage(copy, model)["share"]:
        raise InputError(f"{model.name} has no Dense or Embedding layer: Keras quantises no convolutions' weights")
    return copy


def coverage(quantised, model):
    """{share, layers, bytes} of what `weight_only` made of `model`: the share of the parameters that are stored in few
    bits, in which layers, and the bytes of all the variables."""
    few, names = 0, []
    for before, after in zip(model._flatten_layers(), quantised._flatten_layers(), strict=True):
        if getattr(after, "quantization_mode", None) in ("int8", "int4") and not isinstance(after, keras.Model):
            names.append(after.name)
            few += before.count_params()
    size = sum(weight.value.dtype.size * int(np.prod(weight.shape)) for weight in quantised.weights)
    return {"share": few / model.count_params(), "layers": names, "bytes": size}


# --- a network as a list of steps ------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Step:
    """One operation of the network: what does it, and the steps whose outputs it takes."""

    does: object  # a Keras layer, `_Weights`, `_Affine`; None: the input
    inputs: list
    shape: tuple  # of its output, without the batch


@dataclasses.dataclass
class _Weights:
    """A convolution or Dense layer without its activation."""

    name: str
    of: dict  # `layers.Computed`'s
    kernel: np.ndarray
    bias: np.ndarray | None
    normalised: dict | None = None  # gamma, beta, mean, deviation [filters] of the batch normalisation behind it
    trained: bool = True  # not what prepares the input


@dataclasses.dataclass
class _Affine:
    """x -> gamma (x - mean) / deviation + beta, each [C]: batch normalisation in use, standardisation, scaling."""

    name: str
    gamma: np.ndarray
    beta: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    trained: bool  # batch normalisation
    epsilon: float = 0.0  # in the deviation, of batch normalisation

    @property
    def slope(self):
        return self.gamma / self.deviation

    @property
    def offset(self):
        return self.beta - self.mean * self.slope


def _steps(model):
    """The steps of a functional or Sequential model in the order in which they run: input first, output last."""
    if not isinstance(model, keras.Model) or len(getattr(model, "inputs", None) or ()) != 1 or len(model.outputs) != 1:
        raise InputError(f"{model.name} is not a functional or Sequential model of one input and one output")
    steps, seen = [_Step(None, [], tuple(model.inputs[0].shape[1:]))], set()

    def call(node, *args, **kwargs):
        layer, given = (
            node.operation,
            [value for value in keras.tree.flatten((args, kwargs)) if isinstance(value, _Step)],
        )
        shape = tuple(node.output_tensors[0].shape[1:])
        if layer in seen and getattr(layer, "weights", None):
            raise InputError(f"layer {layer.name} is used twice: its two uses would need ranges of their own")
        seen.add(layer)
        if len(given) != len(node.input_tensors) or len(node.output_tensors) != 1:
            raise InputError(_unknown(layer))
        for does in _split(layer, len(given), shape):
            given = [_Step(does, given, shape)]
            steps.extend(given)
        return given[0]

    output = replay(model, steps[:1], call)[0]
    return _needed(steps, output)


def _needed(steps, output):
    """The steps that `output` depends on, it being the last."""
    wanted = {id(output)}
    for step in reversed(steps):
        if id(step) in wanted:
            wanted |= {id(given) for given in step.inputs}
    return [step for step in steps if id(step) in wanted and step is not output] + [output]


def _split(layer, inputs, shape):
    """What one layer or operation does, as things that stand for one int8 operation each."""
    kind, name = type(layer).__name__, layer.name
    if isinstance(layer, (layers.SeparableConv2D, layers.BatchNormalization, layers.Normalization, layers.Rescaling)):
        return _separable(layer) if kind == "SeparableConv2D" else [_affine(layer, shape)]
    if of := described(layer):
        weights = _Weights(name, of, np.asarray(layer.kernel), np.asarray(layer.bias) if of["bias"] else None)
        return [weights, *_activation(layer.activation, f"{name}_activation")]
    if isinstance(layer, layers.ReLU) and not (layer.negative_slope or layer.threshold or layer.max_value):
        return _activation("relu", name)
    if isinstance(layer, layers.Activation):
        return _activation(layer.activation, name)
    if kind in ("Relu", "Relu6", "Sigmoid", "Tanh", "Silu") and not isinstance(layer, layers.Layer):
        return _activation(kind.lower(), name)
    if kind in ("Add", "Multiply") and inputs == 2:
        return [getattr(layers, kind)(name=name)]
    if kind in SAME_RANGE | AVERAGING | OWN_RANGE:
        return [layer]
    raise InputError(_unknown(layer))


def _unknown(layer):
    return (
        f"layer {layer.name} ({type(layer).__name__}) is not one that quantisation-aware training can round as LiteRT "
        f"does: use full int8 after training, or build the model without it"
    )


def _separable(layer):
    first = {"kind": "DepthwiseConv2D", "shape": tuple(layer.depthwise_kernel.shape), "bias": False,
             "strides": tuple(layer.strides), "padding": layer.padding,
             "dilation_rate": tuple(layer.dilation_rate)}  # fmt: skip
    second = {"kind": "Conv2D", "shape": tuple(layer.pointwise_kernel.shape), "bias": layer.use_bias,
              "strides": (1, 1), "padding": "valid", "dilation_rate": (1, 1)}  # fmt: skip
    bias = np.asarray(layer.bias) if layer.use_bias else None
    return [
        _Weights(f"{layer.name}_depthwise", first, np.asarray(layer.depthwise_kernel), None),
        _Weights(layer.name, second, np.asarray(layer.pointwise_kernel), bias),
        *_activation(layer.activation, f"{layer.name}_activation"),
    ]


def _activation(activation, name):
    kind = activation if isinstance(activation, str) else getattr(activation, "__name__", str(activation))
    if kind == "linear":
        return []
    if kind not in ("relu", "relu6", "silu", *FIXED):
        known = ", ".join(("relu", "relu6", "silu", *FIXED))
        raise InputError(
            f"{name}: quantisation-aware training does not know how LiteRT rounds the activation {kind}: use one of "
            f"{known}, or full int8 after training"
        )
    return [layers.Activation(kind, name=name, dtype="float32")]


def _affine(layer, shape):
    """A layer that scales and moves each channel, with its numbers [C]."""
    channels = shape[-1]
    if isinstance(layer, layers.Rescaling):
        gamma, beta, mean, variance = layer.scale, layer.offset, 0.0, 1.0
    elif isinstance(layer, layers.BatchNormalization):
        if layer.axis not in (-1, len(shape)):
            raise InputError(f"layer {layer.name} normalises axis {layer.axis}: only the last is known")
        gamma, beta = layer.gamma if layer.scale else 1.0, layer.beta if layer.center else 0.0
        mean, variance = layer.moving_mean, np.asarray(layer.moving_variance) + layer.epsilon
    else:
        mean, variance = np.asarray(layer.mean), np.maximum(np.asarray(layer.variance), keras.config.epsilon() ** 2)
        gamma, beta = 1.0, 0.0
        if layer.invert or (mean.size > 1 and mean.shape[-1:] != (mean.size,)) or mean.size not in (1, channels):
            raise InputError(f"layer {layer.name} does not have a mean and variance a channel: give it axis=-1")

    def numbers(value):
        return np.broadcast_to(np.asarray(value, np.float32).ravel(), channels).copy()

    deviation, trained = np.sqrt(numbers(variance)), isinstance(layer, layers.BatchNormalization)
    epsilon = layer.epsilon if trained else 0.0
    return _Affine(layer.name, numbers(gamma), numbers(beta), numbers(mean), deviation, trained, epsilon)


# --- folding ---------------------------------------------------------------------------------------------------------


def fold(model, batch_norm=True):
    """`model` in float32 with batch normalisation, standardisation and scaling in the weights before them.

    batch_norm: False leaves it where it stands right behind a convolution or Dense layer.

    It computes the same and is made of convolutions, Dense layers, activations and what only moves or joins numbers: a
    layer of it is one operation of an int8 file.  Raises `InputError` for a layer of which that is not known.
    """
    return _network(_folded(model, batch_norm), _plain)[0]


def _folded(model, batch_norm=True):
    """The steps of `model` with no `_Affine` among them; without `batch_norm`, with those that `fold` leaves.

    One that follows a convolution or Dense layer becomes part of it.  A maximum between them is no hindrance where
    every scale is positive: the largest number is then the same one before and after.  What is left - the normalisation
    of the input - becomes a 1 x 1 depthwise convolution: one int8 operation with a scale for each channel, where a
    product and a sum would round twice with one scale for all of them.
    """
    steps = _steps(model)
    for step in list(steps):
        if not isinstance(step.does, _Affine):
            continue
        (before,) = step.inputs
        if step.does.trained and not batch_norm and isinstance(before.does, _Weights):
            continue
        while len(_readers(steps, before)) == 1 and (step.does.slope > 0).all() and _is(before.does, *MAXIMA):
            (before,) = before.inputs
        if len(_readers(steps, before)) == 1 and isinstance(before.does, _Weights):
            _absorb(before.does, step.does)
            for other in steps:
                other.inputs = [step.inputs[0] if given is step else given for given in other.inputs]
            output = step.inputs[0] if steps[-1] is step else steps[-1]
            steps = [other for other in steps if other is not step and other is not output] + [output]
        else:
            step.does = _as_depthwise(step.does)
    return steps


def _readers(steps, step):
    return [other for other in steps if step in other.inputs]


def _is(layer, *kinds):
    return type(layer).__name__ in kinds


def _absorb(weights, affine):
    """Make `affine` part of `weights`: as its batch normalisation, or in the gamma and beta of the one it has."""
    held = weights.normalised
    if held is None:
        weights.normalised = {name: getattr(affine, name) for name in ("gamma", "beta", "mean", "deviation")}
    else:
        weights.normalised = held | {
            "gamma": held["gamma"] * affine.slope,
            "beta": held["beta"] * affine.slope + affine.offset,
        }


def _as_depthwise(affine):
    of = {"kind": "DepthwiseConv2D", "shape": (1, 1, len(affine.slope), 1), "bias": False,
          "strides": (1, 1), "padding": "valid", "dilation_rate": (1, 1)}  # fmt: skip
    weights = _Weights(affine.name, of, np.ones(of["shape"], np.float32), None, trained=affine.trained)
    _absorb(weights, affine)
    return weights


# --- building --------------------------------------------------------------------------------------------------------

MAXIMA = {"MaxPooling1D", "MaxPooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D"}
# What gives numbers that it was given, and the layers that only training sees
SAME_RANGE = MAXIMA | {
    "Flatten", "Reshape", "Permute", "ZeroPadding1D", "ZeroPadding2D", "Cropping1D", "Cropping2D", "Identity",
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "GaussianDropout",
}  # fmt: skip
AVERAGING = {"AveragePooling2D", "UpSampling2D"}  # LiteRT gives what they make the scale of what they read
OWN_RANGE = {"Concatenate", "GlobalAveragePooling1D", "GlobalAveragePooling2D"}
FIXED = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}  # LiteRT's own ranges


def _network(steps, emit, rounded=None):
    """A Keras model of `steps`, and {step: tensor} of what has a range of its own.

    emit(weights, x) applies a `_Weights`.  rounded: step -> the `FakeQuant` of its output; without it the model is
    float.
    """

    def round_(step, x, fixed=None):
        if fixed is None:
            points[step] = x
        if rounded is None:
            return x, lambda x: x
        layer = FakeQuant(*fixed, name=f"{name}_range", dtype="float32") if fixed else rounded(step, f"{name}_range")
        return layer(x), layer

    points, made, name = {}, {}, "input"  # made: step -> its output, and what rounds to the range that it has
    for step in steps:
        if step.does is None:
            image = keras.Input(step.shape, dtype="float32", name="pixels" if len(step.shape) == 3 else "inputs")
            made[step] = round_(step, image)
            continue
        given, range_ = [made[other][0] for other in step.inputs], made[step.inputs[0]][1]
        name = step.does.name
        if isinstance(step.does, _Weights):
            x = emit(step.does, given[0])
        elif isinstance(step.does, _Affine):
            x = _normalisation(step.does, given[0])
        elif rounded and _activation_of(step) == "silu":  # two operations, each of which rounds
            gate, _ = round_(step, layers.Activation("sigmoid", name=name, dtype="float32")(given[0]), FIXED["sigmoid"])
            x, name = layers.Multiply(name=f"{name}_product", dtype="float32")([given[0], gate]), f"{name}_product"
        else:
            copy = type(step.does).from_config(step.does.get_config() | {"dtype": "float32"})
            x = copy(given if len(given) > 1 else given[0])
        if _is(step.does, *SAME_RANGE):
            made[step] = x, range_
        elif _is(step.does, *AVERAGING):
            made[step] = range_(x), range_
        elif _joins_next(steps, step):
            made[step] = x, range_
        else:
            made[step] = round_(step, x, FIXED.get(_activation_of(step)))
    return keras.Model(image, made[steps[-1]][0], name="classifier"), points


def _activation_of(step):
    return step.does.activation.__name__ if _is(step.does, "Activation") else None


def _joins_next(steps, step):
    """Whether LiteRT makes one operation of `step` and the activation behind it: nothing is rounded between them."""
    readers = _readers(steps, step)
    return (
        (isinstance(step.does, _Weights) or _is(step.does, "Add"))
        and len(readers) == 1
        and _activation_of(readers[0]) in ("relu", "relu6")
    )


def _plain(weights, x):
    """Apply a `_Weights` as a Keras layer, its normalisation multiplied in."""
    of, (kernel, bias) = weights.of, _values(weights)
    more = {key: of[key] for key in ("strides", "padding", "dilation_rate") if key in of}
    kind, shape = getattr(layers, of["kind"]), of["shape"]
    more |= {"name": weights.name, "trainable": weights.trained, "dtype": "float32"}
    if of["kind"] == "DepthwiseConv2D":
        layer = kind(shape[:2], depth_multiplier=shape[3], **more | {"strides": of["strides"][0]})
    else:
        layer = kind(shape[-1], **more) if of["kind"] == "Dense" else kind(shape[-1], shape[:-2], **more)
    flat = tuple(x.shape[1:]) if of["kind"] == "DepthwiseConv2D" and len(x.shape) < 4 else None
    if flat:  # scaling of what is no picture
        x = layers.Reshape((*(1,) * (3 - len(flat)), *flat), name=f"{weights.name}_as_picture", dtype="float32")(x)
    y = layer(x)
    layer.set_weights([kernel, bias])
    return layers.Reshape(flat, name=f"{weights.name}_as_before", dtype="float32")(y) if flat else y


def _normalisation(affine, x):
    """Apply an `_Affine` as Keras's batch normalisation."""
    layer = layers.BatchNormalization(epsilon=affine.epsilon, name=affine.name, dtype="float32")
    y = layer(x)
    layer.set_weights([affine.gamma, affine.beta, affine.mean, affine.deviation**2 - affine.epsilon])
    return y


def _values(weights):
    """Kernel and bias with the normalisation in them (Jacob et al. 2018, eq. 14)."""
    kernel, held = weights.kernel, weights.normalised
    bias = weights.bias if weights.bias is not None else np.float32(0)
    if held is None:
        filters = kernel.shape[-1] * (kernel.shape[-2] if weights.of["kind"] == "DepthwiseConv2D" else 1)
        return kernel, np.broadcast_to(bias, filters)
    scale = held["gamma"] / held["deviation"]
    shaped = scale.reshape(kernel.shape[-2:]) if weights.of["kind"] == "DepthwiseConv2D" else scale
    return kernel * shaped, held["beta"] + (bias - held["mean"]) * scale


# --- quantisation-aware training -------------------------------------------------------------------------------------


def quantise(model, data, settings=None, checkpoint=None):
    """`model` with rounded weights and activations, trained on with the rounding in place.

    `lite.convert(..., "int8")` makes of it the full int8 file that computes the same.  Batch normalisation is folded
    into the weights before they are rounded (Jacob et al. 2018, section 3.2), with its running statistics: gamma and
    beta are trained on.  Ranges of activations are measured first, then follow their moving averages.  With
    `training.epochs` 0 it is quantisation after training.  Raises `InputError` for what `fold` cannot take.
    """
    settings = settings or Quantisation()
    trained = prepare(model, data, settings)
    if settings.training.epochs:
        fit(trained, data, settings.training, checkpoint=checkpoint, label="quantisation")
    return trained


def prepare(model, data, settings):
    """The network that `quantise` trains: rounded, its ranges measured, not trained yet."""
    if settings.pixels and len(model.input_shape) < 4:
        raise InputError(
            f"{model.name} takes {model.input_shape[1:]}, no pictures: set pixels=False to measure the range"
        )
    steps = _folded(model)
    floating, points = _network(steps, _plain)
    measured = _measure(floating, points, representative(data, settings.examples, settings.training.seed))
    if settings.pixels:
        measured[steps[0]] = 0.0, 255.0

    def rounded(step, name):
        low, high = measured[step]
        return FakeQuant(low, high, 1.0 if step is steps[0] else settings.decay, name=name, dtype="float32")

    def emit(weights, x):
        return _computed(weights, x, settings)

    return _network(steps, emit, rounded)[0]


def _measure(model, points, inputs, batch=50):
    """{step: (low, high)}: smallest and largest value at each of `points` (step -> tensor), a mean over batches."""
    probe = keras.Model(model.input, list(points.values()))
    ends = []
    for start in range(0, len(inputs), batch):
        found = [np.asarray(values) for values in probe(inputs[start : start + batch], training=False)]
        ends.append([(min(values.min(), 0.0), max(values.max(), 0.0)) for values in found])
    means = np.mean(ends, axis=0).astype(float).tolist()
    return {step: (low, max(high, low + 1e-6)) for step, (low, high) in zip(points, means, strict=True)}


def _computed(weights, x, settings):
    """Apply a `_Weights` as a `Computed` layer that rounds, its zeros and shared values held where they are to be."""
    kernel = weights.kernel
    mask = kernel != 0 if settings.keep_zeros and (kernel == 0).any() else None
    values = np.unique(kernel if mask is None else kernel[mask])
    shared = len(values) if settings.keep_clusters and 0 < len(values) <= min(256, kernel.size // 4) else 0
    layer = Computed(
        weights.of | {"bias": weights.bias is not None},
        shared=shared,
        masked=mask is not None,
        normalised=weights.normalised is not None,
        quantised=True,
        name=weights.name,
        trainable=weights.trained,
        dtype="float32",
    )
    y = layer(x)
    if shared:
        layer.share(values, np.searchsorted(values, kernel).clip(max=shared - 1).astype(np.int32), mask)
    else:
        assign(layer, kernel=kernel, **({} if mask is None else {"mask": mask}))
    if weights.bias is not None:
        assign(layer, bias=weights.bias)
    assign(layer, **(weights.normalised or {}))
    return y
