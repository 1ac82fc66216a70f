"""Day 21: squash, routing, margin loss, masks, scenes and the networks, against values worked out by other means."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day21_capsnet as day21
from models.capsules import measures, rival, scenes

TINY = dataclasses.replace(day21.Config(), width=4, capsules=1, batch=8)


def numpy_squash(s):
    """Paper, eq. 1, as printed; for vectors that are not zero."""
    norm2 = np.sum(s**2, axis=-1, keepdims=True)
    return norm2 / (1 + norm2) * s / np.sqrt(norm2)


def numpy_routing(votes, rounds):
    """Paper, Procedure 1, loop by loop in float64.  votes [I,J,D] of one image -> capsules [J,D], couplings [I,J]."""
    lower, upper, _ = votes.shape
    b = np.zeros((lower, upper))
    for _ in range(rounds):
        c = np.exp(b) / np.exp(b).sum(axis=1, keepdims=True)
        v = np.zeros(votes.shape[1:])
        for j in range(upper):
            s = sum(c[i, j] * votes[i, j] for i in range(lower))
            v[j] = numpy_squash(s)
        for i in range(lower):
            for j in range(upper):
                b[i, j] += votes[i, j] @ v[j]
    return v, c


@pytest.fixture
def votes():
    """[B,J,I,D], large enough for the coupling to move far from uniform."""
    return np.random.default_rng(0).normal(size=(3, 4, 7, 5)).astype("float32")


# --- squash ----------------------------------------------------------------------------------------------------------


def test_squash_keeps_direction_and_maps_length_below_one():
    size = np.array([1e-3, 0.1, 1.0, 10.0, 1000.0])
    direction = np.array([0.6, 0.0, -0.8])
    got = np.array(day21.squash(size[:, None] * direction))
    length = np.linalg.norm(got, axis=-1)
    assert (length >= 0).all() and (length < 1).all()
    # float32; at 1e-3 the epsilon under the root adds 5 %
    np.testing.assert_allclose(length[1:], size[1:] ** 2 / (1 + size[1:] ** 2), rtol=1e-4)
    np.testing.assert_allclose(got / length[:, None], np.tile(direction, (5, 1)), atol=1e-6)


@pytest.mark.parametrize("function", [day21.squash, day21.lengths])
def test_the_gradient_at_zero_is_finite(function):
    zero = tf.Variable(np.zeros((2, 8), "float32"))
    with tf.GradientTape() as tape:
        out = tf.reduce_sum(function(zero))
    assert np.isfinite(tape.gradient(out, zero).numpy()).all()
    assert abs(float(out)) < 1e-2


def test_squash_does_not_overflow_in_half_precision():
    got = day21.squash(np.full((1, 8), 300, "float16"))  # its square is beyond float16
    assert got.dtype == "float32"
    assert np.linalg.norm(np.array(got)) == pytest.approx(1, abs=1e-5)


# --- routing ---------------------------------------------------------------------------------------------------------


def test_one_round_couples_uniformly(votes):
    capsules, (coupling,) = day21.route(votes, 1)
    np.testing.assert_allclose(coupling, 1 / 4, atol=1e-7)
    np.testing.assert_allclose(capsules, numpy_squash(votes.astype("float64").sum(axis=2) / 4), atol=1e-5)


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_routing_is_procedure_1(votes, rounds):
    capsules, couplings = day21.route(votes, rounds)
    assert len(couplings) == rounds
    for image in range(len(votes)):
        expected, coupling = numpy_routing(votes[image].transpose(1, 0, 2).astype("float64"), rounds)
        np.testing.assert_allclose(np.array(capsules)[image], expected, atol=1e-5)
        np.testing.assert_allclose(np.array(couplings[-1])[image].T, coupling, atol=1e-5)


def test_routing_finds_the_votes_that_agree():
    votes = np.random.default_rng(1).normal(size=(1, 2, 6, 4)).astype("float32")
    votes[0, 0, :5] = [2, 0, 0, 0]  # five lower capsules agree about digit 0 ...
    votes[0, 1, :4] = 2 * np.array([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, -1, 0, 0]])  # ... but not about 1
    _, couplings = day21.route(votes, 4)
    shares = [float(np.array(c)[0, 0, :5].mean()) for c in couplings]
    assert shares == sorted(shares) and shares[-1] > 0.9


def test_gradients_pass_through_the_last_mean_alone(votes):
    weight = np.random.default_rng(2).normal(size=(3, 4, 5)).astype("float32")
    held = tf.Variable(votes)
    with tf.GradientTape() as tape:
        capsules, couplings = day21.route(held, 3)
        loss = tf.reduce_sum(capsules * weight)
    got = tape.gradient(loss, held)

    constant = tf.constant(couplings[-1])
    with tf.GradientTape() as tape:  # the same, with the coupling as a given number
        mean = tf.reduce_sum(constant[..., None] * held, axis=2)
        loss = tf.reduce_sum(day21.squash(mean) * weight)
    np.testing.assert_allclose(got, tape.gradient(loss, held), atol=1e-6)

    with tf.GradientTape() as tape:  # what it would be if the inner rounds were differentiated too
        logits = tf.zeros_like(held[..., 0])
        for _ in range(3):
            coupling = tf.nn.softmax(logits, axis=1)
            through = day21.squash(tf.reduce_sum(coupling[..., None] * held, axis=2))
            logits += tf.reduce_sum(held * through[:, :, None], axis=-1)
        loss = tf.reduce_sum(through * weight)
    assert np.abs(got - tape.gradient(loss, held)).max() > 1e-2


def test_votes_are_one_matrix_for_each_pair_of_capsules():
    layer = day21.DigitCapsules(3, 4, 2)
    primary = np.random.default_rng(3).normal(size=(2, 5, 8)).astype("float32")
    layer.build(primary.shape)
    matrices = np.array(layer.w).reshape(5, 8, 3, 4)
    np.testing.assert_allclose(layer.votes(primary), np.einsum("bip,ipjd->bjid", primary, matrices), atol=1e-5)


# --- losses and masks ------------------------------------------------------------------------------------------------


def test_margin_loss_by_hand():
    length = np.full((3, 10), 0.1, "float32")
    length[0, 3] = 0.95  # right: nothing to pay
    length[1, 3], length[1, 5] = 0.6, 0.5  # missed by 0.3, invented by 0.4
    length[2, 3] = 0.9  # the second digit of this picture, 7, is missed by 0.8
    labels = np.array([[3, 3], [3, 3], [3, 7]])
    expected = [0, 0.3**2 + 0.5 * 0.4**2, 0.8**2]
    np.testing.assert_allclose(day21.margin_loss(labels, length), expected, atol=1e-6)
    np.testing.assert_allclose(day21.margin_loss(labels[:2, :1], length[:2]), expected[:2], atol=1e-6)


def test_squared_error_is_summed_over_pixels_and_digits():
    error = day21.squared_error(np.zeros((2, 2, 9)), np.array([0.5, 1.0])[:, None, None] * np.ones((2, 2, 9)))
    np.testing.assert_allclose(error, [2 * 9 * 0.25, 2 * 9], atol=1e-5)


def test_masks_leave_one_capsule_each():
    capsules = np.random.default_rng(4).normal(size=(2, 10, 16)).astype("float32")
    got = np.array(day21.masked(capsules, np.array([[2, 7], [0, 9]]))).reshape(2, 2, 10, 16)
    for image, digits in enumerate([(2, 7), (0, 9)]):
        for place, digit in enumerate(digits):
            np.testing.assert_array_equal(got[image, place, digit], capsules[image, digit])
            assert np.count_nonzero(np.delete(got[image, place], digit, axis=0)) == 0


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits():
    """Twelve pictures with one bright pixel at (10, 17) and the brightness as their name; labels 0, 1, 2, 0, ..."""
    images = np.zeros((12, 28, 28, 1), "uint8")
    images[:, 10, 17, 0] = 100 + np.arange(12)
    return images, (np.arange(12) % 3).astype("int32")


@pytest.mark.parametrize("scene", [scenes.SINGLE, scenes.CANVAS])
def test_digits_are_moved_within_bounds_and_not_changed(digits, scene):
    moved = np.array(scenes.place(digits[0].repeat(50, axis=0), scene, [1, 2]))
    assert moved.shape == (600, scene.side, scene.side, 1)
    image, row, column, _ = np.nonzero(moved)
    assert (image == np.arange(600)).all()
    margin = (scene.side - 28) // 2
    for at, start in ((row, 10 + margin), (column, 17 + margin)):
        assert set(at - start) == set(range(-scene.shift, scene.shift + 1))  # each shift occurs, none beyond
    np.testing.assert_allclose(moved.max(axis=(1, 2, 3)), np.repeat(100 + np.arange(12), 50) / 255, atol=1e-6)


def test_scenes_follow_from_the_order_of_the_batch(digits):
    numbers = np.arange(12)
    once, again = (scenes.compose(*digits, numbers, scenes.MULTI) for _ in range(2))
    other = scenes.compose(*digits, numbers[::-1], scenes.MULTI)
    np.testing.assert_array_equal(once[0], again[0])
    assert not np.array_equal(once[0], other[0])


def test_overlaps_hold_two_digits_of_different_classes(digits):
    image, labels, pixels = (np.array(part) for part in scenes.compose(*digits, np.arange(12), scenes.MULTI))
    assert image.shape == (12, 36, 36, 1) and labels.shape == (12, 2) and pixels.shape == (12, 2, 36 * 36)
    assert (labels[:, 0] != labels[:, 1]).all()
    np.testing.assert_array_equal(image.reshape(12, -1), pixels.max(axis=1))
    partner = np.rint(pixels[:, 1].max(axis=1) * 255).astype(int) - 100  # brightness names the picture
    np.testing.assert_array_equal(digits[1][partner], labels[:, 1])


@pytest.mark.parametrize("reconstruct", [True, False])
def test_a_continued_run_sees_the_scenes_it_would_have_seen(digits, reconstruct):
    setting = {"batch": 4, "seed": 3, "epochs": 3, "reconstruct": reconstruct}
    whole = list(scenes.batches(digits, scenes.MULTI, first_epoch=0, **setting))
    rest = list(scenes.batches(digits, scenes.MULTI, first_epoch=2, **setting))
    assert (len(whole), len(rest)) == (9, 3)
    for a, b in zip(tf.nest.flatten(whole[6:]), tf.nest.flatten(rest), strict=True):
        np.testing.assert_array_equal(a, b)
    image = (lambda batch: batch[0][0]) if reconstruct else (lambda batch: batch[0])
    assert not np.array_equal(image(whole[0]), image(whole[3]))


def test_affine_digits(digits):
    square = np.zeros((200, 28, 28, 1), "uint8")
    square[:, 9:19, 9:19] = 255  # about the middle
    still = scenes.affine(square, 0.0, 0)
    assert still.shape == (200, 40, 40, 1) and still.dtype == np.float32
    np.testing.assert_allclose(still.sum(axis=(1, 2, 3)), 100, rtol=1e-4)  # only moved, by whole pixels
    centre = [(still * np.arange(40).reshape(shape)).sum(axis=(1, 2, 3)) / 100 for shape in ((40, 1, 1), (1, 40, 1))]
    for at in centre:
        assert set(np.rint(at - 19.5).astype(int)) == set(range(-6, 7))
    turned = scenes.affine(square, 1.0, 0)
    area = turned.sum(axis=(1, 2, 3))
    assert 64 * 0.97 < area.min() < 75 and 125 < area.max() < 144 * 1.03  # 0.8 * 0.8 to 1.2 * 1.2
    moved = (turned * np.arange(40).reshape(40, 1, 1)).sum(axis=(1, 2, 3)) / area  # width is the last image axis
    np.testing.assert_allclose(moved, centre[0], atol=0.05)  # turning is about the middle


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", day21.PRESETS)
@pytest.mark.parametrize("side", [28, 40])
def test_the_cnn_has_as_many_parameters_as_the_encoder(preset, side):
    cfg = day21.Config(**day21.PRESETS[preset])
    params = day21.build_encoder(cfg, side).count_params()
    assert abs(rival.cnn((side, side, 1), 10, cfg.width, params, cfg.lr).count_params() / params - 1) < 0.01


def test_the_papers_setting_has_the_papers_size():
    cfg = day21.Config(**day21.PRESETS["full"])
    encoder, decoder = day21.build_encoder(cfg), day21.build_decoder()
    assert encoder.get_layer("digits").w.shape == (1152, 8, 160)
    # conv1, primary capsules and the matrices W; the paper states 8.2 million in all, 6.8 without the decoder
    assert encoder.count_params() == (81 * 256 + 256) + (81 * 256 * 256 + 256) + 1152 * 8 * 160
    assert encoder.count_params() + decoder.count_params() == 8_215_568


def test_macs_by_hand():
    encoder = day21.build_encoder(TINY)  # 28 -> 20 -> 6; 36 capsules of 8
    routing = 36 * 8 * 160 + 5 * 36 * 160
    assert measures.macs(encoder) == 400 * 81 * 4 + 36 * 81 * 4 * 8 + routing


def test_a_cnn_that_cannot_be_so_small_is_refused():
    with pytest.raises(core.InputError, match="no CNN of width 64 has 1,000 parameters"):
        rival.cnn((28, 28, 1), 10, 64, 1_000, 1e-3)


def test_routing_measures_by_hand():
    even, sure = np.full((1, 4, 2), 0.25), np.zeros((1, 4, 2))
    sure[0, 3] = 1
    half = np.stack([even[..., 0], sure[..., 1]], axis=-1)  # the first primary capsule undecided, the second decided
    length = np.array([[0.2, 0.1, 0.7, 0.9]])
    for coupling, weight, entropy in ((even, [1, 1], 1), (sure, [1, 1], 0), (half, [3, 1], 0.75)):
        row = measures.routing([None, coupling], length, np.array([weight]), np.array([2]))
        assert row == pytest.approx({"round": 2, "entropy": entropy, "true": 0.7, "rival": 0.9}, abs=1e-9)


def test_overlap_by_hand():
    drawn = np.array([[[0.9, 0.9, 0.1, 0.0], [0.0, 0.0, 0.0, 0.9]]])
    pixels = np.array([[[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    assert measures.overlap(drawn, pixels) == pytest.approx((1 / 3 + 1) / 2)


def test_saving_and_loading_changes_nothing(tmp_path):
    images = np.random.default_rng(5).uniform(size=(3, 28, 28, 1)).astype("float32")
    encoder, decoder = day21.build_encoder(TINY), day21.build_decoder()
    found = encoder.predict(images, verbose=0)
    masks = day21.masked(found["capsules"], np.array([[1], [2], [3]]))
    drawn = decoder.predict(masks, verbose=0)
    encoder.save(tmp_path / "encoder.keras")
    decoder.save(tmp_path / "decoder.keras")
    encoder, decoder = (keras.saving.load_model(tmp_path / f"{name}.keras") for name in ("encoder", "decoder"))
    again = encoder.predict(images, verbose=0)
    np.testing.assert_allclose(again["capsules"], found["capsules"], atol=1e-6)
    np.testing.assert_allclose(again["lengths"], found["lengths"], atol=1e-6)
    np.testing.assert_allclose(decoder.predict(masks, verbose=0), drawn, atol=1e-6)
    assert encoder.get_layer("digits").rounds == 3


def test_mixed_precision_keeps_routing_and_losses_in_float32():
    with core.runtime.policy("mixed_float16"):
        encoder, decoder = day21.build_encoder(TINY), day21.build_decoder()
        trainer = day21.build_trainer(TINY, encoder, decoder)
        cnn = rival.cnn((28, 28, 1), 10, TINY.width, 60_000, TINY.lr)
    digits = encoder.get_layer("digits")
    assert (digits.compute_dtype, digits.variable_dtype) == ("float16", "float32")
    assert encoder.get_layer("primary").output.dtype == "float16"
    images = np.random.default_rng(6).uniform(size=(8, 28, 28, 1)).astype("float32")
    labels = np.arange(8, dtype="int32")[:, None]
    out = trainer([images, labels])
    assert {tensor.dtype for tensor in [*encoder(images).values(), *out.values(), cnn(images)]} == {tf.float32}
    assert day21.margin_loss(labels, tf.cast(out["lengths"], tf.float16)).dtype == tf.float32
    target = {"lengths": labels, "pixels": images.reshape(8, 1, -1)}
    history = trainer.fit([images, labels], target, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_capsules_learn_a_few_images_by_heart():
    keras.utils.set_random_seed(0)
    data = core.data.load("fashion_mnist_12k", limit=16)
    images, labels = data.x_train.astype("float32") / 255, data.y_train[:, None]
    encoder = day21.build_encoder(dataclasses.replace(TINY, width=8))
    trainer = day21.build_trainer(dataclasses.replace(TINY, lr=3e-3), encoder, day21.build_decoder())
    target = {"lengths": labels, "pixels": images.reshape(16, 1, -1)}
    losses = [trainer.train_on_batch([images, labels], target)[0] for _ in range(120)]
    assert losses[-1] < losses[0] / 4
    assert (encoder.predict(images, verbose=0)["lengths"].argmax(axis=1) == labels[:, 0]).all()


def test_unfit_data_and_batch_are_refused(tmp_path):
    words = ["--preset", "smoke", "--runs", str(tmp_path)]
    with pytest.raises(core.InputError, match="--batch 100 is larger"):
        day21.main([*words, "--batch", "100"])


@pytest.mark.smoke
def test_smoke_preset_runs_all_four_experiments(tmp_path):
    record = day21.main(["--preset", "smoke", "--runs", str(tmp_path), "--exports", str(tmp_path / "e")])
    folder = tmp_path / "day21_capsnet" / "smoke-s0"
    assert record["figures"] == [f"{name}.png" for name in (
        "learning", "reconstructions", "dimensions", "routing", "ablation", "robustness", "overlaps")]  # fmt: skip
    assert all((folder / "figures" / name).stat().st_size > 5_000 for name in record["figures"])
    assert all(np.isfinite(value) for value in record["metrics"].values())
    assert record["data"]["name"] == "fashion_mnist_12k"
    assert [row["arm"] for row in record["tables"]["ablation"]] == ["1", "3", "1 plain", "3 plain"]
    entropy = [row["entropy"] for row in record["tables"]["routing"]]
    assert entropy[0] == pytest.approx(1, abs=1e-5) and entropy[-1] < entropy[0]
    loaded = keras.saving.load_model(folder / "encoder.keras")
    assert loaded.count_params() == record["metrics"]["capsnet_params"]
    (version,) = (tmp_path / "e" / "day21_capsnet").iterdir()
    exported = keras.saving.load_model(version / "assets.extra" / "model.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    answers = loaded.predict(pixels / np.float32(255), verbose=0)["lengths"]
    np.testing.assert_allclose(exported.predict(pixels, verbose=0), 10 * answers, atol=1e-4)  # float32, 36 capsules
