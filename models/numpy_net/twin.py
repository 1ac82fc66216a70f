"""The same network in Keras, with the same weights: an independent implementation to measure ours against."""

import keras
import numpy as np

from course.core import plots
from models.numpy_net import net as nets


def model(net, dtype="float32"):
    """`net` as a Keras model of Dense layers that computes in `dtype`, weights included."""
    twin = keras.Sequential([keras.Input((len(net.params["W1"]),), dtype=dtype)])
    for layer in range(1, net.depth + 1):
        activation = {"identity": "linear"}.get(net.activation, net.activation) if layer < net.depth else None
        if activation == "leaky_relu":
            activation = keras.layers.LeakyReLU(negative_slope=0.01, dtype=dtype)  # Keras's own default is 0.2
        twin.add(keras.layers.Dense(net.params[f"b{layer}"].size, activation, dtype=dtype))
    twin.set_weights(list(net.params.values()))
    return twin


def gradients(net, x, y):
    """dL/dparameter, by name, of the mean softmax cross-entropy of (x, y), by tf.GradientTape in float64."""
    import tensorflow as tf

    twin, weights = model(net, "float64"), [tf.constant(array) for array in net.params.values()]
    with tf.GradientTape() as tape:
        tape.watch(weights)  # as constants: a mirrored strategy's variables have no one value to differentiate by
        scores, _ = twin.stateless_call(weights, [], x)
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, scores, from_logits=True))
    return dict(zip(net.params, (slope.numpy() for slope in tape.gradient(loss, weights)), strict=True))


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
    """Largest absolute difference between two gradients (or parameters) given as name -> array."""
    return max(float(np.abs(theirs[name] - array).max()) for name, array in ours.items())


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
