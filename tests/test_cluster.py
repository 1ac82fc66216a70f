"""Clustering of weights: k-means on a line, gradients of shared values, and Huffman's code, each by hand."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from pruning_models import QUICK, SHAPE, dense, noise, randomised

from compression import cluster
from compression.cluster import Clustering, code_lengths, coded, decode, encode, entropy, first_centroids, gaps, k_means
from compression.layers import Computed, look_up
from compression.training import Training
from course.core import InputError

UNTRAINED = Training(epochs=0)


@pytest.fixture(scope="module")
def data():
    return noise()


def convolutional():
    image = keras.Input(SHAPE)
    x = layers.Conv2D(8, 3, use_bias=False, name="first")(layers.Rescaling(1 / 127.5, -1)(image))
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2D(8, 1, activation="relu", name="second")(x)
    return randomised(keras.Model(image, layers.Dense(3, name="logits")(layers.GlobalAveragePooling2D()(x))))


# --- k-means ---------------------------------------------------------------------------------------------------------


def test_starts_by_hand():
    values = np.array([0, 1, 1, 1, 1, 1, 1, 10.0])
    np.testing.assert_allclose(first_centroids(values, 3, "linear"), [0, 5, 10])
    np.testing.assert_allclose(first_centroids(values, 2, "density"), [1, 1])  # a quarter, three quarters
    np.testing.assert_allclose(first_centroids(np.arange(101.0), 4, "density"), [12.5, 37.5, 62.5, 87.5])
    drawn = [first_centroids(values, 3, "k-means++", seed) for seed in range(5)]
    assert all(sorted(found) == [0, 1, 10] for found in drawn), "what is drawn once is at no distance any more"
    with pytest.raises(InputError, match="random"):
        first_centroids(values, 3, "random")


def test_k_means_by_hand():
    # 0 and 10 take {0, 1} and {9, 10, 11}; their means 0.5 and 10 leave the members as they are
    centroids, members = k_means([9, 0, 11, 1, 10], [10, 0])
    np.testing.assert_allclose(centroids, [0.5, 10])
    assert members.tolist() == [1, 0, 1, 0, 1]
    centroids, members = k_means([3, 3, 5], [0, 1, 2, 3])  # fewer values than centroids: each is its own
    assert centroids.tolist() == [3, 5]
    assert members.tolist() == [0, 0, 1]


@pytest.mark.parametrize("start", cluster.STARTS)
@pytest.mark.parametrize("seed", range(4))
def test_k_means_uses_every_centroid_and_each_is_the_mean_of_what_is_nearest_to_it(start, seed):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(size=300), 50 + rng.normal(size=3), [1e3]])  # linear starts find deserts
    centroids, members = k_means(values, first_centroids(values, 16, start, seed))
    assert len(centroids) == 16
    np.testing.assert_array_equal(np.unique(members), np.arange(16))
    for number, centroid in enumerate(centroids):
        assert values[members == number].mean() == pytest.approx(centroid, abs=1e-9)
    np.testing.assert_array_equal(np.abs(values[:, None] - centroids).argmin(axis=1), members)


# --- shared values ---------------------------------------------------------------------------------------------------


def test_a_centroids_gradient_is_the_sum_of_its_members():
    members = tf.constant([[0, 2, 2], [1, 0, 2]])
    centroids = tf.constant([0.5, -1.0, 2.0])
    upstream = np.array([[1.0, 10, 100], [1e3, 1e4, 1e5]], "float32")
    with tf.GradientTape() as tape:
        tape.watch(centroids)
        kernel = look_up(centroids, members)
        loss = tf.reduce_sum(kernel * upstream)
    np.testing.assert_array_equal(kernel, [[0.5, 2, 2], [-1, 0.5, 2]])
    np.testing.assert_array_equal(tape.gradient(loss, centroids), [10001, 1000, 100110])


def test_a_step_of_gradient_descent_is_the_free_step_averaged_over_each_cluster():
    kernel = np.array([[0.1, 0.9], [0.1, 0.1], [0.9, 0.9], [0.1, 0]], "float32")
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    layer = Computed({"kind": "Dense", "shape": kernel.shape, "bias": False}, shared=2, masked=True)
    layer.build((None, 4))
    layer.share(np.array([0.1, 0.9], "float32"), (kernel > 0.5).astype("int32"), kernel != 0)
    np.testing.assert_allclose(layer.free_kernel(), kernel, atol=1e-7)
    optimizer = keras.optimizers.SGD(0.01)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(x)))
    optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
    free = kernel - 0.01 * 2 * x.T @ (x @ kernel)
    expected = np.zeros_like(kernel)
    for value in np.unique(kernel[kernel != 0]):
        expected[kernel == value] = free[kernel == value].mean()
    np.testing.assert_allclose(layer.free_kernel(), expected, atol=1e-6)
    assert np.asarray(layer.free_kernel())[3, 1] == 0


# --- models ----------------------------------------------------------------------------------------------------------


def test_every_layer_gets_exactly_k_values_and_keeps_them_through_training(data):
    model = convolutional()
    before = [np.asarray(weight).copy() for weight in model.weights]
    settings = Clustering(clusters=6, training=QUICK)
    once = cluster.cluster(model, data, dataclasses.replace(settings, training=UNTRAINED))
    trained = cluster.cluster(model, data, settings)
    for name in ("first", "second", "logits"):
        start, end = (np.asarray(found.get_layer(name).kernel) for found in (once, trained))
        assert len(np.unique(start)) == len(np.unique(end)) == 6
        for value in np.unique(start):
            assert len(np.unique(end[start == value])) == 1, "who shared a value shares one still"
        assert np.abs(end - start).max() > 0
    assert len(np.unique(trained.get_layer("depthwise").kernel)) > 6
    for weight, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(weight, old)
    assert [type(layer) for layer in trained.layers] == [type(layer) for layer in model.layers]


def test_before_training_the_network_computes_what_the_clustered_weights_do(data):
    model, settings = convolutional(), Clustering(clusters=5, training=UNTRAINED)
    x = data.x_test.astype("float32")
    prepared, result = cluster.prepare(model, settings), cluster.cluster(model, data, settings)
    np.testing.assert_allclose(prepared(x, training=False), result(x, training=False), atol=1e-5)
    assert np.abs(result(x, training=False) - model(x, training=False)).max() > 1e-3


def test_zeros_of_a_pruned_model_are_kept_and_count_as_one_of_the_values(data):
    model = dense()
    kernel = np.asarray(model.get_layer("hidden").kernel)
    gone = np.abs(kernel) < np.quantile(np.abs(kernel), 0.7)
    model.get_layer("hidden").kernel.assign(np.where(gone, 0, kernel))
    trained = cluster.cluster(model, data, Clustering(clusters=8, training=QUICK))
    found = np.asarray(trained.get_layer("hidden").kernel)
    np.testing.assert_array_equal(found == 0, gone)
    assert len(np.unique(found)) == 8
    lost = cluster.cluster(model, data, Clustering(clusters=8, keep_zeros=False, training=QUICK))
    assert not (np.asarray(lost.get_layer("hidden").kernel) == 0).any(), "without, the zeros are a cluster like others"


def test_kept_layers_stay_free_and_bad_settings_are_one_line(data):
    model = dense()
    found = cluster.cluster(model, data, Clustering(clusters=4, keep=("logits",), training=UNTRAINED))
    np.testing.assert_array_equal(found.get_layer("logits").kernel, model.get_layer("logits").kernel)
    assert len(np.unique(found.get_layer("hidden").kernel)) == 4
    for settings, said in [
        (Clustering(clusters=1), "clusters is 1"),
        (Clustering(keep=("nowhere",)), "no layer nowhere"),
        (Clustering(keep=("hidden", "logits")), "no kernels to cluster"),
        (Clustering(start="best", training=UNTRAINED), "'best' is not known"),
    ]:
        with pytest.raises(InputError, match=said):
            cluster.cluster(model, data, settings)


# --- Huffman's code --------------------------------------------------------------------------------------------------


def test_a_code_by_hand():
    # Huffman's own way: 1 + 2 = 3, 3 + 3 = 6, 6 + 4... of 10, 4, 3, 2, 1: words of 1, 2, 3, 4, 4 bits
    counts = np.array([10, 4, 3, 2, 1])
    lengths = code_lengths(counts)
    assert lengths.tolist() == [1, 2, 3, 4, 4]
    assert (lengths * counts).sum() == 10 + 8 + 9 + 8 + 4
    symbols = np.array([0, 1, 2, 3, 4, 0])  # 0 10 110 1110 1111 0
    assert encode(symbols, lengths) == bytes([0b01011011, 0b10111100])
    assert decode(encode(symbols, lengths), lengths, 6).tolist() == symbols.tolist()
    assert code_lengths([7]).tolist() == code_lengths([0, 7])[1:].tolist() == [0], "a lone symbol needs no bits"
    assert decode(encode(np.zeros(5, int), np.array([0])), [0], 5).tolist() == [0] * 5


@pytest.mark.parametrize("seed", range(5))
def test_a_code_lies_between_the_entropy_and_a_bit_more_and_comes_back(seed):
    rng = np.random.default_rng(seed)
    symbols = rng.choice(20, 3000, p=rng.dirichlet(np.full(20, 0.4)))
    counts = np.bincount(symbols, minlength=20)
    lengths = code_lengths(counts)
    mean = (lengths * counts).sum() / len(symbols)
    assert entropy(counts) <= mean < entropy(counts) + 1
    assert (2.0 ** -lengths[counts > 0]).sum() == 1, "Kraft's sum of a complete code"
    content = encode(symbols, lengths)
    assert len(content) == -(-int((lengths * counts).sum()) // 8)
    np.testing.assert_array_equal(decode(content, lengths, len(symbols)), symbols)


def test_entropy_by_hand():
    assert entropy([1, 1, 1, 1]) == 2
    assert entropy([2, 1, 1, 0]) == 1.5
    assert entropy([5]) == 0


def test_gaps_by_hand():
    numbers = np.array([0, 0, 3, 0, 0, 0, 0, 0, 0, 2, 1, 0])
    kept, skipped = gaps(numbers, most=3)  # six zeros are more than three: one of them is kept
    assert kept.tolist() == [3, 0, 2, 1]
    assert skipped.tolist() == [2, 3, 2, 0]
    again = np.zeros(12, int)
    again[np.cumsum(skipped + 1) - 1] = kept
    np.testing.assert_array_equal(again, numbers)
    assert [part.tolist() for part in gaps(np.zeros(5, int))] == [[], []]


def test_the_size_of_a_kernel_by_hand():
    values = np.repeat(np.array([0.5, -1.0, 2.0, 0.25], "float32"), [80, 32, 24, 8]).reshape(12, 12)
    found = coded(values)  # words of 1, 2, 3, 3 bits: 80 + 64 + 72 + 24 = 240 bits = 30 bytes, and 4 lengths
    assert found["bytes"] == 4 * 4 + 4 + 30
    assert found["way"] == "all"
    assert found["distinct"] == 4
    assert found["entropy"] == pytest.approx(entropy([80, 32, 24, 8]))
    assert found["bits_per_weight"] == pytest.approx(8 * 34 / 144)


def test_many_zeros_are_better_skipped():
    rng = np.random.default_rng(0)
    values = rng.choice([-0.5, 0.25, 1.0], 20_000) * (rng.uniform(size=20_000) < 0.02)
    found = coded(values.astype("float32"))
    assert found["way"] == "gaps"
    assert found["bits_per_weight"] < 0.3, "a word for each would take a bit"
    assert coded(np.zeros((9, 9), "float32"))["bytes"] < 10


def test_the_table_of_a_model_counts_every_weight(data):
    model = cluster.cluster(convolutional(), data, Clustering(clusters=4, training=UNTRAINED))
    rows = cluster.table(model)
    assert sum(row["size"] for row in rows) == model.count_params()
    by_name = {row["weight"]: row for row in rows}
    assert by_name["second/kernel"]["distinct"] == 4
    assert by_name["second/kernel"]["bits_per_weight"] < 3
    assert cluster.coded_bytes(model) == sum(row["bytes"] for row in rows) < 4 * model.count_params()
    with pytest.raises(InputError, match="256"):
        coded(np.arange(300.0))
