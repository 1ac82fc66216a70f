"""What CapsNet is measured against: a CNN of as many parameters."""

import keras
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
        core.runtime.scaled(keras.optimizers.Adam(lr)),
        "sparse_categorical_crossentropy",
        metrics=["sparse_categorical_accuracy"],
        jit_compile=core.runtime.jit(),
    )
    return model
