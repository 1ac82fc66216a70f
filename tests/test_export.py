"""From a Keras model to what is served: the SavedModel's signatures, and the LiteRT files."""

import base64
import io
import json

import keras
import numpy as np
import PIL.Image
import pytest
import tensorflow as tf

from compression import lite
from course.core import export, runtime
from models.convnets import small_resnet

LABELS = ["cat", "dog", "owl"]
SHAPE = (16, 16, 1)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return small_resnet(SHAPE, len(LABELS), 4, mean=[100.0], variance=[900.0])


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, *SHAPE), dtype=np.uint8)


def png(image):
    return tf.io.encode_png(image).numpy()


@pytest.fixture(scope="module")
def version(model, pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "pets" / "17"
    sample = {"serving_default": {"image_bytes": np.array([png(pixels[0]), png(pixels[1])], object)},
              "pixels": {"pixels": pixels[:2]}}  # fmt: skip
    signatures = export.image_signatures(model, SHAPE, LABELS)
    export.export(model, folder, signatures, sample=sample, labels=LABELS, extra={"note.txt": "n"})
    return folder


def test_the_exported_signatures_answer_as_the_model_does(version, model, pixels):
    loaded = tf.saved_model.load(str(version))
    assert set(loaded.signatures) >= {"serving_default", "pixels", "classes"}
    expected = keras.ops.softmax(model.predict(pixels.astype("float32"), verbose=0)).numpy()
    by_pixels = loaded.signatures["pixels"](pixels=tf.constant(pixels))
    np.testing.assert_allclose(by_pixels["probabilities"], expected, atol=1e-6)
    files = tf.constant([png(image) for image in pixels])
    by_file = loaded.signatures["serving_default"](image_bytes=files)
    np.testing.assert_allclose(by_file["probabilities"], expected, atol=1e-6)  # PNG is lossless: the same pixels
    winners = [LABELS[i] for i in expected.argmax(axis=1)]
    assert [label.decode() for label in by_file["label"].numpy()] == winners
    np.testing.assert_allclose(by_file["score"], expected.max(axis=1), atol=1e-6)
    names = loaded.signatures["classes"](index=tf.constant([2, 0], tf.int64))["label"].numpy()
    assert names.tolist() == [b"owl", b"cat"]


def test_the_samples_are_a_rest_request_and_its_answer(version, model, pixels):
    request, response = (json.loads((version / "assets.extra" / f"sample_{name}.json").read_text())
                         for name in ("request", "response"))  # fmt: skip
    assert request["signature_name"] == "serving_default"
    assert base64.b64decode(request["instances"][0]["b64"]) == png(pixels[0])
    logits = model.predict(pixels[:2].astype("float32"), verbose=0)
    for row, expected in zip(response["predictions"], keras.ops.softmax(logits).numpy(), strict=True):
        np.testing.assert_allclose(row["probabilities"], expected, atol=1e-6)
        assert row["label"] == LABELS[expected.argmax()]
    assert (version / "assets.extra" / "labels.txt").read_text().splitlines() == LABELS
    assert (version / "assets.extra" / "note.txt").read_text() == "n"


def test_the_warm_up_file_holds_a_predict_request_a_signature(version):
    from tensorflow_serving.apis import prediction_log_pb2

    records = tf.data.TFRecordDataset(str(version / "assets.extra" / export.WARMUP)).as_numpy_iterator()
    calls = [prediction_log_pb2.PredictionLog.FromString(record).predict_log.request for record in records]
    assert [(call.model_spec.name, call.model_spec.signature_name) for call in calls] == [
        ("pets", "serving_default"), ("pets", "pixels")
    ]  # fmt: skip
    assert tf.make_ndarray(calls[1].inputs["pixels"]).shape == (2, *SHAPE)


def test_an_export_that_fails_leaves_nothing(model, tmp_path):
    broken = {"serving_default": (lambda x: {"y": 1 / 0}, [tf.TensorSpec([None], tf.string)])}
    with pytest.raises(ZeroDivisionError):
        export.export(model, tmp_path / "m" / "1", broken, sample={})
    assert not list(tmp_path.rglob("*.pb"))


@pytest.mark.parametrize("encode", [tf.io.encode_png, tf.io.encode_jpeg])
def test_a_picture_of_another_size_is_fitted_whole_and_centred_on_black(encode):
    wide = np.full((10, 40, 3), 200, np.uint8)
    fitted = export.decode_image(encode(wide), (20, 20, 3)).numpy()
    assert fitted.shape == (20, 20, 3)
    filled = np.flatnonzero(fitted[:, 10, 0] > 100)
    assert filled.tolist() == [8, 9, 10, 11, 12] or filled.tolist() == [7, 8, 9, 10, 11]  # 40 x 10 becomes 20 x 5
    assert not fitted[0].any() and not fitted[-1].any()


def test_a_picture_of_the_right_size_is_untouched(pixels):
    np.testing.assert_array_equal(export.decode_image(png(pixels[0]), SHAPE), pixels[0])
    every_grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(export.decode_image(png(every_grey), SHAPE), every_grey)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_kind_of_file_that_ingest_takes_is_decoded(kind, mode, channels):
    stored = io.BytesIO()
    PIL.Image.new(mode, (16, 16), 200 if mode == "L" else (200, 200, 200)).save(stored, kind)
    decoded = export.decode_image(stored.getvalue(), (16, 16, channels)).numpy()
    assert decoded.shape == (16, 16, channels)
    assert np.abs(decoded.astype(int) - 200).max() <= 2  # JPEG and GIF are not exact


def test_a_model_trained_in_16_bits_is_exported_in_32(pixels):
    with runtime.policy("mixed_float16"):
        trained = small_resnet(SHAPE, 3, 4, mean=[100.0], variance=[900.0])
    copy = export.in_float32(trained)
    assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
    x = pixels[:8].astype("float32")
    np.testing.assert_allclose(
        copy.predict(x, verbose=0), trained.predict(x, verbose=0), atol=0.05
    )  # float16's 11 bits
    assert lite.parity(lite.convert(copy, "float"), copy, x)["agreement"] == 1


# --- LiteRT ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named(model):
    return keras.Model(model.input, {"probabilities": keras.layers.Softmax()(model.output)})


@pytest.fixture(scope="module")
def converted(named, pixels):
    return {kind: lite.convert(named, kind, pixels) for kind in lite.KINDS}


# float: the same arithmetic in another order; float16: 11 bits of mantissa; int8: 8 bits of weight and activation
@pytest.mark.parametrize(("kind", "tolerance"), [("float", 1e-5), ("float16", 5e-3), ("dynamic", 0.05), ("int8", 0.1)])
def test_every_kind_answers_like_its_source(converted, named, pixels, kind, tolerance):
    found = lite.parity(converted[kind], named, pixels.astype("float32"))
    assert found["max_difference"] < tolerance
    assert found["agreement"] >= (1.0 if kind == "float" else 0.85)


def test_quantised_files_are_smaller_and_full_int8_takes_bytes(converted, named):
    assert len(converted["int8"]) < len(converted["float"])
    assert len(converted["float16"]) < len(converted["float"])
    entry = lite.interpreter(converted["int8"]).get_input_details()[0]
    assert entry["dtype"] == np.uint8
    assert entry["quantization"] == (1.0, 0)  # a pixel is its own quantised value
    narrow = np.random.default_rng(1).integers(30, 180, (40, *SHAPE), dtype=np.uint8)  # dull pictures: no 0, no 255
    dull = lite.convert(named, "int8", narrow)
    assert lite.interpreter(dull).get_input_details()[0]["quantization"] == (1.0, 0)
    signature = lite.interpreter(converted["int8"]).get_signature_list()["serving_default"]
    assert signature == {"inputs": ["pixels"], "outputs": ["probabilities"]}


def test_a_conversion_that_lost_its_weights_is_an_error(named, pixels, monkeypatch):
    monkeypatch.setattr(lite, "predict", lambda content, inputs: np.full((len(inputs), 3), np.nan))
    with pytest.raises(RuntimeError, match="NaN"):
        lite.parity(b"", named, pixels.astype("float32"))


def test_full_int8_needs_representative_inputs(named):
    with pytest.raises(ValueError, match="representative"):
        lite.convert(named, "int8")


def test_a_lite_version_folder_has_a_sample_that_its_file_answers(converted, pixels, tmp_path):
    lite.export(converted["int8"], tmp_path / "pets_lite" / "17", pixels[:2].astype("float32"), LABELS)
    assets = tmp_path / "pets_lite" / "17" / "assets.extra"
    request = json.loads((assets / "sample_request.json").read_text())
    response = json.loads((assets / "sample_response.json").read_text())
    assert np.array(request["instances"]).dtype == int  # of the file's own type: a server takes no 3.0 for a uint8
    again = lite.predict((assets.parent / "model.tflite").read_bytes(), np.array(request["instances"], "float32"))
    np.testing.assert_allclose(again, response["predictions"], atol=1e-6)
