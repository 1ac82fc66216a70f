"""Day 11 - Learning-Rate Schedules: a rate that warms up, peaks high and ends near zero beats a constant one.

Paper:     Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186; Loshchilov and Hutter
           2017, "SGDR", arXiv:1608.03983; Smith and Topin 2018, "Super-Convergence" (one-cycle), arXiv:1708.07120
Task:      classify small photographs; one network, one budget of steps, eleven ways to set the learning rate
Shapes:    image [B,32,32,3] -> two residual blocks -> logits [B,10]; a schedule: step t (any shape) -> rate
Reference: CIFAR-10 81.4 % after 25,000 steps with a cyclic rate, after 70,000 with a fixed one (Smith 2017)
Run:       python -m course.day11_lr_schedules --preset cpu --seed 0
Departs:   1. preset cpu: 10,000 training images, halved to 16x16, and epochs instead of hours: 55 trainings in minutes
           2. the network is a small residual one, not the papers' (cuda-convnet; Wide ResNet)
"""

# %%
import dataclasses
import time

import keras
import numpy as np
from keras import ops

from course import core
from models import convnets, schedules

REFERENCE = {}  # the papers' networks and step counts are others: their figures are in the header, not beside ours


@dataclasses.dataclass
class Config:
    seed: int = 0  # the first of the seeds
    seeds: int = 3  # trainings of each schedule
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 45_000  # training images
    validation: int = 5_000  # images on which peaks are chosen and epochs to the target counted
    halve: int = 1  # pixels a side averaged into one: 2 makes 32x32 to 16x16
    width: int = 32  # channels of the first convolution
    peaks: tuple[float, ...] = (1.0, 0.33)  # shares of the range test's bound that each schedule chooses from
    epochs: int = 70  # of each training; SGDR's periods are 1/7, 2/7 and 4/7 of them
    batch: int = 128  # images a step
    range_steps: int = 1_000  # steps of the range test


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 512, "validation": 256, "width": 4, "epochs": 2, "seeds": 1,
              "range_steps": 30, "peaks": (1.0,)},
    "cpu": {"stand_in": "fashion_mnist", "train": 10_000, "validation": 2_000, "halve": 2, "width": 8, "epochs": 7,
            "range_steps": 200},
    "full": {},
}  # fmt: skip

# %% [markdown]
# ## Why change the rate at all
# A large step $\eta$ crosses flat stretches quickly and hops over narrow holes, but in the end it rattles about the
# minimum: the noise of the batches keeps the weights at a distance that grows with $\eta$. So one wants large steps
# first and small ones last. A *schedule* is a function $\eta(t)$ of the step $t$. Every one below takes a step, or an
# array of steps, and returns rates; each is a Keras `LearningRateSchedule` that any optimizer accepts and that is saved
# with the model (`get_config`). With $T$ steps in all, peak $\eta_0$ and $p = t / T$:
#
# $$\text{step: } \eta_0\, \gamma^{\#\{b \le t\}} \;(1) \qquad \text{exponential: } \eta_0\, r^{p} \;(2) \qquad
#   \text{polynomial: } \eta_0 (1 - p)^{k} \;(3)$$
#
# $$\text{cosine: } \tfrac{\eta_0}{2} (1 + \cos \pi p) \;(4) \qquad
#   \text{warm-up: } \eta(t) \cdot \min(1, (t + 1) / W) \;(5)$$

# %%
Schedule = keras.optimizers.schedules.LearningRateSchedule


def real(step):
    """The step as float32, whatever it came as: Python number, array or the optimizer's integer variable."""
    return ops.cast(ops.convert_to_tensor(step), "float32")


def passed(step, boundaries):
    """How many of `boundaries` lie at or before `step`; shape of `step`."""
    return sum(ops.cast(real(step) >= boundary, "float32") for boundary in boundaries)


@dataclasses.dataclass
class Step(Schedule):
    """Eq. 1: the rate falls by `factor` at each boundary."""

    peak: float
    boundaries: tuple[int, ...]
    factor: float = 0.1
    get_config = dataclasses.asdict

    def __call__(self, step):
        return self.peak * self.factor ** passed(step, self.boundaries)


@dataclasses.dataclass
class Exponential(Schedule):
    """Eq. 2: the same share is lost at every step; at `total` the rate is `last` of the peak."""

    peak: float
    total: int
    last: float = 0.01
    get_config = dataclasses.asdict

    def __call__(self, step):
        return self.peak * self.last ** (real(step) / self.total)


@dataclasses.dataclass
class Polynomial(Schedule):
    """Eq. 3; power 1 is a straight line down."""

    peak: float
    total: int
    power: float = 1.0
    get_config = dataclasses.asdict

    def __call__(self, step):
        return self.peak * ops.maximum(1 - real(step) / self.total, 0.0) ** self.power


# %% [markdown]
# **SGDR** (eq. 4 with restarts) lets the cosine jump back to the peak at the end of each period, and makes the next one
# $m$ times as long. Before each jump the network is in a minimum of its own: a free ensemble (in few epochs, weak).
#
# **Cyclic rates** go up and down in straight lines between two bounds, with half a cycle of $s$ steps:
#
# $$\eta(t) = \eta_{\min} + (\eta_{\max} - \eta_{\min})\, \gamma^{t} \max(0, 1 - |t / s - 2c + 1|), \qquad
#   c = \lfloor 1 + t / 2s \rfloor \quad(6)$$
#
# With $\gamma < 1$ the tips sink (`exp_range`). **One-cycle** is a single such cycle, followed down to almost
# nothing, and moves the momentum the other way: where steps are long, old gradients should count less.


# %%
@dataclasses.dataclass
class Cosine(Schedule):
    """Eq. 4 in each of `periods` periods; the first takes `first` steps, each next one `growth` times as many."""

    peak: float
    first: int
    growth: int = 2
    periods: int = 1
    get_config = dataclasses.asdict

    def __call__(self, step):
        lengths = [self.first * self.growth**i for i in range(self.periods)]
        starts = [sum(lengths[:i]) for i in range(self.periods)]
        period = passed(step, starts[1:])  # 0 in the first
        into = real(step) - sum(ops.where(period >= i, lengths[i - 1], 0.0) for i in range(1, self.periods))
        share = ops.minimum(into / (self.first * float(self.growth) ** period), 1.0)
        return self.peak / 2 * (1 + ops.cos(np.pi * share))


@dataclasses.dataclass
class WarmUp(Schedule):
    """Eq. 5: `schedule`, reached by a straight line in `steps`."""

    schedule: Schedule
    steps: int

    def get_config(self):
        return {"schedule": keras.saving.serialize_keras_object(self.schedule), "steps": self.steps}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["schedule"]), config["steps"])

    def __call__(self, step):
        return self.schedule(step) * ops.minimum((real(step) + 1) / self.steps, 1.0)


@dataclasses.dataclass
class Cyclic(Schedule):
    """Eq. 6: triangles of `2 * half` steps between `low` and `high`; `gamma` below 1 makes them sink (exp_range)."""

    low: float
    high: float
    half: int
    gamma: float = 1.0
    get_config = dataclasses.asdict

    def __call__(self, step):
        cycle = ops.floor(1 + real(step) / (2 * self.half))
        height = ops.maximum(1 - ops.abs(real(step) / self.half - 2 * cycle + 1), 0.0)
        return self.low + (self.high - self.low) * self.gamma ** real(step) * height


@dataclasses.dataclass
class OneCycle(Schedule):
    """Peak/25 to the peak in the first `up` of the steps, then down to peak/10,000, each way half a cosine."""

    peak: float
    total: int
    up: float = 0.3
    get_config = dataclasses.asdict

    def height(self, step):
        """(is it the way up?, 0 at the foot .. 1 at the peak), each of step's shape."""
        share = ops.minimum(real(step) / self.total, 1.0)
        rising = share < self.up
        into = ops.where(rising, 1 - share / self.up, (share - self.up) / (1 - self.up))  # 0 at the peak
        return rising, (1 + ops.cos(np.pi * into)) / 2

    def __call__(self, step):
        rising, height = self.height(step)
        foot = ops.where(rising, self.peak / 25, self.peak / 1e4)
        return foot + (self.peak - foot) * height

    def momentum(self, step):
        """0.95 at both feet, 0.85 at the peak."""
        return 0.95 - 0.1 * self.height(step)[1]


for kind in (Step, Exponential, Polynomial, Cosine, WarmUp, Cyclic, OneCycle):  # so that a saved model knows them
    keras.saving.register_keras_serializable("day11")(kind)


def arms(peak, low, total):
    """The eleven ways, by name; None: a rate that falls where the validation loss has stopped to, no function of t."""
    return {
        "constant": Polynomial(peak, total, 0.0),
        "step": Step(peak, (total // 2, 3 * total // 4)),
        "exponential": Exponential(peak, total),
        "polynomial": Polynomial(peak, total),
        "cosine": Cosine(peak, total),
        "warm-up, cosine": WarmUp(Cosine(peak, total), max(1, total // 14)),
        "SGDR": Cosine(peak, max(1, total // 7), growth=2, periods=3),
        "triangular": Cyclic(low, peak, max(1, total // 6)),
        "exp_range": Cyclic(low, peak, max(1, total // 6), 0.1 ** (1 / total)),
        "one-cycle": OneCycle(peak, total),
        "on plateau": None,
    }


# %% [markdown]
# ## Following a schedule
# Optimizers do $v \leftarrow \mu v - \eta g,\; w \leftarrow w + v$ (7). Keras's follow a schedule of $\eta$, not of
# $\mu$; ours (`models/schedules.py`) looks both up in a table, so that one compiled model serves all trainings.


# %%
def build_model(parts, classes, cfg):
    """A small residual network, pixels -> logits."""
    mean, variance = parts.x_train.mean(axis=(0, 1, 2)), parts.x_train.var(axis=(0, 1, 2))
    return convnets.small_resnet(parts.x_train.shape[1:], classes, cfg.width, mean, variance, dropout=0.0)


def train(model, parts, rates, momenta, seed, epochs, cfg, callbacks=()):
    """One training with rates and momenta [steps] -> validation accuracy of each epoch, losses.

    Start and batches depend on the seed alone: all schedules meet the same ones.
    """
    keras.utils.set_random_seed(seed)
    model.set_weights(build_model(parts, model.output_shape[-1], cfg).get_weights())
    schedules.begin(model, rates, momenta)
    losses, steps = schedules.Losses(), len(parts.x_train) // cfg.batch
    stream = core.data.batches((parts.x_train, parts.y_train), cfg.batch, seed=seed, epochs=epochs)
    history = model.fit(stream, epochs=epochs, steps_per_epoch=steps, validation_data=(parts.x_val, parts.y_val),
                        validation_batch_size=1_000, callbacks=[losses, *callbacks], verbose=0).history  # fmt: skip
    curve = history["val_accuracy"]
    return curve + curve[-1:] * (epochs - len(curve)), losses.values  # a training that diverged was stopped


# %% [markdown]
# ## The range test
# Which peak? Let the rate grow by the same factor at every step of one short run, and watch the loss. While the rate is
# too small nothing happens; then the loss falls, flattens, and at last explodes. The upper bound must stay clear of
# the explosion: we take a tenth of the rate at which the (smoothed) loss is lowest; the lower bound is where a tenth of
# the whole fall has happened.


# %%
def range_test(model, parts, cfg, lowest=1e-4, highest=10.0):
    """Rates [steps], the losses [seeds, steps] they met, and the two bounds read off their smoothed mean."""
    steps = len(parts.x_train) // cfg.batch
    epochs = -(-cfg.range_steps // steps)
    rates = np.geomspace(lowest, highest, epochs * steps)
    losses = np.full((cfg.seeds, len(rates)), np.nan)
    for row, seed in enumerate(range(cfg.seed, cfg.seed + cfg.seeds)):
        _, found = train(model, parts, rates, np.full(len(rates), 0.9), seed, epochs, cfg)
        losses[row, : len(found)] = found
    return schedules.bounds(rates, losses)


# %% [markdown]
# ## The comparison
# Each schedule may choose between two peaks, the range test's bound and a third of it, on a seed that is not used again
# (those that begin at their peak took the third, and might want less still). Then it trains from the same starts as all
# the others: how good in the end (test images), and how soon as good as where the constant rate ends (validation)?


# %%
def compare(model, parts, name, peak, low, seed, cfg):
    """Train by the schedule `name` with that peak -> JSON: validation curve, test accuracy, and SGDR's ensemble's."""
    t, began, callbacks = np.arange(cfg.epochs * (len(parts.x_train) // cfg.batch)), time.perf_counter(), []
    schedule = arms(peak, low, len(t))[name]
    rates = np.full(len(t), peak) if schedule is None else ops.convert_to_numpy(schedule(t))
    momenta = ops.convert_to_numpy(schedule.momentum(t)) if name == "one-cycle" else np.full(len(t), 0.9)
    if schedule is None:
        callbacks = [schedules.OnPlateau(rates, len(t) // cfg.epochs, patience=max(1, cfg.epochs // 14))]
    if name == "SGDR":
        callbacks = [schedules.Snapshots(parts.x_test, {round(cfg.epochs * k / 7) for k in (1, 3, 7)})]
    curve, losses = train(model, parts, rates, momenta, seed, cfg.epochs, cfg, callbacks)
    scores = model.predict(parts.x_test, batch_size=1_000, verbose=0)
    answer = {"peak": peak, "seed": seed, "validation": curve, "test": schedules.accuracy(scores, parts.y_test),
              "loss": losses[-1], "rates": rates[:: max(1, len(t) // 200)]}  # fmt: skip
    if name == "SGDR":
        answers = callbacks[0].answers
        answer["snapshots"] = [schedules.accuracy(np.asarray(one), parts.y_test) for one in answers]
        answer["ensemble"] = schedules.accuracy(np.mean(answers[-2:], axis=0), parts.y_test)  # the first is too weak
    print(f"{name}, peak {peak:.3g}, seed {seed}: {curve[-1]:.4f}, {time.perf_counter() - began:.1f} s", flush=True)
    return answer


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if cfg.batch > cfg.train:
        raise core.InputError(f"--batch {cfg.batch}: there are only {cfg.train} training images: give a smaller one")
    with core.run("day11_lr_schedules", options, cfg) as run:
        images = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts = core.data.three_way(images, cfg.train, cfg.validation, len(images.x_test))
        pixels = {part: np.float32(getattr(parts, part)) for part in ("x_train", "x_val", "x_test")}
        parts = dataclasses.replace(parts, **{part: ops.convert_to_numpy(ops.average_pool(x, cfg.halve))
                                              for part, x in pixels.items()})  # fmt: skip
        model, steps = build_model(parts, len(images.labels), cfg), len(parts.x_train) // cfg.batch
        tester = keras.Model(model.input, model.output)  # the same weights; its loss is looked at after each step
        schedules.ready(tester, cfg.range_steps + steps, 1)
        schedules.ready(model, cfg.epochs * steps, steps)
        answer = run.once("range-test", lambda: range_test(tester, parts, cfg))
        tested = {name: np.asarray(value) for name, value in answer.items()}
        high, low = float(tested["high"]), float(tested["low"])

        def once(name, share, seed):
            answer = lambda: compare(model, parts, name, share * high, low, seed, cfg)  # noqa: E731
            return run.once(f"{name}-{share}-seed-{seed}", answer)

        found, choices, shares = {}, [], cfg.peaks if len(cfg.peaks) > 1 else ()
        for name in arms(high, low, 1):
            tried = {share: once(name, share, cfg.seed + 1_000)["validation"][-1] for share in shares}
            choices += [{"schedule": name, "peak": high * share, "validation": tried[share]} for share in tried]
            best = max(tried, key=tried.get, default=cfg.peaks[0])
            found[name] = [once(name, best, cfg.seed + number) for number in range(cfg.seeds)]
        rows, metrics = schedules.summarise(found)
        tables = {"schedules": rows} | ({"choice of the peak": choices} if choices else {})
        run.record |= {"data": images.provenance, "range_test": tested, "tables": tables}
        run.record["metrics"] = metrics | {"epochs": cfg.epochs, "range_test_low": low, "range_test_high": high}
        schedules.draw(run, found, rows, tested, ops.convert_to_numpy(OneCycle(high, 200).momentum(np.arange(200))))
    return run.record


if __name__ == "__main__":
    core.cli(main)
