"""What CapsNet is measured against, and with: a CNN of as many parameters, and what either of them costs."""

import time

import keras
import numpy as np
from keras import layers

from course import core


def cnn(shape, classes, width, params, lr):
    """A compiled CNN, image `shape` -> probabilities [B,classes], with `params` parameters to within 1 %.

    The baseline of Sabour et al. 2017 in small, with max-pooling added: three 5x5 convolutions, two dense layers,
    dropout.  The first dense layer is as wide as the number of parameters asks.  `InputError` where none fits.
    """

    def build(units):
        return keras.Sequential(
            [
                keras.Input(shape),
                layers.Conv2D(width, 5, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(width, 5, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(width // 2, 5, padding="same", activation="relu"),
                layers.Flatten(),
                layers.Dense(units, "relu"),
                layers.Dense(192, "relu"),
                layers.Dropout(0.5),
                layers.Dense(classes, "softmax", dtype="float32"),
            ],
            name="cnn",
        )

    one, two = (build(units).count_params() for units in (1, 2))  # linear in the units
    model = build(max(1, 1 + round((params - one) / (two - one))))
    if abs(model.count_params() / params - 1) > 0.01:
        raise core.InputError(f"no CNN of width {width} has {params:,} parameters: change --width or --capsules")
    model.compile(
        keras.optimizers.Adam(lr),
        "sparse_categorical_crossentropy",
        metrics=["sparse_categorical_accuracy"],
        jit_compile=core.runtime.jit(),
    )
    return model


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
    """A row of the cost table; `images`: 100 pictures [100,H,W,C], `history`: with the `seconds` that Clock noted."""
    from course.core import timing

    alone, batch = (
        timing.time_calls(lambda some=some: model.predict_on_batch(some), calls=20, warm_up=2)["p50_ms"]
        for some in (images[:1], images)
    )
    return {
        "model": model.name,
        "params": model.count_params(),
        "million_macs": macs(model) / 1e6,
        "ms_alone": alone,
        "ms_each_of_100": batch / len(images),
        "seconds_an_epoch": np.median(history["seconds"]),
        "training_seconds": sum(history["seconds"]),
    }
