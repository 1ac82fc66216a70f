"""One server: its sockets, its event loop, its two protocols, from start to drained stop."""

import asyncio
import contextlib
import functools
import gc
import socket

import grpc
import uvicorn
import uvloop

from course.core.errors import InputError
from serving.server.connections import KEEP_ALIVE_SECONDS, Connection
from serving.server.manager import Manager
from serving.server.metrics import Metrics
from serving.server.status import StatusError

_GRACE_SECONDS = 30  # how long requests under way may take to finish once the server is told to stop
_GC_THRESHOLDS = (50_000, 50, 100)  # parsed JSON is thousands of small lists: collect a hundred times less often


class Running:
    """A server that has been set up; `run` serves until `stop`."""

    def __init__(self, settings):
        """Bind the REST port and begin to load; `InputError` for a taken port or a config that cannot be served."""
        self.settings = settings
        self.rest_port = self.grpc_port = 0
        self._loop = self._server = None
        self._stop_asked = False
        self._socket = _bind(settings.host, settings.rest_api_port) if settings.rest_api_port else None
        if self._socket:
            self.rest_port = self._socket.getsockname()[1]
        # imported here, once the port is ours and before any thread: they bring TensorFlow, which takes seconds and
        # cannot be imported by two threads at a time
        from serving.server import app, grpc_service

        metrics = Metrics()
        self.manager = Manager(settings, metrics)
        self._application = app.application(self.manager, settings, metrics)
        self._register = functools.partial(
            grpc_service.register, manager=self.manager, settings=settings, metrics=metrics
        )
        self._credentials = grpc_service.credentials(settings.ssl)
        try:
            self.manager.start()
        except StatusError as error:
            self._close_socket()
            raise InputError(error.message) from error
        except InputError:
            self._close_socket()
            raise

    def run(self, started=lambda: None):
        """Serve in this thread until `stop`; calls `started` once both ports answer."""
        thresholds = gc.get_threshold()
        gc.set_threshold(*_GC_THRESHOLDS)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(started))
        finally:
            gc.set_threshold(*thresholds)
            self._close_socket()
            self.manager.close()
            gc.unfreeze()

    def stop(self):
        """Ask `run` to finish what is under way and return; from any thread, or from a signal handler."""
        self._stop_asked = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopped.set)

    async def _serve(self, started):
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        grpc_server = self._grpc_server()
        if grpc_server is not None:
            await grpc_server.start()
        rest = None
        if self._socket:
            config = uvicorn.Config(
                self._application,
                http=functools.partial(Connection, self.settings),
                loop="none",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="error",  # its warnings tell of every malformed request
                log_config=None,
                server_header=False,
                proxy_headers=False,
                backlog=2048,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
            self._server = uvicorn.Server(config)
            # `_serve` is `serve` without its signal handlers, which would end the process before the models are closed
            rest = asyncio.create_task(self._server._serve([self._socket]))
            while not self._server.started and not rest.done():
                await asyncio.sleep(0.01)
        started()
        if not self._stop_asked:
            await self._stopped.wait()
        self.manager.begin_stop()
        if self._server is not None:
            self._server.should_exit = True
        if grpc_server is not None:
            await grpc_server.stop(_GRACE_SECONDS)
        if rest is not None:
            await rest

    def _grpc_server(self):
        settings = self.settings
        if not settings.port and not settings.grpc_socket_path:
            return None
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.grpc_max_message_bytes),
                ("grpc.max_send_message_length", settings.grpc_max_message_bytes),
                ("grpc.so_reuseport", 0),  # or a second server on the same port would start and share its requests
                *settings.grpc_options,
            ]
        )
        self._register(server, stopped=self._stopped)
        if settings.port:
            address = f"{bracketed(settings.host)}:{max(settings.port, 0)}"
            self.grpc_port = self._listen(server, address, _port_taken(settings.host, settings.port, "--port"))
        if path := settings.grpc_socket_path:
            advice = "give --grpc_socket_path a file in a folder that is there and ours to write to"
            self._listen(server, f"unix:{path}", InputError(f"cannot listen on {path}: {advice}"))
        return server

    def _listen(self, server, address, refusal):
        """Have a gRPC server listen on an address; returns the port, or raises `refusal` where it is the address."""
        try:
            if self._credentials is None:
                return server.add_insecure_port(address)
            return server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            if self._credentials is not None:
                with contextlib.suppress(RuntimeError):  # gRPC does not say which: see whether the address will do
                    server.add_insecure_port(address)
                    refusal = InputError(
                        f"{self.settings.ssl_config_file}: gRPC cannot use server_key, server_cert or custom_ca; give "
                        "PEM texts, the key that of the certificate"
                    )
            raise refusal from error

    def _close_socket(self):
        if self._socket:
            self._socket.close()


def _bind(host, port):
    try:
        family, _, _, _, address = socket.getaddrinfo(host, max(port, 0), type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except socket.gaierror as error:
        raise InputError(f"--host {host} is no address of this machine") from error
    except OSError as error:
        raise _port_taken(host, port, "--rest_api_port") from error


def _port_taken(host, port, flag):
    return InputError(
        f"cannot listen on {bracketed(host)}:{port}: the port is taken, or not ours to take; choose another with "
        f"{flag} (-1 takes any free one)"
    )


def bracketed(host):
    """A host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host
