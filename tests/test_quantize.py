"""Fake quantisation by hand, folding, and quantisation-aware training against the files that LiteRT makes of it."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from keras import layers
from pruning_models import QUICK, SHAPE, noise, randomised, residual

from compression import lite, quantize
from compression.channels import replay
from compression.layers import EPSILON, Computed, FakeQuant, bounds, described, fake_quant, fake_quant_weights
from compression.quantize import Quantisation, WeightOnly
from compression.training import Training
from course.core import InputError, runtime
from models import convnets

UNTRAINED = Quantisation(training=Training(epochs=0))


@pytest.fixture(scope="module")
def data():
    return noise()


@pytest.fixture(scope="module", params=["small", "quick"])
def network(request):
    """A residual network whose output channels differ in scale by a factor of up to 1,000.  quick is day 22's: pooled
    before normalisation and ReLU, the largest answer of each channel, logits scaled at the end."""
    model = {"small": small, "quick": quick}[request.param]()
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            scale = 10 ** rng.uniform(-1.5, 1.5, layer.filters)
            layer.kernel.assign(np.asarray(layer.kernel) * scale)
    return model


@pytest.fixture(scope="module")
def quantised(network, data):
    """The same rounded, its ranges measured, the file made of it, and pictures of its size."""
    times = network.input_shape[1] // SHAPE[0]
    x = data.x_train.repeat(times, axis=1).repeat(times, axis=2)
    model = quantize.prepare(network, dataclasses.replace(data, x_train=x), UNTRAINED)
    return model, lite.convert(model, "int8", x[:1]), x.astype("float32")


def small():
    return randomised(convnets.small_resnet(SHAPE, 3, 8, [127.0] * 3, [5000.0] * 3))


def quick():
    """Twice the side, so that the largest answer is one of several; scales above zero, as training leaves them."""
    model = randomised(convnets.quick_resnet((16, 16, 3), 3, 4, [127.0] * 3, [5000.0] * 3, activation="relu"))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(np.abs(layer.gamma))
    return model


def tensors(content, operations=("CONV_2D", "FULLY_CONNECTED")):
    """The integer kernels of a file, and the scales of each."""
    runner, found = lite.interpreter(content), []
    details = {entry["index"]: entry for entry in runner.get_tensor_details()}
    for operation in runner._get_ops_details():
        if operation["op_name"] in operations:
            place = operation["inputs"][1]
            found.append((runner.get_tensor(place), details[place]["quantization_parameters"]["scales"]))
    return found


def operations(content):
    return [entry["op_name"] for entry in lite.interpreter(content)._get_ops_details()]


def last_step(model):
    """Distance of two neighbouring outputs of a quantised model."""
    last = [layer for layer in model.layers if isinstance(layer, FakeQuant)][-1]
    return (float(last.high) - float(last.low)) / 255


# --- fake quantisation -----------------------------------------------------------------------------------------------


def test_fake_quantisation_by_hand():
    # two bits of [-1, 2]: s = 3 / 3 = 1, so -1, 0, 1, 2
    x = np.array([-5, -1, -0.6, 0, 0.4, 0.5, 1.2, 1.5, 2, 9], "float32")
    np.testing.assert_array_equal(fake_quant(x, -1.0, 2.0, bits=2), [-1, -1, -1, 0, 0, 1, 1, 2, 2, 2])
    # [-0.4, 2.6] has the same s; 0 must be one of the numbers, so the range moves to [0, 3]
    np.testing.assert_array_equal(fake_quant(np.array([-0.4, 0.4, 2.6, 4], "float32"), -0.4, 2.6, bits=2), [0, 0, 3, 3])
    # eight bits of [-1, 1.55]: s = 0.01
    np.testing.assert_allclose(fake_quant(np.array([0.014, -3, 1.549, 0], "float32"), -1.0, 1.55),
                               [0.01, -1, 1.55, 0], atol=1e-6)  # fmt: skip


def test_fake_quantised_weights_by_hand():
    # three bits: k s with |k| <= 3; bounds 3 and 0.6, so s = 1 and 0.2
    kernel = np.array([[3, 0.6], [-2.4, -0.09], [0.4, 0.32]], "float32")
    found = fake_quant_weights(kernel, np.array([3, 0.6], "float32"), bits=3)
    np.testing.assert_allclose(found, [[3, 0.6], [-2, 0], [0, 0.4]], atol=1e-6)


def test_the_gradient_goes_straight_through_inside_the_range_and_stops_outside():
    x = tf.constant([-5.0, -0.9, 0.0, 0.3, 1.9, 2.5])
    kernel = tf.constant([[2.0, -1.0], [0.3, 0.2]])
    with tf.GradientTape() as tape:
        tape.watch([x, kernel])
        loss = tf.reduce_sum(fake_quant(x, -1.0, 2.0, bits=2) * tf.constant([1.0, 2, 3, 4, 5, 6]))
        loss += tf.reduce_sum(fake_quant_weights(kernel, bounds(kernel)) * tf.constant([[1.0, 2], [3, 4]]))
    of_x, of_kernel = tape.gradient(loss, [x, kernel])
    np.testing.assert_array_equal(of_x, [0, 2, 3, 4, 5, 0])
    np.testing.assert_array_equal(of_kernel, [[1, 2], [3, 4]])  # the largest of a channel, too: nothing is cut


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.55), (0.0, 255.0), (-0.013, 7.7), (-3.3, 0.0), (-1e-3, 900.0)])
def test_training_rounds_as_the_operation_does_that_the_converter_knows(low, high):
    # up to float32's rounding of a number of the size of the range; on a half-way case the two may differ by a step
    x = np.random.default_rng(0).uniform(1.2 * low - 0.1, 1.2 * high + 0.1, 4000).astype("float32")
    theirs = tf.quantization.fake_quant_with_min_max_vars(x, low, high).numpy()
    apart = np.abs(fake_quant(x, low, high).numpy() - theirs)
    assert np.mean(apart > 1e-6 * (high - low)) < 0.002
    assert apart.max() < 1.001 * (high - low) / 255


def test_a_layer_gives_the_same_while_training_and_in_use():
    rng = np.random.default_rng(0)
    kernel = (rng.normal(size=(3, 3, 4, 8)) * 10 ** rng.uniform(-2, 2, 8)).astype("float32")
    bound = bounds(kernel)
    theirs = tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, -bound, bound, narrow_range=True)
    steps = np.abs(fake_quant_weights(kernel, bound) - theirs) / (np.asarray(bound) / 127)
    assert steps.max() < 1e-3


def test_a_channel_of_zeros_or_of_hardly_anything_gets_a_range_that_its_bias_fits():
    kernel = np.ones((3, 3, 2, 3), "float32")
    kernel[..., 0], kernel[..., 1] = 0, 1e-9
    np.testing.assert_allclose(bounds(kernel), [EPSILON, EPSILON, 1])
    np.testing.assert_array_equal(bounds(np.zeros((2, 2), "float32")), [1, 1])


def test_the_range_follows_its_batches_and_includes_zero():
    layer = FakeQuant(-1.0, 1.0, decay=0.75)
    layer(np.array([2.0, 5.0], "float32"), training=True)  # its smallest counts as 0
    assert float(layer.low) == pytest.approx(-0.75)
    assert float(layer.high) == pytest.approx(0.75 + 0.25 * 5)
    layer(np.array([-100.0, 100.0], "float32"))  # in use nothing moves
    assert float(layer.high) == pytest.approx(2)


# --- folding ---------------------------------------------------------------------------------------------------------


def zoo():
    """Every kind of layer that can be quantised."""
    image = keras.Input(SHAPE)
    x = layers.Rescaling(1 / 127.5, -1)(image)
    x = layers.SeparableConv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, 2, depth_multiplier=2)(layers.ZeroPadding2D(1)(x))
    x = layers.Activation("relu6")(layers.BatchNormalization()(x))
    y = layers.Conv2D(8, 3, padding="same", activation="silu")(x)
    x = layers.AveragePooling2D(2)(layers.Concatenate()([x, y]))
    gate = layers.Conv2D(24, 1, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.BatchNormalization(scale=False)(layers.Multiply()([x, gate]))
    x = layers.SpatialDropout2D(0.1)(x + layers.Conv2D(24, 1)(x))
    x = layers.Permute((2, 1))(layers.Conv1D(8, 3, padding="same", activation="tanh")(layers.Reshape((4, 24))(x)))
    x = layers.GlobalAveragePooling1D()(x)
    head = keras.Sequential([keras.Input((4,)), layers.Dense(9), layers.BatchNormalization(), layers.ReLU()])
    return randomised(keras.Model(image, layers.Dense(3, activation="softmax")(head(x))))


def pooled(sign):
    """Batch normalisation behind a maximum: it may move before it where its scales are positive."""
    image = keras.Input(SHAPE)
    x = layers.MaxPooling2D()(layers.Conv2D(4, 3)(image))
    x = layers.BatchNormalization()(x)
    model = randomised(keras.Model(image, layers.Dense(3)(layers.GlobalMaxPooling2D()(x))))
    gamma = model.get_layer(index=3).gamma
    gamma.assign(np.abs(gamma) * np.array([1, 1, 1, sign]))
    return model


@pytest.mark.parametrize("make", [small, zoo, lambda: pooled(1), lambda: pooled(-1),
                                  lambda: randomised(convnets.quick_resnet(SHAPE, 3, 4, [127.0] * 3, [5e3] * 3))],
                         ids=["small_resnet", "zoo", "pooled", "pooled negative", "quick_resnet"])  # fmt: skip
def test_folding_leaves_no_normalisation_and_the_same_outputs(make, data):
    model = make()
    folded = quantize.fold(model)
    kinds = {type(layer) for layer in folded.layers}
    assert not kinds & {layers.BatchNormalization, layers.Normalization, layers.Rescaling}
    before = model(data.x_test.astype("float32"), training=False).numpy()
    after = folded(data.x_test.astype("float32"), training=False).numpy()
    np.testing.assert_allclose(after, before, atol=2e-5 * max(1, np.abs(before).max()))


def test_batch_normalisation_moves_past_a_maximum_only_where_no_scale_is_negative():
    depthwise = [sum(isinstance(layer, layers.DepthwiseConv2D) for layer in quantize.fold(pooled(sign)).layers)
                 for sign in (1, -1)]  # fmt: skip
    assert depthwise == [0, 1]


def test_folding_can_leave_batch_normalisation(data):
    model = small()
    folded = quantize.fold(model, batch_norm=False)
    assert sum(isinstance(layer, layers.BatchNormalization) for layer in folded.layers) == 5
    x = data.x_test.astype("float32")
    np.testing.assert_allclose(folded(x, training=False), model(x, training=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layer", "said"), [
    (layers.LayerNormalization(name="odd"), "odd (LayerNormalization)"),
    (layers.Activation("gelu", name="odd"), "activation gelu"),
    (layers.BatchNormalization(axis=1, name="odd"), "normalises axis 1"),
    (layers.Conv2D(4, 3, groups=2, name="odd"), "odd (Conv2D)"),
])  # fmt: skip
def test_what_cannot_be_rounded_as_litert_does_is_refused(layer, said):
    image = keras.Input((8, 8, 4))
    with pytest.raises(InputError) as caught:
        quantize.fold(keras.Model(image, layers.Flatten()(layer(image))))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_used_twice_is_refused():
    image = keras.Input((8, 8, 3))
    twice = layers.Conv2D(3, 3, padding="same", name="twice")
    with pytest.raises(InputError, match="twice"):
        quantize.fold(keras.Model(image, twice(twice(image))))


# --- quantisation-aware training and the file ------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["small"], indirect=True)  # in a deeper one few differences become many
def test_the_file_computes_what_the_quantised_model_does(quantised):
    # One step of the last rounding: sums of integers are scaled in 32 bits there and in float32 here, so that a number
    # half-way between two may go to the other one
    model, content, x = quantised
    ours, theirs = model(x, training=False).numpy(), lite.predict(content, x)
    step = last_step(model)
    assert len(np.unique(np.round(ours / step))) > 50, "the outputs must differ for this to say anything"
    assert np.abs(ours - theirs).max() < 1.01 * step
    assert np.mean(np.abs(ours - theirs) > 0.5 * step) < 0.1
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_each_operation_of_the_file_computes_what_its_layers_do(quantised):
    """From the numbers that the file has there, so that what differs in one is not seen in the next.

    By LiteRT's own kernels: XNNPACK's, which run by default, rescale (QUANTIZE) with a coarser factor, which changes a
    hundredth of the numbers by a step.
    """
    model, content, x = quantised
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    runner = Interpreter(
        model_content=content, experimental_op_resolver_type=kernels, experimental_preserve_all_tensors=True
    )
    entry = runner.get_input_details()[0]
    runner.resize_tensor_input(entry["index"], x.shape)
    runner.allocate_tensors()
    runner.set_tensor(entry["index"], x.astype("uint8"))
    runner.invoke()
    details = {entry["index"]: entry for entry in runner.get_tensor_details()}
    rounding = ("QUANTIZE", "DEPTHWISE_CONV_2D", "CONV_2D", "ADD", "FULLY_CONNECTED")
    outputs = [entry["outputs"][0] for entry in runner._get_ops_details() if entry["op_name"] in rounding]
    assert len(outputs) == sum(isinstance(layer, FakeQuant) for layer in model.layers)
    steps = []

    def call(node, *args, **kwargs):
        ours = node.operation(*args, **kwargs)
        if not isinstance(node.operation, FakeQuant):
            return ours
        place = outputs[len(steps)]
        scale, zero = details[place]["quantization"]
        theirs = ((runner.get_tensor(place).astype("float64") - zero) * scale).reshape(ours.shape)
        steps.append(np.abs(ours - theirs) / scale)
        return tf.constant(theirs, tf.float32)

    replay(model, [tf.constant(x)], call)
    assert len(steps) == len(outputs)
    apart = np.concatenate([apart.ravel() for apart in steps])
    assert apart.max() < 1.01
    assert np.mean(apart > 0.01) < 0.002
    found = operations(content)
    assert set(found) <= {"QUANTIZE", "DEPTHWISE_CONV_2D", "CONV_2D", "MAX_POOL_2D", "ADD", "RESHAPE", "REDUCE_MAX",
                          "FULLY_CONNECTED", "DEQUANTIZE", "DELEGATE"}  # fmt: skip
    assert found.count("DEPTHWISE_CONV_2D") == 1, "what prepares the input; all other normalisation is in the weights"


def test_every_kernel_of_the_file_has_a_scale_for_each_channel(quantised):
    model, content, _ = quantised
    kernels = tensors(content)
    assert len(kernels) == sum(isinstance(layer, Computed) and layer.of["kind"] != "DepthwiseConv2D"
                               for layer in model.layers) > 5  # fmt: skip
    for kernel, scales in kernels:
        assert kernel.dtype == np.int8
        assert len(scales) == len(kernel), "the output channels come first in a file"
        strong = scales > scales.max() * EPSILON * 1.01
        np.testing.assert_array_equal(np.abs(kernel[strong].astype(int)).reshape(strong.sum(), -1).max(axis=1), 127)
    assert max(scales.max() / scales.min() for _, scales in kernels) > 100


@pytest.mark.slow
def test_every_kind_of_layer_becomes_one_of_the_file(data):
    model = quantize.prepare(zoo(), data, UNTRAINED)
    content = lite.convert(model, "int8", data.x_train[:1])
    x = data.x_train.astype("float32")
    apart = np.abs(lite.predict(content, x) - model(x, training=False))
    assert apart.max() < 2.01 / 256  # two steps of the softmax's own scale
    assert apart.mean() < 0.2 / 256


def test_pixels_go_in_as_they_are(quantised):
    entry = lite.interpreter(quantised[1]).get_input_details()[0]
    assert entry["dtype"] is np.uint8
    assert entry["quantization"] == (1.0, 0)


def test_the_whole_range_of_pixels_does_not_widen_the_ranges_inside():
    x = np.random.default_rng(0).integers(0, 11, (20, 8, 8, 1)).astype("float32")  # dark: means of about 5
    image = keras.Input((8, 8, 1))
    model = keras.Model(image, layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(image)))
    content = lite.convert(model, "int8", x)
    assert lite.interpreter(content).get_input_details()[0]["quantization"] == (1.0, 0)
    bright = lite.predict(content, np.full((1, 8, 8, 1), 255, "float32"))
    assert 5 < bright < 15, "no picture was so bright: beyond the 5 and the 255 / 64 of one pixel all is cut off"


def test_what_is_no_picture_has_its_range_measured():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 2, (200, 6)).astype("float32"), rng.integers(0, 3, 200).astype("int32")
    table = dataclasses.replace(noise(), x_train=x, y_train=y, x_val=x, y_val=y, x_test=x, y_test=y)
    point = keras.Input((6,))
    hidden = layers.Dense(16, "tanh")(layers.Normalization(mean=np.arange(6.0), variance=np.arange(1.0, 7))(point))
    model = randomised(keras.Model(point, layers.Dense(3)(layers.BatchNormalization()(hidden))))
    with pytest.raises(InputError, match="pixels=False"):
        quantize.prepare(model, table, UNTRAINED)
    quantised = quantize.prepare(model, table, dataclasses.replace(UNTRAINED, pixels=False))
    np.testing.assert_allclose(quantize.fold(model)(x), model(x), atol=1e-5)
    content = lite.convert(quantised, "int8", x[:1], pixels=False)
    assert lite.parity(content, quantised, x)["max_difference"] < 2.01 * last_step(quantised)


def test_training_moves_the_weights_but_not_what_prepares_the_input_nor_the_statistics(data):
    model = randomised(residual(8, dropout=0.2))
    settings = Quantisation(training=dataclasses.replace(QUICK, lr=0.01, weight_decay=0.0))
    before, after = quantize.prepare(model, data, settings), quantize.quantise(model, data, settings)
    moved = {f"{layer.name}/{weight.name}": np.abs(np.asarray(weight) - np.asarray(old)).max()
             for layer, twin in zip(after.layers, before.layers, strict=True)
             for weight, old in zip(layer.weights, twin.weights, strict=True)}  # fmt: skip
    still = {name for name, distance in moved.items() if distance == 0}
    assert {name for name in moved if name.endswith(("/mean", "/deviation"))} <= still
    assert len({name for name in still if name.startswith("normalization") and "_range" not in name}) == 5
    assert {"input_range/low", "input_range/high"} <= still
    trained = {name for name in moved if name.startswith("conv2d") and name.endswith(("/kernel", "/gamma"))}
    assert len(trained) == 4
    assert not trained & still


def test_training_through_the_rounding_finds_weights_that_make_up_for_each_other():
    """All inputs say nearly the same, so that only the sum of the weights, 3.1, counts: rounded to -s, 0, s they are
    1 and seven zeros; trained on, some of the others must come to stand for the rest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 1)) + 0.05 * rng.normal(size=(256, 8))
    weights = np.array([1, 0.3, 0.31, 0.29, 0.28, 0.32, 0.3, 0.3])
    x, y = tf.constant(x, tf.float32), tf.constant(x @ weights[:, None], tf.float32)
    kernel = tf.Variable(weights[:, None], dtype=tf.float32)

    def loss():
        rounded = fake_quant_weights(kernel, tf.stop_gradient(bounds(kernel)), bits=2)
        return tf.reduce_mean(tf.square(x @ rounded - y))

    losses = []
    for _ in range(60):
        with tf.GradientTape() as tape:
            losses.append(loss())
        kernel.assign_sub(0.005 * tape.gradient(losses[-1], kernel))
    assert losses[0] > 4
    assert min(losses) < 0.05 * losses[0]


@pytest.mark.parametrize("clusters", [pytest.param(False, marks=pytest.mark.slow), True])
def test_zeros_and_shared_values_are_kept_through_training_into_the_file(data, clusters):
    model, rng = randomised(residual(8)), np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D | layers.Dense):
            values = rng.choice([-0.4, -0.1, 0.05, 0.3], layer.kernel.shape)
            layer.kernel.assign(values * (rng.uniform(size=values.shape) < 0.25))
    settings = Quantisation(keep_zeros=True, keep_clusters=clusters, training=dataclasses.replace(QUICK, lr=0.01))
    trained = quantize.quantise(model, data, settings)
    content = lite.convert(trained, "int8", data.x_train[:1])
    x = data.x_train.astype("float32")
    assert np.abs(lite.predict(content, x) - trained(x, training=False)).max() < 2.01 * last_step(trained)
    for layer, (kernel, _) in zip([layer for layer in model.layers if isinstance(layer, layers.Conv2D | layers.Dense)],
                                  tensors(content), strict=True):  # fmt: skip
        gone = np.asarray(layer.kernel) == 0
        moved = np.asarray(trained.get_layer(layer.name).free_kernel())
        assert np.abs(moved - np.asarray(layer.kernel)).max() > 0
        assert len(np.unique(moved)) == 5 if clusters else len(np.unique(moved)) > 5
        gone = np.moveaxis(gone, -1, 0).reshape(kernel.shape)
        assert (kernel[gone] == 0).all()
        assert 0.5 < gone.mean() < 0.95
        if clusters:
            assert max(len(np.unique(np.abs(channel.astype(int)))) for channel in kernel) <= 5


def test_a_quantised_model_is_saved_and_loaded(quantised, tmp_path):
    model, _, x = quantised
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x, training=False), model(x, training=False))


def test_a_model_of_mixed_precision_is_quantised_in_float32(data):
    runtime.precision("mixed_float16")
    try:
        model = small()
        quantised = quantize.prepare(model, data, dataclasses.replace(UNTRAINED, examples=8))
    finally:
        runtime.precision("float32")
    assert {layer.compute_dtype for layer in model.layers if isinstance(layer, layers.Conv2D)} == {"float16"}
    assert {layer.compute_dtype for layer in quantised.layers[1:]} == {"float32"}


@pytest.mark.parametrize("make", [
    lambda: layers.Conv2D(5, 3, 2, "same"), lambda: layers.Conv2D(5, 3, dilation_rate=2, use_bias=False),
    lambda: layers.DepthwiseConv2D(3, 2, depth_multiplier=2), lambda: layers.Dense(5),
], ids=["strided", "dilated", "depthwise", "dense"])  # fmt: skip
def test_a_computed_layer_computes_what_the_layer_does(make):
    layer, x = make(), np.random.default_rng(0).normal(size=(2, 9, 9, 4)).astype("float32")
    expected = layer(x)
    computed = Computed(described(layer))
    computed(x)
    computed.set_weights(layer.get_weights())
    np.testing.assert_allclose(computed(x), expected, atol=1e-5)


# --- representative sets, weight-only --------------------------------------------------------------------------------


def test_representative_examples_are_of_every_class_alike():
    y = np.array([0] * 90 + [1] * 8 + [2] * 2, np.int32)
    x = np.arange(100, dtype=np.uint8)[:, None]
    data = dataclasses.replace(noise(), x_train=x, y_train=y)
    found = quantize.representative(data, 12)
    assert np.bincount(y[found[:, 0].astype(int)]).tolist() == [5, 5, 2]
    assert found.dtype == np.float32
    assert len(np.unique(found)) == 12
    np.testing.assert_array_equal(found, quantize.representative(data, 12))
    assert not np.array_equal(found, quantize.representative(data, 12, seed=1))
    assert len(quantize.representative(data, 500)) == 100


@pytest.mark.parametrize(("mode", "least", "error"), [("int8", 3.5, 0.02), ("int4", 5.5, 0.2)])
def test_weight_only_quantisation_covers_dense_layers_and_no_convolutions(mode, least, error, data, tmp_path):
    image = keras.Input(SHAPE)
    x = layers.Flatten()(layers.Conv2D(4, 3, name="conv")(layers.Rescaling(1 / 127.5, -1)(image)))
    model = keras.Model(image, layers.Dense(3, name="logits")(layers.Dense(64, "relu", name="hidden")(x)))
    quantised = quantize.weight_only(model, settings=WeightOnly(mode=mode))
    found = quantize.coverage(quantised, model)
    assert found["layers"] == ["hidden", "logits"]
    assert found["share"] == pytest.approx(1 - 112 / model.count_params())
    assert 4 * model.count_params() / found["bytes"] > least
    x = data.x_test.astype("float32")
    before, after = model(x).numpy(), quantised(x).numpy()
    assert 0 < np.abs(after - before).max() < error * np.abs(before).max()
    quantised.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(x), after)
    assert model.get_layer("hidden").quantization_mode is None, "the model given stays as it was"


def test_weight_only_quantisation_of_convolutions_alone_is_refused():
    image = keras.Input(SHAPE)
    model = keras.Model(image, layers.GlobalMaxPooling2D()(layers.Conv2D(3, 3)(image)), name="bare")
    with pytest.raises(InputError, match="bare has no Dense"):
        quantize.weight_only(model)
    with pytest.raises(InputError, match="int3"):
        quantize.weight_only(model, settings=WeightOnly(mode="int3"))
