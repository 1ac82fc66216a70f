"""A load generator for this machine: N clients, each with one request under way, over REST or gRPC.

It runs in a process of its own, because a client that shares the server's interpreter would slow the server down:

    generate(Load("127.0.0.1", 8501, path="/v1/models/m:predict", body=..., clients=64))

It asks loopback addresses only, for a bounded number of seconds, and stops by itself.
"""

import asyncio
import base64
import contextlib
import dataclasses
import ipaddress
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from course.core.errors import InputError

MOST_SECONDS, MOST_CLIENTS = 600, 1024
_PREDICT = "/tensorflow.serving.PredictionService/Predict"


@dataclasses.dataclass
class Load:
    """What to send, where to, and for how long."""

    host: str  # a loopback address
    port: int
    body: bytes  # of the HTTP request, or the serialised PredictRequest
    path: str = ""  # of the HTTP request; "" sends the body over gRPC
    clients: int = 1  # each waits for its answer before it asks again
    seconds: float = 3.0
    warm_up: float = 0.5  # seconds before those, not counted
    patience: float = 30.0  # seconds that an answer may take beyond the end; then it is lost

    def __post_init__(self):
        if not ipaddress.ip_address(self.host).is_loopback:
            raise InputError(f"{self.host} is not this machine: the load generator asks loopback addresses only")
        if not 1 <= self.clients <= MOST_CLIENTS or not 0 < self.warm_up + self.seconds + self.patience <= MOST_SECONDS:
            raise InputError(f"give 1 to {MOST_CLIENTS} clients, and at most {MOST_SECONDS} seconds")


@dataclasses.dataclass
class Measured:
    """What came back."""

    begin: float  # of the count, on this machine's `time.perf_counter`
    seconds: float  # that were counted
    statuses: dict[str, int]  # HTTP status or gRPC code, as text -> answers; "lost" are those that never came
    ends: np.ndarray  # seconds since the count began at which each good answer was complete, float64 [n]
    latencies: np.ndarray  # milliseconds of each good answer, float64 [n]

    @property
    def rate(self):
        """Good answers a second."""
        return len(self.latencies) / self.seconds

    @property
    def failed(self):
        """Number of answers that were not good, or never came."""
        return sum(count for status, count in self.statuses.items() if status not in ("200", "OK"))

    def percentile(self, q):
        """The q-th percentile of the latencies, in milliseconds."""
        return float(np.percentile(self.latencies, q)) if len(self.latencies) else float("nan")


@contextlib.contextmanager
def generating(load):
    """Start to generate `load` in a child process; yields a function that waits for the end and gives `Measured`."""
    fields = dataclasses.asdict(load) | {"body": base64.b64encode(load.body).decode()}
    with tempfile.TemporaryFile() as answer:  # no pipe: it would fill up while nobody reads
        child = subprocess.Popen(
            [sys.executable, "-m", "serving.load"],
            stdin=subprocess.PIPE,
            stdout=answer,
            cwd=Path(__file__).resolve().parents[1],
        )

        def finish():
            if child.wait():
                raise RuntimeError(f"the load generator ended with status {child.returncode}")
            answer.seek(0)
            header, _, arrays = answer.read().partition(b"\n")
            numbers = np.frombuffer(arrays, np.float64).reshape(2, -1)
            return Measured(**json.loads(header), ends=numbers[0], latencies=numbers[1])

        try:
            child.stdin.write(json.dumps(fields).encode())
            child.stdin.close()
            yield finish
        finally:
            child.kill()
            child.wait()


def generate(load):
    """Generate `load` and return what was `Measured`."""
    with generating(load) as finish:
        return finish()


# --- in the child -----------------------------------------------------------------------------------------------------


class _Log:
    """Answers as they come; those that come in the warm-up or after the end are not kept."""

    def __init__(self, load):
        self._load = load
        self.statuses = Counter()
        self.times = []  # (start, end) of each good answer

    def start(self):
        """Start the clock: everything is connected."""
        self.begin = time.perf_counter() + self._load.warm_up
        self.end = self.begin + self._load.seconds

    def add(self, status, start, good):
        """Note an answer; returns whether there is still time for another."""
        now = time.perf_counter()
        if self.begin <= now <= self.end:
            self.statuses[status] += 1
            if good:
                self.times.append((start, now))
        return now < self.end


class _HttpClient(asyncio.Protocol):
    """One connection.  It reads no more of HTTP than the status and the length: a real client's parser would cost as
    much as the server's."""

    def __init__(self, request, log):
        self._request, self._log = request, log
        self._received, self._wanted = b"", 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self._transport = transport

    def ask(self):
        """Send the request; the next one follows its answer, until the time is up."""
        if self._transport.is_closing():
            return
        self._start = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data):
        self._received += data
        if not self._wanted:
            head, found, _ = self._received.partition(b"\r\n\r\n")
            if not found:
                return
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            self._wanted = len(head) + 4 + int(length.partition(b":")[2])
        if len(self._received) < self._wanted:
            return
        status = self._received[9:12].decode()
        self._received, self._wanted = b"", 0
        if self._log.add(status, self._start, status == "200"):
            self.ask()
        else:
            self.done.set_result(True)
            self._transport.close()

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_result(False)


async def _ask_http(load, log):
    head = f"POST {load.path} HTTP/1.1\r\nHost: {load.host}\r\nContent-Length: {len(load.body)}\r\n\r\n"
    request, loop = head.encode() + load.body, asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: _HttpClient(request, log), load.host, load.port))[1]
        for _ in range(load.clients)
    ]
    log.start()
    for client in clients:
        client.ask()
    await asyncio.wait([client.done for client in clients], timeout=load.warm_up + load.seconds + load.patience)
    log.statuses["lost"] += sum(not (client.done.done() and client.done.result()) for client in clients)


async def _ask_grpc(load, log):
    import grpc

    async def ask():
        going = True
        while going:
            start = time.perf_counter()
            try:
                await call(load.body, timeout=load.warm_up + load.seconds + load.patience)
                going = log.add("OK", start, True)
            except grpc.RpcError as error:
                going = log.add(error.code().name, start, False)

    async with grpc.aio.insecure_channel(f"{load.host}:{load.port}") as channel:
        call = channel.unary_unary(_PREDICT)  # bytes both ways: protobuf's time is the caller's, not the server's
        await channel.channel_ready()
        log.start()
        await asyncio.gather(*(ask() for _ in range(load.clients)))


def _main():
    import uvloop

    fields = json.load(sys.stdin)
    load = Load(**fields | {"body": base64.b64decode(fields["body"])})
    log = _Log(load)
    uvloop.run((_ask_http if load.path else _ask_grpc)(load, log))
    times = np.array(log.times, np.float64).reshape(-1, 2)
    header = {"begin": log.begin, "seconds": load.seconds, "statuses": +log.statuses}
    numbers = np.stack([times[:, 1] - log.begin, 1e3 * (times[:, 1] - times[:, 0])])
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + numbers.tobytes())


if __name__ == "__main__":
    _main()
