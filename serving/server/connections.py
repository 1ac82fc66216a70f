"""What a REST client may take of the server's time and memory before its request has arrived.

uvicorn waits without end for a request that has begun, keeps whatever length of headers, and runs what was asked for
although nobody is there any more to be answered.  This is its protocol with bounds.
"""

import re

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.server import codec

KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection: the one that closes it should not be the server
_MAX_HEAD = 2**16  # bytes around a body: request line, headers, trailers
_PER_BODY_BYTE = 8  # more of them for each byte of a body in chunks, whose sizes lie between
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_LINGER = 0.2  # seconds that an idle connection stays open when the server stops: a request may be on its way


class Connection(HttpToolsProtocol):
    """A REST connection.

    A request has `rest_api_timeout_in_ms` to arrive, then it is answered 408; the client has as long again to take
    some of its answer.  More connections than `rest_api_max_connections` are answered 503, headers beyond 64 KiB 431.
    """

    def __init__(self, settings, **arguments):
        super().__init__(**arguments)
        self._patience = settings.rest_api_timeout_in_ms / 1000
        self._max_connections = settings.rest_api_max_connections
        self._arriving_since = None  # loop time; None while no request has begun that is not there yet
        self._around = self._body = self._begun = 0  # bytes around the body and of it, in this request; requests so far
        self._unsent, self._unsent_since = None, 0  # (requests begun, bytes of answers not taken), and since when
        self._stopping = False
        self._look_task = self._under_way = None  # the latter: the request being answered, and its task

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport):
        super().connection_made(transport)
        self._arriving_since = self.loop.time()
        self._look_task = self.loop.call_later(self._patience, self._look)
        if len(self.connections) > self._max_connections:
            self._refuse(503, f"more than {self._max_connections} connections are open (--rest_api_max_connections)")

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._look_task.cancel()
        if self._under_way is not None:
            cycle, task = self._under_way
            cycle.disconnected = True  # uvicorn tells the newest request alone
            if not cycle.response_started:
                task.cancel()  # nobody waits for the answer: what has not begun to run never will

    def shutdown(self):
        if self.cycle is None or self.cycle.response_complete:
            self._stopping = True
            self.loop.call_later(_LINGER, super().shutdown)
        else:
            super().shutdown()

    def _look(self):
        """Give up on a client that neither sends nor takes; look again when that may next be so."""
        now, unsent = self.loop.time(), (self._begun, self.transport.get_write_buffer_size())
        if unsent != self._unsent:
            self._unsent, self._unsent_since = unsent, now
        elif unsent[1] and now - self._unsent_since >= self._patience:
            self.transport.abort()
            return
        if self._arriving_since is None or self.flow.read_paused:  # paused: the rest waits for us
            wait = self._patience
        else:
            wait = self._arriving_since + self._patience - now
        if wait > 0:
            self._look_task = self.loop.call_later(wait, self._look)
        elif self._awaits_request():
            what = f"the request did not arrive within {self._patience:g} seconds"
            self._refuse(408, f"{what} (--rest_api_timeout_in_ms)")
        else:
            self.transport.close()

    def _awaits_request(self):
        """Whether a request has begun to arrive that has not been answered."""
        cycle = self.cycle
        return self._begun and (cycle is None or cycle.scope is not self.scope or not cycle.response_complete)

    def _refuse(self, status, message):
        """Answer, whatever has arrived, and close."""
        body = codec.encode_error(message)
        headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + headers + body)
        self.transport.close()
        self._look_task.cancel()
        self._look_task = self.loop.call_later(self._patience, self.transport.abort)

    def send_400_response(self, msg):
        self._refuse(400, f"Malformed request: this is no HTTP ({msg})")

    # --- the request --------------------------------------------------------------------------------------------------

    def data_received(self, data):
        if self._arriving_since is None:
            self._arriving_since = self.loop.time()
        if not self._around and _UPGRADE.search(data):
            data = _without_upgrade(data)
        self._around += len(data)
        super().data_received(data)
        if self._around > _MAX_HEAD + _PER_BODY_BYTE * self._body and not self.transport.is_closing():
            self._refuse(431, f"the headers are longer than {_MAX_HEAD} bytes")

    def on_message_begin(self):
        super().on_message_begin()
        self._begun += 1
        if self._arriving_since is None:  # behind another one in the same packet
            self._arriving_since = self.loop.time()

    def on_headers_complete(self):
        super().on_headers_complete()
        if self._stopping or self.expect_100_continue:  # a client told no before its body may send it, or may not
            self.cycle.keep_alive = False

    def on_body(self, body):
        self._around -= len(body)
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self):
        self._arriving_since = None
        self._around = self._body = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle, app):
        task = self.loop.create_task(cycle.run_asgi(app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)
        self._under_way = cycle, task


def _without_upgrade(data):
    """A request's first packet without the offer to speak HTTP/2, for which the parser would drop the body.

    Java's client and `curl --http2` make it; a server that does not take it up is to read on.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"\r\nnot-upgrade:", head) + end + rest
