"""Assignment 1 - Multiclass SVM: ten templates, learned from a hinge, name nearly 4 pictures in 10 rightly.

Paper:     Weston, Watkins 1999, "Support Vector Machines for Multi-Class Pattern Recognition", ESANN, 219-224 (eq. 2)
Task:      classify small pictures by one linear function a class; settings chosen on validation, one look at the test
Shapes:    picture [B,32,32,3] -> pixels, their mean taken off, and a 1: x [B,3073] -> w [3073,10] -> scores [B,10]
Reference: CIFAR-10 validation 40 % (CS231n assignment 1, svm notebook: 49,000 / 1,000 / 1,000 pictures, 500 to develop)
Run:       python -m course.a1_svm --preset cpu --seed 0
Departs:   1. pixels are also divided by their standard deviation; the assignment's raw ones are an arm of their own
           2. the step size falls linearly to 0, over more steps; the assignment's is constant
           3. L2 is half the sum of squares, as in the rest of this workbook
"""

# %%
import dataclasses
import functools

import numpy as np
import tensorflow as tf
from matplotlib import pyplot as plt

from course import core
from models.numpy_net import gradcheck, linear

REFERENCE = {"val_accuracy": (40, "%", "CS231n 2018, assignment 1, svm notebook, 'about 0.4', CIFAR-10")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the first weights and the order of the examples
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # pictures to learn from
    validation: int = 1_000  # pictures by which the settings are chosen
    test: int = 1_000  # pictures for the figure at the end
    dev: int = 500  # of the training pictures: those for checks and timings
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # learning rates of the grid
    regs: tuple[float, ...] = (0.03, 0.3, 3.0, 30.0)  # regularisation strengths of the grid
    search_steps: int = 3_000  # steps at each point of the grid
    steps: int = 20_000  # steps of the classifier that is kept
    batch: int = 200  # examples a step


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 4_000, "validation": 500, "test": 500, "dev": 50,
              "lrs": (1e-4, 1e-3), "regs": (0.3, 3.0), "search_steps": 100, "steps": 300},
    "cpu": {"stand_in": "fashion_mnist", "search_steps": 1_500, "steps": 6_000},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Scores
# A linear classifier gives class $c$ the score $s_c = \sum_d x_d w_{dc} + b_c$. With a 1 appended to every $x$, the
# bias is one more row of $w$, and there is a single matrix to learn: that is the bias trick. Before it, the mean image
# of the *training* pictures is taken off every picture, in all parts alike: centred inputs have both signs, so that one
# step may raise some weights of a class and lower others. `linear.prepare` does both.
#
# ## The structured hinge
# The true class $y$ shall lead each other class by a margin of 1. Whatever is missing is the loss:
#
# $$L(w) = \frac{1}{N} \sum_n \sum_{c \ne y_n} \max(0,\; s_{nc} - s_{n y_n} + 1) + \frac{\lambda}{2} |w|^2
#   \quad(1)$$
#
# A classifier that knows nothing has equal scores, and loses $C - 1$: the first sanity check. The margin need not be
# tuned: scores grow with $w$, and $\lambda$ settles how far they may. Each violated margin, and only those, pulls:
# $x_n$ joins the gradient of the class that came too near, and leaves that of the truth.
#
# $$\frac{\partial L}{\partial w_c} = \frac{1}{N} \sum_n x_n \cdot \begin{cases}
#   [\,s_{nc} - s_{n y_n} + 1 > 0\,] & c \ne y_n \\
#   -\sum_{k \ne y_n} [\,s_{nk} - s_{n y_n} + 1 > 0\,] & c = y_n \end{cases} \; + \lambda w_c \quad(2)$$


# %%
def svm_loss_naive(w, x, y, reg):
    """Eqs. 1 and 2 read off, in loops.  w [D, C], x [N, D], y int [N] -> loss, dL/dw [D, C]."""
    loss, d_w = 0.0, np.zeros_like(w)
    # exercise: loops over examples and classes sum up loss and gradient; then the means, and the terms with lambda
    for n in range(len(x)):
        scores = x[n] @ w
        for c in range(w.shape[1]):
            margin = scores[c] - scores[y[n]] + 1
            if c != y[n] and margin > 0:
                loss += margin
                d_w[:, c] += x[n]
                d_w[:, y[n]] -= x[n]
    loss, d_w = loss / len(x) + 0.5 * reg * np.sum(w * w), d_w / len(x) + reg * w
    # end exercise
    return loss, d_w


# %% [markdown]
# Without loops: put the brackets of eq. 2 into a matrix $M$ $[N, C]$, 1 where a margin is violated, and minus the row's
# count of them at the truth. Then the gradient of all the weights is the one product $x^\top M / N$.


# %%
def svm_loss(w, x, y, reg):
    """Eqs. 1 and 2 by whole matrices.  w [D, C], x [N, D], y int [N] -> loss, dL/dw [D, C]."""
    rows = np.arange(len(x))
    # exercise: margins [N, C] with 0 at the truth, the loss; the matrix M, from it the gradient; both L2 terms: no loop
    scores = x @ w
    margins = np.maximum(scores - scores[rows, y][:, None] + 1, 0)
    margins[rows, y] = 0
    loss = margins.sum() / len(x) + 0.5 * reg * np.sum(w * w)
    violated = (margins > 0).astype(x.dtype)
    violated[rows, y] = -violated.sum(axis=1)
    d_w = x.T @ violated / len(x) + reg * w
    # end exercise
    return loss, d_w


# %% [markdown]
# ## The gradient check, and the kink
# $\max(0, m)$ has no derivative at $m = 0$. Eq. 2 takes 0 there, one of the subgradients; it does not matter, for an
# exact 0 hardly occurs. What does occur is a finite difference whose ends lie on both sides of a kink. Take $f(w) =
# \max(0, w)$ at $w = h/4$. The slope is 1, but
#
# $$\frac{f(w + h) - f(w - h)}{2h} = \frac{5h/4 - 0}{2h} = 0.625 \quad(3)$$
#
# however small $h$ is. So a gradient check of the hinge may fail here and there although nothing is wrong. In the table
# of steps, the longer the step, the more margins change sign on the way from $w - h$ to $w + h$, and the coordinates
# that disagree are those. The others agree at any $h$, and best at a large one: where no kink is crossed, eq. 1 is a
# polynomial of degree 2, for which a centred difference is exact but for rounding.


# %%
def kink(h):
    """Eq. 3, measured -> centred difference of max(0, w) at w = h / 4, where the slope is 1."""
    w = np.array([h / 4])
    (slope,) = gradcheck.numerical_gradient(lambda: float(np.maximum(0, w).sum()), w, step=h)
    return float(slope)


def check_gradients(x, y, classes, rng):
    """Finite differences of `svm_loss` on x [N, D] float64, at 60 random weights -> (rows of regs, rows of steps)."""
    w = 0.1 * rng.standard_normal((x.shape[1], classes))
    truth = np.eye(classes, dtype=bool)[y]

    def sides():  # which margins are violated: a difference across a change is no derivative
        scores = x @ w
        return (scores - scores[truth][:, None] + 1 > 0) & ~truth

    def compare(reg, step, pieces):
        loss = functools.partial(svm_loss, w, x, y, reg)
        sample = np.random.default_rng(7)  # the same coordinates every time
        (check,) = gradcheck.check(lambda: loss()[0], {"w": w}, {"w": loss()[1]}, samples=60, rng=sample, step=step,
                                   pieces=pieces)  # fmt: skip
        return check

    regs = [{"regularisation": reg} | dataclasses.asdict(compare(reg, 1e-4, sides)) for reg in (0.0, 0.5)]
    steps = [{"h": h, "kinks crossed": compare(0.0, h, sides).skipped, "of": 60,
              "worst error, all": compare(0.0, h, None).relative,
              "worst error, uncrossed": compare(0.0, h, sides).relative} for h in (1e-6, 1e-4, 1e-2)]  # fmt: skip
    return regs, steps


def hinge_in_tensorflow(scores, y):
    """Eq. 1 without its last term, in TensorFlow; scores [N, C], y int [N]."""
    truth = tf.one_hot(y, scores.shape[1], dtype=scores.dtype)
    margins = tf.nn.relu(scores - tf.reduce_sum(scores * truth, axis=1, keepdims=True) + 1)
    return tf.reduce_sum(margins * (1 - truth)) / len(y)


# %% [markdown]
# ## Learning
# Each step draws a batch *with replacement*, which for 200 of 49,000 is nearly the same as without, and needs no order
# to be kept. The batch's gradient is noisy; as the step size falls to 0, so does the wobble of the weights.


# %%
def train(loss, x, y, classes, *, lr, reg, steps, batch, rng):
    """SGD on loss(w, x, y, reg) from small random weights -> w [D, classes], the loss at each step [steps]."""
    w = (1e-3 * rng.standard_normal((x.shape[1], classes))).astype(x.dtype)
    history = np.empty(steps)
    for step in range(steps):
        # exercise: draw `batch` rows with replacement; note their loss; step by lr * (1 - step / steps) downhill
        rows = rng.integers(0, len(x), batch)
        history[step], d_w = loss(w, x[rows], y[rows], reg)
        w -= x.dtype.type(lr * (1 - step / steps)) * d_w
        # end exercise
    return w, history


def predict(w, x):
    """w [D, C], x [N, D] -> the class with the largest score, int [N]."""
    # exercise: one line
    return np.argmax(x @ w, axis=1)
    # end exercise


def accuracy(w, x, y):
    """Per cent of x [N, D] whose predicted class is y [N]."""
    return 100 * float((predict(w, x) == y).mean())


# %% [markdown]
# ## Settings
# Learning rate and regularisation matter together, and by factors rather than by differences, so the grid is one of
# logarithms. Each point is a short training; accuracy on the *validation* pictures chooses, and the test pictures wait.
# With a rate that is too small the weights have not arrived after so few steps; a rate that is too large leaves the
# valley before the step has shrunk. With $\lambda$ too large all scores shrink and the classes blur; too small, and the
# training accuracy alone gains.
#
# **What do the templates look like, and why?** A score is an inner product, largest for the picture that has the
# template's own pattern of signs: $w_c$ is all that is kept of class $c$, a compromise between all its pictures. Horses
# that look left and horses that look right become one horse with two heads; ships and planes are mostly blue. And since
# only violated margins pull, a template is also the negative of what it is mistaken for.


# %%
def draw_kink(h=1.0):
    """The hinge, its slope, and the chord that a centred difference takes across the kink."""
    figure, axes = plt.subplots(figsize=(4.6, 3))
    w = np.linspace(-1.5 * h, 1.75 * h, 400)
    axes.plot(w, np.maximum(0, w), label=r"$\max(0, w)$")
    ends = np.array([h / 4 - h, h / 4 + h])
    axes.plot(ends, np.maximum(0, ends), "o--", label=f"chord, slope {kink(h):g}")
    axes.plot(h / 4, h / 4, "ko", label="w = h/4, slope 1")
    axes.set(xlabel="w / h", ylabel="loss / h", title="a finite difference across the kink")
    axes.legend()
    return figure


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a1_svm", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts = core.data.three_way(data, cfg.train, cfg.validation, cfg.test)
        classes, y, y_val = len(data.labels), parts.y_train, parts.y_val
        pictures = parts.x_train, parts.x_val, parts.x_test

        raw, raw_val, _ = linear.prepare(*pictures)
        x_dev, y_dev = raw[: cfg.dev].astype(np.float64), y[: cfg.dev]
        x_dev[:, :-1] /= 128  # of order 1, as the 1 of the bias
        rng = np.random.default_rng((cfg.seed, 1))
        losses = {"naive": svm_loss_naive, "vectorised": svm_loss, "numpy_net.linear": linear.svm,
                  "tf.GradientTape": linear.by_tape(hinge_in_tensorflow)}  # fmt: skip
        losses = linear.compare(losses, x_dev, y_dev, classes, rng)
        gradients, steps = check_gradients(x_dev, y_dev, classes, rng)

        print("the assignment's own setting: raw pixels", flush=True)
        settings = {"batch": cfg.batch, "seed": (cfg.seed, 2), "train": train}
        own, _, own_curve = linear.fit(svm_loss, (raw, y), (raw_val, y_val), classes, lr=1e-7, reg=2.5e4,
                                       steps=cfg.search_steps, **settings)  # fmt: skip
        del raw, raw_val
        x, x_val, x_test = linear.prepare(*pictures, scale=True)
        fit = functools.partial(linear.fit, svm_loss, (x, y), (x_val, y_val), classes, **settings)
        point = functools.partial(fit, steps=cfg.search_steps)
        # exercise: `point` at every pair of cfg.lrs and cfg.regs (linear.search), and the best row on validation
        grid = linear.search(run.once, lambda lr, reg: point(lr=lr, reg=reg)[0], cfg.lrs, cfg.regs)
        best = linear.best(grid)
        # end exercise
        kept, w, curve = fit(lr=best["lr"], reg=best["reg"], steps=cfg.steps)
        brief = {"lr": best["lr"], "reg": best["reg"], "steps": 50, "batch": cfg.batch}
        ours, theirs = (function(svm_loss, x, y, classes, rng=np.random.default_rng(3), **brief)[0]
                        for function in (train, linear.train))  # fmt: skip

        run.record |= {
            "data": data.provenance,
            "history": {"loss": curve[:: max(1, cfg.steps // 500)]},
            "tables": {"losses": losses, "gradient check": gradients, "steps of the check": steps, "grid": grid},
        }
        run.record["metrics"] = {
            "test_accuracy": accuracy(w, x_test, parts.y_test), "val_accuracy": kept["validation"],
            "gradient_check_worst": max(row["relative"] for row in gradients), "train_accuracy": kept["train"],
            "initial_loss": float(svm_loss(np.zeros_like(w), x, y, 0.0)[0]), "initial_loss_expected": classes - 1,
            "best_lr": best["lr"], "best_reg": best["reg"], "val_accuracy_in_grid": best["validation"],
            "val_accuracy_assignment_setting": own["validation"],
            "loss_difference_naive_vectorised": losses[1]["loss difference"],
            "gradient_difference_naive_vectorised": losses[1]["gradient difference"],
            "gradient_difference_tape": losses[3]["gradient difference"],
            "speed_up_vectorised": losses[0]["seconds"] / losses[1]["seconds"],
            "slope_across_the_kink": kink(1e-5), "kinks_crossed_at_largest_step": steps[-1]["kinks crossed"],
            "weight_difference_from_library": float(np.abs(ours - theirs).max()),
        }  # fmt: skip
        run.figure("kink", draw_kink())
        run.figure("search", linear.draw_search(grid))
        run.figure("loss", linear.draw_losses({"raw pixels, as assigned": own_curve, "the classifier kept": curve}))
        templates = linear.draw_templates(w, pictures[0].shape[1:], data.labels, title="templates (grey: 0)")
        run.figure("templates", templates)
        run.figure("mean_image", core.plots.image_grid([parts.x_train.mean(axis=0) / 255], columns=1, cell=1.6))
    return run.record


if __name__ == "__main__":
    core.cli(main)
