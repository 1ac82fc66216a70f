"""Shuffled batches whose order depends on the seed and the epoch alone."""

import numpy as np


def batches(arrays, batch, *, seed, epochs, first_epoch=0, transform=None):
    """`tf.data.Dataset` of shuffled batches, one epoch after another.

    `arrays`: a tuple (or dict, or tuple of dicts) of arrays of equal length N.  Each epoch is a fresh permutation that
    is a function of (seed, epoch), so that a run continued at `first_epoch` sees exactly the batches it would have
    seen; the last N % batch examples of a permutation wait for another epoch, so that every step has one shape.
    `transform`, in TensorFlow operations, takes a batch (a tuple's parts as arguments) and runs in parallel on the
    host.  Give `fit` `steps_per_epoch=N // batch`.
    """
    import tensorflow as tf

    count = len(tf.nest.flatten(arrays)[0])
    if count < batch:
        raise ValueError(f"a batch of {batch} is larger than the {count} examples")
    held = tf.nest.map_structure(tf.constant, arrays)  # once in memory, not once a batch

    def order(epoch):
        shuffled = tf.random.experimental.stateless_shuffle(tf.range(count), seed=tf.stack([np.int64(seed), epoch]))
        return tf.data.Dataset.from_tensor_slices(shuffled).batch(batch, drop_remainder=True)

    stream = tf.data.Dataset.range(first_epoch, epochs).flat_map(order)
    stream = stream.map(lambda rows: tf.nest.map_structure(lambda a: tf.gather(a, rows), held),
                        num_parallel_calls=tf.data.AUTOTUNE)  # fmt: skip
    if transform is not None:
        stream = stream.map(transform, num_parallel_calls=tf.data.AUTOTUNE)
    return stream.prefetch(tf.data.AUTOTUNE)
