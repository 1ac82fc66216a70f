"""Assignment 2, ConvNets: the lesson's own layers by hand, by finite differences, against the library and Keras."""

import functools

import keras
import numpy as np
import pytest

from course import a2_convnet as unit
from course import core
from models import convnets
from models.numpy_net import convnet, optim
from models.numpy_net.solver import Solver


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def test_convolution_by_hand():
    x = np.array([[1.0, 2, 0], [0, 1, 3], [2, 0, 1]]).reshape(1, 3, 3, 1)
    w, b = np.array([[1.0, 0], [-1, 2]]).reshape(2, 2, 1, 1), np.array([0.5])
    out, cache = unit.conv_naive_forward(x, w, b)
    np.testing.assert_array_equal(
        out[0, :, :, 0], [[1 - 0 + 2 + 0.5, 2 - 1 + 6 + 0.5], [0 - 2 + 0 + 0.5, 1 - 0 + 2 + 0.5]]
    )
    dx, dw, db = unit.conv_naive_backward(np.array([[1.0, 0], [0, 3]]).reshape(1, 2, 2, 1), cache)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[1, 0, 0], [-1, 2 + 3, 0], [0, -3, 6]])
    np.testing.assert_array_equal(dw[:, :, 0, 0], [[1 + 3, 2 + 9], [0, 1 + 3]])
    np.testing.assert_array_equal(db, [4])


def test_a_stride_and_a_pad_count_as_in_the_assignment():
    x, w = np.zeros((2, 7, 7, 3)), np.zeros((3, 3, 3, 5))
    for stride, pad, side in ((1, 0, 5), (1, 1, 7), (2, 1, 4), (3, 0, 2)):
        assert unit.conv_naive_forward(x, w, np.zeros(5), stride, pad)[0].shape == (2, side, side, 5)


def test_pooling_by_hand():
    x = np.array([[1.0, 5, 2, 0], [4, 3, 8, 1]]).reshape(1, 2, 4, 1)
    out, cache = unit.max_pool_naive_forward(x)
    np.testing.assert_array_equal(out.ravel(), [5, 8])
    dx = unit.max_pool_naive_backward(np.array([3.0, 4]).reshape(1, 1, 2, 1), cache)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0, 3, 0, 0], [0, 0, 4, 0]])


def test_gradients_against_finite_differences(rng):
    layers = convnet.check_layers(unit.NAIVE, unit.NORMS, rng)
    assert set(layers) == {"convolution", "pooling", "spatial batch norm", "spatial group norm"}
    for name, found in layers.items():
        for check in found:  # the assignment's bounds
            assert check.norm < (1e-12 if name == "pooling" else 1e-8), (name, check)
            assert check.checked == check.size
    stacks = convnet.check_sandwiches(unit.sandwich, unit.stack_forward, unit.stack_backward, rng)
    stacks |= convnet.check_networks(unit.loss, unit.network, rng)
    assert len(stacks) == 8
    for name, found in stacks.items():
        for check in found:
            assert check.relative < 1e-7 and check.checked > 0.7 * min(check.size, 30), (name, check)


def test_a_wrong_gradient_is_found(rng):
    forward, backward = unit.NORMS["group"]
    wrong = {"group": (forward, lambda d_out, cache: tuple(1.001 * slope for slope in backward(d_out, cache)))}
    found = convnet.check_layers(unit.NAIVE, wrong, rng)["spatial group norm"]
    assert min(check.norm for check in found) > 1e-4

    def no_reg(net, x, y, reg):
        value, gradients = unit.loss(net, x, y, reg)
        return value, unit.loss(net, x, y, 0.0)[1] | {"b1": gradients["b1"]}

    found = convnet.check_networks(no_reg, unit.network, rng)["network, no norm, reg 0.1"]
    assert {check.name for check in found if check.norm > 1e-3} == {"W1", "W2", "W3"}


def test_fast_versions_and_the_library_give_the_same(rng):
    rows = convnet.differences(unit.NAIVE, unit.NORMS, rng)
    assert len(rows) == 6
    for row in rows:
        assert row["difference"] < 1e-9, row  # the assignment's bound; 1e-14 is usual
    forward, backward = unit.NAIVE["pooling"]
    wrong = unit.NAIVE | {"pooling": (lambda x, size: (forward(x, size)[0] + 1e-6, forward(x, size)[1]), backward)}
    rows = convnet.differences(wrong, unit.NORMS, rng)
    assert [row["difference"] > 1e-7 for row in rows] == [False, False, True, True, False, False]


def test_the_network_is_the_same_in_loops_and_in_keras(rng):
    net = convnet.create(rng, (8, 6, 2), 5, filters=4, hidden=6)
    x, y = rng.standard_normal((4, 8, 6, 2)).astype(np.float32), rng.integers(0, 5, 4)
    exact = convnet.ConvNet({name: array.astype(np.float64) for name, array in net.params.items()})
    fast, slow = (unit.loss(exact, x.astype(np.float64), y, 0.1, version=v) for v in (unit.FAST, unit.NAIVE))
    assert fast[0] == pytest.approx(slow[0], rel=1e-14)
    for name, slope in fast[1].items():
        np.testing.assert_allclose(slow[1][name], slope, rtol=0, atol=1e-13)
    rows = convnet.in_keras(unit.loss, unit.scores_of, net, unit.barebones, unit.sequential, x, y)
    assert [row["difference"] < bound for row, bound in zip(rows, (1e-12, 1e-12, 1e-5), strict=True)] == [True] * 3


def test_a_trained_batch_norm_network_answers_one_picture_as_many(rng):
    net = convnet.create(rng, (8, 8, 3), 5, filters=4, hidden=6, normalization="batch")
    x, y = rng.standard_normal((30, 8, 8, 3)).astype(np.float32), rng.integers(0, 5, 30)
    before = unit.scores_of(net, x)
    for _ in range(5):
        unit.loss(net, x, y)
    assert (net.running["var"] != 1).all()
    after = unit.scores_of(net, x)
    assert np.abs(after - before).max() > 1e-4
    np.testing.assert_allclose(unit.scores_of(net, x[:1]), after[:1], atol=1e-6)


@pytest.mark.parametrize("normalization", [None, "batch", "group"])
def test_the_solver_teaches_it_by_heart(rng, normalization):
    net = convnet.create(rng, (8, 8, 1), 10, filters=8, hidden=20, normalization=normalization)
    x, y = rng.standard_normal((40, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 40)
    solver = Solver(unit.loss, unit.scores_of, 40, 20, 3e-3, rule=optim.adam, keep_best=False, verbose=False)
    history = solver.fit(net, (x, y), (x, y))
    assert history.losses[0] == pytest.approx(np.log(10), abs=0.3) and history.losses[-1] < 0.3
    assert history.best_val_accuracy == 100


def test_sanity(rng):
    net = convnet.create(rng, (8, 8, 1), 10, filters=8, hidden=50)
    x, y = rng.standard_normal((50, 8, 8, 1)).astype(np.float32), rng.integers(0, 10, 50)
    found = convnet.sanity(unit.loss, unit.scores_of, net, x, y)
    assert found["first_loss"] == pytest.approx(found["first_loss_expected"], abs=0.2)
    assert found["first_loss_expected"] == pytest.approx(np.log(10), rel=1e-12)
    assert found["first_loss_regularised"] == pytest.approx(found["first_loss_regularised_expected"], rel=1e-6)


def test_times_has_a_row_a_version():
    def lazy(*arrays):  # in place of the naive layers: instantly, something of no use
        return None, None

    rows = convnet.times({"convolution": (lazy, lazy), "pooling": (lazy, lazy)}, 1, seed=0)
    assert [row["version"] for row in rows] == ["naive", "im2col", "fast", "naive", "tiles", "fast"]
    assert rows[0]["times faster"] == 1 and all(row["times faster"] < 1 for row in rows[1:3])


# --- the deep network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1)])
def test_quick_resnet_normalises_pixels_and_starts_soft(shape, rng):
    model = convnets.quick_resnet(shape, 10, 4, [100.0] * shape[2], [900.0] * shape[2])
    x = rng.integers(0, 256, (3, *shape)).astype(np.uint8)
    np.testing.assert_allclose(model.layers[1](x), (x.astype(np.float32) - 100) / 30, rtol=1e-5, atol=1e-5)
    scores = model(x)
    assert scores.shape == (3, 10) and scores.dtype == "float32"
    assert sum(isinstance(layer, keras.layers.Add) for layer in model.layers) == 3


def test_quick_resnet_has_the_size_of_the_recipe():
    model = convnets.quick_resnet((32, 32, 3), 10, 32, [0.0] * 3, [1.0] * 3)
    weights, width, inputs = 0, 32, 3
    for channels in (width, 2 * width, 2 * width, 4 * width, 4 * width, 4 * width, 4 * width):
        weights += 9 * inputs * channels + 4 * channels  # kernels; gamma, beta, running mean and variance
        inputs = channels
    assert model.count_params() == weights + inputs * 10 == 576_224


class Run:
    """What `train_deep` asks of a run."""

    def __init__(self, folder):
        self.folder = folder

    def checkpoint(self, model, name="model"):
        return core.Checkpoint(self.folder / name, model)


@pytest.mark.slow
def test_an_interrupted_training_of_the_deep_network_ends_as_an_unbroken_one(tmp_path, monkeypatch, rng):
    x, y = rng.integers(0, 256, (60, 16, 16, 1)).astype(np.uint8), rng.integers(0, 3, 60).astype(np.int32)
    parts = core.data.Splits(x[:40], y[:40], x[40:], y[40:], x[40:], y[40:])
    cfg = unit.Config(width=2, epochs=3, deep_batch=10, peak=0.05)
    save = core.Checkpoint.save

    def trained(folder):
        keras.utils.set_random_seed(3)
        return unit.train_deep(Run(tmp_path / folder), parts, cfg, 3)[1]

    whole = trained("whole")

    def interrupted(self, epoch, logs, arrays=None):
        save(self, epoch, logs, arrays)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(core.Checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained("broken")
    monkeypatch.setattr(core.Checkpoint, "save", save)
    assert trained("broken") == whole and len(whole["loss"]) == 3


def test_figures_can_be_drawn_of_colours_and_of_grey(rng):
    for channels in (1, 3):
        pictures = rng.integers(0, 256, (3, 9, 9, channels)).astype(np.uint8)
        figure = convnet.draw_by_hand(pictures, functools.partial(unit.conv_naive_forward))
        assert len(figure.axes) == 4 * 3
        assert len(convnet.draw_filters(rng.standard_normal((7, 7, channels, 16))).axes) == 16


def test_a_deep_batch_of_more_than_the_training_images_is_refused_before_the_run(tmp_path):
    with pytest.raises(core.InputError, match="--deep-batch 1001 is more than --train 1000"):
        unit.main(["--preset", "smoke", "--deep-batch", "1001", "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
