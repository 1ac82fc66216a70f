"""The channels of a network: which of them belong together, and the network without some of them.

Every channel of every tensor gets a number.  What a layer makes is new numbers; what it passes on keeps them; what must
have equal channels (the terms of a sum) ties them.  The numbers that stay then say how each weight is cut.  A channel
that a layer of unknown kind reads or makes stays, as do those of inputs and outputs.
"""

import math

import keras
import numpy as np
from keras import layers
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compression.prune import set_weights
from course.core import InputError

# --- running a graph on something else -------------------------------------------------------------------------------


def replay(model, inputs, call):
    """The values of a functional or Sequential model's outputs, when its inputs have the values `inputs`.

    call(node, *args, **kwargs) gives the value of the node's output, or a list of them; models inside are opened.
    """
    value = {id(tensor): given for tensor, given in zip(model.inputs, inputs, strict=True)}
    graph = keras.Model(model.inputs, model.outputs)  # a Sequential model as the functional one that it is
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input:
                continue
            if isinstance(node.operation, keras.Model) and getattr(node.operation, "inputs", None):
                made = replay(node.operation, [value[id(tensor)] for tensor in node.input_tensors], call)
            else:
                args, kwargs = node.arguments.fill_in(value)
                made = keras.tree.flatten(call(node, *args, **kwargs))
            value |= {id(tensor): one for tensor, one in zip(node.output_tensors, made, strict=True)}
    return [value[id(tensor)] for tensor in model.outputs]


# --- the channels of a network ---------------------------------------------------------------------------------------

# Layers and operations that make each output channel of the input channel of the same place alone
PASSING = {
    "ReLU", "LeakyReLU", "ELU", "Relu", "Relu6", "Silu", "Gelu", "Sigmoid", "Tanh", "Identity", "Rescaling",
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "GaussianNoise", "GaussianDropout",
    *(f"{kind}Pooling{n}D" for kind in ("Max", "Average", "GlobalMax", "GlobalAverage") for n in (1, 2, 3)),
    *(f"{kind}{n}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for n in (1, 2, 3)),
}  # fmt: skip
ELEMENTWISE = {  # activations that do so
    "linear", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "hard_sigmoid", "hard_silu", "hard_tanh", "softplus", "softsign", "exponential",
}  # fmt: skip
MERGING = {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"}  # of equal channels
OPERATIONS = {  # those of the above that mean the same as functions of keras.ops
    "Relu", "Relu6", "Silu", "Gelu", "Sigmoid", "Tanh", "Add", "Subtract", "Multiply", "Maximum", "Minimum",
    "Concatenate",
}  # fmt: skip
WEIGHTS = {  # whose axes are known
    "kernel", "bias", "depthwise_kernel", "pointwise_kernel", "gamma", "beta", "moving_mean", "moving_variance",
    "alpha",
}  # fmt: skip
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


class Channels:
    """The channels of `model` by number, and what ties them.

    made:   layer -> numbers [filters] of the channels that it makes (convolutions and Dense layers)
    norms:  (layer, numbers [C]) of each batch normalisation with a scale
    cuts:   id of a weight -> {axis: numbers along it}
    root:   [numbers] -> the number of its tie: channels with one root stay or go together
    fixed:  [numbers] bool: channels that must stay
    """

    def __init__(self, model, keep=()):
        if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
            raise InputError(f"{model.name} does not say what layers it has: give a functional or Sequential model")
        if missing := set(keep) - {layer.name for layer in model._flatten_layers(include_self=False)}:
            raise InputError(f"the model has no layer {', '.join(sorted(missing))} to keep")
        self.made, self.norms, self.cuts, self._ties, self._fixed, self._count = {}, [], {}, [], [], 0
        given = [self._new(tensor.shape[-1] or 1) for tensor in model.inputs]
        self._fixed += [*given, *replay(model, given, self._call)]
        self._fixed += [made for layer, made in self.made.items() if layer.name in keep]
        self.root = _connected(self._ties, self._count)
        self.fixed = np.isin(self.root, self.root[np.concatenate(self._fixed)])

    def _new(self, count):
        self._count += count
        return np.arange(self._count - count, self._count)

    def _tie(self, *many):
        """The numbers of the first, after tying the others' to them place by place."""
        self._ties += [np.stack([many[0], other]) for other in many[1:]]
        return many[0]

    def _call(self, node, *args, **kwargs):
        """Numbers of what a node makes, from those of what it reads; `replay` calls it."""
        values = [value for value in keras.tree.flatten((args, kwargs)) if value is not None]
        read = [value for value in values if isinstance(value, np.ndarray) and value.ndim]
        made = None
        if len(read) == len(node.input_tensors) and _is_plain(node.operation, constants=len(values) - len(read)):
            made = self._of(node.operation, read, [tensor.shape for tensor in node.input_tensors],
                            node.output_tensors[0].shape)  # fmt: skip
        if made is None:  # not known: nothing of what it reads or makes may change
            made = [self._new((tensor.shape and tensor.shape[-1]) or 1) for tensor in node.output_tensors]
            self._fixed += [*read, *made]
        return made

    def _of(self, layer, read, shapes, out):
        """The same for the kinds of layer that are known, else None; `out` is the shape of what it makes."""
        x, kind, shape = read[0], type(layer).__name__, shapes[0]
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, *SEPARABLE, layers.Dense)):
            return self._make(layer, x)
        if isinstance(layer, DEPTHWISE):
            spread = np.repeat(x, layer.depth_multiplier)
            self._cut(layer.kernel, {-2: x})
            self._cut(layer.bias, {-1: spread})
            return spread
        if isinstance(layer, layers.BatchNormalization) and layer.axis in (-1, len(shape) - 1):
            for weight in layer.weights:
                self._cut(weight, {-1: x})
            self.norms += [(layer, x)] * bool(layer.scale)
            return x
        if isinstance(layer, layers.PReLU):
            self._cut(layer.alpha, {-1: x} if layer.alpha.shape[-1] == len(x) else {})
            return x
        if kind in ("Flatten", "Reshape") and len(out) == 2 and None not in shape[1:]:
            return np.tile(x, math.prod(shape[1:-1]))
        if kind in PASSING or kind == "Activation" or (kind == "Reshape" and out[-1] == shape[-1]):
            return x
        if kind in MERGING and len({len(one) for one in read}) == 1:
            return self._tie(*read)
        if kind == "Concatenate":
            return np.concatenate(read) if layer.axis in (-1, len(shape) - 1) else self._tie(*read)
        return None

    def _make(self, layer, x):
        """A layer with kernels [..., in, out]: its filters' numbers, the same ones each time it is used."""
        if layer not in self.made:
            self.made[layer] = self._new(width_of(layer))
        made = self.made[layer]
        if isinstance(layer, SEPARABLE):
            self._cut(layer.depthwise_kernel, {-2: x})
            self._cut(layer.pointwise_kernel, {-2: np.repeat(x, layer.depth_multiplier), -1: made})
        else:
            axes = (-1, -2) if isinstance(layer, TRANSPOSED) else (-2, -1)
            self._cut(layer.kernel, dict(zip(axes, (x, made), strict=True)))
        self._cut(layer.bias, {-1: made})
        return made

    def _cut(self, weight, axes):
        """Note along which numbers a weight lies; used again, a layer ties what it reads now to what it read first."""
        if weight is not None:
            for axis, numbers in axes.items():
                self._tie(self.cuts.setdefault(id(weight), {}).setdefault(axis, numbers), numbers)

    def groups(self):
        """Names of layers -> roots [n] of the channels that they make and that may go: a group is what a share is taken
        of, a layer or, where a shortcut ties their channels, several."""
        inside = [np.stack([np.full_like(made, made[0]), made]) for made in self.made.values()]
        of = _connected([*self._ties, *inside], self._count)
        found = {}
        for layer, made in self.made.items():
            found.setdefault(of[made[0]], []).append((layer.name, made))
        groups = {", ".join(name for name, _ in members): np.concatenate([made for _, made in members])
                  for members in found.values()}  # fmt: skip
        groups = {name: np.unique(self.root[numbers[~self.fixed[numbers]]]) for name, numbers in groups.items()}
        return {name: roots for name, roots in groups.items() if len(roots)}


def _connected(ties, count):
    """Labels [count] of what hangs together by `ties`, a list of pairs [2, n]."""
    rows, columns = np.concatenate([np.zeros((2, 0), int), *ties], axis=1)
    return connected_components(coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count)), False)[1]


def _is_plain(layer, constants):
    """Whether a layer is used as `Channels` knows it: with its usual weights, channels last, not in groups, with an
    elementwise activation, and no constant that might differ from channel to channel."""
    if not isinstance(layer, layers.Layer):
        return type(layer).__name__ in OPERATIONS and not constants
    activation = getattr(layer, "activation", None)
    return (
        {weight.name for weight in layer.weights} <= WEIGHTS
        and getattr(layer, "data_format", None) != "channels_first"
        and getattr(layer, "groups", 1) == 1
        and (activation is None or getattr(activation, "__name__", "") in ELEMENTWISE)
        and (not isinstance(layer, layers.Rescaling) or np.ndim(layer.scale) == np.ndim(layer.offset) == 0)
    )


def width_of(layer):
    """Filters of a convolution, units of a Dense layer."""
    return layer.units if isinstance(layer, layers.Dense) else layer.filters


# --- the narrower network --------------------------------------------------------------------------------------------


def rebuild(model, channels, keep):
    """A new functional model of the channels that stay: `keep` bool [numbers], as `choose` gives it.

    It computes what `model` would if every layer read zeros in place of the channels that go.  Layers keep their names.
    """
    built = {}

    def call(node, *args, **kwargs):
        layer = node.operation
        if not isinstance(layer, layers.Layer):
            return layer(*args, **kwargs)
        if layer not in built:
            config = layer.get_config()
            if layer in channels.made:
                config["units" if "units" in config else "filters"] = int(keep[channels.made[layer]].sum())
            if isinstance(layer, layers.Reshape):
                config["target_shape"] = _target(node, args[0])
            built[layer] = type(layer).from_config(config)
        return built[layer](*args, **kwargs)

    with model.distribute_strategy.scope():
        inputs = [keras.Input(batch_shape=one.shape, dtype=one.dtype, name=one.name) for one in model.inputs]
        outputs = replay(model, inputs, call)
        whole = keras.Model(model.inputs, model.outputs) if isinstance(model, keras.Sequential) else model
        smaller = keras.Model(keras.tree.pack_sequence_as(whole.input, inputs),
                              keras.tree.pack_sequence_as(whole.output, outputs), name=model.name)  # fmt: skip
        for old, new in built.items():
            set_weights(new, [_sliced(weight, channels.cuts.get(id(weight), {}), keep) for weight in old.weights])
    return smaller


def _target(node, tensor):
    """The target shape of a Reshape that now reads `tensor`: flat, or with the channels last as they were."""
    old, new = node.output_tensors[0].shape[1:], node.input_tensors[0].shape[-1]
    if len(old) == 1:
        return (-1,)
    return (*old[:-1], tensor.shape[-1]) if old[-1] == new else old


def _sliced(weight, axes, keep):
    values = np.asarray(weight)
    for axis, numbers in axes.items():
        values = np.compress(keep[numbers], values, axis=axis)
    return values
