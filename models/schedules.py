"""What day 11's comparison of learning-rate schedules runs on: the optimizer, the callbacks and the figures."""

import keras
import numpy as np
from keras import ops
from matplotlib import pyplot as plt

from course.core import plots, runtime


class Momentum(keras.optimizers.SGD):
    """Gradient descent with momentum that looks rate and momentum of each step up in a table of its own.

    v <- mu_t v - eta_t g,  w <- w + v.  Keras's optimizers follow a schedule of the rate, but keep the momentum as a
    constant of the graph; a table serves both, and every schedule, without the graph being traced again.
    """

    def __init__(self, steps, **options):
        super().__init__(1.0, momentum=0.9, **options)
        self.steps = steps

    def get_config(self):
        return {"steps": self.steps, "name": self.name}

    def build(self, variables):
        super().build(variables)
        self.rates = self.add_variable((self.steps,), name="rates", initializer="zeros")
        self.momenta = self.add_variable((self.steps,), name="momenta", initializer="zeros")

    def start(self, rates, momenta):
        """Forget what was, and follow these rates and momenta [steps of one training, at most `self.steps`]."""
        for variable in self.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        for table, values in ((self.rates, rates), (self.momenta, momenta)):
            table.assign(np.pad(np.asarray(values, np.float32), (0, self.steps - len(values))))

    def update_step(self, gradient, variable, learning_rate):
        rate, mu = (ops.cast(ops.take(table, self.iterations), variable.dtype) for table in (self.rates, self.momenta))
        velocity = self.momentums[self._get_variable_index(variable)]
        self.assign(velocity, mu * velocity - rate * ops.cast(gradient, variable.dtype))
        self.assign_add(variable, velocity)


def ready(model, table, steps):
    """Compile a classifier with `Momentum` of that table, `steps` of it in each call of the train function."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = runtime.scaled(Momentum(table))
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=steps, jit_compile=runtime.jit())
    model.optimizer.build(model.trainable_variables)
    return model


def momentum(model):
    """The `Momentum` of a model that is `ready`, which in float16 stands inside the loss scaling."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def begin(model, rates, momenta):
    """Forget the training that was, its loss scale included, and follow these rates and momenta [steps]."""
    if momentum(model) is not model.optimizer:
        model.optimizer.dynamic_scale.assign(model.optimizer.initial_scale)
        model.optimizer.step_counter.assign(0)
    momentum(model).start(rates, momenta)


class Losses(keras.callbacks.Callback):
    """Keeps the mean loss of each call of the train function (`steps_per_execution` steps); stops at NaN."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()  # else it is the mean since the epoch began

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(logs["loss"])
        self.model.stop_training = not np.isfinite(logs["loss"])


class Snapshots(keras.callbacks.Callback):
    """The probabilities of the test images after the epochs that end a period of SGDR."""

    def __init__(self, x, epochs):
        super().__init__()
        self.x, self.epochs, self.answers = x, epochs, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            self.answers.append(keras.activations.softmax(self.model.predict(self.x, batch_size=1_000, verbose=0)))


class OnPlateau(keras.callbacks.Callback):
    """Makes the rates to come three times smaller where the validation loss has not fallen for `patience` epochs.

    `rates`: the table [steps] that the training started with, changed in place; `steps`: of an epoch.
    """

    def __init__(self, rates, steps, patience):
        super().__init__()
        self.rates, self.steps, self.patience, self.best, self.waited = rates, steps, patience, np.inf, 0

    def on_epoch_end(self, epoch, logs=None):
        self.waited = 0 if logs["val_loss"] < self.best else self.waited + 1
        self.best = min(self.best, logs["val_loss"])
        if self.waited >= self.patience:
            self.waited = 0
            self.rates[(epoch + 1) * self.steps :] /= 3
            table = momentum(self.model).rates
            table.assign(np.pad(self.rates.astype(np.float32), (0, table.shape[0] - len(self.rates))))


def smooth(values, keep=0.9):
    """Exponential moving average [T] without the bias towards 0 at its beginning."""
    average, total = np.empty(len(values)), 0.0
    for t, value in enumerate(values):
        total = keep * total + (1 - keep) * value
        average[t] = total / (1 - keep ** (t + 1))
    return average


def accuracy(scores, y):
    """Share of right answers, in per cent."""
    return 100 * float((scores.argmax(axis=1) == y).mean())


def epochs_to(target, curve):
    """Epochs, interpolated, until a curve [epochs] first reaches `target`; None where it never does."""
    curve = np.asarray(curve)
    if not (curve >= target).any():
        return None
    at = int((curve >= target).argmax())
    before = curve[at - 1] if at else 0.0
    return at + (target - before) / (curve[at] - before)


def bounds(rates, losses):
    """What a range test says: rates [T], losses [seeds, T] (NaN after a divergence) -> dict with `low` and `high`.

    `high` is a tenth of the rate at which the smoothed mean loss is lowest; `low` is where a tenth of the whole fall
    has happened, and no more than a quarter of `high`.  Only the steps that all seeds survived are used.
    """
    seen = int(np.isfinite(losses).all(axis=0).cumprod().sum())
    curve = smooth(losses[:, :seen].mean(axis=0))
    lowest = int(curve.argmin())
    begun = int((curve <= curve[0] - 0.1 * (curve[0] - curve[lowest])).argmax())
    high = rates[lowest] / 10
    return {"rates": rates[:seen], "losses": losses[:, :seen], "smooth": curve, "high": high,
            "low": min(rates[begun], high / 4)}  # fmt: skip


def summarise(found):
    """Schedule -> its runs  ->  a row a schedule, and the headline metrics.

    The target that epochs are counted to is the mean validation accuracy with which the constant rate ends.  The best
    schedule is the one with the best validation accuracy; its test accuracy is what is reported.
    """
    target, rows = float(np.mean([run["validation"][-1] for run in found["constant"]])), []
    for name, runs in found.items():
        tests, counts = [run["test"] for run in runs], [epochs_to(target, run["validation"]) for run in runs]
        reached, losses = [n for n in counts if n is not None], [r["loss"] for r in runs if r["loss"] is not None]
        rows.append({"schedule": name, "peak": runs[0]["peak"],
                     "validation accuracy, %": 100 * float(np.mean([run["validation"][-1] for run in runs])),
                     "test accuracy, %": float(np.mean(tests)), "deviation": float(np.std(tests)),
                     "last training loss": float(np.mean(losses)) if losses else None,
                     "diverged": len(runs) - len(losses), "seeds that reached the target": len(reached),
                     "epochs to the target": float(np.mean(reached)) if reached else None})  # fmt: skip
    best = max(rows, key=lambda row: row["validation accuracy, %"])
    always = [row for row in rows if row["seeds that reached the target"] == len(found["constant"])]
    quickest = min(always, key=lambda row: row["epochs to the target"], default=None)
    print(f"best in the end: {best['schedule']}; first where the constant rate ends: "
          f"{quickest['schedule'] if quickest else 'none'}")  # fmt: skip
    tests = {row["schedule"]: row["test accuracy, %"] for row in rows}
    metrics = {"best_test_accuracy": best["test accuracy, %"], "constant_test_accuracy": tests["constant"]}
    if quickest:
        metrics["epochs_to_constants_accuracy"] = quickest["epochs to the target"]
    return rows, metrics | {
        "one_cycle_test_accuracy": tests["one-cycle"],
        "sgdr_test_accuracy": tests["SGDR"],
        "sgdr_ensemble_test_accuracy": float(np.mean([run["ensemble"] for run in found["SGDR"]])),
        "target_validation_accuracy": 100 * target,
    }


def draw_schedules(found, momenta):
    """The rates as they were used, a panel a schedule; one-cycle's momentum dashed."""
    figure, axes = plt.subplots(2, 6, figsize=(12.5, 4), sharex=True)
    for axis, (name, runs) in zip(axes.flat, found.items(), strict=False):
        axis.plot(np.linspace(0, 1, len(runs[0]["rates"])), runs[0]["rates"])
        axis.set(title=name, ylim=(0, None))
    beside = axes.flat[list(found).index("one-cycle")].twinx()
    beside.plot(np.linspace(0, 1, len(momenta)), momenta, color="#D55E00", linestyle="--")
    beside.set(ylim=(0.8, 1))
    beside.set_ylabel("momentum (dashed)", color="#D55E00")
    beside.grid(False)
    axes.flat[-1].axis("off")
    figure.supxlabel("share of the steps")
    figure.supylabel("learning rate")
    return figure


def draw_range(found):
    """Loss against the growing rate, with the bounds."""
    figure, axes = plt.subplots(figsize=(5.4, 3.4))
    axes.plot(found["rates"], np.transpose(found["losses"]), color="#56B4E9", alpha=0.35, linewidth=0.8)
    axes.plot(found["rates"], found["smooth"], label="mean of the seeds, smoothed")
    for bound, name in (("low", "lower bound"), ("high", "upper bound")):
        axes.axvline(found[bound], color="#D55E00", linestyle="--" if bound == "low" else "-",
                     label=f"{name} {found[bound]:.2g}")  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss",
             ylim=(0, 2 * found["smooth"][0]))  # fmt: skip
    axes.legend()
    return figure


def draw(run, found, rows, tested, momenta):
    """All figures of the comparison: `found` is schedule -> its runs, `rows` their summary, `tested` the range test."""
    run.figure("schedules", draw_schedules(found, momenta))
    run.figure("range_test", draw_range(tested))
    curves = {name: 100 * np.array([one["validation"] for one in runs]) for name, runs in found.items()}
    title = "mean and deviation over the seeds"
    for kind, names in {"down": list(curves)[:6], "cycles": ["constant", *list(curves)[6:]]}.items():
        chosen = {name: curves[name] for name in names}
        run.figure(f"validation_{kind}", plots.curves(chosen, ylabel="validation accuracy, %", title=title))
    ensembles = [one["ensemble"] for one in found["SGDR"]]
    ends = {row["schedule"]: row["test accuracy, %"] for row in rows} | {"SGDR, ensemble": np.mean(ensembles)}
    spread = {row["schedule"]: row["deviation"] for row in rows} | {"SGDR, ensemble": np.std(ensembles)}
    run.figure("test_accuracy", plots.bars(ends, errors=spread, ylabel="test accuracy, %", form="{:.1f}"))
