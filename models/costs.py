"""What a Keras model costs - parameters, FLOPs, memory, latency - and how much of a picture each of its units sees.

Conventions, the field's usual ones:

- FLOPs are 2 for each multiply-add of a convolution or matrix product, counted for one example.  Biases, activations,
  normalisation and pooling are left out: in the networks of this course they are a few per cent.  Zeros of the padding
  count like pixels.
- Training keeps every layer's output for the backward pass; inference keeps an output until its last use.

FLOPs are read off the traced graph, so that any model or layer can be counted whose shapes are fixed.  The layer table,
the memory and the receptive field need a model made of layers, functional or Sequential; models inside it are opened.
"""

import dataclasses
import itertools
import math
import time

import keras
import numpy as np

from course.core import InputError, runtime, timing

# --- FLOPs -----------------------------------------------------------------------------------------------------------


def flops(model, shapes=None):
    """FLOPs of `model` (or layer) for one example: 2 x the multiply-adds of its convolutions and matrix products.

    shapes: of the inputs, without the batch, where the model was not made from `keras.Input`: (32, 32, 3), or a list
    of such.  Raises `InputError` for an open size, a loop, whose turns cannot be counted, or a conditional, of whose
    branches only one runs.
    """
    if shapes is None:
        if not getattr(model, "inputs", None):
            raise InputError(f"{model.name} does not say its input shapes: give them as shapes=(32, 32, 3)")
        given = model.inputs[0] if isinstance(model, keras.Sequential) else model.input  # as its call takes them
        specs = keras.tree.map_structure(_spec, given)
    else:
        lone = not isinstance(shapes, list)
        specs = [_spec(keras.KerasTensor((None, *shape))) for shape in ([shapes] if lone else shapes)]
        specs = specs[0] if lone else specs
    return 2 * _multiply_adds(model, specs)


def _spec(tensor):
    """A `KerasTensor` as TensorFlow's description of one example."""
    import tensorflow as tf

    shape = (1, *tensor.shape[1:])
    if None in shape:
        raise InputError(f"an input of shape {tensor.shape} has no fixed size: build the model with one to count it")
    return tf.TensorSpec(shape, tensor.dtype)


def _multiply_adds(call, *args, **kwargs):
    import tensorflow as tf

    def traced(*args, **kwargs):
        return call(*args, **kwargs)

    return _of_graph(tf.function(traced, autograph=False).get_concrete_function(*args, **kwargs).graph)


def _of_graph(graph):
    total = 0
    for op in graph.get_operations():
        if op.type in ("PartitionedCall", "StatefulPartitionedCall"):  # a compiled part, such as a grouped convolution
            total += _of_graph(graph._get_function(op.get_attr("f").name).graph)
        elif "While" in op.type:
            raise InputError(f"{op.name} is a loop, whose turns cannot be counted: build its layer with unroll=True")
        elif op.type in ("If", "StatelessIf", "Case", "StatelessCase"):
            raise InputError(f"{op.name} is a conditional, of whose branches only one runs: count each without it")
        else:
            total += _of_operation(op)
    return total


def _of_operation(op):
    """Multiply-adds of one operation of a graph; 0 where it is neither a convolution nor a matrix product."""
    shape = [tuple(tensor.shape) for tensor in op.inputs]
    out = tuple(op.outputs[0].shape) if op.outputs else ()
    match op.type:
        case "Conv1D" | "Conv2D" | "Conv3D":  # each output number is a sum over the kernel and its input channels
            counted = out, shape[1][:-1]
        case "DepthwiseConv2dNative":  # ... over one channel only
            counted = out, shape[1][:2]
        case "Conv2DBackpropInput" | "Conv3DBackpropInputV2":  # transposed: each *input* number spreads over the kernel
            counted = shape[2], shape[1][:-1]
        case "MatMul":
            counted = out, shape[0][0 if op.get_attr("transpose_a") else 1]
        case "BatchMatMul" | "BatchMatMulV2" | "BatchMatMulV3":
            counted = out, shape[0][-2 if op.get_attr("adj_x") else -1]
        case "Einsum":
            counted = tuple(_einsum_sizes(op.get_attr("equation").decode(), shape).values()), ()
        case _:
            return 0
    counted = np.hstack(counted).tolist()
    if None in counted:
        raise InputError(f"{op.name} has no fixed size: build the model with fixed input shapes to count it")
    return int(math.prod(counted))


def _einsum_sizes(equation, shapes):
    """Size of every index: a contraction multiplies once for each combination of them."""
    terms = equation.partition("->")[0].split(",")
    if "." in equation or len(terms) != 2:
        raise InputError(f"einsum {equation!r} cannot be counted: write two operands, without an ellipsis")
    return {index: size for term, shape in zip(terms, shapes, strict=True)
            for index, size in zip(term.strip(), shape, strict=True)}  # fmt: skip


# --- layer by layer --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Call:
    """One use of a layer; each tensor of the model has a number as its key."""

    layer: object
    node: object
    inputs: list  # keys of the tensors it reads
    outputs: list  # keys of the tensors it makes
    tensors: list  # the latter themselves


def _calls(model):
    """`_Call`s of the model's layers in the order in which they run, its inputs first, and the keys of its outputs."""
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise InputError(f"{model.name} does not say what layers it is made of: give a functional or Sequential model")
    calls, fresh = [], itertools.count()
    key = {}  # id of a tensor -> its number; when an inner model is used again, its tensors get new ones

    def walk(model, inner):
        graph = keras.Model(model.inputs, model.outputs)  # a Sequential model as the functional one that it is
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                layer, given, made = node.operation, node.input_tensors, node.output_tensors
                if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
                    key.update({id(own): key[id(tensor)] for own, tensor in zip(layer.inputs, given, strict=True)})
                    walk(layer, inner=True)
                    key.update({id(tensor): key[id(own)] for tensor, own in zip(made, layer.outputs, strict=True)})
                elif not (node.is_input and inner):
                    key.update({id(tensor): next(fresh) for tensor in made})
                    calls.append(_Call(layer, node, [key[id(tensor)] for tensor in given],
                                       [key[id(tensor)] for tensor in made], list(made)))  # fmt: skip

    walk(model, inner=False)
    return calls, [key[id(tensor)] for tensor in model.outputs]


def _bytes(call):
    """Bytes of a call's outputs for one example; a flattened or reshaped tensor is its input under another name."""
    import tensorflow as tf

    if type(call.layer).__name__ in ("Flatten", "Reshape"):
        return 0
    for tensor in call.tensors:
        if None in tensor.shape[1:]:
            raise InputError(f"{call.layer.name} makes {tensor.shape}: build the model with a fixed input shape")
    return sum(math.prod(tensor.shape[1:]) * tf.as_dtype(tensor.dtype).size for tensor in call.tensors)


def table(model):
    """A row a layer, in the order in which they run: {layer, kind, output, params, flops, activation_bytes}.

    `output` is the shape without the batch; FLOPs and bytes are for one example.  A layer used twice has its parameters
    in its first row.
    """
    rows, seen = [], set()
    for call in _calls(model)[0]:
        params = 0 if call.layer in seen else getattr(call.layer, "count_params", int)()
        seen.add(call.layer)
        rows.append({
            "layer": call.layer.name, "kind": type(call.layer).__name__,
            "output": list(call.tensors[0].shape[1:]),
            "params": params, "flops": 0 if call.node.is_input else 2 * _of_call(call.node),
            "activation_bytes": _bytes(call),
        })  # fmt: skip
    return rows


def _of_call(node):
    args, kwargs = keras.tree.map_structure(
        lambda value: _spec(value) if isinstance(value, keras.KerasTensor) else value,
        (node.arguments.args, node.arguments.kwargs),
    )
    return _multiply_adds(node.operation, *args, **kwargs)


def count(model):
    """{params, trainable_params, flops, activation_bytes, peak_bytes} of a functional or Sequential model.

    activation_bytes: all layers' outputs for one example, its pixels included, which training keeps for the backward
    pass.  peak_bytes: the most that inference holds at once, when every output is freed after its last use.
    """
    calls, outputs = _calls(model)
    return {
        "params": model.count_params(),
        "trainable_params": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        "flops": flops(model),
        "activation_bytes": sum(map(_bytes, calls)),
        "peak_bytes": _peak(calls, outputs),
    }


def _peak(calls, outputs):
    owner = {}  # a view lives as long as what it looks at, a layer's outputs as long as one of them is needed
    for call in calls:
        view = call.inputs and not _bytes(call)
        owner |= dict.fromkeys(call.outputs, owner[call.inputs[0]] if view else call.outputs[0])
    last = {owner[key]: i for i, call in enumerate(calls) for key in (*call.inputs, *call.outputs)}
    last |= {owner[key]: len(calls) for key in outputs}
    held, peak = {}, 0
    for i, call in enumerate(calls):
        if _bytes(call):
            held[call.outputs[0]] = _bytes(call)
        peak = max(peak, sum(held.values()))
        held = {key: size for key, size in held.items() if last[key] > i}
    return peak


def latency(model, batch=1, calls=100, warm_up=20):
    """Milliseconds of a compiled forward pass of `batch` examples of noise: {"p50_ms", "p90_ms", "p99_ms"}."""
    return timing.time_calls(_compiled(model, batch), calls, warm_up)


def latencies(models, batch=1, rounds=100, warm_up=10):
    """Median milliseconds of each of `models` (name -> model), to compare them by: name -> number.

    They take turns, so that what else the machine does, or how warm it is, falls on all of them alike.
    """
    calls = {name: _compiled(model, batch) for name, model in models.items()}
    times = {name: [] for name in models}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def _compiled(model, batch):
    """A function without arguments: the compiled model on `batch` examples of noise, its answer fetched to the host
    (an accelerator says that it is done before it is)."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    x = [tf.cast(rng.uniform(0, 1, (batch, *_spec(tensor).shape[1:])), tensor.dtype) for tensor in model.inputs]
    x = x[0] if len(x) == 1 else x
    traced = tf.function(lambda x: model(x, training=False), autograph=False, jit_compile=runtime.jit())
    compiled = traced.get_concrete_function(x)
    return lambda: keras.tree.map_structure(np.asarray, compiled(x))


# --- receptive field -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Field:
    """The input pixels that the units of a map depend on; one number a spatial axis."""

    first: tuple[int, ...]  # where the field of the first unit begins; negative: in the padding
    last: tuple[int, ...]  # its last pixel
    stride: tuple[int, ...]  # pixels from the field of one unit to that of its neighbour

    @property
    def size(self):
        """Pixels from the first to the last, both included."""
        return tuple(last - first + 1 for first, last in zip(self.first, self.last, strict=True))


# Layers that make each unit from the units at its own place
POINTWISE = {
    "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Relu", "Gelu", "Silu", "Sigmoid", "Tanh",
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "GaussianNoise", "BatchNormalization", "Normalization",
    "Rescaling", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dense",
}  # fmt: skip


def receptive_field(model, layer=None):
    """`Field` of the units of `layer` (a name; default: the last that has a spatial map) of a convolutional model.

    A window of k units with dilation d spans (k - 1) d + 1 of them, which lie `stride` pixels apart; branches that
    meet see together what each of them sees.  Raises `InputError` for a layer that has no map, that reads what has none
    (channel weights of a squeeze-and-excite block), or whose reach is not known here.
    """
    fields, answer, names = {}, None, []  # answer: of the last layer with a map, its name and its field
    for call in _calls(model)[0]:
        names.append(call.layer.name)
        spatial = len(call.tensors[0].shape) - 2
        found = None
        if call.node.is_input and spatial > 0:
            found = Field((0,) * spatial, (0,) * spatial, (1,) * spatial)
        elif spatial > 0 and call.inputs and all(fields.get(key) for key in call.inputs):
            found = _reach(call, [fields[key] for key in call.inputs])
        fields |= dict.fromkeys(call.outputs, found)
        if layer == call.layer.name:
            if found is None:
                raise InputError(f"layer {layer} has no spatial map, or sees the whole picture: name an earlier one")
            return found
        answer = (call.layer.name, found) if spatial > 0 else answer
    if layer is not None or answer is None:
        raise InputError(f"the model has no layer {layer!r} with a spatial map: its layers are {', '.join(names)}")
    last, found = answer
    if found is None:
        raise InputError(f"layer {last}, the last with a spatial map, depends on what has none: name an earlier one")
    return found


def _reach(call, inputs):
    """`Field` behind one layer, from the fields of what it reads."""
    layer, kind = call.layer, type(call.layer).__name__
    if len({field.stride for field in inputs}) > 1:
        raise InputError(f"{kind} {layer.name} joins maps of different strides: their receptive fields do not line up")
    first = [min(ends) for ends in zip(*(field.first for field in inputs), strict=True)]
    last = [max(ends) for ends in zip(*(field.last for field in inputs), strict=True)]
    stride = list(inputs[0].stride)
    windows = getattr(layer, "kernel_size", None) or getattr(layer, "pool_size", None)
    if windows is not None and "Transpose" not in kind:
        before = call.node.input_tensors[0].shape[1:-1]
        dilations = getattr(layer, "dilation_rate", (1,) * len(windows))
        for axis, (window, step, dilation) in enumerate(zip(windows, layer.strides, dilations, strict=True)):
            span = (window - 1) * dilation
            pad = _left_padding(layer, span, step, before[axis])
            first[axis] -= pad * stride[axis]
            last[axis] += (span - pad) * stride[axis]
            stride[axis] *= step
    elif kind.startswith(("ZeroPadding", "Cropping")):
        sides = layer.padding if kind.startswith("Zero") else layer.cropping
        for axis, side in enumerate(sides if isinstance(sides[0], tuple) else [sides]):
            shift = side[0] * stride[axis] * (-1 if kind.startswith("Zero") else 1)
            first[axis], last[axis] = first[axis] + shift, last[axis] + shift
    elif kind not in POINTWISE or any(tensor.shape[1:-1] != call.tensors[0].shape[1:-1]
                                      for tensor in call.node.input_tensors):  # fmt: skip
        raise InputError(f"how far a {kind} ({layer.name}) reaches is not known here: name an earlier layer")
    return Field(tuple(first), tuple(last), tuple(stride))


def _left_padding(layer, span, step, size):
    """Units of padding before the first, as TensorFlow lays them: of an odd number the smaller half."""
    if layer.padding == "causal":
        return span
    if layer.padding != "same":
        return 0
    if step == 1:
        return span // 2
    if size is None:
        raise InputError(f"the padding of {layer.name} depends on the picture's size: build the model with a fixed one")
    return max((math.ceil(size / step) - 1) * step + span + 1 - size, 0) // 2


# --- equal costs -----------------------------------------------------------------------------------------------------


def match(build, target, cost=flops, most=1024):
    """The width (1..most) at which `cost` of the model `build(width)` is nearest to `target` -> (width, model).

    For comparisons at equal FLOPs or, with cost=keras.Model.count_params, equal parameters.  The cost must grow with
    the width.  Raises `InputError` where even `most` is too narrow.
    """
    low, high = 1, most
    if cost(build(high)) < target:
        raise InputError(f"no width up to {most} costs {target:,}: give a larger `most`")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(build(middle)) <= target else (low, middle)
    width = min((low, high), key=lambda width: abs(cost(build(width)) - target))
    return width, build(width)
