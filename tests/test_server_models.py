"""Versions, batching, warm-up and the two kinds of model, on servers in this process."""

import asyncio
import gzip
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from serving.client import Client, ServingError
from serving.server import backends, batching, folders, manager, serve
from serving.server.batching import Batcher
from serving.server.settings import Batching, Settings
from serving.server.signatures import PREDICT
from serving.server.status import StatusError
from tests import serving_models
from tests.serving_models import publish, wait_for

FAST = {"file_system_poll_wait_seconds": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """half_plus/{1,2,3} with y = 0.5 x + version, and a convolutional network as SavedModel and TFLite."""
    folder = tmp_path_factory.mktemp("models")
    serving_models.save_versions(folder / "half_plus", 3)
    model = serving_models.save_convnet(folder / "convnet" / "1")
    serving_models.save_lite(folder / "lite" / "1", model)
    return folder


def get(url):
    """The body of a GET that is answered 200."""
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read()


# --- versions ---------------------------------------------------------------------------------------------------------


def test_hot_reload_under_load_fails_no_request(folder, tmp_path):
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, 1)
    answers, stop = [], threading.Event()

    def ask(client):
        while not stop.is_set():
            answers.append(client.predict([2.0, 4.0]))

    with serve("m", base, **FAST) as server:
        server.wait_available()
        clients = [Client(server.url, model="m") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, client) for client in clients]
            try:
                for number in (2, 3):
                    publish(folder / "half_plus" / str(number), base, number)
                    server.wait_available(number)
                    wait_for(lambda number=number: server.manager.statuses("m", number - 1)[0][1] == "END")
                    wait_for(lambda number=number: [1.0 + number, 2.0 + number] in answers)
            finally:
                stop.set()
            for asked in asking:
                asked.result()  # raises what a client met
        assert {tuple(answer) for answer in answers} == {(1.0 + n, 2.0 + n) for n in (1, 2, 3)}
        assert clients[0].predict([0.0]) == [3.0]
        assert [(entry["version"], entry["state"]) for entry in clients[0].status()] == [
            ("3", "AVAILABLE"),
            ("2", "END"),
            ("1", "END"),
        ]
        for client in clients:
            client.close()


def test_a_corrupt_version_is_kept_out_until_it_is_mended(folder, tmp_path):
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, 1)
    with serve("m", base, **FAST) as server, Client(server.url, model="m") as client:
        server.wait_available(1)
        (base / "2").mkdir()
        (base / "2" / "saved_model.pb").write_bytes(b"damaged on its way")
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "END")
        (entry,) = client.status(version=2)
        assert entry["status"]["error_code"] != "OK"
        assert entry["status"]["error_message"]
        assert client.predict([0.0]) == [1.0]
        with pytest.raises(ServingError) as caught:
            client.predict([0.0], version=2)
        assert caught.value.status == 404
        shutil.rmtree(base / "2")
        publish(folder / "half_plus" / "2", base, 2)
        wait_for(lambda: server.manager.models() == {"m": [2]})
        assert client.predict([0.0]) == [2.0]


def test_a_version_taken_away_while_it_loads_is_loaded_when_it_is_back(folder, tmp_path, monkeypatch):
    base, load = tmp_path / "m", backends.load
    publish(folder / "half_plus" / "1", base, 1)
    begun, go = threading.Event(), threading.Event()

    def slow(path, settings):
        if path.name == "2" and not begun.is_set():
            begun.set()
            assert go.wait(10)
        return load(path, settings)

    monkeypatch.setattr(backends, "load", slow)
    with serve("m", base, **FAST) as server:
        server.wait_available(1)
        publish(folder / "half_plus" / "2", base, 2)
        assert begun.wait(10)
        (base / "2").rename(base / "withdrawn-2")
        go.set()
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "END")
        (base / "withdrawn-2").rename(base / "2")
        wait_for(lambda: server.manager.models() == {"m": [2]})


def test_a_model_that_cannot_be_closed_is_let_go(folder, tmp_path, monkeypatch, capfd):
    base, close = tmp_path / "m", backends.SavedModel.close

    def fail(model):
        close(model)
        raise RuntimeError("it will not close")

    monkeypatch.setattr(backends.SavedModel, "close", fail)
    publish(folder / "half_plus" / "1", base, 1)
    with serve("m", base, **FAST) as server:
        server.wait_available(1)
        publish(folder / "half_plus" / "2", base, 2)
        wait_for(lambda: server.manager.statuses("m", 1)[0][1] == "END")
    assert capfd.readouterr().err.count("RuntimeError: it will not close") == 2


def test_a_slow_disk_holds_up_no_request(folder, tmp_path, monkeypatch):
    base, entered, go, was_let_go = tmp_path / "m", threading.Event(), threading.Event(), []

    def slow(path):
        entered.set()
        was_let_go.append(go.wait(10))
        return folders.stamp(path)

    publish(folder / "half_plus" / "1", base, 1)
    with serve("m", base, **FAST) as server, Client(server.url, model="m") as client:
        server.wait_available(1)
        monkeypatch.setattr(manager, "stamp", slow)
        publish(folder / "half_plus" / "2", base, 2)
        assert entered.wait(10)
        assert client.predict([0.0]) == [1.0]
        go.set()
        server.wait_available(2)
    assert was_let_go == [True]


def test_what_is_no_version_is_passed_over(folder, tmp_path):
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, 1)
    shutil.copytree(folder / "half_plus" / "3", base / ".tmp-9")  # under way
    shutil.copytree(folder / "half_plus" / "3", base / "v9")
    (base / "8" / "variables").mkdir(parents=True)  # the model file is copied last
    with serve("m", base, **FAST) as server:
        server.wait_available()
        time.sleep(0.3)
        assert [number for number, _, _ in server.manager.statuses("m")] == [1]
        shutil.copytree(folder / "half_plus" / "2" / "variables", base / "8" / "variables", dirs_exist_ok=True)
        shutil.copy(folder / "half_plus" / "2" / "saved_model.pb", base / "8" / "under_way")
        (base / "8" / "under_way").rename(base / "8" / "saved_model.pb")
        server.wait_available(8)


@pytest.mark.parametrize(("policy", "wanted"), [
    ("", [3]), ("latest { num_versions: 2 }", [3, 2]), ("all {}", [3, 2, 1]),
    ("specific { versions: [1, 3, 7] }", [3, 1]),
])  # fmt: skip
def test_version_policies(policy, wanted, folder, tmp_path):
    policy = f"model_version_policy {{ {policy} }}" if policy else ""
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{folder / "half_plus"}" '
        f'model_platform: "tensorflow" {policy} }} }}'
    )
    with serve(model_config_file=str(config)) as server:
        for number in wanted:
            server.manager.wait_available("m", number)
        assert server.manager.models() == {"m": wanted}


def test_labels_need_a_version_that_serves(folder):
    from google.protobuf import text_format
    from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    def reload(target, **labels):
        text = " ".join(f'version_labels {{ key: "{key}" value: {value} }}' for key, value in labels.items())
        config = text_format.Parse(
            f'model_config_list {{ config {{ name: "m" base_path: "{folder / "half_plus"}" model_platform: '
            f'"tensorflow" model_version_policy {{ all {{}} }} {text} }} }}',
            ModelServerConfig(),
        )
        with grpc.insecure_channel(target) as channel:
            request = model_management_pb2.ReloadConfigRequest(config=config)
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            return stub.HandleReloadConfigRequest(request, timeout=60).status

    with serve("m", folder / "half_plus") as server:
        assert reload(server.grpc_target).error_code == 0
        for number in (1, 2, 3):
            server.wait_available(number)
        assert reload(server.grpc_target, stable=1, canary=3).error_code == 0
        with pytest.raises(grpc.RpcError) as caught:
            reload(server.grpc_target, stable=9)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "version 9 of model m, which is not currently available" in caught.value.details()
        with Client(server.url, server.grpc_target, "m") as client:
            assert [client.predict([0.0], label=label) for label in ("stable", "canary")] == [[1.0], [3.0]]
            assert client.predict_grpc({"x": np.float32([0])}, label="stable")["y"] == 1.0
            with pytest.raises(ServingError, match="Unrecognized servable version label: beta"):
                client.predict([0.0], label="beta")


# --- batching ---------------------------------------------------------------------------------------------------------


def test_concurrent_requests_get_their_own_rows(folder):
    with serve("m", folder / "half_plus") as server:
        server.wait_available()

        def ask(seed):
            numbers = np.random.default_rng(seed)
            with Client(server.url, server.grpc_target, "m") as client:
                for turn in range(25):
                    x = numbers.normal(size=(int(numbers.integers(1, 6)), 1)).astype(np.float32)
                    y = np.float32(client.predict(x)) if (seed + turn) % 3 else client.predict_grpc({"x": x})["y"]
                    np.testing.assert_allclose(y, 0.5 * x + 3, rtol=1e-6)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(8)))


class Doubler:
    """A model whose runs can be held up: y = 2 x; refuses 13."""

    steady = frozenset()

    def __init__(self):
        self.batches = []
        self.go = threading.Event()

    def run(self, signature, inputs, outputs):
        self.go.wait(10)
        self.batches.append(len(inputs["x"]))
        if 13 in inputs["x"]:
            raise StatusError("INVALID_ARGUMENT", "13 is refused")
        return {"y": 2 * inputs["x"]}


def run_batches(settings, values, row_wise=True):
    """Submit `values` at once to a held-up `Doubler`; returns (outcomes, sizes of its runs)."""
    model = Doubler()
    signature = type("Signature", (), {"name": "s", "row_wise": row_wise})

    async def submit():
        with ThreadPoolExecutor(2) as pool:
            batcher = Batcher(model, pool, settings)
            calls = [asyncio.ensure_future(batcher.run(signature, {"x": np.array(value)}, ("y",))) for value in values]
            await asyncio.sleep(0.05)
            model.go.set()
            return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(submit()), model.batches


def test_what_waits_shares_one_run():
    outcomes, batches = run_batches(Batching(max_batch_size=8, num_batch_threads=1), [[n, n + 100] for n in range(6)])
    assert [outcome["y"].tolist() for outcome in outcomes] == [[2 * n, 2 * n + 200] for n in range(6)]
    assert batches == [2, 8, 2]


def test_a_bad_request_fails_alone():
    outcomes, _ = run_batches(Batching(num_batch_threads=1), [[1], [2], [13], [4]])
    assert [outcome["y"].tolist() for outcome in outcomes if isinstance(outcome, dict)] == [[2], [4], [8]]
    assert isinstance(outcomes[2], StatusError)


def test_allowed_batch_sizes_are_filled_up():
    settings = Batching(num_batch_threads=1, max_batch_size=8, allowed_batch_sizes=(4, 8))
    outcomes, batches = run_batches(settings, [[n] for n in range(6)])
    assert [outcome["y"].tolist() for outcome in outcomes] == [[2 * n] for n in range(6)]
    assert batches == [4, 8]


def test_only_row_wise_signatures_share_runs():
    outcomes, batches = run_batches(Batching(num_batch_threads=1), [[n] for n in range(4)], row_wise=False)
    assert [outcome["y"].tolist() for outcome in outcomes] == [[0], [2], [4], [6]]
    assert batches == [1, 1, 1, 1]


def test_only_a_lone_quick_and_steady_request_runs_on_the_event_loop(monkeypatch):
    monkeypatch.setattr(batching, "_SHORT_RUN", 0.01)  # the machine may be busy

    class Model:
        """Tells on which thread it runs."""

        steady = frozenset({"s"})

        def __init__(self, seconds=0.0):
            self.seconds = seconds

        def run(self, signature, inputs, outputs):
            time.sleep(self.seconds)
            return {"y": np.array([threading.current_thread() is threading.main_thread()] * len(inputs["x"]))}

    def on_loop(model, *bursts, name="s"):
        signature = type("Signature", (), {"name": name, "row_wise": True})

        async def ask():
            with ThreadPoolExecutor(2) as pool:
                batcher, found = Batcher(model, pool, Batching()), []
                for burst in bursts:
                    runs = [batcher.run(signature, {"x": value}, ("y",)) for value in burst]
                    found.append([bool(outputs["y"][0]) for outputs in await asyncio.gather(*runs)])
                    await asyncio.to_thread(batcher.wait_idle, 10)
                return found

        return asyncio.run(ask())

    one, many, text = np.zeros((1, 4)), np.zeros((100_000, 4)), np.full((1, 1), b"x", object)
    assert on_loop(Model(), [one], [one], [one, one], [many]) == [[False], [True], [False, False], [False]]
    assert on_loop(Model(), [one], [one], name="another")[1] == [False]  # not steady
    assert on_loop(Model(), [text], [text])[1] == [False]
    assert on_loop(Model(seconds=0.02), [one], [one])[1] == [False]


def test_loops_make_the_signatures_behind_them_unsteady(tmp_path):
    def build(tf):
        x, words = tf.placeholder(tf.float32, [None], "x"), tf.placeholder(tf.string, [None], "words")
        looped = tf.map_fn(lambda row: 2 * row, x)
        return {
            "plain": (PREDICT, {"x": x}, {"y": 2 * x}),
            "looped": (PREDICT, {"x": x}, {"y": looped}),
            "both": (PREDICT, {"x": x}, {"y": 2 * x, "z": looped}),
            "words": (PREDICT, {"words": words}, {"y": tf.strings.length(words)}),
        }

    serving_models.save_graph(tmp_path / "1", build)
    model = backends.load(tmp_path / "1", Settings())
    assert model.steady == {"plain", "words"}
    model.close()
    serving_models.save_product(tmp_path / "2")  # a restored tf.function
    model = backends.load(tmp_path / "2", Settings())
    assert "serving_default" in model.steady
    model.close()


def test_a_full_queue_refuses():
    settings = Batching(num_batch_threads=1, max_batch_size=2, max_enqueued_batches=2)
    outcomes, _ = run_batches(settings, [[n] for n in range(8)])
    refused = [outcome.code for outcome in outcomes if isinstance(outcome, StatusError)]
    assert set(refused) == {"RESOURCE_EXHAUSTED"}
    assert 3 <= len(refused) <= 4  # the first may have left the queue already
    assert [outcome["y"].tolist() for outcome in outcomes[:4]] == [[0], [2], [4], [6]]


# --- models -----------------------------------------------------------------------------------------------------------


def test_the_lite_file_answers_as_the_saved_model(folder, tmp_path):
    images = np.random.default_rng(0).random((5, 28, 28, 1), np.float32)
    answers = []
    for name in ("convnet", "lite"):
        with serve(name, folder / name) as server, Client(server.url, server.grpc_target, name) as client:
            server.wait_available()
            (info,) = client.metadata()["serving_default"]["inputs"].values()
            assert [dim["size"] for dim in info["tensor_shape"]["dim"]] == ["-1", "28", "28", "1"]
            answers.append(np.float32(client.predict(images)))
            (by_grpc,) = client.predict_grpc({"image": images}).values()
            np.testing.assert_allclose(by_grpc, answers[-1], rtol=1e-6)
    np.testing.assert_allclose(*answers, atol=1e-5)  # float32 convolutions in two libraries
    shutil.copytree(folder / "convnet" / "1", tmp_path / "1")
    shutil.copy(folder / "lite" / "1" / "model.tflite", tmp_path / "1")
    for prefers, kind in ((False, backends.SavedModel), (True, backends.LiteModel)):
        model = backends.load(tmp_path / "1", Settings(prefer_tflite_model=prefers))
        assert type(model) is kind
        model.close()


@pytest.mark.parametrize("name", ["convnet", "lite"])
@pytest.mark.parametrize("shape", [(28, 28, 1), (1, 28, 28), (1, 14, 28, 1), (1, 28, 28, 3), (1,)])
def test_a_wrong_shape_is_refused_with_the_signature(name, shape, folder):
    model = backends.load(folder / name / "1", Settings())
    with pytest.raises(StatusError, match=r"Expected signature: serving_default\(image: float \[-1, 28, 28, 1\]\)"):
        model.run(model.signatures["serving_default"], {"image": np.zeros(shape, np.float32)}, ("output_0",))
    model.close()


def write_warm_up(path, requests):
    """Write Predict requests as a warm-up file."""
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    path.parent.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for request in requests:
            log = PredictionLog()
            log.predict_log.request.CopyFrom(request)
            writer.write(log.SerializeToString())


@pytest.mark.parametrize(
    ("count", "alias", "error"),
    [(3, "x", None), (1001, "x", "more than 1000 warm-up requests"), (1, "z", "alias not found in signature: z")],
)
def test_warm_up_requests_decide_whether_a_version_serves(count, alias, error, folder, tmp_path):
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    from serving.server import tensors

    request = PredictRequest()
    tensors.to_content(np.ones((1, 1), np.float32), request.inputs[alias])
    shutil.copytree(folder / "half_plus" / "1", tmp_path / "1")
    write_warm_up(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests", [request] * count)
    with serve("m", tmp_path) as server:
        if error is None:
            server.wait_available()
        else:
            with pytest.raises(StatusError, match=error):
                server.wait_available(1)


# --- the rest of the server -------------------------------------------------------------------------------------------


def test_metrics_health_and_limits(folder, tmp_path):
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text('prometheus_config { enable: true path: "/metrics" }')
    with (
        serve(
            "m", folder / "half_plus", monitoring_config_file=str(monitoring), rest_api_max_body_bytes=10_000
        ) as server,
        Client(server.url, server.grpc_target, "m") as client,
    ):
        server.wait_available()
        for path in ("healthz", "readyz", "models"):
            assert json.loads(get(f"{server.url}/{path}")) == {"models": {"m": {"versions": ["3"]}}}
        client.predict([1.0])
        client.predict_grpc({"x": np.float32([1])})
        for body, status, message in ((["x"], 400, "not of expected type: float"), ([1.0] * 9000, 413, "10000 bytes")):
            with pytest.raises(ServingError, match=message) as caught:
                client.predict(body)
            assert caught.value.status == status
        page = get(f"{server.url}/metrics").decode()
        for line in (
            "# TYPE {}request_count counter",
            '{}request_count{{model_name="m",status="OK"}} 2',
            '{}request_latency_bucket{{model_name="m",API="predict",entrypoint="REST",le="10"}} 0',
            '{}request_latency_count{{model_name="m",API="Predict",entrypoint="GRPC"}} 1',
            '{}runtime_latency_bucket{{model_name="m",API="Predict",runtime="TF1",le="+Inf"}} 2',
        ):
            assert line.format(":tensorflow:serving:") in page.splitlines()


@pytest.mark.parametrize(
    ("bound", "size", "status", "message"),
    [(200 << 20, 101 << 20, 400, b"100 MiB"), (10_000, 10_001, 413, b"10000 bytes"), (10_000, 10_000, 200, b"4.0")],
)
def test_what_inflates_beyond_a_bound_is_refused(bound, size, status, message, folder):
    with serve("m", folder / "half_plus", rest_api_max_body_bytes=bound) as server:
        server.wait_available()
        body = gzip.compress(b'{"instances": [2.0]}'.ljust(size))
        asked = urllib.request.Request(f"{server.url}/v1/models/m:predict", body, {"Content-Encoding": "gzip"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as response:
                answer = response.status, response.read()
        except urllib.error.HTTPError as error:
            answer = error.code, error.read()
        assert answer[0] == status
        assert message in answer[1]


def test_a_call_past_its_deadline_is_answered_504(folder, monkeypatch):
    run = backends.SavedModel.run
    slow = serve("m", folder / "half_plus", rest_api_timeout_in_ms=200)
    with slow as server, Client(server.url, model="m") as client:
        server.wait_available()
        monkeypatch.setattr(backends.SavedModel, "run", lambda *arguments: time.sleep(1) or run(*arguments))
        with pytest.raises(ServingError) as caught:
            client.predict([1.0])
        assert caught.value.status == 504


def test_multi_inference_runs_each_task(folder):
    from tensorflow_serving.apis import inference_pb2, prediction_service_pb2_grpc

    request = inference_pb2.MultiInferenceRequest()
    for signature, method in (("regress_x_to_y", "regress"), ("classify_x_to_y", "classify")):
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "m", signature
    example = request.input.example_list.examples.add()
    example.features.feature["x"].float_list.value.append(2.0)
    with serve("m", folder / "half_plus") as server, grpc.insecure_channel(server.grpc_target) as channel:
        server.wait_available()
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        regressed, classified = stub.MultiInference(request, timeout=30).results
        assert regressed.regression_result.regressions[0].value == 4.0
        assert classified.classification_result.classifications[0].classes[0].score == 4.0
        assert classified.model_spec.version.value == 3
        request.tasks[1].model_spec.signature_name = "regress_x_to_y"
        with pytest.raises(grpc.RpcError) as caught:
            stub.MultiInference(request, timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Duplicate evaluation of signature" in caught.value.details()


def test_large_tensors_pass_over_grpc(folder):
    with serve("m", folder / "half_plus") as server, Client(server.url, server.grpc_target, "m") as client:
        server.wait_available()
        x = np.arange(2_000_000, dtype=np.float32).reshape(-1, 1)  # 8 MB, twice the stock limit
        np.testing.assert_allclose(client.predict_grpc({"x": x})["y"], 0.5 * x + 3)


@pytest.mark.parametrize("rows", [10, 100_000])
def test_large_messages_are_read_and_written_off_the_event_loop(rows, folder, monkeypatch):
    from tensorflow_serving.apis import classification_pb2, prediction_service_pb2_grpc

    from serving.server import messages, operations, tensors

    threads = {}
    for module, name in (
        (tensors, "from_protos"), (tensors, "to_proto"), (operations, "examples_of"), (messages, "fill_result"),
    ):  # fmt: skip
        function = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *arguments, name=name, function=function: (
                threads.update({name: threading.current_thread().name}) or function(*arguments)
            ),
        )
    with (
        serve("m", folder / "half_plus") as server,
        Client(server.url, server.grpc_target, "m") as client,
        grpc.insecure_channel(server.grpc_target, [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        server.wait_available()
        client.predict_grpc({"x": np.zeros((rows, 1), np.float32)})
        request = classification_pb2.ClassificationRequest()
        request.model_spec.name, request.model_spec.signature_name = "m", "classify_x_to_y"
        example = request.input.example_list.examples.add()
        example.features.feature["x"].float_list.value.append(2.0)
        request.input.example_list.examples.extend([example] * (rows - 1))
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Classify(request, timeout=60)
        assert len(answer.result.classifications) == rows
    assert len(threads) == 4
    assert {thread == "server" for thread in threads.values()} == {rows == 10}
