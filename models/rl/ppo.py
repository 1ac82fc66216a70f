"""The machinery around a policy-gradient update: acting without TensorFlow, and all minibatches in one compiled call.

What is optimised, the loss, comes from a unit (day 18).  Small networks are not slow because of their arithmetic but
because of the calls around it.  Two hidden layers of 64 units act in NumPy in 15 us where a compiled call takes 265; an
update of 320 minibatches of 64 takes 110 ms in one graph, and 31 ms where XLA has fused it (two cores, day 18's loss).
"""

import keras
import numpy as np
import tensorflow as tf

ACTIVATIONS = {
    "linear": lambda x: x,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
}


def as_numpy(model):
    """A `keras.Sequential` of Dense layers (tanh, ReLU or linear) and layers with a method `as_numpy`, as it is now.

    Returns a function of NumPy arrays, [B, ...] -> [B, K].  It holds copies: ask again after an update.  Raises
    TypeError for another layer.
    """
    steps = [_layer(layer) for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]

    def forward(x):
        for step in steps:
            x = step(x)
        return x

    return forward


def _layer(layer):
    if hasattr(layer, "as_numpy"):
        return layer.as_numpy()
    activation = getattr(getattr(layer, "activation", None), "__name__", None)
    if not isinstance(layer, keras.layers.Dense) or activation not in ACTIVATIONS:
        raise TypeError(f"{layer.name} ({type(layer).__name__}) has no NumPy form")
    kernel, bias = (np.array(weight) for weight in layer.get_weights())
    act = ACTIVATIONS[activation]
    return lambda x: act(x @ kernel + bias)


def orders(rng, epochs, size, batch):
    """A new order of the `size` examples for each epoch, cut into whole minibatches: int32 [epochs * K, batch]."""
    shuffled = rng.permuted(np.tile(np.arange(size, dtype=np.int32), (epochs, 1)), axis=1)
    return shuffled[:, : size // batch * batch].reshape(-1, batch)


def updater(loss, variables, optimizer, *, target_kl=np.inf, jit_compile=False):
    """A function (data, order) -> logs that takes one gradient step a minibatch, all of them in one compiled call.

    loss: dict of tensors [batch, ...] -> (scalar, dict of scalars, which has "approx_kl").  variables: those to change.
    optimizer: a Keras one, gradient clipping included.  data: dict of arrays [B, ...]; order: int32 [K, batch], the
    rows of data that each step takes.  Once approx_kl of a minibatch exceeds 1.5 `target_kl`, that step and the rest
    are not taken (as in Stable-Baselines3).  logs: the scalars' means over the minibatches seen, and "updates", the
    number of steps taken.
    """
    optimizer.build(variables)

    def gradient_step(batch):
        with tf.GradientTape() as tape:
            value, scalars = loss(batch)
        gradients = tape.gradient(value, variables)
        go_on = scalars["approx_kl"] <= 1.5 * target_kl
        if target_kl == np.inf:
            optimizer.apply(gradients, variables)
        else:
            tf.cond(go_on, lambda: (optimizer.apply(gradients, variables), True)[1], lambda: True)
        return go_on, {"loss": value, **scalars}

    @tf.function(jit_compile=jit_compile, reduce_retracing=True)
    def run(data, order):
        def batch(i):
            return {name: tf.gather(values, order[i]) for name, values in data.items()}

        def body(i, taken, go_on, sums):
            go_on, scalars = gradient_step(batch(i))
            return i + 1, taken + tf.cast(go_on, tf.int32), go_on, {name: sums[name] + scalars[name] for name in sums}

        names = ["loss", *loss(batch(0))[1]]  # asked for the names alone: what nothing reads is cut from the graph
        start = tf.constant(0), tf.constant(0), tf.constant(True), {name: tf.zeros([]) for name in names}
        count = tf.shape(order)[0]
        seen, taken, _, sums = tf.while_loop(lambda i, taken, go_on, sums: go_on & (i < count), body, start)
        logs = {name: value / tf.cast(seen, tf.float32) for name, value in sums.items()}
        return logs | {"updates": tf.cast(taken, tf.float32)}

    def call(data, order):
        tensors = {name: tf.convert_to_tensor(values) for name, values in data.items()}
        return {name: float(value) for name, value in run(tensors, tf.convert_to_tensor(order)).items()}

    return call
