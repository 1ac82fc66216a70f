"""The training loop of the compression techniques, and knowledge distillation."""

import dataclasses
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from compression import distill, training
from compression.data import Data
from compression.distill import Distillation
from compression.training import Training
from course import core
from models.convnets import quick_resnet, small_resnet

CLASSES = 3


def flower(count, seed):
    """Points [count, 2] in the plane, and which of three sectors each is in."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 2)).astype("float32")
    return points, (np.arctan2(points[:, 1], points[:, 0]) // (2 * np.pi / 3) % 3).astype("int32")


@pytest.fixture(scope="module")
def data():
    parts = {}
    for i, part in enumerate(("train", "val", "test")):
        parts[f"x_{part}"], parts[f"y_{part}"] = flower((512, 64, 256)[i], seed=i)
    return Data(**parts, labels=list("abc"), provenance={"name": "sectors"})


def network(units=32, seed=0):
    keras.utils.set_random_seed(seed)
    point = keras.Input((2,), name="point")
    hidden = layers.Dense(units, "relu", name="hidden")(point)
    return keras.Model(point, layers.Dense(CLASSES, name="logits")(hidden))


@pytest.fixture(scope="module")
def teacher(data):
    model = network()
    training.fit(model, data, Training(epochs=20, batch=32, lr=0.2))
    return model


def decisions(model, x):
    return model.predict(x, verbose=0).argmax(axis=1)


def weights(model):
    return [np.array(weight) for weight in model.get_weights()]


# --- the training loop -----------------------------------------------------------------------------------------------


def test_cross_entropy_with_smoothing_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], "float32"))
    plain = training.cross_entropy()(np.array([0, 2]), logits)
    np.testing.assert_allclose(plain, [-math.log(0.5), -math.log(0.8)], rtol=1e-5)
    smooth = training.cross_entropy(0.3)(np.array([[0], [2]]), logits)  # targets 0.8, 0.1, 0.1
    expected = [-(0.8 * math.log(0.5) + 0.2 * math.log(0.25)), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    np.testing.assert_allclose(smooth, expected, rtol=1e-5)


def test_the_rate_rises_and_falls_to_zero():
    rate = training.optimizer(Training(lr=0.4, warm_up=0.25), 80).learning_rate
    schedule = training.optimizer(Training(lr=0.4, warm_up=0.25), 80)._learning_rate
    assert float(rate) == 0
    found = [float(schedule(step)) for step in (10, 20, 50, 80)]
    np.testing.assert_allclose(found, [0.2, 0.4, 0.2, 0.0], atol=1e-6)  # half way up, top, half a cosine, end
    assert float(training.optimizer(Training(lr=0.4, warm_up=0.0), 80)._learning_rate(0)) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("changed", "match"), [({"optimizer": "lion"}, "sgd or adam"), ({"warm_up": 1.0}, "warm_up is 1.0")]
)
def test_unusable_settings_are_refused(data, changed, match):
    with pytest.raises(core.InputError, match=match):
        training.fit(network(), data, Training(**changed))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fit_trains_in_place_and_repeats_itself(data, optimizer):
    settings = Training(epochs=3, batch=32, lr=0.05, optimizer=optimizer, seed=4)
    models = [network(), network()]
    histories = [training.fit(model, data, settings) for model in models]
    assert histories[0] == histories[1]
    assert histories[0].keys() == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert histories[0]["loss"][-1] < 0.8 * histories[0]["loss"][0]
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_is_for_training_and_for_pictures_alone():
    settings = Training(flip=True, shift=0.2)
    assert training.augmentation(settings, (2,)) == []
    assert training.augmentation(Training(), (8, 8, 1)) == []
    change = keras.Sequential([keras.Input((8, 8, 1)), *training.augmentation(settings, (8, 8, 1))])
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(change(pictures, training=False), pictures)
    assert not np.array_equal(change(pictures, training=True), pictures)


class Stops(keras.callbacks.Callback):
    """A kill after two epochs, and a number that a technique carries along."""

    def __init__(self, last):
        super().__init__()
        self.last, self.count = last, keras.Variable(0.0)
        self.variables = [self.count]

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.last:
            raise KeyboardInterrupt
        self.count.assign_add(1.0)


def test_an_interrupted_training_ends_as_an_unbroken_one(data, tmp_path):
    settings = Training(epochs=4, batch=32, lr=0.05)
    whole, broken = network(), network()
    history = training.fit(whole, data, settings)
    with pytest.raises(KeyboardInterrupt):
        training.fit(broken, data, settings, [Stops(2)], checkpoint=tmp_path)
    again, counter = network(seed=9), Stops(None)
    assert training.fit(again, data, settings, [counter], checkpoint=tmp_path) == history
    assert float(counter.count) == 4  # two epochs before, two after
    for one, other in zip(weights(again), weights(whole), strict=True):
        np.testing.assert_array_equal(one, other)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_soft_loss_by_hand():
    p = 1 / (1 + math.exp(-1))  # softmax of (2, 0) / 2
    divergence = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    found = distill.soft_loss(np.array([[2.0, 0.0]], "float32"), np.zeros((1, 2), "float32"), 2.0)
    np.testing.assert_allclose(found, [4 * divergence], rtol=1e-5)


def gradient(loss, wanted, given):
    z = tf.Variable(given)
    with tf.GradientTape() as tape:
        value = loss(wanted, z)
    return tape.gradient(value, z).numpy()


def test_the_gradient_keeps_its_scale_as_the_temperature_grows():
    rng = np.random.default_rng(0)
    wanted, given = (rng.normal(size=(5, 10)).astype("float32") for _ in range(2))
    size = {}
    for temperature in (1.0, 5.0, 50.0):
        found = gradient(lambda v, z, t=temperature: distill.soft_loss(v, z, t), wanted, given)
        q, p = (np.array(keras.ops.softmax(logits / temperature)) for logits in (given, wanted))
        np.testing.assert_allclose(found, temperature * (q - p), atol=1e-4)  # T^2 times 1/T (q - p): Hinton, eq. 2
        size[temperature] = np.abs(found).mean()
    # without the factor T^2 the last would be some 2,500 times smaller than the first
    assert 0.3 < size[50.0] / size[1.0] < 3
    centred = [logits - logits.mean(axis=1, keepdims=True) for logits in (given, wanted)]
    limit = (centred[0] - centred[1]) / 10  # Hinton, eq. 4, times T^2
    np.testing.assert_allclose(found, limit, atol=0.02 * np.abs(limit).max())


def test_the_mixture_of_labels_teacher_and_hint():
    rng = np.random.default_rng(1)
    given, wanted = (rng.normal(size=(4, CLASSES)).astype("float32") for _ in range(2))
    labels, hint = np.array([0, 2, 1, 1]), np.array([[0.5], [1.0], [0.0], [2.0]], "float32")
    columns = np.concatenate([given, wanted, hint], axis=1)
    settings = Distillation(temperature=3.0, hard=0.25, hint_weight=2.0)
    hard, soft = training.cross_entropy()(labels, given), distill.soft_loss(wanted, given, 3.0)
    found = distill.distillation_loss(settings, CLASSES)(labels, columns)
    np.testing.assert_allclose(found, 0.25 * hard + 0.75 * soft + 2 * hint[:, 0], rtol=1e-5)
    right = distill.student_accuracy(CLASSES)(labels, columns)
    np.testing.assert_array_equal(right, given.argmax(axis=1) == labels)


# --- the student -----------------------------------------------------------------------------------------------------


def test_the_student_learns_from_the_teacher_alone(teacher, data):
    """With wrong labels and weight 0 on them, all that it can learn is the teacher's."""
    rng = np.random.default_rng(0)
    wrong = dataclasses.replace(data, y_train=rng.permutation(data.y_train))
    before = weights(teacher)
    settings = Distillation(width=0.25, hard=0.0, training=Training(epochs=20, batch=32, lr=0.1))
    student = distill.distill(teacher, wrong, settings)
    assert student.get_layer("hidden").units == 8
    assert np.mean(decisions(student, data.x_test) == decisions(teacher, data.x_test)) > 0.95
    for weight, was in zip(weights(teacher), before, strict=True):
        np.testing.assert_array_equal(weight, was)
    assert teacher.trainable and len(teacher.trainable_weights) == 4


def test_labels_alone_are_plain_training(teacher, data):
    settings = Distillation(width=0.5, hard=1.0, seed=3, training=Training(epochs=2, batch=32, lr=0.1))
    student = distill.distill(teacher, data, settings)
    core.runtime.seed(3)
    plain = distill.narrowed(teacher, 0.5)
    training.fit(plain, data, settings.training)
    for one, other in zip(weights(student), weights(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_columns_hold_both_models_answers_and_the_hint(teacher, data):
    student = network(8, seed=5)
    pair = distill.together(student, teacher, hint="hidden")
    x = data.x_test[:6]
    columns = pair.predict(x, verbose=0)
    np.testing.assert_allclose(columns[:, :CLASSES], student.predict(x, verbose=0), atol=1e-5)
    np.testing.assert_allclose(columns[:, CLASSES:-1], teacher.predict(x, verbose=0), atol=1e-5)
    kernel, bias = pair.get_layer("hint_map").get_weights()
    maps = [keras.Model(model.input, model.get_layer("hidden").output).predict(x, verbose=0)
            for model in (student, teacher)]  # fmt: skip
    expected = np.mean((maps[0] @ kernel + bias - maps[1]) ** 2, axis=1) / 2
    np.testing.assert_allclose(columns[:, -1], expected, rtol=1e-4)
    trained = {weight.path.split("/")[-2] for weight in pair.trainable_weights}
    assert trained == {"hidden", "logits", "hint_map"} and len(pair.trainable_weights) == 6  # none of the teacher's
    assert not distill.together(student, teacher).predict(x, verbose=0)[:, -1].any()


def test_narrowed_keeps_inputs_classes_and_the_datas_moments():
    for build in (small_resnet, quick_resnet):
        model = build((16, 16, 3), 5, 16, [100.0, 90.0, 80.0], [900.0, 800.0, 700.0])
        small = distill.narrowed(model, 0.5)
        assert (small.input_shape, small.output_shape) == (model.input_shape, model.output_shape)
        assert small.get_layer(index=2).filters == 8
        assert small.count_params() < 0.35 * model.count_params()
    learned = layers.Normalization(name="moments")
    learned.adapt(np.array([[1.0, 10.0], [3.0, 30.0]], "float32"))
    point = keras.Input((2,))
    model = keras.Model(point, layers.Dense(3)(layers.Dense(16)(learned(point))))
    small = distill.narrowed(model, 0.5)
    for one, other in zip(small.get_layer("moments").weights, learned.weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_taper_narrows_most_where_a_network_is_narrow():
    model = quick_resnet((16, 16, 3), 5, 32, [100.0] * 3, [900.0] * 3)  # 32, then 64, 128, 128 twice each

    def channels(width, taper):
        found = distill.narrowed(model, width, taper).layers
        return [layer.filters for layer in found if isinstance(layer, layers.Conv2D)]

    assert channels(0.5, 0.0) == [16, 32, 32, 64, 64, 64, 64]
    assert channels(0.5, 1.0) == [8, 16, 16, 64, 64, 64, 64]  # 32 / 8 = 4 is made 8: so many are computed at a time
    assert channels(0.3, 0.0) == [8, 16, 16, 40, 40, 40, 40]  # 9.6, 19.2, 38.4
    assert channels(1.0, 0.0) == [32, 64, 64, 128, 128, 128, 128]


def test_what_cannot_be_is_refused_in_a_line(teacher, data):
    point = keras.Input((2,))
    fixed = keras.Model(point, layers.Dense(3)(layers.Flatten()(layers.Reshape((2, 8))(layers.Dense(16)(point)))))
    with pytest.raises(core.InputError, match=r"cannot be made narrower layer by layer .*give a student"):
        distill.distill(fixed, data, Distillation(width=0.3))
    other = keras.Sequential([keras.Input((2,)), layers.Dense(4)])
    with pytest.raises(core.InputError, match=r"the student maps .*\(None, 4\)"):
        distill.distill(teacher, data, student=other)
    with pytest.raises(core.InputError, match="no layer 'nose': choose from point, hidden, logits"):
        distill.distill(teacher, data, Distillation(hint="nose"))
    for wrong in ({"hard": 1.5}, {"temperature": 0.0}):
        with pytest.raises(core.InputError, match="give a share, and a number above 0"):
            distill.distill(teacher, data, Distillation(**wrong))
