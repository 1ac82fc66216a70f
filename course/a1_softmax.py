"""Assignment 1 - Softmax classifier: the linear model with a loss that is never content, and so keeps learning.

Paper:     Bridle 1990, "Training stochastic model recognition algorithms as networks...", NIPS 2, 211-217 (softmax)
Task:      the classifier of a1_svm with cross-entropy in the hinge's place; settings chosen on validation
Shapes:    picture [B,32,32,3] -> pixels, their mean taken off, and a 1: x [B,3073] -> w [3073,10] -> scores [B,10]
Reference: CIFAR-10 validation 35 % (CS231n assignment 1, softmax notebook: 49,000 / 1,000 / 1,000 pictures)
Run:       python -m course.a1_softmax --preset cpu --seed 0
Departs:   1. pixels are also divided by their standard deviation, and the step size falls linearly to 0, as in a1_svm
           2. L2 is half the sum of squares, as in the rest of this workbook
"""

# %%
import dataclasses
import functools

import keras
import numpy as np
from matplotlib import pyplot as plt

from course import core
from models.numpy_net import gradcheck, linear
from models.numpy_net.losses import expected_calibration_error, log_softmax

REFERENCE = {"val_accuracy": (35, "%", "CS231n 2018, assignment 1, softmax notebook, 'over 0.35', CIFAR-10")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the first weights and the order of the examples
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # pictures to learn from
    validation: int = 1_000  # pictures by which the settings are chosen
    test: int = 1_000  # pictures for the figure at the end
    dev: int = 500  # of the training pictures: those for checks and timings
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)  # learning rates of the grid
    regs: tuple[float, ...] = (0.001, 0.03, 0.3, 3.0)  # regularisation strengths of the grid
    search_steps: int = 3_000  # steps at each point of the grid
    steps: int = 20_000  # steps of the classifier that is kept
    batch: int = 200  # examples a step


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 4_000, "validation": 500, "test": 500, "dev": 50,
              "lrs": (1e-3, 1e-2), "regs": (0.03, 0.3), "search_steps": 100, "steps": 300},
    "cpu": {"stand_in": "fashion_mnist", "search_steps": 1_500, "steps": 6_000},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## The loss
# Scores $s = x w$ become probabilities, and the loss is the surprise at the truth $y$:
#
# $$p_c = \frac{e^{s_c}}{\sum_k e^{s_k}} \quad(1), \qquad
#   L(w) = -\frac{1}{N} \sum_n \log p_{n y_n} + \frac{\lambda}{2} |w|^2 \quad(2)$$
#
# By the derivative of the logarithm of eq. 1, each class is pulled towards the truth in proportion to its error, where
# the hinge pulled with full strength or not at all:
#
# $$\frac{\partial L}{\partial w_c} = \frac{1}{N} \sum_n x_n \, (p_{nc} - [c = y_n]) + \lambda w_c \quad(3)$$
#
# **Why should the first loss be near $\log C$?** With small random weights all scores are nearly equal, so every class
# gets $1 / C$, and $-\log(1 / C) = \log 10 = 2.303$ for ten classes. Any other number at the start is a mistake.


# %%
def softmax_loss_naive(w, x, y, reg):
    """Eqs. 2 and 3 read off, in loops, with eq. 1 as it stands: it overflows.  -> loss, dL/dw [D, C]."""
    loss, d_w = 0.0, np.zeros_like(w)
    # exercise: loops over examples and classes add up the loss and its gradient; then the means, and the L2 terms
    for n in range(len(x)):
        e = np.exp(x[n] @ w)
        for c in range(w.shape[1]):
            p = e[c] / e.sum()
            d_w[:, c] += (p - (c == y[n])) * x[n]
            if c == y[n]:
                loss -= np.log(p)
    loss, d_w = loss / len(x) + 0.5 * reg * np.sum(w * w), d_w / len(x) + reg * w
    # end exercise
    return loss, d_w


# %% [markdown]
# ## Numbers that stay finite
# Eq. 1 is right and its program is not: $e^{89}$ is too large for float32, $e^{710}$ for float64, and infinity by
# infinity is no number. But eq. 1 does not change when one constant is taken off all scores, for $e^{-m}$ cancels. With
# $m = \max_k s_k$ the largest exponential is 1: no overflow, and the sum is at least 1. What may still happen is
# $p_y = 0$ by underflow, and $\log 0$; so the logarithm is taken before, not after:
#
# $$-\log p_y = \log \sum_k e^{s_k - m} - (s_y - m) \quad(4)$$


# %%
def softmax_loss(w, x, y, reg):
    """Eqs. 2 to 4 by whole matrices.  w [D, C], x [N, D], y int [N] -> loss, dL/dw [D, C]."""
    rows, scores = np.arange(len(x)), x @ w
    # exercise: shift the scores; eq. 4 and L2 for the loss; p [N, C], p - onehot, eq. 3 as one product and L2: no loop
    scores -= scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    loss = -log_p[rows, y].mean() + 0.5 * reg * np.sum(w * w)
    error = np.exp(log_p)
    error[rows, y] -= 1
    d_w = x.T @ error / len(x) + reg * w
    # end exercise
    return loss, d_w


def stability(classes=10):
    """One example whose wrong class leads by ever more, in float32: the loss, which is that lead, by both ways."""
    table, x, y = [], np.ones((1, 1), np.float32), np.array([0])
    for lead in (1, 10, 80, 100, 1_000, 10_000):
        w = np.zeros((1, classes), np.float32)
        w[0, 1] = lead
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the failure is what we came to see
            (naive, slope), (stable, _) = (loss(w, x, y, 0.0) for loss in (softmax_loss_naive, softmax_loss))
        naive = float(naive) if np.isfinite(naive) and np.isfinite(slope).all() else np.nan  # no use without a gradient
        table.append({"score of a wrong class": lead, "naive loss": naive, "stable loss": float(stable)})
    return table


# %% [markdown]
# ## Checks
# As in a1_svm: finite differences with and without regularisation (no kinks here, so nothing is left out), the naive
# loss, the library's, and TensorFlow's tape through Keras's own cross-entropy.


# %%
def check_gradients(x, y, classes, rng):
    """Finite differences of `softmax_loss` on x [N, D] float64, at 60 random weights, without and with L2 -> rows."""
    w, table = 0.02 * rng.standard_normal((x.shape[1], classes)), []  # else |w|^2 rounds too coarsely
    for reg in (0.0, 0.5):
        loss = functools.partial(softmax_loss, w, x, y, reg)
        (check,) = gradcheck.check(lambda loss=loss: loss()[0], {"w": w}, {"w": loss()[1]}, samples=60, rng=rng,
                                   step=1e-4)  # fmt: skip
        table.append({"regularisation": reg} | dataclasses.asdict(check))
    return table


def cross_entropy_in_keras(scores, y):
    """The mean cross-entropy of scores [N, C] by Keras's own loss."""
    return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, scores, from_logits=True))


# %% [markdown]
# ## The hinge and the cross-entropy
# **A new example is added whose true class already leads every other by more than the margin. What happens to the two
# losses?** The hinge asks no more of it: the sum of losses does not change, nor does any gradient. The cross-entropy is
# positive however far the truth leads, since $p_y < 1$: the sum grows, and the weights still move, if less and less. So
# an SVM minds only what is near its borders, and a softmax classifier never stops minding. `add_example` adds one, and
# looks.


# %%
def add_example(w, x, y, reach=2.0):
    """Add to all but the example that w puts best the example itself; w is scaled so that it leads by `reach`.

    Returns rows: for each loss, by how much the sum over the examples changes, and the norm of what joins the gradient.
    """
    scores = x @ w
    truth = np.eye(w.shape[1], dtype=bool)[y]
    lead = scores[truth] - np.where(truth, -np.inf, scores).max(axis=1)
    new = lead.argmax()
    w, before = w * (reach / lead[new]), np.delete(np.arange(len(x)), new)  # scaled scores change no prediction
    table = []
    for name, loss in {"hinge": linear.svm, "cross-entropy": softmax_loss}.items():
        (all_, d_all), (others, d_others) = (loss(w, x[rows], y[rows], 0.0) for rows in (np.arange(len(x)), before))
        change = len(x) * d_all - len(before) * d_others
        table.append({"loss": name, "change of the sum": float(len(x) * all_ - len(before) * others),
                      "joins the gradient": float(np.linalg.norm(change))})  # fmt: skip
    return table


def draw_two_losses():
    """Both losses and their slopes for two classes, by how far the truth leads."""
    lead = np.linspace(-3, 5, 300)
    x, y = np.ones((1, 1)), np.array([0])
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    for name, loss in {"hinge": linear.svm, "cross-entropy": softmax_loss}.items():
        values, slopes = zip(*(loss(np.array([[at, 0.0]]), x, y, 0.0) for at in lead), strict=True)
        axes[0].plot(lead, values, label=name)
        axes[1].plot(lead, [slope[0, 0] for slope in slopes], label=name)
    for axis, what in zip(axes, ("loss", "slope by the score of the truth"), strict=True):
        axis.set(xlabel="score of the truth minus the other's", title=what)
        axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.legend()
    return figure


def draw_stability(table):
    """Loss by both ways over the wrong class's lead; where the naive way has none, nothing is drawn."""
    lead = [row["score of a wrong class"] for row in table]
    series = {way: [row[f"{way} loss"] for row in table] for way in ("stable", "naive")}
    figure = core.plots.curves(series, x=lead, xlabel="score of a wrong class", ylabel="loss, float32", xscale="log",
                               yscale="log")  # fmt: skip
    figure.axes[0].lines[0].set(linewidth=5, alpha=0.4)
    figure.axes[0].lines[1].set(marker="o")
    return figure


# %% [markdown]
# ## Learning
# The loop is that of a1_svm (`linear.train`), and so are the grid and the reading of its picture; only the loss is new.
# Cross-entropy's gradients are smaller than the hinge's, whose every violated margin counts 1, so its learning rates
# are larger. And its scores mean something: among pictures of which the classifier is sure to 60 %, about 60 % should
# be right.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a1_softmax", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts = core.data.three_way(data, cfg.train, cfg.validation, cfg.test)
        classes, y, y_val = len(data.labels), parts.y_train, parts.y_val
        x, x_val, x_test = linear.prepare(parts.x_train, parts.x_val, parts.x_test, scale=True)

        rng = np.random.default_rng((cfg.seed, 1))
        x_dev, y_dev = x[: cfg.dev].astype(np.float64) / 2, y[: cfg.dev]
        losses = {"naive": softmax_loss_naive, "vectorised": softmax_loss, "numpy_net.linear": linear.softmax,
                  "tf.GradientTape": linear.by_tape(cross_entropy_in_keras)}  # fmt: skip
        losses = linear.compare(losses, x_dev, y_dev, classes, rng)
        gradients, overflow = check_gradients(x_dev, y_dev, classes, rng), stability()
        small = 1e-4 * rng.standard_normal((x.shape[1], classes)).astype(np.float32)
        initial_loss, _ = softmax_loss(small, x, y, 0.0)

        fit = functools.partial(linear.fit, softmax_loss, (x, y), (x_val, y_val), classes, batch=cfg.batch,
                                seed=(cfg.seed, 2))  # fmt: skip
        point = functools.partial(fit, steps=cfg.search_steps)
        grid = linear.search(run.once, lambda lr, reg: point(lr=lr, reg=reg)[0], cfg.lrs, cfg.regs)
        best = linear.best(grid)
        kept, w, curve = fit(lr=best["lr"], reg=best["reg"], steps=cfg.steps)
        added = add_example(w.astype(np.float64), x[: cfg.dev].astype(np.float64), y_dev)
        p_val = np.exp(log_softmax(x_val @ w))

        run.record |= {
            "data": data.provenance,
            "history": {"loss": curve[:: max(1, cfg.steps // 500)]},
            "tables": {"losses": losses, "gradient check": gradients, "large scores": overflow, "grid": grid,
                       "an example beyond the margin": added},
        }  # fmt: skip
        run.record["metrics"] = {
            "test_accuracy": linear.accuracy(w, x_test, parts.y_test), "val_accuracy": kept["validation"],
            "initial_loss": float(initial_loss), "initial_loss_expected": float(np.log(classes)),
            "train_accuracy": kept["train"], "gradient_check_worst": max(row["relative"] for row in gradients),
            "best_lr": best["lr"], "best_reg": best["reg"], "val_accuracy_in_grid": best["validation"],
            "loss_difference_naive_vectorised": losses[1]["loss difference"],
            "gradient_difference_naive_vectorised": losses[1]["gradient difference"],
            "gradient_difference_tape": losses[3]["gradient difference"],
            "speed_up_vectorised": losses[0]["seconds"] / losses[1]["seconds"],
            "naive_not_finite": sum(not np.isfinite(row["naive loss"]) for row in overflow),
            "stable_not_finite": sum(not np.isfinite(row["stable loss"]) for row in overflow),
            "hinge_change": added[0]["change of the sum"], "cross_entropy_change": added[1]["change of the sum"],
            "val_confidence": 100 * float(p_val.max(axis=1).mean()),
            "val_calibration_error": expected_calibration_error(p_val, y_val),
        }  # fmt: skip
        run.figure("search", linear.draw_search(grid))
        run.figure("two_losses", draw_two_losses())
        run.figure("large_scores", draw_stability(overflow))
        run.figure("loss", linear.draw_losses({"the classifier kept": curve}))
        templates = linear.draw_templates(w, parts.x_train.shape[1:], data.labels, title="templates (grey: 0)")
        run.figure("templates", templates)
    return run.record


if __name__ == "__main__":
    core.cli(main)
