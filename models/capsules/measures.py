"""What is measured of CapsNet and of the CNN beside it."""

import time

import keras
import numpy as np
from keras import layers

from course.core import timing


def error(model, images, labels):
    """Share of `images` whose likeliest class is wrong, in per cent; `model` gives scores, or a dict with `lengths`."""
    found = model.predict(images, batch_size=250, verbose=0)
    scores = found["lengths"] if isinstance(found, dict) else found
    return 100 * float(np.mean(scores.argmax(axis=-1) != labels))


def overlap(drawn, pixels, ink=0.5):
    """Intersection over union of what is inked (above `ink`) in drawn and in pixels [N,K,P]: a mean over N and K."""
    drawn, pixels = drawn > ink, pixels > ink
    return float(np.mean(np.sum(drawn & pixels, axis=-1) / np.maximum(np.sum(drawn | pixels, axis=-1), 1)))


def routing(couplings, lengths, weight, labels):
    """What the last of some rounds of routing did: `entropy` of the coupling of a primary capsule (a mean weighted by
    `weight`, as a share of log J), and the mean lengths of the `true` digit's capsule and of its longest `rival`'s.

    couplings: [B,J,I] of each round; lengths [B,J] of the digit capsules; weight [B,I]: lengths of the primary
    capsules; labels [B].
    """
    coupling, lengths, weight = np.array(couplings[-1]), np.array(lengths), np.array(weight)
    classes = lengths.shape[1]
    logs = np.log(np.maximum(coupling, np.finfo(coupling.dtype).tiny))
    entropy = -np.sum(coupling * logs, axis=1) / np.log(classes)  # [B,I]
    true = np.eye(classes, dtype=bool)[labels]
    rival = np.where(true, 0, lengths).max(axis=1)
    return {
        "round": len(couplings),
        "entropy": np.average(entropy, weights=weight),
        "true": lengths[true].mean(),
        "rival": rival.mean(),
    }


def trace(route, encoder, images, labels, rounds):
    """What routing does to `images`: a row of `routing` for each of 1..rounds rounds of `route` (votes, rounds)."""
    digits = encoder.get_layer("digits")
    primary = keras.Model(encoder.input, digits.input).predict(images, verbose=0)
    steps = [route(digits.votes(primary), count) for count in range(1, rounds + 1)]

    def lengths(capsules):
        return np.sqrt(np.sum(np.square(np.array(capsules, np.float32)), axis=-1) + 1e-7)

    return [routing(coupled, lengths(found), lengths(primary), labels) for found, coupled in steps]


class Clock(keras.callbacks.Callback):
    """Adds each epoch's seconds to its logs, and with them to the history that survives an interruption."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.began


def macs(model):
    """Multiplications (each with its addition) in one image's way through `model`: convolutions, dense layers, and
    what a layer of ours states as its own `macs()`."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            total += np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:3])
        elif isinstance(layer, layers.Dense):
            total += np.prod(layer.kernel.shape)
        elif hasattr(layer, "macs"):
            total += layer.macs()
    return int(total)


def cost(model, images, history):
    """A row of the cost table; `images`: 100 pictures [100,H,W,C], `history`: with the `seconds` that `Clock` noted."""
    alone, batch = (
        timing.time_calls(lambda some=some: model.predict_on_batch(some), calls=20, warm_up=2)["p50_ms"]
        for some in (images[:1], images)
    )
    return {
        "model": model.name,
        "params": model.count_params(),
        "million_macs": macs(model) / 1e6,
        "ms_alone": alone,
        "ms_in_a_batch": batch / len(images),
        "seconds_an_epoch": np.median(history["seconds"]),
        "training_seconds": sum(history["seconds"]),
    }
