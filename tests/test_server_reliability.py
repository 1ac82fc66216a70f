"""What a server must survive: malformed requests, slow and vanishing clients, overload, broken versions, signals."""

import asyncio
import collections
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.client import Client, ServingError
from serving.server import backends, codec, serve, spawn
from serving.server.signatures import TensorSpec
from serving.server.status import StatusError
from tests import serving_malformed as malformed
from tests import serving_models
from tests.serving_models import publish, wait_for

POLL = {"file_system_poll_wait_seconds": 0.05}
GOOD = b'{"instances": [1.0, 2.0]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every model that is asked here, a folder each, and models.config for those of the malformed requests."""
    folder = tmp_path_factory.mktemp("reliability")
    for name in malformed.IDENTITIES:
        dtype = serving_models.IDENTITIES[name.removeprefix("ident_")]
        serving_models.save_graph(folder / name / "1", serving_models.identity({"default": dtype}, {"default": "out"}))
    pair = {"int_tensor": "int32", "str_tensor": "string"}
    serving_models.save_graph(folder / "pair" / "1", serving_models.identity(pair))
    model = serving_models.save_convnet(folder / "convnet" / "1", size=8, filters=2, classes=2)
    serving_models.save_lite(folder / "lite" / "1", model)
    serving_models.save_versions(folder / "m", 3)
    serving_models.save_graph(folder / "sleeper" / "1", serving_models.sleeper)
    names = (*malformed.IDENTITIES, "pair", "convnet", "lite")
    write_config(folder / "models.config", {name: folder / name for name in names} | {"m": folder / "m"}, m=1)
    return folder


def write_config(path, models, **versions):
    """Write a models.config of base paths by name; `versions` pins a model to one version."""
    entries = [
        f'config {{ name: "{name}" base_path: "{base}" model_platform: "tensorflow" '
        + (f"model_version_policy {{ specific {{ versions: {versions[name]} }} }}" if name in versions else "")
        + " }"
        for name, base in models.items()
    ]
    path.write_text("model_config_list { " + "\n".join(entries) + " }")


def port_of(server):
    """The REST port."""
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def connected(server):
    """A plain connection to the REST port."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as connection:
        yield connection


def read_answer(connection):
    """(status, headers, body) from a socket; a `ConnectionError` where it is closed before there is one."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        response.close()


def error_of(body):
    """The message of a refusal, which is all that its JSON may hold."""
    document = json.loads(body)
    assert document.keys() == {"error"}
    assert document["error"]
    return document["error"]


# --- ten thousand malformed requests ----------------------------------------------------------------------------------


def usage(process):
    """(resident MiB, threads, open files) of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident, threads = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    return resident / 1024, threads, len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


async def receive(reader):
    """(status, headers, body) from a stream."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


def complaint(case, status, headers, body):
    """What is wrong with the answer to a case, or None."""
    if status != case.status:
        return f"status {status}"
    if (headers.get("connection") == "close") != case.closes:
        return f"the connection was {'kept' if case.closes else 'closed'}"
    if status == 200:
        return None if is_same(body, case.answer) else "other values"
    if not case.is_json:
        return (
            None
            if (headers["content-type"], body) == ("text/plain; charset=utf-8", b"Not found\n")
            else "no plain text"
        )
    if headers["content-type"] != "application/json":
        return "no JSON"
    return None if 0 < len(error_of(body)) < 2000 + len(case.request) else "no message, or an endless one"


def is_same(body, want):
    """Whether an identity model's answer holds the array that was sent."""
    (given,) = json.loads(body).values()
    if want.dtype == np.object_:
        texts = [value.decode("utf-8", "replace") for value in want.reshape(-1)]
        given = np.array(given, np.object_)
        return given.shape == want.shape and given.reshape(-1).tolist() == texts
    with np.errstate(over="ignore"):
        given = np.array(given, want.dtype)
    return given.shape == want.shape and np.array_equal(given, want, equal_nan=want.dtype.kind == "f")


async def send_all(port, cases, clients=6):
    """Send the cases over a few connections while a good client asks on; returns (complaints, the good one's waits)."""
    complaints, waits, waiting = [], [], iter(cases)

    async def ask():
        writer = None
        for case in waiting:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(case.request)
            try:
                status, headers, body = await asyncio.wait_for(receive(reader), 30)
                said = complaint(case, status, headers, body)
            except (OSError, EOFError, TimeoutError) as error:
                headers, body, said = {"connection": "close"}, b"", f"no answer: {error!r}"
            if said:
                complaints.append((case.family, case.status, case.request[-300:], said, body[:300]))
            if headers.get("connection") == "close":
                writer.close()
                writer = None
        if writer is not None:
            writer.close()

    async def ask_well():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            start = time.perf_counter()
            writer.write(malformed.predict("m", GOOD))
            status, _, body = await receive(reader)
            waits.append(time.perf_counter() - start)
            assert (status, json.loads(body)) == (200, {"predictions": [1.5, 2.0]})
            await asyncio.sleep(0.01)

    good = asyncio.create_task(ask_well())
    await asyncio.gather(*(ask() for _ in range(clients)))
    good.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await good  # raises what it met
    return complaints, waits


def call_all(target, calls):
    """Send malformed gRPC calls as raw bytes; returns the complaints."""
    complaints = []
    with grpc.insecure_channel(target) as channel:
        for call in calls:
            try:
                channel.unary_unary(call.method)(call.message, timeout=30)
                status = "OK"
            except grpc.RpcError as error:
                status = error.code().name
            if status != call.status:
                complaints.append((call.family, call.status, call.message[:200], status))
    return complaints


def test_ten_thousand_malformed_requests_are_refused(folder):
    with (
        ThreadPoolExecutor(1) as pool,
        spawn(model_config_file=folder / "models.config", rest_api_max_body_bytes=malformed.MAX_BODY) as server,
        Client(server.url, server.grpc_target, "m") as client,
    ):
        made = pool.submit(lambda: list(zip(malformed.cases(), malformed.calls(), strict=True)))  # while models load
        wait_for(lambda: is_ready(server), 60)
        use, complaints, waits, refused = [usage(server.process)], [], [], collections.Counter()
        for cases, calls in made.result():
            said, waited = asyncio.run(send_all(port_of(server), cases))
            complaints += said + call_all(server.grpc_target, calls)
            waits += waited
            refused.update(case.family for case in (*cases, *calls) if case.status != 200)
            use.append(usage(server.process))
        assert server.process.poll() is None
        assert client.predict([1.0]) == [1.5]
        assert client.predict_grpc({"x": np.float32([1])})["y"] == 1.5
        wait_for(lambda: usage(server.process)[2] <= use[0][2] + 2, 10)  # the files: this client's two connections more
    print(refused.total(), refused, use, max(waits), statistics.median(waits))
    assert complaints == []
    assert refused.total() >= 10_000
    assert len(refused) >= 30
    assert max(waits) < 5  # half a million brackets take a second to read, beside the other requests
    assert statistics.median(waits) < 0.2
    (before, _, _), (middle, threads, _), (after, threads_after, _) = use
    assert middle - before < 512  # MiB, where bodies of a megabyte and a gzip of a hundred are among the requests
    assert after - middle < 16  # MiB, for 5,000 small requests
    assert threads_after <= threads + 2


def is_ready(server):
    """Whether every model of a server serves."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200


# --- the two ways into Predict ----------------------------------------------------------------------------------------

integers = st.integers(-300, 300).map(str)
floats = st.one_of(integers, st.floats(allow_nan=False, allow_infinity=False).map(repr))
numerals = st.one_of(
    st.sampled_from([
        "0", "-0", "1", "-1", "255", "256", "-129", "32768", "2147483648", "9223372036854775808",
        "18446744073709551615", "18446744073709551616", "1.5", "-0.0", "1e3", "1E-2", "1e308", "1e309", "1e-400",
        "3.5e38", "16777217", "0.1", "NaN", "Infinity", "-Infinity", "1.", "01", ".5", "true", "null", "{}", '"1"',
        '"["',
    ]),
    floats,
)  # fmt: skip
spaces = st.sampled_from(["", "", "", " ", "\n\t"])


@st.composite
def bodies(draw):
    """(Predict body, input names): arrays as they are, by name in columns or in rows, regular or not quite."""
    names = draw(st.sampled_from([["x"], ["x"], ["a", "b"], ["a1", "a2"], ["e", "x-1"]]))
    is_odd = draw(st.integers(0, 2)) == 0
    numeral = draw(st.sampled_from([integers, integers, floats, numerals]))
    sizes = {name: draw(st.lists(st.integers(1, 3), max_size=3)) for name in names}

    def odd(one_in):
        return is_odd and draw(st.integers(1, one_in)) == 1

    def array(sizes):
        if not sizes or odd(20):
            return draw(numeral)
        size = draw(st.integers(0, 4)) if odd(10) else sizes[0]
        gap = draw(spaces)
        return f"[{gap}{f',{gap}'.join(array(sizes[1:]) for _ in range(size))}{gap}]"

    def named(order):
        order = [*order, draw(st.sampled_from(["x", "a", "z"]))] if odd(8) else order
        order = order[1:] if odd(8) else order
        return "{" + ", ".join(f'"{name}":{draw(spaces)}{array(sizes.get(name, []))}' for name in order) + "}"

    kind, order = draw(st.sampled_from(["plain", "columns", "rows"])), draw(st.permutations(names))
    if kind == "plain":
        value = array(sizes[names[0]])
    elif kind == "columns":
        value = named(order)
    else:
        value = "[" + ", ".join(named(order) for _ in range(draw(st.integers(0 if odd(5) else 1, 3)))) + "]"
    key = "instances" if (kind == "rows") != odd(8) else "inputs"
    pairs = [f'"{key if kind != "plain" else draw(st.sampled_from(["instances", "inputs"]))}":{draw(spaces)}{value}']
    others = ['"signature_name": "a[1]"', '"signature_name": "s"']
    if is_odd:
        others += ['"other": [1, [2]]', '"x": {"y": "]"}', '"signature_name": 1', '"inputs": [1]']
    pairs += draw(st.lists(st.sampled_from(others), max_size=2))
    text = "{" + ", ".join(draw(st.permutations(pairs))) + "}"
    if is_odd:
        text = draw(st.sampled_from(["", " ", "\ufeff"])) + text + draw(st.sampled_from(["", "]", " x"]))
    return text, names


def outcome(decode, body, specs):
    """What a way in makes of a body: (format, name, {alias: (type, shape, bytes)}), or the refusal."""
    try:
        request = decode(body, lambda _: specs)
    except StatusError as error:
        return error.code, error.message
    arrays = {alias: (str(value.dtype), value.shape, value.tobytes()) for alias, value in request.inputs.items()}
    return request.by_row, request.signature_name, arrays


def test_both_ways_in_give_the_same_arrays_or_the_same_refusal():
    ways = collections.Counter()

    @settings(max_examples=1_600, deadline=None, derandomize=True, database=None)
    @given(
        bodies(),
        st.lists(st.sampled_from([np.float32, np.float64, np.int32, np.uint8, np.int64, np.uint64]), min_size=2),
    )
    def agree(made, dtypes):
        text, names = made
        specs = {name: TensorSpec(np.dtype(dtype), None, name) for name, dtype in zip(names, dtypes, strict=False)}
        body = text.encode()
        by_document = outcome(
            lambda body, inputs_of: codec._decode_document(codec._document(body), inputs_of), body, specs
        )
        ways["refused" if len(by_document) == 2 else bool(codec._decode_numbers(body, lambda _: specs))] += 1
        assert outcome(codec.decode_predict, body, specs) == by_document

    agree()
    assert min(ways["refused"], ways[True], ways[False]) > 100, ways  # [True]: by simdjson


# --- slow, silent and vanishing clients -------------------------------------------------------------------------------


def trickle(server, content, pause=0.03):
    """Send a byte at a time without end; returns (seconds until the server had enough, its answer or None)."""
    start = time.monotonic()
    with connected(server) as connection:
        connection.settimeout(pause)
        received = b""
        for byte in content:
            with contextlib.suppress(TimeoutError, OSError):
                connection.sendall(bytes([byte]))
                received += connection.recv(65536)
                break
        connection.settimeout(5)
        with contextlib.suppress(OSError):
            while more := connection.recv(65536):
                received += more
    return time.monotonic() - start, received


def endless(start, filler):
    """`start`, then `filler` for ever."""
    yield from start
    while True:
        yield from filler


def test_slow_clients_are_shown_out_and_hold_up_nobody(folder):
    head = malformed.head("POST", "/v1/models/m:predict", "Content-Length: 1000000")
    chunked = malformed.head("POST", "/v1/models/m:predict", "Transfer-Encoding: chunked")
    kinds = {
        "request line": endless(b"GET /v1/models/", b"m"),
        "headers": endless(b"GET /v1/models/m HTTP/1.1\r\n", b"X: y\r\n"),
        "body": endless(head, b" "),
        "chunks": endless(chunked, b"1\r\n \r\n"),
        "nothing": iter(b""),
        "blank lines": endless(b"", b"\r\n"),
    }
    with (
        serve("m", folder / "m", rest_api_timeout_in_ms=1000) as server,
        ThreadPoolExecutor(len(kinds)) as pool,
        Client(server.url, model="m") as client,
    ):
        server.wait_available()
        slow = {kind: pool.submit(trickle, server, content) for kind, content in kinds.items()}
        waits = []
        while not all(future.done() for future in slow.values()):
            start = time.perf_counter()
            assert client.predict([1.0]) == [3.5]
            waits.append(time.perf_counter() - start)
            time.sleep(0.01)
        assert len(waits) > 20
        assert max(waits) < 0.8
        for kind, future in slow.items():
            seconds, received = future.result()
            assert 0.9 < seconds < 3, kind
            if kind in ("nothing", "blank lines"):  # no request has begun: there is nothing to answer
                assert received == b""
            else:
                assert received.startswith(b"HTTP/1.1 408 Request Timeout\r\n"), kind
                assert "did not arrive within 1 seconds" in error_of(received.partition(b"\r\n\r\n")[2])


def test_an_idle_connection_is_kept(folder):
    with serve("m", folder / "m", rest_api_timeout_in_ms=300) as server, connected(server) as connection:
        server.wait_available()
        for _ in range(3):
            connection.sendall(malformed.predict("m", GOOD))
            assert read_answer(connection)[0] == 200
            time.sleep(0.7)


ESTABLISHED, LISTENING = "01", "0A"


def sockets():
    """(address, port, peer's port, state) of every TCP socket of this machine, as the kernel writes them."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, peer, state, *_ = line.split()
            address, port = local.split(":")
            yield address, int(port, 16), int(peer.rpartition(":")[2], 16), state


def tcp_states(port, peer):
    """The states of the server's side of a connection."""
    return {state for _, *ports, state in sockets() if ports == [port, peer]}


def test_an_offer_of_http_2_is_passed_over(folder):
    with serve("m", folder / "m") as server, connected(server) as connection:
        server.wait_available()
        offer = ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"]
        for headers in (offer, list(map(str.upper, offer[:2])), []):
            connection.sendall(malformed.predict("m", GOOD, *headers))
            status, _, body = read_answer(connection)
            assert (status, json.loads(body)) == (200, {"predictions": [3.5, 4.0]})


def test_a_client_that_takes_no_answer_is_dropped(folder):
    body = b'{"inputs": "' + b"x" * 2**24 + b'"}'  # comes back: more than the kernel's buffers hold
    with serve("ident_str", folder / "ident_str", rest_api_timeout_in_ms=1000) as server, socket.socket() as connection:
        server.wait_available()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port_of(server)))
        connection.sendall(malformed.predict("ident_str", body))
        wait_for(lambda: tcp_states(port_of(server), connection.getsockname()[1]) != {ESTABLISHED}, 10)
        connection.settimeout(10)
        received = 0
        while more := connection.recv(2**20):
            received += len(more)
        assert received < 2**24  # what the kernel had, and then the end


def test_more_connections_than_allowed_are_refused(folder):
    with serve("m", folder / "m", rest_api_max_connections=3) as server, contextlib.ExitStack() as stack:
        server.wait_available()
        first = [stack.enter_context(connected(server)) for _ in range(3)]
        for connection in first:
            connection.sendall(malformed.predict("m", GOOD))
            assert read_answer(connection)[0] == 200
        for _ in range(20):
            with connected(server) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(malformed.predict("m", GOOD))
                status, headers, body = read_answer(connection)
                assert (status, headers["connection"]) == (503, "close")
                assert "more than 3 connections" in error_of(body)
        first.pop().close()
        wait_for(lambda: ask_once(server) == 200)


def ask_once(server):
    """The status of one good request on a connection of its own."""
    with connected(server) as connection:
        connection.sendall(malformed.predict("m", GOOD))
        return read_answer(connection)[0]


def test_bodies_and_headers_have_limits(folder):
    with serve("m", folder / "m", rest_api_max_body_bytes=10_000, grpc_max_message_bytes=10_000) as server:
        server.wait_available()
        with connected(server) as connection:  # refused by its length, before any of it is sent
            connection.sendall(malformed.head("POST", "/v1/models/m:predict", "Content-Length: 10001"))
            status, _, body = read_answer(connection)
            assert (status, "10000 bytes" in error_of(body)) == (413, True)
            connection.sendall(b" " * 10_001)  # what follows is passed over
            connection.sendall(malformed.predict("m", GOOD))
            assert read_answer(connection)[0] == 200
        with connected(server) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(malformed.head("GET", "/v1/models/m", *(f"X-{n}: {'y' * 1000}" for n in range(900))))
            assert read_answer(connection)[0] == 431
        with Client(server.url, server.grpc_target, "m") as client:
            with pytest.raises(ServingError, match="RESOURCE_EXHAUSTED"):
                client.predict_grpc({"x": np.zeros((5000, 1), np.float32)})
            assert client.predict_grpc({"x": np.zeros((5, 1), np.float32)})["y"].shape == (5, 1)


# --- overload ---------------------------------------------------------------------------------------------------------


def test_a_run_that_takes_longer_than_the_last_holds_up_nobody(folder):
    """A run that may be short is done where it is, without a thread; not where an input's values make it long."""
    with (
        serve("sleeper", folder / "sleeper") as server,
        ThreadPoolExecutor(1) as pool,
        Client(server.url, model="sleeper") as client,
    ):
        server.wait_available()
        for _ in range(20):
            client.predict([[0.0]])
        long = pool.submit(client.predict, [[1.5]])
        time.sleep(0.2)
        start = time.monotonic()
        assert is_ready(server)
        assert time.monotonic() - start < 0.7
        assert long.result() == [[1.5]]


@pytest.fixture()
def held(monkeypatch):
    """Runs of SavedModels wait for `held.go`; `held.inputs` lists what they began with."""

    class Held:
        go, inputs = threading.Event(), []

    run = backends.SavedModel.run

    def hold(model, signature, inputs, outputs):
        Held.inputs.append(float(inputs["x"].reshape(-1)[0]))
        assert Held.go.wait(30)
        return run(model, signature, inputs, outputs)

    monkeypatch.setattr(backends.SavedModel, "run", hold)
    yield Held
    Held.go.set()


@pytest.fixture()
def batching(tmp_path):
    """A batching parameters file: one request a run, two may wait."""
    path = tmp_path / "batching.config"
    path.write_text("max_batch_size { value: 1 } max_enqueued_batches { value: 2 } num_batch_threads { value: 1 }")
    return {"batching_parameters_file": str(path), "enable_model_warmup": False}


def predict_status(server, x, over_grpc=False, timeout=30):
    """The status of one Predict, on a connection of its own."""
    with Client(server.url, server.grpc_target, "m", timeout=timeout) as client:
        try:
            return (client.predict_grpc({"x": np.float32([x])})["y"] if over_grpc else client.predict([x]))[0]
        except ServingError as error:
            return error.status


def test_a_full_queue_refuses_and_serves_on(folder, held, batching):
    with serve("m", folder / "m", **batching) as server, ThreadPoolExecutor(3) as pool:
        server.wait_available()
        waiting = [pool.submit(predict_status, server, 0.0)]
        wait_for(lambda: held.inputs)
        for number in (1, 2):
            waiting.append(pool.submit(predict_status, server, 2.0 * number, number == 2))
        wait_for(lambda: places_taken(server) == 2)
        assert predict_status(server, 8.0) == 429
        assert predict_status(server, 8.0, over_grpc=True) == "RESOURCE_EXHAUSTED"
        held.go.set()
        assert [future.result() for future in waiting] == [3.0, 4.0, 5.0]
        assert predict_status(server, 2.0) == 4.0
        assert 8.0 not in held.inputs


@pytest.mark.parametrize("over_grpc", [False, True])
def test_what_is_given_up_at_its_deadline_never_runs(over_grpc, folder, held, batching):
    with serve("m", folder / "m", **batching, rest_api_timeout_in_ms=500) as server, ThreadPoolExecutor(1) as pool:
        server.wait_available()
        running = pool.submit(predict_status, server, 0.0)
        wait_for(lambda: held.inputs)
        # both places are taken and given up, four times over; a place that stayed taken would be answered 429
        for number in range(8):
            timeout = 0.2 if over_grpc else 30
            want = "DEADLINE_EXCEEDED" if over_grpc else 504
            assert predict_status(server, 8.0 + number, over_grpc, timeout) == want
        assert running.result() == 504
        held.go.set()
        assert predict_status(server, 2.0) == 4.0
        assert held.inputs == [0.0, 2.0]


@pytest.mark.parametrize("over_grpc", [False, True])
def test_a_client_that_goes_frees_its_place(over_grpc, folder, held, batching):
    with serve("m", folder / "m", **batching) as server, ThreadPoolExecutor(2) as pool:
        server.wait_available()
        running = pool.submit(predict_status, server, 0.0)
        wait_for(lambda: held.inputs)
        for _ in range(4):
            with contextlib.ExitStack() as stack:
                for number in (0, 1):
                    if over_grpc:
                        client = stack.enter_context(Client(server.url, server.grpc_target, "m"))
                        stack.callback(leave_call(client, 8.0 + number).cancel)
                    else:
                        connection = stack.enter_context(connected(server))
                        connection.sendall(malformed.predict("m", b'{"instances": [%d]}' % (8 + number)))
                wait_for(lambda: places_taken(server) == 2)
            wait_for(lambda: places_taken(server) == 0)
        waiting = pool.submit(predict_status, server, 2.0)
        wait_for(lambda: places_taken(server) == 1)
        held.go.set()
        assert (running.result(), waiting.result()) == (3.0, 4.0)
        assert held.inputs == [0.0, 2.0]


def places_taken(server):
    """How many requests wait in the queue of the model's version."""
    return server.manager._versions["m"][3].batcher._waiting


def leave_call(client, x):
    """Begin a gRPC Predict; returns its future."""
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    from serving.server import tensors

    request = PredictRequest()
    request.model_spec.name = "m"
    tensors.to_content(np.float32([x]), request.inputs["x"])
    return client._stub().Predict.future(request)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drained(folder):
    """How servers ended that were told to stop by SIGTERM, and by Ctrl-C, in the middle of their work."""
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(drain, folder, number) for number in (signal.SIGTERM, signal.SIGINT)]
        return {end.result()["signal"]: end.result() for end in ends}


def drain(folder, number):
    """Have two dozen requests in flight, and others come and go; send a signal twice; tell what became of all that."""
    with (
        spawn("sleeper", folder / "sleeper") as server,
        ThreadPoolExecutor(28) as pool,
        contextlib.ExitStack() as clients,
    ):
        server.wait_available()
        slow = [clients.enter_context(Client(server.url, server.grpc_target, "sleeper")) for _ in range(24)]
        for client in slow:  # connected, so that what they ask next is sent at once
            assert client.predict([[0.0]]) == [[0.0]]
            assert client.predict_grpc({"x": np.float32([[0.0]])})["y"] == 0.0
        inputs = {"x": np.float32([[1.5]])}
        in_flight = [
            pool.submit(client.predict_grpc if at % 3 == 0 else client.predict, inputs if at % 3 == 0 else [[1.5]])
            for at, client in enumerate(slow)
        ]
        busy = [pool.submit(keep_asking, port_of(server)) for _ in range(4)]
        time.sleep(0.7)
        server.process.send_signal(number)
        start = time.monotonic()
        wait_for(lambda: refuses(port_of(server)), 3)
        refused_after = time.monotonic() - start
        server.process.send_signal(number)
        answers = [future.result() for future in in_flight]
        status = server.process.wait(30)
        return {
            "signal": number,
            "answers": [float(np.ravel(answer["y"] if isinstance(answer, dict) else answer)[0]) for answer in answers],
            "busy": [future.result() for future in busy],
            "refused after": refused_after,
            "status": status,
            "seconds": time.monotonic() - start,
        }


def keep_asking(port):
    """Ask on one connection until the server says that it closes it; returns the statuses.  A lost request raises."""
    statuses = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        while True:
            connection.sendall(malformed.predict("sleeper", b'{"instances": [[0.0]]}'))
            status, headers, _ = read_answer(connection)
            statuses.append(status)
            if headers.get("connection") == "close":
                return statuses


def refuses(port):
    """Whether nobody listens any more."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server(number, drained):
    end = drained[number]
    assert end["answers"] == [1.5] * 24
    assert all(statuses and set(statuses) == {200} for statuses in end["busy"])
    assert end["refused after"] < 2  # before the last answer
    assert end["status"] == 0
    assert end["seconds"] < 20


# --- versions ---------------------------------------------------------------------------------------------------------


def truncate(path, share=0.5):
    """Cut a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path, seed):
    """Change a few bytes of a file."""
    numbers, content = np.random.default_rng(seed), bytearray(path.read_bytes())
    for at in numbers.integers(len(content), size=20):
        content[at] ^= int(numbers.integers(1, 256))
    path.write_bytes(bytes(content))


def failing_warm_up(folder):
    """A warm-up record whose requests the model refuses."""
    (folder / "assets.extra").mkdir(exist_ok=True)
    (folder / "assets.extra" / "tf_serving_warmup_requests").write_bytes(b"no TFRecord at all, of some length")


def lite_of(content):
    """Replace a version by a TFLite file."""

    def damage(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "model.tflite").write_bytes(content)

    return damage


DAMAGES = {
    "truncated model": lambda folder: truncate(folder / "saved_model.pb"),
    "truncated model, barely": lambda folder: truncate(folder / "saved_model.pb", 0.99),
    "empty model": lambda folder: (folder / "saved_model.pb").write_bytes(b""),
    "rubbish for a model": lambda folder: (folder / "saved_model.pb").write_bytes(os.urandom(5000)),
    "a folder for a model": lambda folder: ((folder / "saved_model.pb").unlink(), (folder / "saved_model.pb").mkdir()),
    "no variables": lambda folder: shutil.rmtree(folder / "variables"),
    "no variable data": lambda folder: (folder / "variables" / "variables.data-00000-of-00001").unlink(),
    "truncated data": lambda folder: truncate(folder / "variables" / "variables.data-00000-of-00001"),
    "empty data": lambda folder: (folder / "variables" / "variables.data-00000-of-00001").write_bytes(b""),
    "changed data": lambda folder: flip(folder / "variables" / "variables.data-00000-of-00001", 0),
    "truncated index": lambda folder: truncate(folder / "variables" / "variables.index"),
    "empty index": lambda folder: (folder / "variables" / "variables.index").write_bytes(b""),
    "changed index": lambda folder: flip(folder / "variables" / "variables.index", 1),
    "warm-up that fails": failing_warm_up,
    "empty TFLite file": lite_of(b""),
    "rubbish for a TFLite file": lite_of(b"TFL3" * 999),
    "an unreadable model": lambda folder: (folder / "saved_model.pb").chmod(0),
}
if os.geteuid() == 0:
    del DAMAGES["an unreadable model"]  # nothing is unreadable to root


@contextlib.contextmanager
def under_load(server, model, inputs, allowed, clients=2, pause=0.002):
    """Ask a model over REST and gRPC all the while; yields the values of y answered, each of which must be allowed."""
    answers, stop = [], threading.Event()

    def ask(at):
        with Client(server.url, server.grpc_target, model) as client:
            while not stop.is_set():
                if at % 2:
                    y = client.predict_grpc({next(iter(inputs)): np.float32(next(iter(inputs.values())))})
                    (y,) = y.values()
                else:
                    y = client.predict(inputs=next(iter(inputs.values())))
                y = float(np.ravel(y)[0])
                assert allowed(y), y
                answers.append(y)
                time.sleep(pause)

    with ThreadPoolExecutor(clients * 2) as pool:
        asking = [pool.submit(ask, at) for at in range(clients * 2)]
        try:
            yield answers
        finally:
            stop.set()
        for asked in asking:
            asked.result()  # raises what a client met: no request may be lost


def states(server, model):
    """The state of every version: {number: state}."""
    with Client(server.url, model=model) as client:
        return {int(entry["version"]): entry["state"] for entry in client.status()}


def test_a_corrupt_version_never_replaces_a_good_one(folder, tmp_path):
    base = tmp_path / "m"
    publish(folder / "m" / "1", base, 1)
    with spawn("m", base, **POLL) as server:
        server.wait_available(1)
        with under_load(server, "m", {"x": [[2.0]]}, {2.0}.__contains__, clients=1) as answers:
            for number, (name, damage) in enumerate(DAMAGES.items(), 2):
                shutil.copytree(folder / "m" / "2", tmp_path / "damaged")
                damage(tmp_path / "damaged")
                (tmp_path / "damaged").rename(base / str(number))
                if name != "a folder for a model":  # which reads as a model that is not there yet
                    wait_for(lambda number=number: states(server, "m").get(number) == "END")
                before = len(answers)
                wait_for(lambda before=before: len(answers) > before)
            assert server.process.poll() is None
            assert {number for number, state in states(server, "m").items() if state == "AVAILABLE"} == {1}
        publish(folder / "m" / "2", base, 99)
        server.wait_available(99)
        with Client(server.url, model="m") as client:
            wait_for(lambda: client.predict([2.0]) == [3.0])


def test_swaps_and_withdrawals_lose_no_request(folder, tmp_path):
    """A dozen versions come, SavedModel and TFLite in turn, each under the feet of the last; then all but one go."""
    base = tmp_path / "convnet"
    image = np.zeros((1, 8, 8, 1)).tolist()
    publish(folder / "convnet" / "1", base, 1)
    half = pytest.approx(0.5, abs=1e-6)  # two classes, an image of nothing: the answer of both kinds of file
    with serve("convnet", base, **POLL) as server:
        server.wait_available(1)
        with under_load(server, "convnet", {"image": image}, lambda y: y == half, clients=2) as answers:
            for number in range(2, 13):
                publish(folder / ("convnet" if number % 2 else "lite") / "1", base, number)
                server.wait_available(number)
                before = len(answers)
                wait_for(lambda before=before, number=number: len(answers) > before + 4 and served(server) == [number])
            for number in range(12, 3, -1):
                (base / str(number)).rename(tmp_path / f"withdrawn-{number}")
                wait_for(lambda number=number: served(server) == [number - 1])
                before = len(answers)
                wait_for(
                    lambda before=before, number=number: len(answers) > before + 4 and served(server) == [number - 1]
                )


def served(server):
    """The versions that serve."""
    return server.manager.models()[server.model_name]


def test_every_answer_is_of_a_version_that_may_give_it(folder, tmp_path):
    """Answers tell their version; from a version's retirement on it gives none, and before its arrival none either."""
    base = tmp_path / "m"
    publish(folder / "m" / "1", base, 1)
    began, ended, log = {1: 0.0}, {}, []
    with serve("m", base, **POLL) as server:
        server.wait_available(1)
        stop = threading.Event()

        def ask():
            with Client(server.url, server.grpc_target, "m") as client:
                while not stop.is_set():
                    sent = time.monotonic()
                    version = round(client.predict([0.0])[0])  # y = x / 2 + version
                    log.append((sent, time.monotonic(), version))

        with ThreadPoolExecutor(3) as pool:
            asking = [pool.submit(ask) for _ in range(3)]
            try:
                for old, new in ((1, 2), (2, 3)):
                    began[new] = time.monotonic()
                    publish(folder / "m" / str(new), base, new)
                    server.wait_available(new)
                    wait_for(lambda old=old: server.manager.statuses("m", old)[0][1] != "AVAILABLE")
                    ended[old] = time.monotonic()
                    wait_for(lambda new=new: log[-1][2] == new)
            finally:
                stop.set()
            for asked in asking:
                asked.result()
        assert {version for _, _, version in log} == {1, 2, 3}
        assert all(began[version] <= answered for _, answered, version in log)
        assert all(sent <= ended.get(version, sent) for sent, _, version in log)


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_with_the_last_good_versions(folder, tmp_path):
    for name in ("m", "other"):
        publish(folder / "m" / "1", tmp_path / name, 1)
    config = tmp_path / "models.config"
    config.write_text(
        "model_config_list { "
        f'config {{ name: "m" base_path: "{tmp_path / "m"}" model_platform: "tensorflow" }} '
        f'config {{ name: "other" base_path: "{tmp_path / "other"}" model_platform: "tensorflow" '
        'version_labels { key: "stable" value: 1 } } }'
    )
    flags = {"model_config_file": config, "allow_version_labels_for_unavailable_models": True, **POLL}

    def kill(server):
        server.process.kill()
        assert server.process.wait(10) == -signal.SIGKILL

    with spawn("m", **flags) as server:  # killed while it serves under load, a good version newly there
        server.wait_available(1)
        publish(folder / "m" / "2", tmp_path / "m", 2)
        server.wait_available(2)
        with (
            pytest.raises((ServingError, OSError)),
            under_load(server, "m", {"x": [[2.0]]}, {2.0, 3.0}.__contains__) as y,
        ):
            wait_for(lambda: len(y) > 20)
            kill(server)
    publish(folder / "sleeper" / "1", tmp_path / "m", 3)  # sleeps in its warm-up: killed while it loads
    warm_up_for(20, tmp_path / "m" / "3")
    with spawn("m", **flags) as server:
        wait_for(lambda: states(server, "m").get(3) == "LOADING", 60)
        kill(server)
    shutil.rmtree(tmp_path / "m" / "3" / "variables", ignore_errors=True)
    truncate(tmp_path / "m" / "3" / "saved_model.pb")  # and it turns out to be broken, as is a half-copied one
    shutil.copytree(folder / "m" / "3", tmp_path / "m" / "4")
    truncate(tmp_path / "m" / "4" / "variables" / "variables.data-00000-of-00001")
    with spawn("m", **flags) as server:
        server.wait_available()
        wait_for(lambda: is_ready(server))
        with Client(server.url, server.grpc_target, "m") as client, Client(server.url, model="other") as other:
            assert client.predict([2.0]) == [3.0]
            assert client.predict_grpc({"x": np.float32([2.0])})["y"] == [3.0]
            assert other.predict([2.0], label="stable") == [2.0]
        assert states(server, "m") == {4: "END", 3: "END", 2: "AVAILABLE"}
        shutil.rmtree(tmp_path / "m" / "4")
        publish(folder / "m" / "3", tmp_path / "m", 4)  # mended, it takes its place
        server.wait_available(4)
        with Client(server.url, model="m") as client:
            wait_for(lambda: client.predict([2.0]) == [4.0])


def warm_up_for(seconds, folder):
    """Give a sleeper's version a warm-up request that takes so long."""
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    from serving.server import tensors

    log = PredictionLog()
    tensors.to_content(np.float32([[seconds]]), log.predict_log.request.inputs["x"])
    (folder / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(folder / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


# --- what can be reached ----------------------------------------------------------------------------------------------


def test_it_listens_on_the_loopback_alone(folder):
    with serve("m", folder / "m") as server:
        ports = {port_of(server), int(server.grpc_target.rpartition(":")[2])}
        addresses = {(address, port) for address, port, _, state in sockets() if state == LISTENING and port in ports}
    loopback = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}  # the last: as v6
    assert {port for _, port in addresses} == ports
    assert {address for address, _ in addresses} <= loopback


def test_only_version_folders_of_a_base_path_are_reached(folder, tmp_path):
    """Names and labels are looked up, never joined to a path; a link is as good as a folder, for pushers use links."""
    base = tmp_path / "models" / "m"
    publish(folder / "m" / "1", base, 1)
    shutil.copytree(folder / "m" / "2", tmp_path / "models" / "2")  # beside the base path
    shutil.copytree(folder / "m" / "3", tmp_path / "3")
    (base / "v3").symlink_to(tmp_path / "3")
    with serve("m", base, **POLL) as server:
        server.wait_available(1)
        assert server.manager.models() == {"m": [1]}
        for name in ("..", "../m", "m/1", ".", "../../3", str(base), "m/../m"):
            with Client(server.url, server.grpc_target, name) as client:
                for call in (client.status, client.metadata, lambda client=client: client.predict([1.0])):
                    with pytest.raises(ServingError) as caught:
                        call()
                    assert caught.value.status in (400, 404)  # 400 where the client has resolved the dots
                with pytest.raises(ServingError, match="NOT_FOUND"):
                    client.predict_grpc({"x": np.float32([1.0])})
        (base / "3").symlink_to(tmp_path / "3")
        server.wait_available(3)
