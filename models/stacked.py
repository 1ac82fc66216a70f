"""Many small networks trained as one: statistics of training need many trainings, and one alone leaves a machine idle.

S networks of one shape are stacked along a first axis, z_s = x_s W_s + b_s with x [S,B,I], W [S,I,O]: a batched matrix
product.  The total loss is the SUM of their losses, so that each network gets the gradient of its own loss alone, and
the optimizer acts on each weight by itself: the stack trains as its networks would one by one.  They may differ in
their data, in their first weights, and in settings that are one number a network (L2, dropout).
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops


@keras.saving.register_keras_serializable("models.stacked")
class StackedDense(keras.layers.Layer):
    """`nets` dense layers side by side: [S,B,I] (or [1,B,I], the same for all) -> [S,B,units].

    The kernels [S,I,units] start as He's, times `gain`.
    """

    def __init__(self, nets, units, gain=1.0, **kwargs):
        super().__init__(**kwargs)
        self.nets, self.units, self.gain = nets, units, gain

    def build(self, shape):
        he = keras.initializers.RandomNormal(stddev=self.gain * (2 / shape[-1]) ** 0.5)
        self.kernel = self.add_weight(shape=(self.nets, shape[-1], self.units), initializer=he, name="kernel")
        self.bias = self.add_weight(shape=(self.nets, 1, self.units), initializer="zeros", name="bias")

    def call(self, x):
        return ops.matmul(x, self.kernel) + self.bias

    def get_config(self):
        return super().get_config() | {"nets": self.nets, "units": self.units, "gain": self.gain}


def squared_error(target, answer):
    """[S,B,C], [S,B,C] -> [S]: the squared distance, summed over C, mean over the batch."""
    return ops.mean(ops.sum(ops.square(answer - target), axis=-1), axis=1)


def cross_entropy(target, scores):
    """One-hot (or probabilities) [S,B,C], raw scores [S,B,C] -> [S], mean over the batch."""
    return ops.mean(ops.categorical_crossentropy(target, scores, from_logits=True), axis=1)


def trainer(model, draw, loss, lr, steps, l2=0.0):
    """`advance(count)`, which takes the next `count` of `steps` Adam steps in one graph, with no Python between them.

    `draw()` -> x [S,B,I], targets [S,B,C], in TensorFlow operations; `loss(targets, answers)` -> [S].  The learning
    rate falls linearly from `lr` to 0 over `steps`.  `l2`: weight of the sum of a network's squared kernels, a number
    or one a network [S].
    """
    adam = keras.optimizers.Adam(keras.optimizers.schedules.PolynomialDecay(lr, steps, end_learning_rate=0.0))
    adam.build(model.trainable_variables)
    kernels = [variable for variable in model.trainable_variables if variable.name == "kernel"]
    l2 = np.reshape(np.asarray(l2, np.float32), (-1, 1, 1))

    @tf.function
    def advance(count):
        for _ in tf.range(count):
            x, target = draw()
            with tf.GradientTape() as tape:
                total = ops.sum(loss(target, model(x, training=True)))
                if l2.any():
                    total += sum(ops.sum(l2 * ops.square(kernel)) for kernel in kernels)
            adam.apply(tape.gradient(total, [variable.value for variable in model.trainable_variables]))

    graph = advance.get_concrete_function(tf.TensorSpec((), tf.int32))
    return lambda count: graph(tf.constant(count))


def answers(model, x, chunk=1_000):
    """x [S,N,I], or [N,I] for all networks alike -> raw scores [S,N,C] in test mode, as NumPy."""
    x = x if x.ndim == 3 else x[None]
    return np.concatenate([np.asarray(model(x[:, i : i + chunk])) for i in range(0, x.shape[1], chunk)], axis=1)


def error(scores, labels):
    """scores [S,N,C], labels [S,N] or [N] -> each network's share of wrong answers, in per cent [S]."""
    return 100 * (scores.argmax(axis=-1) != labels).mean(axis=1)
