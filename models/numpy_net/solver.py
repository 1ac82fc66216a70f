"""The Solver: minibatch training of any model that can say its loss and gradients, and the best parameters kept."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from course.core import InputError
from models.numpy_net import optim


@dataclasses.dataclass
class History:
    """What a training tells afterwards; accuracies in per cent, one number an epoch unless another is named."""

    losses: list[float]  # one a step, regularisation included
    loss: list[float]  # the epoch's mean
    train_accuracy: list[float]  # on a random part of the training examples
    val_accuracy: list[float]
    best_epoch: int  # from 0; the first of equals

    @property
    def best_val_accuracy(self):
        """The best epoch's validation accuracy: that of the parameters kept, unless `keep_best` was False."""
        return self.val_accuracy[self.best_epoch]


@dataclasses.dataclass
class Solver:
    """Settings of a training; `fit` does it.

    A model is any object with `params`, name -> array, and, where it has arrays that training changes otherwise (batch
    normalization's), `running`, name -> array.  It is given meaning by two functions:

    - loss(model, x, y, rng=rng) -> value, gradients by name, in training mode; rng is for dropout;
    - scores(model, x) -> [N, C], in testing mode.

    `models.numpy_net.net` has both.  Options, regularisation for one, go into the function by `functools.partial`.
    """

    loss: Callable
    scores: Callable
    epochs: int = 10
    batch: int = 100
    lr: float = 1e-2
    lr_decay: float = 1.0  # factor on the learning rate after each epoch
    rule: Callable = optim.sgd  # an update rule of models.numpy_net.optim, or one called like them
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)  # the rule's: {"momentum": 0.95}
    transform: Callable | None = None  # x, rng -> x: applied to the training batches (augmentation)
    train_samples: int = 1000  # training examples on which accuracy is measured after each epoch
    keep_best: bool = True  # end with the parameters of the best validation accuracy, else with the last
    seed: int = 0
    verbose: bool = True
    label: str = ""  # stands before each printed line

    def fit(self, model, train, validation, resume=None):
        """Train `model` in place on train = (x, y); after each epoch it is measured on validation = (x, y).

        The order of the examples, the masks and the transform depend on the seed and the epoch alone; the last N %
        batch examples of an order wait for another epoch.  With `resume` (`run.checkpoint(None, name)`) the whole state
        is saved after each epoch, and a training that was killed ends as one that was not.  Returns a `History`.
        Raises `InputError` where the loss is no longer finite.
        """
        x, y = train
        now = {"params": model.params, "running": getattr(model, "running", {})}
        best = {f"best {part}": {name: array.copy() for name, array in arrays.items()} for part, arrays in now.items()}
        whole, losses = now | best | {"rule": {}}, []  # whole: all that a checkpoint has to hold
        logs = {name: [] for name in ("loss", "train_accuracy", "val_accuracy")}
        if resume and resume.epoch:
            losses, logs = _unpack(resume.arrays, whole), {name: list(resume.history[name]) for name in logs}
        for epoch in range(len(logs["loss"]), self.epochs):
            began = time.perf_counter()
            steps = self._epoch(model, x, y, epoch, whole["rule"])
            losses += steps
            rows = np.random.default_rng((self.seed, epoch, 1)).permutation(len(x))[: self.train_samples]
            log = {"loss": float(np.mean(steps)),
                   "train_accuracy": accuracy(self.scores, model, x[rows], y[rows]),
                   "val_accuracy": accuracy(self.scores, model, *validation)}  # fmt: skip
            if log["val_accuracy"] > max(logs["val_accuracy"], default=-1):
                for part, arrays in now.items():
                    _set(best[f"best {part}"], arrays)
            for name, value in log.items():
                logs[name].append(value)
            if resume:
                resume.save(epoch, log, _pack(whole, losses))
            if self.verbose:
                shown = "  ".join(f"{name} {value:.4g}" for name, value in log.items())
                seconds = time.perf_counter() - began
                print(f"{self.label} epoch {epoch + 1}/{self.epochs}  {shown}  {seconds:.1f} s".lstrip(), flush=True)
        if self.keep_best:
            for part, arrays in now.items():
                _set(arrays, best[f"best {part}"])
        return History(losses, **logs, best_epoch=int(np.argmax(logs["val_accuracy"])))

    def _epoch(self, model, x, y, epoch, state):
        """One pass over the examples -> the loss before each step."""
        rng, lr = np.random.default_rng((self.seed, epoch)), self.lr * self.lr_decay**epoch
        order, batch = rng.permutation(len(x)), min(self.batch, len(x))
        losses = []
        for first in range(0, len(x) - batch + 1, batch):
            rows = order[first : first + batch]
            examples = x[rows] if self.transform is None else self.transform(x[rows], rng)
            value, gradients = self.loss(model, examples, y[rows], rng=rng)
            if not np.isfinite(value):
                raise InputError(f"the loss is {value} in epoch {epoch + 1}: lower the learning rate {lr:g}")
            self.rule(model.params, gradients, state, lr, **self.constants)
            losses.append(float(value))
        return losses


def accuracy(scores, model, x, y, chunk=1000):
    """Per cent of the examples whose highest score is that of y, computed in pieces of `chunk` examples."""
    pieces = range(0, len(x), chunk)
    right = sum(int((scores(model, x[i : i + chunk]).argmax(axis=1) == y[i : i + chunk]).sum()) for i in pieces)
    return 100 * right / len(x)


# --- the state as one flat dict of arrays, for a checkpoint -----------------------------------------------------------


def _set(arrays, values):
    """Copy `values` (name -> array) into the arrays of the same names; those that are not there yet are added."""
    for name, value in values.items():
        if name in arrays:
            arrays[name][...] = value
        else:
            arrays[name] = value


def _pack(whole, losses):
    flat = {f"{part}/{name}": value for part, arrays in whole.items() for name, value in arrays.items()}
    return flat | {"losses": np.array(losses)}


def _unpack(flat, whole):
    """Put the arrays that `_pack` made back into `whole`; returns the losses."""
    for part, arrays in whole.items():
        start = f"{part}/"
        _set(arrays, {key.removeprefix(start): value for key, value in flat.items() if key.startswith(start)})
    return flat["losses"].tolist()
