"""Pictures made from 28x28 digits: moved, placed on a larger canvas, overlaid in pairs, bent by affine maps."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from keras import ops

from course import core


class Scene(NamedTuple):
    """What `compose` makes of digits."""

    side: int  # of the square picture
    shift: int  # each digit is moved by up to this many pixels each way
    digits: int = 1  # in one picture: 1 or 2


SINGLE = Scene(28, 2)  # the training set of Sabour et al. 2017, section 5
CANVAS = Scene(40, 6)  # a digit anywhere on the canvas of affNIST
MULTI = Scene(36, 4, digits=2)  # their MultiMNIST, section 6


def place(images, scene, seed):
    """uint8 [B,28,28,1] -> float32 [B,side,side,1] in 0..1, each moved from the middle by its own random shift."""
    room = (scene.side - images.shape[1]) // 2 + scene.shift
    padded = tf.pad(images, [[0, 0], [room, room], [room, room], [0, 0]])
    corner = tf.random.stateless_uniform([len(images), 2], seed, 0, 2 * scene.shift + 1, tf.int32)
    rows, columns = (corner[:, i : i + 1] + tf.range(scene.side) for i in (0, 1))
    rows_taken = tf.gather(padded, rows, axis=1, batch_dims=1)
    return tf.cast(tf.gather(rows_taken, columns, axis=2, batch_dims=1), tf.float32) / 255


def compose(images, labels, numbers, scene):
    """A batch of `scene`: image [B,side,side,1], labels [B,K], and each of its K digits alone [B,K,side * side].

    `numbers` [B] say which images these are.  Their order is the seed: it differs in every batch and epoch, and a run
    that was interrupted and goes on draws the very same scenes.
    """
    order = tf.reduce_sum(tf.cast(numbers, tf.int64) * tf.range(1, len(numbers) + 1, dtype=tf.int64))
    seed = tf.stack([order, np.int64(scene.side)])
    parts = [(place(images, scene, seed), labels)]
    if scene.digits == 2:  # overlay each digit with one of another class from the same batch
        differs = tf.where(labels[:, None] != labels[None], 0.0, -1e9)
        partner = tf.random.stateless_categorical(differs, 1, seed + 1)[:, 0]
        parts.append((place(tf.gather(images, partner), scene, seed + 2), tf.gather(labels, partner)))
    drawn = tf.stack([image for image, _ in parts], axis=1)
    pixels = tf.reshape(drawn, (len(images), scene.digits, scene.side**2))
    return tf.reduce_max(drawn, axis=1), tf.stack([label for _, label in parts], axis=1), pixels


def batches(data, scene, batch, seed, epochs, first_epoch, reconstruct):
    """`core.data.batches` of scenes made from `data`, images and labels: (inputs, targets) for `fit`.

    reconstruct: ((image, labels), {"lengths": labels, "pixels": pixels}); else (image, label), the first digit's.
    """
    numbered = (*data, np.arange(len(data[0])))
    stream = core.data.batches(numbered, batch, seed=seed, epochs=epochs, first_epoch=first_epoch,
                               transform=lambda *rows: compose(*rows, scene))  # fmt: skip
    if reconstruct:
        return stream.map(lambda image, labels, pixels: ((image, labels), {"lengths": labels, "pixels": pixels}))
    return stream.map(lambda image, labels, pixels: (image, labels[:, 0]))


def fixed(images, labels, scene, chunk=500):
    """`compose` of a whole test set as NumPy arrays, always the same."""
    parts = [slice(i, i + chunk) for i in range(0, len(images), chunk)]
    made = [compose(images[part], labels[part], np.arange(len(images))[part], scene) for part in parts]
    return [np.concatenate(column) for column in zip(*made, strict=True)]


def affine(images, strength, seed, scene=CANVAS):
    """uint8 [N,28,28,1] -> float32 [N,side,side,1]: the digits scaled, sheared, turned and moved.

    At strength 1: turned by up to 20 degrees either way, sheared by up to 0.2, each axis scaled by 0.8 to 1.2; another
    strength stretches these ranges.  All are moved by up to `scene.shift` pixels, as in training.  The draws are the
    same for every strength, so that a curve over it follows the same digits.  Made after the manner of affNIST; this
    is not that data set.
    """
    random = np.random.default_rng(seed)
    count = len(images)
    angle, shear, tall, wide = strength * random.uniform(-1, 1, (4, count)) * [[np.deg2rad(20)], [0.2], [0.2], [0.2]]
    shift = random.integers(-scene.shift, scene.shift + 1, (count, 2))
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sheared = np.array([[1 + wide, shear * (1 + tall)], [0 * tall, 1 + tall]])
    back = np.linalg.inv(np.einsum("abn,bcn->nac", turned, sheared))  # where each pixel of the result comes from
    middle = (scene.side - 1) / 2
    offset = middle - np.einsum("nab,nb->na", back, middle + shift)
    table = np.pad(np.concatenate([back, offset[:, :, None]], axis=2).reshape(count, 6), [(0, 0), (0, 2)])
    room = (scene.side - images.shape[1]) // 2
    padded = np.pad(images, [(0, 0), (room, room), (room, room), (0, 0)]).astype("float32") / 255
    return np.array(ops.image.affine_transform(padded, table.astype("float32"), data_format="channels_last"))
