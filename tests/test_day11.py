"""Day 11: every schedule at steps worked out by hand, saved and loaded, and followed by the optimizer."""

import types

import keras
import numpy as np
import pytest
from keras import ops

from course import core
from course import day11_lr_schedules as day11
from models import schedules

TOTAL = 700


def at(schedule, *steps):
    """Rates at `steps`, asked for one by one, as an optimizer does; the same asked for as an array must agree."""
    one_by_one = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(ops.convert_to_numpy(schedule(np.array(steps))), one_by_one, rtol=1e-6)
    return one_by_one


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (day11.Step(0.4, (10, 20)), {0: 0.4, 9: 0.4, 10: 0.04, 19: 0.04, 20: 0.004, 99: 0.004}),
        (day11.Step(0.4, (10,), 0.5), {9: 0.4, 10: 0.2}),
        (day11.Exponential(1.0, 100), {0: 1.0, 50: 0.1, 100: 0.01}),
        (day11.Polynomial(0.8, 100), {0: 0.8, 25: 0.6, 100: 0.0, 150: 0.0}),
        (day11.Polynomial(0.8, 100, 2.0), {50: 0.2}),
        (day11.Polynomial(0.8, 100, 0.0), {0: 0.8, 99: 0.8}),
        (day11.Cosine(0.2, 100), {0: 0.2, 50: 0.1, 100: 0.0, 300: 0.0}),
        # periods of 10, 20 and 40 steps: restarts at 10 and 30, the end at 70
        (day11.Cosine(0.2, 10, 2, 3), {0: 0.2, 5: 0.1, 10: 0.2, 20: 0.1, 30: 0.2, 50: 0.1, 70: 0.0, 90: 0.0}),
        (day11.Cosine(0.2, 10, 1, 2), {0: 0.2, 10: 0.2, 15: 0.1, 20: 0.0}),
        (day11.WarmUp(day11.Polynomial(1.0, 100), 10), {0: 0.1, 4: 0.5 * 0.96, 9: 0.91, 50: 0.5}),
        (day11.Cyclic(0.1, 0.5, 10), {0: 0.1, 5: 0.3, 10: 0.5, 15: 0.3, 20: 0.1, 30: 0.5}),
        (day11.Cyclic(0.0, 1.0, 10, 0.5 ** (1 / 10)), {0: 0.0, 10: 0.5, 20: 0.0, 30: 0.125}),
        (day11.OneCycle(1.0, 100), {0: 0.04, 15: 0.52, 30: 1.0, 65: 0.50005, 100: 1e-4, 120: 1e-4}),
    ],
)
def test_values_by_hand(schedule, values):
    np.testing.assert_allclose(at(schedule, *values), list(values.values()), rtol=2e-5, atol=1e-7)  # float32


def test_one_cycles_momentum_is_low_where_the_rate_is_high():
    schedule = day11.OneCycle(1.0, 100)
    np.testing.assert_allclose(
        schedule.momentum(np.array([0, 15, 30, 65, 100])), [0.95, 0.9, 0.85, 0.9, 0.95], rtol=1e-5
    )


@pytest.mark.parametrize("name", [name for name, schedule in day11.arms(0.1, 0.01, TOTAL).items() if schedule])
def test_a_saved_schedule_is_the_same_schedule(name):
    schedule = day11.arms(0.1, 0.01, TOTAL)[name]
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(schedule))
    assert type(again) is type(schedule) and again is not schedule
    steps = np.arange(TOTAL + 10)
    rates = np.broadcast_to(schedule(steps), steps.shape)
    np.testing.assert_array_equal(np.broadcast_to(again(steps), steps.shape), rates)
    assert rates.min() >= 0 and rates.max() <= np.float32(0.1)
    optimizer = keras.optimizers.SGD(schedule)  # any Keras optimizer takes it, and a step's rate is the schedule's
    w = keras.Variable([1.0])
    for step in range(3):
        before = float(w.numpy()[0])
        optimizer.apply([np.array([1.0], np.float32)], [w])
        assert before - float(w.numpy()[0]) == pytest.approx(float(np.broadcast_to(rates, TOTAL + 10)[step]), abs=1e-7)


def test_cosine_agrees_with_keras():
    ours, theirs = day11.Cosine(0.3, 70, 2, 3), keras.optimizers.schedules.CosineDecayRestarts(0.3, 70, 2.0)
    steps = [0, 1, 35, 69, 70, 100, 209, 210, 400, 489]
    np.testing.assert_allclose(at(ours, *steps), [float(theirs(step)) for step in steps], atol=2e-6)


def test_momentum_is_that_of_keras_and_follows_its_tables():
    rng, w0 = np.random.default_rng(0), np.float32([1.0, -2.0])
    gradients = rng.standard_normal((5, 2)).astype(np.float32)
    ours, theirs = schedules.Momentum(9), keras.optimizers.SGD(0.1, momentum=0.9)
    a, b = keras.Variable(w0), keras.Variable(w0)
    ours.build([a])
    ours.start([0.1] * 4 + [0.5], [0.9] * 4 + [0.0])
    for gradient in gradients[:4]:
        ours.apply([gradient], [a])
        theirs.apply([gradient], [b])
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)
    before = a.numpy()
    ours.apply([gradients[4]], [a])  # momentum 0 forgets: plain gradient descent at rate 0.5
    np.testing.assert_allclose(a.numpy(), before - 0.5 * gradients[4], rtol=1e-6)
    ours.start([0.2], [0.9])
    a.assign(w0)
    ours.apply([gradients[0]], [a])  # from the first entry again, and without the old velocity
    np.testing.assert_allclose(a.numpy(), w0 - 0.2 * gradients[0], rtol=1e-6)


def test_bounds_of_a_range_test_by_hand():
    rates = np.geomspace(1e-3, 1, 301)
    losses = np.full((2, 301), 2.0)
    losses[:, 100:200] = 1.0  # falls at rate 1e-2
    losses[:, 200:] = 5.0  # explodes at 1e-1
    losses[1, 250:] = np.nan
    found = schedules.bounds(rates, losses)
    assert len(found["rates"]) == 250 and np.isfinite(found["losses"]).all()
    assert found["high"] == pytest.approx(0.01, rel=0.05)  # the smoothed loss is lowest just before the explosion
    assert found["low"] == pytest.approx(min(0.01, found["high"] / 4), rel=0.1)


def test_smooth_of_a_constant_is_the_constant():
    np.testing.assert_allclose(schedules.smooth(np.full(20, 3.0)), 3.0)
    assert schedules.smooth([0.0, 1.0])[1] == pytest.approx(0.1 / 0.19)  # weights 0.09 and 0.1


@pytest.mark.parametrize(
    ("curve", "count"), [([0.2, 0.4, 0.6], 2.5), ([0.5], 1.0), ([0.1, 0.2], None), ([1.0, 0.1], 0.5)]
)
def test_epochs_to_a_target_of_one_half(curve, count):
    assert schedules.epochs_to(0.5, curve) == (None if count is None else pytest.approx(count))


def test_the_rate_falls_where_the_validation_loss_stays():
    rates = np.ones(10)
    watch, w = schedules.OnPlateau(rates, steps=2, patience=2), keras.Variable([1.0])
    optimizer = schedules.Momentum(12)
    optimizer.build([w])
    watch.set_model(types.SimpleNamespace(optimizer=optimizer))
    for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.1]):
        watch.on_epoch_end(epoch, {"val_loss": loss})
    np.testing.assert_allclose(rates, [1] * 8 + [1 / 3] * 2)  # the fourth epoch was the second without progress
    np.testing.assert_allclose(optimizer.rates.numpy(), [1] * 8 + [1 / 3] * 2 + [0] * 2)


def test_a_training_in_float16_begins_with_the_scale_that_the_first_had(monkeypatch):
    monkeypatch.setattr(schedules.runtime, "jit", lambda: False)
    with core.runtime.policy("mixed_float16"):
        model = schedules.ready(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="float32")]), 8, 1)
    weights, x = model.get_weights(), np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    curves = []
    for _ in range(2):
        model.set_weights(weights)
        schedules.begin(model, [0.5] * 4, [0.9] * 4)
        assert float(model.optimizer.dynamic_scale) == model.optimizer.initial_scale
        curves.append([model.train_on_batch(x, np.array([0, 1, 0, 1]))[0] for _ in range(4)])
        model.optimizer.dynamic_scale.assign(1e30)  # as if this had come of it
    assert curves[0] == curves[1] and curves[0][-1] < curves[0][0]
    assert float(schedules.momentum(model).rates[0]) == 0.5
