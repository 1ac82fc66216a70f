"""How fast the NumPy layers are, beside their own naive forms and beside Keras and scikit-learn.

Ratios of times of one run on one machine, each with the bound that it must keep; the exit status is 1 where one does
not.  No ratio is given of answers that differ.  Each time is the least of many, but that of a naive form: it takes
seconds, and is timed once.
"""

import dataclasses
import os
import time

import numpy as np
from threadpoolctl import threadpool_info

from course.core import InputError, bounds, cli, flags
from course.core.bounds import Ratio
from models.numpy_net import conv, knn

NAIVE_BOUND = 50  # at least: naive convolution / fast convolution
KERAS_BOUND = 3  # at most: fast convolution / Keras's
KNN_BOUND = 1.3  # at most: neighbours without a loop / scikit-learn's brute force

# what is convolved: pictures [N, H, W, C], kernels [kh, kw, C, F], stride (padding "same")
LAYERS = {
    "7x7 on colour pixels": ((16, 32, 32, 3), (7, 7, 3, 32), 1),
    "3x3 in the middle": ((16, 16, 16, 32), (3, 3, 32, 64), 1),
    "3x3, stride 2": ((16, 32, 32, 32), (3, 3, 32, 64), 2),
}


@dataclasses.dataclass
class Benchmark:
    """How long to measure."""

    rounds: int = 8  # turns of each function; its time is the least of them
    seed: int = 0  # of the numbers worked on


def least_times(functions, rounds, burst=4):
    """The least time of each function (name -> function of nothing) in milliseconds -> name: time.

    The functions take turns, so that a busy spell of the machine meets them all, and the least time is that of an
    undisturbed turn.  A turn is a burst after a pause and an untimed call: the threads that the function before it left
    waiting have gone to sleep, and the memory is its own.
    """
    best = dict.fromkeys(functions, np.inf)
    for _ in range(rounds):
        for name, function in functions.items():
            time.sleep(0.05)
            function()
            for _ in range(burst):
                began = time.perf_counter()
                function()
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def cores():
    """Number of cores that this process may use; raises `InputError` unless NumPy multiplies matrices on all of them.

    Keras does, so that with fewer (or more) the ratios would tell of the setting, not of the code.
    """
    count = len(os.sched_getaffinity(0))
    threads = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    if threads != {count}:
        known = " or ".join(map(str, sorted(threads))) or "an unknown number of"
        raise InputError(f"NumPy has {known} threads, the machine {count} cores: unset OPENBLAS_NUM_THREADS")
    return count


def keras_convolution(w, b, stride):
    """Keras's layer with kernels w and biases b, forward and backward in one graph: (x, d_out) -> out, gradients."""
    import keras
    import tensorflow as tf

    layer = keras.layers.Conv2D(len(b), w.shape[:2], strides=stride, padding="same", dtype=w.dtype.name)
    layer.build((None, None, None, w.shape[2]))
    layer.set_weights([w, b])

    @tf.function
    def both(x, d_out):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = layer(x)
        return out, tape.gradient(out, [x, *layer.trainable_variables], output_gradients=d_out)

    return both


def _agree(ours, theirs):
    """Raise unless two lists of arrays are equal up to the rounding of float32."""
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def convolutions(rounds, seed, layers=LAYERS):
    """Ratios of naive / fast and fast / Keras, forward and backward together, for every layer of `layers`."""
    import tensorflow as tf

    rng, found = np.random.default_rng(seed), []
    for name, (pictures, kernels, stride) in layers.items():
        x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in (pictures, kernels, kernels[3:]))
        d_out = rng.standard_normal(conv.conv_forward(x, w, b, stride, "same")[0].shape).astype(np.float32)
        both, x_there, d_there = keras_convolution(w, b, stride), tf.constant(x), tf.constant(d_out)

        def naive(x=x, w=w, b=b, d_out=d_out, stride=stride):
            out, cache = conv.conv_naive_forward(x, w, b, stride, "same")
            return out, *conv.conv_naive_backward(d_out, cache)

        def fast(x=x, w=w, b=b, d_out=d_out, stride=stride):
            out, cache = conv.conv_forward(x, w, b, stride, "same")
            return out, *conv.conv_backward(d_out, cache)

        def keras(both=both, x=x_there, d_out=d_there):
            out, gradients = both(x, d_out)
            return [array.numpy() for array in (out, *gradients)]  # waits for them

        began = time.perf_counter()
        by_definition = naive()
        naive_time = 1e3 * (time.perf_counter() - began)  # once: seconds, not to be disturbed by much
        ours = fast()
        _agree(by_definition, ours)
        _agree(keras(), ours)
        times = least_times({"fast": fast, "Keras": keras}, rounds)
        found.append(Ratio(name, "naive / fast", naive_time, times["fast"], NAIVE_BOUND, True))
        found.append(Ratio(name, "fast / Keras", times["fast"], times["Keras"], KERAS_BOUND, False))
    return found


def neighbours(rounds, seed, examples=5_000, queries=500, features=3_072, k=5):
    """Ratios of `knn.nearest` to scikit-learn's brute-force search on the same pixels, in float32 and in float64.

    scikit-learn multiplies in float64 whatever it is given: only the second compares like with like.
    """
    from sklearn.neighbors import NearestNeighbors

    rng, found = np.random.default_rng(seed), []
    pixels = [rng.uniform(0, 255, (count, features)) for count in (examples, queries)]
    for dtype in ("float32", "float64"):
        train, test = (rows.astype(dtype) for rows in pixels)
        brute = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train)

        def ours(test=test, train=train):
            return knn.nearest(test, train, k)

        def theirs(test=test, brute=brute):
            return brute.kneighbors(test)

        _agree(ours()[:1], theirs()[:1])
        times = least_times({"ours": ours, "theirs": theirs}, rounds, burst=2)
        what = f"{k} nearest of {examples:,} x {features:,}, {dtype}"
        found.append(Ratio(what, "no loop / scikit-learn", times["ours"], times["theirs"], KNN_BOUND, False))
    return found


def main(argv):
    options = flags.read(Benchmark(), argv, prog="python -m models.numpy_net.benchmark", description=__doc__)
    count = cores()
    found = convolutions(options.rounds, options.seed) + neighbours(options.rounds, options.seed)
    bounds.show(found)
    print(f"convolutions: forward and backward, float32.  NumPy's threads and cores: {count}.")
    print("The least time of each, in turns of one run; the naive form once.")
    bounds.conclude(found)


if __name__ == "__main__":
    cli(main)
