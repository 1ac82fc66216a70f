"""The models that the serving tests ask, small enough to be built where they are needed; how they are published, and
waited for.

The conformance cases name them (`fixtures` in data/serving_conformance.json).  Most are plain graphs with a session's
SavedModel, since only that writes signatures for Classify and Regress.
"""

import shutil
import time
from pathlib import Path

import numpy as np

from serving.server.signatures import CLASSIFY, PREDICT, REGRESS
from serving.server.status import StatusError

IDENTITIES = {
    "i32": "int32",
    "i64": "int64",
    "u64": "uint64",
    "bool": "bool",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "str": "string",
}


def save_graph(folder, build):
    """Write the SavedModel of the graph that `build(tf)` makes; it returns {signature: (method, inputs, outputs)}."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        signatures = {
            name: v1.saved_model.signature_def_utils.build_signature_def(
                {alias: v1.saved_model.utils.build_tensor_info(tensor) for alias, tensor in inputs.items()},
                {alias: v1.saved_model.utils.build_tensor_info(tensor) for alias, tensor in outputs.items()},
                method,
            )
            for name, (method, inputs, outputs) in build(v1).items()
        }
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(folder))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()


def half_plus(offset=2.0):
    """y = 0.5 x + `offset`, and the same through tf.Examples with a feature x, as Classify and Regress signatures."""

    def build(tf):
        a, b, c = (
            tf.get_variable(name, initializer=value) for name, value in (("a", 0.5), ("b", float(offset)), ("c", 3.0))
        )
        x, x2 = (tf.placeholder(tf.float32, [None, 1], name) for name in ("x", "x2"))
        examples = tf.placeholder(tf.string, [None], "tf_example")
        features = tf.io.parse_example(
            examples, {"x": tf.io.FixedLenFeature([1], tf.float32), "x2": tf.io.FixedLenFeature([1], tf.float32, [0.0])}
        )
        parsed = features["x"]
        return {
            "serving_default": (PREDICT, {"x": x}, {"y": a * x + b}),
            "regress_x_to_y": (REGRESS, {"inputs": examples}, {"outputs": a * parsed + b}),
            "regress_x_to_y2": (REGRESS, {"inputs": examples}, {"outputs": a * parsed + c}),
            "regress_x2_to_y3": (REGRESS, {"inputs": x2}, {"outputs": a * x2 + c}),
            "classify_x_to_y": (CLASSIFY, {"inputs": examples}, {"scores": a * parsed + b}),
            "classify_x2_to_y3": (CLASSIFY, {"inputs": x2}, {"scores": a * x2 + c}),
        }

    return build


def identity(dtypes, renamed=None):
    """Every input of unknown rank comes out again; `dtypes` by alias, `renamed` gives other output aliases."""

    def build(tf):
        inputs = {alias: tf.placeholder(dtype, None, alias) for alias, dtype in dtypes.items()}
        outputs = {(renamed or {}).get(alias, alias): tf.identity(tensor) for alias, tensor in inputs.items()}
        return {"serving_default": (PREDICT, inputs, outputs)}

    return build


def constant(method=PREDICT, **outputs):
    """Constant outputs for one float input x, whose value does not matter."""

    def build(tf):
        x = tf.placeholder(tf.float32, None, "x")
        if method != PREDICT:
            x = tf.placeholder(tf.string, [None], "examples")
        with tf.get_default_graph().control_dependencies([x]):
            tensors = {alias: tf.constant(value) for alias, value in outputs.items()}
        return {"serving_default": (method, {"x" if method == PREDICT else "inputs": x}, tensors)}

    return build


def conformance_models():
    """{model name: graph} of the conformance cases' models with one version."""
    f32, i32 = np.float32, np.int32
    words = [["foo", "bar"], ["baz", "bat"]]
    models = {f"ident_{short}": identity({"default": dtype}, {"default": "out"}) for short, dtype in IDENTITIES.items()}
    return models | {
        "half_plus_three": half_plus(3.0),
        "ident_str_bytes": identity({"default": "string"}, {"default": "out_bytes"}),
        "pair": identity({"int_tensor": "int32", "str_tensor": "string"}),
        "multi": identity(
            {"int_tensor": "int32", "str_tensor": "string", "float_tensor": "float32", "dbl_tensor": "float64"}
        ),
        "col3": identity({"int_tensor": "int32", "str_tensor": "string", "bin_tensor": "string"}),
        "const_f32": constant(y=f32([[9000000, 999999, 0.5], [0.0003, 0.00003, 555557.5]])),
        "const_nonfinite": constant(y=f32([[np.nan, np.inf], [3, -np.inf]])),
        "const_multi": constant(
            int_tensor=i32([*range(1, 10), 0, 1, 2]).reshape(2, 3, 2),
            str_tensor=words,
            float_tensor=f32([[1], [2]]),
            double_scalar_tensor=np.float64([8, 9]),
            str_tensor_bytes=[["hello", "world"], ["tf", "serving"]],
        ),
        "const_mismatch": constant(int_tensor=i32([[1, 2, 3], [4, 5, 6]]), str_tensor=[["foo", "bar", "baz"]]),
        "const_scalar": constant(y=i32(1)),
        "const_complex": constant(y=np.complex64([1, 2])),
        "const_zero": constant(int_tensor=np.zeros([0, 2], i32)),
        "const_zero2": constant(str_tensor=np.zeros([0, 1, 2], "S1"), float_tensor=np.zeros([0, 3, 4], f32)),
        "labels3": constant(
            CLASSIFY, classes=[["car", "bike", "bus"]] * 2, scores=f32([[0.2, 0.7, 0.1], [0.7, 0.1, 0.2]])
        ),
        "regress_fixed": constant(REGRESS, outputs=f32([0.2, np.inf, 1, -np.inf, np.nan])),
    }


def save_versions(folder, count):
    """Write half_plus in `folder` as versions 1 to `count`: y = 0.5 x + version."""
    for number in range(1, count + 1):
        save_graph(folder / str(number), half_plus(number))


def sleeper(v1):
    """y = x, after as many seconds as the largest x says: the kernel sleeps, so no core is kept busy."""
    import tensorflow as tf
    from tensorflow.python.data.experimental.ops import testing  # no public name: the one kernel that only waits

    x = v1.placeholder(tf.float32, [None, 1], "x")
    microseconds = tf.cast(tf.reduce_max(x) * 0.5e6, tf.int64)  # `get_single_element` asks twice, lest there be another
    dataset = tf.data.Dataset.from_tensors(microseconds).apply(testing.sleep(microseconds))
    with v1.control_dependencies([dataset.get_single_element()]):
        return {"serving_default": (PREDICT, {"x": x}, {"y": tf.identity(x)})}


def save_product(folder):
    """A TF2 SavedModel: y = v1 v2 x with variables v1 = 3 and v2 = 2."""
    import tensorflow as tf

    module = tf.Module()
    module.v1, module.v2 = tf.Variable(3.0), tf.Variable(2.0)
    call = tf.function(lambda x: {"y": module.v1 * module.v2 * x}, [tf.TensorSpec([None], tf.float32, name="x")])
    tf.saved_model.save(module, str(folder), signatures={"serving_default": call})


def save_convnet(folder, size=28, filters=8, classes=10):
    """A Keras image classifier, untrained: input `image` float [-1, size, size, 1]; returns the model."""
    import keras

    model = keras.Sequential(
        [
            keras.Input((size, size, 1), name="image"),
            keras.layers.Conv2D(filters, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(classes, activation="softmax"),
        ]
    )
    model.export(str(folder), verbose=False)
    return model


def save_lite(folder, model):
    """The TFLite file of a Keras model, in a version folder."""
    import tensorflow as tf

    Path(folder).mkdir(parents=True)
    (Path(folder) / "model.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def build_conformance(folder):
    """Write every conformance model under `folder`, and a models.config that serves them; returns that file's path."""
    folder = Path(folder)
    for name, build in conformance_models().items():
        save_graph(folder / name / "1", build)
    for name, numbers in {"hp2": ["00000123"], "hp2v": ["00000123", "00000124"]}.items():
        for number in numbers:
            save_graph(folder / name / number, half_plus(2.0))
    save_product(folder / "product" / "1")
    specific = 'model_version_policy { specific { versions: 123 } } version_labels { key: "Version_Label" value: 123 }'
    entries = [(name, name, "") for name in (*conformance_models(), "hp2v", "product")]
    entries += [(name, "hp2", specific) for name in ("hp2", "default", "m!#$%&'()*+,/:;=?@[]")]
    config = "".join(
        f'config {{ name: "{name}" base_path: "{folder / base}" model_platform: "tensorflow" {extra} }}\n'
        for name, base, extra in entries
    )
    path = folder / "models.config"
    path.write_text(f"model_config_list {{\n{config}}}\n")
    return path


def publish(source, base, name):
    """Copy the version folder `source` to `base`/`name` (a number, or another spelling) as a pusher does: whole, by one
    rename."""
    base.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, base / f".tmp-{name}")
    (base / f".tmp-{name}").rename(base / str(name))


def wait_for(condition, timeout=20):
    """Wait until `condition()` holds, passing over refusals meanwhile."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            if condition():
                return
        except StatusError:
            pass
        assert time.monotonic() < deadline, "the awaited state did not come"
        time.sleep(0.02)
