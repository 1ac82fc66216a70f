"""What is compressed, with what data, how it is measured, and the command that does all of it."""

import dataclasses
import gzip
import io
import json
import os
import time

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from keras import layers

from compression import arms, benchmark, lite, measure, quantize, report, target
from compression import data as sets
from compression.training import Training, fit
from course import core
from course.core import experiment, export
from course.core.data import ImageSet
from serving import pipeline

SHAPE, LABELS = (16, 16, 1), ("cat", "dog", "owl")


def pictures(count, seed):
    """Noise uint8 [count, 16, 16, 1] with a light third, and which third it is."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count).astype("int32")
    x = rng.integers(0, 120, (count, *SHAPE), dtype=np.uint8)
    for i, third in enumerate(y):
        x[i, 5 * third : 5 * third + 5] += 60
    return x, y


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "thirds.npz"
    (x, y), (x_test, y_test) = pictures(600, 0), pictures(200, 1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test, labels=LABELS)
    return path


@pytest.fixture(scope="module")
def data(npz):
    return sets.load(str(npz))


@pytest.fixture(scope="module")
def model(data):
    keras.utils.set_random_seed(0)
    image = keras.Input(SHAPE, name="pixels")
    x = layers.Conv2D(8, 3, activation="relu")(layers.Rescaling(1 / 128, -1)(image))
    x = layers.Conv2D(8, 3, strides=2, activation="relu")(x)
    net = keras.Model(image, layers.Dense(3, name="logits")(layers.Flatten()(x)))
    fit(net, data, Training(epochs=2, batch=32, lr=0.05))
    return net


@pytest.fixture(scope="module")
def image_set(data):
    parts = (data.x_train, data.y_train, data.x_test, data.y_test)
    return ImageSet(*parts, LABELS, {"name": "thirds"})


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_named_set_keeps_its_test_part_and_gives_the_end_of_training_for_validation():
    whole = core.data.load("fashion_mnist_12k")
    found = sets.load("fashion_mnist_12k")
    np.testing.assert_array_equal(found.x_test, whole.x_test)
    np.testing.assert_array_equal(np.concatenate([found.x_train, found.x_val]), whole.x_train)
    np.testing.assert_array_equal(np.concatenate([found.y_train, found.y_val]), whole.y_train)
    assert (len(found.x_val), found.x_val.dtype, found.y_val.dtype) == (1000, np.uint8, np.int32)
    small, smaller = (sets.load("fashion_mnist_12k", limit=count) for count in (200, 100))
    np.testing.assert_array_equal(small.x_train[:100], smaller.x_train)
    assert np.bincount(smaller.y_train).tolist() == [10] * 10
    assert small.provenance["train"] == 200 and small.provenance["sha256"] == whole.provenance["sha256"]
    counts = {"train": len(found.x_train), "val": 1000, "test": len(found.x_test)}
    assert sets.of_set(whole).provenance.items() >= counts.items()
    few = sets.part(sets.part(sets.of_set(whole), "train", 300), "test", 70).provenance
    assert (few["train"], few["val"], few["test"]) == (300, 1000, 70)


def test_classes_are_numbered_as_the_model_has_them():
    names = [core.data.images.slug(label) for label in core.data.SETS["fashion_mnist_12k"].labels]
    plain = sets.load("fashion_mnist_12k")
    turned = sets.load("fashion_mnist_12k", labels=sorted(names))
    for part in ("train", "val", "test"):
        theirs, ours = getattr(turned, f"y_{part}"), getattr(plain, f"y_{part}")
        assert [turned.labels[i] for i in theirs[:50]] == [names[i] for i in ours[:50]]
    with pytest.raises(core.InputError, match="are not those of fashion_mnist_12k"):
        sets.load("fashion_mnist_12k", labels=["cat", "dog"])


def test_a_file_without_validation_gives_a_stratified_tenth(data, tmp_path):
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (540, 60, 200)
    assert data.labels == list(LABELS) and data.provenance["name"] == "thirds"
    together = np.sort(np.concatenate([data.x_train, data.x_val]).reshape(600, -1).sum(axis=1, dtype=int))
    np.testing.assert_array_equal(together, np.sort(pictures(600, 0)[0].reshape(600, -1).sum(axis=1, dtype=int)))
    own = dict(x_train=np.zeros((9, 2)), y_train=np.arange(9) % 2, x_val=np.ones((3, 2)), y_val=np.array([1, 0, 1]),
               x_test=np.zeros((4, 2)), y_test=np.arange(4) % 2)  # fmt: skip
    np.savez(tmp_path / "own.npz", **own)
    found = sets.load(str(tmp_path / "own.npz"))
    assert found.x_train.dtype == np.float32 and len(found.x_val) == 3 and found.labels == ["0", "1"]
    assert sets.load(str(tmp_path / "own.npz"), labels=["no", "yes", "maybe"]).labels == ["no", "yes", "maybe"]
    with pytest.raises(core.InputError, match="has 2 classes, the model 1"):
        sets.load(str(tmp_path / "own.npz"), labels=["no"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"y_test": None}, "has no y_test"),
        ({"y_train": np.array([0.5] * 20)}, r"class numbers are integers"),
        ({"x_train": np.full((20, 2), np.nan)}, "not finite"),
        ({"x_test": np.zeros((4, 3))}, "x_test .* does not fit"),
        ({"labels": np.array(["one"])}, "class 1 has no name"),
        ({"x_test": np.zeros((0, 2)), "y_test": np.zeros(0, int)}, "x_test is empty"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, changed, match):
    arrays = dict(
        x_train=np.zeros((20, 2)), y_train=np.arange(20) % 2, x_test=np.zeros((4, 2)), y_test=np.arange(4) % 2
    )
    arrays = {key: value for key, value in (arrays | changed).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(core.InputError, match=match):
        sets.load(str(tmp_path / "bad.npz"))


def test_a_folder_of_pictures_is_fitted_to_the_model(tmp_path, capsys):
    x, y = pictures(60, 2)
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        (tmp_path / LABELS[label]).mkdir(exist_ok=True)
        PIL.Image.fromarray(image[..., 0]).save(tmp_path / LABELS[label] / f"{i}.png")
    found = sets.load(str(tmp_path), shape=(8, 8, 1), labels=list(LABELS))
    assert found.x_train.shape[1:] == (8, 8, 1)
    assert sum(found.provenance[part] for part in ("train", "val", "test")) == 60
    with pytest.raises(core.InputError, match="input shape must be known"):
        sets.load(str(tmp_path))
    (tmp_path / "cat" / "torn.png").write_bytes(b"no picture")
    again = sets.load(str(tmp_path), shape=(8, 8, 1), labels=list(LABELS))
    np.testing.assert_array_equal(again.x_test, found.x_test)
    assert f"{tmp_path}: 1 files that cannot be decoded were left out" in capsys.readouterr().out.splitlines()


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closing", ["layer", "activation", "dense", "none", "dict"])
def test_a_closing_softmax_is_left_out(closing, tmp_path):
    keras.utils.set_random_seed(1)
    point = keras.Input((5,))
    logits = layers.Dense(3, name="last")(layers.Dense(4, "relu")(point))
    plain = keras.Model(point, logits)
    output = {
        "layer": lambda: layers.Softmax()(logits), "activation": lambda: layers.Activation("softmax")(logits),
        "dense": lambda: logits, "none": lambda: logits, "dict": lambda: {"scores": layers.Softmax()(logits)},
    }[closing]()  # fmt: skip
    net = keras.Model(point, output)
    if closing == "dense":
        net = keras.models.clone_model(plain)
        net.set_weights(plain.get_weights())
        net.get_layer("last").activation = keras.activations.softmax
    net.save(tmp_path / "net.keras")
    found = target.find(str(tmp_path / "net.keras"))
    x = np.random.default_rng(0).normal(size=(7, 5)).astype("float32")
    np.testing.assert_allclose(found.model.predict(x, verbose=0), plain.predict(x, verbose=0), atol=1e-6)
    assert (found.shape, found.layered, found.data, found.labels) == ((5,), True, "", None)


def test_an_export_carries_its_model_and_the_name_of_its_data(model, image_set, data, tmp_path):
    version = export.image_classifier(model, "thirds", image_set, tmp_path / "exports")
    assert version.parent == tmp_path / "exports" / "thirds"
    again = export.image_classifier(model, "thirds", image_set, tmp_path / "exports")
    assert int(again.name) > int(version.name)
    found = target.find(str(version.parent))
    assert (found.name, found.source, found.data, found.labels) == ("thirds", again, "thirds", list(LABELS))
    x = data.x_test[:9]
    np.testing.assert_allclose(found.model.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    served = tf.saved_model.load(str(version)).signatures["pixels"](pixels=tf.constant(x))["probabilities"]
    np.testing.assert_allclose(served, keras.ops.softmax(model.predict(x, verbose=0)), atol=1e-6)
    assert found.sha256() == target.find(str(version)).sha256()
    changed = dataclasses.replace(found, model=keras.models.clone_model(found.model))
    assert found.sha256() != changed.sha256()


def test_an_export_names_a_folder_of_data_by_its_whole_path(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "mnist"):  # a data set's name is its name, whatever lies here
        (tmp_path / name).mkdir()
    spec = tf.TensorSpec([None, *SHAPE], tf.uint8, name="pixels")
    signatures = {"pixels": (lambda pixels: {"logits": model(tf.cast(pixels, tf.float32))}, [spec])}
    sample = {"pixels": {"pixels": pictures(1, 0)[0]}}
    for i, (name, written) in enumerate((("pictures", str(tmp_path / "pictures")), ("mnist", "mnist")), 1):
        source = {"unit": "day25_vision_pipeline", "data": name}
        export.export(model, tmp_path / "net" / str(i), signatures, sample=sample, trained_on=source)
        assert target.find(str(tmp_path / "net" / str(i))).data == written


@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_scores_of_a_saved_model_are_logits(model, data, output, tmp_path):
    """Of probabilities the logarithm: their softmax is they."""
    spec = tf.TensorSpec([None, *SHAPE], tf.uint8, name="pixels")

    def call(pixels):
        logits = 3 * model(tf.cast(pixels, tf.float32))
        return {output: tf.nn.softmax(logits) if output == "probabilities" else logits}

    sample = {"pixels": {"pixels": data.x_test[:2]}}
    export.export(model, tmp_path / "1", {"pixels": (call, [spec])}, sample=sample)
    x, given = data.x_test[:50], target.opaque(tmp_path / "1").predict(data.x_test[:50], verbose=0)
    wanted = measure.softmax(3 * model.predict(x, verbose=0))
    np.testing.assert_allclose(measure.softmax(given), wanted, atol=1e-5)
    if output == "logits":
        np.testing.assert_allclose(given, 3 * model.predict(x, verbose=0), atol=1e-4)


def test_a_units_name_finds_its_newest_export_or_run(model, image_set, tmp_path):
    with pytest.raises(core.InputError, match="day04_cnn has neither an export nor a run"):
        target.find("day04_cnn", tmp_path / "exports", tmp_path / "runs")
    folder = tmp_path / "runs" / "day04_cnn" / "cpu-s0"
    folder.mkdir(parents=True)
    model.save(folder / "best.keras")
    (folder / "result.json").write_text(json.dumps({"data": {"name": "cifar10"}}))
    found = target.find("day04", tmp_path / "exports", tmp_path / "runs")
    assert (found.name, found.data, found.source) == ("day04_cnn", "cifar10", folder / "best.keras")
    model.save(folder / "second.keras")
    with pytest.raises(core.InputError, match=r"several models: name one of .*best.keras, .*second.keras"):
        target.find("day04_cnn", tmp_path / "exports", tmp_path / "runs")
    export.image_classifier(model, "day04_cnn", image_set, tmp_path / "exports")
    assert target.find("course.day04_cnn", tmp_path / "exports").data == "thirds"


def test_layers_of_a_unit_are_found_without_importing_it_first(tmp_path):
    config = '{"module": "course.day21_capsnet", "registered_name": "course.day21>DigitCapsules"}'
    assert target._modules(config) == {"course.day21_capsnet"}
    run_as_main = '{"module": "__main__", "registered_name": "course.day04>PatchConv2D"}'
    assert target._modules(run_as_main) == {"course.day04_cnn"}


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("nowhere.keras", "is not there"), ("broken.keras", "cannot be read as a Keras model"),
        ("empty", "holds no exported version"), ("two.keras", "2 inputs"), ("a/b", "neither a .keras file nor a"),
        ("lite", "holds a compressed file only"), ("no_such_unit", "no_such_unit"),
    ],
)  # fmt: skip
def test_what_is_no_classifier_is_one_line(what, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.keras").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lite" / "3").mkdir(parents=True)
    one, other = keras.Input((2,)), keras.Input((2,))
    keras.Model([one, other], layers.Dense(2)(layers.Add()([one, other]))).save(tmp_path / "two.keras")
    with pytest.raises(core.InputError, match=match):
        target.find(what)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_paired_difference_by_hand():
    reference = np.array([True] * 90 + [False] * 10)
    right = reference.copy()
    right[:8], right[90:92] = False, True  # 8 lost, 2 gained
    found = measure.paired(right, reference)
    assert (found["gained"], found["lost"]) == (2, 8)
    assert found["difference"] == pytest.approx(-0.06)
    # Agresti and Min: n = 102, cells 2.5 and 8.5
    middle, half = -6 / 102, 1.96 * np.sqrt(11 - 36 / 102) / 102
    np.testing.assert_allclose(found["difference_interval"], [middle - half, middle + half], rtol=1e-9)
    assert found["p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)  # of 10 tosses, 2 or fewer on one side
    same = measure.paired(reference, reference)
    assert same["p"] == 1 and same["difference"] == 0
    assert same["difference_interval"][0] < 0 < same["difference_interval"][1]


def test_size_and_zeros_are_the_files_own(tmp_path):
    point = keras.Input((8,))
    net = keras.Model(point, layers.Dense(6, use_bias=False)(layers.Dense(16, "relu")(point)))
    kernel, bias, last = net.get_weights()
    kernel[:, ::2] = 0  # a half of 128
    net.set_weights([kernel, bias, np.where(np.arange(96).reshape(16, 6) < 24, 0, last)])  # a quarter of 96
    for kind in ("float", "float16"):
        path = tmp_path / f"{kind}.tflite"
        path.write_bytes(lite.convert(net, kind))
        assert measure.sparsity(measure.weights(path)) == pytest.approx((64 + 24) / (128 + 96))
        assert sorted(w.size for w in measure.weights(path)) == [96, 128]
        content = path.read_bytes()
        assert measure.size(path) == {"bytes": len(content), "gzip": len(gzip.compress(content, 9, mtime=0))}


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_zeros_of_a_saved_model_are_those_of_its_layers(mode):
    point = keras.Input((9,))
    hidden = layers.Dense(16, "relu", name="hidden")(layers.Normalization(mean=np.zeros(9), variance=np.ones(9))(point))
    net = keras.Model(point, layers.Dense(4, name="logits")(layers.Reshape((16,))(hidden)))
    for name, gone in (("hidden", 5), ("logits", 3)):
        kernel = np.where(np.arange(net.get_layer(name).kernel.shape[0])[:, None] < gone, 0, 1.0)
        net.get_layer(name).kernel.assign(kernel * np.ones(net.get_layer(name).kernel.shape))
    if mode:
        net = quantize.weight_only(net, settings=quantize.WeightOnly(mode=mode))
    if mode == "int4":
        assert measure.sparsity(measure.stored(net)) is None  # its zeros are stored as other numbers
        return
    assert sorted(w.size for w in measure.stored(net)) == [64, 144]
    assert measure.sparsity(measure.stored(net)) == pytest.approx((5 * 16 + 3 * 4) / (144 + 64))


def test_huffmans_code_of_an_int8_file_by_hand(tmp_path):
    """One Dense layer of 8 x 16 whose weights are 1 and -1: a bit each, 16 bytes."""
    point = keras.Input((8,))
    net = keras.Model(point, layers.Dense(16)(point))
    net.set_weights([np.random.default_rng(0).choice([-1.0, 1.0], (8, 16)), np.ones(16)])
    path = tmp_path / "int8.tflite"
    path.write_bytes(lite.convert(net, "int8", np.eye(8), pixels=False))
    constants = list(measure.constants(path))
    ((array, scales),) = [pair for pair in constants if pair[0].dtype == np.int8]
    assert (array.shape, sorted(np.unique(array)), scales) == ((16, 8), [-127, 127], 16)
    (bias,) = [pair for pair in constants if pair[0].dtype == np.int32 and pair[0].size == 16]
    coded = 2 + 2 + 16  # two values of a byte, two lengths, 128 bits
    assert measure.huffman(path) == coded + 4 * 16 + bias[0].nbytes + 4 * bias[1]


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_what_xnnpack_runs_and_what_it_leaves(kind, tmp_path):
    """An operation is left where the interpreter itself holds its output: XNNPACK keeps what is between its own."""
    image = keras.Input(SHAPE)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(layers.Conv2D(4, 3)(image)))
    order = keras.ops.cast(keras.ops.argsort(x), "float32")  # TOPK_V2: XNNPACK has none
    path = tmp_path / f"{kind}.tflite"
    path.write_bytes(lite.convert(keras.Model(image, layers.Dense(3)(order)), kind, pictures(20, 0)[0]))
    found = measure.delegates(path)
    assert found["delegated"] + sum(found["left"].values()) == sum(found["ops"].values())
    assert found["left"].items() >= {("TOPK_V2", 1), ("CAST", 1)}
    assert not {"CONV_2D", "MEAN", "FULLY_CONNECTED", "DELEGATE"} & found["left"].keys()
    assert found["ops"]["CONV_2D"] == 2 and "DELEGATE" not in found["ops"]
    assert ("QUANTIZE" in found["left"]) == (kind == "int8")  # of uint8 pixels to int8
    runner, hidden = lite.interpreter(path.read_bytes()), 0
    runner.invoke()
    for entry in runner._get_ops_details():
        if entry["op_name"] == "CONV_2D":
            with pytest.raises(ValueError, match="Tensor data is null"):
                runner.get_tensor(entry["outputs"][0])
            hidden += 1
        if entry["op_name"] in ("TOPK_V2", "CAST"):
            assert runner.get_tensor(entry["outputs"][0]).size
    assert hidden == 2
    assert measure.delegates(tmp_path) is None


def test_memory_is_that_of_a_process_of_its_own(tmp_path):
    found = {}
    for units in (8, 1024):
        point = keras.Input((1024,))
        net = keras.Model(point, layers.Dense(2)(layers.Dense(units)(point)))
        (tmp_path / f"{units}.tflite").write_bytes(lite.convert(net, "float"))
        found[units] = measure.memory(tmp_path / f"{units}.tflite", (1024,))
    grown = found[1024]["own_mib"] - found[8]["own_mib"]
    assert 3 < grown < 20  # a matrix of 4 MiB, and XNNPACK's packed copy
    assert found[8]["peak_mib"] < 150  # no TensorFlow in it


def test_latencies_are_of_every_file_and_relative_to_the_first(tmp_path):
    files = {}
    for name, units in (("large", 2048), ("small", 4)):
        point = keras.Input((512,))
        net = keras.Model(point, layers.Dense(2)(layers.Dense(units)(point)))
        files[name] = tmp_path / f"{name}.tflite"
        files[name].write_bytes(lite.convert(net, "float"))
    found = measure.latencies(files, np.ones((1, 512), "float32"), rounds=4, calls=20, seed=0)
    for threads in (1, 2):
        assert found["large"][f"times_faster_{threads}"] == 1
        low, high = found["small"][f"times_faster_{threads}_range"]
        assert low <= found["small"][f"times_faster_{threads}"] <= high
    assert found["small"]["times_faster_1"] > 3  # a million products against two thousand
    for row in found.values():
        assert 0 < row["p50_ms_1"] <= row["p90_ms_1"] <= row["p95_ms_1"] <= row["p99_ms_1"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "net.keras"
    model.save(path)
    return path


QUICK = ["--rounds", "2", "--calls", "5", "--served-seconds", "0", "--epochs", "1", "--student-epochs", "1"]


@pytest.fixture(scope="module")
def finished(saved, npz, tmp_path_factory):
    """A run of some arms of every kind, one of which does not fit the model, and a copy of its record."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = ["int8", "pruned int8", "clustered", "clustered int8"]
    words = ["--preset", "full", "--data", str(npz), "--arms", *chosen, "--runs", str(folder), *QUICK]
    record = benchmark.main([str(saved), *words, "--record", str(folder / "copy.json")])
    return folder, record, {row["arm"]: row for row in record["tables"]["arms"]}


def test_the_record_says_what_each_file_saves_and_costs(finished, data, model):
    folder, record, rows = finished
    assert list(rows) == ["float", "int8", "pruned int8", "clustered", "clustered int8"]
    first = rows["float"]
    assert first["accuracy"] == pytest.approx(np.mean(model.predict(data.x_test, verbose=0).argmax(1) == data.y_test))
    assert first["parity"] < 1e-4 and first["agreement"] == 1  # float32 in another order
    assert first["difference"] == first["disagreement"] == 0 and first["times_smaller"] == 1
    for row in rows.values():
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["difference"] == pytest.approx(row["accuracy"] - first["accuracy"])
        assert row["times_smaller_gzip"] == pytest.approx(first["gzip"] / row["gzip"])
        assert {"p50_ms_1", "p95_ms_1", "p99_ms_2", "own_mib", "convert_seconds", "gate"} <= row.keys()
        assert row["xnnpack"]["delegated"] > 0 and row["xnnpack"]["ops"]["CONV_2D"] == 2
    assert rows["int8"]["bytes"] < first["bytes"]
    assert rows["pruned int8"]["sparsity"] > 0.7 and rows["pruned int8"]["train_seconds"] > 0
    assert {name for name, row in rows.items() if "huffman" in row} == {"clustered", "clustered int8"}
    assert rows["clustered"]["times_smaller_huffman"] > 5  # 16 values: four bits of 32, and the biases
    assert 4 < rows["clustered int8"]["times_smaller_huffman"] < rows["clustered"]["times_smaller_huffman"]
    assert record["command"].startswith("python -m compression.benchmark ")
    assert {"hardware", "versions", "seconds", "commit"} <= record.keys()
    assert record["target"]["name"] == "net" and len(record["target"]["sha256"]) == 64
    assert [len(record["load"][when]) for when in ("before", "after")] == [3, 3]
    saved = json.loads((folder / "copy.json").read_text())
    assert [row["arm"] for row in saved["tables"]["arms"]] == list(rows)
    (figures,) = folder.rglob("figures")
    assert {path.name for path in figures.iterdir()} == {"pareto_size.png", "pareto_time.png"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("float", lambda y: y + 0.002 * np.abs(y).max(), "differs from its Keras model by"),
        ("saved", lambda y: y + 0.002 * np.abs(y).max(), "differs from its Keras model by"),
        ("float16", lambda y: np.roll(y, 1, axis=1), "decides as its Keras model on .* of the inputs: 99 % are needed"),
        ("", lambda y: np.full_like(y, np.nan), "gives NaN or infinity"),
        ("float", lambda y: y + 0.0005 * np.abs(y).max(), None),
        ("float16", lambda y: np.concatenate([np.roll(y[:1], 1, axis=1), y[1:]]), None),  # one in 200
        ("int8", lambda y: np.roll(y, 1, axis=1), None),  # rounds: recorded, and the gate judges it
    ],
)
def test_a_file_that_is_not_its_source_is_refused(kind, change, message, model, data, monkeypatch, tmp_path):
    answers = model.predict(data.x_test, verbose=0)
    path = tmp_path / f"{kind}.tflite"
    monkeypatch.setattr(measure, "predict", lambda path, inputs: change(answers))
    if message:
        with pytest.raises(RuntimeError, match=f"{path} {message}"):
            lite.parity(path, model, data.x_test, kind)
        return
    found = lite.parity(path, model, data.x_test, kind)
    assert found["max_difference"] == pytest.approx(np.abs(change(answers) - answers).max(), abs=1e-5)
    assert found["agreement"] == pytest.approx(np.mean(change(answers).argmax(1) == answers.argmax(1)))


def test_every_file_answers_as_its_keras_model_does(finished):
    _, _, rows = finished
    for name, row in rows.items():
        assert row["agreement"] >= (0.99 if row["kind"] in ("float", "saved") else 0.9), name


def bare_run(folder):
    """What `compare` and `build` use of a run: a folder, and answers that are kept."""
    return experiment.Run(folder, {"figures": []}, strategy=None)


@pytest.fixture(scope="module")
def degraded(model, tmp_path_factory):
    """A run with two files: the model's own, and one whose weights are the model's and noise."""
    folder = tmp_path_factory.mktemp("degraded")
    worse, rng = keras.models.clone_model(model), np.random.default_rng(0)
    worse.set_weights([w + rng.normal(0, 3 * w.std(), w.shape) for w in model.get_weights()])
    (folder / "files").mkdir()
    rows = {}
    for name, net in (("float", model), ("noisy", worse)):
        (folder / "files" / f"{name}.tflite").write_bytes(lite.convert(net, "float"))
        rows[name] = {"arm": name, "file": f"{name}.tflite"}
    return folder, rows, worse


@pytest.mark.parametrize(("allowed", "verdict"), [(0.01, "NOT_BLESSED"), (1.0, "BLESSED")])
def test_the_gate_is_the_pipelines(degraded, model, data, allowed, verdict):
    """A file that loses more than the limit is not blessed, whatever it saves."""
    folder, rows, worse = degraded
    rows = {name: dict(row) for name, row in rows.items()}
    benchmark.compare(bare_run(folder), data, benchmark.Config(max_drop=allowed, max_slice_drop=allowed), rows)
    ours, theirs = (net.predict(data.x_test, verbose=0).argmax(axis=1) for net in (worse, model))
    right = [np.mean(guess == data.y_test) for guess in (ours, theirs)]
    assert right[0] < right[1] - 0.05
    assert rows["noisy"]["accuracy"] == pytest.approx(right[0])
    assert rows["noisy"]["difference"] == pytest.approx(right[0] - right[1])
    assert rows["noisy"]["disagreement"] == pytest.approx(np.mean(ours != theirs))
    assert (rows["noisy"]["gate"], rows["float"]["gate"]) == (verdict, "BLESSED")
    reasons = rows["noisy"]["reasons"]
    assert (reasons == []) == (verdict == "BLESSED") and all("is allowed" in line for line in reasons[:1])


def test_classes_in_another_order_are_noticed(model, data, saved, npz, tmp_path):
    benchmark.check_numbering(model, data)
    flat = keras.Sequential([keras.Input(SHAPE), layers.Flatten(), layers.Dense(3, kernel_initializer="zeros")])
    benchmark.check_numbering(flat, data)  # knows nothing: no order is better by much
    turned = dataclasses.replace(data, y_test=(data.y_test + 1) % 3)
    with pytest.raises(core.InputError, match=r"\d % of the answers are right, and \d+ % would be .* another order"):
        benchmark.check_numbering(model, turned)
    held = dict(np.load(npz))
    np.savez(tmp_path / "turned.npz", **held | {"y_test": (held["y_test"] + 1) % 3})
    with pytest.raises(core.InputError, match="another order"):  # before a folder is made for the run
        benchmark.main([str(saved), "--data", str(tmp_path / "turned.npz"), "--runs", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


# --- arms that cannot be made ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("sparsity", 1.0), ("filters", 1.0), ("filters", -0.1), ("shift", 1.5), ("clusters", 1), ("clusters", 300),
        ("temperature", 0.0), ("width", 0.0), ("width", 1.5), ("epochs", -1), ("rounds", 0), ("lr", float("nan")),
        ("max_drop", 2.0),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_before_anything_is_made(setting, value, saved, npz, tmp_path):
    cfg = dataclasses.replace(benchmark.Config(), **{setting: value})
    with pytest.raises(core.InputError, match=f"{setting} is {value}: give a"):
        benchmark.benchmark(None, None, None, cfg, ["int8"])
    if setting == "temperature":
        with pytest.raises(core.InputError, match=r"temperature is 0.0: give a number above 0"):
            benchmark.main([str(saved), "--temperature", "0", "--data", str(npz), "--runs", str(tmp_path)])
        assert not list(tmp_path.iterdir())


def test_every_number_of_the_settings_has_its_limits():
    numbers = {field.name for field in dataclasses.fields(benchmark.Config) if field.type in (int, float)} - {"seed"}
    listed = [name for names, _, _ in benchmark.LIMITS for name in names]
    assert sorted(listed) == sorted(numbers)
    benchmark.check_settings(benchmark.Config())


def test_a_failure_is_tried_again_and_ends_the_command_with_status_1(saved, npz, tmp_path, monkeypatch, capsys):
    """What does not fit the model is a row; so is what fails a check of its own, but the command says so, and the run
    that goes on tries both again."""
    tried = []

    def broken(*given):
        tried.append("prune")
        raise RuntimeError("masks were not held")

    def misfit(*given):
        tried.append("cluster")
        raise core.InputError("nothing to cluster")

    monkeypatch.setitem(arms.TECHNIQUES, "prune", broken)
    monkeypatch.setitem(arms.TECHNIQUES, "cluster", misfit)
    words = [str(saved), "--preset", "full", "--data", str(npz), "--runs", str(tmp_path), *QUICK]
    words += ["--arms", "pruned", "clustered", "float16"]
    with monkeypatch.context() as patch:
        patch.setattr(measure, "latencies", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(words)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(words)
    assert exit.value.code == 1 and tried == 2 * ["prune", "cluster"]
    out, err = capsys.readouterr()
    assert "pruned: failed: RuntimeError: masks were not held" in err.splitlines() and "clustered" not in err
    assert "clustered: not made: nothing to cluster" in out and "one input, milliseconds" in out
    (path,) = tmp_path.rglob("result.json")  # the others are worth having
    record = json.loads(path.read_text())
    rows = {row["arm"]: row for row in record["tables"]["arms"]}
    assert rows["clustered"]["why"] == "nothing to cluster" and rows["float16"]["agreement"] >= 0.99
    assert report.conclude([rows["clustered"], rows["float16"]]) is None


def test_the_original_must_be_what_it_was_made_from(saved, npz, tmp_path, monkeypatch):
    predict = lite.predict
    monkeypatch.setattr(lite, "predict", lambda content, inputs, **how: predict(content, inputs, **how) + 0.5)
    with pytest.raises(RuntimeError, match=r"float.tflite differs from its Keras model by 0.5, whose largest output"):
        benchmark.main([str(saved), "--data", str(npz), "--arms", "float16", "--runs", str(tmp_path), *QUICK])


def test_what_litert_has_no_operation_for_is_one_line(npz, tmp_path):
    image = keras.Input(SHAPE)
    values = layers.Flatten()(keras.ops.svd(keras.ops.squeeze(image, -1), compute_uv=False))
    keras.Model(image, layers.Dense(3)(values)).save(tmp_path / "svd.keras")
    words = ["--data", str(npz), "--arms", "float16", "--runs", str(tmp_path / "runs"), *QUICK]
    with pytest.raises(core.InputError, match=r"cannot be converted to LiteRT: LiteRT's converter refuses it: .*Svd"):
        benchmark.main([str(tmp_path / "svd.keras"), *words])


def test_the_seconds_of_training_are_those_of_all_sittings(tmp_path):
    """Of an interrupted sitting up to its last checkpoint: what came after is done again."""
    folder = tmp_path / "checkpoints"
    assert benchmark.earlier(folder) == 0
    began = json.loads((folder / "sittings.json").read_text())["began"]
    (folder / "round-0").mkdir()
    for name, seconds in (("round-0/state.npz", 5), ("state.npz", 20)):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (began + seconds, began + seconds))
    assert benchmark.earlier(folder) == pytest.approx(20, abs=0.01)
    note = json.loads((folder / "sittings.json").read_text())
    assert note["seconds"] == pytest.approx(20, abs=0.01) and note["began"] >= began
    for name, seconds in (("round-0/state.npz", -9), ("state.npz", 3)):
        os.utime(folder / name, (note["began"] + seconds, note["began"] + seconds))
    assert benchmark.earlier(folder) == pytest.approx(23, abs=0.01)
    for name in ("round-0/state.npz", "state.npz"):
        os.utime(folder / name, (began - 9, began - 9))  # nothing was saved in that sitting
    assert benchmark.earlier(folder) == pytest.approx(23, abs=0.01)


def test_build_adds_the_sittings_before(model, data, tmp_path, monkeypatch):
    def killed(net, data, cfg, checkpoint):
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "state.npz").write_bytes(b"")
        later = time.time() + 50
        os.utime(checkpoint / "state.npz", (later, later))
        raise KeyboardInterrupt

    what, run = target.Target("net", model, True, "thirds", list(LABELS), tmp_path), bare_run(tmp_path)
    monkeypatch.setitem(arms.TECHNIQUES, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark.build(run, what, data, benchmark.Config(), ("prune",))
    monkeypatch.setitem(arms.TECHNIQUES, "prune", lambda net, *_: net)
    made = benchmark.build(run, what, data, benchmark.Config(), ("prune",))
    assert 49 < made["train_seconds"] < 55
    monkeypatch.setitem(arms.TECHNIQUES, "cluster", lambda net, *_: net)
    assert 49 < benchmark.build(run, what, data, benchmark.Config(), ("prune", "cluster"))["train_seconds"] < 60


# --- what is made of the rows ----------------------------------------------------------------------------------------


def rows_of(**changed):
    """Rows by hand that meet every target, but for what is `changed`: arm -> figures, or None: not asked for."""
    plain = {"difference": 0.0, "times_faster_1": 1.0, "times_smaller_gzip": 1.0, "times_smaller": 1.0, "gzip": 1000,
             "bytes": 1100, "accuracy": 0.9, "p50_ms_1": 0.5, "gate": "BLESSED"}  # fmt: skip
    met = {
        "float": {},
        "int8": {"times_smaller": 3.8, "times_faster_1": 2.0, "difference": -0.005, "gzip": 250},
        "pruned clustered int8": {"times_smaller_gzip": 10.0, "difference": -0.0099, "gzip": 100},
        "student": {"times_faster_1": 5.0, "difference": 0.002, "gzip": 300},
    }
    changed = {name.replace("_", " "): figures for name, figures in changed.items()}
    return {arm: {"arm": arm} | plain | figures | changed.get(arm, {}) for arm, figures in met.items()
            if changed.get(arm, {}) is not None}  # fmt: skip


def verdicts(rows, data=report.TARGETED):
    return {(row["arm"], row["what"]): row["met"] for row in report.judged(rows, data)}


def test_targets_are_judged_by_their_bounds_and_the_points_lost():
    first, second, third, fourth = [(arm, what) for arm, what, *_ in report.TARGETS]
    assert verdicts(rows_of()) == {first: True, second: True, third: True, fourth: True}
    assert not verdicts(rows_of(int8={"times_smaller": 3.79}))[first]
    assert verdicts(rows_of(int8={"times_smaller": 3.79}))[second]
    lost = verdicts(rows_of(int8={"difference": -0.0051}))  # 0.51 points where 0.5 are allowed
    assert not lost[first] and not lost[second] and lost[third]
    assert verdicts(rows_of(int8={"difference": 0.02}))[first]  # gained, not lost
    assert not verdicts(rows_of(student={"times_faster_1": 4.9}))[fourth]
    found = report.judged(rows_of(), report.TARGETED)[0]
    assert (found["value"], found["bound"], found["allowed"]) == (3.8, 3.8, -0.5)
    assert found["points"] == pytest.approx(-0.5)


def test_targets_are_of_the_data_they_were_set_for_and_of_arms_asked_for(capsys):
    assert report.judged(rows_of(), "fashion_mnist") == []
    assert [arm for arm, _ in verdicts(rows_of(int8=None))] == ["pruned clustered int8", "student"]
    rows = rows_of()
    rows["student"] = {"arm": "student", "why": "no layers"}
    missing = report.judged(rows, report.TARGETED)[-1]
    assert (missing["value"], missing["met"], missing["why"]) == (None, False, "no layers")
    report.show([], [missing])
    last = [line for line in capsys.readouterr().out.splitlines() if "student" in line][-1]
    assert "not made" in last and "MISSED" in last
    assert "not made" in report._target(missing) and report._target(missing).endswith("| **missed** |")


def test_blessed_is_both_verdicts():
    row = {"gate": "BLESSED"}
    assert report.blessed(row) and report.blessed(row | {"infra": "INFRA_BLESSED"})
    assert not report.blessed(row | {"infra": "INFRA_NOT_BLESSED"})
    assert not report.blessed({"gate": "NOT_BLESSED", "infra": "INFRA_BLESSED"})


def test_the_headline_is_of_files_that_pass_the_gate():
    found = report.headline(rows_of())
    assert (found["accuracy"], found["bytes"], found["p50_ms"]) == (0.9, 1100, 0.5)
    assert (found["smallest_times_smaller_gzip"], found["smallest_difference"]) == (10.0, -0.0099)
    assert (found["fastest_times_faster_1"], found["fastest_difference"]) == (5.0, 0.002)
    refused = {"gate": "NOT_BLESSED"}
    found = report.headline(rows_of(pruned_clustered_int8=refused, student={"infra": "INFRA_NOT_BLESSED"}))
    assert found["smallest_difference"] == found["fastest_difference"] == -0.005  # int8
    none = rows_of(float=refused, int8=refused, student=refused, pruned_clustered_int8=refused)
    assert report.headline(none)["smallest_difference"] == 0  # the original


def test_a_busy_machine_is_named():
    assert report.busy(None) == report.busy({"before": [1.5, 9, 9], "after": [8, 8, 8]}) == ""
    assert "its load 1.6 beforehand" in report.busy({"before": [1.6, 0, 0], "after": [0, 0, 0]})


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy network of four observations and two actions, exported with the states that it is judged by."""
    base = tmp_path_factory.mktemp("exports") / "policy"
    keras.utils.set_random_seed(0)
    state = keras.Input((4,), name="state")
    net = keras.Model(state, layers.Dense(2, name="logits")(layers.Dense(32, "relu")(state)))
    states = np.random.default_rng(0).normal(0, 2, (500, 4)).astype("float32")
    actions = net.predict(states, verbose=0).argmax(axis=1)
    content = io.BytesIO()
    np.savez(content, x_train=states[:300], y_train=actions[:300], x_test=states[300:], y_test=actions[300:],
             labels=["left", "right"])  # fmt: skip
    spec = tf.TensorSpec([None, 4], tf.float32, name="state")
    source = {"unit": "day16_policy", "data": "./states.npz"}
    export.export(net, base / "1", {"serving_default": (lambda s: {"logits": net(s)}, [spec])},
                  sample={"serving_default": {"state": states[:1]}}, labels=["left", "right"],
                  extra={"states.npz": content.getvalue()}, trained_on=source)  # fmt: skip
    return base


def test_an_interrupted_run_goes_on_arm_by_arm(policy, tmp_path, monkeypatch, capsys):
    words = [str(policy), "--arms", "float", "int8", "--runs", str(tmp_path), *QUICK]
    made, converting = [], lite.convert

    def convert(model, kind, *rest, **options):
        made.append(kind)
        if made == ["float", "int8"]:
            raise KeyboardInterrupt
        return converting(model, kind, *rest, **options)

    monkeypatch.setattr(lite, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(words)
    record = benchmark.main(words)
    assert made == ["float", "int8", "int8"]
    assert "going on with the interrupted run" in capsys.readouterr().out
    first, small = record["tables"]["arms"]
    assert first["accuracy"] == 1 and record["data"]["name"] == "states"  # the labels are its own decisions
    assert small["disagreement"] < 0.1 and small["disagreement"] == pytest.approx(1 - small["accuracy"])
    (path,) = tmp_path.rglob("int8.tflite")  # its inputs are no pixels: it takes them as they are
    assert lite.interpreter(path.read_bytes()).get_input_details()[0]["dtype"] == np.float32


def test_a_saved_model_alone_is_converted_but_not_trained_on(model, data, npz, tmp_path, capsys):
    folder = tmp_path / "bare" / "1"
    spec = tf.TensorSpec([None, *SHAPE], tf.uint8, name="pixels")

    def call(pixels):
        probabilities = tf.nn.softmax(model(tf.cast(pixels, tf.float32)))
        return {"label": tf.gather(LABELS, tf.argmax(probabilities, axis=1)), "probabilities": probabilities}

    sample = {"pixels": {"pixels": data.x_test[:2]}}
    export.export(model, folder, {"pixels": (call, [spec])}, sample=sample, labels=LABELS)
    words = ["--preset", "full", "--data", str(npz), "--arms", "float16", "pruned", "--runs", str(tmp_path / "runs")]
    record = benchmark.main([str(folder), *words, *QUICK])
    rows = {row["arm"]: row for row in record["tables"]["arms"]}
    assert "a SavedModel without its Keras model" in rows["pruned"]["why"]
    assert rows["float16"]["agreement"] > 0.99 and rows["float"]["parity"] < 1e-5
    model.export(tmp_path / "saved", verbose=False)
    answers = measure.predict(tmp_path / "saved", data.x_test[:300])
    np.testing.assert_allclose(answers, model.predict(data.x_test[:300], verbose=0), atol=1e-5)
    assert measure.size(tmp_path / "saved")["bytes"] > 4 * model.count_params()
    assert "pruned: not made: " in capsys.readouterr().out


def test_served_files_answer_and_are_timed(finished, data, tmp_path):
    folder, _, rows = finished
    (files,) = folder.rglob("files")
    paths = {name: files / rows[name]["file"] for name in ("float", "int8")}
    made = measure.versions(paths, tmp_path, data.x_test[:1], data.labels)
    found = measure.served(made, data.x_test[:1], rounds=1, seconds=0.2, seed=0)
    assert list(found) == ["float", "int8"]
    for row in found.values():
        assert 0 < row["served_p50_ms"] <= row["served_p95_ms"] <= row["served_p99_ms"]


def test_of_several_versions_the_one_that_fails_is_named(monkeypatch):
    def validate(candidates):
        reasons = ["bad: answers differently"] if "bad" in candidates else []
        return {"verdict": "INFRA_NOT_BLESSED" if reasons else "INFRA_BLESSED", "reasons": reasons, "says": ""}

    monkeypatch.setattr(pipeline, "infra_validate", validate)
    found = measure.infra_validate({"good": "a/1", "bad": "b/1"})
    assert found["good"] == {"verdict": "INFRA_BLESSED", "reasons": []}
    assert found["bad"] == {"verdict": "INFRA_NOT_BLESSED", "reasons": ["bad: answers differently"]}


@pytest.mark.slow
def test_every_arm_runs_from_end_to_end(saved, npz, tmp_path):
    """All, trained for an epoch and served; what a model of two narrow convolutions has no layers for says so."""
    words = [str(saved), "--preset", "full", "--data", str(npz), "--runs", str(tmp_path), *QUICK]
    record = benchmark.main([*words, "--served-seconds", "0.1"])
    rows = {row["arm"]: row for row in record["tables"]["arms"]}
    assert list(rows) == list(arms.ARMS)
    made = {name: row for name, row in rows.items() if "why" not in row}
    assert {name for name in rows if name not in made} == {"filters", "filters int8"}
    assert "no layer has filters to spare" in rows["filters"]["why"]
    for name, row in made.items():
        assert row["infra"] == "INFRA_BLESSED" and row["served_p50_ms"] > 0, name
        assert row["agreement"] >= (0.99 if row["kind"] in ("float", "saved") else 0.9), name
    assert rows["student"]["params"] < rows["float"]["params"]
    assert 0 <= rows["weights int8"]["sparsity"] < 0.5 and rows["weights int8"]["xnnpack"] is None  # a SavedModel


def test_every_arm_is_made_of_known_techniques():
    for name, arm in arms.ARMS.items():
        assert set(arm.steps) <= set(arms.TECHNIQUES), name
        assert arm.kind in (*lite.KINDS, arms.SAVED)
    stems = [benchmark.stem(name) for name in arms.ARMS]
    assert len(set(stems)) == len(stems)
    assert set(benchmark.PRESETS["quick"]["arms"]) == set(arms.POST_TRAINING)
    assert {arm for arm, *_ in report.TARGETS} <= set(arms.ARMS)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "say what to compress"), (["MODEL", "--arms", "int9"], "there is no int9"),
        (["MODEL", "--data", "no_such"], "no data set is called"), (["MODEL"], "give --data"),
        (["MODEL", "--data", "fashion_mnist_12k"], r"takes \[16, 16, 1\], the data is \[28, 28, 1\]"),
        (["MODEL", "--preset", "huge"], "--preset huge is not known"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(words, match, saved, tmp_path):
    words = [str(saved) if word == "MODEL" else word for word in words]
    with pytest.raises(core.InputError, match=match):
        benchmark.main([*words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_terminal_shows_every_arm(finished, capsys):
    _, record, _ = finished
    made = record["tables"]["arms"]
    report.show([*made, {"arm": "2:4", "why": "too narrow"}], record["targets"])
    text = capsys.readouterr().out
    by_size, by_making = text.partition("not on XNNPACK")[0].partition("size; how")[2].partition("agreement with")[::2]
    for row in made:
        size, *_ = [line.split() for line in by_size.splitlines() if line.strip().startswith(row["arm"] + "  ")]
        if "huffman" in row:
            assert f"{row['times_smaller_huffman']:.2f}" in size
        (last,) = [line.split() for line in by_making.splitlines() if line.strip().startswith(row["arm"] + "  ")]
        assert last[-1] == f"{row['xnnpack']['delegated']}/{sum(row['xnnpack']['ops'].values())}"
    assert "not on XNNPACK: " in text and "2:4: not made: too narrow" in text
    assert "…" not in text


MARKED = "a\n<!-- results:begin -->\n{}\n<!-- results:end -->\nb\n"


def test_a_record_is_a_table_of_the_readme(finished, tmp_path):
    _, record, rows = finished
    text = MARKED.format("old")
    assert report.readme_text(text, tmp_path) == MARKED.format("Nothing is recorded yet.")
    (tmp_path / "net.json").write_text(json.dumps(record))
    shown = report.readme_text(text, tmp_path)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in shown.splitlines() if line.startswith("| ")}
    assert list(lines) == ["arm", "float", "int8", "pruned int8", "clustered"]  # of those in report.SHOWN
    assert f"| {100 * rows['int8']['accuracy']:.2f} | " in lines["int8"] and "target" not in lines
    assert report.readme_text(shown, tmp_path) == shown
    assert record["targets"] == []
    record = record | {"targets": report.judged(rows_of(int8={"difference": -0.02}), report.TARGETED)[:1]}
    record |= {"load": {"before": [2.25, 1, 1], "after": [1, 1, 1]}}
    shown = report.markdown([record])
    assert shown.splitlines()[-1].endswith("| **missed** |") and "its load 2.2 beforehand" in shown
    with pytest.raises(core.InputError, match=r"compression/README\.md has no lines"):
        report.readme_text("a b", tmp_path)


def test_readme_check_tells_drift(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    (tmp_path / "README.md").write_text(MARKED.format("old"))
    with pytest.raises(SystemExit) as exit:
        report.main(["readme", "--check"])
    assert exit.value.code == 1
    report.main(["readme"])
    report.main(["readme", "--check"])
    assert capsys.readouterr().out.splitlines() == [
        "compression/README.md is stale: run python -m compression.report readme", "compression/README.md written"
    ]  # fmt: skip


def test_the_readme_is_not_stale():
    text = (report.FOLDER / "README.md").read_text()
    assert report.readme_text(text) == text, "run python -m compression.report readme"


def test_the_arms_of_the_readme_are_there():
    assert set(report.SHOWN) <= set(arms.ARMS)
