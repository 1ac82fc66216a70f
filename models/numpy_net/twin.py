"""The same network in Keras, with the same weights: an independent implementation to measure ours against."""

import keras
import numpy as np

from course.core import plots
from models.numpy_net import net as nets


def model(net, dtype="float32"):
    """`net` as a Keras model that computes in `dtype`, weights and running statistics included."""
    twin = keras.Sequential([keras.Input((len(net.params["W1"]),), dtype=dtype)])
    for layer in range(1, net.depth + 1):
        twin.add(keras.layers.Dense(net.params[f"b{layer}"].size, dtype=dtype))
        if layer < net.depth:
            if net.normalization == "batch":
                twin.add(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=dtype))
            elif net.normalization == "layer":
                twin.add(keras.layers.LayerNormalization(epsilon=1e-5, dtype=dtype))
            if net.activation == "leaky_relu":
                twin.add(keras.layers.LeakyReLU(negative_slope=0.01, dtype=dtype))  # Keras's own default is 0.2
            elif net.activation != "identity":
                twin.add(keras.layers.Activation(net.activation, dtype=dtype))
            if net.keep < 1:
                twin.add(keras.layers.Dropout(1 - net.keep, dtype=dtype))
    widths = [net.params[f"b{layer}"].size for layer in range(1, net.depth + 1)]
    arrays = net.params | net.running
    twin.set_weights([arrays[name] for name in nets.shapes((len(net.params["W1"]), *widths), net.normalization)])
    return twin


def gradients(net, x, y):
    """dL/dparameter, by name, of the mean softmax cross-entropy of (x, y), by tf.GradientTape in float64.

    In training mode: batch normalization uses the batch.  Raises `ValueError` for a network with dropout, of which
    Keras would draw another mask than ours.
    """
    import tensorflow as tf

    if net.keep < 1:
        raise ValueError(f"Keras draws its own dropout masks: compare gradients at keep = 1, not {net.keep}")
    twin, weights = model(net, "float64"), [tf.constant(array) for array in net.params.values()]
    with tf.GradientTape() as tape:
        tape.watch(weights)  # as constants: a mirrored strategy's variables have no one value to differentiate by
        statistics = [variable.value for variable in twin.non_trainable_variables]
        scores, _ = twin.stateless_call(weights, statistics, x, training=True)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, scores, from_logits=True))
    return dict(zip(net.params, (slope.numpy() for slope in tape.gradient(loss, weights)), strict=True))


def agreement(loss, net, x, y, reg=0.0):
    """loss(net, x, y, reg=, rng=) -> value, gradients of a lesson: {"loss": value, "library": d, "GradientTape": d}.

    d is the largest difference of a gradient from the library's (same dropout masks) and from Keras's; the latter is
    left out where there is regularisation or dropout.
    """
    value, ours = loss(net, x, y, reg=reg, rng=np.random.default_rng(0))
    _, theirs = nets.loss(net, x, y, reg=reg, rng=np.random.default_rng(0))
    found = {"loss": float(value), "library": largest_difference(ours, theirs)}
    if net.keep == 1 and not reg:
        found["GradientTape"] = largest_difference(ours, gradients(net, x, y))
    return found


class _BatchLosses(keras.callbacks.Callback):
    """Each batch's own loss: what Keras logs is the mean since the last reset."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])


def losses(net, x, y, *, batch, lr):
    """Train the twin by SGD on the examples in the order given, in x's dtype -> its cross-entropy at each step.

    Keras keeps the logged number in float32, whatever the model computes in: expect 1e-7 of rounding in it.
    """
    twin, note = model(net, x.dtype.name), _BatchLosses()
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=x.dtype.name)
    twin.compile(keras.optimizers.SGD(lr), cross_entropy, auto_scale_loss=False)
    twin.fit(x, y, batch_size=batch, shuffle=False, callbacks=[note], verbose=0)
    return np.array(note.losses)


def largest_difference(ours, theirs):
    """Largest absolute difference between two lists of arrays, or two dicts name -> array (of the names in `ours`).

    Raises `ValueError` where two shapes, or the lengths of the lists, differ.
    """
    if isinstance(ours, dict):
        ours, theirs = ours.values(), [theirs[name] for name in ours]
    pairs = list(zip(ours, theirs, strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"an array of shape {a.shape} stands beside one of {b.shape}")
    return max(float(np.abs(b - a).max()) for a, b in pairs)


def compare(step, net, x, y, *, batch, lr):
    """Train a copy of `net` by `step(net, x, y, lr) -> loss`, and its twin, on the same batches in the order given.

    Returns the two loss curves [steps], ours and Keras's; `net` stays as it is.
    """
    theirs, copy = losses(net, x, y, batch=batch, lr=lr), nets.cast(net, x.dtype)
    return np.array([step(copy, x[i : i + batch], y[i : i + batch], lr) for i in range(0, len(x), batch)]), theirs


def draw(compared):
    """Figure of `compare`'s answers (dtype name -> ours, theirs): the last pair's curves, and every pair's difference.

    Differences below Keras's own rounding of the number it logs are drawn as 1e-8.
    """
    ours, theirs = list(compared.values())[-1]
    gaps = {dtype: np.maximum(np.abs(a - b), 1e-8) for dtype, (a, b) in compared.items()}
    curves = {"loss": {"Keras": theirs, "NumPy": ours}, "difference": gaps | {"bound": np.full(len(ours), 1e-5)}}
    figure = plots.panels(curves, title="same weights, same batches", xlabel="step", yscale="log")
    figure.axes[0].lines[0].set(linewidth=5, alpha=0.4)
    difference = figure.axes[1]
    for line in difference.lines[:-1]:
        line.set(linestyle="", marker=".")
    difference.lines[-1].set(color="grey", linewidth=0.8)
    difference.set_ylim(top=10 * max(1e-5, *(gap.max() for gap in gaps.values())))  # room for the legend
    difference.legend(loc="upper center", ncols=3, columnspacing=1)
    return figure
