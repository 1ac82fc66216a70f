"""Several kinds of network, each trained several times from weights of its own, in one setting after another."""

import functools

import numpy as np

from models.numpy_net import net as nets
from models.numpy_net import optim
from models.numpy_net.solver import Solver


def centred(parts):
    """`core.data.Splits` -> [(x [N, D] float32, y) of training, the same of validation].

    The mean image of the training part is taken off every picture, and the pixels are divided by 255.
    """
    mean = parts.x_train.mean(axis=0)
    pairs = (parts.x_train, parts.y_train), (parts.x_val, parts.y_val)
    return [(((x - mean) / 255).astype(np.float32).reshape(len(x), -1), y) for x, y in pairs]


def learn(data, sizes, options, seed, trial, *, epochs, batch, lr):
    """Train `nets.create(rng, sizes, **options)` by Adam -> its curves, as JSON has them.

    data: (x, y) to train on and (x, y) for validation.  The curves, one number an epoch: "loss" (of the batches, in
    training mode), "training" and "validation" accuracy in per cent; and "spread", one number: the standard deviation
    of the last hidden layer's outputs before training.  Weights, order and masks depend on seed and trial.
    """
    net = nets.create(np.random.default_rng((seed, trial)), sizes, **options)
    copy, rng = nets.cast(net, np.float32), np.random.default_rng((seed, trial, 1))  # the net's averages stay as new
    _, caches = nets.forward(copy, data[0][0][:batch], train=True, rng=rng)
    solver = Solver(nets.loss, nets.scores, epochs=epochs, batch=batch, lr=lr, rule=optim.adam, seed=100 * seed + trial,
                    keep_best=False, verbose=False)  # fmt: skip
    history = solver.fit(net, *data)
    return {"loss": history.loss, "training": history.train_accuracy, "validation": history.val_accuracy,
            "spread": [caches[-1][0][0].std()]}  # fmt: skip


def compare(run, stage, kinds, data, hidden, *, seed, trials, **settings):
    """Train each of `kinds` (name -> options of `nets.create`) `trials` times with hidden layers of `hidden` units.

    Each training is a stage of `run`, so that an interrupted run goes on after the last one that ended.  `settings`
    go to `learn`.  Returns {kind: {curve: array [trials, epochs]}} and prints the accuracies reached.
    """
    sizes, found = (data[0][0].shape[1], *hidden, 1 + int(data[0][1].max())), {}
    for kind, options in kinds.items():
        train = functools.partial(learn, data, sizes, options, seed, **settings)
        done = [run.once(f"{stage}, {kind}, {trial}", functools.partial(train, trial)) for trial in range(trials)]
        found[kind] = {curve: np.array([one[curve] for one in done]) for curve in done[0]}
    shown = (f"{kind} {curves['training'][:, -1].mean():.1f} / {curves['validation'][:, -1].mean():.1f} %"
             for kind, curves in found.items())  # fmt: skip
    print(f"{stage}: training / validation accuracy: {', '.join(shown)}", flush=True)
    return found


def ends(results, curve):
    """{setting: answer of `compare`} -> {kind: array [trials, settings]}, the last values of `curve`."""
    kinds = next(iter(results.values()))
    return {kind: np.stack([found[kind][curve][:, -1] for found in results.values()], axis=1) for kind in kinds}


def table(column, results):
    """{setting: answer of `compare`} -> rows of the mean accuracies (%) after the last epoch, a row a setting."""
    last = {f"{kind}, {curve}": values.mean(axis=0) for curve in ("training", "validation")
            for kind, values in ends(results, curve).items()}  # fmt: skip
    return [{column: setting} | {name: float(means[i]) for name, means in last.items()}
            for i, setting in enumerate(results)]  # fmt: skip
