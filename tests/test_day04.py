"""Day 04: the lesson's own convolutions, pooling and network, and the networks of its grid."""

import functools
import json

import keras
import numpy as np
import pytest

from course import core, day04_cnn
from models import costs
from models.cnn import small, twin
from models.numpy_net import checks, conv


@pytest.fixture
def rng():
    return np.random.default_rng(4)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_windows_by_hand():
    x = np.arange(16.0).reshape(1, 4, 4, 1)
    for windows in (day04_cnn.im2col(x, (2, 2), 2), day04_cnn.view(x, (2, 2), 2)):
        assert windows.shape == (1, 2, 2, 2, 2, 1)
        assert windows[0, 0, 1].ravel().tolist() == [2, 3, 6, 7]
        assert windows[0, 1, 0].ravel().tolist() == [8, 9, 12, 13]
    (dilated,) = day04_cnn.im2col(x, (2, 2), 1, 3).reshape(-1, 4)
    assert dilated.tolist() == [0, 3, 12, 15]  # the corners


@pytest.mark.parametrize(("size", "stride", "dilation"), [((3, 2), 1, 1), ((2, 3), 3, 1), ((3, 3), 2, 2)])
def test_the_view_is_im2col_without_a_copy_and_fold_is_its_transpose(rng, size, stride, dilation):
    x = rng.standard_normal((2, 8, 9, 3))
    view, copied = (f(x, size, stride, dilation) for f in (day04_cnn.view, day04_cnn.im2col))
    np.testing.assert_array_equal(view, copied)
    assert np.shares_memory(view, x) and not np.shares_memory(copied, x)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    other = rng.standard_normal(view.shape)  # <unfold(x), y> = <x, fold(y)> for all x, y
    folded = day04_cnn.fold(other, x.shape, stride, dilation)
    assert (view * other).sum() == pytest.approx((x * folded).sum(), rel=1e-12)


def test_the_view_of_a_view(rng):
    x = rng.standard_normal((2, 9, 9, 4))[:, ::2, 1:, ::2]  # strides of its own
    np.testing.assert_array_equal(day04_cnn.view(x, (2, 3), 2), day04_cnn.im2col(x, (2, 3), 2))


# --- convolution and pooling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["im2col", "strides"])
def test_convolution_by_hand(name):
    forward, backward = day04_cnn.OURS[name]
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    w = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    out, cache = forward(x, w, np.array([0.5]))
    assert out.ravel().tolist() == [27.5, 37.5, 57.5, 67.5]  # first: 0 + 2*1 + 3*3 + 4*4 + 0.5
    dx, dw, db = backward(np.ones_like(out), cache)
    assert dx.ravel().tolist() == [1, 3, 2, 4, 10, 6, 3, 7, 4]
    assert dw.ravel().tolist() == [8, 12, 20, 24] and db.tolist() == [4]


def test_every_backward_pass_against_finite_differences(rng):
    table = checks.rows(twin.gradients(day04_cnn.OURS, day04_cnn.POOLS, rng))
    assert {row["of"] for row in table} >= {"max pool", "average pool", "im2col 5x5, stride 3, pad 2, dilation 1",
                                            "strides 3x3, stride 1, pad 2, dilation 2"}  # fmt: skip
    for row in table:
        assert row["relative"] < 1e-7 and row["norm"] < 1e-8 and row["checked"] == row["size"], row


def test_convolutions_equal_keras_and_each_other_forward_and_back(rng):
    known = day04_cnn.OURS | {"naive": (conv.conv_naive_forward, conv.conv_naive_backward)}
    rows = twin.differences(known, rng, [day04_cnn.PatchConv2D])
    assert len(rows) == len(twin.SETTINGS)
    for row in rows:
        for way in ("im2col", "strides", "naive", "PatchConv2D"):
            assert row[way] < 1e-12, row


def test_the_comparison_with_keras_sees_a_wrong_gradient(rng):
    def wrong(d_out, cache):
        dx, dw, db = day04_cnn.im2col_backward(d_out, cache)
        return dx, 1.001 * dw, db

    assert all(row["wrong"] > 1e-3 for row in twin.differences({"wrong": (day04_cnn.im2col_forward, wrong)}, rng))


@pytest.mark.parametrize(
    ("name", "layer"), [("max pool", keras.layers.MaxPooling2D), ("average pool", keras.layers.AveragePooling2D)]
)
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_equals_keras(rng, name, layer, size):
    import tensorflow as tf

    forward, backward = day04_cnn.POOLS[name]
    x = rng.standard_normal((2, 7, 6, 3))
    out, cache = forward(x, size)
    upstream, watched = rng.standard_normal(out.shape), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        expected = layer(size, dtype="float64")(watched)
    np.testing.assert_allclose(out, expected, atol=1e-15)
    np.testing.assert_allclose(backward(upstream, cache), tape.gradient(expected, watched, upstream), atol=1e-15)


def test_max_pooling_at_a_tie_pays_the_first():
    x = np.ones((1, 2, 2, 1))
    _, cache = day04_cnn.max_pool_forward(x)
    assert day04_cnn.max_pool_backward(np.full((1, 1, 1, 1), 3.0), cache).ravel().tolist() == [3, 0, 0, 0]


def test_the_patch_layer_calls_no_convolution_and_is_saved_whole(rng, tmp_path):
    import tensorflow as tf

    options = {"strides": 2, "padding": "same", "activation": "relu"}
    model = keras.Sequential([keras.Input((9, 8, 3)), day04_cnn.PatchConv2D(4, 3, **options)])
    theirs = keras.Sequential([keras.Input((9, 8, 3)), keras.layers.Conv2D(4, 3, **options)])
    theirs.set_weights(model.get_weights())
    x = rng.standard_normal((2, 9, 8, 3)).astype("float32")
    np.testing.assert_allclose(model(x), theirs(x), atol=1e-6)
    graph = tf.function(model).get_concrete_function(tf.TensorSpec((2, 9, 8, 3))).graph
    assert not [op.name for op in graph.get_operations() if "Conv" in op.type]
    assert costs.flops(model) == costs.flops(theirs) == 2 * 5 * 4 * 4 * 27
    model.save(tmp_path / "patch.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "patch.keras")(x), model(x))


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(28, 28, 1), (10, 13, 3)])
def test_network_gradients_and_keras_twin(rng, shape):
    params = small.create(rng, shape, 5, filters=4)
    x, y = rng.standard_normal((24, *shape)).astype(np.float32), rng.integers(0, 5, 24)
    found = small.check(day04_cnn.STACK, params, x[:2], y[:2], rng, day04_cnn.sides)
    assert {check.name for check in found} == set(params)
    for check in found:
        assert check.relative < 1e-7 and check.norm < 1e-8, check
        assert check.checked >= 0.8 * (check.checked + check.skipped)
    curves, difference = small.compare(day04_cnn.STACK, params, x, y, batch=4, lr=0.1)
    assert difference < 1e-14
    for dtype, bound in (("float64", 1e-12), ("float32", 1e-5)):
        ours, theirs = curves[dtype]
        assert len(ours) == len(theirs) == 6 and np.abs(ours - theirs).max() < bound
    assert curves["float64"][0][0] == pytest.approx(np.log(5), abs=0.2)


def test_the_network_learns(rng):
    """Bars, upright or lying, at any place: what a convolution is made for."""
    x, y = 0.2 * rng.standard_normal((640, 16, 16, 1)).astype(np.float32), rng.integers(0, 2, 640)
    for picture, lying, at in zip(x, y, rng.integers(0, 16, 640), strict=True):
        picture[(at, slice(None)) if lying else (slice(None), at)] += 1
    params = small.create(rng, (16, 16, 1), 2, filters=8)
    before = small.accuracy(day04_cnn.STACK, params, x[512:], y[512:])
    for _ in range(4):
        curve = small.train(day04_cnn.STACK, params, x[:512], y[:512], lr=0.05, batch=16)
    assert len(curve) == 32 and before < 75
    assert small.accuracy(day04_cnn.STACK, params, x[512:], y[512:]) > 95


# --- the grid --------------------------------------------------------------------------------------------------------


def test_every_arm_builds_and_the_arms_differ_as_they_say():
    build = functools.partial(day04_cnn.build_model, shape=(32, 32, 3), classes=10)
    found = {}
    for name, design in day04_cnn.ARMS.items():
        model = build(design, round(8 * design.scale))
        assert model.output_shape == (None, 10)
        found[name] = costs.count(model) | {"sees": costs.receptive_field(model).size[0]}
    base = found["3x3"]
    # 8, 16 and 32 channels: two convolutions a stage, on maps of 32, 16 and 8 pixels a side, and the scores
    macs = 1024 * 8 * 9 * (3 + 8) + 256 * 16 * 9 * (8 + 16) + 64 * 32 * 9 * (16 + 32) + 320
    assert base["flops"] == 2 * macs
    assert base["sees"] == 1 + 2 * 2 * (1 + 2 + 4) + 1 + 2 + 4  # convolutions, then pools, on strides 1, 2 and 4
    assert found["average"]["flops"] == base["flops"] == found["augment"]["flops"] == found["residual BN"]["flops"]
    assert found["strided"]["flops"] > base["flops"] > found["stem 2"]["flops"]
    assert found["shallow"]["flops"] < base["flops"] < found["deep"]["flops"]
    assert found["separable BN"]["flops"] < base["flops"] / 3
    assert found["wide"]["params"] > 3.5 * base["params"] > 12 * found["narrow"]["params"]
    assert found["BN"]["params"] - found["BN"]["trainable_params"] == 2 * 2 * (8 + 16 + 32)  # the running moments
    assert found["1x1"]["sees"] < base["sees"] < found["5x5"]["sees"] < found["7x7"]["sees"]


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_other_kernels_at_equal_flops(kernel):
    build = functools.partial(day04_cnn.build_model, shape=(32, 32, 3), classes=10)
    target = costs.flops(build(day04_cnn.Design(), 12))
    width, model = costs.match(lambda width: build(day04_cnn.Design(kernel=kernel), width), target, most=48)
    assert abs(costs.flops(model) / target - 1) < 0.2  # widths are whole numbers
    assert (width - 12) * (kernel - 3) < 0


def test_the_residual_branch_is_a_sum():
    model = day04_cnn.build_model(day04_cnn.Design(residual=True), 4, (16, 16, 3), 10)
    assert sum(isinstance(layer, keras.layers.Add) for layer in model.layers) == 3
    plain = day04_cnn.build_model(day04_cnn.Design(), 4, (16, 16, 3), 10)
    assert not any(isinstance(layer, keras.layers.Add) for layer in plain.layers)


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(core.InputError, match=r"9x9.*choose from 3x3"):
        day04_cnn.main(["--preset", "smoke", "--arms", "9x9", "--runs", str(tmp_path)])


@pytest.mark.parametrize(("flags", "images"), [(["--batch", "2000"], 320), (["--train", "50"], 50)])
def test_a_batch_larger_than_the_training_images_is_refused(tmp_path, flags, images):
    with pytest.raises(core.InputError, match=f"--batch .*: only {images} training images: give a smaller one"):
        day04_cnn.main(["--preset", "smoke", "--runs", str(tmp_path), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.smoke
def test_smoke_preset_end_to_end(tmp_path):
    record = day04_cnn.main(
        ["--preset", "smoke", "--seed", "5", "--runs", str(tmp_path), "--exports", str(tmp_path / "e")]
    )
    folder = tmp_path / "day04_cnn" / "smoke-s5"
    assert json.loads((folder / "result.json").read_text())["metrics"].keys() == record["metrics"].keys()
    figures = {"gradient_check", "keras_twin", "pareto_flops", "pareto_ms", "pareto_ms_of_32", "learning_curves",
               "filters", "feature_maps"}  # fmt: skip
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    metrics = record["metrics"]
    assert list(metrics)[:3] == ["test_accuracy", "val_accuracy", "gradient_check_worst"]
    assert metrics["gradient_check_worst"] < 1e-7 and metrics["gradients_checked"] > 5_000
    assert metrics["conv2d_difference"] < 1e-12 and metrics["twin_gradient_difference"] < 1e-14
    assert metrics["twin_loss_difference_float64"] < 1e-12 and metrics["twin_loss_difference_float32"] < 1e-5
    assert metrics["numpy_loss_last"] < metrics["numpy_loss_first"]
    assert [row["arm"] for row in record["tables"]["grid"]] == ["3x3", "7x7"]
    small_kernel, large_kernel = record["tables"]["grid"]
    assert "last_epoch_train_accuracy" in small_kernel
    assert large_kernel["width"] < small_kernel["width"] and large_kernel["sees"] > small_kernel["sees"]
    assert sum(row["flops"] for row in record["tables"]["layers"]) == metrics["best_flops"]
    assert 0 <= metrics["test_accuracy"] <= 100
    (version,) = (tmp_path / "e" / "day04_cnn").iterdir()
    assert json.loads((version / "assets.extra" / "trained_on.json").read_text()) == {
        "unit": "day04_cnn", "data": "fashion_mnist_12k"}  # fmt: skip
