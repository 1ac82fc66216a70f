"""models/numpy_net/solver: its steps by hand, what it keeps, and that a kill changes nothing."""

import functools
import types

import numpy as np
import pytest

from course import core
from models.numpy_net import net, optim
from models.numpy_net.solver import Solver, accuracy


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's 8x8 digits in 0..1: (x, y) train, (x, y) validation."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def network(**options):
    return net.create(np.random.default_rng(0), (64, 50, 10), **options)


def solver(**settings):
    return Solver(net.loss, net.scores, **({"verbose": False, "epochs": 3} | settings))


# --- a model of one number: L = (w - mean of the batch)^2 / 2 ---------------------------------------------------------


class Number:
    def __init__(self):
        self.params = {"w": np.zeros(1)}


def distance(model, x, y, rng):
    off = model.params["w"] - x.mean()
    return 0.5 * float(off[0] ** 2), {"w": off}


def sign(model, x):
    return np.stack([0 * x, model.params["w"] - x], axis=1)  # class 1 for what lies below w


def test_steps_and_decay_by_hand():
    model, x, y = Number(), np.full(6, 4.0), np.ones(6, int)
    history = Solver(distance, sign, epochs=2, batch=3, lr=0.5, lr_decay=0.5, verbose=False).fit(model, (x, y), (x, y))
    # w: 0, 2, 3 at a rate of a half; then 3.25, 3.4375 at a quarter
    assert model.params["w"][0] == 3.0  # all accuracies are 0, and the first of equals is kept
    assert history.losses == [8.0, 2.0, 0.5, 0.28125]
    assert history.loss == [5.0, 0.390625] and history.best_epoch == 0
    last = Number()
    Solver(distance, sign, epochs=2, batch=3, lr=0.5, lr_decay=0.5, keep_best=False, verbose=False).fit(
        last, (x, y), (x, y)
    )
    assert last.params["w"][0] == 3.4375


def test_each_example_is_seen_once_an_epoch_in_a_new_order():
    seen = []

    def note(model, x, y, rng):
        np.testing.assert_array_equal(x, 10 * y)  # examples and answers stay together
        seen.append(y.tolist())
        return 0.0, {}

    y = np.arange(10)
    Solver(note, sign, epochs=2, batch=5, verbose=False).fit(Number(), (10.0 * y, y), (10.0 * y, y))
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == y.tolist() and first != second
    seen.clear()
    Solver(note, sign, epochs=1, batch=4, verbose=False).fit(Number(), (10.0 * y, y), (10.0 * y, y))
    assert [len(batch) for batch in seen] == [4, 4]  # two wait for another epoch
    seen.clear()
    Solver(note, sign, epochs=1, batch=50, verbose=False).fit(Number(), (10.0 * y, y), (10.0 * y, y))
    assert [len(batch) for batch in seen] == [10]


def test_the_rule_gets_its_constants_state_and_rate():
    calls = []

    def rule(params, gradients, state, lr, *, colour):
        state["step"] = state.get("step", 0) + 1
        calls.append((state["step"], lr, colour))

    x, y = np.zeros(4), np.zeros(4, int)
    settings = dict(epochs=2, batch=2, lr=1.0, lr_decay=0.1, rule=rule, constants={"colour": "red"}, verbose=False)
    Solver(distance, sign, **settings).fit(Number(), (x, y), (x, y))
    assert calls == [(1, 1.0, "red"), (2, 1.0, "red"), (3, 0.1, "red"), (4, 0.1, "red")]


def test_the_transform_is_of_training_batches_alone():
    sums = []

    def note(model, x, y, rng):
        sums.append(float(x.sum()))
        return 0.0, {}

    def scores(model, x):
        assert not x.any()
        return np.zeros((len(x), 2))

    x, y = np.zeros(4), np.zeros(4, int)
    Solver(note, scores, epochs=1, batch=2, transform=lambda x, rng: x + 1, verbose=False).fit(Number(), (x, y), (x, y))
    assert sums == [2.0, 2.0]


def test_a_loss_that_is_not_finite_is_one_clear_line():
    def bad(model, x, y, rng):
        return float("nan"), {}

    x, y = np.zeros(4), np.zeros(4, int)
    with pytest.raises(core.InputError, match=r"nan in epoch 1.*learning rate 0\.5"):
        Solver(bad, sign, lr=0.5, verbose=False).fit(Number(), (x, y), (x, y))


def test_accuracy_by_hand():
    x, y = np.arange(7.0), np.array([1, 1, 0, 0, 0, 0, 1])
    model = Number()
    model.params["w"][0] = 2.5  # says 1 of 0, 1, 2
    assert accuracy(sign, model, x, y) == pytest.approx(100 * 5 / 7)
    assert accuracy(sign, model, x, y, chunk=2) == accuracy(sign, model, x, y)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"normalization": "batch", "keep": 0.8}, {"normalization": "layer"}])
def test_digits_are_learned(digits, options):
    model = network(**options)
    loss = functools.partial(net.loss, reg=1e-4)
    history = Solver(loss, net.scores, epochs=8, batch=50, lr=1e-2, rule=optim.adam, lr_decay=0.8, verbose=False).fit(
        model, *digits
    )
    assert history.best_val_accuracy > 90 and history.train_accuracy[-1] > 97
    assert history.loss[-1] < 0.25 * history.loss[0]
    assert len(history.losses) == 8 * 28 and len(history.loss) == len(history.val_accuracy) == 8
    assert accuracy(net.scores, model, *digits[1]) == history.best_val_accuracy == max(history.val_accuracy)


def test_the_best_parameters_are_put_back_with_their_statistics(digits):
    """From the second epoch on, every step spoils the weights: the kept network must be that of the first."""

    def rule(params, gradients, state, lr):
        optim.sgd(params, gradients, 0.1)
        if lr < 1:
            params["W1"] += 1

    model = network(normalization="batch")
    history = solver(lr=1.0, lr_decay=0.5, rule=rule).fit(model, *digits)
    assert history.best_epoch == 0 and history.val_accuracy[-1] < history.val_accuracy[0] - 20
    assert accuracy(net.scores, model, *digits[1]) == history.val_accuracy[0]


def test_the_seed_decides_everything(digits):
    def trained(seed):
        model = network(keep=0.7)
        return model, solver(seed=seed, epochs=2).fit(model, *digits)

    (first, history), (again, same), (_, other) = trained(1), trained(1), trained(2)
    assert history == same and history.losses != other.losses
    assert all(np.array_equal(first.params[name], again.params[name]) for name in first.params)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_an_interrupted_training_ends_as_an_unbroken_one(digits, tmp_path, rule):
    def trained(folder, loss=net.loss):
        resume = core.Checkpoint(tmp_path / folder, types.SimpleNamespace(variables=[]))
        model = network(normalization="batch", keep=0.7)
        settings = solver(epochs=4, rule=getattr(optim, rule), lr_decay=0.9)
        settings.loss = loss
        return model, settings.fit(model, *digits, resume=resume)

    steps = []

    def killed(*arguments, **options):
        steps.append(1)
        if len(steps) == 35:  # in the middle of the third epoch of 14 steps
            raise KeyboardInterrupt
        return net.loss(*arguments, **options)

    whole, history = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("broken", killed)
    assert len(steps) == 35
    again, same = trained("broken")
    assert same == history and len(history.losses) == 4 * 14
    for name, array in (whole.params | whole.running).items():
        np.testing.assert_array_equal((again.params | again.running)[name], array, err_msg=name)


def test_progress_is_a_line_an_epoch(digits, capsys):
    solver(epochs=2, verbose=True, label="three layers").fit(network(), *digits)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["three layers epoch 1/2", "three layers epoch 2/2"]
