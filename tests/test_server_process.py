"""The server as a process: its flags, its start and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from course.core import flags
from course.core.errors import InputError
from serving import client as client_module
from serving.client import Client, ServingError
from serving.server import serve, spawn
from serving.server.__main__ import _own, _stop_at_end_of_input
from serving.server.settings import Settings, read_batching
from tests import serving_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model with one version."""
    folder = tmp_path_factory.mktemp("process") / "half_plus"
    serving_models.save_graph(folder / "1", serving_models.half_plus())
    return folder


def test_a_child_serves_and_is_reaped(folder):
    with spawn("m", folder, enable_batching=False) as server:
        server.wait_available()
        with Client(server.url, server.grpc_target, "m") as client:
            assert client.predict([2.0]) == [3.0]
            assert client.predict_grpc({"x": np.float32([2.0])})["y"] == [3.0]
        server.process.send_signal(signal.SIGTERM)  # leaving the block sends another, which is no harm
    assert server.process.returncode == 0  # it drained: SIGTERM alone would have left -15


def test_a_child_ends_with_its_parent(monkeypatch):
    read, write = os.pipe()
    stopped = threading.Event()
    with os.fdopen(read) as monkeypatched:
        monkeypatch.setattr(sys, "stdin", monkeypatched)
        running = SimpleNamespace(stop=stopped.set)
        thread = threading.Thread(target=_stop_at_end_of_input, args=(running,))
        thread.start()
        os.write(write, b"what is written is of no account")
        assert not stopped.wait(0.2)
        os.close(write)  # as the kernel does for a parent that is killed
        assert stopped.wait(10)
        thread.join()


def test_a_taken_port_is_one_clear_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "serving.server",
                f"--rest_api_port={port}",
                "--port=-1",
                f"--model_base_path={folder}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 2
        assert ended.stderr.splitlines() == [
            f"error: cannot listen on 127.0.0.1:{port}: the port is taken, or not ours to take; choose another with "
            "--rest_api_port (-1 takes any free one)"
        ]
        with pytest.raises(InputError, match=rf"127.0.0.1:{port}.*--port"), serve("m", folder, grpc_port=port):
            pass


def write_ssl(path, **fields):
    """Write an SSLConfig; texts are quoted."""
    path.write_text(" ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()))


@pytest.mark.parametrize("fault", ["socket path", "no certificate", "client_verify without custom_ca"])
def test_what_grpc_cannot_listen_with_is_one_clear_line(fault, folder, tmp_path):
    ssl, rubbish = tmp_path / "ssl.config", {"server_key": "no key", "server_cert": "no certificate"}
    write_ssl(ssl, **rubbish, client_verify=fault.startswith("client_verify"))
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    flag, message = {
        "socket path": (
            f"--grpc_socket_path={tmp_path}/none/grpc.sock",
            f"cannot listen on {tmp_path}/none/grpc.sock: give --grpc_socket_path a file in a folder that is there and "
            "ours to write to",
        ),
        "no certificate": (
            f"--ssl_config_file={ssl}",
            f"{ssl}: gRPC cannot use server_key, server_cert or custom_ca; give PEM texts, the key that of the "
            "certificate",
        ),
        "client_verify without custom_ca": (
            f"--ssl_config_file={ssl}",
            f"{ssl}: client_verify needs custom_ca, whose certificates clients show",
        ),
    }[fault]
    flags_ = [f"--rest_api_port={port}", "--port=-1", f"--model_base_path={folder}", flag]
    ended = subprocess.run(
        [sys.executable, "-m", "serving.server", *flags_], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert f"error: {message}" in ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr
    name, _, value = flag.removeprefix("--").partition("=")
    with pytest.raises(InputError), serve("m", folder, rest_port=port, **{name: value}):
        pass
    with socket.create_server(("127.0.0.1", port)):  # which was closed
        pass


def test_a_taken_grpc_port_is_not_the_certificates_fault(folder, tmp_path):
    ssl = tmp_path / "ssl.config"
    write_ssl(ssl, server_key="no key", server_cert="no certificate")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match=r"the port is taken.*--port"),
        serve("m", folder, grpc_port=taken.getsockname()[1], ssl_config_file=str(ssl)),
    ):
        pass


def test_ipv6_addresses_stand_in_brackets(folder):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    for start in (serve, spawn):
        with start("m", folder, host="::1") as server, Client(server.url, server.grpc_target, "m") as client:
            server.wait_available()
            assert server.url.startswith("http://[::1]:")
            assert client.predict([2.0]) == [3.0]
            assert client.predict_grpc({"x": np.float32([2.0])})["y"] == [3.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no model to serve"),
        ({"port": 70000}, "--port is 70000"),
        ({"port": 8600, "rest_api_port": 8600}, "need a port each"),
        ({"model_config_file": "/nowhere/models.config"}, "cannot read /nowhere/models.config"),
        ({"batching_parameters_file": "/nowhere/batching"}, "cannot read /nowhere/batching"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Settings(**settings).model_config()


def test_labels_at_the_start_need_the_flag(folder, tmp_path):
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{folder}" model_platform: "tensorflow" '
        'version_labels { key: "stable" value: 1 } } }'
    )
    with (
        pytest.raises(InputError, match="allow_version_labels_for_unavailable_models"),
        serve(model_config_file=str(config)),
    ):
        pass


def test_batching_parameters_are_read(tmp_path):
    path = tmp_path / "batching.config"
    path.write_text(
        "max_batch_size { value: 16 } batch_timeout_micros { value: 500 } num_batch_threads { value: 3 }"
        " allowed_batch_sizes: 4 allowed_batch_sizes: 16"
    )
    batching = read_batching(path)
    assert (batching.max_batch_size, batching.num_batch_threads, batching.allowed_batch_sizes) == (16, 3, (4, 16))
    path.write_text("max_batch_size { value: 16 } allowed_batch_sizes: 8")
    with pytest.raises(InputError, match="the last must be max_batch_size"):
        read_batching(path)
    path.write_text("max_batch: 3")
    with pytest.raises(InputError, match="is not a BatchingParameters text proto"):
        read_batching(path)


def test_the_stock_spellings_of_a_flag():
    given = ["--port=1", "--prefer_tflite_model=true", "--enable_batching=0", "--rest_api_enable_cors_support"]
    settings = flags.read(Settings(), _own([*given, "--model_name", "m"]), prog="server")
    assert (settings.port, settings.model_name) == (1, "m")
    assert (settings.prefer_tflite_model, settings.enable_batching, settings.batching.enabled) == (True, False, False)
    assert settings.rest_api_enable_cors_support
    with pytest.raises(InputError, match="give true or false"):
        _own(["--enable_batching=maybe"])


def test_the_client_says_what_is_wrong(folder, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with Client(url, model="m") as client, pytest.raises(ServingError, match="no server answers"):
        client.status()
    with pytest.raises(InputError, match="usage:"):
        client_module.main([url])
    with serve("m", folder) as server, Client(server.url, model="m") as client:
        server.wait_available()
        with pytest.raises(InputError, match="not both"):
            client.predict()
        with pytest.raises(InputError, match="no gRPC address"):
            client.predict_grpc({"x": np.float32([1])})
        image = tmp_path / "x.png"
        image.write_bytes(b"no image")
        with pytest.raises(InputError, match="which is no image"):
            client_module.main([server.url, "m", str(image)])


def test_the_client_sends_an_image(tmp_path, capsys):
    from PIL import Image

    serving_models.save_convnet(tmp_path / "convnet" / "1")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    with serve("convnet", tmp_path / "convnet") as server:
        server.wait_available()
        client_module.main([server.url, "convnet", str(tmp_path / "red.png")])
    answer = np.array(json.loads(capsys.readouterr().out))
    assert answer.shape == (10,)
    assert answer.sum() == pytest.approx(1, abs=1e-5)
