"""The standard gRPC health service, grpc.health.v1.Health, for `--enable_grpc_healthcheck_service`.

As with the health service that gRPC itself gives the stock server, a server that answers at all is SERVING; whether
its models are loaded is for GetModelStatus, or /readyz, to say.
"""

import functools

import grpc

SERVICE = "grpc.health.v1.Health"
_KNOWN = {"", SERVICE, "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"}
_SERVING, _SERVICE_UNKNOWN = 1, 3


def handler(stopped):
    """The service as a generic handler for a `grpc.aio` server, which sets the event `stopped` when it is to end."""
    messages = _messages()
    coding = {
        "request_deserializer": messages["HealthCheckRequest"].FromString,
        "response_serializer": messages["HealthCheckResponse"].SerializeToString,
    }
    methods = {
        "Check": grpc.unary_unary_rpc_method_handler(_check, **coding),
        "Watch": grpc.unary_stream_rpc_method_handler(functools.partial(_watch, stopped), **coding),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


async def _check(request, context):
    if request.service not in _KNOWN:
        await context.abort(grpc.StatusCode.NOT_FOUND, "service name unknown")
    return _messages()["HealthCheckResponse"](status=_SERVING)


async def _watch(stopped, request, context):
    """Tell the status, and stay on the line: it does not change until the server ends."""
    status = _SERVING if request.service in _KNOWN else _SERVICE_UNKNOWN
    yield _messages()["HealthCheckResponse"](status=status)
    await stopped.wait()


@functools.cache
def _messages():
    """The service's two messages, which no package here ships."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="health.proto", package="grpc.health.v1", syntax="proto3")
    request = file.message_type.add(name="HealthCheckRequest")
    request.field.add(name="service", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    response = file.message_type.add(name="HealthCheckResponse")
    values = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        values.value.add(name=name, number=number)
    kind = ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    response.field.add(name="status", number=1, type=field.TYPE_ENUM, type_name=kind, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"grpc.health.v1.{name}"))
        for name in ("HealthCheckRequest", "HealthCheckResponse")
    }
