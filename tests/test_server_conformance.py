"""The embedded server against every case of the protocol's two conformance files."""

import shutil
import time

import grpc
import pytest

from serving.server import serve
from tests import serving_conformance as conformance
from tests import serving_models
from tests.serving_models import wait_for

REST, GRPC = ({case["id"]: case for case in cases} for cases in (conformance.REST, conformance.GRPC))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with every fixture model and their models.config."""
    folder = tmp_path_factory.mktemp("conformance")
    serving_models.build_conformance(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """A server of all of them."""
    with serve(
        model_config_file=str(folder / "models.config"),
        allow_version_labels_for_unavailable_models=True,
        num_load_threads=2,
        grpc_socket_path=str(folder / "grpc.sock"),
    ) as server:
        for name in server.manager.models_configured:
            server.manager.wait_available(name, timeout=120)
        yield server


@pytest.fixture(scope="module")
def channel(server):
    """A gRPC channel to it."""
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


def predict(target, name, x):
    """Predict(x) of `name` over gRPC: the values of y."""
    request = {"model_spec": {"name": name}, "inputs": {"x": {"float_val": x}}}
    from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

    with grpc.insecure_channel(target) as channel:
        response = PredictionServiceStub(channel).Predict(conformance.grpc_request("Predict", request), timeout=30)
    return list(response.outputs["y"].float_val)


def test_the_case_files_are_whole():
    assert [len(conformance.CASES[kind]) for kind in ("rest_cases", "grpc_cases")] == [98, 14]
    more = [case for kind in ("rest_cases", "grpc_cases") for case in conformance.MORE[kind]]
    assert len(REST) + len(GRPC) == 98 + 14 + len(more)  # no name twice
    assert all(case["source"] and case["basis"] and case["expect"] for case in more)


@pytest.mark.parametrize(
    "name",
    [name for name, case in REST.items() if name not in conformance.NEEDS_CONTROL and "server_flags" not in case],
)
def test_rest(name, server):
    conformance.run_rest(REST[name], server.url)


@pytest.mark.parametrize("name", [name for name in GRPC if name not in conformance.NEEDS_CONTROL])
def test_grpc(name, channel):
    conformance.run_grpc(GRPC[name], channel)


def test_rest_with_cors(folder):
    with serve("hp2", folder / "hp2", rest_api_enable_cors_support=True) as server:
        server.wait_available()
        for case in REST.values():
            if "server_flags" in case:
                assert case["server_flags"] == ["--rest_api_enable_cors_support=true"]
                conformance.run_rest(case, server.url)


def test_ver_03_an_unloaded_version_stays_listed(folder, tmp_path):
    shutil.copytree(folder / "hp2v", tmp_path / "hp2v")
    with serve("hp2v", tmp_path / "hp2v", file_system_poll_wait_seconds=0.1) as server:
        server.wait_available(124)
        shutil.rmtree(tmp_path / "hp2v" / "00000124")
        server.wait_available(123)
        wait_for(lambda: server.manager.statuses("hp2v", 124)[0][1] == "END")
        conformance.run_rest(REST["ver-03"], server.url)


def test_grpc_08_a_folder_without_a_loadable_model(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"nothing that can be loaded")
    with serve("default", tmp_path) as server, grpc.insecure_channel(server.grpc_target) as channel:
        wait_for(lambda: server.manager.statuses("default")[0][1] == "END")
        conformance.run_grpc(GRPC["grpc-08"], channel)


@pytest.mark.parametrize(("case", "poll"), [("grpc-16", 1), ("grpc-17", 0)])
def test_config_reload(case, poll, folder, tmp_path):
    def entry(name, base):
        return (
            f'model_config_list {{ config {{ name: "{name}" base_path: "{folder / base}" '
            'model_platform: "tensorflow" } }'
        )

    config = tmp_path / "models.config"
    config.write_text(entry("half_plus_two", "hp2"))
    with serve(model_config_file=str(config), model_config_file_poll_wait_seconds=poll) as server:
        server.manager.wait_available("half_plus_two")
        config.write_text(entry("half_plus_three", "half_plus_three"))
        if case == "grpc-16":
            server.manager.wait_available("half_plus_three", timeout=10)
            assert predict(server.grpc_target, "half_plus_three", [2.0]) == [4.0]
        else:
            time.sleep(1.5)
            assert list(server.manager.models_configured) == ["half_plus_two"]
            assert predict(server.grpc_target, "half_plus_two", [2.0]) == [3.0]


def test_grpc_19_over_a_unix_socket(folder, server):
    assert predict(f"unix:{folder / 'grpc.sock'}", "hp2", [2.0]) == GRPC["grpc-19"]["expect"]["y"]
