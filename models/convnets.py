"""Convolutional classifiers that several units train, compress or serve."""

import keras
import numpy as np
from keras import layers


def convolution(x, width, size=3, strides=1):
    """Convolution, batch normalisation, ReLU; [B,H,W,C] -> [B,H/strides,W/strides,width]."""
    x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.Activation("relu")(x)


def small_resnet(shape, classes, width, mean, variance, dropout=0.3):
    """A residual network (He et al. 2016, section 3.2) of two blocks: pixels 0..255 [B,H,W,C] -> logits [B,classes].

    `shape`: (H, W, C), sides of 8 and more; from 41 pixels the first convolution takes a stride of 2.  `mean`,
    `variance`: a number a channel, of the training pixels: normalisation is the first layer, so that whoever has the
    model has its preprocessing.  Logits are float32 under every precision policy.
    """
    image = keras.Input(shape, name="pixels")
    x = layers.Normalization(mean=mean, variance=variance)(image)
    x = convolution(x, width, *((5, 2) if shape[0] > 40 else (3, 1)))
    x = layers.MaxPooling2D()(x)
    for channels in (2 * width, 4 * width):
        x = convolution(x, channels)
        x = layers.Add()([x, convolution(x, channels)])
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(dropout)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(classes, dtype="float32", name="logits")(x), name="classifier")


def quick_resnet(shape, classes, width, mean, variance, activation="silu"):
    """A residual network made to learn in few epochs (after Page 2018, "How to train your ResNet"): pixels -> logits.

    Three blocks, each a convolution with pooling and one with a shortcut around it, of 2, 4 and 4 times `width`
    channels; then the largest answer of each channel.  `shape`: (H, W, C), sides of 8 and more; `mean`, `variance`: as
    for `small_resnet`.  `activation`: "relu" is one operation with the convolution in an int8 file, "silu" three more.
    Logits are float32 under every precision policy.
    """

    def convolved(x, channels, pooled=False):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D()(x) if pooled else x  # first: the rest is cheaper then
        # few steps, so the running statistics must follow soon
        return layers.Activation(activation)(layers.BatchNormalization(momentum=0.6, epsilon=1e-5)(x))

    image = keras.Input(shape, name="pixels")
    x = convolved(layers.Normalization(mean=mean, variance=variance)(image), width)
    for channels in (2 * width, 4 * width, 4 * width):
        x = convolved(x, channels, pooled=True)
        x = layers.Add()([x, convolved(x, channels)])
    x = layers.Dense(classes, use_bias=False, dtype="float32")(layers.GlobalMaxPooling2D()(x))
    return keras.Model(image, layers.Rescaling(1 / 8, dtype="float32", name="logits")(x), name="quick_resnet")


def scores_of_six(model, images):
    """Test-time augmentation: a model's scores [B,classes] of pictures [B,H,W,C], and the sums over six views of each.

    The views are the picture and its mirror image, as they are and moved by one pixel up and left, and down and right
    (the edge repeated).
    """
    total, alone = 0, None
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    for shift in (1, 0, 2):  # 1: not moved
        moved = padded[:, shift : shift + images.shape[1], shift : shift + images.shape[2]]
        for view in (moved, moved[:, :, ::-1]):
            scores = model.predict(view, batch_size=500, verbose=0)
            alone = scores if alone is None else alone
            total = total + scores
    return alone, total
