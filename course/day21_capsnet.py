"""Day 21 - Capsule Networks: routing by agreement against a CNN of the same size.

Paper:     Sabour, Frosst, Hinton 2017, "Dynamic Routing Between Capsules", arXiv:1710.09829
Task:      classify 28x28 digits; the length of digit capsule j is the evidence for class j
Shapes:    image [B,28,28,1] -> conv [B,20,20,256] -> primary capsules [B,1152,8]
           -> votes [B,10,1152,16] -> digit capsules [B,10,16] -> lengths [B,10]
Reference: MNIST test error 0.25 +- 0.005 % (paper, Table 1: 3 routing rounds, with reconstruction)
Run:       python -m course.day21_capsnet --preset cpu --seed 0
Departs:   (1) Adam with a per-epoch decay, for the paper names no schedule; (2) the CNN has the same number of
           parameters, while the paper's baseline has four times as many; (3) the affine test set is made here
"""

# %%
import dataclasses
import time
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from matplotlib import pyplot as plt

from course import core

REFERENCE = {"test_error": (0.25, "%", "Sabour et al. 2017, Table 1, MNIST, 60,000 training images")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the order of the batches and the shifts
    data: str = "mnist"  # name of the data set (28x28, one channel, ten classes)
    limit: int = 60_000  # training images used
    tests: int = 10_000  # test images used
    epochs: int = 50  # of the CapsNet and of the CNN on single digits
    batch: int = 128  # images a step
    lr: float = 1e-3  # Adam's learning rate in the first epoch
    decay: float = 0.9  # factor on the learning rate after each epoch
    width: int = 256  # channels of the first convolution
    capsules: int = 32  # channels of primary capsules; 6 * 6 * 32 = 1152 capsules
    rounds: int = 3  # routing rounds; 1 = uniform coupling
    reconstruct: float = 0.0005  # weight of a pixel's squared reconstruction error
    ablation: tuple[int, ...] = (1, 2, 3, 5)  # routing rounds compared, with and without reconstruction
    ablation_limit: int = 60_000  # training images of each arm of that comparison
    ablation_epochs: int = 20  # epochs of each arm
    canvas_epochs: int = 50  # of both networks on digits placed anywhere on a 40x40 canvas
    multi_epochs: int = 50  # of the CapsNet on two overlapping digits


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "limit": 256, "tests": 128, "epochs": 1, "batch": 32, "width": 8,
              "capsules": 2, "ablation": (1, 3), "ablation_limit": 64, "ablation_epochs": 1, "canvas_epochs": 1,
              "multi_epochs": 1},
    "cpu": {"epochs": 6, "batch": 64, "lr": 2e-3, "decay": 0.65, "width": 32, "capsules": 8,
            "ablation_limit": 10_000, "ablation_epochs": 5, "canvas_epochs": 2, "multi_epochs": 3},
    "full": {},
}  # fmt: skip
CLASSES = 10
EPSILON = 1e-7  # inside square roots: their gradient at zero is finite

# %% [markdown]
# ## Squash
# A capsule is a vector: its direction says *how* a part looks (pose, stroke, slant), its length *whether* it is there.
# So that the length can be read as a probability, `squash` keeps the direction and maps the length into [0, 1).
# Written naively, $\frac{|s|^2}{1+|s|^2}\frac{s}{|s|}$ divides by zero for an empty capsule, and its gradient is NaN
# even where its value is repaired afterwards.


# %%
def squash(s, axis=-1):
    """s [..., D] -> float32 [..., D] of length |s|^2 / (1 + |s|^2) (paper, eq. 1), with a finite gradient at 0."""
    s = ops.cast(s, "float32")  # a square overflows 16 bits at 256
    norm2 = ops.sum(ops.square(s), axis=axis, keepdims=True)
    return s * ops.sqrt(norm2 + EPSILON) / (1 + norm2)


def lengths(capsules):
    """capsules [..., D] -> their lengths [...]: the evidence that the entity is present."""
    return ops.sqrt(ops.sum(ops.square(ops.cast(capsules, "float32")), axis=-1) + EPSILON)


# %% [markdown]
# ## Votes and routing
# Primary capsule $i$ predicts what digit capsule $j$ would look like, if the part it saw belonged to a $j$: its vote
# $\hat u_{j|i} = W_{ij} u_i$.  A digit is present where many votes agree.  Routing finds such clusters: every primary
# capsule spreads itself over the ten digits by a softmax, each digit takes the weighted mean of its votes, and votes
# that point the same way as that mean get more weight in the next round.
#
# The rounds are an inner search, not layers to be trained: gradients flow through the last weighted mean alone.


# %%
def route(votes, rounds):
    """Routing by agreement (paper, Procedure 1).

    votes [B,J,I,D] -> capsules [B,J,D], and the coupling coefficients [B,J,I] of each round, which sum to 1 over J.
    """
    fixed = ops.stop_gradient(votes)
    logits = ops.zeros_like(fixed[..., 0])
    couplings = []
    for left in reversed(range(rounds)):
        couplings.append(ops.softmax(logits, axis=1))
        capsules = squash(ops.matmul(couplings[-1][:, :, None], fixed if left else votes))  # [B,J,1,D]
        if left:
            logits += ops.matmul(fixed, ops.swapaxes(capsules, 2, 3))[..., 0]  # agreement of each vote with the mean
    return capsules[:, :, 0], couplings


@keras.saving.register_keras_serializable("course.day21")
class DigitCapsules(layers.Layer):
    """Primary capsules [B,I,P] -> digit capsules float32 [B,capsules,dim], by votes and routing."""

    def __init__(self, capsules, dim, rounds, **kwargs):
        super().__init__(**kwargs)
        self.capsules, self.dim, self.rounds = capsules, dim, rounds

    def build(self, shape):
        self.w = self.add_weight(
            shape=(*shape[1:], self.capsules * self.dim), initializer=keras.initializers.RandomNormal(stddev=0.1)
        )

    def votes(self, primary):
        """[B,I,P] -> [B,J,I,D].  The einsum runs over I first and the votes are laid out J before I, so that every step
        is a batch of matrix products: on a CPU the layer trains 2.6 to 3.5 times as fast as with "bip,ijpd->bijd"."""
        votes = ops.einsum("bip,ipk->ibk", primary, self.w)
        votes = ops.reshape(votes, (self.w.shape[0], -1, self.capsules, self.dim))
        return ops.cast(ops.transpose(votes, (1, 2, 0, 3)), "float32")  # softmax and agreement need the precision

    def call(self, primary):
        return route(self.votes(primary), self.rounds)[0]

    def get_config(self):
        return super().get_config() | {"capsules": self.capsules, "dim": self.dim, "rounds": self.rounds}


# %% [markdown]
# ## Margin loss
# Each class is judged alone, so that two digits can be present at once: a present digit must be longer than 0.9, an
# absent one shorter than 0.1.  Absent digits count half, else the nine of them shrink every capsule early on.


# %%
def present(labels):
    """labels int [B,K], the K digits in each picture -> float32 [B,10], 1 where the digit is present."""
    return ops.max(ops.one_hot(ops.cast(labels, "int32"), CLASSES, dtype="float32"), axis=1)


def margin_loss(labels, length):
    """labels [B,K], length [B,10] -> [B] (paper, eq. 4: m+ = 0.9, m- = 0.1, lambda = 0.5)."""
    there, length = present(labels), ops.cast(length, "float32")
    missed, invented = ops.square(ops.relu(0.9 - length)), ops.square(ops.relu(length - 0.1))
    return ops.sum(there * missed + 0.5 * (1 - there) * invented, axis=-1)


def squared_error(pixels, reconstruction):
    """[B,K,P], [B,K,P] -> [B]: summed, not averaged, over the pixels; the weight 0.0005 is a pixel's (paper, 4.1)."""
    return ops.sum(ops.square(ops.cast(pixels, "float32") - ops.cast(reconstruction, "float32")), axis=(1, 2))


# %% [markdown]
# ## The network
# The decoder sees one digit capsule, the others masked by zeros, and must draw the digit: a regulariser that makes the
# capsule's 16 numbers describe the picture.  Of two digits in a picture it draws each from its own capsule.  `encoder`
# is the classifier; `trainer` shares its weights and adds the decoder, which gets the true labels while training.


# %%
def build_encoder(cfg, side=28):
    """image [B,side,side,1] in 0..1 -> {"capsules": [B,10,16], "lengths": [B,10]}."""
    image = keras.Input((side, side, 1), name="image")
    x = layers.Conv2D(cfg.width, 9, activation="relu")(image)
    x = layers.Conv2D(cfg.capsules * 8, 9, strides=2, name="primary")(x)
    x = squash(layers.Reshape((-1, 8))(x))
    capsules = DigitCapsules(CLASSES, 16, cfg.rounds, name="digits")(x)
    return keras.Model(image, {"capsules": capsules, "lengths": lengths(capsules)}, name="capsnet")


def masked(capsules, labels):
    """capsules [B,10,16], labels [B,K] -> [B,K,160]: for each of K digits its own capsule, the others zero."""
    chosen = ops.one_hot(labels, CLASSES, dtype="float32")
    return ops.reshape(chosen[..., None] * capsules[:, None], (-1, labels.shape[1], CLASSES * capsules.shape[2]))


def build_decoder(side=28):
    """masked capsules [B,K,160] -> pixels float32 [B,K,side * side] (paper, figure 2)."""
    return keras.Sequential(
        [
            keras.Input((None, CLASSES * 16)),
            layers.Dense(512, "relu"),
            layers.Dense(1024, "relu"),
            layers.Dense(side * side, "sigmoid", dtype="float32"),
        ],
        name="decoder",
    )


def build_trainer(cfg, encoder, decoder, digits=1):
    """The compiled model (image, labels [B,digits]) -> lengths [B,10], pixels [B,digits,side * side]."""
    labels = keras.Input((digits,), dtype="int32", name="labels")
    found = encoder.output
    pixels = decoder(masked(found["capsules"], labels))
    trainer = keras.Model([encoder.input, labels], {"lengths": found["lengths"], "pixels": pixels})
    trainer.compile(
        keras.optimizers.Adam(cfg.lr),
        loss={"lengths": margin_loss, "pixels": squared_error},
        loss_weights={"lengths": 1.0, "pixels": cfg.reconstruct},
        metrics={"lengths": "sparse_categorical_accuracy"} if digits == 1 else None,
        jit_compile=core.runtime.jit(),
    )
    return trainer


# %% [markdown]
# ## A CNN of the same size
# A comparison means little if one side is larger.  The CNN has the layout of the paper's baseline, three 5x5
# convolutions and two dense layers, with max-pooling added, which helps it.  Its first dense layer is as wide as it
# takes to reach the encoder's number of parameters.


# %%
def build_cnn(cfg, side, params):
    """image [B,side,side,1] -> class probabilities [B,10], with `params` parameters to within 1 %."""

    def cnn(units):
        return keras.Sequential(
            [
                keras.Input((side, side, 1)),
                layers.Conv2D(cfg.width, 5, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(cfg.width, 5, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(cfg.width // 2, 5, padding="same", activation="relu"),
                layers.Flatten(),
                layers.Dense(units, "relu"),
                layers.Dense(192, "relu"),
                layers.Dropout(0.5),
                layers.Dense(CLASSES, "softmax", dtype="float32"),
            ],
            name="cnn",
        )

    one, two = (cnn(units).count_params() for units in (1, 2))  # linear in the units
    model = cnn(max(1, 1 + round((params - one) / (two - one))))
    if abs(model.count_params() / params - 1) > 0.01:
        raise core.InputError(f"no CNN of width {cfg.width} has {params:,} parameters: change --width or --capsules")
    model.compile(keras.optimizers.Adam(cfg.lr), "sparse_categorical_crossentropy",
                  metrics=["sparse_categorical_accuracy"], jit_compile=core.runtime.jit())  # fmt: skip
    return model


# %% [markdown]
# ## Three kinds of pictures from the same digits
# Single digits moved by up to two pixels (the paper's training set), digits anywhere on a 40x40 canvas, and two
# different digits on top of each other (MultiMNIST).  All are drawn afresh for every batch.


# %%
class Scene(NamedTuple):
    side: int  # of the square picture
    shift: int  # each digit is moved by up to this many pixels each way
    digits: int = 1


SINGLE, CANVAS, MULTI = Scene(28, 2), Scene(40, 6), Scene(36, 4, digits=2)


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


def fixed_scenes(images, labels, scene, chunk=500):
    """The test part of `scene` as NumPy arrays, always the same."""
    parts = [slice(i, i + chunk) for i in range(0, len(images), chunk)]
    made = [compose(images[part], labels[part], np.arange(len(images))[part], scene) for part in parts]
    return [np.concatenate(column) for column in zip(*made, strict=True)]


def affine_digits(images, strength, seed):
    """uint8 [N,28,28,1] -> float32 [N,40,40,1]: the digits under random affine maps.

    At strength 1: rotation within +-20 degrees, shear within +-0.2, each axis scaled by 0.8 to 1.2; other strengths
    stretch these ranges.  All are shifted by up to 6 pixels each way, as in training.  The draws are the same for every
    strength, so that a curve over it follows the same digits.  Made here after the manner of affNIST; not that data.
    """
    random = np.random.default_rng(seed)
    side, count = CANVAS.side, len(images)
    angle, shear, tall, wide = strength * random.uniform(-1, 1, (4, count)) * [[np.deg2rad(20)], [0.2], [0.2], [0.2]]
    shift = random.integers(-CANVAS.shift, CANVAS.shift + 1, (count, 2))
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sheared = np.array([[1 + wide, shear * (1 + tall)], [0 * tall, 1 + tall]])
    back = np.linalg.inv(np.einsum("abn,bcn->nac", turned, sheared))  # where each pixel of the result comes from
    middle = (side - 1) / 2
    offset = middle - np.einsum("nab,nb->na", back, middle + shift)
    table = np.pad(np.concatenate([back, offset[:, :, None]], axis=2).reshape(count, 6), [(0, 0), (0, 2)])
    room = (side - images.shape[1]) // 2
    padded = np.pad(images, [(0, 0), (room, room), (room, room), (0, 0)]).astype("float32") / 255
    return np.array(ops.image.affine_transform(padded, table.astype("float32"), data_format="channels_last"))


# %% [markdown]
# ## Training and measuring


# %%
class Clock(keras.callbacks.Callback):
    """Adds each epoch's seconds to its logs, and with them to the history that survives an interruption."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.began


def train(run, cfg, model, name, data, scene, epochs):
    """Fit a trainer or a CNN to the scenes made from `data` (images, labels); returns the history of all epochs."""
    images, labels = data
    resume = run.checkpoint(model, name)
    batches = core.data.batches(
        (images, labels, np.arange(len(images))), cfg.batch, seed=cfg.seed, epochs=epochs, first_epoch=resume.epoch,
        transform=lambda *batch: compose(*batch, scene),
    )  # fmt: skip
    if model.name == "cnn":
        batches = batches.map(lambda image, label, pixels: (image, label[:, 0]))
    else:
        batches = batches.map(lambda image, label, pixels: ((image, label), {"lengths": label, "pixels": pixels}))
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: cfg.lr * cfg.decay**epoch)
    model.fit(batches, steps_per_epoch=len(images) // cfg.batch, initial_epoch=resume.epoch, epochs=epochs, verbose=0,
              callbacks=[rate, Clock(), resume, core.Progress(name)])  # fmt: skip
    return resume.history


def error(model, images, labels):
    """Share of `images` whose likeliest class is wrong, in per cent."""
    found = model.predict(images, batch_size=250, verbose=0)
    scores = found["lengths"] if isinstance(found, dict) else found
    return 100 * float(np.mean(scores.argmax(-1) != labels))


def routing_trace(encoder, images, labels, rounds):
    """What routing does to `images`, a row a round: the entropy of the primary capsules' coupling (weighted by their
    lengths, as a share of log 10), and the mean lengths of the true digit's capsule and of its longest rival's."""
    digits = encoder.get_layer("digits")
    primary = keras.Model(encoder.input, digits.input).predict(images, verbose=0)
    votes, weight = digits.votes(primary), np.linalg.norm(primary, axis=-1)
    true = np.eye(CLASSES, dtype=bool)[labels]
    rows = []
    for count in range(1, rounds + 1):
        capsules, couplings = route(votes, count)
        coupling, length = np.array(couplings[-1]), np.array(lengths(capsules))
        entropy = -np.sum(coupling * np.log(coupling + EPSILON), axis=1) / np.log(CLASSES)  # [B,I]
        rows.append({"round": count, "entropy": np.average(entropy, weights=weight), "true": length[true].mean(),
                     "rival": np.where(true, 0, length).max(axis=1).mean()})  # fmt: skip
    return rows


def macs(model):
    """Multiplications (each with its addition) in one image's way through `model`: convolutions, dense, routing."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            total += np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:3])
        elif isinstance(layer, layers.Dense):
            total += np.prod(layer.kernel.shape)
        elif isinstance(layer, DigitCapsules):  # votes; then a mean in each round, an agreement in all but the last
            total += np.prod(layer.w.shape) + (2 * layer.rounds - 1) * layer.w.shape[0] * layer.w.shape[2]
    return int(total)


def milliseconds(model, images, repeats=20):
    """Median time of one call of `model` on the batch `images`, for each of them."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        model.predict_on_batch(images)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times[1:])) / len(images)  # the first call compiles


def cost(model, images, history):
    """A row of the cost table."""
    return {"model": model.name, "params": model.count_params(), "million_macs": macs(model) / 1e6,
            "ms_alone": milliseconds(model, images[:1]), "ms_in_a_batch": milliseconds(model, images[:100]),
            "seconds_an_epoch": np.median(history["seconds"]), "training_seconds": sum(history["seconds"])}  # fmt: skip


# %% [markdown]
# ## Figures that belong to this unit


# %%
def dimensions_figure(decoder, capsules, labels):
    """Each of the 16 dimensions of a digit's capsule moved by -0.25 to 0.25 in steps of 0.05 (paper, figure 4)."""
    steps = np.arange(-5, 6) * 0.05
    figure, axes = plt.subplots(1, len(labels), figsize=(4.4 * len(labels), 6.2))
    for axis, capsule, label in zip(axes, capsules, labels, strict=True):
        moved = np.tile(capsule, (16, len(steps), 1, 1))
        for dimension in range(16):
            moved[dimension, :, label, dimension] += steps
        moved = moved.reshape(-1, CLASSES, 16)
        drawn = decoder.predict(masked(moved, np.full((len(moved), 1), label)), verbose=0)
        side = round(drawn.shape[-1] ** 0.5)
        mosaic = drawn.reshape(16, -1, side, side).swapaxes(1, 2).reshape(16 * side, -1)
        axis.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1)
        axis.grid(False)
        axis.set(title=f"the capsule of a {label}", xlabel="added to the dimension", ylabel="dimension",
                 xticks=(np.arange(0, 11, 5) + 0.5) * side, xticklabels=["-0.25", "0", "+0.25"],
                 yticks=(np.arange(16) + 0.5) * side, yticklabels=range(1, 17))  # fmt: skip
    return figure


def reconstruction_figure(decoder, images, capsules, found, labels, names, columns=12):
    """Test images and what the decoder draws from the capsule that was found; in red the wrong ones."""
    wrong = np.flatnonzero(found != labels)[: columns // 3]
    shown = np.concatenate([np.flatnonzero(found == labels)[: columns - len(wrong)], wrong])
    drawn = decoder.predict(masked(capsules[shown], found[shown, None]), verbose=0)
    return core.plots.image_grid(
        np.concatenate([images[shown], drawn.reshape(images[shown].shape)]),
        [names[i] for i in labels[shown]] + [names[i] for i in found[shown]], columns=len(shown),
        row_labels=["image,\ntrue class", "drawn,\nclass found"],
        colours=["black" if right else "red" for right in found[shown] == labels[shown]] * 2,
    )  # fmt: skip


def overlap_figure(images, labels, pixels, drawn, absent, absent_drawn, columns=8):
    """Two digits in two colours: the picture, the truth, what each capsule draws, and what an absent digit's draws."""
    side = images.shape[1]
    blue, orange = np.array([0.0, 0.45, 0.85]), np.array([1.0, 0.5, 0.0])

    def coloured(pair):  # [n,2,P] -> [n,side,side,3]
        return np.clip(pair[:, 0, :, None] * blue + pair[:, 1, :, None] * orange, 0, 1).reshape(-1, side, side, 3)

    n = slice(columns)
    rows = [np.repeat(images[n], 3, axis=-1), coloured(pixels[n]), coloured(drawn[n]),
            np.repeat(absent_drawn[n, 0].reshape(-1, side, side, 1), 3, axis=-1)]  # fmt: skip
    titles = [f"{a} and {b}" for a, b in labels[n]] + [""] * 2 * columns + [f"asked for {a}" for a in absent[n, 0]]
    beside = ["picture", "its digits", "drawn from\ntheir capsules", "from an absent\ndigit's capsule"]
    return core.plots.image_grid(np.concatenate(rows), titles, columns=columns, row_labels=beside)


# %% [markdown]
# ## The experiments
# Each begins from the seed, so that one that is run again after an interruption finds the same numbers.


# %%
def single_digits(run, cfg, train_set, test_set, names):
    """CapsNet and CNN on single digits: errors, cost, reconstructions, what the dimensions mean, what routing does."""
    core.runtime.seed(cfg.seed)
    encoder, decoder = build_encoder(cfg), build_decoder()
    trainer, cnn = build_trainer(cfg, encoder, decoder), build_cnn(cfg, 28, encoder.count_params())
    history = train(run, cfg, trainer, "capsnet", train_set, SINGLE, cfg.epochs)
    history_cnn = train(run, cfg, cnn, "cnn", train_set, SINGLE, cfg.epochs)
    images, labels = test_set[0].astype("float32") / 255, test_set[1]
    found = encoder.predict(images, batch_size=250, verbose=0)
    answers = found["lengths"].argmax(-1)

    both = {"capsnet": history, "cnn": history_cnn}
    run.record["history"] = {f"{model}_{name}": past[name] for model, past in both.items() for name in past}
    run.figure("learning", core.plots.panels({
        "training error, %": {model: 100 * (1 - np.array(next(past[key] for key in past if "accuracy" in key)))
                              for model, past in both.items()},
        "loss": {"capsnet: margin loss": history["lengths_loss"], "cnn: cross-entropy": history_cnn["loss"]},
        "squared error of a drawing": {"capsnet": history["pixels_loss"]}}))  # fmt: skip
    run.figure("reconstructions", reconstruction_figure(decoder, images, found["capsules"], answers, labels, names))
    two = [np.argmax(labels == digit) for digit in (4, 5)]  # the first of each
    run.figure("dimensions", dimensions_figure(decoder, found["capsules"][two], labels[two]))
    trace = routing_trace(encoder, images[:500], labels[:500], rounds=6)
    run.figure("routing", core.plots.panels(
        {"coupling entropy / log 10": {"primary capsules": [row["entropy"] for row in trace]},
         "length of the capsule": {"of the true digit": [row["true"] for row in trace],
                                   "of its longest rival": [row["rival"] for row in trace]}},
        xlabel="routing round"))  # fmt: skip
    table = [cost(encoder, images, history), cost(cnn, images, history_cnn)]
    run.record["tables"] = {"cost": table, "routing": trace}
    encoder.save(run.folder / "encoder.keras")
    decoder.save(run.folder / "decoder.keras")
    drawn = decoder.predict(masked(found["capsules"], labels[:, None]), verbose=0)
    return {
        "test_error": 100 * float(np.mean(answers != labels)),
        "cnn_test_error": error(cnn, images, labels),
        "params": encoder.count_params(),
        "cnn_params": cnn.count_params(),
        "decoder_params": decoder.count_params(),
        "pixel_error": float(np.mean((drawn.reshape(images.shape) - images) ** 2)),
    } | {f"{row['model']}_{key}": row[key] for row in table for key in ("ms_alone", "training_seconds")}


def ablation(run, cfg, train_set, test_set):
    """Routing rounds, with and without reconstruction: the same budget and the same initial weights for each."""
    images, labels = (array[: cfg.ablation_limit] for array in train_set)

    def arm(rounds, reconstruct):
        core.runtime.seed(cfg.seed)
        setting = dataclasses.replace(cfg, rounds=rounds, reconstruct=reconstruct)
        encoder = build_encoder(setting)
        trainer = build_trainer(setting, encoder, build_decoder())
        train(run, setting, trainer, f"rounds-{rounds}-{reconstruct}", (images, labels), SINGLE, cfg.ablation_epochs)
        wrong = error(encoder, test_set[0].astype("float32") / 255, test_set[1])
        return {"arm": f"{rounds}{'' if reconstruct else ' plain'}", "test_error": wrong}

    rows = [run.once(f"ablation-{rounds}-{weight}", lambda rounds=rounds, weight=weight: arm(rounds, weight))
            for weight in (cfg.reconstruct, 0.0) for rounds in cfg.ablation]  # fmt: skip
    run.record["tables"]["ablation"] = rows
    named = {row["arm"]: row["test_error"] for row in rows}
    spread = {name: np.sqrt(value * (100 - value) / len(test_set[1])) for name, value in named.items()}
    run.figure("ablation", core.plots.bars(named, errors=spread, title="Routing rounds (plain: no reconstruction)",
                                           ylabel="test error, % (+- standard error)"))  # fmt: skip
    return {f"rounds_{name.replace(' ', '_')}_error": value for name, value in named.items()}


def robustness(run, cfg, train_set, test_set, strengths=(0.0, 0.5, 1.0, 1.5, 2.0)):
    """Trained on shifted digits alone, tested on turned, sheared and scaled ones: CapsNet against the CNN."""

    def arm(kind):
        core.runtime.seed(cfg.seed)
        encoder = build_encoder(cfg, CANVAS.side)
        cnn = build_cnn(cfg, CANVAS.side, encoder.count_params())
        trainer = build_trainer(cfg, encoder, build_decoder(CANVAS.side)) if kind == "capsnet" else cnn
        history = train(run, cfg, trainer, f"canvas-{kind}", train_set, CANVAS, cfg.canvas_epochs)
        tested = encoder if kind == "capsnet" else cnn
        wrong = [error(tested, affine_digits(test_set[0], s, cfg.seed), test_set[1]) for s in strengths]
        return {"model": kind, "params": tested.count_params(), "training_seconds": sum(history["seconds"]),
                "accuracy": [100 - value for value in wrong]}  # fmt: skip

    rows = [run.once(f"canvas-{kind}", lambda kind=kind: arm(kind)) for kind in ("capsnet", "cnn")]
    by_model = {row["model"]: row["accuracy"] for row in rows}
    run.record["tables"]["robustness"] = [
        {"strength": strength, **{model: values[i] for model, values in by_model.items()}}
        for i, strength in enumerate(strengths)
    ]
    run.figure("robustness", core.plots.curves(
        by_model, x=strengths, title="Trained on shifted digits, tested on affine ones", ylabel="accuracy, %",
        xlabel="strength (1: turned by up to 20°, sheared by 0.2, scaled by 0.8 to 1.2)"))  # fmt: skip
    return {f"{row['model']}_{name}": row["accuracy"][strengths.index(s)] for row in rows
            for name, s in (("shifted_accuracy", 0.0), ("affine_accuracy", 1.0))}  # fmt: skip


def overlaps(run, cfg, train_set, test_set):
    """Two overlapping digits: are both found, and does each capsule draw its own one?"""
    core.runtime.seed(cfg.seed)
    encoder, decoder = build_encoder(cfg, MULTI.side), build_decoder(MULTI.side)
    trainer = build_trainer(cfg, encoder, decoder, digits=2)
    train(run, cfg, trainer, "multi", train_set, MULTI, cfg.multi_epochs)
    images, labels, pixels = fixed_scenes(*test_set, MULTI)
    found = encoder.predict(images, batch_size=250, verbose=0)
    two = np.sort(np.argsort(found["lengths"])[:, -2:])
    right = two == np.sort(labels)
    drawn = decoder.predict(masked(found["capsules"], labels), verbose=0)
    absent = np.argsort(found["lengths"])[:, :1]  # the digit that is surest not to be there
    absent_drawn = decoder.predict(masked(found["capsules"][:8], absent[:8]), verbose=0)
    run.figure("overlaps", overlap_figure(images, labels, pixels, drawn, absent, absent_drawn))

    def overlap(a, b):  # intersection over union of inked pixels, a mean over digits
        a, b = a > 0.5, b > 0.5
        return float(np.mean(np.sum(a & b, -1) / np.maximum(np.sum(a | b, -1), 1)))

    return {
        "multi_error": 100 * float(np.mean(~right.all(axis=1))),  # at least one of the two is wrong
        "multi_iou": overlap(drawn, pixels),
        "multi_iou_other_digit": overlap(drawn[:, ::-1], pixels),  # what the digits' overlap alone would give
    }


def main(argv=None):
    """Run the four experiments; returns the record."""
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("day21_capsnet", options, cfg) as run:
        data = core.data.load(cfg.data, limit=cfg.limit, seed=cfg.seed)
        if data.x_train.shape[1:] != (28, 28, 1) or len(data.labels) != CLASSES:
            raise core.InputError(f"--data {cfg.data}: this unit needs ten classes of 28x28 pictures with one channel")
        if cfg.batch > min(len(data.x_train), cfg.ablation_limit):
            raise core.InputError(f"--batch {cfg.batch} is larger than the training set: give a smaller one")
        train_set = data.x_train, data.y_train
        test_set = data.x_test[: cfg.tests], data.y_test[: cfg.tests]
        run.record["data"] = data.provenance
        run.record["metrics"] |= single_digits(run, cfg, train_set, test_set, data.labels)
        run.record["metrics"] |= ablation(run, cfg, train_set, test_set)
        run.record["metrics"] |= robustness(run, cfg, train_set, test_set)
        run.record["metrics"] |= overlaps(run, cfg, train_set, test_set)
    return run.record


if __name__ == "__main__":
    core.cli(main)
