"""The request log: what it keeps, what it drops, and that no request notices."""

import contextlib
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import text_format
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.inference_pb2 import MultiInferenceRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub
from tensorflow_serving.apis.regression_pb2 import RegressionRequest
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from course.core.errors import InputError
from serving import pipeline
from serving.client import Client
from serving.server import request_log, serve, spawn, tensors
from serving.server.metrics import Metrics
from serving.server.signatures import CLASSIFY, REGRESS
from serving.server.status import StatusError
from serving.server.warmup import FILE
from tests import serving_models
from tests.serving_models import wait_for


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of half_plus, y = 0.5 x + 2, with version 7."""
    base = tmp_path_factory.mktemp("models") / "half_plus"
    serving_models.save_graph(base / "7", serving_models.half_plus())
    return base


def config(base, prefix, rate=1.0, collector="tfrecord"):
    """The text of a models.config whose model `m` is logged."""
    return f"""model_config_list {{ config {{ name: "m" base_path: "{base}" model_platform: "tensorflow"
        logging_config {{ log_collector_config {{ type: "{collector}" filename_prefix: "{prefix}" }}
                          sampling_config {{ sampling_rate: {rate} }} }} }} }}"""


@pytest.fixture
def logged(base, tmp_path):
    """models.config with a log of every request at `tmp_path`/log/m: (the file's path, the prefix)."""
    path, prefix = tmp_path / "models.config", tmp_path / "log" / "m"
    path.write_text(config(base, prefix))
    return path, prefix


def example(x):
    message = Example()
    message.features.feature["x"].float_list.value.append(x)
    return message


def test_every_call_over_rest_and_grpc_is_logged_with_its_answer(logged):
    path, prefix = logged
    with serve("m", model_config_file=str(path)) as server, Client(server.url, server.grpc_target, "m") as client:
        server.wait_available()
        assert client.predict([2.0, 4.0]) == [3.0, 4.0]
        client.predict_grpc({"x": np.float32([6])})
        url = f"{server.url}/v1/models/m"
        for method, number in (("classify", 10.0), ("regress", 12.0)):
            body = {"signature_name": f"{method}_x_to_y", "examples": [{"x": number}]}
            httpx.post(f"{url}:{method}", json=body).raise_for_status()
        with grpc.insecure_channel(server.grpc_target) as channel:
            stub = PredictionServiceStub(channel)
            for kind, call, number in (
                (ClassificationRequest, stub.Classify, 14),
                (RegressionRequest, stub.Regress, 16),
            ):
                request = kind()
                request.model_spec.name = "m"
                request.model_spec.signature_name = f"{call._method.decode().rpartition('/')[2].lower()}_x_to_y"
                request.input.example_list.examples.append(example(number))
                call(request)
            request = MultiInferenceRequest()
            for name, method in (("classify_x_to_y", CLASSIFY), ("regress_x_to_y", REGRESS)):
                task = request.tasks.add(method_name=method)
                task.model_spec.name, task.model_spec.signature_name = "m", name
            request.input.example_list.examples.append(example(18))
            stub.MultiInference(request)
        assert httpx.post(f"{url}:predict", json={"instances": ["no number"]}).status_code == 400
    records = list(request_log.read(prefix))
    assert [record.WhichOneof("log_type") for record in records] == [
        "predict_log", "predict_log", "classify_log", "regress_log", "classify_log", "regress_log",
        "multi_inference_log",
    ]  # fmt: skip  # and not the refused one
    for record in records:
        spec = record.log_metadata.model_spec
        assert (spec.name, spec.version.value) == ("m", 7)
        assert record.log_metadata.sampling_config.sampling_rate == 1
        assert abs(record.log_metadata.timestamp_secs - time.time()) < 60
    rest, binary, classify, regress, classify_rpc, regress_rpc, multi = records
    for record, x in ((rest, [2, 4]), (binary, [6])):
        entry = record.predict_log
        assert tensors.from_proto(entry.request.inputs["x"]).reshape(-1).tolist() == x
        assert tensors.from_proto(entry.response.outputs["y"]).reshape(-1).tolist() == [value / 2 + 2 for value in x]
        assert entry.response.model_spec.version.value == 7
    assert rest.predict_log.request.model_spec.signature_name == "serving_default"
    for record, x in ((classify, 10), (classify_rpc, 14)):
        entry = record.classify_log
        assert entry.request.input.example_list.examples[0] == example(x)
        assert entry.request.model_spec.signature_name == "classify_x_to_y"
        assert entry.response.result.classifications[0].classes[0].score == x / 2 + 2
    for record, x in ((regress, 12), (regress_rpc, 16)):
        assert record.regress_log.request.input.example_list.examples[0] == example(x)
        assert record.regress_log.response.result.regressions[0].value == x / 2 + 2
    assert [result.WhichOneof("result") for result in multi.multi_inference_log.response.results] == [
        "classification_result", "regression_result",
    ]  # fmt: skip


def test_a_sample_is_logged_at_its_rate_and_nothing_without_a_config(base, tmp_path):
    path = tmp_path / "models.config"
    path.write_text(config(base, tmp_path / "log" / "m", rate=0.25))
    with serve("m", model_config_file=str(path)) as server, Client(server.url, model="m") as client:
        server.wait_available()
        for i in range(400):
            client.predict([float(i)])
    found = len(list(request_log.read(tmp_path / "log" / "m")))
    assert 60 < found < 140  # binomial(400, 0.25): mean 100, standard deviation 8.7

    metrics = Metrics()
    log = request_log.RequestLog(metrics)
    assert not log.samples("m")
    assert log._thread is None
    log.close()


def open_files(folder):
    """The files below a folder that this process holds open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(entry.readlink())
    return sorted(path for path in found if path.is_relative_to(folder) and path.suffix == ".tfrecord")


def test_a_new_config_moves_the_log_and_a_bad_one_leaves_everything_as_it_was(logged, base, tmp_path):
    path, prefix = logged
    other = tmp_path / "other" / "m"
    with serve("m", model_config_file=str(path)) as server, Client(server.url, model="m") as client:
        server.wait_available()
        client.predict([1.0])
        for text, code in (
            (config(base, other, rate=1.5), "INVALID_ARGUMENT"),
            (config(base, other, collector="pubsub"), "NOT_FOUND"),
            (config(base, ""), "INVALID_ARGUMENT"),
            (config(base, path / "below_a_file" / "m"), "FAILED_PRECONDITION"),
        ):
            with pytest.raises(StatusError) as refusal:
                server.manager.configure(text_format.Parse(text, ModelServerConfig()))
            assert refusal.value.code == code
        client.predict([2.0])
        wait_for(lambda: len(list(request_log.read(prefix))) == 2)  # readable at once, while the server runs
        assert [path.name for path in open_files(tmp_path)] == [path.name for path in request_log.shards(prefix)]
        server.manager.configure(text_format.Parse(config(base, other), ModelServerConfig()))
        client.predict([3.0])
        wait_for(lambda: open_files(tmp_path) == request_log.shards(other) != [])  # the other file has been ended
    assert len(list(request_log.read(prefix))) == 2
    assert len(list(request_log.read(other))) == 1


def test_what_the_queue_has_no_room_for_is_counted_and_dropped(tmp_path, monkeypatch):
    metrics = Metrics()
    log = request_log.RequestLog(metrics)
    model = text_format.Parse(config("/nowhere", tmp_path / "m"), ModelServerConfig()).model_config_list.config[0]
    log.follow(log.plan({"m": model}))
    monkeypatch.setattr(request_log, "WAITING_RECORDS", 3)
    monkeypatch.setattr(request_log, "WAITING_BYTES", 1000)
    version, signature = SimpleNamespace(name="m", number=1), SimpleNamespace(name="serving_default")
    log._thread = "not started"  # so that nothing leaves the queue
    for size in (100, 900, 50, 50, 1, 1):  # float32 values, 4 bytes each
        log.predict(version, signature, {"x": np.zeros(size, np.float32)}, {})
    assert len(log._queue) == 3  # 100, 50, 50 are in; 900 values are too many bytes, two more too many records
    assert 'request_log_count{model_name="m",status_code="RESOURCE_EXHAUSTED"} 3' in metrics.page()


def test_a_disk_that_refuses_fails_no_request(logged, capfd):
    path, prefix = logged
    with serve("m", model_config_file=str(path)) as server, Client(server.url, model="m") as client:
        server.wait_available()
        (prefix.parent).rmdir()
        prefix.parent.write_text("a file in the folder's place")
        for i in range(3):
            assert client.predict([2.0 * i]) == [2.0 + i]
        wait_for(lambda: not server.manager.request_log._bytes)  # until they have been tried
        prefix.parent.unlink()
        prefix.parent.mkdir()
        client.predict([8.0])
    assert [tensors.from_proto(record.predict_log.request.inputs["x"])[0] for record in request_log.read(prefix)] == [8]
    assert capfd.readouterr().err.count("a request could not be logged") == 1


def test_files_are_bounded_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "SHARD_BYTES", 1000)
    monkeypatch.setattr(request_log, "TOTAL_BYTES", 5000)
    shards = request_log.Shards(tmp_path / "m")
    (tmp_path / "m-other.tfrecord").write_bytes(b"another's file")
    for i in range(200):
        shards.write(b"%100d" % i)
    shards.close()
    paths = request_log.shards(tmp_path / "m")
    assert 4 <= len(paths) <= 6
    assert all(path.stat().st_size <= 1200 for path in paths)
    kept = [int(record) for path in paths for record in request_log._records(path)]
    assert kept == list(range(kept[0], 200))
    assert (tmp_path / "m-other.tfrecord").exists()


def test_a_torn_end_costs_the_last_record_only(tmp_path, capsys):
    shards = request_log.Shards(tmp_path / "m")
    for i in range(3):
        shards.write(b"record %d" % i)
    shards.close()
    (path,) = request_log.shards(tmp_path / "m")
    whole = path.read_bytes()
    each = len(whole) // 3
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert list(request_log._records(path)) == [b"record %d" % i for i in range(cut // each)]
    assert "torn or damaged" in capsys.readouterr().err


def written(prefix, sitting):
    """The input of every request in the files from the `sitting`th on."""
    return [
        tensors.from_proto(record.predict_log.request.inputs["x"])[0]
        for shard in request_log.shards(prefix)[sitting:]
        for record in map(request_log.PredictionLog.FromString, request_log._records(shard))
    ]


def test_kill_9_leaves_whole_records_and_the_next_server_goes_on(logged):
    path, prefix = logged
    for sitting in range(2):
        with spawn("m", model_config_file=path) as server, Client(server.url, model="m") as client:
            server.wait_available()
            answered = 0
            stop = time.monotonic() + 1
            while time.monotonic() < stop:
                client.predict([float(answered)])
                answered += 1
            wait_for(lambda sitting=sitting, answered=answered: len(written(prefix, sitting)) == answered)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        assert written(prefix, sitting) == list(range(answered))
    assert len(request_log.shards(prefix)) == 2


def test_sigterm_writes_what_waits(logged):
    path, prefix = logged
    with spawn("m", model_config_file=path) as server, Client(server.url, model="m") as client:
        server.wait_available()
        for i in range(50):
            client.predict([float(i)])
    assert len(list(request_log.read(prefix))) == 50


def test_a_log_becomes_a_warm_up_file_that_the_server_plays(logged, base, tmp_path, capsys):
    path, prefix = logged
    with serve("m", model_config_file=str(path)) as server, Client(server.url, model="m") as client:
        server.wait_available()
        for x in (1.0, 2.0, 1.0, 3.0, 2.0):
            client.predict([x], version=7)
        body = {"signature_name": "regress_x_to_y", "examples": [{"x": 1.0}]}
        httpx.post(f"{server.url}/v1/models/m:regress", json=body).raise_for_status()
    version = tmp_path / "candidate" / "8"
    serving_models.save_graph(version, serving_models.half_plus(3.0))
    assert request_log.write_warmup(prefix, version) == 4  # distinct ones

    pipeline.main(["warm-up", str(version), "--log", str(prefix), "--limit", "3"])
    assert capsys.readouterr().out == f"{version / FILE}: 3 requests\n"
    played = [request_log.PredictionLog.FromString(content) for content in request_log._records(version / FILE)]
    inputs = [tensors.from_proto(log.predict_log.request.inputs["x"])[0] for log in played[:2]]
    assert inputs == [3, 2]  # the newest, oldest first
    assert played[2].HasField("regress_log")
    assert not any(log.predict_log.HasField("response") or log.HasField("log_metadata") for log in played)
    with serve("m", version.parent) as server:
        server.wait_available(8)
    played[0].predict_log.request.inputs["x"].dtype = 7  # a string: it can no longer be played
    with request_log.files.atomic_path(version / FILE) as temporary:
        import tensorflow as tf

        with tf.io.TFRecordWriter(str(temporary)) as writer:
            writer.write(played[0].SerializeToString())
            writer.flush()
    with serve("m", version.parent) as server, pytest.raises(StatusError):
        server.wait_available(8)
    with pytest.raises(InputError, match="no request to another is logged"):
        request_log.write_warmup(prefix, version, model="another")
    with pytest.raises(InputError, match="is no version folder"):
        request_log.write_warmup(prefix, tmp_path)
    with pytest.raises(InputError, match="holds 1 to 1000 requests, not 1001"):
        request_log.write_warmup(prefix, version, limit=1001)
