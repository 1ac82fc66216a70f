"""The gRPC side: PredictionService and ModelService."""

import asyncio
import contextlib

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2
from tensorflow_serving.apis.classification_pb2 import ClassificationResponse
from tensorflow_serving.apis.inference_pb2 import MultiInferenceResponse
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigResponse
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictResponse
from tensorflow_serving.apis.regression_pb2 import RegressionResponse

from serving.server import health, messages, operations, tensors
from serving.server.offload import LARGE, are_large, off_loop_if
from serving.server.signatures import CLASSIFY, DEFAULT, REGRESS, signature_named
from serving.server.status import StatusError, invalid


def register(server, manager, settings, metrics, stopped):
    """Add the services to a `grpc.aio` server; the event `stopped` is set when it is to end."""
    for servicer, file in (
        (PredictionService(manager, settings, metrics), prediction_service_pb2),
        (ModelService(manager), model_service_pb2),
    ):
        (service,) = file.DESCRIPTOR.services_by_name.values()
        handlers = {method.name: _handler(getattr(servicer, method.name), method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    if settings.enable_grpc_healthcheck_service:
        server.add_generic_rpc_handlers((health.handler(stopped),))


def _handler(answer, method):
    """The gRPC handler of a method, which is called with the request, whether that is large, and the call's context.

    A message that cannot be read is INTERNAL, as the stock server's gRPC has it.
    """
    request_type, response_type = map(GetMessageClass, (method.input_type, method.output_type))

    async def read_and_answer(content, context):
        is_large = len(content) > LARGE
        try:
            request = await off_loop_if(is_large, request_type.FromString, content)
        except DecodeError as error:  # grpc.aio, left to read it, would answer UNKNOWN
            await context.abort(grpc.StatusCode.INTERNAL, f"the request is no {method.input_type.name}: {error}")
        return await answer(request, is_large, context)

    return grpc.unary_unary_rpc_method_handler(read_and_answer, response_serializer=response_type.SerializeToString)


def credentials(ssl):
    """The credentials of a server's gRPC ports from an `SSLConfig`, whose fields are PEM texts; None without one."""
    if ssl is None:
        return None
    return grpc.ssl_server_credentials(
        [(ssl.server_key.encode(), ssl.server_cert.encode())],
        root_certificates=ssl.custom_ca.encode() or None,
        require_client_auth=ssl.client_verify,
    )


@contextlib.asynccontextmanager
async def _statuses(context):
    """Answer a `StatusError` raised inside as the gRPC status it is."""
    try:
        yield
    except StatusError as error:
        await context.abort(grpc.StatusCode[error.code], error.message)


class PredictionService:
    """Predict, Classify, Regress, MultiInference and GetModelMetadata."""

    def __init__(self, manager, settings, metrics):
        self._manager = manager
        self._request_log = manager.request_log
        self._check_method = settings.enable_signature_method_name_check
        self._fill = tensors.to_content if settings.enable_serialization_as_tensor_content else tensors.to_proto
        self._metrics = metrics

    @contextlib.asynccontextmanager
    async def _lease(self, request, spec, api, context):
        """Yield the version that `spec` names; count and time the call."""
        is_served = spec.name in self._manager.models_configured
        async with _statuses(context):
            with self._metrics.call(spec.name, api, "GRPC", is_served=is_served):
                if api != "MultiInference" and not request.HasField("model_spec"):
                    raise invalid("Missing ModelSpec")
                with self._manager.lease(spec.name, _number(spec), spec.version_label) as version:
                    yield version

    async def Predict(self, request, is_large, context):
        """Run a signature on tensors."""
        async with self._lease(request, request.model_spec, "Predict", context) as version:
            signature = signature_named(version.signatures, request.model_spec.signature_name, self._check_method)
            inputs = signature.complete(await off_loop_if(is_large, tensors.from_protos, request.inputs))
            wanted = signature.select(request.output_filter)
            outputs = await version.run(signature, inputs, wanted)
            response = PredictResponse()
            messages.describe(response.model_spec, version, signature)
            await off_loop_if(are_large(outputs), self._fill_outputs, outputs, response)
            self._log(version, "predict_log", request, response)
            return response

    def _fill_outputs(self, outputs, response):
        for alias, value in outputs.items():
            self._fill(value, response.outputs[alias])

    async def Classify(self, request, is_large, context):
        """Classify tf.Examples."""
        async with self._lease(request, request.model_spec, "Classify", context) as version:
            response = ClassificationResponse()
            await self._examine(version, request.model_spec, CLASSIFY, request.input, is_large, response)
            self._log(version, "classify_log", request, response)
            return response

    async def Regress(self, request, is_large, context):
        """Regress on tf.Examples."""
        async with self._lease(request, request.model_spec, "Regress", context) as version:
            response = RegressionResponse()
            await self._examine(version, request.model_spec, REGRESS, request.input, is_large, response)
            self._log(version, "regress_log", request, response)
            return response

    async def MultiInference(self, request, is_large, context):
        """Several Classify and Regress calls of one model on the same tf.Examples."""
        spec = request.tasks[0].model_spec if request.tasks else ModelSpec()
        async with self._lease(request, spec, "MultiInference", context) as version:
            _check_tasks(request.tasks, version.signatures, self._check_method)
            response = MultiInferenceResponse()
            for task in request.tasks:
                result = response.results.add()
                part = RegressionResponse() if task.method_name == REGRESS else ClassificationResponse()
                await self._examine(version, task.model_spec, task.method_name, request.input, is_large, part)
                result.model_spec.CopyFrom(part.model_spec)
                kind = "regression_result" if task.method_name == REGRESS else "classification_result"
                getattr(result, kind).CopyFrom(part.result)
            self._log(version, "multi_inference_log", request, response)
            return response

    def _log(self, version, kind, request, response):
        if self._request_log.samples(version.name):
            self._request_log.messages(version, kind, request, response)

    async def _examine(self, version, spec, method, examples, is_large, response):
        signature = operations.signature_for(version.signatures, spec.signature_name, method, self._check_method)
        examples = await off_loop_if(is_large, operations.examples_of, examples)
        outputs = await version.run(signature, *operations.feed(signature, examples))
        messages.describe(response.model_spec, version, signature)
        await off_loop_if(are_large(outputs), messages.fill_result, response.result, method, outputs, len(examples))

    async def GetModelMetadata(self, request, is_large, context):
        """The signatures of a version."""
        async with _statuses(context):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            if not request.metadata_field:
                raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
            for field in request.metadata_field:
                if field != "signature_def":
                    raise invalid(f"Metadata field {field} is not supported")
            spec = request.model_spec
            return messages.metadata_message(self._manager, spec.name, _number(spec), spec.version_label)


class ModelService:
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, manager):
        self._manager = manager

    async def GetModelStatus(self, request, is_large, context):
        """The state of every version of a model, or of one."""
        async with _statuses(context):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            return messages.status_message(self._manager, request.model_spec.name, _number(request.model_spec))

    async def HandleReloadConfigRequest(self, request, is_large, context):
        """Serve another configuration; answers when its new models are available."""
        async with _statuses(context):
            if request.config.WhichOneof("config") != "model_config_list":
                raise invalid(
                    "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                    "Only ModelConfigList is currently supported"
                )
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._manager.reloads, self._manager.reload, request.config)
            response = ReloadConfigResponse()
            response.status.error_code = 0
            return response


def _number(spec):
    return spec.version.value if spec.HasField("version") else None


def _check_tasks(tasks, signatures, check_method):
    """Refuse the combinations of tasks that one MultiInference call cannot answer together."""
    seen, tensor_names = set(), set()
    for task in tasks:
        name = task.model_spec.signature_name or DEFAULT
        if not task.model_spec.name:
            raise invalid("Found ModelSpec with an empty model name.")
        if task.model_spec.name != tasks[0].model_spec.name:
            raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        if name in seen:
            raise invalid(f"Duplicate evaluation of signature: {name}")
        seen.add(name)
        if name not in signatures:
            raise invalid(f"Requested signature not found in model graph: {name}")
        if task.method_name not in (CLASSIFY, REGRESS):
            raise StatusError("UNIMPLEMENTED", f"Unsupported signature method_name: {task.method_name}")
        signature = operations.signature_for(signatures, name, task.method_name, check_method)
        tensor_names |= {spec.name for spec in signature.inputs.values()}
    if len(tensor_names) > 1:
        raise invalid("Input tensor must be the same for all Signatures.")
