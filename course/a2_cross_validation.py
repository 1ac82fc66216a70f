"""Assignment 2 - Model search: random, coarse to fine and by successive halving at one budget; and what choosing costs.

Paper:     Li, Jamieson, DeSalvo, Rostamizadeh, Talwalkar 2018, "Hyperband", JMLR 18; Bergstra, Bengio 2012, JMLR 13
Task:      choose rate, width, depth, dropout, weight decay of a batch-normalised network by 5-fold cross-validation
Shapes:    image [32,32,3], halved -> x [B,K,768], a column for each fold -> K networks side by side -> scores [B,K,10]
Reference: none with these images: the comparison is between the searches, at the same number of epochs
Run:       python -m course.a2_cross_validation --preset cpu --seed 0
Departs:   the network is a2_fully_connected's kind, on a part of the pictures, halved, so that tens of settings fit in
           minutes; successive halving is keras-tuner's, in Hyperband's brackets from the boldest to none
"""

# %%
import contextlib
import dataclasses
import io
import types

import keras
import keras_tuner
import numpy as np
from keras_tuner import oracles
from matplotlib import pyplot as plt

from course import core

REFERENCE = {}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the folds, the settings drawn and every network
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    images: int = 20_000  # first training images: cross-validated
    audit: int = 10_000  # the next ones: they judge the choosing, and choose nothing
    folds: int = 5  # parts of `images`, each held out once
    epochs: int = 27  # of a trial that is run to its end
    factor: int = 3  # of successive halving: one trial in so many goes on
    iterations: int = 2  # times that Hyperband goes through its brackets
    batch: int = 100  # images a step, in each fold


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "images": 600, "audit": 500, "folds": 3, "epochs": 3, "iterations": 1},
    "cpu": {"stand_in": "fashion_mnist", "images": 4_000, "audit": 4_000, "epochs": 9, "batch": 160},
    "full": {},
}


# %% [markdown]
# ## K networks side by side
# In K-fold cross-validation K networks judge a setting, each trained without one part of the images and tested on it.
# They never meet, so they can be trained as one model: every array has an axis for the fold, with
#
# $$z_{bko} = \sum_i x_{bki} W_{kio} + c_{ko} \quad(1),$$
#
# and the batch of fold $k$ comes from its own training images. The mean loss over examples and folds gives the weights
# of fold $k$ $1/K$ of their gradient, but Adam divides by the gradient's size, so nothing changes. Batch normalisation
# must keep the folds apart as well, or it carries statistics of images into the fold that holds them out.


# %%
@keras.saving.register_keras_serializable("course.a2_cross_validation")
class FoldDense(keras.layers.Layer):
    """Eq. 1: x [B, K, D] -> [B, K, units], a matrix and a bias of its own for each fold; weights as He et al. draw."""

    def __init__(self, units, **options):
        super().__init__(**options)
        self.units = units

    def build(self, shape):
        _, folds, inputs = shape
        start = keras.initializers.RandomNormal(stddev=(2 / inputs) ** 0.5)  # Keras would count the folds as inputs
        self.kernel = self.add_weight(shape=(folds, inputs, self.units), initializer=start, name="kernel")
        self.bias = self.add_weight(shape=(folds, self.units), initializer="zeros", name="bias")

    def call(self, x):
        # exercise: eq. 1, by keras.ops.einsum
        return keras.ops.einsum("bki,kio->bko", x, self.kernel) + self.bias
        # end exercise

    def get_config(self):
        return super().get_config() | {"units": self.units}


def build_model(inputs, folds, classes, *, rate, width, depth, dropout, decay):
    """`depth` times dense, batch norm, ReLU, dropout, and scores, for each fold: x [B, K, D] -> [B, K, C]."""
    x = images = keras.Input((folds, inputs))
    for _ in range(depth):
        x = FoldDense(width)(x)
        x = keras.layers.Reshape((folds * width,))(x)  # each unit of each fold has statistics of its own
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Reshape((folds, width))(x)
        x = keras.layers.Dropout(dropout)(keras.layers.ReLU()(x))
    model = keras.Model(images, FoldDense(classes, dtype="float32")(x))
    loss, adam = keras.losses.SparseCategoricalCrossentropy(from_logits=True), keras.optimizers.AdamW(rate, decay)
    model.compile(core.runtime.scaled(adam), loss, jit_compile=core.runtime.jit())
    model.optimizer.build(model.trainable_variables)  # else Keras would trace the training step twice
    return model


def accuracies(model, x, y):
    """Per cent right of each fold's network [K], on x [N, K, D] with y [N, K], or on the same x [N, D] with y [N]."""
    folds = model.output_shape[1]
    if x.ndim == 2:
        x, y = np.repeat(x[:, None], folds, axis=1), np.repeat(y[:, None], folds, axis=1)
    return 100 * np.mean(keras.ops.convert_to_numpy(model(x, training=False)).argmax(axis=-1) == y, axis=0)


# %% [markdown]
# ## The folds
# Fold $k$ holds out the $k$-th part of a random order and trains on the others. Pixels are standardised by mean and
# deviation of *all* the images cross-validated: these tell next to nothing of a part held out, and no label.


# %%
def fold_rows(count, folds, rng):
    """Rows to train on [N (K-1)/K, K] and to hold out [N/K, K], a column a fold; K at least 2 and a divisor of N."""
    if folds < 2 or count % folds:
        raise core.InputError(f"{count} images cannot be put into {folds} equal folds: change --images or --folds")
    parts = rng.permutation(count).reshape(-1, folds)
    # exercise: column k of `held` is part k, column k of `train` all the others
    held = parts
    train = np.stack([np.delete(parts, k, axis=1).ravel() for k in range(folds)], axis=1)
    # end exercise
    return train, held


def halve(x):
    """uint8 [N, H, W, C] -> averages of 2x2 pixels, flat [N, H W C / 4], float32 in 0..1."""
    n, rows, columns, channels = x.shape
    x = x.reshape(n, rows // 2, 2, columns // 2, 2, channels)
    return x.mean(axis=(2, 4), dtype=np.float32).reshape(n, -1) / 255


# %% [markdown]
# ## The space
# Rate and decay act by factors, so they are drawn log-uniformly (uniformly in $\log_{10}$), width too. `narrowed` is
# the step from coarse to fine: each interval shrinks to a third of its length, around the best setting so far (the
# first half of the random search: what is compared is how the second half is spent).

# %%
SPACE = {  # name: (smallest, largest, sampling)
    "rate": (1e-4, 1e-1, "log"),
    "decay": (1e-4, 1.0, "log"),
    "dropout": (0.0, 0.7, "linear"),
    "width": (32, 512, "log"),
    "depth": (1, 3, "linear"),
}


def draw(hp, space):
    """A setting of the space, by name; `hp`, keras-tuner's, notes each question and gives the trial's answer."""
    return {
        name: (hp.Int if isinstance(low, int) else hp.Float)(name, low, high, sampling=sampling)
        for name, (low, high, sampling) in space.items()
    }


def narrowed(space, best):
    """The space with every interval a third as long (in logarithms where it is sampled so), around `best`, inside."""
    fine = {}
    for name, (low, high, sampling) in space.items():
        # exercise: the new interval (bottom, top); keep it inside (low, high)
        to, back = (np.log, np.exp) if sampling == "log" else (float, float)
        length = (to(high) - to(low)) / 3
        bottom = float(np.clip(to(best[name]) - length / 2, to(low), to(high) - length))
        bottom, top = float(back(bottom)), float(back(bottom + length))
        # end exercise
        fine[name] = (round(bottom), round(top), sampling) if isinstance(low, int) else (bottom, top, sampling)
    return fine


# %% [markdown]
# ## The search
# In keras-tuner an *oracle* proposes settings and a *tuner* tries them. One tuner does for all searches here: the
# random oracle asks for whole trials; Hyperband's asks for many short ones, then for the best third of them to go on
# from where they stopped, three times as long, and so on. The answer to both is the mean over the folds. The tuner's
# state is on disk after every trial, so that an interrupted search goes on.


# %%
class FoldTuner(keras_tuner.Tuner):
    """Tries settings on all folds at once: `search(parts, cfg)`; parts as `main` makes them."""

    def run_trial(self, trial, parts, cfg):
        """Train (on) the networks of one setting -> their accuracies, in per cent."""
        values = trial.hyperparameters.values
        first, last = values.get("tuner/initial_epoch", 0), values.get("tuner/epochs", cfg.epochs)
        keras.utils.set_random_seed(cfg.seed + 1_000 + int(trial.trial_id))  # whatever was tried or interrupted before
        keras.backend.clear_session(free_memory=False)
        model = self.hypermodel.build(trial.hyperparameters)
        if values.get("tuner/trial_id"):  # it goes on
            model.load_weights(self.weights(values["tuner/trial_id"]))
        fit(model, parts.x, parts.y, parts.train, first, last, cfg)
        if "tuner/epochs" in values and last < cfg.epochs:
            model.save_weights(self.weights(trial.trial_id))
        held = accuracies(model, parts.x[parts.held], parts.y[parts.held])
        audit = accuracies(model, parts.x_audit, parts.y_audit)
        return {"accuracy": float(held.mean()), "spread": float(held.std(ddof=1)), "first_fold": float(held[0]),
                "audit": float(audit.mean()), "audit_first_fold": float(audit[0]), "epochs": last}  # fmt: skip

    def weights(self, trial_id):
        """File of a trial's networks and optimizer."""
        return f"{self.get_trial_dir(trial_id)}/networks.weights.h5"

    def on_trial_end(self, trial):
        """Save, and print a line."""
        super().on_trial_end(trial)
        row = row_of(trial)
        where = f"{self.project_name} {trial.trial_id}, to epoch {row['epochs']}: {row['accuracy']:.1f} %"
        print(where, ", ".join(f"{name} {row[name]:.3g}" for name in SPACE), sep=", ", flush=True)


def fit(model, x, y, rows, first, last, cfg):
    """Train on x[rows] [N, K, D], a column for each fold, from epoch `first` to `last`, counted from 0."""
    model.fit(x[rows], y[rows], batch_size=cfg.batch, initial_epoch=first, epochs=last, verbose=0)


def row_of(trial):
    """A trial as a row of a table: its setting, the epochs it reached and those it cost, what it scored."""
    values, metrics = trial.hyperparameters.values, trial.metrics
    row = {"trial": trial.trial_id, "from": values.get("tuner/trial_id")} | {name: values[name] for name in SPACE}
    row |= {name: metrics.get_last_value(name) for name in metrics.metrics}
    return row | {"epochs": int(row["epochs"]), "spent": int(row["epochs"]) - values.get("tuner/initial_epoch", 0)}


def search(name, oracle, space, parts, cfg, folder):
    """Run the search to its end, from where it was -> its trials as rows, in the order in which they were run."""

    def build(hp):
        with parts.strategy.scope():
            return build_model(parts.x.shape[1], cfg.folds, int(parts.y.max()) + 1, **draw(hp, space))

    with contextlib.redirect_stdout(io.StringIO()):  # it has a word to say when it goes on with a search
        tuner = FoldTuner(oracle, build, directory=str(folder), project_name=name)
    tuner.oracle.verbose = 0
    tuner.search(parts, cfg)
    return [row_of(tuner.oracle.get_trial(number)) for number in tuner.oracle.start_order]


# %% [markdown]
# ## What choosing costs
# The best of many measured accuracies is too good: the winner is in part the luckiest. How much? The audit images judge
# every trial too, and choose nothing. For the winner among $n$ trials, drawn again and again from those there are, the
# *optimism* is its accuracy where it was chosen minus that on the audit images, less the same difference of the average
# trial (the two sets are not equally hard). One hold-out part is noisier than all five, so its winner is luckier.


# %%
def optimism(rows, score, audit, rng, draws=2_000):
    """For n = 1 .. all trials: the mean optimism of the winner by `score` among n of them [len(rows)], in points."""
    scores, gaps = np.array([row[score] for row in rows]), np.array([row[score] - row[audit] for row in rows])
    orders = np.array([rng.permutation(len(rows)) for _ in range(draws)])
    # exercise: for each n, the winner among the first n trials of each order
    winners = [orders[np.arange(draws), scores[orders[:, :n]].argmax(axis=1)] for n in range(1, len(rows) + 1)]
    # end exercise
    return np.array([gaps[chosen].mean() - gaps.mean() for chosen in winners])


def best(rows):
    """The row with the highest cross-validated accuracy."""
    return max(rows, key=lambda row: row["accuracy"])


def draw_searches(searches):
    """The best so far over the epochs spent; and which trials successive halving sent on."""
    figure, (axis, rungs) = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    for name, rows in searches.items():
        spent, found = np.cumsum([row["spent"] for row in rows]), [row["accuracy"] for row in rows]
        (line,) = axis.step(spent, np.maximum.accumulate(found), where="post", label=name.replace("_", " "))
        axis.scatter(spent, found, 10, color=line.get_color(), alpha=0.6)
    axis.set(xlabel="epochs spent, each of all folds", ylabel="cross-validated accuracy, %", title="best so far")
    axis.legend()
    by_trial = {row["trial"]: row for row in searches["halving"]}
    for row in by_trial.values():
        way = [by_trial[row["from"]], row] if row["from"] else [row]
        rungs.plot([at["epochs"] for at in way], [at["accuracy"] for at in way], "o-", markersize=4)
    rungs.set(xlabel="epochs trained", title="successive halving: who goes on", xscale="log")
    ticks = sorted({row["epochs"] for row in by_trial.values()})
    rungs.set_xticks(ticks, ticks)
    rungs.minorticks_off()
    return figure


def draw_settings(searches):
    """Accuracy over each hyper-parameter; area: the epochs of the trial."""
    figure, axes = plt.subplots(1, len(SPACE), figsize=(12.5, 2.8), sharey=True)
    for axis, (name, (_, _, sampling)) in zip(axes, SPACE.items(), strict=True):
        for label, rows in searches.items():
            x, y, epochs = ([row[key] for row in rows] for key in (name, "accuracy", "epochs"))
            axis.scatter(x, y, 5 * np.array(epochs), alpha=0.6, label=label.replace("_", " "))
        axis.set(xlabel=name, xscale=sampling)
        axis.minorticks_off()
    axes[0].set_ylabel("cross-validated accuracy, %")
    axes[-1].legend(fontsize=7, markerscale=0.7)
    return figure


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a2_cross_validation", options, cfg, scope=False) as run:  # clear_session would lose it
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        images = core.data.three_way(data, cfg.images, cfg.audit, len(data.x_test))
        x = halve(images.x_train)
        x, x_audit, x_test = ((halve(part) - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
                              for part in (images.x_train, images.x_val, images.x_test))  # fmt: skip
        train, held = fold_rows(cfg.images, cfg.folds, np.random.default_rng(cfg.seed))
        parts = types.SimpleNamespace(x=x, y=images.y_train, train=train, held=held, x_audit=x_audit,
                                      y_audit=images.y_val, strategy=run.strategy)  # fmt: skip

        def searched(name, oracle, seed, space=SPACE, **options):
            proposes = oracle(keras_tuner.Objective("accuracy", "max"), seed=cfg.seed + seed,
                              max_consecutive_failed_trials=1, **options)  # fmt: skip
            return run.once(name, lambda: search(name, proposes, space, parts, cfg, run.folder / "checkpoints"))

        halving = searched("halving", oracles.HyperbandOracle, 1, max_epochs=cfg.epochs, factor=cfg.factor,
                           hyperband_iterations=cfg.iterations)  # fmt: skip
        count = sum(row["spent"] for row in halving) // cfg.epochs  # whole trials for the same number of epochs
        random = searched("random", oracles.RandomSearchOracle, 2, max_trials=count)
        coarse, space = random[: (count + 1) // 2], narrowed(SPACE, best(random[: (count + 1) // 2]))
        fine = searched("fine", oracles.RandomSearchOracle, 3, space, max_trials=count - len(coarse))
        searches = {"random": random, "coarse_to_fine": coarse + fine, "halving": halving}
        chosen = best(row for row in halving + random + fine if row["epochs"] == cfg.epochs)
        keras.utils.set_random_seed(cfg.seed)  # last, as many networks, each of them on all the images
        with run.strategy.scope():
            final = build_model(x.shape[1], cfg.folds, len(data.labels), **{name: chosen[name] for name in SPACE})
        fit(final, x, images.y_train, np.repeat(np.arange(len(x))[:, None], cfg.folds, axis=1), 0, cfg.epochs, cfg)
        test, rng = accuracies(final, x_test, images.y_test), np.random.default_rng((cfg.seed, 1))
        costs = {"one hold-out part": optimism(random, "first_fold", "audit_first_fold", rng),
                 "all folds": optimism(random, "accuracy", "audit", rng)}  # fmt: skip
        run.record |= {"data": data.provenance, "chosen": chosen, "tables": searches}
        run.record["metrics"] = {
            "test_accuracy": test.mean(), "cross_validated_accuracy": chosen["accuracy"],
            **{f"optimism_{of.split()[0]}": cost[count // 2 - 1] for of, cost in costs.items()},  # of half the trials
            "test_deviation": test.std(ddof=1), "fold_deviation": chosen["spread"], "audit_accuracy": chosen["audit"],
            **{f"{name}_best": best(found)["accuracy"] for name, found in searches.items()},
            **{f"{name}_best_audit": best(found)["audit"] for name, found in searches.items()},
            **{f"{name}_epochs": sum(row["spent"] for row in found) for name, found in searches.items()},
            "halving_settings": sum(not row["from"] for row in halving), "random_settings": len(random),
        }  # fmt: skip
        run.figure("optimism", core.plots.curves(costs, xlabel="trials to choose from", ylabel="points too good"))
        run.figure("searches", draw_searches(searches))
        run.figure("settings", draw_settings(searches))
    return run.record


if __name__ == "__main__":
    core.cli(main)
