"""A linear classifier, scores = x w, with its bias as one more row of w: losses, training, search, pictures.

x [N, D] holds a column of ones (`prepare` puts it last), w [D, C] a column for each class.  A loss here is a function
`loss(w, x, y, reg) -> (value, dL/dw)`: `svm`, `softmax`, or a lesson's own.
"""

import itertools
import time

import numpy as np
from matplotlib import pyplot as plt

from course.core import InputError, plots
from models.numpy_net import losses


def prepare(train, *others, scale=False):
    """Arrays [N, ...] of the training part and of others -> float32 [N, D + 1], one for each.

    The training part's mean is taken off, with `scale` each column is divided by its standard deviation in the training
    part (a column that never changes is left at 0), and a column of ones stands last.
    """
    flat = [np.reshape(array, (len(array), -1)).astype(np.float32) for array in (train, *others)]
    mean = flat[0].mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = flat[0].std(axis=0, dtype=np.float64).astype(np.float32) if scale else np.ones_like(mean)
    spread[spread == 0] = 1
    return [np.column_stack([(rows - mean) / spread, np.ones(len(rows), np.float32)]) for rows in flat]


def _regularised(score_loss, w, x, y, reg):
    value, d_scores = score_loss(x @ w, y)
    return value + 0.5 * reg * (w * w).sum(), x.T @ d_scores + reg * w


def svm(w, x, y, reg=0.0):
    """Mean structured hinge loss (margin 1) + reg/2 |w|^2, and its gradient [D, C]."""
    return _regularised(losses.svm, w, x, y, reg)


def softmax(w, x, y, reg=0.0):
    """Mean softmax cross-entropy + reg/2 |w|^2, and its gradient [D, C]."""
    return _regularised(losses.softmax_cross_entropy, w, x, y, reg)


def train(loss, x, y, classes, *, lr, reg, steps, batch=200, rng, weight_scale=1e-3):
    """Stochastic gradient descent on loss(w, x, y, reg) -> w [D, classes] in x's dtype, the loss at each step [steps].

    Each step draws its `batch` rows with replacement.  The learning rate falls linearly from `lr` towards 0, so that
    the last weights do not depend on the last few batches.  Raises `InputError` where the loss stops being finite.
    """
    w = (weight_scale * rng.standard_normal((x.shape[1], classes))).astype(x.dtype)
    history = np.empty(steps)
    for step in range(steps):
        rows = rng.integers(0, len(x), batch)
        history[step], d_w = loss(w, x[rows], y[rows], reg)
        if not np.isfinite(history[step]):
            raise InputError(f"the loss is {history[step]} at step {step + 1}: lower the learning rate {lr:g}")
        w -= x.dtype.type(lr * (1 - step / steps)) * d_w
    return w, history


def predict(w, x):
    """The class of the largest score (the first of equals), int [N]."""
    return (x @ w).argmax(axis=1)


def accuracy(w, x, y):
    """Per cent of the rows whose predicted class is y."""
    return 100 * float((predict(w, x) == y).mean())


def fit(loss, learn, held_out, classes, *, lr, reg, steps, batch, seed, train=train):
    """`train` (or a lesson's own) on learn = (x, y), measured there and on held_out = (x, y), and a line printed.

    Returns {"train": per cent right, "validation": per cent right}, w [D, classes], the loss at each step [steps].
    """
    rng = np.random.default_rng(seed)
    w, history = train(loss, *learn, classes, lr=lr, reg=reg, steps=steps, batch=batch, rng=rng)
    found = {"train": accuracy(w, *learn), "validation": accuracy(w, *held_out)}
    shown = ", ".join(f"{part} {value:.1f} %" for part, value in found.items())
    print(f"lr {lr:g}, reg {reg:g}, {steps:,} steps: {shown}", flush=True)
    return found, w, history


def search(once, point, learning_rates, regularisations, stage=""):
    """point(lr, reg) -> {"train": per cent, "validation": per cent} at each point of the grid -> rows of a table.

    once(name, function) -> function()'s answer, or the one that an interrupted run left: a run's `once`.
    stage: stands before each point's name; a run that searches several times gives each time another.
    """
    rows, before = [], f"{stage}-" if stage else ""
    for lr, reg in itertools.product(learning_rates, regularisations):
        answer = once(f"{before}lr-{lr:g}-reg-{reg:g}", lambda lr=lr, reg=reg: point(lr, reg))
        rows.append({"lr": lr, "reg": reg} | answer)
    return rows


def best(rows):
    """The row with the highest validation accuracy; of equals the first."""
    return max(rows, key=lambda row: row["validation"])


def compare(losses, x, y, classes, rng, reg=0.1):
    """losses: name -> loss(w, x, y, reg), at random w -> rows of a table: seconds, and differences from the first."""
    w, table, expected = 0.1 * rng.standard_normal((x.shape[1], classes)), [], None
    for name, loss in losses.items():
        began = time.perf_counter()
        value, d_w = loss(w, x, y, reg)
        seconds = time.perf_counter() - began
        expected = expected or (value, d_w)
        table.append({"loss and gradient": name, "seconds": seconds, "loss difference": float(abs(value - expected[0])),
                      "gradient difference": float(np.linalg.norm(d_w - expected[1]))})  # fmt: skip
    return table


def by_tape(score_loss):
    """score_loss(scores, y) -> mean loss, in TensorFlow -> loss(w, x, y, reg) like the others, by tf.GradientTape."""

    def loss(w, x, y, reg):
        import tensorflow as tf

        weights = tf.constant(w)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            value = score_loss(tf.constant(x) @ weights, y) + 0.5 * reg * tf.reduce_sum(weights**2)
        return float(value), tape.gradient(value, weights).numpy()

    return loss


def draw_losses(curves):
    """Figure: `curves`, name -> the loss at each step of a training, in means of 25 steps, a panel each."""
    means = {name: {"loss": curve[: len(curve) // 25 * 25].reshape(-1, 25).mean(axis=1)}
             for name, curve in curves.items()}  # fmt: skip
    return plots.panels(means, xlabel="25 steps", ylabel="loss")


def draw_search(rows):
    """Figure: `search`'s rows as points in the plane of learning rate and regularisation, colour the accuracy."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, part in zip(axes, ("train", "validation"), strict=True):
        x, y, c = ([row[key] for row in rows] for key in ("lr", "reg", part))
        drawn = axis.scatter(x, y, c=c, s=560, cmap="viridis", edgecolors="black")
        middle = (min(c) + max(c)) / 2
        for row in rows:
            axis.annotate(f"{row[part]:.1f}", (row["lr"], row["reg"]), ha="center", va="center", fontsize=7,
                          color="white" if row[part] < middle else "black")  # fmt: skip
        axis.set(title=f"{part} accuracy, %", xlabel="learning rate", xscale="log", yscale="log")
        axis.margins(0.18)
        figure.colorbar(drawn, ax=axis)
    axes[0].set_ylabel("regularisation strength")
    return figure


def draw_templates(w, shape, labels, *, title=""):
    """Figure: each class's weights (without the bias, the last row) as a picture of `shape` (H, W, C); grey is 0."""
    templates = w[:-1].T.reshape(-1, *shape)
    scaled = 0.5 + templates / (2 * np.abs(templates).max(axis=(1, 2, 3), keepdims=True))
    return plots.image_grid(scaled, labels, columns=5, cell=1.4, title=title)
