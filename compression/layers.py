"""Layers whose weights and activations are restricted while they are trained: quantised, shared, held at zero.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (fake quantisation, eq. 12; batch normalisation folded into the weights, eq. 14); Han et al. 2016, "Deep
Compression" (shared weights, section 3).
"""

import keras
import numpy as np
from keras import ops

BITS = 8
EPSILON = 2.0**-12  # a channel's range is at least this share of the widest's: int32 must hold its bias (see `bounds`)


# --- fake quantisation -----------------------------------------------------------------------------------------------


def fake_quant(x, low, high, bits=BITS):
    """x [...] -> [...] rounded to the 2^bits numbers that an integer tensor of the range [low, high] can stand for.

    q(r) = round((clamp(r; a, b) - a) / s) s + a, with s = (b - a) / (2^bits - 1) (Jacob, eq. 12).  [a, b] is the given
    range, which must include 0, moved by less than s so that 0 is one of the numbers (section 3): padding is exact.

    The gradient is that of the clamp alone: 1 inside the range, 0 outside.  Rounding, whose own derivative is 0
    wherever it has one, is passed straight through.
    """
    scale = (high - low) / (2**bits - 1)
    zero = _round(-low / scale)
    low, high = -zero * scale, (2**bits - 1 - zero) * scale
    inside = ops.clip(x, low, high)
    return inside + ops.stop_gradient(_round((inside - low) / scale) * scale + low - inside)


def fake_quant_weights(kernel, bound, bits=BITS):
    """kernel [..., C] rounded to the 2^bits - 1 numbers k s, |k| < 2^(bits - 1), of which `bound` [C] is the largest.

    Symmetric, so that a product of integers needs no correction for the weights' zero point, and without -2^(bits - 1),
    as LiteRT's int8 kernels want it (Jacob, appendix B).  The gradient is 1: `bound` is chosen so that nothing is cut.
    """
    scale = bound / (2 ** (bits - 1) - 1)
    return kernel + ops.stop_gradient(_round(kernel / scale) * scale - kernel)


def bounds(kernel):
    """The largest magnitude of each output channel of `kernel` [..., C] -> [C]: each channel gets a scale of its own.

    A channel much weaker than the others gets a wider range than it needs: a bias is an int32 in units of the input's
    scale times the weights', and would not fit in units that are too small.  What is lost lies below what an 8-bit
    activation shared by all the channels can show.
    """
    widest = ops.max(ops.abs(kernel), axis=tuple(range(len(kernel.shape) - 1)))
    most = ops.max(widest)
    return ops.maximum(widest, ops.where(most > 0, EPSILON * most, 1.0))


def _round(x):
    """Half-way cases up, as TensorFlow's own operation does; `ops.round` takes them to the even neighbour."""
    return ops.floor(x + 0.5)


@keras.saving.register_keras_serializable("compression")
class FakeQuant(keras.layers.Layer):
    """Rounds activations [...] to 8 bits within a range that follows their smallest and largest values (Jacob, 3.1).

    The range is a moving average over the training's batches; `decay` is the weight of what was, 1 leaves it as it is.
    """

    def __init__(self, low=0.0, high=255.0, decay=1.0, **kwargs):
        super().__init__(**kwargs)
        self.decay, self._start = decay, (low, high)

    def build(self, shape):
        for name, value in zip(("low", "high"), self._start, strict=True):
            start = keras.initializers.Constant(value)
            held = {"initializer": start, "trainable": False, "aggregation": "mean", "autocast": False}
            setattr(self, name, self.add_weight(shape=(), name=name, **held))

    def call(self, x, training=False):
        if not training:  # LiteRT's converter reads the range off this operation, and no other
            import tensorflow as tf

            return tf.quantization.fake_quant_with_min_max_vars(
                x, ops.convert_to_tensor(self.low), ops.convert_to_tensor(self.high), num_bits=BITS
            )
        if self.decay < 1:
            self.low.assign(self.decay * self.low + (1 - self.decay) * ops.minimum(ops.min(x), 0.0))
            self.high.assign(self.decay * self.high + (1 - self.decay) * ops.maximum(ops.max(x), 0.0))
        return fake_quant(x, ops.convert_to_tensor(self.low), ops.convert_to_tensor(self.high))

    def compute_output_shape(self, shape):
        return shape

    def get_config(self):
        low, high = self._start
        return super().get_config() | {"low": low, "high": high, "decay": self.decay}


# --- shared weights --------------------------------------------------------------------------------------------------


@ops.custom_gradient
def look_up(centroids, members):
    """The kernel whose weight i is centroids[members[i]]: [K], int32 [...] -> [...].

    A centroid's gradient is the sum of its members' (Han et al. 2016, eq. 3).
    """

    def gradient(*args, upstream=None):
        (upstream,) = args if upstream is None else (upstream,)
        sums = ops.segment_sum(ops.reshape(upstream, -1), ops.reshape(members, -1), num_segments=centroids.shape[0])
        return sums, None

    return ops.take(centroids, members), gradient


# --- a layer with a kernel that is computed --------------------------------------------------------------------------

KINDS = {"Conv1D", "Conv2D", "DepthwiseConv2D", "Dense"}


@keras.saving.register_keras_serializable("compression")
class Computed(keras.layers.Layer):
    """A convolution or Dense layer whose kernel is computed, at every step, from what is trained in its stead.

    of: {"kind": one of KINDS, "shape": of the kernel, in Keras's order, "bias": bool, "strides", "padding",
    "dilation_rate" of a convolution}.  From what is stored to the kernel, in this order:

    shared:      the number of different values; the kernel is looked up in a table of them (`look_up`), else free.  The
                 table holds each value times the root of the number of its members: plain gradient descent then moves
                 the kernel by its free step's projection on what it may be, at a rate that suits free weights.
    masked:      weights that are zero stay zero.
    normalised:  the batch normalisation behind the layer belongs to it: kernel gamma / sigma, bias
                 beta + (b - mu) gamma / sigma (Jacob, eq. 14).  gamma and beta are trained, mu and sigma stay as they
                 were: in fine-tuning they are known, and the layer computes the same in training and in use.
    quantised:   `fake_quant_weights`, a scale for each output channel.

    The layer computes as a 2-D convolution whatever its kind, and there is nothing between the rounding and the
    convolution: that is what LiteRT's converter turns into one int8 operation with a scale a channel.
    """

    def __init__(self, of, shared=0, masked=False, normalised=False, quantised=False, activation="linear", **kwargs):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.of, self.shared, self.masked = dict(of), shared, masked
        self.normalised, self.quantised = normalised, quantised

    def build(self, shape):
        kernel = tuple(self.of["shape"])
        self.filters = kernel[-2] * kernel[-1] if self.of["kind"] == "DepthwiseConv2D" else kernel[-1]

        def add(name, shape, start="zeros", **more):
            setattr(self, name, self.add_weight(shape=shape, initializer=start, name=name, autocast=False, **more))

        if self.shared:
            add("centroids", (self.shared,))
            add("members", kernel, dtype="int32", trainable=False)
            add("root", (self.shared,), "ones", trainable=False)  # of the number of each value's members
        else:
            add("kernel", kernel)
        if self.masked:
            add("mask", kernel, "ones", trainable=False)
        if self.of["bias"]:
            add("bias", (self.filters,))
        if self.normalised:
            add("gamma", (self.filters,), "ones")
            add("beta", (self.filters,))
            add("mean", (self.filters,), trainable=False)
            add("deviation", (self.filters,), "ones", trainable=False)

    def free_kernel(self):
        """The kernel in Keras's order, before normalisation and rounding."""
        if self.shared:
            kernel = look_up(self.centroids / self.root, ops.convert_to_tensor(self.members))
        else:
            kernel = ops.convert_to_tensor(self.kernel)
        return kernel * self.mask if self.masked else kernel

    def share(self, centroids, members, mask=None):
        """Set the values [K], the number of each weight's, and, of a masked layer, which weights are not zero."""
        if self.masked:
            assign(self, mask=mask)
        counted = np.bincount(members[mask] if self.masked else members.ravel(), minlength=self.shared)
        root = np.sqrt(np.maximum(counted, 1)).astype(np.float32)
        assign(self, centroids=centroids * root, members=members, root=root)

    def folded(self):
        """Kernel, in Keras's order, and bias [filters] with the batch normalisation in them."""
        kernel = self.free_kernel()
        bias = ops.convert_to_tensor(self.bias) if self.of["bias"] else ops.zeros((self.filters,))
        if self.normalised:
            scale = self.gamma / self.deviation
            depthwise = self.of["kind"] == "DepthwiseConv2D"
            kernel = kernel * (ops.reshape(scale, kernel.shape[-2:]) if depthwise else scale)
            bias = self.beta + (bias - self.mean) * scale
        return kernel, bias

    def call(self, x, training=False):
        kernel, bias = self.folded()
        depthwise = self.of["kind"] == "DepthwiseConv2D"
        shape = (1,) * (4 - len(kernel.shape)) + kernel.shape
        flat = ops.reshape(kernel, (*shape[:2], -1) if depthwise else shape)  # the output channels last, and in 2-D
        if self.quantised:
            flat = self._rounded(flat, training)
        kernel = ops.cast(ops.reshape(flat, shape) if depthwise else flat, self.compute_dtype)
        inner, x = x.shape[1:-1], ops.cast(x, self.compute_dtype)
        x = ops.reshape(x, (-1, *(1,) * (2 - len(inner)), *inner, x.shape[-1])) if len(inner) < 2 else x
        operation = ops.depthwise_conv if depthwise else ops.conv
        y = operation(x, kernel, **self._stride_and_padding()) + ops.cast(bias, self.compute_dtype)
        y = ops.reshape(y, (-1, *y.shape[3 - len(inner) : -1], self.filters)) if len(inner) < 2 else y
        return self.activation(y)

    def _rounded(self, kernel, training):
        bound = ops.stop_gradient(bounds(kernel))
        if training:
            return fake_quant_weights(kernel, bound)
        import tensorflow as tf  # the operation that LiteRT's converter knows, as in `FakeQuant`

        return tf.quantization.fake_quant_with_min_max_vars_per_channel(
            kernel, -bound, bound, num_bits=BITS, narrow_range=True
        )

    def _stride_and_padding(self):
        def pair(values):
            return (1,) * (2 - len(values)) + tuple(values)

        if self.of["kind"] == "Dense":
            return {"strides": 1, "padding": "valid"}
        return {
            "strides": pair(self.of["strides"]),
            "padding": self.of["padding"],
            "dilation_rate": pair(self.of["dilation_rate"]),
        }

    def get_config(self):
        own = ("of", "shared", "masked", "normalised", "quantised")
        own = {name: getattr(self, name) for name in own}
        return super().get_config() | own | {"activation": keras.activations.serialize(self.activation)}


def described(layer):
    """What `Computed(of=...)` takes for a convolution or Dense layer; None where it cannot stand for the layer."""
    kind = type(layer).__name__
    if kind not in KINDS:
        return None
    of = {"kind": kind, "shape": tuple(layer.kernel.shape), "bias": layer.use_bias}
    if kind == "Dense":
        return of
    plain = layer.data_format == "channels_last" and getattr(layer, "groups", 1) == 1 and layer.padding != "causal"
    square = kind != "DepthwiseConv2D" or len(set(layer.strides)) == 1  # TensorFlow's own limit
    return (
        of
        | {
            "strides": tuple(layer.strides),
            "padding": layer.padding,
            "dilation_rate": tuple(layer.dilation_rate),
        }
        if plain and square
        else None
    )


def assign(layer, **values):
    """Set a built layer's variables by name; those not named stay."""
    for name, value in values.items():
        getattr(layer, name).assign(np.asarray(value))
