"""Pruning of single weights: schedules and masks worked by hand, and masks held by every optimizer."""

import dataclasses
import functools
import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops
from pruning_models import QUICK, dense, noise, residual

from compression import prune
from compression.data import load
from compression.training import Training
from course import core
from course.core import runtime
from models import convnets


@pytest.fixture(scope="module")
def data():
    return noise()


# --- schedules -------------------------------------------------------------------------------------------------------


def test_the_polynomial_schedule_by_hand():
    # s = 0.8 - 0.6 (1 - (t - 100) / 200)^3: at 100 0.2; at 150 0.8 - 0.6 * 27/64; at 200 0.8 - 0.6 / 8
    found = prune.polynomial([0, 99, 100, 150, 200, 300, 400], 0.8, initial=0.2, begin=100, end=300)
    np.testing.assert_allclose(found, [0, 0, 0.2, 0.546875, 0.725, 0.8, 0.8], atol=1e-12)
    np.testing.assert_array_equal(prune.constant([0, 9, 10, 11], 0.5, begin=10), [0, 0, 0.5, 0.5])


def test_milestones_lie_between_begin_and_end():
    settings = prune.Pruning(sparsity=0.8, initial=0.2, begin=0.1, end=0.3, updates=4)
    when, sparsity = prune.milestones(settings, 1000)
    assert when.tolist() == [100, 150, 200, 250, 300]
    np.testing.assert_allclose(sparsity, [0.2, 0.546875, 0.725, 0.790625, 0.8], atol=1e-12)
    assert prune.milestones(settings, 10)[0].tolist() == [1, 2, 3], "a short training has fewer of them"
    when, sparsity = prune.milestones(dataclasses.replace(settings, schedule="constant"), 1000)
    assert (when.tolist(), sparsity.tolist()) == ([100], [0.8])


@pytest.mark.parametrize("wrong", [
    {"sparsity": 1.2}, {"begin": 0.9, "end": 0.5}, {"schedule": "linear"}, {"initial": 0.9}, {"updates": 0},
    {"scope": "all"}, {"keep": ("nowhere",)},
])  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_training(wrong, data, monkeypatch):
    monkeypatch.setattr(prune, "fit", None)
    with pytest.raises(core.InputError, match=next(iter(wrong)) if "keep" not in wrong else "nowhere"):
        prune.prune(dense(), data, prune.Pruning(**wrong, training=QUICK))


# --- masks -----------------------------------------------------------------------------------------------------------

KERNELS = {
    "a": np.array([[4.0, -1.0], [0.5, -8.0]]),
    "b": np.array([[0.1, -0.2, 0.3, 16.0]]),
}


def test_the_smallest_go_per_layer_and_globally():
    masks = prune.magnitude(KERNELS, 0.5)
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [[False, False, True, True]]
    masks = prune.magnitude(KERNELS, 0.5, "global")  # the four smallest of eight: 0.1, 0.2, 0.3, 0.5
    assert masks["a"].tolist() == [[True, True], [False, True]]
    assert masks["b"].tolist() == [[False, False, False, True]]


def test_exactly_so_many_go_even_where_magnitudes_are_equal():
    equal = {"a": np.ones((10, 10)), "b": -np.ones(23)}
    masks = prune.magnitude(equal, 0.3)
    assert [int((~mask).sum()) for mask in masks.values()] == [30, 7]
    assert sum(int((~mask).sum()) for mask in prune.magnitude(equal, 0.3, "global").values()) == 37
    assert all(mask.all() for mask in prune.magnitude(equal, 0.0).values())
    assert not any(mask.any() for mask in prune.magnitude(equal, 1.0, "global").values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_has_gone_stays_gone_as_the_share_rises(scope):
    rng = np.random.default_rng(0)
    kernels, masks = {"a": rng.normal(size=(9, 7)), "b": rng.normal(size=40)}, None
    for share in (0.2, 0.5, 0.51, 0.9):
        # what is masked could otherwise be larger by now than what is not
        grown = {name: rng.normal(size=kernel.shape) for name, kernel in kernels.items()}
        new = prune.magnitude(grown, share, scope, masks)
        assert sum(int((~mask).sum()) for mask in new.values()) == pytest.approx(share * 103, abs=1)
        if masks is not None:
            assert not any((new[name] & ~masks[name]).any() for name in new)
        masks = new


def test_two_of_four_by_hand_and_in_every_group():
    column = np.array([1, -3, 2, 0.5, -7, 7, 7, 0.0])[:, None]  # of equal ones the first
    assert prune.n_of_m(column)[:, 0].tolist() == [False, True, True, False, True, True, False, False]
    kernel = np.random.default_rng(0).normal(size=(3, 3, 16, 5))
    for n, m in ((2, 4), (1, 4), (4, 8)):
        mask = prune.n_of_m(kernel, n, m)
        groups = mask.reshape(3, 3, 16 // m, m, 5)
        assert (groups.sum(axis=3) == n).all()
        size = np.abs(kernel).reshape(groups.shape)
        assert np.where(groups, size, np.inf).min(axis=3).shape == (3, 3, 16 // m, 5)
        assert (np.where(groups, size, np.inf).min(axis=3) > np.where(groups, -1, size).max(axis=3)).all()
    with pytest.raises(core.InputError, match="2:4"):
        prune.n_of_m(np.ones((3, 5)))


def test_what_is_pruned_and_what_is_left_whole():
    image = keras.Input((8, 8, 4))
    x = layers.SeparableConv2D(8, 3, name="separable")(layers.DepthwiseConv2D(3, name="depthwise")(image))
    x = layers.BatchNormalization()(layers.PReLU(name="slopes")(x))
    x = layers.Reshape((-1, 8))(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    model = keras.Model(image, layers.Dense(3, name="logits")(layers.Flatten()(x)))
    names = set(prune.prunable(model))
    inside = {f"attention/{part}/kernel" for part in ("query", "key", "value", "attention_output")}
    assert names == {"separable/pointwise_kernel", "logits/kernel"} | inside
    assert set(prune.prunable(model, ["logits", "attention_output"])) == names - {
        "logits/kernel", "attention/attention_output/kernel"
    }  # fmt: skip
    model.trainable = False
    with pytest.raises(core.InputError, match="no weights to prune"):
        prune.prunable(model)


# --- held through training -------------------------------------------------------------------------------------------


class Watch(keras.callbacks.Callback):
    """The zeros after every step."""

    def __init__(self, model):
        super().__init__()
        self.weights, self.seen = prune.prunable(model), []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append({name: kernel == 0 for name, kernel in prune.arrays(self.weights).items()})


@pytest.mark.parametrize("optimizer", [
    functools.partial(keras.optimizers.SGD, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    functools.partial(keras.optimizers.AdamW, 0.05, weight_decay=0.1),
    functools.partial(keras.optimizers.RMSprop, 0.01, momentum=0.9, centered=True),
], ids=["sgd", "adamw", "rmsprop"])  # fmt: skip
def test_masks_hold_after_every_step(optimizer, data):
    model = dense()
    model.compile(optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = data.x_train.astype("float32")
    model.fit(x, data.y_train, 16, epochs=1, verbose=0)  # momentum and averages have something in store
    masks, before = prune.magnitude(prune.arrays(prune.prunable(model)), 0.7), model.get_weights()
    watch = Watch(model)
    with prune.held(model, masks):
        model.fit(x, data.y_train, 16, epochs=2, verbose=0, callbacks=[watch])
    assert len(watch.seen) == 8
    for zeros in watch.seen:
        assert all((zeros[name] == ~mask).all() for name, mask in masks.items()), "and nothing else is zero"
    assert any((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    assert all(weight.constraint is None for weight in model.trainable_weights), "the model is as before"


def test_masks_hold_in_a_loop_of_ones_own_and_keep_the_weights_own_constraint(data):
    import tensorflow as tf

    model = dense()
    kernel = model.get_layer("hidden").kernel
    kernel.constraint = keras.constraints.NonNeg()
    optimizer = keras.optimizers.Adam(0.05)
    x = ops.convert_to_tensor(data.x_train, "float32")
    masks = {"hidden/kernel": prune.magnitude({"k": np.asarray(kernel)}, 0.6)["k"]}
    with prune.held(model, masks):
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(model(x, training=True)))
            optimizer.apply(tape.gradient(loss, model.trainable_weights), model.trainable_weights)
            assert not np.asarray(kernel)[~masks["hidden/kernel"]].any()
            assert (np.asarray(kernel) >= 0).all()
    assert isinstance(kernel.constraint, keras.constraints.NonNeg)


def test_weights_set_behind_the_optimizers_back_are_found(data):
    model = dense()
    masks = prune.magnitude(prune.arrays(prune.prunable(model)), 0.5)
    averaged = keras.optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=1)  # averages of before the masks, too
    model.compile(averaged, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(data.x_train, data.y_train, 32, verbose=0)
    with pytest.raises(RuntimeError, match="was not held"), prune.held(model, masks):
        model.fit(data.x_train, data.y_train, 32, verbose=0)
    with pytest.raises(RuntimeError, match="hidden/kernel was not held"), prune.held(model, masks):
        model.get_layer("hidden").kernel.assign(np.ones((192, 16)))


def test_a_weight_that_is_not_finite_does_not_survive_its_mask():
    model = dense()
    kernel = np.asarray(model.get_layer("hidden").kernel).copy()
    kernel[0, 0] = np.nan
    model.get_layer("hidden").kernel.assign(kernel)
    mask = np.ones(kernel.shape, bool)
    mask[0, 0] = False
    with prune.held(model, {"hidden/kernel": mask}):
        assert np.asarray(model.get_layer("hidden").kernel)[0, 0] == 0


# --- the techniques --------------------------------------------------------------------------------------------------


def zeros(model):
    return {name: int((kernel == 0).sum()) for name, kernel in prune.arrays(prune.prunable(model)).items()}


@pytest.mark.parametrize(("scope", "begin"), [("layer", 0), ("global", 1)])
def test_gradual_pruning_follows_its_schedule(scope, begin, data, monkeypatch):
    model, watched = dense(), []

    def fit(pruned, data, settings, callbacks, **options):
        watched.append(Watch(pruned))
        return original(pruned, data, settings, [*callbacks, watched[0]], **options)

    original = prune.fit
    monkeypatch.setattr(prune, "fit", fit)
    before = model.get_weights()
    # three epochs of four steps, the milestones after `begin`, ..., 5 and 6 of them
    share = {"initial": 0.1, "begin": begin / 12, "end": 6 / 12, "updates": 6 - begin}
    training = dataclasses.replace(QUICK, epochs=3)
    pruned = prune.prune(model, data, prune.Pruning(sparsity=0.9, scope=scope, training=training, **share))
    expected = prune.polynomial(np.arange(1, 13), 0.9, initial=0.1, begin=begin, end=6)
    found = [sum(zeros.sum() for zeros in seen.values()) / (192 * 16 + 48) for seen in watched[0].seen]
    np.testing.assert_allclose(found, expected, atol=0.01)  # half a weight of the smallest layer
    for before_step, after_step in itertools.pairwise(watched[0].seen):
        assert all(after_step[name][gone].all() for name, gone in before_step.items()), "nothing comes back"
    assert zeros(pruned).keys() == {"hidden/kernel", "logits/kernel"}
    if scope == "layer":
        assert [*zeros(pruned).values()] == [round(0.9 * 3072), round(0.9 * 48)]
    assert sum(zeros(pruned).values()) == pytest.approx(0.9 * 3120, abs=1)
    assert prune.sparsity(pruned) == pytest.approx(0.9, abs=1e-3)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)  # the model given is as it was


def test_kept_layers_stay_dense_and_a_constant_schedule_prunes_at_once(data):
    settings = prune.Pruning(sparsity=0.75, schedule="constant", begin=0.5, keep=("logits",), training=QUICK)
    assert zeros(prune.prune(dense(), data, settings)) == {"hidden/kernel": 2304, "logits/kernel": 0}


def test_an_interrupted_pruning_ends_as_an_unbroken_one(data, tmp_path, monkeypatch):
    settings = prune.Pruning(sparsity=0.8, end=0.9, updates=6, training=dataclasses.replace(QUICK, epochs=3))
    whole = prune.prune(dense(), data, settings)

    def interrupt(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core.Progress, "on_epoch_end", interrupt)
        prune.prune(dense(), data, settings, tmp_path)
    resumed = prune.prune(dense(), data, settings, tmp_path)
    for ours, theirs in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_two_of_four_holds_through_training(data):
    model = residual(4)
    pruned = prune.prune_pattern(model, data, prune.Pattern(keep=("logits",), training=QUICK))
    dense_ones = []
    for name, weight in prune.prunable(pruned).items():
        kernel = np.asarray(weight)
        zeros = (kernel == 0).reshape(*kernel.shape[:-2], -1, 4, kernel.shape[-1]).sum(axis=-2) if not (
            kernel.shape[-2] % 4) else None  # fmt: skip
        if name == "logits/kernel" or zeros is None:
            dense_ones.append(list(kernel.shape))
            assert (kernel != 0).all()
        else:
            assert (zeros == 2).all()
    assert dense_ones == [[3, 3, 3, 4], [16, 3]], "three colours are not a multiple of four; the logits were kept"
    with pytest.raises(core.InputError, match="multiple of 1000"):
        prune.prune_pattern(model, data, prune.Pattern(n=2, m=1000, training=QUICK))


def test_sensitivity_prunes_one_layer_at_a_time_and_leaves_the_model(data):
    model = dense()
    model.get_layer("logits").kernel.assign(np.zeros((16, 3)))
    model.get_layer("logits").bias.assign([1.0, 0.0, 0.0])  # class 0 whatever the weights
    before, share = model.get_weights(), float((data.y_val == 0).mean())
    rows = prune.sensitivity(model, data, (0.5, 0.9))
    assert [(row["weight"], row["size"], row["sparsity"]) for row in rows] == [
        ("hidden/kernel", 3072, 0.5), ("hidden/kernel", 3072, 0.9),
        ("logits/kernel", 48, 0.5), ("logits/kernel", 48, 0.9),
    ]  # fmt: skip
    assert all(row["accuracy"] == share and row["drop"] == 0 for row in rows)
    trained = dense()
    prune.fit(trained, data, dataclasses.replace(QUICK, epochs=10))
    whole = prune.accuracy(trained, data.x_val, data.y_val)
    (row,) = [row for row in prune.sensitivity(trained, data, (1.0,)) if row["weight"] == "logits/kernel"]
    bias = int(np.argmax(trained.get_layer("logits").bias))
    assert row["accuracy"] == float((data.y_val == bias).mean()), "without weights the largest bias wins"
    assert row["drop"] == pytest.approx(whole - row["accuracy"])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
def test_what_pruning_costs_on_pictures():
    """Fashion-MNIST, nine tenths of the weights: cut off at once they are missed, gradually hardly."""
    found = load("fashion_mnist_12k")
    runtime.seed(0)
    mean, variance = float(found.x_train.mean()), float(found.x_train.var())
    model = convnets.small_resnet(found.x_train.shape[1:], 10, 8, [mean], [variance], dropout=0.0)
    prune.fit(model, found, Training(epochs=6, lr=0.1))
    at_once, training = prune.copy_of(model), Training(epochs=4, lr=0.02)
    for name, mask in prune.magnitude(prune.arrays(prune.prunable(model)), 0.9, "global").items():
        weight = prune.prunable(at_once)[name]
        weight.assign(weight * mask)
    gradually = prune.prune(model, found, prune.Pruning(sparsity=0.9, scope="global", training=training))
    half = prune.prune_pattern(model, found, prune.Pattern(training=training))
    dense, once, gradual, pattern = (100 * prune.accuracy(network, found.x_test, found.y_test)
                                     for network in (model, at_once, gradually, half))  # fmt: skip
    assert dense > 83
    assert once < dense - 30
    assert gradual > dense - 6
    assert pattern > dense - 3
