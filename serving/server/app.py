"""The REST side: an ASGI application with the protocol's routes, and beside them health URLs, a list of the models and
the metrics.
"""

import asyncio
import contextlib
import json
import re
import zlib
from urllib.parse import unquote_to_bytes

from serving.server import codec, messages, operations
from serving.server.offload import LARGE, are_large, off_loop_if
from serving.server.signatures import CLASSIFY, DEFAULT, REGRESS, signature_named
from serving.server.status import HTTP, StatusError, invalid

# the stock server's patterns; its case-blind ones let :PREDICT through and then do not know it, so that it is malformed
_TARGET = r"(?i:/v1/models{}(?:/versions/([0-9]+)|/labels/([^/:]+))?)"
_CALL = re.compile(_TARGET.format("/([^/:]+)") + ":(classify|regress|predict)")
_QUERY = re.compile(_TARGET.format("(?:/([^/:]+))?") + "(?i:/(metadata))?")

_JSON, _TEXT = (b"content-type", b"application/json"), (b"content-type", b"text/plain; charset=utf-8")
_CORS = [
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"POST, GET"),
    (b"access-control-allow-headers", b"Content-Type"),
]
_MODELS = "/v1/models/"  # the list; without the last slash the protocol wants an error
_MAX_INFLATED = 100 * 2**20  # bytes, the stock server's bound
_INT64_MAX = 2**63 - 1


def application(manager, settings, metrics):
    """The ASGI application over a `Manager`."""
    rest = Rest(manager, settings, metrics)

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        try:
            status, headers, body = await rest.answer(scope, receive)
        except asyncio.CancelledError:  # the client has gone, or the server's grace is over
            status, headers, body = 503, [_JSON], codec.encode_error("the server is stopping")
        if settings.rest_api_enable_cors_support:
            headers = [*headers, *_CORS]
        headers = [*headers, (b"content-length", str(len(body)).encode())]
        with contextlib.suppress(asyncio.CancelledError):  # gone while it was still to take an earlier answer
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return app


class Rest:
    """Turns HTTP requests into calls on the models, and statuses into HTTP answers."""

    def __init__(self, manager, settings, metrics):
        self._manager = manager
        self._settings = settings
        self._check_method = settings.enable_signature_method_name_check
        self._metrics = metrics
        self._timeout = settings.rest_api_timeout_in_ms / 1000

    async def answer(self, scope, receive):
        """(HTTP status, headers, body) for a request."""
        method, path = scope["method"], scope["raw_path"].decode("latin-1")
        if not path.lower().startswith("/v1/"):
            return self._beside_the_protocol(method, path)
        if scope["query_string"]:  # a part of the path to the stock server, in which it finds no model then
            path += "?" + scope["query_string"].decode("latin-1")
        if method == "OPTIONS" and self._settings.rest_api_enable_cors_support:
            return 200, [], b""
        try:
            if method == "POST" and (call := _CALL.fullmatch(path)):
                return 200, [_JSON], await self._call(call, scope, receive)
            if method == "GET" and (query := _QUERY.fullmatch(path)):
                return 200, [_JSON], self._query(query)
            if method == "GET" and path.lower() == _MODELS:
                return 200, [_JSON], messages.models_json(self._manager)
            raise invalid(f"Malformed request: {method} {path}")
        except _TooLarge as error:
            return 413, [_JSON], codec.encode_error(error.message)
        except StatusError as error:
            return HTTP[error.code], [_JSON], codec.encode_error(error.message)

    # --- calls --------------------------------------------------------------------------------------------------------

    async def _call(self, match, scope, receive):
        """POST .../{model}:predict, :classify and :regress."""
        name, number, label = _target(match)
        is_served = name in self._manager.models_configured
        with self._metrics.call(name, match[4], "REST", is_served=is_served):
            try:
                body = await self._body(scope, receive)
                async with asyncio.timeout(self._timeout):
                    if match[4] == "predict":
                        return await self._predict(body, name, number, label)
                    call = CLASSIFY if match[4] == "classify" else REGRESS
                    return await self._examine(body, name, number, label, call)
            except TimeoutError:
                raise StatusError("DEADLINE_EXCEEDED", f"no answer within {self._timeout:g} seconds") from None

    async def _predict(self, body, name, number, label):
        with contextlib.ExitStack() as stack:
            version = refusal = None  # leased before decoding and kept: the version whose signature it was must run
            try:
                version = stack.enter_context(self._manager.lease(name, number, label))
            except StatusError as error:
                refusal = error

            def inputs_of(signature_name):
                if refusal:  # only now: a body that is no JSON is the first thing to be told
                    raise refusal
                signature = version.signatures.get(signature_name or DEFAULT)
                if signature is None:
                    raise invalid(f'Serving signature name: "{signature_name or DEFAULT}" not found in signature def')
                return signature.inputs

            request = await off_loop_if(len(body) > LARGE, codec.decode_predict, body, inputs_of)
            signature = signature_named(version.signatures, request.signature_name, self._check_method)
            outputs = await version.run(signature, signature.complete(request.inputs), signature.select(()))
            if self._manager.request_log.samples(name):
                self._manager.request_log.predict(version, signature, request.inputs, outputs)
        return await off_loop_if(are_large(outputs), codec.encode_predict, outputs, request.by_row)

    async def _examine(self, body, name, number, label, call):
        """Classify and Regress."""
        signature_name, examples = await off_loop_if(len(body) > LARGE, codec.decode_examples, body)
        with self._manager.lease(name, number, label) as version:
            signature = operations.signature_for(version.signatures, signature_name, call, self._check_method)
            outputs = await version.run(signature, *operations.feed(signature, examples))
            if self._manager.request_log.samples(name):
                self._manager.request_log.examine(version, signature, call, examples, outputs)
        if call == REGRESS:
            return codec.encode_regressions(operations.regressions(outputs, len(examples)))
        return codec.encode_classifications(*operations.classes_and_scores(outputs, len(examples)))

    async def _body(self, scope, receive):
        """The request's body; gzip is inflated, and what cannot be inflated reads as empty, as in the stock server."""
        pieces, length, limit = [], 0, self._settings.rest_api_max_body_bytes
        headers = dict(scope["headers"])
        if int(headers.get(b"content-length", 0)) > limit:  # before any of it is read
            raise _TooLarge(limit)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise StatusError("CANCELLED", "the client closed the connection")
            pieces.append(message.get("body", b""))
            length += len(pieces[-1])
            if length > limit:
                raise _TooLarge(limit)
            if not message.get("more_body"):
                break
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if b"gzip" in headers.get(b"content-encoding", b"").lower():
            return await off_loop_if(len(body) > LARGE // 8, _inflate, body, min(limit, _MAX_INFLATED))
        return body

    # --- queries ------------------------------------------------------------------------------------------------------

    def _query(self, match):
        """GET .../{model} (status) and .../{model}/metadata."""
        name, number, label = _target(match)
        if not name:
            served = ", ".join(self._manager.models_configured) or "none"
            raise invalid(
                f"Missing model name in request. Models served: {served} (listed with their versions at {_MODELS})"
            )
        if match[4] == "metadata":  # the stock server answers /METADATA with the status
            return messages.metadata_json(self._manager, name, number, label)
        return messages.status_json(self._manager, name, number)

    def _beside_the_protocol(self, method, path):
        """What the stock server has no URL for (health, the list of models), the metrics, and a plain 404."""
        if method == "GET" and path == self._settings.metrics_path:
            return 200, [_TEXT], self._metrics.page().encode()
        if method in ("GET", "HEAD") and path in ("/healthz", "/readyz", "/models"):
            models = self._manager.models()
            ready = path != "/readyz" or all(models.values())
            listed = {name: {"versions": list(map(str, numbers))} for name, numbers in models.items()}
            return 200 if ready else 503, [_JSON], json.dumps({"models": listed}).encode()
        return 404, [_TEXT], b"Not found\n"


class _TooLarge(StatusError):
    """A body beyond the limit; the one answer whose HTTP status has no gRPC counterpart."""

    def __init__(self, limit):
        super().__init__("INVALID_ARGUMENT", f"the body is larger than {limit} bytes (--rest_api_max_body_bytes)")


def _target(match):
    """(model name, version number or None, label) of a matched path, percent-decoded."""
    name, number, label = (
        unquote_to_bytes(part).decode("utf-8", "replace") if part else "" for part in match.group(1, 2, 3)
    )
    number = number.lstrip("0") or number[:1]
    if len(number) > len(str(_INT64_MAX)) or int(number or 0) > _INT64_MAX:
        raise invalid(f"Failed to convert version: {number} to numeric.")
    return name, int(number) if number else None, label


def _inflate(body, limit):
    """Inflate gzip to `limit` bytes at most: what may not be sent plain may not be sent packed."""
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        inflated = inflater.decompress(body, limit + 1)
    except zlib.error:
        return b""
    if len(inflated) > limit:
        if limit < _MAX_INFLATED:
            raise _TooLarge(limit)
        raise invalid(f"the body inflates to more than {_MAX_INFLATED >> 20} MiB")
    return inflated if inflater.eof else b""
