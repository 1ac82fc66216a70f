"""Lottery tickets: what they go back to, and what the controls change."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
from keras import layers
from pruning_models import QUICK, dense, noise, randomised

from compression import lottery, prune
from compression.channels import Channels, rebuild
from course import core


@pytest.fixture(scope="module")
def data():
    return noise()


@pytest.fixture
def starts(monkeypatch):
    """The weights with which each training begins, and the names of its lines."""
    seen = []

    def fit(network, data, settings, callbacks=(), **options):
        seen.append((options["label"], network.get_weights()))
        return original(network, data, settings, callbacks, **options)

    original = lottery.fit
    monkeypatch.setattr(lottery, "fit", fit)
    return seen


def same(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def under(masks, model, weights):
    """Weights in the order of `get_weights` with the masks applied."""
    names = {id(weight): name for name, weight in prune.prunable(model).items()}
    return [value * masks[names[id(weight)]] if id(weight) in names else value
            for weight, value in zip(model.weights, weights, strict=True)]  # fmt: skip


def test_tickets_go_back_to_the_initial_weights_exactly(data, starts):
    model = dense(seed=5)
    settings = lottery.Lottery(rounds=2, rate=0.5, seed=3, training=QUICK)
    tickets = lottery.find(model, data, settings)
    initial = lottery.fresh(model, 3).get_weights()
    assert not same(initial, model.get_weights())
    assert [name for name, _ in starts] == ["dense", "round 1", "round 2"]
    for ticket, (_, began) in zip(tickets, starts, strict=True):
        assert same(ticket.start, initial)
        assert same(began, under(ticket.masks, model, initial))
        gone = [~mask for mask in ticket.masks.values()]
        zeros = [kernel == 0 for kernel in prune.arrays(prune.prunable(ticket.network)).values()]
        assert same(gone, zeros)
    assert [sum(int((~mask).sum()) for mask in ticket.masks.values()) for ticket in tickets] == [0, 1560, 2340]
    for before, after in itertools.pairwise(tickets):  # by the magnitudes at the end of the round before
        trained = prune.arrays(prune.prunable(before.network))
        expected = prune.magnitude(trained, after.sparsity, "global", before.masks)
        assert same(expected.values(), after.masks.values())


def test_late_rewinding_goes_back_to_the_weights_after_some_steps(data, starts):
    settings = lottery.Lottery(rounds=1, rewind=4, training=QUICK)
    _, ticket = lottery.find(dense(), data, settings)
    weights, model = [], lottery.fresh(dense(), 0)
    initial = model.get_weights()

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.append(model.get_weights())

    prune.fit(model, data, QUICK, [After()])
    assert len(weights) == 8
    assert same(ticket.start, weights[3])
    assert not same(ticket.start, initial)
    assert same(starts[1][1], under(ticket.masks, model, weights[3]))
    with pytest.raises(core.InputError, match="rewind is 9"):
        lottery.find(dense(), data, dataclasses.replace(settings, rewind=9))


def test_the_controls_change_the_masks_or_the_weights_alone(data, starts):
    model = dense()
    once = dataclasses.replace(QUICK, epochs=1)
    settings = lottery.Lottery(rounds=1, rate=0.75, scope="layer", seed=1, training=once)
    rows = lottery.compare(model, data, settings)
    assert [(row["round"], row["sparsity"], row["arm"]) for row in rows] == [
        (0, 0.0, "dense"), (1, 0.75, "ticket"), (1, 0.75, "random masks"), (1, 0.75, "random weights")
    ]  # fmt: skip
    _, (_, ticket), (_, random_masks), (_, random_weights) = starts
    initial, other = lottery.fresh(model, 1).get_weights(), lottery.fresh(model, 2).get_weights()
    for place in (0, 2):  # the two kernels
        zeros = [weights[place] == 0 for weights in (ticket, random_masks, random_weights)]
        assert len({int(zero.sum()) for zero in zeros}) == 1, "as sparse in every layer"
        assert (zeros[0] != zeros[1]).any()
        assert (zeros[0] == zeros[2]).all()
        np.testing.assert_array_equal(random_masks[place], np.where(zeros[1], 0, initial[place]))
        np.testing.assert_array_equal(random_weights[place], np.where(zeros[2], 0, other[place]))
    assert all(0 <= row[key] <= 1 for row in rows for key in ("val_accuracy", "test_accuracy"))


def test_weights_drawn_anew_get_the_same_head_start_as_the_ticket(data, starts):
    """Worked by hand: the other draw trained densely at the dense training's rates and on its batches, for its first
    five steps, which end in the second of two epochs."""
    settings = lottery.Lottery(rounds=1, rate=0.5, rewind=5, seed=1, training=QUICK)
    lottery.compare(dense(), data, settings)
    assert [name for name, _ in starts] == ["dense", "round 1", "head start", "random masks", "random weights"]
    ticket, began, last = starts[1][1], starts[2][1], starts[-1][1]
    weights, other = [], lottery.fresh(dense(), 2)
    assert same(began, other.get_weights())

    class After(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.append(other.get_weights())

    prune.fit(other, data, QUICK, [After()])
    for place in (0, 2):  # the two kernels
        np.testing.assert_array_equal(last[place], np.where(ticket[place] == 0, 0, weights[4][place]))
    for place in (1, 3):
        np.testing.assert_array_equal(last[place], weights[4][place])
    assert len(weights) == 8
    assert not same(weights[4], weights[3])


def test_fresh_weights_keep_the_moments_of_the_data():
    image = keras.Input((4,))
    norm = layers.Normalization(name="norm")
    norm.adapt(np.arange(40, dtype="float32").reshape(10, 4))
    model = randomised(keras.Model(image, layers.Dense(3)(layers.BatchNormalization()(norm(image)))))
    norm.finalize_state()
    drawn, x = lottery.fresh(model, 0), np.ones((1, 4), np.float32)
    for other in (drawn, prune.copy_of(model), rebuild(model, channels := Channels(model), channels.root >= 0)):
        np.testing.assert_array_equal(other.get_layer("norm")(x), norm(x))
    assert same(drawn.get_layer("norm").get_weights(), norm.get_weights())
    assert np.asarray(drawn.layers[2].gamma).tolist() == [1, 1, 1, 1]
    assert same(drawn.get_weights(), lottery.fresh(model, 0).get_weights())
    assert not same(drawn.get_weights(), lottery.fresh(model, 1).get_weights())


def test_an_interrupted_lottery_goes_on_where_it_was(data, tmp_path, monkeypatch):
    settings = lottery.Lottery(rounds=1, rewind=2, training=QUICK)
    whole = lottery.find(dense(), data, settings)[-1].network
    epochs = []

    def interrupt(self, epoch, logs=None):
        epochs.append(epoch)
        if len(epochs) == 3:  # in the first epoch of round 1
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core.Progress, "on_epoch_end", interrupt)
        lottery.find(dense(), data, settings, tmp_path)
    del epochs[:]
    with monkeypatch.context() as patch:
        patch.setattr(core.Progress, "on_epoch_end", lambda self, epoch, logs=None: epochs.append(epoch))
        resumed = lottery.find(dense(), data, settings, tmp_path)[-1].network
    assert epochs == [1], "what was left of the last round"
    assert same(resumed.get_weights(), whole.get_weights())
