"""Assignment 2 - Dropout: learning by heart slows down; with 500 units validation does not suffer, with 30 it does.

Paper:     Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014, JMLR 15, 1929-1958
Task:      write inverted dropout and its gradient; train on 500 CIFAR-10 images with and without it
Shapes:    images [N,3072] -> affine, ReLU, dropout [N,500] -> scores [N,10]
Reference: none stated; CS231n 2018, assignment 2, Dropout notebook: 500 images, 25 epochs, keep 1 and 0.25
Run:       python -m course.a2_dropout --preset cpu --seed 0
Departs:   1. pixels are divided by 255, the notebook keeps 0..255; weights start by He's rule
           2. every curve is a mean over seeds with a band, the notebook's is one run
"""

# %%
import dataclasses
import functools

import keras
import numpy as np

from course import core
from models.numpy_net import checks, dropout, gradcheck, layers, losses, optim, trials
from models.numpy_net import net as nets
from models.numpy_net.solver import Solver


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the order of the examples and the masks
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    examples: int = 500  # training images
    validation: int = 1_000  # validation images
    p: tuple[float, ...] = (1.0, 0.25)  # dropout's parameter, one network each
    p_means: str = "keep"  # keep: p is the probability to keep a unit; drop: to drop it
    hidden: int = 500  # units of the hidden layer
    narrower: tuple[int, ...] = (125, 30)  # units of the hidden layers compared with it
    epochs: int = 25  # passes over the training images
    batch: int = 100  # images a step
    lr: float = 5e-4  # Adam's
    trials: int = 5  # runs of each setting, each from its own weights


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "examples": 200, "validation": 200, "hidden": 50, "narrower": (20,),
              "epochs": 4, "trials": 2},
    "cpu": {"stand_in": "fashion_mnist", "trials": 4},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Which probability?
# The paper's $p$ is the probability to *keep* a unit, and so is that of CS231n's assignment since 2018. The assignment
# of 2017 called $p$ the probability to *drop* one, and so does Keras: `Dropout(rate=0.75)` is $p = 0.25$ here. A
# network copied from one to the other with the wrong reading trains, only badly, so say which one you mean. Below it is
# `keep`.


# %%
def keep_probability(p, means):
    """The probability to keep a unit, from `p`, which means "keep" (paper, CS231n 2018) or "drop" (2017, Keras)."""
    if means not in ("keep", "drop"):
        raise core.InputError(f"--p-means {means} is not known: choose keep or drop")
    keep = p if means == "keep" else 1 - p
    if not 0 < keep <= 1:
        raise core.InputError(f"--p {p} would keep a unit with probability {keep:g}: it must be above 0 and up to 1")
    return keep


# %% [markdown]
# ## Inverted dropout
# In training each unit's output $x_i$ is kept with probability $k$ or set to zero, anew at each step. A unit cannot
# rely on the others being there, so features have to be of use by themselves. What is kept is divided by $k$:
#
# $$y_i = \frac{m_i}{k}\, x_i, \qquad m_i \sim \mathrm{Bernoulli}(k) \;(1), \qquad
#   \mathbb{E}[y_i] = \frac{k \cdot 1}{k}\, x_i = x_i \;(2)$$
#
# so that at test time all units stay on, unscaled, and the next layer sees inputs of the size that it was trained for.
# The variance is another matter: $\mathrm{Var}[y_i] = x_i^2\, (1 - k) / k$, the noise that regularises. A mask is a
# constant to the derivative: $\partial L / \partial x_i = (m_i / k)\, \partial L / \partial y_i$ (3).
#
# The mask comes from a generator that is handed in. With equal states two calls draw equal masks, without which no
# difference quotient could be taken: the two losses would be of two different networks.


# %%
def dropout_forward(x, keep, rng, *, train):
    """x of any shape -> out, mask [x's shape], whose entries are 0 and 1 / keep, or None in testing."""
    # exercise: eq. 1 in training, in x's own dtype; in testing nothing
    if not train:
        return x, None
    mask = (rng.random(x.shape) < keep).astype(x.dtype) / keep
    return x * mask, mask
    # end exercise


def dropout_backward(d_out, mask):
    """d_out -> dx, eq. 3; after a forward in testing, d_out itself."""
    # exercise: eq. 3
    return d_out if mask is None else d_out * mask
    # end exercise


# %% [markdown]
# ## Checks
# For each $k$, on 500 x 500 numbers around 10: the mean in training and in testing, the share of zeros, and whether
# units are dropped independently (then the number kept in a row varies as a binomial does). All of these are random;
# the table has them as $z$, deviations from what is expected in standard errors, for our function, the library's and
# `keras.layers.Dropout`. Keras draws its own masks, so its agreement with us is one of distributions; its gradient for
# its own mask must be eq. 3 exactly. Then centred differences, with the mask held, for the layer and for whole
# networks.


# %%
def by_keras(x, keep, seed):
    """`keras.layers.Dropout` in training -> its output and the gradient of the output's sum by x."""
    import tensorflow as tf

    layer, x = keras.layers.Dropout(1 - keep, seed=seed, dtype=x.dtype.name), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(x, training=True)
    return out.numpy(), tape.gradient(out, x).numpy()


def measure(rng, keep):
    """Rows, one an implementation: mean and share of zeros on 500 x 500 numbers, as z too, and the error of eq. 3."""
    x, seed = rng.normal(10, 1, (500, 500)), int(rng.integers(2**31))
    ours, mask = dropout_forward(x, keep, rng, train=True)
    library, library_mask = dropout.dropout_forward(x, keep, rng, train=True)
    outputs = {"ours": (ours, dropout_backward(np.ones_like(x), mask)),
               "library": (library, dropout.dropout_backward(np.ones_like(x), library_mask)),
               "Keras": by_keras(x, keep, seed)}  # fmt: skip
    rows = []
    for name, (out, gradient) in outputs.items():
        kept, variance = out != 0, keep * (1 - keep)
        dispersion = ((kept.sum(axis=1) - 500 * keep) ** 2).mean() / (500 * variance)  # 1, if units are independent
        rows.append({
            "keep": keep, "of": name, "mean of x": x.mean(), "mean in training": out.mean(),
            "mean in testing": dropout_forward(x, keep, rng, train=False)[0].mean(),
            "zeros": 1 - kept.mean(),
            "z of the mean": (out - x).mean() / np.sqrt((x**2).mean() * (1 - keep) / keep / x.size),
            "z of the zeros": (keep - kept.mean()) / np.sqrt(variance / x.size),
            "z of the dispersion": (dispersion - 1) / np.sqrt(2 / 500),
            "difference from eq. 3": max(np.abs(out - x * kept / keep).max(), np.abs(gradient - kept / keep).max()),
        })  # fmt: skip
    return rows


def check_gradients(rng):
    """{name: list of `gradcheck.Check`}: the layer, and networks with keep 1, 0.75 and 0.5; and their first losses."""
    x, y, found, first = rng.standard_normal((2, 15)), rng.integers(0, 10, 2), {}, []
    for keep in (0.25, 0.4, 0.7):
        forward = functools.partial(same_mask, keep)
        found[f"keep {keep}"] = gradcheck.check_layer(forward, dropout_backward, {"x": x}, rng)
    for keep in (1.0, 0.75, 0.5):
        net = nets.create(rng, (15, 20, 30, 10), keep=keep, weight_scale=0.05, dtype=np.float64)
        found[f"net, keep {keep}"] = checks.training_loss(nets.loss, net, x, y)
        first.append({"keep": keep, "first loss": float(nets.loss(net, x, y, rng=rng)[0]), "log 10": np.log(10)})
    return found, first


def same_mask(keep, x):
    """`dropout_forward` in training, whose mask is the same at every call."""
    return dropout_forward(x, keep, np.random.default_rng(1), train=True)


# %% [markdown]
# ## What if we do not divide by $k$?
# Then eq. 2 fails: in training the next layer sees, on average, $k$ times what it gets in testing. Its weights grow to
# suit the training, and with all units on, its scores are $1/k$ times too large. For one hidden layer that hardly
# changes which score is largest, but the probabilities become far too sure of themselves, as the cross-entropy shows.
# With several layers the factor is $k^{-1}$ for each. The remedy at test time is to multiply by $k$ there, as the paper
# does; inverted dropout pays in training instead, and leaves the network that is put to use alone.


# %%
def undivided_loss(net, x, y, *, rng):
    """As `nets.loss`, for one hidden layer, but dropout only drops."""
    out, first = layers.affine_forward(x, net.params["W1"], net.params["b1"])
    out, active = layers.relu_forward(out)
    mask = rng.random(out.shape) < net.keep
    scores, second = layers.affine_forward(out * mask, net.params["W2"], net.params["b2"])
    value, d_scores = losses.softmax_cross_entropy(scores, y)
    d, w2, b2 = layers.affine_backward(d_scores, second)
    _, w1, b1 = layers.affine_backward(layers.relu_backward(d * mask, active), first)
    return value, {"W1": w1, "b1": b1, "W2": w2, "b2": b2}


def answers(cfg, data, sizes, keep, trial, loss):
    """Train by `loss` -> for the network as it is, and with W2 times keep: its accuracy (%), loss and sureness.

    All are of the validation images; sureness is the mean probability (%) that is given to the class chosen.
    """
    net, (x, y) = nets.create(np.random.default_rng((cfg.seed, trial)), sizes, keep=keep), data[1]
    Solver(loss, nets.scores, epochs=cfg.epochs, batch=cfg.batch, lr=cfg.lr, rule=optim.adam, verbose=False,
           seed=100 * cfg.seed + trial, keep_best=False).fit(net, *data)  # fmt: skip
    found = {}
    for name, factor in ("as it is", 1.0), ("times keep", keep):
        scores = nets.scores(dataclasses.replace(net, params=net.params | {"W2": factor * net.params["W2"]}), x)
        found[name] = [100 * (scores.argmax(axis=1) == y).mean(), losses.softmax_cross_entropy(scores, y)[0],
                       100 * losses.softmax(scores).max(axis=1).mean()]  # fmt: skip
    return found


# %% [markdown]
# ## As a regulariser
# 500 images are few enough to be learned by heart. What dropout does about it shows in the gap between the curves of
# training and validation accuracy (both measured with all units on).
#
# **What do the curves say?** Without dropout ten epochs are enough to know nearly all 500 images by heart; validation
# accuracy has long stopped by then. With $k = 0.25$ each step trains another thinned network, it takes more than twice
# as long, and all the while the gap is smaller. In the end it nearly closes up with the other: dropout slows memorising
# down and does not forbid it. Validation accuracy hardly moves. Dropout takes away overfitting; it adds no images.
#
# **Should $k$ change if the hidden layer is made smaller?** What is at work in a step is a network of $k H$ units. With
# 500 units a quarter is plenty; of 30 it leaves seven, and the network learns less, on both parts. So $k$ has to grow
# as $H$ shrinks; the last figure has the accuracies over $H$.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    keeps = [keep_probability(p, cfg.p_means) for p in cfg.p]
    with core.run("a2_dropout", options, cfg) as run:
        images = core.data.load(cfg.data, stand_in=cfg.stand_in)
        data = trials.centred(core.data.three_way(images, cfg.examples, cfg.validation, 0))
        rng, kinds = np.random.default_rng(cfg.seed), {f"keep {keep:g}": {"keep": keep} for keep in keeps}

        found, first = check_gradients(rng)
        gradients, drawn = checks.rows(found), [row for keep in (0.25, 0.4, 0.7) for row in measure(rng, keep)]
        widths = {width: trials.compare(run, f"{width} units", kinds, data, (width,), seed=cfg.seed, trials=cfg.trials,
                                        epochs=cfg.epochs, batch=cfg.batch, lr=cfg.lr)
                  for width in (cfg.hidden, *cfg.narrower)}  # fmt: skip
        sizes, scaling = (data[0][0].shape[1], cfg.hidden, len(images.labels)), []
        for label, of, ways in ("yes", nets.loss, ["as it is"]), ("no", undivided_loss, ["as it is", "times keep"]):
            train = [functools.partial(answers, cfg, data, sizes, min(keeps), t, of) for t in range(cfg.trials)]
            runs = [run.once(f"divided {label}, {trial}", call) for trial, call in enumerate(train)]
            means = {way: np.mean([found[way] for found in runs], axis=0).tolist() for way in ways}
            scaling += [{"divided in training": label, "in testing": way, "accuracy": accuracy, "loss": loss,
                         "confidence": sure} for way, (accuracy, loss, sure) in means.items()]  # fmt: skip

        run.record |= {"data": images.provenance, "tables": {
            "means": drawn, "gradient check": gradients, "first loss": first, "width": trials.table("units", widths),
            "dividing by keep": scaling,
        }}  # fmt: skip
        widest = {part: {kind: widths[cfg.hidden][kind][part] for kind in kinds} for part in ("training", "validation")}
        run.record["history"] = {f"{kind}, {curve}": one[curve].mean(axis=0).tolist()
                                 for kind, one in widths[cfg.hidden].items()
                                 for curve in ("loss", "training", "validation")}  # fmt: skip
        last = {kind: {part: float(widest[part][kind][:, -1].mean()) for part in widest} for kind in kinds}
        without, dropped = last[f"keep {max(keeps):g}"], last[f"keep {min(keeps):g}"]
        run.record["metrics"] = {
            "gap_with_dropout": dropped["training"] - dropped["validation"],
            "gap_without_dropout": without["training"] - without["validation"],
            "gradient_check_worst": max(row["relative"] for row in gradients),
            "validation_accuracy_with_dropout": dropped["validation"],
            "validation_accuracy_without_dropout": without["validation"],
            "training_accuracy_with_dropout": dropped["training"],
            "training_accuracy_without_dropout": without["training"],
            "draws_worst_z": max(abs(value) for row in drawn for name, value in row.items() if name.startswith("z of")),
            "gradient_from_eq_3": max(row["difference from eq. 3"] for row in drawn),
            "first_loss_worst": max(abs(row["first loss"] - row["log 10"]) for row in first),
            "loss_divided": scaling[0]["loss"], "loss_undivided": scaling[1]["loss"],
            "loss_undivided_times_keep": scaling[2]["loss"],
        }  # fmt: skip
        run.figure("accuracy", core.plots.panels({f"{part} accuracy, %": curves for part, curves in widest.items()}))
        ends = {f"{part} accuracy, %": trials.ends(widths, part) for part in widest}
        run.figure("width", core.plots.panels(ends, x=list(widths), xlabel="hidden units"))
    return run.record


if __name__ == "__main__":
    core.cli(main)
