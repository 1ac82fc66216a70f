"""Assignment 2 - Fully connected networks: forward and backward pairs stack to any depth, and past 55 % on CIFAR-10.

Paper:     Glorot, Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", AISTATS
Task:      write the layers, two losses and networks of any depth; check them; classify CIFAR-10 pictures by the best
Shapes:    image [N,H,W,C] -> (affine -> batch normalisation -> ReLU -> dropout) x (L - 1) -> affine -> scores [N,10]
Reference: CIFAR-10 validation: 50 % by two layers; 55 % "should be possible" (CS231n 2018, assignment 2, its notebook)
Run:       python -m course.a2_fully_connected --preset cpu --seed 0
Departs:   1. weights start from He's scale and pixels are divided by their spread; the notebook keeps 0..255 and 0.01
           2. the best network uses batch normalisation, dropout (lessons of their own) and mirrored pictures
"""

# %%
import dataclasses
import functools
import itertools

import numpy as np

from course import core
from models.numpy_net import checks, dropout, norm, optim, twin
from models.numpy_net import net as nets
from models.numpy_net.solver import Solver, accuracy

REFERENCE = {
    "two_layer_val_accuracy": (50.0, "%", "CS231n 2018, assignment 2, FullyConnectedNets notebook: asked, CIFAR-10"),
    "val_accuracy": (55.0, "%", "CS231n 2018, assignment 2, FullyConnectedNets notebook: possible, CIFAR-10"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the weights, the order of the examples, masks and mirrors
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # training images
    validation: int = 1_000  # validation images, on which settings and epochs are chosen
    test: int = 1_000  # test images, looked at once
    two_layer_hidden: int = 256  # units of the two-layer network
    two_layer_epochs: int = 10  # its passes over the training images
    few: int = 50  # images to learn by heart
    few_epochs: int = 20  # within so many passes
    scales: int = 13  # initial weight scales of the sensitivity experiment, from 0.01 to 10
    trials: int = 3  # its initialisations of each
    hidden: tuple[int, ...] = (512, 512, 256)  # units of the best network
    keep: float = 0.75  # its probability to keep a unit
    epochs: int = 25  # its passes
    batch: int = 128  # images a step
    lr: float = 0.05  # at the start, with momentum 0.9
    lr_decay: float = 0.86  # factor after each epoch


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 1_000, "validation": 200, "test": 200, "two_layer_hidden": 32,
              "two_layer_epochs": 2, "scales": 4, "trials": 1, "hidden": (64, 32), "epochs": 2},
    "cpu": {"stand_in": "fashion_mnist"}, "full": {},
}  # fmt: skip


# %% [markdown]
# ## Layers
# A network is a chain of simple functions, and so is its derivative. Each layer therefore needs two functions only: a
# *forward*, which also hands out a cache of what its derivative will need, and a *backward*, which is given the
# gradient by the output and returns the gradients by every input. For the affine layer, rows being examples,
#
# $$o_{nj} = \sum_i x_{ni} w_{ij} + b_j \quad(1) \qquad\Rightarrow\qquad
#   \frac{\partial L}{\partial x} = d\, w^\top, \quad \frac{\partial L}{\partial w} = x^\top d, \quad
#   \frac{\partial L}{\partial b} = \sum_n d_n \quad(2)$$
#
# where $d = \partial L / \partial o$: each formula is the only product of these matrices with the right shape. Layers
# that always come together, as affine and ReLU, are worth a name: a *sandwich* is a layer again.


# %%
def affine_forward(x, w, b):
    """x [N, d1, ..., dk] with d1*...*dk = D, w [D, M], b [M] -> out [N, M], cache."""
    # exercise: eq. 1, with every example as one row
    out = x.reshape(len(x), -1) @ w + b
    # end exercise
    return out, (x, w)


def affine_backward(d_out, cache):
    """d_out [N, M] -> dx (x's shape), dw [D, M], db [M]."""
    x, w = cache
    # exercise: eq. 2
    dx = (d_out @ w.T).reshape(x.shape)
    dw = x.reshape(len(x), -1).T @ d_out
    db = d_out.sum(axis=0)
    # end exercise
    return dx, dw, db


def relu_forward(x):
    """x of any shape -> max(x, 0), cache."""
    # exercise: the positive part, and what the backward must know
    return np.maximum(x, 0), x
    # end exercise


def relu_backward(d_out, x):
    """dL/dx: the gradient passes where x was positive."""
    # exercise: let it pass there, and only there
    return np.where(x > 0, d_out, 0)
    # end exercise


def affine_relu_forward(x, w, b):
    """As `affine_forward`, then ReLU."""
    out, affine = affine_forward(x, w, b)
    out, active = relu_forward(out)
    return out, (affine, active)


def affine_relu_backward(d_out, cache):
    """As `affine_backward`."""
    affine, active = cache
    # exercise: the layers' backwards, last layer first
    return affine_backward(relu_backward(d_out, active), affine)
    # end exercise


# %% [markdown]
# ## Losses
# Two ways to be dissatisfied with scores $s$ when the truth is $y$. Softmax: the surprise at the truth, which never
# ends. SVM: by how much each wrong class comes within a margin of 1 of the right one; beyond it, contentment.
#
# $$\ell = \log \sum_c e^{s_c} - s_y, \quad \frac{\partial \ell}{\partial s_c} = p_c - [c = y] \quad(3) \qquad
#   \ell = \sum_{c \ne y} \max(0, s_c - s_y + 1), \quad
#   \frac{\partial \ell}{\partial s_c} = [s_c - s_y + 1 > 0], \quad
#   \frac{\partial \ell}{\partial s_y} = -\sum_{c \ne y} \frac{\partial \ell}{\partial s_c} \quad(4)$$


# %%
def softmax_loss(scores, y):
    """scores [N, C], y int [N] -> mean of eq. 3, dL/dscores [N, C]."""
    rows = np.arange(len(y))
    # exercise: log p without overflow (take the largest score off first), the mean loss, and its gradient
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_p[rows, y].mean()
    d_scores = np.exp(log_p)
    d_scores[rows, y] -= 1
    # end exercise
    return loss, d_scores / len(y)


def svm_loss(scores, y):
    """scores [N, C], y int [N] -> mean of eq. 4, dL/dscores [N, C]."""
    rows = np.arange(len(y))
    # exercise: the margins missed, their mean sum, and its gradient
    missed = np.maximum(scores - scores[rows, y][:, None] + 1, 0)
    missed[rows, y] = 0
    loss = missed.sum() / len(y)
    d_scores = (missed > 0).astype(scores.dtype)
    d_scores[rows, y] = -d_scores.sum(axis=1)
    # end exercise
    return loss, d_scores / len(y)


# %% [markdown]
# ## Two layers, then any number
# A network's loss has $\frac{r}{2} \sum w^2$ added (eq. 5), of all weights but no biases; its gradient is $r w$. The
# assignment's TwoLayerNet is written out; its FullyConnectedNet is a loop, in which a hidden layer may also normalise
# its outputs and drop some of them: two layers of the library, which the next lessons take apart. The parameters W1,
# b1, W2, ... are in `net.params`; `nets.create` draws them, by seed, dtype and weight scale.


# %%
def two_layer_scores(net, x):
    """affine - ReLU - affine: x [N, ...] -> scores [N, C], the caches of both layers."""
    # exercise: a sandwich, then an affine layer
    hidden, first = affine_relu_forward(x, net.params["W1"], net.params["b1"])
    scores, second = affine_forward(hidden, net.params["W2"], net.params["b2"])
    # end exercise
    return scores, (first, second)


def two_layer_loss(net, x, y, reg=0.0, rng=None):
    """Softmax loss with eq. 5 -> loss, gradients by name (`rng` is for networks with dropout)."""
    p, gradients = net.params, {}
    scores, (first, second) = two_layer_scores(net, x)
    # exercise: softmax loss, the two layers backward, eq. 5 and its gradient
    loss, d = softmax_loss(scores, y)
    d, gradients["W2"], gradients["b2"] = affine_backward(d, second)
    _, gradients["W1"], gradients["b1"] = affine_relu_backward(d, first)
    for name in ("W1", "W2"):
        loss += 0.5 * reg * (p[name] ** 2).sum()
        gradients[name] += reg * p[name]
    # end exercise
    return loss, gradients


def forward(net, x, *, train=False, rng=None):
    """x [N, ...] -> scores [N, C], caches; training normalises by the batch and draws dropout masks by `rng`."""
    if net.normalization not in (None, "batch"):
        raise core.InputError(f"{net.normalization} normalisation is not in this lesson: give None or 'batch'")
    p, caches = net.params, []
    for layer in range(1, net.depth + 1):
        running = {name: net.running.get(f"{name}{layer}") for name in ("mean", "var")}  # change in place
        normal = active = mask = None
        # exercise: affine; then, except after the last: norm.batch_norm_forward if asked for, ReLU, dropout
        x, affine = affine_forward(x, p[f"W{layer}"], p[f"b{layer}"])
        if layer < net.depth:
            if net.normalization == "batch":
                x, normal = norm.batch_norm_forward(x, p[f"gamma{layer}"], p[f"beta{layer}"], running, train=train)
            x, active = relu_forward(x)
            x, mask = dropout.dropout_forward(x, net.keep, rng, train=train)
        # end exercise
        caches.append((affine, normal, active, mask))
    return x, caches


def deep_loss(net, x, y, reg=0.0, rng=None):
    """As `two_layer_loss`, for any depth, in training mode."""
    scores, caches = forward(net, x, train=True, rng=rng)
    (loss, d), gradients = softmax_loss(scores, y), {}
    for layer in range(net.depth, 0, -1):
        (affine, normal, active, mask), w = caches[layer - 1], net.params[f"W{layer}"]
        # exercise: back through dropout, ReLU and batch norm (not after the last layer), affine; then eq. 5
        if layer < net.depth:
            d = relu_backward(dropout.dropout_backward(d, mask), active)
            if net.normalization == "batch":
                d, gradients[f"gamma{layer}"], gradients[f"beta{layer}"] = norm.batch_norm_backward(d, normal)
        d, dw, gradients[f"b{layer}"] = affine_backward(d, affine)
        gradients[f"W{layer}"] = dw + reg * w
        loss += 0.5 * reg * (w**2).sum()
        # end exercise
    return loss, gradients


def deep_scores(net, x):
    """Scores [N, C] in testing mode."""
    return forward(net, x)[0]


# %% [markdown]
# ## Checks before training
# Every gradient against centred differences in float64, with regularisation 0 and 3.14, with and without the optional
# layers; then against the library and, where no mask is drawn, GradientTape. And the first loss: a network that knows
# nothing must start at $\log 10 = 2.303$, plus eq. 5.


# %%
def check(rng):
    """Rows of two tables: finite differences; first losses, and differences from the library and from Keras."""
    pairs = {"affine": (affine_forward, affine_backward), "ReLU": (relu_forward, relu_backward),
             "affine-ReLU": (affine_relu_forward, affine_relu_backward)}  # fmt: skip
    found, rows = checks.lesson(pairs, {"softmax loss": softmax_loss, "SVM loss": svm_loss}, rng), []
    x, y = rng.standard_normal((20, 15)), rng.integers(0, 10, 20)
    kinds = [("2 layers", two_layer_loss, (10,), None, 1.0), ("3 layers", deep_loss, (10, 10), None, 1.0),
             ("batch norm", deep_loss, (10, 10), "batch", 1.0), ("all", deep_loss, (10, 10), "batch", 0.7)]  # fmt: skip
    for (name, loss, hidden, normalization, keep), reg in itertools.product(kinds, (0, 3.14)):
        options = dict(normalization=normalization, keep=keep, weight_scale=0.1, dtype=np.float64)
        net = nets.create(rng, (15, *hidden, 10), **options)
        found[f"{name}, reg {reg}"] = checks.training_loss(loss, net, x, y, reg=reg)
        rows.append({"net": name, "reg": reg} | twin.agreement(loss, net, x, y, reg))
    return checks.rows(found), rows


# %% [markdown]
# ## Fifty images by heart, and how to start
# A network that cannot learn 50 images by heart has a mistake in it. Ours can, in 20 epochs, with 3 layers and with 5.
#
# *Why does the 5-layer network mind the scale of its first weights more?* With biases 0, a ReLU network of $L$ layers
# is homogeneous: all weights times $a$ make all scores times $a^L$ (eq. 6), and to begin with every gradient times
# $a^{L-1}$. At half the right scale the scores of 3 layers are 8 times too small, those of 5 layers 32 times. Measured
# below, the best of three learning rates taken each time: from how wide a range of scales are the 50 images learned?


# %%
def learn_few(examples, classes, depth, scale, lr, cfg, trial=0):
    """`depth` layers, 100 units each, weights of spread `scale` (None: He's) -> training accuracy of each epoch, %."""
    sizes = (examples[0][0].size, *[100] * (depth - 1), classes)
    net = nets.create(np.random.default_rng((cfg.seed, trial)), sizes, weight_scale=scale)
    solver = Solver(deep_loss, deep_scores, cfg.few_epochs, batch=25, lr=lr, seed=cfg.seed + trial, verbose=False)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return solver.fit(net, examples, examples).train_accuracy
    except core.InputError:  # the loss is no longer finite: scale or rate was too large
        return [0.0]


def sweep(examples, classes, depth, scales, cfg):
    """Best accuracy within the epochs, from each scale in each trial: [trials, scales]."""
    return [[max(max(learn_few(examples, classes, depth, scale, lr, cfg, trial)) for lr in (0.1, 0.01, 0.001))
             for scale in scales] for trial in range(cfg.trials)]  # fmt: skip


# %% [markdown]
# ## The best network
# Five remedies, each for one trouble: He's scale against signals that die or explode, batch normalisation to keep them
# alive while the weights move, momentum with a falling rate, dropout against learning by heart, and mirrored pictures,
# half of each batch, since a mirrored cat is a cat. The settings were found by hand on the validation images; the run
# chooses the epoch on them.


# %%
def mirrored(x, rng):
    """x [N, H, W, C] -> the same, a random half of the pictures left-right reversed."""
    return np.where(rng.random((len(x), 1, 1, 1)) < 0.5, x[:, :, ::-1], x)


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a2_fully_connected", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts, rng = core.data.three_way(data, cfg.train, cfg.validation, cfg.test), np.random.default_rng(cfg.seed)
        mean, spread = parts.x_train.mean(axis=0, dtype=np.float32), np.float32(parts.x_train[:1000].std())
        x, x_val, x_test = ((images - mean) / spread for images in (parts.x_train, parts.x_val, parts.x_test))
        examples, held_out, few = (x, parts.y_train), (x_val, parts.y_val), (x[: cfg.few], parts.y_train[: cfg.few])
        (gradients, views), classes = check(rng), len(data.labels)
        heart = {depth: learn_few(few, classes, depth, None, 0.01, cfg) for depth in (3, 5)}
        scales = np.logspace(-2, 1, cfg.scales)
        swept = {d: np.array(run.once(f"{d}_layers", lambda d=d: sweep(few, classes, d, scales, cfg))) for d in (3, 5)}
        learned = {d: scales[np.median(swept[d], axis=0) == 100] for d in swept}
        two = nets.create(rng, (x[0].size, cfg.two_layer_hidden, classes))
        loss, scores = functools.partial(two_layer_loss, reg=1e-3), lambda net, x: two_layer_scores(net, x)[0]
        solver = Solver(loss, scores, cfg.two_layer_epochs, lr=0.05, lr_decay=0.75, seed=cfg.seed, label="two layers:")
        shallow = solver.fit(two, examples, held_out, run.checkpoint(None, "two_layers"))
        net = nets.create(rng, (x[0].size, *cfg.hidden, classes), normalization="batch", keep=cfg.keep)
        solver = Solver(deep_loss, deep_scores, cfg.epochs, cfg.batch, cfg.lr, cfg.lr_decay, optim.momentum,
                        transform=mirrored, seed=cfg.seed, label="best network:")  # fmt: skip
        deep = solver.fit(net, examples, held_out, run.checkpoint(None, "best"))
        nets.save(net, run.folder / "model.npz")
        run.record["data"], run.record["history"] = data.provenance, {"two": vars(shallow), "best": vars(deep)}
        run.record["tables"] = {"gradient check": gradients, "the same gradients": views}
        run.record["metrics"] = {
            "test_accuracy": accuracy(deep_scores, net, x_test, parts.y_test),
            "two_layer_val_accuracy": shallow.best_val_accuracy, "val_accuracy": deep.best_val_accuracy,
            **{f"overfit_{depth}_layers_accuracy": max(curve) for depth, curve in heart.items()},
            **{f"scales_learned_{d}_layers": float(s.max() / s.min()) if len(s) else 0.0 for d, s in learned.items()},
            "gradient_check_worst": max(row["relative"] for row in gradients),
            "first_loss": views[0]["loss"], "first_loss_regularised": views[1]["loss"],
        }  # fmt: skip
        run.figure("gradient_check", checks.draw(gradients))
        both = {"two layers": shallow, "best network": deep}
        curves = {"training loss": "loss", "validation accuracy, %": "val_accuracy"}
        curves = {title: {name: getattr(both[name], key) for name in both} for title, key in curves.items()}
        run.figure("learning", core.plots.panels(curves))
        lines, ylabel = {f"{d} layers": heart[d] for d in heart}, "accuracy on the 50 images, %"
        run.figure("overfit", core.plots.curves(lines, ylabel=ylabel))
        lines, xlabel = {f"{d} layers": swept[d] for d in swept}, "standard deviation of the first weights"
        run.figure("sensitivity", core.plots.curves(lines, x=scales, xscale="log", xlabel=xlabel, ylabel=ylabel))
    return run.record


if __name__ == "__main__":
    core.cli(main)
