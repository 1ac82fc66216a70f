"""The protocol beyond single requests: flags, configurations, versions that come and go, tensors, metrics.

What is expected here is what the stock server's code or tests say; each test names where.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from course.core import flags
from course.core.errors import InputError
from serving.server import backends, health, serve, tensors, warmup
from serving.server.__main__ import _WITHOUT_EFFECT, _own
from serving.server.metrics import Metrics
from serving.server.settings import Settings, read_batching
from serving.server.signatures import DTYPES
from serving.server.status import StatusError
from tests import serving_models
from tests.serving_models import publish, wait_for
from tests.test_server_conformance import predict

FAST = {"file_system_poll_wait_seconds": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """half_plus/{1,2,3}: y = 0.5 x + version."""
    folder = tmp_path_factory.mktemp("contract")
    serving_models.save_versions(folder / "half_plus", 3)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """A server of version 3, for what leaves it as it is."""
    with serve("m", folder / "half_plus") as server:
        server.wait_available()
        yield server


def break_version(base, number):
    """Put a version under `base` that cannot be loaded."""
    (base / str(number)).mkdir(parents=True)
    (base / str(number) / "saved_model.pb").write_bytes(b"nothing that can be loaded")


def entry(name, base, extra=""):
    """A model's entry in a models.config."""
    return f'config {{ name: "{name}" base_path: "{base}" model_platform: "tensorflow" {extra} }}'


def reload(target, *entries):
    """HandleReloadConfigRequest; returns the status in the answer."""
    request = text_format.Parse(f"config {{ model_config_list {{ {' '.join(entries)} }} }}", ReloadConfigRequest())
    with grpc.insecure_channel(target) as channel:
        return ModelServiceStub(channel).HandleReloadConfigRequest(request, timeout=60).status


def ask(target, name="m", x=2.0):
    """Predict over gRPC: the value of y."""
    (y,) = predict(target, name, [x])
    return y


# --- flags ------------------------------------------------------------------------------------------------------------

STOCK_FLAGS = """port grpc_socket_path rest_api_port rest_api_num_threads rest_api_timeout_in_ms
rest_api_enable_cors_support enable_batching allow_version_labels_for_unavailable_models
force_allow_any_version_labels_for_unavailable_models batching_parameters_file enable_per_model_batching_parameters
model_config_file model_config_file_poll_wait_seconds model_name model_base_path num_load_threads num_unload_threads
max_num_load_retries load_retry_interval_micros file_system_poll_wait_seconds flush_filesystem_caches
tensorflow_session_parallelism tensorflow_session_config_file tensorflow_intra_op_parallelism
tensorflow_inter_op_parallelism use_alts_credentials ssl_config_file platform_config_file
per_process_gpu_memory_fraction saved_model_tags grpc_channel_arguments grpc_max_threads enable_model_warmup
num_request_iterations_for_warmup monitoring_config_file remove_unused_fields_from_bundle_metagraph
prefer_tflite_model num_tflite_pools num_tflite_interpreters_per_pool enable_signature_method_name_check
xla_cpu_compilation_enabled xla_gpu_compilation_enabled enable_profiler thread_pool_factory_config_file mixed_precision
skip_initialize_tpu enable_grpc_healthcheck_service enable_serialization_as_tensor_content"""


def test_every_stock_flag_is_known():
    """Source: main.cc's flag list; --version is apart."""
    ours = Settings.__dataclass_fields__.keys()
    assert not [name for name in STOCK_FLAGS.split() if name not in ours and name not in _WITHOUT_EFFECT]
    assert not _WITHOUT_EFFECT & ours


def test_flags_without_effect_are_told_and_others_kept(capsys):
    given_ = [
        "--grpc_max_threads=8",
        "--enable_profiler",
        "--use_alts_credentials=false",
        "--saved_model_tags=serve,gpu",
    ]
    parsed = flags.read(Settings(), _own([*given_, "--enable_batching=false", "--port=1"]), prog="server")
    assert (parsed.saved_model_tags, parsed.enable_batching, parsed.port) == ("serve,gpu", False, 1)
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"--{name} has no effect in the embedded server"
        for name in ("grpc_max_threads", "enable_profiler", "use_alts_credentials")
    ]
    with pytest.raises(InputError, match="no ALTS here"):
        _own(["--use_alts_credentials"])
    with pytest.raises(InputError, match="--no_such_flag"):
        flags.read(Settings(), _own(["--no_such_flag=1"]), prog="server")


def test_the_version_is_told_at_once():
    ended = subprocess.run(
        [sys.executable, "-m", "serving.server", "--version"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    assert "TensorFlow Library: " in ended.stdout


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"grpc_channel_arguments": "grpc.max_connection_age_ms"}, "give name=value"),
        ({"enable_batching": False, "batching_parameters_file": "b"}, "--enable_batching is false"),
        ({"ssl_config_file": "/nowhere/ssl"}, "cannot read /nowhere/ssl"),
        ({"tensorflow_session_config_file": "/nowhere/session"}, "cannot read /nowhere/session"),
        (
            {
                "tensorflow_session_parallelism": 2,
                "tensorflow_intra_op_parallelism": 2,
                "tensorflow_inter_op_parallelism": 2,
            },
            "not all three",
        ),
    ],
)
def test_flags_that_contradict_one_another(given_, message):
    """Source: server.cc BuildAndStart."""
    with pytest.raises(InputError, match=message):
        Settings(**given_)


def test_the_session_config(tmp_path):
    """Source: server.cc BuildAndStart and main.cc: flags override the file."""
    path = tmp_path / "session.config"
    path.write_text(
        "intra_op_parallelism_threads: 3 # a comment\ninter_op_parallelism_threads: 5 use_per_session_threads: true"
    )
    config = Settings(tensorflow_session_config_file=str(path), tensorflow_intra_op_parallelism=7).session_config()
    assert (config.intra_op_parallelism_threads, config.inter_op_parallelism_threads) == (7, 5)
    config = Settings(tensorflow_session_parallelism=2, per_process_gpu_memory_fraction=0.25).session_config()
    assert (config.intra_op_parallelism_threads, config.inter_op_parallelism_threads) == (2, 2)
    assert config.gpu_options.per_process_gpu_memory_fraction == 0.25


def test_grpc_options_are_numbers_where_they_can_be():
    """Source: server.cc parseGrpcChannelArgs."""
    options = Settings(grpc_channel_arguments="grpc.max_connection_age_ms=2000,grpc.primary_user_agent=x").grpc_options
    assert options == [("grpc.max_connection_age_ms", 2000), ("grpc.primary_user_agent", "x")]


def test_the_tags_choose_the_graph(folder):
    backends.load(folder / "half_plus" / "1", Settings()).close()
    with pytest.raises(StatusError, match="tag"):
        backends.load(folder / "half_plus" / "1", Settings(saved_model_tags="serve,gpu"))


def test_batching_parameters_of_each_model(folder, tmp_path):
    """Source: bundle_factory_util.cc GetPerModelBatchingParams and its test; main.cc's help of the flag."""
    common = tmp_path / "batching.config"
    common.write_text("max_batch_size { value: 4 } num_batch_threads { value: 3 }")
    one = Settings(batching_parameters_file=str(common))
    each = Settings(batching_parameters_file=str(common), enable_per_model_batching_parameters=True)
    (tmp_path / "batching_params.pbtxt").write_text("max_batch_size { value: 10 } num_batch_threads { value: 9 }")
    assert one.batching_for(tmp_path) == one.batching
    mine = each.batching_for(tmp_path)
    assert (mine.enabled, mine.max_batch_size, mine.num_batch_threads) == (True, 10, 3)  # threads are of all models
    assert not each.batching_for(tmp_path / "elsewhere").enabled
    shutil.copytree(folder / "half_plus" / "1", tmp_path / "m" / "1")
    (tmp_path / "m" / "1" / "batching_params.pbtxt").write_text("max_batch_size { value: 0 }")
    with serve("m", tmp_path / "m", enable_per_model_batching_parameters=True) as server:
        with pytest.raises(StatusError, match="max_batch_size is 0") as caught:
            server.wait_available(1)
        assert caught.value.code == "INVALID_ARGUMENT"


def test_large_batch_splitting_names_the_largest_run(tmp_path):
    """Source: bundle_factory_util.h: allowed sizes end with max_execution_batch_size when batches are split."""
    path = tmp_path / "batching.config"
    path.write_text(
        "max_batch_size { value: 128 } enable_large_batch_splitting { value: true }"
        " max_execution_batch_size { value: 16 } allowed_batch_sizes: [8, 16]"
    )
    assert read_batching(path).max_batch_size == 16


def test_grpc_over_tls(folder, tmp_path):
    """Source: server.cc BuildServerCredentialsFromSSLConfigFile; config/ssl_config.proto."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem",
        shell=True, cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    key, cert = ((tmp_path / name).read_text() for name in ("key.pem", "cert.pem"))
    config = tmp_path / "ssl.config"
    config.write_text(f"server_key: {json.dumps(key)} server_cert: {json.dumps(cert)} client_verify: false")
    request = text_format.Parse('model_spec { name: "m" }', GetModelStatusRequest())
    with serve("m", folder / "half_plus", ssl_config_file=str(config)) as server:
        server.wait_available()
        credentials = grpc.ssl_channel_credentials(cert.encode())
        with grpc.secure_channel(server.grpc_target, credentials) as channel:
            assert ModelServiceStub(channel).GetModelStatus(request, timeout=20).model_version_status
        with grpc.insecure_channel(server.grpc_target) as channel, pytest.raises(grpc.RpcError):
            ModelServiceStub(channel).GetModelStatus(request, timeout=5)


def test_the_health_service(folder, server):
    """Source: grpc/src/cpp/server/health/default_health_check_service.cc, which the stock flag turns on."""
    messages = health._messages()

    def stub(channel, method, kind):
        return getattr(channel, kind)(
            f"/grpc.health.v1.Health/{method}",
            request_serializer=messages["HealthCheckRequest"].SerializeToString,
            response_deserializer=messages["HealthCheckResponse"].FromString,
        )

    start = time.monotonic()
    with (
        serve("m", folder / "half_plus", enable_grpc_healthcheck_service=True) as healthy,
        grpc.insecure_channel(healthy.grpc_target) as channel,
    ):
        check = stub(channel, "Check", "unary_unary")
        for service in ("", "tensorflow.serving.PredictionService"):
            assert check(messages["HealthCheckRequest"](service=service), timeout=20).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            check(messages["HealthCheckRequest"](service="nope"), timeout=20)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub(channel, "Watch", "unary_stream")
        assert next(watch(messages["HealthCheckRequest"](service="nope"), timeout=20)).status == 3
        watching = watch(messages["HealthCheckRequest"]())
        assert next(watching).status == 1
        healthy.wait_available()
    assert time.monotonic() - start < 25  # a watcher does not hold up the end
    with grpc.insecure_channel(server.grpc_target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            stub(channel, "Check", "unary_unary")(messages["HealthCheckRequest"](), timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_compressed_requests_and_answers_in_one_piece(folder):
    """Source: predict_util.cc PostProcessPredictionResult (kAsProtoContent); gRPC itself inflates requests."""
    request = text_format.Parse(
        'model_spec { name: "m" } inputs { key: "x" value { dtype: DT_FLOAT tensor_shape { dim { size: 2 } } '
        "float_val: 2 float_val: 4 } }",
        PredictRequest(),
    )
    with (
        serve("m", folder / "half_plus", enable_serialization_as_tensor_content=True) as server,
        grpc.insecure_channel(server.grpc_target, compression=grpc.Compression.Gzip) as channel,
    ):
        server.wait_available()
        y = PredictionServiceStub(channel).Predict(request, timeout=20).outputs["y"]
    assert not y.float_val
    assert np.frombuffer(y.tensor_content, np.float32).tolist() == [4.0, 5.0]


def test_the_method_names_of_signatures(tmp_path):
    """Source: classifier.cc, regressor.cc, predict_util.cc VerifySignature, with the check on."""
    serving_models.save_graph(tmp_path / "m" / "1", serving_models.half_plus(1))
    serving_models.save_graph(tmp_path / "odd" / "1", lambda tf: {
        "serving_default": ("my/own", {"x": (x := tf.placeholder(tf.float32, [None], "x"))}, {"y": x + 1.0})
    })  # fmt: skip
    config = tmp_path / "models.config"
    config.write_text(f"model_config_list {{ {entry('m', tmp_path / 'm')} {entry('odd', tmp_path / 'odd')} }}")

    def post(server, path, body):
        asked = urllib.request.Request(f"{server.url}/v1/models/{path}", json.dumps(body).encode())
        try:
            with urllib.request.urlopen(asked, timeout=20) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    with serve(model_config_file=str(config), enable_signature_method_name_check=True) as server:
        for name in ("m", "odd"):
            server.manager.wait_available(name)
        status, error = post(server, "m:classify", {"signature_name": "regress_x_to_y", "examples": [{"x": 1.0}]})
        assert status == 400
        assert error.startswith(
            "Expected classification signature method_name to be tensorflow/serving/classify. Was: "
            "tensorflow/serving/regress"
        )
        with pytest.raises(grpc.RpcError) as caught:
            predict(server.grpc_target, "odd", [1.0])
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "Was: my/own" in caught.value.details()
        assert post(server, "odd:predict", {"instances": [1.0]})[0] == 500
        assert ask(server.grpc_target, "m") == 2.0
    with serve(model_config_file=str(config)) as server:
        server.manager.wait_available("odd")
        assert post(server, "odd:predict", {"instances": [1.0]}) == (200, {"predictions": [2.0]})


# --- configurations ---------------------------------------------------------------------------------------------------


def test_a_reload_adds_and_removes_models(folder, tmp_path):
    """Source: server_core_test.cc ReloadConfigUnloadsModels, ReloadConfigHandlesLoadingAPreviouslyUnloadedModel."""
    base = folder / "half_plus"
    with serve("m", base, **FAST) as server:
        server.wait_available()
        assert reload(server.grpc_target, entry("m", base), entry("n", base)).error_code == 0
        assert ask(server.grpc_target, "n") == 4.0  # answered once it serves
        assert reload(server.grpc_target).error_code == 0  # an empty list: no models
        wait_for(lambda: all(server.manager.statuses(name)[0][1] == "END" for name in ("m", "n")))
        with pytest.raises(grpc.RpcError) as caught:
            ask(server.grpc_target)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert reload(server.grpc_target, entry("m", base)).error_code == 0
        assert ask(server.grpc_target) == 4.0


def test_a_reload_waits_while_the_version_it_wants_is_unloaded(folder):
    base = folder / "half_plus"
    again = text_format.Parse(f"config {{ model_config_list {{ {entry('m', base)} }} }}", ReloadConfigRequest())
    with (
        serve("m", base, file_system_poll_wait_seconds=0) as server,
        grpc.insecure_channel(server.grpc_target) as channel,
    ):
        server.wait_available()
        with server.manager.lease("m"):  # a request under way: the version stays UNLOADING
            reload(server.grpc_target)
            wait_for(lambda: server.manager.statuses("m")[0][1] == "UNLOADING")
            waiting = ModelServiceStub(channel).HandleReloadConfigRequest.future(again, timeout=60)
            time.sleep(0.3)
            assert not waiting.done()
        assert waiting.result().status.error_code == 0
        assert ask(server.grpc_target) == 4.0


def test_reloads_that_wait_do_not_hold_up_the_end(folder, tmp_path):
    break_version(tmp_path / "broken", 1)
    request = text_format.Parse(
        f"config {{ model_config_list {{ {entry('broken', tmp_path / 'broken')} }} }}", ReloadConfigRequest()
    )
    an_hour = {"max_num_load_retries": 1, "load_retry_interval_micros": 3_600_000_000}
    with contextlib.ExitStack() as stack:
        with serve("m", folder / "half_plus", **an_hour) as server:
            channel = stack.enter_context(grpc.insecure_channel(server.grpc_target))
            reloads = [ModelServiceStub(channel).HandleReloadConfigRequest.future(request) for _ in range(3)]
            wait_for(lambda: server.manager.statuses("broken")[0][1] == "LOADING")
            start = time.monotonic()
        assert time.monotonic() - start < 10
        for reload in reloads:
            assert (reload.code(), reload.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is stopping")


def test_a_reload_says_which_models_did_not_become_available(folder, tmp_path):
    """Source: server_core.cc WaitUntilModelsAvailable."""
    break_version(tmp_path / "broken", 7)
    with serve("m", folder / "half_plus") as server:
        server.wait_available()
        with pytest.raises(grpc.RpcError) as caught:
            reload(server.grpc_target, entry("m", folder / "half_plus"), entry("broken", tmp_path / "broken"))
        assert caught.value.code() is grpc.StatusCode.UNKNOWN
        assert caught.value.details().startswith("1 model(s) did not become available: {{name: broken} due to error: ")
        assert ask(server.grpc_target) == 4.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('config { name: "m" base_path: "/x" }', "Illegal setting neither"),
        (
            'config { name: "m" base_path: "/x" model_type: TENSORFLOW model_platform: "tensorflow" }',
            "Illegal setting both",
        ),
        ('config { name: "m" base_path: "/x" model_type: OTHER }', "model_type choice OTHER not supported"),
        ('config { name: "n" base_path: "/x" model_platform: "caffe" }', "Model n requests unsupported platform caffe"),
        ('config { name: "m" base_path: "/x" model_platform: "caffe" }', "Illegal to change a model's platform"),
        (
            'config { name: "m" base_path: "x" model_platform: "tensorflow" }',
            "Expected model m to have an absolute path",
        ),
        ('config { name: "m" model_platform: "tensorflow" }', "to have an absolute path or URI; got base_path()="),
    ],
)
def test_configurations_that_are_refused(text, message, server):
    """Source: server_core.cc GetPlatform, ValidateModelConfigList, ValidateNoModelsChangePlatforms."""
    with pytest.raises(grpc.RpcError) as caught:
        reload(server.grpc_target, text)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.details()
    assert list(server.manager.models_configured) == ["m"]  # all is as it was
    assert ask(server.grpc_target) == 4.0


def test_the_deprecated_model_type(folder, tmp_path):
    """Source: server_core_test.cc DeprecatedModelTypeConfig."""
    config = tmp_path / "models.config"
    config.write_text(
        f'# a comment\nmodel_config_list {{ config {{ name: "m" base_path: "{folder / "half_plus"}" '
        "model_type: TENSORFLOW } }"
    )
    with serve(model_config_file=str(config)) as server:
        server.manager.wait_available("m")


def test_labels_move_by_force(folder):
    """Source: server_core.cc UpdateModelVersionLabelMap."""
    base, labelled = folder / "half_plus", 'version_labels {{ key: "stable" value: {} }}'
    moves = [labelled.format(3), labelled.format(9)]
    with serve("m", base, allow_version_labels_for_unavailable_models=True) as server:
        server.wait_available()
        assert reload(server.grpc_target, entry("m", base, moves[0])).error_code == 0
        with pytest.raises(grpc.RpcError, match="not currently available"):
            reload(server.grpc_target, entry("m", base, moves[1]))
        assert reload(server.grpc_target, entry("m", base, 'version_labels { key: "new" value: 9 }')).error_code == 0
    with serve("m", base, force_allow_any_version_labels_for_unavailable_models=True) as server:
        server.wait_available()
        for move in moves:
            assert reload(server.grpc_target, entry("m", base, move)).error_code == 0


def test_the_config_file_may_vanish_and_come_back(folder, tmp_path, capsys):
    """Source: server.cc PollFilesystemAndReloadConfig: a file that cannot be read changes nothing; server_core.cc
    ReloadConfig: nor does one without a list, as a file that is empty because it is being written."""
    config = tmp_path / "models.config"

    def write(text):
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").rename(config)

    said = []

    def told_of(troubles):
        said.extend(line for line in capsys.readouterr().err.splitlines() if "not applied" in line)
        return len(said) == len(troubles) and all(map(str.__contains__, said, troubles))

    write(f"model_config_list {{ {entry('m', folder / 'half_plus')} }}")
    with serve(model_config_file=str(config), model_config_file_poll_wait_seconds=0.05) as server:
        server.manager.wait_available("m")
        config.unlink()
        troubles = [config.name]
        wait_for(lambda: told_of(troubles))
        for text, trouble in (("model_config_list { this is no config", "text proto"), ("", "legal to transition")):
            write(text)
            troubles.append(trouble)
            wait_for(lambda: told_of(troubles))
        time.sleep(0.3)  # some looks more
        assert server.manager.models() == {"m": [3]}
        assert ask(server.grpc_target) == 4.0
        latest = "model_version_policy { latest { num_versions: 2 } }"
        write(f"model_config_list {{ {entry('m', folder / 'half_plus', latest)} }}")
        wait_for(lambda: server.manager.models() == {"m": [3, 2]})
        write("model_config_list {}")
        wait_for(lambda: server.manager.models() == {})
    assert told_of(troubles)  # once of each, not at every look


def test_another_policy_and_another_folder(folder, tmp_path):
    base = tmp_path / "other"
    publish(folder / "half_plus" / "1", base, "9")
    specific = "model_version_policy {{ specific {{ versions: {} }} }}"
    with serve("m", folder / "half_plus", **FAST) as server:
        server.wait_available(3)
        reload(server.grpc_target, entry("m", folder / "half_plus", specific.format(1)))
        wait_for(lambda: server.manager.models() == {"m": [1]})
        assert ask(server.grpc_target) == 2.0
        reload(server.grpc_target, entry("m", folder / "half_plus", specific.format(77)))
        wait_for(lambda: server.manager.models() == {"m": []})  # it asks for a version that is not there
        reload(server.grpc_target, entry("m", base))
        wait_for(lambda: server.manager.models() == {"m": [9]})
        assert ask(server.grpc_target) == 2.0


# --- versions ---------------------------------------------------------------------------------------------------------


def test_names_of_version_folders(folder, tmp_path):
    """Source: file_system_storage_path_source.cc IndexChildrenByVersion: 64 bits, and the last spelling counts."""
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, "0005")
    publish(folder / "half_plus" / "2", base, "5")
    publish(folder / "half_plus" / "3", base, "9223372036854775808")  # one more than 64 bits hold
    publish(folder / "half_plus" / "3", base, "five")
    with serve("m", base, **FAST) as server:
        server.wait_available(5)
        assert [number for number, _, _ in server.manager.statuses("m")] == [5]
        assert ask(server.grpc_target) == 3.0
        publish(folder / "half_plus" / "3", base, "9223372036854775807")
        server.wait_available(9223372036854775807)
        with urllib.request.urlopen(f"{server.url}/v1/models/m", timeout=20) as response:
            newest = json.load(response)["model_version_status"][0]
        assert newest["version"] == "9223372036854775807"


def test_a_folder_that_comes_later_and_a_version_that_comes_back(folder, tmp_path):
    base = tmp_path / "m"
    with serve("m", base, **FAST) as server:
        time.sleep(0.2)
        publish(folder / "half_plus" / "1", base, 1)
        server.wait_available(1)
        shutil.rmtree(base / "1")
        wait_for(lambda: server.manager.statuses("m")[0][1] == "END")
        publish(folder / "half_plus" / "2", base, "1")
        wait_for(lambda: server.manager.models() == {"m": [1]})
        assert ask(server.grpc_target) == 3.0


def test_a_version_is_tried_again(folder, tmp_path):
    """Source: main.cc's help of max_num_load_retries; core/loader_harness.cc: LOADING until the last attempt failed."""
    base = tmp_path / "m"
    break_version(base, 1)
    retry = {"max_num_load_retries": 2, "load_retry_interval_micros": 400_000}
    with serve("m", base, file_system_poll_wait_seconds=10, **retry) as server:
        wait_for(lambda: server.manager.statuses("m"))
        time.sleep(0.2)
        assert server.manager.statuses("m") == [(1, "LOADING", None)]
        shutil.copytree(folder / "half_plus" / "1", base / "1", dirs_exist_ok=True)
        server.wait_available(1, timeout=20)  # by the next attempt: no look would have come by now
    break_version(base, 2)
    with serve("m", base, file_system_poll_wait_seconds=10, **retry) as server:
        start = time.monotonic()
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "END")
        assert time.monotonic() - start > 0.7  # two further attempts
        assert server.manager.statuses("m", 2)[0][2].code
    with serve("m", base, **FAST, max_num_load_retries=1) as server:
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "LOADING")
        shutil.rmtree(base / "2")  # no longer wanted: the wait is over
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "END")
        server.wait_available(1)


def test_an_unloading_version_holds_up_no_other(folder, tmp_path):
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, 1)
    with serve("m", base, **FAST) as server:
        server.wait_available(1)
        with server.manager.lease("m", 1):  # a request that takes its time
            publish(folder / "half_plus" / "2", base, 2)
            server.wait_available(2)
            wait_for(lambda: server.manager.statuses("m", 1)[0][1] == "UNLOADING")
            publish(folder / "half_plus" / "3", base, 3)
            server.wait_available(3, timeout=20)
            assert server.manager.statuses("m", 1)[0][1] == "UNLOADING"
        wait_for(lambda: server.manager.statuses("m", 1)[0][1] == "END")


def test_warm_up_iterations(folder, tmp_path, monkeypatch):
    """Source: saved_model_warmup_util.cc RunSavedModelWarmup."""
    from tests.test_server_models import write_warm_up

    request = PredictRequest()
    tensors.to_content(np.ones((1, 1), np.float32), request.inputs["x"])
    shutil.copytree(folder / "half_plus" / "1", tmp_path / "1")
    write_warm_up(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests", [request] * 2)
    runs = []
    monkeypatch.setattr(warmup, "_replay", lambda model, record: runs.append(record))
    for given_, expected in ((0, 2), (1, 2), (3, 6)):
        runs.clear()
        warmup.warm_up(None, tmp_path / "1", given_)
        assert len(runs) == expected


# --- lists and metrics ------------------------------------------------------------------------------------------------


def test_the_list_of_models(folder, tmp_path):
    config = tmp_path / "models.config"
    config.write_text(f"model_config_list {{ {entry('m', folder / 'half_plus')} {entry('none', tmp_path / 'none')} }}")
    with serve(model_config_file=str(config)) as server:
        server.manager.wait_available("m")
        with urllib.request.urlopen(f"{server.url}/v1/models/", timeout=20) as response:
            assert response.headers["Content-Type"] == "application/json"
            listed = json.load(response)
        with urllib.request.urlopen(f"{server.url}/v1/models/m", timeout=20) as response:
            status = json.load(response)
        assert listed == {"models": [{"name": "m", **status}, {"name": "none", "model_version_status": []}]}
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{server.url}/v1/models", timeout=20)
        assert caught.value.code == 400
        assert b"listed with their versions at /v1/models/" in caught.value.read()


def test_metrics_of_loading(folder, tmp_path):
    """Source: tensorflow/cc/saved_model/loader.cc; saved_model_warmup_util.cc; util/prometheus_exporter_test.cc."""
    base = tmp_path / "m"
    publish(folder / "half_plus" / "1", base, 1)
    break_version(base, 2)
    monitoring = tmp_path / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    with serve("m", base, monitoring_config_file=str(monitoring)) as server:
        wait_for(lambda: server.manager.statuses("m", 2)[0][1] == "END")
        with urllib.request.urlopen(f"{server.url}/monitoring/prometheus/metrics?x=1", timeout=20) as response:
            assert response.headers["Content-Type"].startswith("text/plain")
            lines = response.read().decode().splitlines()
    cc, path = ":tensorflow:cc:saved_model:", base / "2"
    assert f"# TYPE {cc}load_attempt_count counter" in lines
    assert f'{cc}load_attempt_count{{model_path="{path}",status="fail"}} 1' in lines


def test_the_metrics_page_escapes_labels():
    """Source: util/prometheus_exporter_test.cc SanitizeLabelValue."""
    metrics = Metrics()
    with metrics.call('"abc\\"', "predict", "REST", is_served=True):
        pass
    assert ':tensorflow:serving:request_count{model_name="\\"abc\\\\\\"",status="OK"} 1' in metrics.page().splitlines()


def test_a_call_is_counted_by_its_outcome(capsys):
    metrics = Metrics()
    for error, code in ((StatusError("NOT_FOUND", ""), "NOT_FOUND"), (ValueError("x"), "INTERNAL")):
        with pytest.raises(StatusError) as caught, metrics.call("m", "predict", "REST", is_served=True):
            raise error
        assert caught.value.code == code
        assert f':tensorflow:serving:request_count{{model_name="m",status="{code}"}} 1' in metrics.page()
    told = capsys.readouterr().err
    assert "ValueError: x" in told  # with its trace, and of the refusal nothing
    assert "NOT_FOUND" not in told
    with metrics.call("made up", "predict", "REST", is_served=False):
        pass
    assert "made up" not in metrics.page()
    assert "request_latency" not in metrics.page()


# --- tensors ----------------------------------------------------------------------------------------------------------

NAMES = {number: name for number, (name, _) in DTYPES.items()}


def values_of(number):
    """A strategy for values of TensorFlow's DataType `number`, as its field of a TensorProto takes them."""
    name, numpy_type = DTYPES[number]
    if name == "string":
        return st.binary(max_size=5)
    if name == "bool":
        return st.booleans()
    if tensors._FIELDS[name] == "half_val":
        return st.integers(0, 2**16 - 1)
    if tensors._FIELDS[name] == "int_val":
        return st.integers(-(2**31), 2**31 - 1)  # more than uint8 and int16 hold: they are cut
    if np.issubdtype(np.dtype(numpy_type), np.integer):
        bounds = np.iinfo(numpy_type)
        return st.integers(int(bounds.min), int(bounds.max))
    return st.floats(width=32)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_tensors_are_read_as_tensorflow_reads_them(data):
    """Source: tensorflow/core/framework/tensor.cc, asked through tf.io.parse_tensor."""
    import tensorflow as tf
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    number = data.draw(st.sampled_from(sorted(DTYPES)))
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    message = TensorProto(dtype=number)
    for size in shape:
        message.tensor_shape.dim.add(size=size)
    values = data.draw(st.lists(values_of(number), max_size=2 * int(np.prod(shape)) + 2))
    getattr(message, tensors._FIELDS[NAMES[number]]).extend(values)
    if data.draw(st.booleans()):
        array = tensors.from_proto(message)
        message = TensorProto.FromString(tf.io.serialize_tensor(tf.constant(array, tf.as_dtype(number))).numpy())
        cut = data.draw(st.integers(0, 2))
        message.tensor_content = message.tensor_content[: max(1, len(message.tensor_content) - cut)]
    try:
        wanted = tf.io.parse_tensor(message.SerializeToString(), tf.as_dtype(number)).numpy()
    except tf.errors.InvalidArgumentError:
        with pytest.raises(StatusError):
            tensors.from_proto(message)
        return
    given_ = tensors.from_proto(message)
    assert given_.shape == np.shape(wanted)
    if number == 7:
        assert given_.reshape(-1).tolist() == np.asarray(wanted, np.object_).reshape(-1).tolist()
    else:
        assert given_.tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("number", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2), (70_000,)])
def test_arrays_are_written_as_tensorflow_writes_them(number, shape):
    """Element by element: what `extend` would write, whichever way it is written."""
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    name, numpy_type = DTYPES[number]
    flat = np.random.default_rng(0).integers(0, 2, int(np.prod(shape)) * 2)[: int(np.prod(shape))]
    if name == "string":
        array = np.array([b"a", b"bb"], np.object_)[flat].reshape(shape)
    else:
        array = flat.astype(numpy_type).reshape(shape)
    array = np.asarray(array, numpy_type)
    by_hand, message = TensorProto(dtype=number), TensorProto()
    by_hand.tensor_shape.SetInParent()
    for size in shape:
        by_hand.tensor_shape.dim.add(size=size)
    elements = array.reshape(-1)
    if tensors._FIELDS[name] == "half_val":
        elements = elements.view(np.uint16)
    if np.iscomplexobj(elements):
        elements = elements.view(elements.real.dtype)
    getattr(by_hand, tensors._FIELDS[name]).extend(elements.tolist())
    tensors.to_proto(array, message)
    assert message == by_hand
    np.testing.assert_array_equal(tensors.from_proto(message), array)


def test_a_short_list_of_values_does_not_fill_the_memory():
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    for sizes in ((2**31,), (2**40, 2**40), (10**6, 10**6)):
        message = TensorProto(dtype=1, float_val=[1.0])
        for size in sizes:
            message.tensor_shape.dim.add(size=size)
        with pytest.raises(StatusError):
            tensors.from_proto(message)
