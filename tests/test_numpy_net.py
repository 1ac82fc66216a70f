"""models/numpy_net: each layer and loss by hand, by finite differences, and against Keras."""

import numpy as np
import pytest

from course.core import InputError
from models.numpy_net import checks, gradcheck, initialisers, layers, losses, net, optim


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# --- forward values, worked by hand ---------------------------------------------------------------------------------


def test_affine_by_hand():
    x, w, b = np.array([[1.0, 2.0]]), np.array([[3.0, 0.0, -1.0], [1.0, 4.0, 2.0]]), np.array([0.5, 0.0, -3.0])
    out, cache = layers.affine_forward(x, w, b)
    np.testing.assert_array_equal(out, [[5.5, 8.0, 0.0]])  # small integers and halves: exact
    dx, dw, db = layers.affine_backward(np.array([[1.0, 0.0, 2.0]]), cache)
    np.testing.assert_array_equal(dx, [[1.0, 5.0]])
    np.testing.assert_array_equal(dw, [[1.0, 0.0, 2.0], [2.0, 0.0, 4.0]])
    np.testing.assert_array_equal(db, [1.0, 0.0, 2.0])


def test_affine_takes_pictures_and_returns_their_gradient_in_their_shape(rng):
    x, w = rng.standard_normal((3, 4, 4, 2)), rng.standard_normal((32, 5))
    out, cache = layers.affine_forward(x, w, np.zeros(5))
    dx, dw, db = layers.affine_backward(np.ones_like(out), cache)
    assert (out.shape, dx.shape, dw.shape, db.shape) == ((3, 5), x.shape, w.shape, (5,))


def test_activations_by_hand():
    x = np.array([-2.0, 0.0, 3.0])
    for name, expected in {
        "identity": x,
        "relu": [0, 0, 3],
        "leaky_relu": [-0.02, 0, 3],
        "sigmoid": [1 / (1 + np.exp(2)), 0.5, 1 / (1 + np.exp(-3))],
        "tanh": np.tanh(x),
    }.items():
        np.testing.assert_allclose(layers.ACTIVATIONS[name][0](x)[0], expected, rtol=1e-15, atol=0, err_msg=name)


def test_sigmoid_never_overflows():
    with np.errstate(all="raise", under="ignore"):  # e^-1e4 is 0 in float64, rightly
        np.testing.assert_array_equal(layers.sigmoid(np.array([-1e4, 0.0, 1e4])), [0, 0.5, 1])


def test_softmax_of_huge_scores():
    scores = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4]])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(losses.softmax(scores), [[1, 0, 0], [1 / 3] * 3], atol=1e-15)
        loss, slope = losses.softmax_cross_entropy(scores, np.array([1, 2]))
    assert loss == pytest.approx((1e4 + np.log(3)) / 2, rel=1e-15)
    np.testing.assert_allclose(slope, [[0.5, -0.5, 0], [1 / 6, 1 / 6, -1 / 3]], atol=1e-15)


def test_softmax_is_unchanged_by_a_shift_and_sums_to_one(rng):
    scores = rng.standard_normal((5, 7))
    np.testing.assert_allclose(losses.softmax(scores), losses.softmax(scores + 100), rtol=1e-12)
    np.testing.assert_allclose(losses.softmax(scores).sum(axis=-1), 1, rtol=1e-14)


def test_binary_cross_entropy_of_huge_scores():
    with np.errstate(all="raise", under="ignore"):
        loss, slope = losses.bce_with_logits(np.array([1e4, -1e4, 0.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0]))
    assert loss == pytest.approx((1e4 + 2 * np.log(2)) / 4, rel=1e-15)
    np.testing.assert_array_equal(slope, [0.25, 0, -0.125, 0.125])


def test_svm_by_hand():
    scores, labels = np.array([[3.0, 2.5, 1.0], [0.0, 2.0, -1.0], [5.0, 1.0, 1.0]]), np.array([0, 2, 0])
    loss, slope = losses.svm(scores, labels)
    # 0.5 short of the margin of 1 | 2 and 4 short | far enough from all
    assert loss == pytest.approx((0.5 + 2 + 4) / 3, rel=1e-15)
    np.testing.assert_allclose(slope, np.array([[-1, 1, 0], [1, 1, -2], [0, 0, 0]]) / 3, rtol=1e-15)
    assert losses.svm(scores, labels, margin=2.0)[0] == pytest.approx((1.5 + 3 + 5) / 3, rel=1e-15)


def test_svm_at_its_kink_takes_the_slope_of_the_lower_side():
    loss, slope = losses.svm(np.array([[2.0, 1.0]]), np.array([0]))  # exactly the margin apart
    assert loss == 0
    np.testing.assert_array_equal(slope, [[0, 0]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_svm_keeps_the_dtype_and_starts_at_the_number_of_wrong_classes(dtype):
    loss, slope = losses.svm(np.zeros((4, 10), dtype), np.arange(4))
    assert loss == 9 and slope.dtype == dtype and not slope.sum(axis=1).any()


def test_svm_against_finite_differences(rng):
    scores, labels = 2 * rng.standard_normal((20, 7)), rng.integers(0, 7, 20)
    rows = np.arange(20)

    def pieces():
        return scores - scores[rows, labels][:, None] + 1 > 0

    gradients = {"scores": losses.svm(scores, labels)[1]}
    (found,) = gradcheck.check(lambda: losses.svm(scores, labels)[0], {"scores": scores}, gradients, pieces=pieces)
    assert found.relative < 1e-7 and found.skipped < 5


def test_binary_cross_entropy_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(4, 1\).*\(4,\)"):
        losses.bce_with_logits(np.zeros((4, 1)), np.zeros(4))


def test_uniform_scores_lose_log_c():
    loss, _ = losses.softmax_cross_entropy(np.zeros((6, 10)), np.arange(6))
    assert loss == pytest.approx(np.log(10), rel=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_dtype_is_kept(rng, dtype):
    network = net.create(rng, (4, 3, 2), dtype=dtype)
    scores, caches = net.forward(network, rng.standard_normal((5, 4)).astype(dtype))
    _, slope = losses.softmax_cross_entropy(scores, np.array([0, 1, 0, 1, 0]))
    gradients = net.backward(network, slope, caches)
    assert {array.dtype for array in (scores, slope, *gradients.values())} == {np.dtype(dtype)}


# --- initialisers, update -------------------------------------------------------------------------------------------


def test_initialisers_have_their_variance(rng):
    he, xavier = initialisers.he(rng, 400, 500), initialisers.xavier(rng, 400, 500)
    assert he.var() == pytest.approx(2 / 400, rel=0.02)  # 200,000 draws: a standard error of 0.3 %
    assert xavier.var() == pytest.approx(2 / 900, rel=0.02)
    assert abs(xavier).max() <= np.float32(np.sqrt(6 / 900))


def test_he_keeps_the_power_of_a_signal_through_twenty_relu_layers(rng):
    x = rng.standard_normal((64, 512))
    out, _ = net.forward(net.create(rng, (512,) * 21, dtype=np.float64), x)
    assert 0.3 < np.square(out).mean() < 3 * 2  # variance 1 would fall to 2^-20 or grow without bound


def test_sgd_by_hand():
    params = {"w": np.array([1.0, 2.0])}
    kept = params["w"]
    optim.sgd(params, {"w": np.array([0.5, -1.0])}, 0.1)
    np.testing.assert_allclose(kept, [0.95, 2.1], rtol=1e-15)  # in place: whoever holds the array sees it


# --- gradient checks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_every_layer_loss_and_network(seed):
    rng = np.random.default_rng(seed)
    table = checks.rows(checks.dense(rng) | checks.networks(net.forward, net.backward, rng))
    for row in table:
        assert row["relative"] < checks.BOUND and row["norm"] < checks.BOUND, row
        assert row["checked"] + row["skipped"] == row["size"] and row["checked"] > 0.9 * row["size"], row


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "leaky_relu"])
def test_the_check_sees_a_wrong_derivative(rng, name):
    forward, backward = layers.ACTIVATIONS[name]
    x = {"x": rng.standard_normal(9)}
    (found,) = gradcheck.check_layer(forward, lambda d, cache: backward(d, cache) * (1 + 1e-6), x, rng)
    assert found.relative > checks.BOUND and found.norm > checks.BOUND


def test_a_kink_is_left_out_and_would_be_wrong_otherwise():
    x = np.array([1.0, 3e-6, -2.0, 0.0])  # the second and fourth lie within a step of 1e-5 of the kink
    slope = layers.relu_backward(np.ones(4), x)

    def loss():
        return np.maximum(x, 0).sum()

    (blind,) = gradcheck.check(loss, {"x": x}, {"x": slope})
    assert blind.absolute == pytest.approx(0.5, abs=1e-6)  # at 0 the difference quotient is the mean of both slopes
    (seeing,) = gradcheck.check(loss, {"x": x}, {"x": slope}, pieces=lambda: x > 0)
    assert (seeing.checked, seeing.skipped) == (2, 2)
    assert seeing.relative < 1e-9


def test_a_check_that_compares_nothing_is_refused():
    x = np.zeros(3)
    with pytest.raises(ValueError, match="every coordinate of x"):
        gradcheck.check(lambda: np.maximum(x, 0).sum(), {"x": x}, {"x": x.copy()}, pieces=lambda: x > 0)


def test_check_refuses_float32_views_and_wrong_shapes():
    with pytest.raises(TypeError, match="float64"):
        gradcheck.numerical_gradient(lambda: 0.0, np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        gradcheck.numerical_gradient(lambda: 0.0, np.zeros((3, 4)).T)
    with pytest.raises(ValueError, match="shape"):
        gradcheck.check(lambda: 0.0, {"w": np.zeros((2, 3))}, {"w": np.zeros((3, 2))})


def test_sampling_checks_as_many_as_asked_and_restores_the_array(rng):
    x = rng.standard_normal((20, 30))
    before = x.copy()
    (found,) = gradcheck.check(lambda: (x**3).sum() / 600, {"x": x}, {"x": x**2 / 200}, samples=40, rng=rng)
    assert (found.size, found.checked) == (600, 40)
    assert found.relative < checks.BOUND
    np.testing.assert_array_equal(x, before)


def test_the_largest_difference_of_lists_and_of_dicts():
    from models.numpy_net import twin

    ours, theirs = [np.array([1.0, 2.0]), np.zeros((2, 1))], [np.array([1.0, 2.5]), np.array([[0.0], [-3.0]])]
    assert twin.largest_difference(ours, theirs) == 3
    assert twin.largest_difference({"b": ours[0]}, {"w": theirs[1], "b": theirs[0]}) == 0.5
    with pytest.raises(ValueError, match=r"\(2, 1\) stands beside one of \(2,\)"):
        twin.largest_difference({"w": ours[1]}, {"w": theirs[0]})  # which would broadcast
    with pytest.raises(ValueError, match="shorter"):
        twin.largest_difference(ours, theirs[:1])


@pytest.mark.parametrize("worst", [1e-9, 0.5])
def test_the_figure_shows_a_failed_check_too(worst):
    figure = checks.draw([{"of": "affine", "relative": 1e-10}, {"of": "affine", "relative": worst}])
    (axes,) = figure.axes
    left, right = axes.get_xlim()
    drawn = axes.collections[0].get_offsets()[:, 0]
    assert left < drawn.min() and max(drawn.max(), checks.BOUND) < right
    assert drawn.tolist() == [worst]


def test_relative_error_has_a_floor():
    assert gradcheck.relative_error(np.array(1e-12), np.array(-1e-12)) == pytest.approx(2e-9)  # rounding, not 100 %
    assert gradcheck.relative_error(np.array(1.0), np.array(1.1)) == pytest.approx(0.1 / 2.1)


def plain_step(network, x, y, lr):
    scores, caches = net.forward(network, x)
    loss, slope = losses.softmax_cross_entropy(scores, y)
    optim.sgd(network.params, net.backward(network, slope, caches), lr)
    return loss


def test_sanity_passes_a_right_step_and_fails_a_wrong_one(rng, tmp_path):
    network = net.create(rng, (30, 40, 5), output_scale=0.1)
    before = net.cast(network, np.float32)
    x, y = rng.standard_normal((200, 30)).astype(np.float32), rng.integers(0, 5, 200)
    good = checks.sanity(network, plain_step, x, y, tmp_path / "net.npz")
    assert good["initial_loss"] == pytest.approx(good["initial_loss_expected"], abs=0.05)
    assert good["initial_loss_expected"] == pytest.approx(np.log(5), rel=1e-15)
    assert good["overfit_50_error"] == 0 and good["overfit_50_loss"] < 0.1
    assert good["loss_of_scores_1e4"] == 1e4 and good["reloaded_difference"] == 0
    assert all(np.array_equal(network.params[name], array) for name, array in before.params.items())
    uphill = checks.sanity(network, lambda n, x, y, lr: plain_step(n, x, y, -lr / 100), x, y, tmp_path / "net.npz")
    assert uphill["overfit_50_error"] > 50


# --- network --------------------------------------------------------------------------------------------------------


def test_a_small_last_layer_starts_at_log_c(rng):
    network = net.create(rng, (784, 300, 10), output_scale=0.1)
    scores, _ = net.forward(network, rng.uniform(size=(500, 784)).astype(np.float32))
    loss, _ = losses.softmax_cross_entropy(scores, rng.integers(0, 10, 500))
    assert loss == pytest.approx(np.log(10), abs=0.05)


@pytest.mark.parametrize(("sizes", "activation"), [((3, 2), "swish"), ((3, 0, 2), "relu"), ((3,), "relu")])
def test_create_refuses_what_cannot_be_built(rng, sizes, activation):
    with pytest.raises(InputError, match=r"choose one of|cannot be used"):
        net.create(rng, sizes, activation)


OPTIONS = [(normalization, keep) for normalization in (None, "batch", "layer") for keep in (1.0, 0.6)]


@pytest.mark.parametrize("reg", [0, 3.14])
@pytest.mark.parametrize(("normalization", "keep"), OPTIONS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_gradients_of_the_regularised_loss_with_every_option(rng, activation, normalization, keep, reg):
    sizes = (7, 9, 8, 4)
    network = net.create(
        rng, sizes, activation, normalization=normalization, keep=keep, weight_scale=0.3, dtype=np.float64
    )
    x, y = rng.standard_normal((12, 7)), rng.integers(0, 4, 12)
    for name in network.params:
        if not name.startswith("W"):  # biases and the normalization's start at values that hide mistakes
            network.params[name] += 0.3 * rng.standard_normal(network.params[name].shape)

    def masks():
        return np.random.default_rng(5)

    def loss():
        return net.loss(network, x, y, reg, rng=masks())

    def sides():
        _, caches = net.forward(network, x, train=True, rng=masks())
        return np.concatenate([(affine[0] > 0).ravel() for affine, _ in caches[1:]])

    found = gradcheck.check(
        lambda: loss()[0], network.params, loss()[1], pieces=sides if activation == "relu" else None
    )
    assert [check.name for check in found] == list(network.params)
    for check in found:
        assert check.relative < 1e-6 and check.checked > 0.9 * check.size, check
        assert check.norm < 1e-7 or (check.name in ("b1", "b2") and normalization == "batch"), check
        # a bias before batch normalization moves the mean that is then taken off: its gradient is 0, but for rounding
        assert check.norm < 1e-7 or check.absolute < 1e-9, check


def test_the_loss_may_be_another(rng):
    network, x, y = net.create(rng, (6, 5, 4), dtype=np.float64), rng.standard_normal((9, 6)), rng.integers(0, 4, 9)
    value, gradients = net.loss(network, x, y, of=losses.svm)
    assert value == losses.svm(net.scores(network, x), y)[0]
    found = gradcheck.check(lambda: net.loss(network, x, y, of=losses.svm)[0], network.params, gradients)
    assert max(check.relative for check in found) < 1e-6


def test_regularisation_by_hand():
    network = net.Net({"W1": np.array([[1.0, -2.0]]), "b1": np.array([5.0, 5.0])}, "identity")
    x, y = np.array([[0.0]]), np.array([1])
    value, gradients = net.loss(network, x, y, 0.5)
    assert value == pytest.approx(np.log(2) + 0.5 * 0.5 * (1 + 4), rel=1e-15)
    np.testing.assert_allclose(gradients["W1"], [[0.5, -1.0]], rtol=1e-15)  # x = 0: of the regularisation alone
    np.testing.assert_allclose(gradients["b1"], [0.5, -0.5], rtol=1e-15)  # of the loss alone


def test_weight_scale_replaces_the_initialiser(rng):
    network = net.create(rng, (200, 300, 10), weight_scale=0.02, output_scale=0.5)
    assert network.params["W1"].std() == pytest.approx(0.02, rel=0.02)
    assert network.params["W2"].std() == pytest.approx(0.01, rel=0.05)
    assert all(array.dtype == np.float32 for array in network.params.values())


def test_training_drops_units_and_testing_does_not(rng):
    network, x = net.create(rng, (6, 400, 3), keep=0.25), rng.standard_normal((20, 6)).astype(np.float32)
    whole, (_, (shown, _)) = net.forward(network, x)
    dropped, (_, (hidden, _)) = net.forward(network, x, train=True, rng=np.random.default_rng(1))
    again, _ = net.forward(network, x, train=True, rng=np.random.default_rng(1))
    np.testing.assert_array_equal(dropped, again)
    np.testing.assert_array_equal(net.scores(network, x), whole)
    on = shown[0] > 0
    assert (hidden[0][on] > 0).mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_allclose(hidden[0][hidden[0] > 0], 4 * shown[0][hidden[0] > 0], rtol=1e-6)


def test_running_statistics_follow_the_batch_in_training_alone(rng):
    network = net.create(rng, (6, 5, 3), normalization="batch", dtype=np.float64)
    x = rng.standard_normal((50, 6)) * 3 + 1
    net.forward(network, x)
    np.testing.assert_array_equal(network.running["mean1"], 0)
    inside = x @ network.params["W1"]
    for _ in range(200):
        net.forward(network, x, train=True)
    np.testing.assert_allclose(network.running["mean1"], inside.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(network.running["var1"], inside.var(axis=0), rtol=1e-6)
    np.testing.assert_allclose(net.scores(network, x), net.forward(network, x, train=True)[0], rtol=1e-5)
    np.testing.assert_allclose(net.scores(network, x)[:1], net.scores(network, x[:1]), rtol=1e-12)  # in any company


@pytest.mark.parametrize("options", [{"normalization": "group"}, {"keep": 0.0}, {"keep": 1.5}])
def test_create_refuses_unknown_options(rng, options):
    with pytest.raises(InputError, match=r"choose one of|no probability"):
        net.create(rng, (3, 4, 2), **options)


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_save_and_load_with_normalization_and_dropout(rng, tmp_path, normalization):
    network = net.create(rng, (5, 4, 6, 3), normalization=normalization, keep=0.5)
    x = rng.standard_normal((7, 5)).astype(np.float32)
    net.forward(network, x, train=True, rng=rng)  # the statistics move
    net.save(network, tmp_path / "net.npz")
    again = net.load(tmp_path / "net.npz")
    assert (again.normalization, again.keep, again.depth) == (normalization, 0.5, 3)
    assert list(again.params) == list(network.params) and again.running.keys() == network.running.keys()
    np.testing.assert_array_equal(net.scores(again, x), net.scores(network, x))
    np.savez(tmp_path / "net.npz", activation="relu", normalization=normalization, **network.params)
    if normalization == "batch":  # its statistics are missing
        with pytest.raises(InputError, match="do not fit"):
            net.load(tmp_path / "net.npz")


def test_cast_copies_the_running_statistics_too(rng):
    network = net.create(rng, (5, 4, 3), normalization="batch", keep=0.5)
    copy = net.cast(network, np.float64)
    copy.running["mean1"] += 1
    assert copy.running["mean1"].dtype == np.float64 and (copy.normalization, copy.keep) == ("batch", 0.5)
    np.testing.assert_array_equal(network.running["mean1"], 0)


def test_save_and_load(rng, tmp_path):
    network = net.create(rng, (5, 4, 3), "tanh")
    net.save(network, tmp_path / "net.npz")
    again = net.load(tmp_path / "net.npz")
    x = rng.standard_normal((7, 5)).astype(np.float32)
    assert again.activation == "tanh" and list(again.params) == ["W1", "b1", "W2", "b2"]
    np.testing.assert_array_equal(net.forward(again, x)[0], net.forward(network, x)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["net.npz"]


def test_load_refuses_what_is_no_network(tmp_path):
    path = tmp_path / "net.npz"
    with pytest.raises(InputError, match="cannot be read"):
        net.load(path)
    path.write_bytes(b"PK\x03\x04 not a whole archive")
    with pytest.raises(InputError, match="cannot be read"):
        net.load(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(InputError, match="no fully connected network"):
        net.load(path)
    np.savez(path, activation="relu", W1=np.zeros((3, 4)), b1=np.zeros(5))
    with pytest.raises(InputError, match="do not fit"):
        net.load(path)
    np.savez(path, activation="relu", W1=np.array([{}], dtype=object), b1=np.zeros(5))  # a pickle: it could run code
    with pytest.raises(InputError, match="cannot be read"):
        net.load(path)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "sigmoid", "tanh", "identity"])
def test_keras_agrees(rng, activation):
    from models.numpy_net import twin

    network = net.create(rng, (6, 8, 8, 4), activation, dtype=np.float64)
    x, y = rng.standard_normal((400, 6)), rng.integers(0, 4, 400)
    scores, caches = net.forward(network, x)
    np.testing.assert_allclose(twin.model(network, "float64")(x), scores, atol=1e-7 if "leaky" in activation else 1e-12)
    _, slope = losses.softmax_cross_entropy(scores, y)
    bound = 1e-8 if activation == "leaky_relu" else 1e-14  # TensorFlow keeps the slope of 0.01 in float32
    assert twin.largest_difference(net.backward(network, slope, caches), twin.gradients(network, x, y)) < bound
    before = net.cast(network, np.float64)
    ours, theirs = twin.compare(plain_step, network, x, y, batch=4, lr=0.1)
    assert ours.shape == theirs.shape == (100,)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # Keras reports in float32; the bound of the lesson is 1e-5
    assert np.ptp(ours) > 0.1
    assert twin.largest_difference(before.params, network.params) == 0


@pytest.mark.parametrize("normalization", ["batch", "layer"])
def test_keras_agrees_with_normalization(rng, normalization):
    from models.numpy_net import twin

    network = net.create(rng, (6, 8, 8, 4), "tanh", normalization=normalization, dtype=np.float64)
    for name in network.params:
        network.params[name] += 0.1 * rng.standard_normal(network.params[name].shape)
    x, y = rng.standard_normal((40, 6)), rng.integers(0, 4, 40)
    for _ in range(3):
        net.forward(network, x, train=True)
    np.testing.assert_allclose(twin.model(network, "float64")(x), net.scores(network, x), atol=1e-7)  # epsilon: float32
    _, gradients = net.loss(network, x, y)
    assert twin.largest_difference(gradients, twin.gradients(network, x, y)) < 1e-8
    network.keep = 0.5
    np.testing.assert_allclose(twin.model(network, "float64")(x), net.scores(network, x), atol=1e-7)
    with pytest.raises(ValueError, match="masks"):
        twin.gradients(network, x, y)
