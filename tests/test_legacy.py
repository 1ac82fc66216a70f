"""tensorflow-model-optimization in a process of its own: the way over and back, and what goes wrong in one line."""

import dataclasses
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from pruning_models import QUICK, SHAPE, noise, randomised, residual

from compression import legacy, lite, prune
from compression.legacy import Legacy
from course.core import InputError
from models import convnets

LITTLE = dataclasses.replace(QUICK, epochs=1, lr=0.005)


@pytest.fixture(scope="module")
def data():
    return noise()


@pytest.fixture(scope="module")
def network():
    return randomised(convnets.small_resnet(SHAPE, 3, 4, [127.0] * 3, [5000.0] * 3))


def kernels(model):
    return {layer.name: np.asarray(layer.kernel) for layer in model.layers
            if isinstance(layer, layers.Conv2D | layers.Dense)}  # fmt: skip


def int8_kernels(content):
    """Kernels of the convolutions and Dense layers of a file, output channels first."""
    runner = lite.interpreter(content)
    return [runner.get_tensor(entry["inputs"][1]) for entry in runner._get_ops_details()
            if entry["op_name"] in ("CONV_2D", "FULLY_CONNECTED")]  # fmt: skip


def outputs_agree(made):
    """The weights came over, and back, as they were: the same answers in `tf_keras` and in Keras 3, to float32's
    rounding of sums (relative to the largest answer)."""
    return 0 <= made.report["over"] < 1e-4 and 0 <= made.report["back"] < 1e-4


# --- over and back ---------------------------------------------------------------------------------------------------


def test_pruning_over_and_back(data):
    network = randomised(residual(4))
    before = [np.asarray(weight).copy() for weight in network.weights]
    made = legacy.optimise(network, data, Legacy(sparsity=0.75, training=LITTLE))
    assert outputs_agree(made)
    assert made.content is None
    for kernel in kernels(made.model).values():
        assert (kernel == 0).mean() == pytest.approx(0.75, abs=0.01)
    assert [type(layer) for layer in made.model.layers] == [type(layer) for layer in network.layers]
    for weight, old in zip(network.weights, before, strict=True):
        np.testing.assert_array_equal(weight, old)
    assert "tensorflow_model_optimization" not in sys.modules
    assert "tf_keras" not in sys.modules


@pytest.mark.slow
def test_weights_come_back_as_they_went_over_where_nothing_is_trained(network, data):
    made = legacy.optimise(network, data, Legacy(sparsity=0.0, training=dataclasses.replace(LITTLE, lr=0.0)))
    for weight, old in zip(made.model.weights, network.weights, strict=True):
        if "moving" not in weight.path:  # batch normalisation's statistics follow the data at any rate
            np.testing.assert_allclose(weight, old, atol=1e-6)


@pytest.mark.slow
def test_clustering_over_and_back(network, data):
    made = legacy.optimise(network, data, Legacy("cluster", clusters=8, training=LITTLE))
    assert outputs_agree(made)
    for name, kernel in kernels(made.model).items():
        assert 2 <= len(np.unique(kernel)) <= 8
        assert np.corrcoef(kernel.ravel(), kernels(network)[name].ravel())[0, 1] > 0.9, "the values did not run away"


@pytest.mark.slow
def test_quantisation_gives_a_file_that_computes_the_same(network, data):
    made = legacy.optimise(network, data, Legacy("quantise", training=LITTLE))
    assert outputs_agree(made)
    assert made.report["agreement"] > 0.95
    assert 0 < made.report["convert_seconds"] < 60
    entry = lite.interpreter(made.content).get_input_details()[0]
    assert (entry["dtype"], entry["quantization"]) == (np.uint8, (1.0, 0))
    assert all(kernel.dtype == np.int8 for kernel in int8_kernels(made.content))
    still = made.model.get_layer("normalization")
    assert np.abs(np.asarray(still.kernel) - 1 / np.sqrt(5000)).max() < 1e-6, "what prepares the input is not trained"


def test_inputs_that_are_no_pixels_are_quantised_within_their_own_range():
    rng = np.random.default_rng(0)
    x = rng.normal(-1, 2, (256, 6)).astype("float32")  # most of them negative: read as pixels they would all be 0
    point = keras.Input((6,))
    hidden = layers.Dense(16, "relu", name="hidden")(layers.Normalization(mean=[-1.0] * 6, variance=[4.0] * 6)(point))
    network = randomised(keras.Model(point, layers.Dense(3, name="logits")(hidden)))
    decisions = network(x).numpy().argmax(-1).astype("int32")
    table = dataclasses.replace(noise(), x_train=x, y_train=decisions, x_val=x[:64], y_val=decisions[:64])
    training = dataclasses.replace(LITTLE, lr=0.001)
    made = legacy.optimise(network, table, Legacy("quantise", pixels=False, training=training))
    assert outputs_agree(made)
    runner = lite.interpreter(made.content)
    assert runner.get_input_details()[0]["dtype"] == np.float32
    first = next(entry["outputs"][0] for entry in runner._get_ops_details() if entry["op_name"] == "QUANTIZE")
    (scale,) = [entry["quantization"][0] for entry in runner.get_tensor_details() if entry["index"] == first]
    assert scale == pytest.approx(np.ptp(x) / 255, rel=0.01)
    spread = float(np.ptp(made.model(x)))
    assert made.report["max_difference"] < 0.02 * spread, "the file computes what the toolkit's model does"
    answers = lite.predict(made.content, x)
    assert np.abs(answers - network(x)).max() < 0.05 * spread
    assert (answers.argmax(-1) == decisions).mean() > 0.95


@pytest.mark.slow
def test_sparsity_is_kept_through_quantisation(network, data):
    pruned = prune.copy_of(network)
    for layer in pruned.layers:
        if isinstance(layer, layers.Conv2D | layers.Dense):
            kernel = np.asarray(layer.kernel)
            layer.kernel.assign(np.where(np.abs(kernel) < np.quantile(np.abs(kernel), 0.7), 0, kernel))
    made = legacy.optimise(pruned, data, Legacy("quantise", keep_zeros=True, training=LITTLE))
    for name, kernel in kernels(pruned).items():
        np.testing.assert_array_equal(kernels(made.model)[name] == 0, kernel == 0)
    for before, after in zip(kernels(pruned).values(), int8_kernels(made.content), strict=True):
        share = (before == 0).mean()
        assert 0.65 < share <= (after == 0).mean() < share + 0.1  # small weights may round to zero, too


@pytest.mark.slow
def test_clusters_and_sparsity_are_kept_through_quantisation(network, data):
    pruned = legacy.optimise(network, data, Legacy(sparsity=0.7, training=LITTLE)).model
    clustered = legacy.optimise(pruned, data, Legacy("cluster", clusters=8, keep_zeros=True, training=LITTLE)).model
    settings = Legacy("quantise", keep_zeros=True, keep_clusters=True, training=LITTLE)
    made = legacy.optimise(clustered, data, settings)
    assert prune.sparsity(clustered) == pytest.approx(0.7, abs=0.02)
    for name, kernel in kernels(clustered).items():
        assert (kernels(made.model)[name][kernel == 0] == 0).all()
    assert made.report["agreement"] > 0.95


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_layer_without_a_counterpart_is_refused_before_anything_starts(data, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    image = keras.Input(SHAPE)
    odd = keras.Model(image, layers.Flatten()(layers.LayerNormalization(name="odd")(image)))
    with pytest.raises(InputError, match=r"odd \(LayerNormalization\)"):
        legacy.optimise(odd, data, Legacy())
    with pytest.raises(InputError, match="'squeeze' is not known"):
        legacy.optimise(odd, data, Legacy("squeeze"))
    own = keras.Model(image, layers.Flatten()(layers.Conv2D(2, 3, activation=doubled, name="own")(image)))
    with pytest.raises(InputError, match="own has an activation of its own"):
        legacy.optimise(own, data, Legacy())


@keras.saving.register_keras_serializable("tests")
def doubled(x):
    return 2 * x


def work(tmp_path, monkeypatch, code, kind):
    """What is said, as an error of this kind, when the process runs `code` in the worker's place."""
    package = tmp_path / "compression"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "legacy_worker.py").write_text(code)
    monkeypatch.setattr(legacy, "__file__", str(package / "legacy.py"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        legacy._work(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("code", "kind", "said"), [
    ("raise SystemExit('ValueError: no such layer')", InputError, "failed: ValueError: no such layer"),
    ("raise SystemExit('MemoryError: no room')", RuntimeError, "failed: MemoryError: no room"),
    ("import sys; sys.exit(7)", RuntimeError, "it gave no reason (status 7)"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", RuntimeError, "ended by SIGKILL: it may have needed"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", RuntimeError, "ended by SIGSEGV"),
    ("raise SystemExit(\"ModuleNotFoundError: No module named 'tensorflow_model_optimization'\")", InputError,
     "pip install tensorflow-model-optimization"),
], ids=["refusal", "error", "silent", "killed", "crash", "missing"])  # fmt: skip
def test_what_goes_wrong_is_one_clear_line(code, kind, said, tmp_path, monkeypatch):
    """A refusal makes no arm; a crash is a failure of the benchmark's."""
    assert said in work(tmp_path, monkeypatch, code, kind)


def test_the_worker_says_which_package_it_lacks(tmp_path):
    """The real worker, in a process in which neither package can be imported."""
    request = {"steps": [{"shape": [2], "name": "inputs"}], "settings": dataclasses.asdict(Legacy())}
    (tmp_path / "request.json").write_text(json.dumps(request))
    hidden = ("import runpy, sys; sys.modules['tf_keras'] = sys.modules['tensorflow'] = None; "
              f"sys.argv = ['', {str(tmp_path)!r}]; "
              "runpy.run_module('compression.legacy_worker', run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr.strip().splitlines()[-1]


def test_the_graph_in_words(network):
    steps, inner = legacy.described(network)
    assert [step["kind"] for step in steps[:3]] == ["Input", "Normalization", "Conv2D"]
    assert len(inner) == len(steps) - 1
    (first, second) = [step for step in steps if step["kind"] == "Add"]
    assert len(first["inputs"]) == len(second["inputs"]) == 2
    assert steps[2]["config"]["kernel_size"] in ([3, 3], (3, 3))
    assert json.loads(json.dumps(steps))[2]["config"]["use_bias"] is False
