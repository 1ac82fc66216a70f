"""models/numpy_net convolution, pooling and nearest neighbours: by hand, by finite differences, and against Keras."""

import numpy as np
import pytest

from models.numpy_net import checks, conv, knn

VERSIONS = {
    "naive": (conv.conv_naive_forward, conv.conv_naive_backward),
    "im2col": (conv.conv_im2col_forward, conv.conv_im2col_backward),
    "fast": (conv.conv_forward, conv.conv_backward),
}
every_version = pytest.mark.parametrize(("forward", "backward"), VERSIONS.values(), ids=VERSIONS)
# stride, pad, dilation of kernels 3 high and 2 wide on pictures of 9 x 8
GEOMETRIES = [(1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 3, 1), (3, 1, 2), (1, "same", 1), (2, "same", 1), (1, "same", 3)]


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def random(rng, *shapes):
    return [rng.standard_normal(shape) for shape in shapes]


# --- convolution ----------------------------------------------------------------------------------------------------


@every_version
def test_convolution_by_hand(forward, backward):
    x = np.arange(9.0).reshape(1, 3, 3, 1)
    w, b = np.array([[1.0, 2.0], [0.0, -1.0]]).reshape(2, 2, 1, 1), np.array([10.0])
    out, cache = forward(x, w, b)
    # first window 0 1 / 3 4: 0 + 2 + 0 - 4 + 10 = 8; each step right or down adds the kernel's sum 2, or 3 times it
    np.testing.assert_array_equal(out[0, :, :, 0], [[8, 10], [14, 16]])
    dx, dw, db = backward(np.array([[1.0, 0.0], [0.0, 2.0]]).reshape(1, 2, 2, 1), cache)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[1, 2, 0], [0, -1 + 2, 4], [0, 0, -2]])
    np.testing.assert_array_equal(dw[:, :, 0, 0], [[0 + 8, 1 + 10], [3 + 14, 4 + 16]])
    np.testing.assert_array_equal(db, [3])


@every_version
def test_channels_kernels_stride_and_pad_by_hand(forward, backward):
    x = np.stack([np.ones((1, 3, 3)), np.full((1, 3, 3), 10.0)], axis=3)
    w = np.stack([np.ones((3, 3, 2)), np.zeros((3, 3, 2))], axis=3)
    out, _ = forward(x, w, np.array([0.0, 7.0]), stride=2, pad=1)
    np.testing.assert_array_equal(out[0, :, :, 0], [[44, 44], [44, 44]])  # corners see 4 pixels of 1 + 10
    np.testing.assert_array_equal(out[0, :, :, 1], 7)


@pytest.mark.parametrize("version", ["im2col", "fast"])
@pytest.mark.parametrize(("stride", "pad", "dilation"), GEOMETRIES)
def test_fast_versions_equal_the_naive_one(rng, version, stride, pad, dilation):
    x, w, b = random(rng, (3, 9, 8, 2), (3, 2, 2, 4), 4)
    out, cache = conv.conv_naive_forward(x, w, b, stride, pad, dilation)
    again, fast_cache = VERSIONS[version][0](x, w, b, stride, pad, dilation)
    d_out = rng.standard_normal(out.shape)
    np.testing.assert_allclose(again, out, rtol=0, atol=1e-12)  # the assignment's bound is 1e-9
    pairs = zip(VERSIONS[version][1](d_out, fast_cache), conv.conv_naive_backward(d_out, cache), strict=True)
    for ours, naive in pairs:
        np.testing.assert_allclose(ours, naive, rtol=0, atol=1e-12)


def test_many_pictures_are_convolved_part_by_part(rng, monkeypatch):
    x, w, b = random(rng, (7, 6, 6, 2), (3, 3, 2, 4), 4)
    d_out = rng.standard_normal((7, 4, 4, 4))
    out, cache = conv.conv_forward(x, w, b)
    whole = conv.conv_backward(d_out, cache)
    monkeypatch.setattr(conv, "CHUNK", 3 * 4 * 4 * 18 * 8)  # three pictures' windows: parts of 3, 3 and 1
    assert len(conv._parts(conv._windows(x, (3, 3)))) == 3
    np.testing.assert_allclose(conv.conv_forward(x, w, b)[0], out, rtol=0, atol=1e-13)
    for part, all_at_once in zip(conv.conv_backward(d_out, cache), whole, strict=True):
        np.testing.assert_allclose(part, all_at_once, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed):
    for name, found in checks.convolutional(np.random.default_rng(seed)).items():
        for check in found:
            assert check.norm < (1e-12 if "pooling" in name else 1e-8), (name, check)
            assert check.relative < 1e-8 and check.checked == check.size, (name, check)


def test_a_wrong_backward_is_found(rng, monkeypatch):
    right = conv.conv_backward
    monkeypatch.setattr(conv, "conv_backward", lambda d_out, cache: tuple(1.001 * d for d in right(d_out, cache)))
    found = checks.convolutional(rng)
    assert all(check.norm > 1e-4 for check in found["fast convolution"])


@pytest.mark.parametrize(("stride", "padding", "dilation"),
                         [(1, "valid", 1), (2, "valid", 1), (1, "same", 1), (2, "same", 1), (3, "same", 1),
                          (1, "valid", 2), (1, "same", 3)])  # fmt: skip
def test_keras_agrees(rng, stride, padding, dilation):
    import keras
    import tensorflow as tf

    x, w, b = random(rng, (2, 10, 7, 3), (3, 2, 3, 5), 5)
    layer = keras.layers.Conv2D(5, (3, 2), stride, padding, dilation_rate=dilation, dtype="float64")
    layer.build(x.shape)
    layer.set_weights([w, b])
    out, cache = conv.conv_forward(x, w, b, stride, "same" if padding == "same" else 0, dilation)
    d_out, there = rng.standard_normal(out.shape), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(there)
        theirs = layer(there)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-12)
    gradients = tape.gradient(theirs, [there, *layer.trainable_variables], output_gradients=tf.constant(d_out))
    for mine, their in zip(conv.conv_backward(d_out, cache), gradients, strict=True):
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-12)


@every_version
def test_dtype_is_kept(rng, forward, backward):
    x, w, b = (array.astype(np.float32) for array in random(rng, (2, 5, 5, 2), (3, 3, 2, 4), 4))
    out, cache = forward(x, w, b, pad=1)
    assert out.dtype == np.float32 and out.shape == (2, 5, 5, 4)
    assert [(array.dtype, array.shape) for array in backward(out, cache)] == [
        (np.float32, array.shape) for array in (x, w, b)
    ]


@every_version
def test_shapes_that_do_not_fit_are_refused(rng, forward, backward):
    x, w, b = random(rng, (2, 5, 5, 3), (3, 3, 2, 4), 4)
    with pytest.raises(ValueError, match=r"\(2, 5, 5, 3\).*\(3, 3, 2, 4\).*do not fit"):
        forward(x, w, b)
    with pytest.raises(ValueError, match=r"covers \(7, 7\).*\(5, 5\).*pad more"):
        forward(x[..., :2], w, b, dilation=3)
    with pytest.raises(ValueError, match=r"\(0, 5, 5, 2\).*empty batch"):
        forward(x[:0, ..., :2], w, b)


# --- pooling --------------------------------------------------------------------------------------------------------

POOLS = {
    "naive": (conv.max_pool_naive_forward, conv.max_pool_naive_backward),
    "tiles": (conv.max_pool_reshape_forward, conv.max_pool_reshape_backward),
    "fast": (conv.max_pool_forward, conv.max_pool_backward),
}


@pytest.mark.parametrize(("forward", "backward"), POOLS.values(), ids=POOLS)
def test_max_pooling_by_hand(forward, backward):
    x = np.array([[1.0, 5, 2, 0], [4, 3, 8, 1], [0, -1, 6, 6.5], [-2, -3, 7, 6]]).reshape(1, 4, 4, 1)
    out, cache = forward(x, 2)
    np.testing.assert_array_equal(out[0, :, :, 0], [[5, 8], [0, 7]])
    dx = backward(np.array([[1.0, 2], [3, 4]]).reshape(1, 2, 2, 1), cache)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0, 1, 0, 0], [0, 0, 2, 0], [3, 0, 0, 0], [0, 0, 4, 0]])


def test_equal_largest_numbers():
    x, one = np.zeros((1, 2, 2, 1)), np.ones((1, 1, 1, 1))
    for version in "naive", "fast":
        forward, backward = POOLS[version]
        np.testing.assert_array_equal(backward(one, forward(x, 2)[1])[0, :, :, 0], [[1, 0], [0, 0]])
    tied = conv.max_pool_reshape_backward(one, conv.max_pool_reshape_forward(x, 2)[1])
    np.testing.assert_array_equal(tied[0, :, :, 0], 0.25)


@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, 2), (2, 3), (3, 1)])
def test_fast_pooling_equals_naive_and_keras(rng, size, stride):
    import keras
    import tensorflow as tf

    (x,) = random(rng, (2, 9, 8, 3))
    out, cache = conv.max_pool_naive_forward(x, size, stride)
    fast, fast_cache = conv.max_pool_forward(x, size, stride)
    np.testing.assert_array_equal(fast, out)
    d_out = rng.standard_normal(out.shape)
    ours = conv.max_pool_naive_backward(d_out, cache), conv.max_pool_backward(d_out, fast_cache)
    np.testing.assert_allclose(ours[1], ours[0], rtol=0, atol=1e-12)
    mean, mean_cache = conv.avg_pool_forward(x, size, stride)
    for layer, values, dx in (
        (keras.layers.MaxPooling2D, fast, ours[1]),
        (keras.layers.AveragePooling2D, mean, conv.avg_pool_backward(d_out, mean_cache)),
    ):
        there = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(there)
            theirs = layer(size, stride, dtype="float64")(there)
        np.testing.assert_allclose(values, theirs, rtol=0, atol=1e-12)
        slope = tape.gradient(theirs, there, output_gradients=tf.constant(d_out))
        np.testing.assert_allclose(dx, slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_pooling_of_tiles_equals_keras(rng, size):
    import keras
    import tensorflow as tf

    x = rng.permutation(2 * 6 * 12 * 3).reshape(2, 6, 12, 3) / 10  # no two are equal: the winner is the same
    out, cache = conv.max_pool_reshape_forward(x, size)
    d_out, there = rng.standard_normal(out.shape), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(there)
        theirs = keras.layers.MaxPooling2D(size, dtype="float64")(there)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-12)
    slope = tape.gradient(theirs, there, output_gradients=tf.constant(d_out))
    np.testing.assert_allclose(conv.max_pool_reshape_backward(d_out, cache), slope, rtol=0, atol=1e-12)


def test_the_derivative_of_the_output_is_left_as_it_is(rng):
    (x,) = random(rng, (2, 4, 4, 3))
    d_out = np.ones((2, 2, 2, 3))
    conv.max_pool_backward(d_out, conv.max_pool_forward(x, 2)[1])
    np.testing.assert_array_equal(d_out, 1)


def test_windows_that_do_not_fit_are_refused(rng):
    (x,) = random(rng, (1, 5, 4, 2))
    with pytest.raises(ValueError, match=r"do not tile pictures of 5 x 4: use max_pool_forward"):
        conv.max_pool_reshape_forward(x, 2)
    with pytest.raises(ValueError, match=r"window of 5 does not fit into pictures \(1, 5, 4, 2\)"):
        conv.max_pool_forward(x, 5)


# --- nearest neighbours ---------------------------------------------------------------------------------------------


def test_distances_by_hand_and_by_definition(rng):
    np.testing.assert_array_equal(knn.distances(np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[3.0, 4.0]])), [[5], [4]])
    a, b = random(rng, (20, 30), (15, 30))
    expected = np.sqrt(np.square(a[:, None] - b).sum(axis=2))
    np.testing.assert_allclose(knn.distances(a, b), expected, rtol=0, atol=1e-12)
    assert knn.distances(a.astype(np.float32), b.astype(np.float32)).dtype == np.float32


def test_rounding_never_makes_a_distance_nan(rng):
    rows = 1e3 + rng.standard_normal((50, 300))
    squares = -2 * rows @ rows.T + np.square(rows).sum(axis=1)[:, None] + np.square(rows).sum(axis=1)
    assert squares.min() < 0  # what the guard is there for
    found = knn.distances(rows, rows)
    assert not np.isnan(found).any() and np.diag(found).max() < 1e-2


@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_is_scikit_learns_brute_force(rng, k):
    from sklearn.neighbors import NearestNeighbors

    examples, queries = random(rng, (40, 6), (9, 6))
    distances, rows = knn.nearest(queries, examples, k)
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(examples).kneighbors(queries)
    np.testing.assert_allclose(distances, theirs[0], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(rows, theirs[1])


@pytest.mark.parametrize("k", [0, 5])
def test_nearest_refuses_more_neighbours_than_there_are(k):
    with pytest.raises(ValueError, match=f"k = {k} .* 1 to 4"):
        knn.nearest(np.zeros((2, 3)), np.zeros((4, 3)), k)
