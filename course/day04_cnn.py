"""Day 04 - Convolutional networks: a convolution is a matrix product, and every choice in a CNN has a measured price.

Paper:     LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition", Proc. IEEE 86
Task:      write convolution and pooling with their backward passes; classify 32x32 photographs of ten things
Shapes:    pictures [B,H,W,C] * kernels [kh,kw,C,F] -> maps [B,H',W',F] -> ... -> mean of the last map -> scores [B,10]
Reference: CIFAR-10 validation accuracy of 70 % or more within 10 epochs (asked of students by CS231n's assignment 2)
Run:       python -m course.day04_cnn --preset cpu --seed 0
Departs:   today's networks, not LeNet-5; the grid's share one learning rate and few epochs: they compare beginnings
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops
from numpy.lib.stride_tricks import as_strided

from course import core
from models import costs
from models.cnn import figures, small
from models.numpy_net import layers as dense

REFERENCE = {"val_accuracy": (70.0, "%", "CS231n 2018, assignment 2, TensorFlow, last part: at least, on CIFAR-10")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the augmentation and the order of the batches
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 45_000  # training images, from the front of the training part
    val: int = 5_000  # the next ones: validation
    numpy_images: int = 45_000  # images that the NumPy network sees, once
    arms: tuple[str, ...] = ()  # of the grid, by name; none: all of them
    arm_images: int = 45_000  # training images of each arm
    arm_epochs: int = 30  # passes over them
    width: int = 16  # channels of the first of three stages; the second has twice, the third four times as many
    best_width: int = 64  # the same for the network that is trained for long
    epochs: int = 60  # of that one
    batch: int = 64  # images a step
    lr: float = 0.003  # of Adam, at the start; falls to 0 as a half cosine
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that it is exported to


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", train=1_000, val=200, numpy_images=640, arms=("3x3", "7x7"),
                  arm_images=320, arm_epochs=1, width=4, best_width=4, epochs=1),
    "cpu": dict(stand_in="fashion_mnist", numpy_images=10_000, arm_images=8_000, arm_epochs=5, width=12, best_width=16,
                epochs=5),
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Windows
# A convolution asks the same question at every place of a picture: what do the pixels in this small window have in
# common with the kernel $W$?  With stride $s$, dilation $d$ and the picture $x$, padded with zeros,
#
# $$y_{ijf} = b_f + \sum_{a,b,c} x_{si+da,\; sj+db,\; c} \, W_{abcf} \quad(1), \qquad
#   H' = \Bigl\lfloor \frac{H + 2p - d(k_h-1) - 1}{s} \Bigr\rfloor + 1 \quad(2)$$
#
# With every window laid out as a row, eq. 1 is a matrix product.  The windows can be gathered by index (*im2col*: each
# pixel is copied up to $k_h k_w$ times), or merely looked at: an array is memory and *strides*, the bytes from one
# index to the next, and a window's indices are other steps over the same memory.


# %%
def places(shape, size, stride, dilation):
    """How many windows fit in maps of `shape` (N,H,W,C) along H and W: eq. 2, after padding."""
    return tuple((n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(shape[1:3], size, strict=True))


def im2col(x, size, stride=1, dilation=1):
    """x [N,H,W,C] -> its windows, copied by index: [N,H',W',kh,kw,C]."""
    rows, columns = (stride * np.arange(n)[:, None] + dilation * np.arange(k)
                     for n, k in zip(places(x.shape, size, stride, dilation), size, strict=True))  # fmt: skip
    return x[:, rows[:, None, :, None], columns[None, :, None, :]]


def view(x, size, stride=1, dilation=1, writeable=False):
    """The same windows by stride tricks: nothing is copied; what is written stands in every window with that pixel."""
    n, h, w, c = x.strides
    steps = (n, stride * h, stride * w, dilation * h, dilation * w, c)
    shape = (len(x), *places(x.shape, size, stride, dilation), *size, x.shape[3])
    return as_strided(x, shape, steps, writeable=writeable)


def fold(windows, shape, stride=1, dilation=1):
    """The way back (col2im), [N,H',W',kh,kw,C] -> [N,H,W,C] = `shape`: each pixel gets the sum over its copies."""
    out, size = np.zeros(shape, windows.dtype), windows.shape[3:5]
    into = view(out, size, stride, dilation, writeable=True)
    for a, b in np.ndindex(size):
        into[:, :, :, a, b] += windows[:, :, :, a, b]  # of all windows at once: no two have the same pixel at (a, b)
    return out


# %% [markdown]
# ## Convolution, there and back
# With the windows as rows of $X$, eq. 1 is $Y = XW + b$, the affine layer of day 1, and so are its gradients:
# $\partial L/\partial W = X^\top \delta$, $\partial L/\partial X = \delta W^\top$ (3).  `fold` sums a pixel's copies.
#
# The second version needs no `fold`.  Pixel $u$ stood at place $a$ of window $i$ where $si + da = u$; so spread
# $\delta$ out with $s - 1$ zeros between, and convolve it with the kernel turned by 180 degrees (4).  This *transposed
# convolution* is also how networks make maps larger.


# %%
def im2col_forward(x, w, b, stride=1, pad=0, dilation=1):
    """x [N,H,W,C], w [kh,kw,C,F], b [F] -> maps [N,H',W',F] and cache; eq. 1 as one matrix product."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = im2col(x, w.shape[:2], stride, dilation)
    out = windows.reshape(-1, w[..., 0].size) @ w.reshape(-1, len(b)) + b
    return out.reshape(*windows.shape[:3], -1), (windows, x.shape, w, stride, pad, dilation)


def im2col_backward(d_out, cache):
    """d_out [N,H',W',F] -> dx, dw, db."""
    windows, shape, w, stride, pad, dilation = cache
    d = d_out.reshape(-1, d_out.shape[3])
    dw = (windows.reshape(len(d), -1).T @ d).reshape(w.shape)
    d_windows = (d @ w.reshape(-1, w.shape[3]).T).reshape(windows.shape)
    inside = slice(pad, -pad or None)
    return fold(d_windows, shape, stride, dilation)[:, inside, inside], dw, d.sum(axis=0)


def strided_forward(x, w, b, stride=1, pad=0, dilation=1):
    """As `im2col_forward`, contracting kh, kw and C of the view (`tensordot` lines the numbers up by itself)."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    return np.tensordot(view(x, w.shape[:2], stride, dilation), w, 3) + b, (x, w, stride, pad, dilation)


def strided_backward(d_out, cache):
    """As `im2col_backward`, with the transposed convolution of eq. 4."""
    x, w, stride, pad, dilation = cache
    (kh, kw, _, filters), (_, high, wide, _) = w.shape, d_out.shape
    dw = np.tensordot(view(x, (kh, kw), stride, dilation), d_out, ((0, 1, 2), (0, 1, 2)))
    above, left = dilation * (kh - 1), dilation * (kw - 1)  # the windows of the first pixels begin before it
    spread = np.zeros((len(x), x.shape[1] + above, x.shape[2] + left, filters), d_out.dtype)
    spread[:, above::stride, left::stride][:, :high, :wide] = d_out
    dx = np.tensordot(view(spread, (kh, kw), 1, dilation), w[::-1, ::-1], ((3, 4, 5), (0, 1, 3)))
    inside = slice(pad, -pad or None)
    return dx[:, inside, inside], dw, d_out.sum(axis=(0, 1, 2))


@keras.saving.register_keras_serializable("course.day04")
class PatchConv2D(layers.Conv2D):
    """Keras's layer with patches and one matrix product in place of its convolution, for the tape to differentiate."""

    def convolution_op(self, inputs, kernel):
        sizes, strides, rates = ((1, *pair, 1) for pair in (self.kernel_size, self.strides, self.dilation_rate))
        windows = tf.image.extract_patches(inputs, sizes, strides, rates, self.padding.upper())
        return windows @ ops.reshape(kernel, (-1, self.filters))


# %% [markdown]
# ## Pooling
# Later layers should know *that* there is an edge, less *where* exactly.  Max pooling keeps a window's strongest
# answer, average pooling the mean; a convolution with a stride learns what to keep.  Backwards, the maximum hands
# everything to the pixel that won, the mean an equal share to each.


# %%
def max_pool_forward(x, size=2):
    """x [N,H,W,C] -> the largest of each size x size window, [N,H//size,W//size,C], and cache."""
    windows = view(x, (size, size), size)
    flat = windows.reshape(*windows.shape[:3], size * size, -1)
    winner = flat.argmax(axis=3)[:, :, :, None]
    return np.take_along_axis(flat, winner, axis=3)[:, :, :, 0], (winner, x.shape, size)


def max_pool_backward(d_out, cache):
    """d_out [N,H',W',C] -> dx, which is 0 but where a maximum stood (at a tie: its first place)."""
    winner, shape, size = cache
    flat = np.zeros((*d_out.shape[:3], size * size, d_out.shape[3]), d_out.dtype)
    np.put_along_axis(flat, winner, d_out[:, :, :, None], axis=3)
    return fold(flat.reshape(*d_out.shape[:3], size, size, -1), shape, size)


def avg_pool_forward(x, size=2):
    """x [N,H,W,C] -> the mean of each size x size window, [N,H//size,W//size,C], and cache."""
    return view(x, (size, size), size).mean(axis=(3, 4)), (x.shape, size)


def avg_pool_backward(d_out, cache):
    """d_out [N,H',W',C] -> dx."""
    shape, size = cache
    share = d_out[:, :, :, None, None] / size**2
    return fold(np.broadcast_to(share, (*d_out.shape[:3], size, size, d_out.shape[3])), shape, size)


# %% [markdown]
# ## A network, and its twin
# Each layer with its way back and its parameters: two convolutions, the three ways to make a map smaller, one affine
# layer.  `models/cnn/small.py` runs the list forwards and, as on day 1, backwards, and builds the same in Keras from
# the same weights.  Its first gradients, by GradientTape, and its losses in the first steps must be ours.

# %%
STACK = (
    (partial(im2col_forward, pad=1), im2col_backward, ("W1", "b1")),
    (dense.relu_forward, dense.relu_backward, ()),
    (max_pool_forward, max_pool_backward, ()),
    (partial(im2col_forward, stride=2, pad=1), im2col_backward, ("W2", "b2")),
    (dense.relu_forward, dense.relu_backward, ()),
    (avg_pool_forward, avg_pool_backward, ()),
    (dense.affine_forward, dense.affine_backward, ("W3", "b3")),
)
OURS = {"im2col": (im2col_forward, im2col_backward), "strides": (strided_forward, strided_backward)}
POOLS = {"max pool": (max_pool_forward, max_pool_backward), "average pool": (avg_pool_forward, avg_pool_backward)}


def sides(caches):
    """On which side of its kinks the network stands: which ReLUs are on, which pixel is the largest of its window."""
    return np.concatenate([(caches[1] > 0).ravel(), caches[2][0].ravel(), (caches[4] > 0).ravel()])


# %% [markdown]
# ## What buys accuracy?
# All networks of the grid have three stages, the map halved and the channels doubled after each; each *arm* changes one
# thing of the first.  Kernels of other sizes get the width at which the network costs the same FLOPs.  *Separable*: a
# kernel for each channel alone, then a 1x1 convolution that mixes them, $k^2 C + C F$ weights in place of $k^2 C F$.
# *Residual*: each further convolution of a stage adds to its input.  `models/costs.py` counts parameters, FLOPs (2 a
# multiply-add), the activations that training keeps, the pixels that a unit of the last map sees, and the milliseconds.
# The first arm stands there thrice, from three draws of the initial weights, on the same batches: differences as small
# as theirs mean nothing, and somewhat larger ones little.  `last_epoch_train_accuracy` is a mean over the last epoch's
# batches, in training mode and, in the arms with augmentation, on moved pictures.


# %%
@dataclasses.dataclass(frozen=True)
class Design:
    """What an arm may change."""

    kernel: int = 3  # side of the kernels
    scale: float = 1.0  # of the width
    depth: int = 2  # convolutions a stage
    pool: str = "max"  # how a stage's map is halved: max, average or strided
    stem: int = 1  # stride of the first convolution
    norm: bool = False  # batch normalisation
    separable: bool = False  # depthwise-separable convolutions, but for the first
    residual: bool = False
    augment: bool = False  # mirrored, and shifted by up to an eighth
    again: int = 0  # added to the seed


BEST = Design(norm=True, residual=True, augment=True)
ARMS = {
    "3x3": Design(), "3x3 II": Design(again=1), "3x3 III": Design(again=2),
    "1x1": Design(kernel=1), "5x5": Design(kernel=5), "7x7": Design(kernel=7),
    "average": Design(pool="average"), "strided": Design(pool="strided"), "stem 2": Design(stem=2),
    "shallow": Design(depth=1), "deep": Design(depth=3), "narrow": Design(scale=0.5), "wide": Design(scale=2.0),
    "augment": Design(augment=True), "BN": Design(norm=True), "separable BN": Design(norm=True, separable=True),
    "residual BN": Design(norm=True, residual=True), "all three": BEST,
}  # fmt: skip


def build_model(design, width, shape, classes):
    """The network of a design: pixels 0..255 [B,*shape] -> logits [B,classes]."""

    def convolution(x, channels, stride=1, size=design.kernel):
        if design.separable and x.shape[-1] >= width:
            x, stride, size = layers.DepthwiseConv2D(size, stride, "same", use_bias=False)(x), 1, 1
        x = layers.Conv2D(channels, size, stride, "same", use_bias=not design.norm, kernel_initializer="he_normal")(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x) if design.norm else x)

    image = keras.Input(shape)
    x = layers.Rescaling(1 / 127.5, -1)(image)
    for stage, channels in enumerate((width, 2 * width, 4 * width)):
        x = convolution(x, channels, stride=1 if stage else design.stem)
        for _ in range(design.depth - 1):
            y = convolution(x, channels)
            x = layers.Add()([x, y]) if design.residual else y
        pools = {"max": layers.MaxPooling2D(2, padding="same"), "average": layers.AveragePooling2D(2, padding="same")}
        x = pools[design.pool](x) if design.pool in pools else convolution(x, channels, stride=2)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(classes, dtype="float32")(x))


def train(run, cfg, name, model, design, parts, images, epochs, every):
    """Adam, validated after each `every` epochs, the augmentation wrapped around the model; returns the history."""
    x, y, steps = parts.x_train[:images], parts.y_train[:images], min(images, len(parts.x_train)) // cfg.batch
    change = [layers.RandomFlip("horizontal"), layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant")]
    whole = keras.Sequential([keras.Input(x.shape[1:]), *(change if design.augment else []), model])
    adam = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(cfg.lr, steps * epochs))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole.compile(core.runtime.scaled(adam), loss, metrics=["accuracy"], jit_compile=core.runtime.jit())
    resume = run.checkpoint(whole, name)
    stream = core.data.batches((x, y), cfg.batch, seed=cfg.seed, first_epoch=resume.epoch, epochs=epochs)
    whole.fit(stream, steps_per_epoch=steps, initial_epoch=resume.epoch, epochs=epochs, verbose=0,
              validation_data=(parts.x_val, parts.y_val), validation_batch_size=500, validation_freq=every,
              callbacks=[resume, core.Progress(name)])  # fmt: skip
    return resume.history


def arm(run, cfg, name, parts, classes):
    """Build, train and measure one network of the grid: its row of the table."""
    core.runtime.seed(cfg.seed + ARMS[name].again)
    design, shape = ARMS[name], parts.x_train.shape[1:]
    width = max(1, round(cfg.width * design.scale))
    model = build_model(design, width, shape, classes)
    if design.kernel != 3:
        target = costs.flops(build_model(Design(), width, shape, classes))
        width, model = costs.match(lambda width: build_model(design, width, shape, classes), target, most=4 * width)
    history = train(run, cfg, name, model, design, parts, cfg.arm_images, cfg.arm_epochs, every=cfg.arm_epochs)
    return {"arm": name, "width": width, "val_accuracy": 100 * history["val_accuracy"][-1],
            "last_epoch_train_accuracy": 100 * history["accuracy"][-1],
            "sees": costs.receptive_field(model).size[0], **costs.count(model)}  # fmt: skip


# %% [markdown]
# ## What came out
# Preset cpu: at equal FLOPs 3x3 wins.  A 1x1 network sees 8 pixels, and 5x5 and 7x7 pay for their sight with channels.
# FLOPs are not time: separable convolutions need a fifth of them and are no faster, and 7x7 takes half as long again.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.arms) - set(ARMS):
        raise core.InputError(f"--arms: the grid has no {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    if cfg.batch > (least := min(cfg.train, cfg.arm_images, cfg.numpy_images)):
        raise core.InputError(f"--batch {cfg.batch}: only {least} training images: give a smaller one")
    with core.run("day04_cnn", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts, classes = core.data.three_way(data, cfg.train, cfg.val, len(data.x_test)), len(data.labels)
        scratch = run.once("from-scratch", lambda: small.examine(STACK, sides, OURS, POOLS, PatchConv2D, parts, classes,
                           images=cfg.numpy_images, batch=cfg.batch, seed=cfg.seed))  # fmt: skip
        grid = [run.once(f"arm-{name}", partial(arm, run, cfg, name, parts, classes)) for name in cfg.arms or ARMS]
        core.runtime.seed(cfg.seed)
        best = build_model(BEST, cfg.best_width, (shape := parts.x_train.shape[1:]), classes)
        history = train(run, cfg, "best", best, BEST, parts, cfg.train, cfg.epochs, every=1)
        right = best.predict(parts.x_test, batch_size=500, verbose=0).argmax(axis=1) == parts.y_test
        models = {row["arm"]: build_model(ARMS[row["arm"]], row["width"], shape, classes) for row in grid}
        one, many = (costs.latencies(models | {"best": best}, batch) for batch in (1, 32))
        grid = [row | {"ms": one[row["arm"]], "ms_of_32": many[row["arm"]]} for row in grid]

        run.record |= {"data": data.provenance, "history": history}
        run.record["tables"] = {"grid": grid, "layers": costs.table(best), **scratch["tables"]}
        counts = costs.count(best) | {"sees": costs.receptive_field(best).size[0], "ms": one["best"]}
        run.record["metrics"] = {"test_accuracy": 100 * right.mean(), "val_accuracy": 100 * history["val_accuracy"][-1],
                **scratch["metrics"], **{f"best_{name}": value for name, value in counts.items()}}  # fmt: skip
        figures.draw(run, best, parts.x_test, scratch, grid, history)
    core.export.image_classifier(best, "day04_cnn", data, cfg.exports)
    return run.record


if __name__ == "__main__":
    core.cli(main)
