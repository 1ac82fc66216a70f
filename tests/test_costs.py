"""Costs of Keras models against figures worked out by hand, and receptive fields against gradients."""

import keras
import numpy as np
import pytest
from keras import layers

from course import core
from models import costs


def functional(shape, *stack):
    image = keras.Input(shape)
    x = image
    for layer in stack:
        x = layer(x)
    return keras.Model(image, x)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds"),
    [
        # numbers of the output x kernel x channels that each of them sums over
        (layers.Conv2D(7, 3, padding="same"), (8, 6, 3), 8 * 6 * 7 * 3 * 3 * 3),
        (layers.Conv2D(7, (3, 5)), (8, 6, 3), 6 * 2 * 7 * 3 * 5 * 3),
        (layers.Conv2D(7, 3, strides=2, padding="same"), (9, 6, 3), 5 * 3 * 7 * 9 * 3),
        (layers.Conv2D(4, 3, dilation_rate=2), (8, 8, 3), 4 * 4 * 4 * 9 * 3),
        (layers.Conv2D(6, 3, groups=2), (8, 8, 4), 6 * 6 * 6 * 9 * 2),
        (layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 4), 6 * 6 * 8 * 9),
        (layers.SeparableConv2D(5, 3), (8, 8, 4), 6 * 6 * 4 * 9 + 6 * 6 * 4 * 5),
        (layers.Conv2DTranspose(5, 3, strides=2), (4, 4, 3), 4 * 4 * 3 * 9 * 5),
        (layers.Conv1D(5, 3), (10, 2), 8 * 5 * 3 * 2),
        (layers.Conv3D(2, 3), (5, 5, 5, 3), 27 * 2 * 27 * 3),
        (layers.Dense(7), (5,), 35),
        (layers.Dense(7), (4, 5), 4 * 35),
        (layers.EinsumDense("abc,cde->abde", output_shape=(4, 2, 3)), (4, 5), 4 * 5 * 6),
        # q, k, v: 4 tokens x 6 x (2 heads x 3) each; scores and their sums: 2 heads x 4 x 4 x 3; out: 4 x 6 x 6
        (layers.MultiHeadAttention(2, 3), (4, 6), 3 * 4 * 6 * 6 + 2 * 2 * 4 * 4 * 3 + 4 * 6 * 6),
        # two steps of four gates, each from the 3 inputs and the 5 states
        (layers.LSTM(5, unroll=True), (2, 3), 2 * 4 * 5 * (3 + 5)),
        (layers.BatchNormalization(), (8, 8, 4), 0),
        (layers.MaxPooling2D(), (8, 8, 4), 0),
    ],
    ids=lambda value: value.name if isinstance(value, layers.Layer) else None,
)
def test_flops_are_two_a_multiply_add(layer, shape, multiply_adds):
    image = keras.Input(shape)
    out = layer(image, image) if isinstance(layer, layers.MultiHeadAttention) else layer(image)
    model = keras.Model(image, out)
    assert costs.flops(model) == 2 * multiply_adds
    assert costs.table(model)[1]["flops"] == 2 * multiply_adds


def test_flops_of_a_subclassed_model_by_its_shapes():
    class Pair(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(3), layers.Dense(2)

        def call(self, inputs):
            return self.a(inputs[0]) + self.a(inputs[0]) + keras.ops.sum(self.b(inputs[1]))

    model = Pair()
    assert costs.flops(model, [(4,), (5,)]) == 2 * (2 * 4 * 3 + 5 * 2)
    with pytest.raises(core.InputError, match="give them as shapes"):
        costs.flops(Pair())
    with pytest.raises(core.InputError, match="functional or Sequential"):
        costs.count(model)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("kind", ["If", "Case"])
def test_conditionals_are_refused(kind, stateful):
    import tensorflow as tf

    class Chooses(layers.Layer):
        def call(self, x):
            def product():
                if stateful:  # printing is an effect: the branch may not be left out
                    tf.raw_ops.PrintV2(input="", output_stream="log(info)")
                return x @ tf.ones((3, 3))

            if kind == "If":
                return tf.cond(tf.reduce_sum(x) > 0, product, lambda: x)
            return tf.switch_case(tf.cast(tf.reduce_sum(x), tf.int32), [product, lambda: x, lambda: -x])

    graph = tf.function(Chooses()).get_concrete_function(tf.TensorSpec((1, 3))).graph
    assert (kind if stateful else f"Stateless{kind}") in {op.type for op in graph.get_operations()}
    with pytest.raises(core.InputError, match="is a conditional"):
        costs.flops(Chooses(), (3,))


def test_what_cannot_be_counted_is_said():
    with pytest.raises(core.InputError, match="unroll=True"):
        costs.flops(functional((7, 3), layers.LSTM(5)))
    with pytest.raises(core.InputError, match="no fixed size"):
        costs.flops(functional((None, None, 3), layers.Conv2D(2, 3)))
    with pytest.raises(core.InputError, match="no fixed size"):
        costs.count(functional((None, None, 3), layers.Conv2D(2, 3)))


# --- layer by layer --------------------------------------------------------------------------------------------------


def by_hand():
    """Two layers, two branches and their sum, pooled and flattened to three scores."""
    image = keras.Input((8, 8, 2))
    a = layers.Conv2D(4, 3, padding="same", name="a")(image)  # 8 x 8 x 4
    b = layers.BatchNormalization(name="b")(a)
    c = layers.MaxPooling2D(name="c")(layers.Add(name="sum")([a, b]))  # 4 x 4 x 4
    return keras.Model(image, layers.Dense(3, name="scores")(layers.Flatten(name="flat")(c)))


def test_count_by_hand():
    kernels, norm, scores = 9 * 2 * 4 + 4, 4 * 4, 64 * 3 + 3
    picture, maps, pooled = 4 * 8 * 8 * 2, 4 * 8 * 8 * 4, 4 * 4 * 4 * 4  # bytes
    assert costs.count(by_hand()) == {
        "params": kernels + norm + scores,
        "trainable_params": kernels + norm // 2 + scores,
        "flops": 2 * (8 * 8 * 4 * 9 * 2 + 64 * 3),
        "activation_bytes": picture + 3 * maps + pooled + 4 * 3,  # flattening makes nothing new
        "peak_bytes": 3 * maps,  # a, b and their sum; the picture has been used
    }


def test_table_by_hand():
    rows = {row["layer"]: row for row in costs.table(by_hand())}
    assert list(rows)[1:] == ["a", "b", "sum", "c", "flat", "scores"]
    assert rows["a"] == {"layer": "a", "kind": "Conv2D", "output": [8, 8, 4], "params": 76,
                         "flops": 2 * 8 * 8 * 4 * 18, "activation_bytes": 1024}  # fmt: skip
    assert (rows["flat"]["activation_bytes"], rows["scores"]["params"], rows["sum"]["flops"]) == (0, 195, 0)


def test_the_table_adds_up_with_models_inside_models_and_a_layer_used_twice():
    image = keras.Input((8, 8, 3))
    inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 3, padding="same"), layers.ReLU()])
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(inner(inner(image)) + image)))
    rows, total = costs.table(model), costs.count(model)
    assert [row["kind"] for row in rows] == [
        "InputLayer",
        "Conv2D",
        "ReLU",
        "Conv2D",
        "ReLU",
        "Add",
        "Flatten",
        "Dense",
    ]
    for key in ("params", "flops", "activation_bytes"):
        assert sum(row[key] for row in rows) == total[key], key
    assert total["params"] == (27 * 3 + 3) + 192 * 2 + 2  # the inner convolution once
    assert total["flops"] == 2 * (2 * 64 * 27 * 3 + 192 * 2)  # and twice
    assert total["peak_bytes"] == 3 * 4 * 192  # the picture waits for the sum beside two more maps
    assert costs.receptive_field(model).size == (5, 5)


def test_several_outputs_live_as_long_as_one_of_them():
    steps = keras.Input((2, 3))
    _, state, cell = layers.LSTM(5, return_state=True, unroll=True)(steps)
    total = costs.count(keras.Model(steps, layers.Add()([layers.ReLU()(state), cell])))
    assert total["activation_bytes"] == 4 * (6 + 3 * 5 + 5 + 5)
    assert total["peak_bytes"] == 4 * (3 * 5 + 5 + 5)  # the steps have been used, the cells wait for the sum


def test_half_precision_takes_half_the_room():
    def size(policy):
        return costs.count(functional((8, 8, 2), layers.Conv2D(4, 3, dtype=policy)))["activation_bytes"]

    picture, maps = 4 * 8 * 8 * 2, 4 * 6 * 6 * 4
    assert size("float32") == picture + maps
    assert size("mixed_bfloat16") == size("mixed_float16") == picture + maps // 2


# --- receptive field -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "first", "size", "stride"),
    [
        ([layers.Conv2D(1, 3)], 0, 3, 1),
        ([layers.Conv2D(1, 3, padding="same")] * 1 + [layers.Conv2D(1, 3, padding="same")], -2, 5, 1),
        ([layers.Conv2D(1, 3), layers.MaxPooling2D(), layers.Conv2D(1, 3)], 0, 3 + 1 + 2 * 2, 2),
        ([layers.Conv2D(1, 3, dilation_rate=4)], 0, 9, 1),
        ([layers.Conv2D(1, 7, strides=2, padding="same")], -2, 7, 2),  # 32 wide: 5 zeros are needed, 2 of them before
        ([layers.ZeroPadding2D(3), layers.Conv2D(1, 7, strides=2)], -3, 7, 2),
        ([layers.Cropping2D(2), layers.Conv2D(1, 3)], 2, 3, 1),
        # VGG's argument: three 3x3 see as much as one 7x7
        ([layers.Conv2D(1, 3) for _ in range(3)], 0, 7, 1),
        ([layers.Conv2D(1, 7)], 0, 7, 1),
    ],
)  # fmt: skip
def test_receptive_field_by_hand(stack, first, size, stride):
    field = costs.receptive_field(functional((32, 32, 1), *stack))
    assert (field.first, field.size, field.stride) == ((first,) * 2, (size,) * 2, (stride,) * 2)


def seen(model, unit):
    """First and last input pixel, along both axes, on which the unit at `unit` of the map depends: by its gradient."""
    import tensorflow as tf

    for weight in model.weights:
        weight.assign(np.random.default_rng(0).uniform(0.5, 1, weight.shape))  # positive: nothing cancels
    x = tf.constant(np.random.default_rng(1).uniform(0.5, 1, (1, *model.input_shape[1:])), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = tf.reduce_sum(model(x)[0, unit[0], unit[1]])
    rows, columns = np.nonzero(np.abs(tape.gradient(out, x)[0]).sum(axis=-1))
    return (rows.min(), columns.min()), (rows.max(), columns.max())


def residual(x, width, kernel, dilation=1, strides=1):
    short = layers.Conv2D(width, 1, strides=strides, padding="same")(x)
    long = layers.Conv2D(width, kernel, strides=strides, padding="same")(x)
    long = layers.Conv2D(width, kernel, dilation_rate=dilation, padding="same")(layers.ReLU()(long))
    return layers.Add()([short, long])


@pytest.mark.parametrize("side", [40, 41])
def test_receptive_field_is_where_the_gradient_is_not_zero(side):
    image = keras.Input((side, side + 3, 2))
    x = residual(image, 2, 3, strides=2)
    x = layers.AveragePooling2D(2, padding="same")(residual(x, 3, 3, dilation=2))
    x = layers.BatchNormalization()(layers.DepthwiseConv2D((1, 3), padding="same")(x))
    model = keras.Model(image, x)
    field = costs.receptive_field(model)
    assert field.stride == (4, 4)
    for unit in ((0, 0), (4, 5), (6, 3)):
        begin = [f + s * u for f, s, u in zip(field.first, field.stride, unit, strict=True)]
        end = [f + s * u for f, s, u in zip(field.last, field.stride, unit, strict=True)]
        within = [max(b, 0) for b in begin], [min(e, n - 1) for e, n in zip(end, image.shape[1:3], strict=True)]
        assert [list(map(int, ends)) for ends in seen(model, unit)] == [list(ends) for ends in within]


def test_receptive_field_of_a_named_layer_and_of_what_has_none():
    model = functional((16, 16, 3), layers.Conv2D(2, 3, name="one"), layers.Conv2D(2, 3, name="two"),
                       layers.GlobalAveragePooling2D(name="mean"), layers.Dense(2, name="scores"))  # fmt: skip
    assert costs.receptive_field(model, "one").size == (3, 3)
    assert costs.receptive_field(model).size == (5, 5)  # the last layer that has a map
    for name in ("mean", "scores"):
        with pytest.raises(core.InputError, match="no spatial map"):
            costs.receptive_field(model, name)
    with pytest.raises(core.InputError, match="one, two"):
        costs.receptive_field(model, "three")
    with pytest.raises(core.InputError, match="UpSampling2D"):
        costs.receptive_field(functional((8, 8, 1), layers.UpSampling2D()))


def test_receptive_field_behind_a_squeeze_and_excite_block_is_refused():
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, name="one")(image)
    weights = layers.Reshape((1, 1, 4))(layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    x = layers.Conv2D(4, 3, name="two")(layers.Multiply(name="weighted")([x, weights]))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(x)))
    with pytest.raises(core.InputError, match="layer two, the last with a spatial map"):
        costs.receptive_field(model)
    with pytest.raises(core.InputError, match="layer two has no spatial map, or sees the whole picture"):
        costs.receptive_field(model, "two")
    assert costs.receptive_field(model, "one").size == (3, 3)


# --- latency and equal costs -----------------------------------------------------------------------------------------


def test_latency_grows_with_the_work():
    def model(width):
        return functional((32, 32, 8), layers.Conv2D(width, 3), layers.Conv2D(8, 3))

    small, large = (costs.latency(model(width), batch=4, calls=15, warm_up=3) for width in (1, 512))
    assert 0 < small["p50_ms"] <= small["p90_ms"] <= small["p99_ms"]
    assert large["p50_ms"] > 2 * small["p50_ms"]  # 512 times the FLOPs


def test_latencies_of_several_models_taking_turns():
    models = {width: functional((32, 32, 8), layers.Conv2D(width, 3), layers.Conv2D(8, 3)) for width in (512, 1)}
    found = costs.latencies(models, batch=4, rounds=15, warm_up=3)
    assert list(found) == [512, 1] and found[512] > 2 * found[1] > 0


@pytest.mark.parametrize("cost", [costs.flops, keras.Model.count_params])
def test_match_finds_the_nearest_width(cost):
    def build(width):
        return functional((8, 8, 3), layers.Conv2D(width, 3), layers.Conv2D(2 * width, 3))

    each = [cost(build(width)) for width in range(1, 13)]
    for target in (each[4], each[4] + 1, each[5] - 1, each[0] // 2):
        width, model = costs.match(build, target, cost, most=12)
        assert abs(each[width - 1] - target) == min(abs(value - target) for value in each)
        assert model.layers[1].filters == width
    with pytest.raises(core.InputError, match="no width up to 12"):
        costs.match(build, 10 * each[-1], cost, most=12)
