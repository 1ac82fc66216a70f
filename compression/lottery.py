"""Lottery tickets: is there, in a network, a sparse one that would have trained as well by itself?

Sources: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis" (train, prune, reset what is left to its initial
weights, again and again; section 2 and, for the controls, 4); Frankle et al. 2020, "Linear Mode Connectivity and the
Lottery Ticket Hypothesis" (reset to the weights after a few steps, as larger networks need; section 4).

A ticket is its mask and those weights.  Two controls tell what matters: the same weights under masks drawn at random,
as sparse in each layer, and the same masks over weights drawn anew, which have had the same steps of dense training.
"""

import dataclasses
from pathlib import Path

import keras
import numpy as np

from compression.prune import accuracy, arrays, copy_of, held, magnitude, prunable, set_weights
from compression.training import Training, fit
from course.core import InputError, runtime


@dataclasses.dataclass
class Lottery:
    """Iterative magnitude pruning with rewinding."""

    rounds: int = 5  # of pruning, each followed by a whole training
    rate: float = 0.2  # share of the weights still there that a round removes
    rewind: int = 0  # steps of the first training after which the weights to go back to are taken; 0: the initial ones
    scope: str = "global"  # global: the smallest of all layers together; layer: that share of every layer
    keep: tuple[str, ...] = ()  # names of layers left as they are
    seed: int = 0  # of the initial weights and of the controls
    training: Training = dataclasses.field(default_factory=lambda: Training(epochs=10, lr=0.1))  # from scratch


@dataclasses.dataclass
class Ticket:
    """What a round found, and what it came to when trained."""

    sparsity: float  # share of the prunable weights that is zero
    masks: dict[str, np.ndarray]  # name, as in `prunable` -> bool, True for a weight that stays
    start: list[np.ndarray]  # all weights of the network to train from, in the order of `get_weights`
    network: keras.Model  # trained from there under the masks


def fresh(model, seed):
    """The same network with initial weights drawn anew; layers without trainable weights keep theirs (the moments of a
    `Normalization` are data, not learned)."""
    runtime.seed(seed)
    with model.distribute_strategy.scope():
        drawn = keras.models.clone_model(model)
    pairs = zip(model._flatten_layers(include_self=False), drawn._flatten_layers(include_self=False), strict=True)
    for old, new in pairs:
        if old.weights and not old.trainable_weights:
            set_weights(new, old.get_weights())
    return drawn


class Snapshot(keras.callbacks.Callback):
    """`variables`: the weights of `network` after `step` steps, and before that those it began with.

    They are saved and restored with a checkpoint of the training.  last: the training ends with that step.
    """

    def __init__(self, network, step, last=False):
        super().__init__()
        self.network, self.step, self.last = network, step, last
        with network.distribute_strategy.scope():
            self.variables = [keras.Variable(weight, dtype=weight.dtype, trainable=False) for weight in network.weights]

    def on_train_begin(self, logs=None):
        if self.step > self.params["steps"] * self.params["epochs"]:
            raise InputError(f"rewind is {self.step}: the training has {self.params['steps']} steps an epoch")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch * self.params["steps"] + batch + 1 == self.step:
            for variable, weight in zip(self.variables, self.network.weights, strict=True):
                variable.assign(weight)
            self.model.stop_training = self.last


def train(model, start, masks, data, settings, *, checkpoint=None, label="", callbacks=lambda network: ()):
    """A copy of `model` trained from the weights `start` under `masks`, by the whole of `settings.training`.

    callbacks: the copy -> Keras callbacks.  Every training sees the same batches in the same order.
    """
    runtime.seed(settings.seed)
    network = copy_of(model)
    network.set_weights(start)
    with held(network, masks):
        fit(network, data, settings.training, callbacks(network), checkpoint=checkpoint, label=label)
    return network


def find(model, data, settings, folder=None):
    """The `Ticket`s of all rounds, the dense network first (Frankle and Carbin 2019, section 2: iterative
    pruning with resetting).

    model: whose layers are used; its learned weights are not.  A round removes `rate` of what is left, by the
    magnitudes at the end of the one before.  Departs: after late rewinding the whole schedule is run again, not what is
    left of it.  folder: from which the same call goes on, a training at a time.
    """
    if settings.rounds < 0 or settings.rewind < 0 or not 0 < settings.rate < 1:
        raise InputError("a lottery needs rounds >= 0, rewind >= 0 and a rate between 0 and 1")
    drawn, kept = fresh(model, settings.seed), []
    masks = whole(drawn, settings.keep)

    def remember(network):
        kept.append(Snapshot(network, settings.rewind))
        return kept

    network = train(drawn, drawn.get_weights(), masks, data, settings, checkpoint=_within(folder, "round-0"),
                    label="dense", callbacks=remember)  # fmt: skip
    start = [np.asarray(variable) for variable in kept[0].variables]
    tickets = [Ticket(0.0, masks, start, network)]
    for turn in range(1, settings.rounds + 1):
        trained = arrays(prunable(network, settings.keep))
        masks = magnitude(trained, 1 - (1 - settings.rate) ** turn, settings.scope, masks)
        network = train(drawn, start, masks, data, settings, checkpoint=_within(folder, f"round-{turn}"),
                        label=f"round {turn}")  # fmt: skip
        tickets.append(Ticket(share(masks), masks, start, network))
    return tickets


def _within(folder, name):
    return Path(folder) / name if folder else None


def whole(model, keep=()):
    """Masks, as in `prunable`, that remove nothing."""
    return {name: np.ones(weight.shape, bool) for name, weight in prunable(model, keep).items()}


def share(masks):
    """Share of the weights that masks (name -> bool array) remove."""
    return sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.size for mask in masks.values())


def shuffled(masks, seed):
    """Masks that keep as many weights of each layer, at places drawn at random."""
    rng = np.random.default_rng(seed)
    return {name: rng.permuted(mask.ravel()).reshape(mask.shape) for name, mask in masks.items()}


def another_start(model, data, settings):
    """Weights, in the order of `get_weights`, that differ from a ticket's `start` in their draw alone.

    They are drawn with the next seed and have had the same head start: the first `rewind` steps of the dense training,
    at its rates, on the same batches.  Those few steps have no checkpoint.
    """
    drawn = fresh(model, settings.seed + 1)
    if not settings.rewind:
        return drawn.get_weights()

    def stop(network):
        return [Snapshot(network, settings.rewind, last=True)]

    masks = whole(drawn, settings.keep)
    return train(drawn, drawn.get_weights(), masks, data, settings, label="head start", callbacks=stop).get_weights()


def controls(model, ticket, other, data, settings, folder=None):
    """Name -> network: what the ticket's sparsity comes to without its masks, or without its weights.

    random masks: from the ticket's weights, under masks as sparse in each layer.  random weights: under the ticket's
    masks, from `other`, which `another_start` gives (Frankle and Carbin 2019, "random reinit"; there without the head
    start, for there is no late rewinding).
    """
    arms = {
        "random masks": (ticket.start, shuffled(ticket.masks, settings.seed)),
        "random weights": (other, ticket.masks),
    }
    return {name: train(model, start, masks, data, settings, checkpoint=_within(folder, name.replace(" ", "-")),
                        label=name) for name, (start, masks) in arms.items()}  # fmt: skip


def compare(model, data, settings, folder=None):
    """The whole experiment: a row a sparsity and arm, {round, sparsity, arm, val_accuracy, test_accuracy}.

    Arms: dense; and for each round ticket, random masks, random weights, trained alike.
    """
    tickets, rows = find(model, data, settings, folder), []
    other = another_start(model, data, settings) if settings.rounds else None
    for turn, ticket in enumerate(tickets):
        arms = {"ticket" if turn else "dense": ticket.network}
        if turn:
            arms |= controls(model, ticket, other, data, settings, _within(folder, f"controls-{turn}"))
        rows += [{"round": turn, "sparsity": ticket.sparsity, "arm": name,
                  "val_accuracy": accuracy(network, data.x_val, data.y_val),
                  "test_accuracy": accuracy(network, data.x_test, data.y_test)}
                 for name, network in arms.items()]  # fmt: skip
    return rows
