"""Filters removed: the narrower network against the big one with its filters masked."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers, ops
from pruning_models import QUICK, noise, randomised, residual

from compression import lite, prune, structured
from compression.channels import Channels, rebuild, width_of
from course import core
from models import convnets, costs


@pytest.fixture(scope="module")
def data():
    return noise()


def plain(shape=(12, 12, 3), widths=(8, 12), hidden=10):
    image = keras.Input(shape)
    x = layers.Rescaling(1 / 255)(image)
    for i, width in enumerate(widths):
        x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{i}")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(hidden, "relu", name="hidden")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(4, name="logits")(x))


def mobile():
    image = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, 2, "same", use_bias=False)(layers.Normalization(mean=[1.0] * 3, variance=[4.0] * 3)(image))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = layers.PReLU(shared_axes=[1, 2])(layers.BatchNormalization(scale=False)(x))
    gate = layers.Conv2D(6, 1, activation="silu", name="squeeze")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Multiply()([x, layers.Conv2D(16, 1, activation="sigmoid", name="excite")(gate)])
    x = layers.SeparableConv2D(12, 3, depth_multiplier=2, activation="gelu")(x)
    return keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def dense_net():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="stem")(image)
    for i in range(2):
        y = layers.Conv2D(4, 3, padding="same", name=f"grow{i}")(layers.ReLU()(layers.BatchNormalization()(x)))
        x = layers.Concatenate()([x, y])
    x = layers.Conv2DTranspose(6, 2, strides=2, name="up")(x)
    x = layers.Dense(5, "tanh")(layers.Reshape((256, 6))(x))
    return keras.Model(image, layers.Dense(4)(layers.Reshape((-1,))(x)))


def bottleneck():
    """Shortcuts with and without a projection, one of them before the activation, written as operations."""
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(image)
    for i, width in enumerate((8, 12)):
        y = layers.Conv2D(5, 1, activation="relu", name=f"narrow{i}")(x)
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", name=f"wide{i}")(y))
        short = x if width == 8 else layers.Conv2D(width, 1, name="project")(x)
        x = ops.relu(short + y)
    return keras.Model(image, layers.Dense(4)(layers.GlobalMaxPooling2D()(x)))


def shared():
    """A convolution used twice in a row, models inside models, a merge of a tensor with its own activation."""
    image = keras.Input((8, 8, 3))
    again = layers.Conv2D(6, 3, padding="same", activation="relu", name="again")
    inner = keras.Sequential([keras.Input((8, 8, 6)), layers.Conv2D(7, 3), layers.ReLU()], name="inner")
    x = again(again(layers.Conv2D(6, 1, name="first")(image)))
    x = layers.Add()([x, layers.Dropout(0.5)(x)])
    return keras.Sequential([keras.Model(image, inner(x)), layers.Flatten(), layers.Dense(4)])


NETWORKS = {
    "small_resnet": lambda: convnets.small_resnet((12, 12, 3), 4, 8, [1.0] * 3, [4.0] * 3),
    "quick_resnet": lambda: convnets.quick_resnet((12, 12, 3), 4, 8, [1.0] * 3, [4.0] * 3),
    "plain": plain, "mobile": mobile, "dense_net": dense_net, "bottleneck": bottleneck, "shared": shared,
}  # fmt: skip


def masked(model, channels, keep):
    """The big network, the filters that go set to zero: after normalisation and activation their maps are zero too."""
    copy = prune.copy_of(model)
    for old, new in zip(model._flatten_layers(), copy._flatten_layers(), strict=True):
        if old not in channels.made and not isinstance(old, layers.BatchNormalization | layers.DepthwiseConv2D):
            continue
        for weight, target in zip(old.weights, new.weights, strict=True):
            axis = -2 if isinstance(old, layers.Conv2DTranspose) and weight.name == "kernel" else -1
            alive = channels.cuts[id(weight)].get(axis)
            if alive is not None and "variance" not in weight.name:
                target.assign(np.moveaxis(np.moveaxis(np.asarray(weight), axis, -1) * keep[alive], -1, axis))
    return copy


@pytest.mark.parametrize("name", NETWORKS)
def test_the_narrower_network_is_the_big_one_with_its_filters_masked(name):
    model = randomised(NETWORKS[name]())
    x = np.random.default_rng(1).normal(size=(6, *model.input_shape[1:])).astype("float32")
    channels = Channels(model)
    everything = rebuild(model, channels, np.ones(len(channels.root), bool))
    np.testing.assert_allclose(everything(x), model(x), rtol=1e-5, atol=1e-5)
    assert everything.count_params() == model.count_params()
    keep = structured.choose(channels, structured.Structured(fraction=0.5, multiple=1))
    smaller = rebuild(model, channels, keep)
    expected = np.asarray(masked(model, channels, keep)(x))
    np.testing.assert_allclose(smaller(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - np.asarray(model(x))).max() > 1e-3, "the filters that went had something to say"
    rows, totals = structured.compare(model, smaller)
    assert {row["left"] / row["filters"] for row in rows} > {1.0}, "the logits are all there, something else is not"
    assert all(totals[key][1] < 0.75 * totals[key][0] for key in ("params", "flops"))


def test_a_residual_network_by_its_layers_names():
    """The same comparison, every mask written out by hand: conv2d_1 and conv2d_2, and 3 and 4, are tied by the sums."""
    model = randomised(NETWORKS["small_resnet"]())
    channels = Channels(model)
    assert [len(roots) for roots in channels.groups().values()] == [8, 16, 32]
    kernels = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    size = [np.abs(np.asarray(layer.kernel)).sum(axis=(0, 1, 2)) for layer in kernels]
    size = [size[0], *[size[1] + size[2]] * 2, *[size[3] + size[4]] * 2]
    big = prune.copy_of(model)
    for layer, norm, size_of in zip(kernels, norms, size, strict=True):
        gone = np.argsort(size_of)[: len(size_of) // 2]
        for old, weights in ((layer, ["kernel"]), (norm, ["gamma", "beta"])):
            for weight in weights:
                values = np.asarray(getattr(old, weight)).copy()
                values[..., gone] = 0
                getattr(big.get_layer(old.name), weight).assign(values)
    smaller = structured.shrink(model, structured.Structured(fraction=0.5, multiple=1))
    x = np.random.default_rng(1).uniform(0, 255, (6, 12, 12, 3)).astype("float32")
    expected = np.asarray(big(x))
    np.testing.assert_allclose(smaller(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_parameters_and_flops_fall_to_what_the_new_widths_cost():
    model = randomised(plain())
    smaller = structured.shrink(model, structured.Structured(fraction=0.5, multiple=1))
    rows, totals = structured.compare(model, smaller)
    assert [(row["layer"], row["filters"], row["left"]) for row in rows] == [
        ("conv0", 8, 4), ("conv1", 12, 6), ("hidden", 10, 5), ("logits", 4, 4)
    ]  # fmt: skip
    params = (27 * 4 + 4) + (9 * 4 * 6 + 6) + (3 * 3 * 6 * 5 + 5) + (5 * 4 + 4)
    flops = 2 * (144 * 27 * 4 + 36 * 9 * 4 * 6 + 54 * 5 + 5 * 4)
    assert (totals["params"][1], totals["flops"][1]) == (params, flops)
    assert costs.flops(smaller) == flops


def test_the_lowest_norms_go_and_the_rest_is_copied():
    model = randomised(plain())
    conv = model.get_layer("conv0")
    norms = np.abs(np.asarray(conv.kernel)).sum(axis=(0, 1, 2))
    left = np.sort(np.argsort(norms)[-6:])
    smaller = structured.shrink(model, structured.Structured(fraction=0.25, multiple=1, keep=("conv1", "hidden")))
    np.testing.assert_array_equal(smaller.get_layer("conv0").kernel, np.asarray(conv.kernel)[..., left])
    np.testing.assert_array_equal(smaller.get_layer("conv0").bias, np.asarray(conv.bias)[left])
    np.testing.assert_array_equal(
        smaller.get_layer("conv1").kernel, np.asarray(model.get_layer("conv1").kernel)[:, :, left]
    )
    for name in ("hidden", "logits"):
        np.testing.assert_array_equal(smaller.get_layer(name).kernel, model.get_layer(name).kernel)


def test_by_the_scale_of_batch_normalisation():
    model = randomised(NETWORKS["small_resnet"]())
    first, tied = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)][:2]
    first.gamma.assign([0.1, -3, 0.2, 2, -0.3, 1, 4, 0.4])
    smaller = structured.shrink(model, structured.Structured(fraction=0.5, by="scale", multiple=1))
    np.testing.assert_allclose(smaller.get_layer(first.name).gamma, [-3, 2, 1, 4])
    assert smaller.get_layer(tied.name).gamma.shape == (8,)
    with pytest.raises(core.InputError, match="none has a score by scale"):
        structured.shrink(plain(), structured.Structured(by="scale"))


def test_global_removal_takes_the_lowest_of_all_layers():
    model = randomised(plain(widths=(8, 12), hidden=10))
    for name, scale in (("conv0", 1), ("conv1", 1), ("hidden", 1)):
        layer = model.get_layer(name)
        kernel = np.ones(layer.kernel.shape) * scale
        kernel[..., : {"conv0": 1, "conv1": 9, "hidden": 2}[name]] *= 0.1
        layer.kernel.assign(kernel)
    settings = structured.Structured(fraction=12 / 30, scope="global", multiple=1)
    rows, _ = structured.compare(model, structured.shrink(model, settings))
    assert {row["layer"]: row["left"] for row in rows} == {"conv0": 7, "conv1": 3, "hidden": 8, "logits": 4}


def test_widths_are_rounded_and_never_empty():
    assert [structured._rounded(count, 32, 8) for count in (0, 1, 11, 12, 20, 31)] == [8, 8, 8, 16, 24, 32]
    assert structured._rounded(3, 6, 8) == 6, "narrower than one multiple: left whole"
    model = randomised(plain())
    rows, _ = structured.compare(model, structured.shrink(model, structured.Structured(fraction=0.99, multiple=1)))
    assert [row["left"] for row in rows] == [1, 1, 1, 4]
    with pytest.raises(core.InputError, match="fraction"):
        structured.shrink(model, structured.Structured(fraction=1.0))


def test_channels_that_an_unknown_layer_reads_stay():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="read")(image)
    x = layers.Conv2D(8, 3, name="free")(layers.LayerNormalization()(x))
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(layers.Conv2D(4, 1, name="into_groups")(x))
    x = layers.Conv2D(6, 1, activation="softmax", name="compared")(x)
    model = randomised(keras.Model(image, layers.Dense(3, name="out")(layers.GlobalAveragePooling2D()(x))))
    assert list(Channels(model).groups()) == ["free"]
    smaller = structured.shrink(model, structured.Structured(fraction=0.5, multiple=1))
    assert [width_of(smaller.get_layer(name)) for name in ("read", "free", "into_groups", "compared")] == [8, 4, 4, 6]
    assert smaller(np.zeros((2, 8, 8, 3), np.float32)).shape == (2, 3)
    alone = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    with pytest.raises(core.InputError, match="no filter can be removed"):
        structured.shrink(alone, structured.Structured())


def test_filters_removed_and_trained_on_saved_and_converted(data, tmp_path):
    model = residual(8)
    settings = structured.Structured(fraction=0.75, rounds=2, multiple=1, training=dataclasses.replace(QUICK, epochs=1))
    smaller = structured.prune_filters(model, data, settings, tmp_path / "training")
    rows, totals = structured.compare(model, smaller)
    assert [row["left"] for row in rows] == [2, 2, 3], "half of them, twice"
    assert totals["flops"][1] < totals["flops"][0] / 5
    again = structured.prune_filters(model, data, settings, tmp_path / "training")  # all of it done already
    smaller.save(tmp_path / "smaller.keras")
    loaded = keras.models.load_model(tmp_path / "smaller.keras")
    x = data.x_test.astype("float32")
    for other in (again, loaded):
        np.testing.assert_allclose(other(x), smaller(x), atol=1e-6)
    assert lite.parity(lite.convert(smaller, "float"), smaller, x)["max_difference"] < 1e-4


def test_filter_sensitivity_narrows_one_group_at_a_time(data):
    model = randomised(NETWORKS["small_resnet"]())
    wide = dataclasses.replace(data, x_val=np.zeros((8, 12, 12, 3), np.uint8), y_val=np.zeros(8, np.int32))
    rows = structured.sensitivity(model, wide, (0.5, 1.0))
    assert [(row["filters"], row["left"]) for row in rows] == [(8, 4), (8, 1), (16, 8), (16, 1), (32, 16), (32, 1)]
    assert all(row["flops"] < costs.flops(model) and row["params"] < model.count_params() for row in rows)
    assert {row["drop"] + row["accuracy"] for row in rows} == {prune.accuracy(model, wide.x_val, wide.y_val)}
