"""The residual networks that He et al. made for CIFAR, with the normalisation that several devices call for."""

import itertools

import keras
from keras import layers, ops

from course.core import InputError

NORMS = ("batch", "sync", "group")
GROUPS = 8  # of channels; Wu and He 2018 take 32, of networks at least four times as wide


def cifar_resnet(shape, classes, mean, variance, depth=20, width=16, norm="batch"):
    """A residual network (He et al. 2016, section 4.2): pixels 0..255 [B,H,W,C] -> logits [B,classes].

    One 3x3 convolution, then three stages of n blocks of two, with `width`, 2 and 4 times as many channels, the map
    halved between stages; mean over the map; one affine layer: `depth` = 6n + 2 layers with weights.  Shortcuts have no
    parameters (the paper's option A): where the map shrinks they take every second pixel and add channels of zeros.

    `shape`: (H, W, C); `mean`, `variance`: a number a channel, of the training pixels, for the first layer.
    `norm`: "batch"; "sync": its statistics are of all replicas' pictures; "group": of each picture alone, `width` a
    multiple of 8.  The last layer of block i is named f"block{i}", convolution k f"conv{k}" and its
    normalisation f"norm{k}".  Logits are float32 under every policy but float64.
    Raises `InputError` for a depth, norm or width that does not fit.
    """
    if norm not in NORMS:
        raise InputError(f"--norm {norm} is not known: choose one of {', '.join(NORMS)}")
    if depth < 8 or (depth - 2) % 6:
        raise InputError(f"a depth of {depth} is not 6n + 2: choose 8, 14, 20, 32, 44, 56, 110, ...")
    if norm == "group" and width % GROUPS:
        raise InputError(f"group normalisation needs a width divisible by {GROUPS}, not {width}")

    number = itertools.count(1)

    def convolved(x, channels, strides=1):
        k = next(number)
        x = layers.Conv2D(channels, 3, strides, "same", use_bias=False, kernel_initializer="he_normal",
                          name=f"conv{k}")(x)  # fmt: skip
        if norm == "group":
            return layers.GroupNormalization(GROUPS, epsilon=1e-5, name=f"norm{k}")(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, synchronized=norm == "sync", name=f"norm{k}")(x)

    image = keras.Input(shape, name="pixels")
    x = layers.Normalization(mean=mean, variance=variance)(image)
    x = layers.ReLU()(convolved(x, width))
    for stage, channels in enumerate((width, 2 * width, 4 * width)):
        for block in range(blocks := (depth - 2) // 6):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides == 2:
                shortcut = ops.pad(x[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [0, channels // 2]])
            y = layers.ReLU()(convolved(x, channels, strides))
            x = layers.Add()([shortcut, convolved(y, channels)])
            x = layers.ReLU(name=f"block{blocks * stage + block + 1}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    dtype = "float64" if keras.config.dtype_policy().name == "float64" else "float32"
    return keras.Model(image, layers.Dense(classes, dtype=dtype, name="logits")(x), name=f"resnet{depth}")
