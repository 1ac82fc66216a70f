"""Convolutional classifiers that several units train, compress or serve."""

import keras
from keras import layers


def convolution(x, width, size=3, strides=1):
    """Convolution, batch normalisation, ReLU; [B,H,W,C] -> [B,H/strides,W/strides,width]."""
    x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    return layers.Activation("relu")(x)


def small_resnet(shape, classes, width, mean, variance, dropout=0.3):
    """A residual network (He et al. 2016, section 3.2) of two blocks: pixels 0..255 [B,H,W,C] -> logits [B,classes].

    `shape`: (H, W, C), sides of 16 and more; from 41 pixels the first convolution takes a stride of 2.  `mean`,
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
