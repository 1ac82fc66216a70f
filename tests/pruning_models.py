"""For the tests of pruning: a tiny data set and networks of few weights."""

import keras
import numpy as np
from keras import layers

from compression.data import Data
from compression.training import Training
from course.core import runtime
from models.convnets import convolution

SHAPE = (8, 8, 3)
QUICK = Training(epochs=2, batch=16, lr=0.05)  # eight steps of the data below


def noise():
    """Pictures 0..255 whose class is their brightest channel."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, *SHAPE), dtype=np.uint8)
    y = x.mean(axis=(1, 2)).argmax(axis=1).astype(np.int32)
    return Data(x, y, x[:32], y[:32], x[32:], y[32:], ["r", "g", "b"], {"name": "noise"})


def dense(seed=0):
    runtime.seed(seed)
    image = keras.Input(SHAPE)
    x = layers.Dense(16, "relu", name="hidden")(layers.Flatten()(layers.Rescaling(1 / 127.5, -1)(image)))
    return keras.Model(image, layers.Dense(3, name="logits")(x), name="small")


def residual(width, dropout=0.0):
    """What `convnets.small_resnet` is made of, once each: of a training that is short, tracing takes the longest."""
    image = keras.Input(SHAPE)
    x = convolution(layers.Normalization(mean=[127.0] * 3, variance=[5000.0] * 3)(image), width)
    x = layers.MaxPooling2D()(x)
    x = layers.MaxPooling2D()(layers.Add()([x, convolution(x, width)]))
    x = layers.Dropout(dropout)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(3, name="logits")(x), name="classifier")


def randomised(model, seed=0):
    """The model with every weight drawn at random, running variances above zero: nothing is 0 or 1 by luck."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        drawn = rng.normal(0, 0.3, weight.shape)
        weight.assign(np.abs(drawn) + 0.3 if "variance" in weight.path else drawn)
    return model
