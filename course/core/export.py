"""From a Keras model to a SavedModel that a server loads: named signatures, labels, a sample request, warm-up records.

The folder written here, `<model>/<version>/`, is what compression and serving take: they need nothing of the unit's
code.
"""

import base64
import functools
import json
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from course.core import data as sets
from course.core import files

WARMUP = "tf_serving_warmup_requests"  # the name TensorFlow Serving looks for in assets.extra
SOURCE = "model.keras"  # in assets.extra, the Keras model itself: what compression trains on
TRAINED_ON = "trained_on.json"  # beside it: {"unit", "data": the name of its data set}


def export(model, folder, signatures, *, sample, labels=(), extra=None, trained_on=None):
    """Write `folder` (a version; it must not exist), whole or not at all.

    `signatures`: name -> (function, input specs).  A function takes the tensors of its `tf.TensorSpec`s, in order, and
    returns a dict of named tensors: pre- and post-processing stand in it, so that the server needs nothing else.
    `sample`: name of a signature -> dict of NumPy inputs; the first is also written as the sample request, and all of
    them become warm-up records, which a server plays before it calls the version available.
    `labels`: class names in the order of the scores.  `extra`: file name -> text or bytes, for `assets.extra/` too.
    `trained_on`: {"unit": its module's name, "data": a set of `course.core.data` or "./<file>.npz", one of `extra`};
    with it `model`, which must map one input to logits, is kept in the version for `compression` to train on.  "data"
    may be a folder of pictures as well: its whole path is written, which holds wherever the reader stands.
    """
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, specs) in signatures.items():
        archive.add_endpoint(name, function, input_signature=specs)
    name = Path(folder).parent.name
    with files.atomic_folder(folder, last="saved_model.pb") as temporary:
        archive.write_out(str(temporary), verbose=False)
        assets = temporary / "assets.extra"
        assets.mkdir()
        (assets / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        signature, inputs = next(iter(sample.items()))
        outputs = tf.saved_model.load(str(temporary)).signatures[signature](
            **{k: tf.constant(v) for k, v in inputs.items()}
        )
        write_sample(assets, request(inputs, signature), {key: value.numpy() for key, value in outputs.items()})
        write_warmup(assets / WARMUP, name, sample)
        for file, content in (extra or {}).items():
            (assets / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        if trained_on:
            model.save(assets / SOURCE)
            name = trained_on["data"]
            if name not in sets.SETS and Path(name).is_dir():
                trained_on = trained_on | {"data": str(Path(name).resolve())}
            (assets / TRAINED_ON).write_text(json.dumps(trained_on, indent=1) + "\n")


def image_classifier(model, unit, data, exports="exports"):
    """Export a unit's `model` (pixels 0..255 [B, H, W, C] -> logits) in float32, with `image_signatures`, as the next
    version in `exports`/<unit>; returns the version's folder.

    `data`: the `ImageSet` it was trained on, whose first four test images are the sample request.  The version's number
    is the second of now, or one above the newest there is.
    """
    base, model, images = Path(exports) / unit, in_float32(model), data.x_test[:4]
    have = [int(path.name) for path in base.glob("*") if path.name.isdecimal()]
    folder = base / str(max([int(time.time()), *(number + 1 for number in have)]))
    contents = np.array([tf.io.encode_png(image).numpy() for image in images], dtype=object)
    sample = {"serving_default": {"image_bytes": contents}, "pixels": {"pixels": images}}
    signatures = image_signatures(model, images.shape[1:], data.labels)
    source = {"unit": unit, "data": data.provenance["name"]}
    export(model, folder, signatures, sample=sample, labels=data.labels, trained_on=source)
    print(f"exported: {folder}", flush=True)
    return folder


def in_float32(model):
    """A copy of a Keras model that computes in float32 on one device, however it was trained: what is exported must run
    anywhere, and LiteRT has no 16-bit arithmetic."""

    def copy(layer):
        config = layer.get_config()  # that of a plain operation (a sum written with +) knows no type
        return type(layer).from_config(config | {"dtype": "float32"} if "dtype" in config else config)

    clone = keras.models.clone_model(model, clone_function=copy)
    clone.set_weights([np.asarray(weight) for weight in model.get_weights()])
    return clone


def request(inputs, signature="serving_default"):
    """The body of a REST predict request, in row format, for a dict of NumPy inputs; bytes travel as {"b64": ...}."""
    return {
        "signature_name": signature,
        "instances": _rows(inputs, lambda value: {"b64": base64.b64encode(value).decode()}),
    }


def write_sample(assets, body, outputs):
    """Write a request and what the model answers to it (a dict of NumPy outputs) as `sample_request.json` and
    `sample_response.json`: documentation for a client, and what the InfraValidator plays and compares."""
    (assets / "sample_request.json").write_text(json.dumps(body, indent=1) + "\n")
    (assets / "sample_response.json").write_text(
        json.dumps({"predictions": _rows(outputs, bytes.decode)}, indent=1) + "\n"
    )


def _rows(tensors, text):
    """Named tensors with a batch axis -> a list of rows in the protocol's JSON; a single tensor needs no name."""

    def plain(value):
        if isinstance(value, bytes):
            return text(value)
        return [plain(item) for item in value] if isinstance(value, list) else value

    columns = {name: plain(np.asarray(values).tolist()) for name, values in tensors.items()}
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write_warmup(path, model, sample):
    """TFRecord of `PredictionLog`s, one a signature; `sample`: signature -> dict of NumPy inputs."""
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    with tf.io.TFRecordWriter(str(path)) as writer:
        for signature, inputs in sample.items():
            call = predict_pb2.PredictRequest()
            call.model_spec.name, call.model_spec.signature_name = model, signature
            for name, value in inputs.items():
                call.inputs[name].CopyFrom(tf.make_tensor_proto(value))
            log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=call))
            writer.write(log.SerializeToString())


def image_signatures(model, shape, labels):
    """The signatures of an image classifier `model`: pictures [B, H, W, C] of `shape` (H, W, C), 0..255 -> logits.

    serving_default: `image_bytes` [B] strings, the files as they are (PNG, JPEG, GIF, BMP), any size.
    pixels:          `pixels` uint8 [B, H, W, C], for clients that have decoded and resized already.
    Both answer `label` [B] strings, `score` [B], the winner's probability, and `probabilities` [B, classes].
    classes:         `index` int64 [N] -> `label` [N] strings: what the places of `probabilities` stand for.
    """
    names = tf.constant(list(labels))

    def answer(pixels):
        probabilities = tf.nn.softmax(tf.cast(model(tf.cast(pixels, tf.float32), training=False), tf.float32))
        best = tf.argmax(probabilities, axis=-1)
        return {
            "label": tf.gather(names, best),
            "score": tf.reduce_max(probabilities, axis=-1),
            "probabilities": probabilities,
        }

    def from_bytes(image_bytes):
        decode = functools.partial(decode_image, shape=shape)
        return answer(tf.map_fn(decode, image_bytes, fn_output_signature=tf.TensorSpec(shape, tf.uint8)))

    return {
        "serving_default": (from_bytes, [tf.TensorSpec([None], tf.string, name="image_bytes")]),
        "pixels": (answer, [tf.TensorSpec([None, *shape], tf.uint8, name="pixels")]),
        "classes": (
            lambda index: {"label": tf.gather(names, index)},
            [tf.TensorSpec([None], tf.int64, name="index")],
        ),
    }


def decode_image(content, shape):
    """An image file's bytes (scalar string) -> uint8 [H, W, C]: decoded, resized to fit, centred on black.

    Training and serving both use this very function, so that a picture cannot look different to the two.
    """
    height, width, channels = shape
    image = tf.io.decode_image(content, channels=3, expand_animations=False)  # BMP and GIF know no other number
    image.set_shape([None, None, 3])
    if channels == 1:
        image = tf.image.rgb_to_grayscale(image)  # of a grey picture every level comes back exactly

    def fit():
        fitted = tf.image.resize_with_pad(image, height, width, antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(fitted), 0, 255), tf.uint8)

    right_size = tf.reduce_all(tf.equal(tf.shape(image)[:2], [height, width]))
    return tf.ensure_shape(tf.cond(right_size, lambda: image, fit), shape)
