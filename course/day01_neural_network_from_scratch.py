"""Day 01 - Neural network from scratch: thirty lines of NumPy learn XOR and read digits, every gradient checked.

Paper:     Rumelhart, Hinton, Williams 1986, "Learning representations by back-propagating errors", Nature 323, 533-536
Task:      learn XOR, which no linear model can; then classify 28x28 hand-written digits
Shapes:    image [B,784] -> W1 [784,800], ReLU -> hidden [B,800] -> W2 [800,10] -> scores [B,10]; any depth by --hidden
Reference: MNIST test error 1.6 % (2-layer network, 800 hidden units, cross-entropy, no preprocessing or distortion)
Run:       python -m course.day01_neural_network_from_scratch --preset cpu --seed 0
Departs:   1. 5,000 of the 60,000 training images are held out for the validation curve; the reference trains on all
           2. the reference's table gives no activation, initialiser or schedule: we take ReLU, He, linear decay
"""

# %%
import dataclasses
import itertools
import math
import time

import numpy as np
from matplotlib import pyplot as plt
from sklearn.metrics import confusion_matrix

from course import core
from models.numpy_net import checks, layers, losses, optim, twin
from models.numpy_net import net as nets

REFERENCE = {"test_error": (1.6, "%", "Simard et al. 2003, LeCun's MNIST table, 2-layer NN, 800 HU, cross-entropy")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the split and the order of the examples
    data: str = "mnist"  # data set, as core.data knows it
    limit: int = 60_000  # images used, a twelfth of them for validation
    hidden: tuple[int, ...] = (800,)  # units of each hidden layer
    activation: str = "relu"  # relu, leaky_relu, tanh or sigmoid
    epochs: int = 100  # passes over the training images
    batch: int = 32  # images a step
    lr: float = 0.5  # at the start; falls linearly to 0
    twin_steps: int = 100  # first steps in which the Keras twin is followed
    xor_trials: int = 10  # initialisations of each kind of XOR network
    xor_steps: int = 2_000  # full-batch steps at learning rate 1


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "limit": 2_400, "hidden": (32,), "epochs": 2, "lr": 0.1, "xor_trials": 2},
    "cpu": {"epochs": 20},  # the reference's network and data, in minutes
    "full": {},
}


# %% [markdown]
# ## The network
# Layer $l$ mixes its inputs linearly and bends the result. With examples as rows, $x_0$ the images and $L$ layers,
#
# $$z_l = x_{l-1} W_l + b_l \quad(1), \qquad x_l = g(z_l) \text{ for } l < L \quad(2),$$
#
# and $z_L$ are the scores. Without the bend $g$ the product of all $W_l$ would be a single matrix, and depth nothing.
# ReLU is $g = \max(z, 0)$ with $g' = [z > 0]$; the sigmoid has $g' = g (1 - g)$, tanh $g' = 1 - g^2$.


# %%
def forward(net, x):
    """x [B, D0] -> scores [B, DL], and what the way back needs: each layer's input, each activation's cache."""
    activate, _ = layers.ACTIVATIONS[net.activation]
    inputs, caches = [], []
    for layer in range(1, net.depth + 1):
        # exercise: note x, apply eq. 1 and, except after the last layer, eq. 2 (`activate(z)` gives out and cache)
        inputs.append(x)
        x = x @ net.params[f"W{layer}"] + net.params[f"b{layer}"]
        if layer < net.depth:
            x, cache = activate(x)
            caches.append(cache)
        # end exercise
    return x, (inputs, caches)


# %% [markdown]
# ## The loss
# Softmax makes scores $s$ into probabilities $p_c = e^{s_c} / \sum_k e^{s_k}$, and cross-entropy is the surprise at
# the truth $y$: $\ell = -\log p_y = \log \sum_k e^{s_k} - s_y$. Differentiated in this form, nearly all of it cancels:
#
# $$\frac{\partial \ell}{\partial s_c} = p_c - [c = y] \quad(3)$$
#
# For one yes-or-no score $z$ with target $t$ it is likewise $\sigma(z) - t$; over a batch, $L$ is the mean. `losses.py`
# takes the largest score off first, so that $10^4$ is safe. A network that knows nothing starts near $L = \log C$.
#
# ## Backpropagation
# Let $\delta_l = \partial L / \partial z_l$; eq. 3 gives the last one. The chain rule through eq. 1 gives what learning
# needs, and through eq. 2 as well it gives $\delta$ one layer earlier. The shapes alone nearly dictate the formulas:
#
# $$\frac{\partial L}{\partial W_l} = x_{l-1}^\top \delta_l, \qquad
#   \frac{\partial L}{\partial b_l} = \sum_{\text{rows}} \delta_l \quad(4), \qquad
#   \delta_{l-1} = (\delta_l W_l^\top) \odot g'(z_{l-1}) \quad(5)$$
#
# One sweep from the last layer to the first costs about two forward passes, for all the derivatives together.


# %%
def backward(net, delta, memory):
    """delta = dL/dscores [B, DL] and `forward`'s memory -> dL/dparameter for every parameter, by name."""
    _, undo = layers.ACTIVATIONS[net.activation]
    inputs, caches = memory
    gradients = {}
    for layer in range(net.depth, 0, -1):
        # exercise: eq. 4; then eq. 5, unless this is the first layer (`undo(d, cache)` multiplies by g')
        gradients[f"W{layer}"] = inputs[layer - 1].T @ delta
        gradients[f"b{layer}"] = delta.sum(axis=0)
        if layer > 1:
            delta = undo(delta @ net.params[f"W{layer}"].T, caches[layer - 2])
        # end exercise
    return gradients


def step(net, x, y, lr, loss=losses.softmax_cross_entropy):
    """One step of gradient descent on the batch (x, y), in place; returns the loss before it."""
    scores, memory = forward(net, x)
    value, delta = loss(scores, y)
    optim.sgd(net.params, backward(net, delta, memory), lr)
    return float(value)


# %% [markdown]
# ## Learning
# An epoch visits every example once, a small batch at a time: the gradient of 32 examples is noisy, but 1,719 such
# steps cost no more than one with all 55,000. The order depends on seed and epoch alone, so a killed run can go on.


# %%
def order(cfg, epoch, count):
    """The permutation [count] in which `epoch` visits the examples."""
    return np.random.default_rng((cfg.seed, epoch)).permutation(count)


def train(net, examples, held_out, cfg, resume):
    """Mini-batch gradient descent on examples = (x, y); the state after each epoch goes to `resume`."""
    x, y = examples
    for epoch in range(resume.epoch, cfg.epochs):
        began, total = time.perf_counter(), 0.0
        rows, lr = order(cfg, epoch, len(x)), cfg.lr * (1 - epoch / cfg.epochs)
        for first in range(0, len(x), cfg.batch):
            batch = rows[first : first + cfg.batch]
            total += step(net, x[batch], y[batch], lr) * len(batch)
        logs = {"loss": total / len(x)} | {f"val_{name}": value for name, value in evaluate(net, *held_out).items()}
        resume.save(epoch, logs, net.params)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in logs.items())
        print(f"epoch {epoch + 1}/{cfg.epochs}  {shown}  {time.perf_counter() - began:.1f} s", flush=True)


def evaluate(net, x, y):
    """The share of wrong answers, in per cent, that of right ones, and the mean cross-entropy."""
    scores, _ = forward(net, x)
    error = 100 * float((scores.argmax(axis=1) != y).mean())
    return {"error": error, "accuracy": 100 - error, "loss": float(losses.softmax_cross_entropy(scores, y)[0])}


# %% [markdown]
# ## XOR
# No straight line separates these two classes of two points: a linear model gets at most three right, and its best loss
# is $\log 2$. Two hidden units suffice in principle; whether gradient descent gets there depends on where it starts.

# %%
XOR = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=float), np.array([[0], [1], [1], [0]], dtype=float)


def learn_xor(units, activation, cfg, trial):
    """One hidden layer of `units` (0: linear model) -> network, loss of each step, corners right (of 4)."""
    rng, sizes = np.random.default_rng((cfg.seed, trial)), (2, units, 1) if units else (2, 1)
    net = nets.create(rng, sizes, activation, dtype=np.float64)
    curve = [step(net, *XOR, 1.0, losses.bce_with_logits) for _ in range(cfg.xor_steps)]
    return net, curve, int(((forward(net, XOR[0])[0] > 0) == XOR[1]).sum())


def xor_table(cfg):
    """For each kind of network: in how many of the trials all four corners came out right."""
    kinds = [(0, "identity"), *itertools.product((4, 3, 2), ("sigmoid", "tanh", "relu"))]
    right = {kind: [learn_xor(*kind, cfg, trial)[2] for trial in range(cfg.xor_trials)] for kind in kinds}
    return [{"hidden units": units, "activation": activation, "trials": cfg.xor_trials, "solved": corners.count(4),
             "most corners right": max(corners)} for (units, activation), corners in right.items()]  # fmt: skip


# %% [markdown]
# ## First check: finite differences
# A wrong backward pass often still learns, only worse. So each derivative is compared with
# $\bigl(L(w + h) - L(w - h)\bigr) / 2h$ in float64: every layer and loss alone, whole networks, and a sample of the one
# that reads the digits. Where a step of $h$ carries a ReLU across its kink, the coordinate is left out, and counted.
#
# ## Second check: a tape
# The other way to derivatives: numbers that write down what was done to them. Each `Scalar` notes its operands and the
# derivative by each; a result always comes after its operands, so reading the tape from its end is the chain rule,
# whatever the program was. NumPy runs our own `forward` on arrays of such numbers, unchanged, if slowly. This is the
# idea of TensorFlow's GradientTape; eqs. 4 and 5 are what it comes to for whole matrices.
#
# ## Third check: Keras
# `models/numpy_net/twin.py` builds the same network in Keras with our first weights. Its gradients, by GradientTape,
# must be ours; fed the same batches it must lose the same at every step. In float64 it does, to the last digit logged;
# in float32 long steps amplify rounding, from some starts to a difference that shows. Both are recorded. Last,
# `checks.sanity` asks: is the first loss $\log C$, can 50 examples be learned by heart, are scores of $10^4$ safe, does
# the saved network answer like the one in memory?


# %%
class Scalar:
    """A number on a tape; `operands` pairs each number it was made from with the derivative by it."""

    def __init__(self, value, tape, operands=()):
        self.value, self.tape, self.operands, self.gradient = float(value), tape, operands, 0.0
        tape.append(self)

    def _on_tape(self, other):
        return other if isinstance(other, Scalar) else Scalar(other, self.tape)

    def __add__(self, other):
        other = self._on_tape(other)
        return Scalar(self.value + other.value, self.tape, [(self, 1.0), (other, 1.0)])

    def __mul__(self, other):
        other = self._on_tape(other)
        return Scalar(self.value * other.value, self.tape, [(self, other.value), (other, self.value)])

    __radd__, __rmul__ = __add__, __mul__

    def __sub__(self, other):
        return self + other * -1

    def __ge__(self, other):  # all that a maximum asks; it is one of its operands, so there is nothing to write down
        return self.value > getattr(other, "value", other)  # at a tie the other one: ReLU's slope at 0 is 0

    def exp(self):
        return Scalar(math.exp(self.value), self.tape, [(self, math.exp(self.value))])

    def log(self):
        return Scalar(math.log(self.value), self.tape, [(self, 1 / self.value)])

    def backward(self):
        """Set `gradient` of every number on the tape to the derivative of this one by it."""
        self.gradient = 1.0
        for node in reversed(self.tape):
            # exercise: hand the node's gradient on to its operands
            for operand, slope in node.operands:
                operand.gradient += slope * node.gradient
            # end exercise


def scalar_gradients(net, x, y):
    """The gradients of the cross-entropy, from `forward` run on Scalars."""
    tape = []
    params = {name: np.vectorize(lambda w: Scalar(w, tape), [object])(array) for name, array in net.params.items()}
    scores, _ = forward(nets.Net(params, net.activation), x.astype(object))
    (losses.log_softmax(scores)[np.arange(len(y)), y].sum() * (-1 / len(y))).backward()
    return {name: np.vectorize(lambda scalar: scalar.gradient)(array) for name, array in params.items()}


def check_gradients(net, x, y, rng):
    """Rows of two tables: finite differences (of `net` on the digits, a sample), and a small network by other ways."""
    found, exact = checks.dense(rng) | checks.networks(forward, backward, rng), nets.cast(net, np.float64)
    found["digits net, sampled"] = checks.network(forward, backward, exact, x.astype(float), y, samples=25, rng=rng)
    small = nets.create(rng, (4, 5, 5, 3), dtype=np.float64)
    x, y = rng.standard_normal((6, 4)), rng.integers(0, 3, 6)
    scores, memory = forward(small, x)
    _, delta = losses.softmax_cross_entropy(scores, y)
    ours = backward(small, delta, memory)
    views = {"layer by layer (numpy_net.net)": nets.backward(small, delta, nets.forward(small, x)[1]),
             "tape of scalars": scalar_gradients(small, x, y),
             "tf.GradientTape": twin.gradients(small, x, y)}  # fmt: skip
    same = [{"view": view, "difference": twin.largest_difference(ours, theirs)} for view, theirs in views.items()]
    return checks.rows(found), same


def draw_xor(cfg):
    """Where a linear model and a network with four hidden units say 1, and their losses."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), width_ratios=(1, 1, 1.3))
    side = np.linspace(-0.5, 1.5, 201)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    for axis, name, units, activation in (axes[0], "linear", 0, "identity"), (axes[1], "4 hidden units", 4, "sigmoid"):
        net, curve, right = learn_xor(units, activation, cfg, trial=0)
        p = layers.sigmoid(forward(net, grid)[0]).reshape(201, 201)
        drawn = axis.contourf(side, side, p, levels=np.linspace(0, 1, 21), cmap="RdBu_r")
        axis.scatter(*XOR[0].T, c=XOR[1], cmap="RdBu_r", edgecolors="black", s=90, zorder=3)
        axis.set(title=f"{name}: {right} of 4 right", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        axes[2].plot(curve, label=name)
    figure.colorbar(drawn, ax=axes[:2], label="P(1)", ticks=[0, 0.5, 1], shrink=0.8)
    axes[2].set(title="loss", xlabel="step", ylabel="binary cross-entropy", yscale="log")
    axes[2].legend()
    return figure


def draw_digits(run, net, x, data):
    """Confusion matrix, the most confident errors, and what the first layer looks for; x: `data`'s test part, flat."""
    y, labels, shape = data.y_test, data.labels, (-1, *data.x_test.shape[1:])
    log_p = losses.log_softmax(forward(net, x)[0])
    said, p_true = log_p.argmax(axis=1), np.exp(log_p[np.arange(len(y)), y])
    run.figure("confusion", core.plots.confusion(confusion_matrix(y, said), labels, title="test images"))
    worst = np.argsort(np.where(said != y, p_true, 1))[: min(24, (said != y).sum())]
    titles = [f"{labels[y[i]]}\nsaid {labels[said[i]]}" for i in worst]
    run.figure("worst_predictions", core.plots.image_grid(x[worst].reshape(shape), titles, cell=1.2))
    strongest = np.argsort(-np.linalg.norm(net.params["W1"], axis=0))[:40]  # the others stay near their random start
    weights = net.params["W1"].T[strongest].reshape(shape)
    scaled = 0.5 + weights / np.abs(weights).max(axis=(1, 2, 3), keepdims=True) / 2  # grey is 0
    run.figure("first_layer_weights", core.plots.image_grid(scaled, columns=10, title="strongest units of layer 1"))


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("day01_neural_network_from_scratch", options, cfg) as run:
        data = core.data.load(cfg.data, limit=cfg.limit, seed=cfg.seed)
        (x, y), (x_held, y_held) = core.data.split(data.x_train, data.y_train, 1 / 12, cfg.seed)
        x, x_held, x_test = (images.reshape(len(images), -1) / np.float32(255) for images in (x, x_held, data.x_test))
        sizes, rng = (x.shape[1], *cfg.hidden, len(data.labels)), np.random.default_rng(cfg.seed)
        net = nets.create(rng, sizes, cfg.activation, output_scale=0.1)  # small first scores: all classes as likely

        gradients, views = check_gradients(net, x[:8], y[:8], rng)
        first = order(cfg, 0, len(x))[: cfg.twin_steps * cfg.batch]
        twins = {dtype: twin.compare(step, net, x[first].astype(dtype), y[first], batch=cfg.batch, lr=cfg.lr)
                 for dtype in ("float64", "float32")}  # fmt: skip
        quick, xor = checks.sanity(net, step, x, y, run.folder / "untrained.npz"), xor_table(cfg)

        resume = run.checkpoint(None, "net")  # NumPy's state goes into its `arrays`
        net.params.update(resume.arrays)
        train(net, (x, y), (x_held, y_held), cfg, resume)
        nets.save(net, run.folder / "model.npz")

        test = evaluate(net, x_test, data.y_test)
        run.record |= {
            "data": [data.provenance, {"name": "xor", "source": "four points, written out", "synthetic": True}],
            "history": resume.history,
            "tables": {"gradient check": gradients, "the same gradients": views, "xor": xor},
        }
        run.record["metrics"] = {
            "test_error": test["error"], "gradient_check_worst": max(row["relative"] for row in gradients),
            "xor_solved": xor[1]["solved"], "test_accuracy": test["accuracy"], "test_loss": test["loss"],
            "gradient_check_worst_norm": max(row["norm"] for row in gradients),
            "gradients_checked": sum(row["checked"] for row in gradients),
            "kinks_left_out": sum(row["skipped"] for row in gradients),
            "gradient_views_difference": max(row["difference"] for row in views),
            **{f"keras_loss_difference_{dtype}": float(np.abs(a - b).max()) for dtype, (a, b) in twins.items()},
            "xor_linear_most_right": xor[0]["most corners right"],
        } | quick  # fmt: skip
        curves = {"cross-entropy": {"training": resume.history["loss"], "validation": resume.history["val_loss"]},
                  "validation error, %": {"validation": resume.history["val_error"]}}  # fmt: skip
        run.figure("learning_curves", core.plots.panels(curves))
        run.figure("xor", draw_xor(cfg))
        run.figure("gradient_check", checks.draw(gradients))
        run.figure("keras_twin", twin.draw(twins))
        draw_digits(run, net, x_test, data)
    return run.record


if __name__ == "__main__":
    core.cli(main)
