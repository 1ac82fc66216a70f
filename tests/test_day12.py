"""Day 12: the numbers of 16 bits against NumPy's, what computes in which, and where gradients go under."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day12_mixed_precision as day12
from models.scale import precision

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": tf.bfloat16.as_numpy_dtype}


@pytest.fixture
def rng():
    return np.random.default_rng(12)


@pytest.fixture(scope="module")
def cfg():
    return day12.Config(**day12.PRESETS["smoke"])


@pytest.fixture(scope="module")
def tasks(cfg):
    images = core.data.load(cfg.data)
    parts = core.data.three_way(images, cfg.train, cfg.val, 0)
    deep, _ = precision.deep_task(cfg, parts, day12.autoencoder)
    return {"deep": deep, "residual": precision.residual_task(cfg, parts, len(images.labels))}


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "largest", "least_normal", "one"),
    [
        ("float32", np.uint32, 0x7F7FFFFF, 0x00800000, 0x3F800000),
        ("float16", np.uint16, 0x7BFF, 0x0400, 0x3C00),
        ("bfloat16", np.uint16, 0x7F7F, 0x0080, 0x3F80),
    ],
)
def test_formats_are_those_of_the_bits(name, bits, largest, least_normal, one):
    form = day12.FORMATS[name]
    words = np.array([largest, least_normal, 1, one, one + 1], bits)  # a number's successor has the next bit pattern
    found = words.view(DTYPES[name]).astype(np.float64)
    assert [form.largest, form.least_normal, form.least, 1] == found[:4].tolist()
    assert day12.spacing(1.0, form) == found[4] - 1


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_numpys_bit_for_bit(rng, name):
    form, dtype = day12.FORMATS[name], DTYPES[name]
    sizes = 2.0 ** rng.uniform(np.log2(form.least) - 3, min(np.log2(form.largest) + 2, 127), 20_000)
    grid = np.array([0, 1, 2, 3, 1023, 1024, 2047]) * form.least  # and half way between, where the even one is taken
    edges = [form.largest, form.largest * (1 + 2.0 ** -(form.fraction + 3)), np.inf, 0.0, form.least / 2]
    x = np.concatenate([sizes * rng.choice([-1, 1], sizes.shape), grid, grid + form.least / 2, edges])
    if name == "bfloat16":
        x = x.astype(np.float32).astype(np.float64)  # its cast goes by way of float32: round once only
    with np.errstate(all="ignore"):
        wanted = x.astype(np.float32).astype(dtype) if name == "bfloat16" else x.astype(dtype)
    np.testing.assert_array_equal(day12.rounded(x, form), wanted.astype(np.float64))
    assert np.isnan(day12.rounded(np.nan, form))


def test_every_number_of_float16_has_its_spacing():
    numbers = np.arange(0x7BFF, dtype=np.uint16).view(np.float16)  # from 0 to the last but one
    gaps = np.diff(np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64))
    np.testing.assert_array_equal(day12.spacing(numbers.astype(np.float64), day12.FORMATS["float16"]), gaps)


def test_lost_updates_by_hand():
    weights = [np.ones(4), np.array([0.0])]
    updates = [np.array([2.0**-12, -(2.0**-12), 2.0**-10, 0.0]), np.array([2.0**-20])]
    # 1 - 2^-12 is half way to the number below: to the even one, 1; upwards it is a quarter of the way
    assert day12.lost(weights, updates) == {"float32": 0, "float16": 50, "bfloat16": 75}
    assert day12.lost(weights, [np.zeros(4), np.zeros(1)])["float16"] == 0
    weight = np.float16(1)
    for _ in range(1_000):
        weight = np.float16(weight + np.float16(2.0**-12))
    assert weight == 1, "a thousand lost updates are lost"


# --- what keeps 32 bits ----------------------------------------------------------------------------------------------


def test_what_fails_in_16_bits():
    exact = day12.fragile(np.float32)
    assert all(value == pytest.approx(wanted, rel=1e-5) for value, wanted in exact.values())
    half = [value for value, _ in day12.fragile(np.float16).values()]
    assert half[0] == np.inf and half[1] == 2048 and not np.isfinite(half[2])
    brain = [value for value, _ in day12.fragile(DTYPES["bfloat16"]).values()]
    assert brain[0] == pytest.approx(20, rel=2**-8) and brain[1] == 256 and abs(brain[2] - 1) > 0.5


@pytest.mark.parametrize(("name", "short"), [("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")])
def test_layers_compute_in_16_bits_and_logits_and_weights_are_float32(tasks, name, short):
    for task in tasks.values():
        with core.runtime.policy(name):
            model, _ = task.begin()
        rows = precision.dtypes(model)
        assert {row["weights"] for row in rows} == {"float32"}
        assert rows[-1]["layer"] == "logits"
        assert (rows[-1]["computes in"], rows[-1]["output"]) == ("float32", "float32")
        assert {row["computes in"] for row in rows[:-1]} == {short}
        assert {row["output"] for row in rows if row["kind"] in ("Conv2D", "Dense")} == {short, "float32"}
        x, y = next(iter(task.batches()))
        assert task.loss(y, model(x)).dtype == tf.float32


def test_a_step_multiplies_in_16_bits_and_takes_means_and_softmax_in_32(tasks):
    rows, operations = precision.used(tasks["residual"], day12.scaled_step, day12.Scaling())
    found = {row["operation"]: row["computes in"] for row in operations}
    assert found["Conv2D"] == found["Conv2DBackpropFilter"] == found["Conv2DBackpropInput"] == "float16"
    assert found["SparseSoftmaxCrossEntropyWithLogits"] == "float32", "the loss"
    assert found["Rsqrt"] == "float32", "the deviation of a normalisation"
    assert "float32" in found["Mean"] and "float32" in found["MatMul"], "its mean; the logits"
    assert any(row["kind"] == "BatchNormalization" for row in rows)


def test_batch_normalisation_of_large_maps_is_not_spoilt():
    x = np.random.default_rng(0).normal(300, 1, (8, 4, 4, 2)).astype(np.float16)  # 300 squared is inf in float16
    layer = keras.layers.BatchNormalization(dtype="mixed_float16")
    out = keras.ops.convert_to_numpy(layer(x, training=True)).astype(np.float64)
    assert out.dtype == np.float64 and np.abs(out.mean((0, 1, 2))).max() < 0.02
    assert np.abs(out.std((0, 1, 2)) - 1).max() < 0.05


# --- scaling ---------------------------------------------------------------------------------------------------------


def test_our_scaling_and_day_10s_loop_with_keras_are_one(tasks, cfg):
    both = day12.follow(tasks["residual"], cfg.batch, 10, growth=2)
    ours, theirs = np.array(both["ours"]), np.array(both["Keras"])
    np.testing.assert_array_equal(ours[:, 1], theirs[:, 1])
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=2e-3)
    assert ours[0, 1] == 2.0**24 and ours[1, 1] == 2.0**23, "the first step overflows"
    assert len(ours) == 10 and (np.diff(ours[:, 1]) > 0).any(), "others are good"


def test_deltas_are_exact_in_float32_and_scale_with_the_loss(tasks):
    task = tasks["deep"]
    x, y = next(iter(task.batches()))
    model, _ = task.begin()
    plain, scaled = (day12.deltas(model, task, x, y, scale) for scale in (1.0, 2.0**15))
    assert len(plain) == len(task.layers) == 3
    for one, many in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(many, 2.0**15 * one)
    # the last hidden layer's, written out: the chain rule through the logits
    hidden = keras.Model(model.input, model.get_layer(task.layers[-1]).output)(x)
    out = keras.ops.sigmoid(model.get_layer("logits")(hidden))
    by_logits = 2 * (out - y) * out * (1 - out) / np.prod(out.shape)
    wanted = np.ravel(by_logits @ np.transpose(model.get_layer("logits").kernel.numpy()))
    np.testing.assert_allclose(plain[-1], wanted, rtol=1e-3, atol=1e-11)


def test_a_deep_logistic_networks_gradients_go_under_and_are_saved_by_the_scale(cfg):
    """The lesson's case at its own size, on noise: what reaches the first layers is 0 in float16."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (128, 1024)).astype(np.float32)

    def begin():
        core.runtime.seed(0)
        return day12.autoencoder((256, 128, 64, 32), 1024), keras.optimizers.Adam(0.003)

    def loss(y, output):
        return keras.ops.mean((keras.ops.sigmoid(output) - y) ** 2)

    names = tuple(f"layer{i}" for i in range(1, 8))
    task = precision.Task(begin, lambda: [(x, x)], loss, None, names, 1)
    half = day12.FORMATS["float16"]
    found = precision.underflow(task, day12.deltas, half.least / 2, half.least_normal)
    first, last = found["rows"][0], found["rows"][-1]
    assert first["0 in float16, unscaled, %"] == 100 and first["0 in float16, 2^15, %"] < 10
    assert last["0 in float16, unscaled, %"] < 50
    assert first["rounds to 0, %"] > 99 and first["median, log2"] < -25
    assert sum(found["counts"]) > 0.99 * 128 * 928


def test_a_training_that_diverges_is_ended_and_told(tasks, capsys):
    scaling = day12.Scaling(2.0**60)  # inf in every gradient, and nobody looks
    task = tasks["residual"]
    longer = precision.Task(task.begin, lambda: task.batches().repeat(20), task.loss, task.score, task.layers, 80)
    found = precision.train(longer, "high", "mixed_float16", scaling, day12.scaled_step, lambda w, dw: None)
    assert not found["finite"] and found["score"] is None and found["steps"] == 21
    assert "over after 21 of 80" in capsys.readouterr().out
    (row,) = precision.table({"high": found})
    assert row["last training loss"] is None and row["validation"] is None


# --- the unit --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_refused(tmp_path):
    for words, says in (
        (["--precision", "mixed_float16"], "all precisions are compared"),
        (["--strategy", "mirrored:2"], "on one device"),
        (["--batch", "300"], "at most --train, which is 256"),
        (["--deep-batch", "300"], "at most --train"),
    ):
        with pytest.raises(core.InputError, match=says):
            day12.main(["--preset", "smoke", *words, "--runs", str(tmp_path)])


@pytest.mark.slow  # tests/test_units.py runs the smoke preset at every turn; this looks at what it says
def test_smoke_preset_end_to_end(tmp_path):
    record = day12.main(["--preset", "smoke", "--runs", str(tmp_path)])
    folder = tmp_path / "day12_mixed_precision" / "smoke-s0"
    saved = json.loads((folder / "result.json").read_text())
    assert list(saved["metrics"])[:3] == ["float16_minus_float32", "deep_loss_unscaled", "deep_loss_scaled"]
    assert saved["metrics"]["keras_scale_differs_in_steps"] == 0
    assert saved["precision"] == "all" and set(record["figures"]) == {
        f"{name}.png" for name in ("spacing", "underflow", "deep", "residual", "scale")
    }
    names = [row["arm"] for row in saved["tables"]["trained, deep"]]
    assert names == list(day12.arms(2)) and len(saved["history"]["deep, float32"]) == 4
    by_arm = {row["arm"]: row for row in saved["tables"]["trained, deep"]}
    assert by_arm["float16, dynamic"]["last scale"] > 2.0**15, "doubled every two good steps"
    assert saved["tables"]["speed"][0]["ms"] > 0
    assert keras.config.dtype_policy().name == "float32"
