"""Assignment 1 - Two-layer network: one hidden layer, derived by hand, debugged by measurement, then tuned.

Paper:     Bergstra, Bengio 2012, "Random Search for Hyper-Parameter Optimization", JMLR 13
Task:      classify 32x32 photographs by affine - ReLU - affine - softmax; find out why a poorly set one stays at 29 %
Shapes:    image [B,32,32,3] -> x [B,3072] -> W1 [3072,H], ReLU -> hidden [B,H] -> W2 [H,10] -> scores [B,10]
Reference: CIFAR-10, 49,000 training images: about 29 % as handed out, over 48 % after tuning, over 52 % at best
Run:       python -m course.a1_two_layer_net --preset cpu --seed 0
Departs:   1. reg/2 |W|^2, as elsewhere in the course: the hand-out's reg is half of ours; epochs are permutations
           2. the best network also uses what later assignments teach: momentum, dropout, mirrored pictures
"""

# %%
import dataclasses
import functools

import numpy as np

from course import core
from models.numpy_net import gradcheck, linear, losses, twin
from models.numpy_net import net as nets

REFERENCE = {
    "validation_accuracy": (52.0, "%", "CS231n 2018, assignment 1, two_layer_net notebook, best network, CIFAR-10"),
    "default_accuracy": (29.0, "%", "CS231n 2018, assignment 1, two_layer_net notebook, as handed out, CIFAR-10"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the weights, the order of the examples, the masks and the search
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # first training images
    validation: int = 1_000  # the next ones: every choice is made on them
    test: int = 1_000  # first test images: looked at once
    debug_epochs: int = 4  # of each network of the debugging ladder; 4 are about 1,000 steps of 200
    trials: int = 12  # of the random search
    trial_epochs: int = 4  # of each of them
    hidden: int = 1_024  # units of the best network
    epochs: int = 24  # of the best network
    keep: float = 0.5  # probability to keep a hidden unit in its training


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 2_000, "validation": 500, "test": 500, "debug_epochs": 2,
              "trials": 3, "trial_epochs": 2, "hidden": 64, "epochs": 4},
    "cpu": {"stand_in": "fashion_mnist", "epochs": 12},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Scores
# A linear classifier has one template a class: one picture for horses that look left and horses that look right. With
# a layer between, every hidden unit has a template of its own, and each class mixes them. With examples as rows (and
# $h$, where training uses dropout, multiplied by a random mask of zeros and $1/\text{keep}$),
#
# $$h = \max(0,\; x W_1 + b_1) \quad(1), \qquad s = h W_2 + b_2 \quad(2).$$


# %%
def create(rng, inputs, hidden, classes, scale=None, dtype=np.float32):
    """Parameters by name: biases 0, weights normal with standard deviation `scale`; None: that of He et al. for W1, and
    a tenth of it for W2, so that the first scores are small."""
    first, last = (scale, scale) if scale else (np.sqrt(2 / inputs), 0.1 * np.sqrt(2 / hidden))
    w1, w2 = first * rng.standard_normal((inputs, hidden)), last * rng.standard_normal((hidden, classes))
    params = {"W1": w1, "b1": np.zeros(hidden), "W2": w2, "b2": np.zeros(classes)}
    return {name: array.astype(dtype) for name, array in params.items()}


def forward(params, x, mask=None):
    """x [B, ...] with D numbers an example -> scores [B, C], hidden [B, H]; mask [B, H] multiplies the hidden units."""
    x = x.reshape(len(x), -1)
    # exercise: eqs. 1 and 2; `mask`, where it is not None, multiplies the hidden units
    hidden = np.maximum(x @ params["W1"] + params["b1"], 0)
    if mask is not None:
        hidden *= mask
    scores = hidden @ params["W2"] + params["b2"]
    # end exercise
    return scores, hidden


def predict(params, x):
    """The class with the highest score, int [B]."""
    # exercise: use `forward`
    return forward(params, x)[0].argmax(axis=1)
    # end exercise


def accuracy(params, x, y):
    """Per cent of the examples classified right."""
    return 100 * float((predict(params, x) == y).mean())


# %% [markdown]
# ## Loss and gradients
# Softmax cross-entropy, plus a price on large weights (not on biases: they only shift):
#
# $$L = -\frac1B \sum_n \log \frac{e^{s_{n y_n}}}{\sum_c e^{s_{nc}}} + \frac{\lambda}{2}\bigl(|W_1|^2 + |W_2|^2\bigr)
#   \quad(3), \qquad \delta_2 = \frac{\partial L}{\partial s} = \frac{p - \text{onehot}(y)}{B} \quad(4).$$
#
# Backwards through eqs. 2 and 1, layer by layer (the ReLU lets through where it was on, the mask as it did forwards):
#
# $$\frac{\partial L}{\partial W_2} = h^\top \delta_2 + \lambda W_2, \quad
#   \delta_1 = (\delta_2 W_2^\top) \odot [h > 0] \odot \text{mask}, \quad
#   \frac{\partial L}{\partial W_1} = x^\top \delta_1 + \lambda W_1, \quad
#   \frac{\partial L}{\partial b_l} = \sum_n \delta_l \quad(5).$$


# %%
def loss(params, x, y, reg=0.0, mask=None):
    """Eq. 3 (a number) on x [B, ...] with labels y [B], and its derivative by each parameter, by name."""
    scores, hidden = forward(params, x, mask)
    x, rows, found = x.reshape(len(x), -1), np.arange(len(y)), {}
    # exercise: eqs. 3 to 5; take the largest score off each row first: p stays, and no exponential can overflow
    scores -= scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    value = -log_p[rows, y].mean() + 0.5 * reg * sum((params[name] ** 2).sum() for name in ("W1", "W2"))
    delta = np.exp(log_p)
    delta[rows, y] -= 1
    delta /= len(y)
    found["W2"] = hidden.T @ delta + reg * params["W2"]
    found["b2"] = delta.sum(axis=0)
    delta = (delta @ params["W2"].T) * (hidden > 0)
    if mask is not None:
        delta *= mask
    found["W1"] = x.T @ delta + reg * params["W1"]
    found["b1"] = delta.sum(axis=0)
    # end exercise
    return float(value), found


# %% [markdown]
# ## Training
# A `Recipe` is all that can be set; its defaults are the network as the assignment hands it out. After every epoch the
# learning rate is multiplied by `decay`. Momentum lets steps add up where they agree: $v \leftarrow \mu v - \eta g$,
# $w \leftarrow w + v$ (6); $\mu = 0$ is plain gradient descent.


# %%
@dataclasses.dataclass
class Recipe:
    """Settings of one training."""

    hidden: int = 50
    scale: float | None = 1e-4  # standard deviation of the first weights; None: He's
    unit: float = 64.0  # factor on the inputs, which come with variance 1; 64: about that of pixels in 0..255
    lr: float = 1e-4
    decay: float = 0.95  # of the learning rate, after each epoch
    reg: float = 0.5
    batch: int = 200
    epochs: int = 4
    momentum: float = 0.0
    keep: float = 1.0  # below 1: dropout
    flip: bool = False  # mirror half of the pictures of every batch


def step(params, velocity, x, y, lr, recipe, rng):
    """One step on the batch (x, y), in place; returns the loss before it."""
    mask = None
    if recipe.keep < 1:
        mask = (rng.random((len(x), recipe.hidden), dtype=np.float32) < recipe.keep) / x.dtype.type(recipe.keep)
    # exercise: loss and gradients, then eq. 6 for every parameter
    value, found = loss(params, x, y, recipe.reg, mask)
    for name, gradient in found.items():
        velocity[name] = recipe.momentum * velocity[name] - lr * gradient
        params[name] += velocity[name]
    # end exercise
    return value


def train(recipe, examples, held_out, classes, seed, name):
    """Train on examples = (x, y), x [N, ...]; returns parameters and a history: `losses` by step, the rest by epoch.

    Where the loss stops being finite, so does the training: a rate too high is a result like another.
    """
    (x, y), unit = examples, examples[0].dtype.type(recipe.unit)
    params = create(np.random.default_rng(seed), x[0].size, recipe.hidden, classes, recipe.scale, x.dtype)
    velocity = dict.fromkeys(params, 0)
    history = {"losses": [], "loss": [], "train_accuracy": [], "validation_accuracy": []}
    for epoch in range(recipe.epochs):
        rng, curve = np.random.default_rng((seed, epoch)), []
        order, lr = rng.permutation(len(x)), recipe.lr * recipe.decay**epoch
        for first in range(0, len(x) - recipe.batch + 1, recipe.batch):
            rows = order[first : first + recipe.batch]
            batch = unit * x[rows]
            if recipe.flip:
                mirrored = rng.random(len(batch)) < 0.5
                batch[mirrored] = batch[mirrored][:, :, ::-1]
            curve.append(step(params, velocity, batch, y[rows], lr, recipe, rng))
        history["losses"] += curve
        history["loss"].append(float(np.mean(curve)))
        history["train_accuracy"].append(accuracy(params, unit * x[:1000], y[:1000]))
        history["validation_accuracy"].append(accuracy(params, unit * held_out[0], held_out[1]))
        print(f"{name}, epoch {epoch + 1}/{recipe.epochs}: loss {history['loss'][-1]:.3f}, "
              f"validation {history['validation_accuracy'][-1]:.1f} %", flush=True)  # fmt: skip
        if not np.isfinite(curve[-1]):
            break
    return params, history


# %% [markdown]
# ## A toy to calculate by hand
# Small whole numbers give whole scores, hence a loss in closed form: with the scores below, the three examples lose
# $\log(2 + e^{-1})$, $\log(1 + e + e^{-3})$ and $\log(1 + e^{-7} + e^{-10})$. Then every derivative against finite
# differences, the library's network and GradientTape; five points learned by heart; and fifty pictures, all the same.

# %%
TOY_X, TOY_Y = np.array([[1.0, 2], [-1, 1], [2, -1]]), np.array([2, 1, 0])
TOY_PARAMS = {"W1": np.array([[1.0, -1, 2], [0, 1, -1]]), "b1": np.array([0.0, 1, -1]),
              "W2": np.array([[1.0, 0, -1], [0, 1, 1], [1, -1, 0]]), "b2": np.array([0.0, 0, 1])}  # fmt: skip
TOY_SCORES = np.array([[1.0, 2, 2], [0, 3, 4], [6, -4, -1]])
TOY_REG = 0.1  # the squares of W1 add up to 8, those of W2 to 6
TOY_LOSS = np.log([2 + np.exp(-1), 1 + np.e + np.exp(-3), 1 + np.exp(-7) + np.exp(-10)]).mean() + TOY_REG * 14 / 2


def check_toy(rng):
    """Differences from what was worked out otherwise, by name."""
    net = nets.cast(nets.Net(TOY_PARAMS), np.float64)  # a copy: the finite differences change it
    scores, _ = forward(net.params, TOY_X)
    value, found = loss(net.params, TOY_X, TOY_Y, TOY_REG)
    checked = gradcheck.check(lambda: loss(net.params, TOY_X, TOY_Y, TOY_REG)[0], net.params, found)
    _, plain = loss(net.params, TOY_X, TOY_Y)
    library = nets.backward(net, losses.softmax_cross_entropy(scores, TOY_Y)[1], nets.forward(net, TOY_X)[1])
    points, params = 3 * rng.standard_normal((5, 4)), create(rng, 4, 10, 3, scale=0.1, dtype=np.float64)
    velocity, labels = dict.fromkeys(params, 0), np.array([0, 1, 2, 2, 1])
    curve = [step(params, velocity, points, labels, 0.1, Recipe(reg=1e-5), rng) for _ in range(200)]
    return {"toy_score_difference": float(np.abs(scores - TOY_SCORES).max()),
            "toy_loss_difference": float(abs(value - TOY_LOSS)),
            "toy_gradient_error": max(check.relative for check in checked),
            "toy_library_difference": twin.largest_difference(plain, library),
            "toy_tape_difference": twin.largest_difference(plain, twin.gradients(net, TOY_X, TOY_Y)),
            "toy_training_loss": curve[-1]}  # fmt: skip


# %% [markdown]
# ## Debugging
# The network as handed out ends near 29 %. What do its curves say? For long nothing happens; then the loss falls, and
# still falls at the end; training and validation accuracy are the same: it has hardly begun. Two numbers tell why:
#
# - *idle steps*, until the loss is 0.1 below its first value. By eq. 5 the gradient of each layer has the other as a
#   factor, so that from next to zero both grow by so many per cent a step: ten times the rate, a tenth of the wait.
# - *likeness*, the mean |cosine| between two hidden units' templates. From next to zero all grow along the same few
#   directions, those in which the classes' averages differ: fifty units, a few pictures.
#
# The mends, one on top of the other: ten times the rate; pixels of unit variance, and weights as He et al. draw them,
# so that signals keep their size from the start (with rate and $\lambda$ to match: inputs 64 times smaller want $W_1$
# 64 times larger); then room, ten times as many units.


# %%
def ladder(cfg):
    """The recipes of the debugging, by name, each changing the one before."""
    default = Recipe(epochs=cfg.debug_epochs)
    faster = dataclasses.replace(default, lr=10 * default.lr)
    scaled = dataclasses.replace(faster, scale=None, unit=1.0, lr=0.1, reg=1e-4)
    wider = dataclasses.replace(scaled, hidden=500)
    return {"default": default, "rate x 10": faster, "scaled pixels, He weights": scaled, "500 units": wider}


def symptoms(params, history):
    """What the last weights and the curves say of a training, by name."""
    losses, templates = np.array(history["losses"]), params["W1"] / np.linalg.norm(params["W1"], axis=0)
    moved = np.convolve(losses, np.ones(10) / 10, mode="valid") < losses[0] - 0.1
    found = {part: history[f"{part}_accuracy"][-1] for part in ("train", "validation")}
    found["idle steps"] = int(moved.argmax()) if moved.any() else len(losses)
    found["likeness"] = float(np.abs(templates.T @ templates)[~np.eye(templates.shape[1], dtype=bool)].mean())
    return found | {"last loss": history["loss"][-1]}


# %% [markdown]
# ## Search
# Learning rate and regularisation act by factors, so they are drawn log-uniformly; drawn, since twelve draws try twelve
# values of what matters, a grid of twelve three or four. The last network takes the best and adds what a short trial
# would not show: width, dropout, mirroring and patience. Its templates are drawn less the noise that they began with.


# %%
def draw_recipes(cfg):
    """The recipes of the random search."""
    rng = np.random.default_rng((cfg.seed, 1))
    return [Recipe(int(rng.choice([100, 200, 400])), None, 1.0, lr=float(10 ** rng.uniform(-3.5, -1)), decay=0.7,
                   reg=float(10 ** rng.uniform(-4.5, -1.5)), epochs=cfg.trial_epochs, momentum=0.9)
            for _ in range(cfg.trials)]  # fmt: skip


def plot_weights(weights, shape, title):
    """The templates of the 40 hidden units with the largest weights [D, H]; grey is 0."""
    strongest = np.argsort(-np.linalg.norm(weights, axis=0))[:40]
    pictures = weights.T[strongest].reshape(-1, *shape)
    scaled = 0.5 + pictures / np.abs(pictures).max(axis=(1, 2, 3), keepdims=True) / 2
    return core.plots.image_grid(scaled, columns=10, title=f"{title} network: first-layer weights less their start")


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a1_two_layer_net", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        images = core.data.three_way(data, cfg.train, cfg.validation, cfg.test)
        mean = images.x_train.mean(axis=0, dtype=np.float64).astype(np.float32)
        spread = (images.x_train[:2000] - mean).std()
        x, x_val, x_test = ((part - mean) / spread for part in (images.x_train, images.x_val, images.x_test))
        checks, classes = check_toy(np.random.default_rng((cfg.seed, 2))), len(data.labels)

        def arm(name, recipe, count=None):  # on the first `count` images; its network goes to a file
            examples = x[:count], images.y_train[:count]
            params, history = train(recipe, examples, (x_val, images.y_val), classes, cfg.seed, name)
            nets.save(nets.Net(params), run.folder / f"{name}.npz")
            return vars(recipe) | history | symptoms(params, history)

        def arms(recipes):  # each of them once, even where the run is interrupted
            with np.errstate(over="ignore", invalid="ignore"):  # of trainings that diverge
                return {name: run.once(name, functools.partial(arm, name, how)) for name, how in recipes.items()}

        rungs = arms(ladder(cfg))
        trials = arms({f"trial {i + 1} of {cfg.trials}": recipe for i, recipe in enumerate(draw_recipes(cfg))})
        by_heart = Recipe(100, None, 1.0, lr=0.02, decay=1.0, reg=0.0, batch=25, epochs=30, momentum=0.9)
        overfit = run.once("50 images", lambda: arm("50 images", by_heart, count=50))
        found = max(trials.values(), key=lambda row: row["validation"])
        recipe = Recipe(cfg.hidden, None, 1.0, lr=found["lr"], decay=0.05 ** (1 / cfg.epochs), reg=found["reg"],
                        epochs=cfg.epochs, momentum=0.9, keep=cfg.keep, flip=True)  # fmt: skip
        best = arms({"best": recipe})["best"]
        keys = "hidden", "lr", "reg", "train", "validation", "last loss", "idle steps", "likeness"
        tables = {"debugging": rungs | {"best": best}, "search": trials}
        run.record |= {"data": data.provenance, "history": {key: best[key] for key in ("loss", "validation_accuracy")}}
        run.record["tables"] = {table: [{"network": name} | {key: row[key] for key in keys}
                                        for name, row in rows.items()] for table, rows in tables.items()}  # fmt: skip
        for name, how in ("default", rungs["default"]), ("best", best):
            net = nets.load(run.folder / f"{name}.npz")
            start = create(np.random.default_rng(cfg.seed), mean.size, how["hidden"], classes, how["scale"])
            run.figure(f"weights_{name}", plot_weights(net.params["W1"] - start["W1"], mean.shape, name))
        run.record["metrics"] = {
            "test_accuracy": accuracy(net.params, x_test, images.y_test),
            "validation_accuracy": best["validation"], "search_accuracy": found["validation"],
            "default_accuracy": rungs["default"]["validation"], "train_accuracy": best["train"],
            "initial_loss_excess": rungs["default"]["losses"][0] - float(np.log(classes)),
            "overfit_50_loss": overfit["last loss"], "overfit_50_accuracy": overfit["train_accuracy"][-1], **checks,
        }  # fmt: skip
        smooth = {name: np.convolve(arm["losses"], np.ones(10) / 10, mode="valid") for name, arm in rungs.items()}
        run.figure("debugging", core.plots.curves(smooth, xlabel="step", ylabel="loss, mean of ten steps"))
        accuracies = {name: {part: arm[f"{part}_accuracy"] for part in ("train", "validation")}
                      for name, arm in (rungs | {"best": best}).items()}  # fmt: skip
        run.figure("accuracies", core.plots.panels(accuracies, size=(2.6, 2.6), ylim=(0, 100)))
        run.figure("search", linear.draw_search(list(trials.values())))
    return run.record


if __name__ == "__main__":
    core.cli(main)
