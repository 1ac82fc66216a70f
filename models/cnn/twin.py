"""Convolutions and networks of our own beside Keras's, from the same numbers."""

import functools

import keras
import numpy as np

from course.core import timing
from models.numpy_net import gradcheck
from models.numpy_net.twin import largest_difference

# kernel, stride, zeros on each side, dilation (Keras has no stride together with dilation)
SETTINGS = (
    ((1, 1), 1, 0, 1),
    ((3, 3), 1, 1, 1),
    ((3, 5), 1, 2, 1),
    ((3, 3), 2, 1, 1),
    ((5, 5), 3, 2, 1),
    ((3, 3), 1, 2, 2),
)


def name(kernel, stride, pad, dilation):
    """A setting as text: "3x5, stride 1, pad 2, dilation 1"."""
    return f"{kernel[0]}x{kernel[1]}, stride {stride}, pad {pad}, dilation {dilation}"


def example(rng, kernel):
    """float64 x [2,8,7,3], w [kh,kw,3,4], b [4]: sides that no stride divides, and no two axes alike."""
    return {"x": rng.standard_normal((2, 8, 7, 3)), "w": rng.standard_normal((*kernel, 3, 4)),
            "b": rng.standard_normal(4)}  # fmt: skip


def gradients(convolutions, pools, rng):
    """Centred differences of each (forward, backward), by name -> {name: list of `gradcheck.Check`}.

    By long steps: these layers are linear in each of their arrays, so that a step has no error of its own, and the
    longer it is, the less rounding.
    """
    found = {}
    for label, (forward, backward) in convolutions.items():
        for kernel, stride, pad, dilation in SETTINGS:
            ahead = functools.partial(forward, stride=stride, pad=pad, dilation=dilation)
            about = f"{label} {name(kernel, stride, pad, dilation)}"
            found[about] = gradcheck.check_layer(ahead, backward, example(rng, kernel), rng, step=1e-2)
    for label, (forward, backward) in pools.items():
        # far enough apart that no step of the check changes which number is the largest
        x = rng.permutation(2 * 7 * 6 * 3).reshape(2, 7, 6, 3) / 10
        found[label] = gradcheck.check_layer(forward, backward, {"x": x}, rng, step=1e-2)
    return found


def keras_convolution(x, w, b, upstream, *, stride, pad, dilation, layer=keras.layers.Conv2D):
    """What Keras's convolution makes of float64 arrays: its maps, and by GradientTape dx, dw, db.

    x [N,H,W,C], w [kh,kw,C,F], b [F]; `upstream` is dL/dmaps.  layer: `Conv2D`, or a layer that is called like it.
    """
    import tensorflow as tf

    conv = layer(len(b), w.shape[:2], strides=stride, dilation_rate=dilation, dtype="float64")
    x, w, b = map(tf.constant, (x, w, b))
    with tf.GradientTape() as tape:
        tape.watch((x, w, b))
        padded = tf.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        conv.build(padded.shape)
        out, _ = conv.stateless_call([w, b], [], padded)
    return [part.numpy() for part in (out, *tape.gradient(out, (x, w, b), upstream))]


def differences(convolutions, rng, layers=()):
    """Largest difference to `keras.layers.Conv2D`, in the maps and in the three gradients: a row a setting.

    convolutions: name -> (forward, backward); layers: further Keras layers that are called like Conv2D.
    """
    rows = []
    for kernel, stride, pad, dilation in SETTINGS:
        given, options = example(rng, kernel), {"stride": stride, "pad": pad, "dilation": dilation}
        shape = next(iter(convolutions.values()))[0](**given, **options)[0].shape
        upstream = rng.standard_normal(shape)
        expected = keras_convolution(**given, upstream=upstream, **options)
        row = {"setting": name(kernel, *options.values())}
        for label, (forward, backward) in convolutions.items():
            out, cache = forward(**given, **options)
            row[label] = largest_difference(expected, (out, *backward(upstream, cache)))
        for layer in layers:
            found = keras_convolution(**given, upstream=upstream, **options, layer=layer)
            row[layer.__name__] = largest_difference(expected, found)
        rows.append(row)
    return rows


def timings(convolutions, rng, calls=10):
    """Median milliseconds, forward and backward, of a 3x3 convolution, 32 maps 16x16x16 to 32 channels: a row a way."""
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 16, 16, 16), (3, 3, 16, 32), 32))
    upstream = rng.standard_normal((32, 16, 16, 32)).astype(np.float32)

    def both(forward, backward):
        return lambda: backward(upstream, forward(x, w, b, pad=1)[1])

    ways = {name: both(*pair) for name, pair in convolutions.items()}
    ways["Keras"] = compiled = _compiled(x, w, b, upstream)
    compiled()  # traced before the clock runs
    return [{"way": name, "ms": timing.time_calls(call, calls, 2)["p50_ms"]} for name, call in ways.items()]


def _compiled(x, w, b, upstream):
    import tensorflow as tf

    conv = keras.layers.Conv2D(len(b), w.shape[:2], padding="same", dtype="float32")
    conv.build(x.shape)
    x, w, b, upstream = map(tf.constant, (x, w, b, upstream))

    @tf.function(autograph=False)
    def both():
        with tf.GradientTape() as tape:
            tape.watch((x, w, b))
            out, _ = conv.stateless_call([w, b], [], x)
        return tape.gradient(out, (x, w, b), upstream)

    return lambda: [slope.numpy() for slope in both()]


def follow(model, weights, x, y, *, batch, lr):
    """Gradient descent on the softmax cross-entropy of `model` (logits) over batches in the order given.

    weights: where to start, arrays in the order of the model's own.  Returns the loss before each step and the first
    step's gradients.  Nothing is stored in the model, which may stand in any strategy's scope.
    """
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(weights, x, y):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            scores, _ = model.stateless_call(weights, [], x)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, scores, from_logits=True))
        slopes = tape.gradient(loss, weights)
        return loss, slopes, [weight - lr * slope for weight, slope in zip(weights, slopes, strict=True)]

    weights, losses, first = [tf.constant(weight) for weight in weights], [], None
    for i in range(0, len(x), batch):
        loss, slopes, weights = step(weights, tf.constant(x[i : i + batch]), tf.constant(y[i : i + batch]))
        losses.append(float(loss))
        first = first or [slope.numpy() for slope in slopes]
    return np.array(losses), first
