"""The gRPC side: PredictionService and ModelService."""

import asyncio
import contextlib
import time

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.apis.classification_pb2 import ClassificationResponse
from tensorflow_serving.apis.inference_pb2 import MultiInferenceResponse
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigResponse
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictResponse
from tensorflow_serving.apis.regression_pb2 import RegressionResponse

from serving.server import messages, operations, tensors
from serving.server.signatures import CLASSIFY, DEFAULT, REGRESS, signature_named
from serving.server.status import StatusError, invalid


def register(server, manager, settings, metrics):
    """Add both services to a `grpc.aio` server."""
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(manager, settings, metrics), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(manager), server)


@contextlib.asynccontextmanager
async def _statuses(context):
    """Answer a `StatusError` raised inside as the gRPC status it is."""
    try:
        yield
    except StatusError as error:
        await context.abort(grpc.StatusCode[error.code], error.message)


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict, Classify, Regress, MultiInference and GetModelMetadata."""

    def __init__(self, manager, settings, metrics):
        self._manager = manager
        self._check_method = settings.enable_signature_method_name_check
        self._metrics = metrics

    @contextlib.asynccontextmanager
    async def _lease(self, request, spec, api, context):
        """Yield the version that `spec` names; count and time the call."""
        start, status = time.perf_counter(), "OK"
        try:
            async with _statuses(context):
                try:
                    if not (request.tasks if api == "MultiInference" else request.HasField("model_spec")):
                        raise invalid("Missing ModelSpec")
                    with self._manager.lease(spec.name, _number(spec), spec.version_label) as version:
                        yield version
                except StatusError as error:
                    status = error.code
                    raise
                except asyncio.CancelledError:
                    status = "CANCELLED"
                    raise
                except Exception as error:
                    status = "INTERNAL"
                    raise StatusError(status, f"{type(error).__name__}: {error}") from error
        finally:
            if spec.name in self._manager.models_configured:
                self._metrics.count_request(spec.name, status)
                if status == "OK":
                    self._metrics.observe_request(spec.name, api, "GRPC", (time.perf_counter() - start) * 1e6)

    async def Predict(self, request, context):
        """Run a signature on tensors."""
        async with self._lease(request, request.model_spec, "Predict", context) as version:
            signature = signature_named(version.signatures, request.model_spec.signature_name)
            inputs = {alias: tensors.from_proto(value) for alias, value in request.inputs.items()}
            inputs, wanted = signature.complete(inputs), signature.select(request.output_filter)
            outputs = await version.run(signature, inputs, wanted)
            response = PredictResponse()
            _describe(response.model_spec, version, signature)
            for alias, value in outputs.items():
                tensors.to_proto(value, response.outputs[alias])
            return response

    async def Classify(self, request, context):
        """Classify tf.Examples."""
        async with self._lease(request, request.model_spec, "Classify", context) as version:
            response = ClassificationResponse()
            await self._examine(version, request.model_spec, CLASSIFY, request.input, response)
            return response

    async def Regress(self, request, context):
        """Regress on tf.Examples."""
        async with self._lease(request, request.model_spec, "Regress", context) as version:
            response = RegressionResponse()
            await self._examine(version, request.model_spec, REGRESS, request.input, response)
            return response

    async def MultiInference(self, request, context):
        """Several Classify and Regress calls of one model on the same tf.Examples."""
        spec = request.tasks[0].model_spec if request.tasks else ModelSpec()
        async with self._lease(request, spec, "MultiInference", context) as version:
            _check_tasks(request.tasks, version.signatures)
            response = MultiInferenceResponse()
            for task in request.tasks:
                result = response.results.add()
                part = RegressionResponse() if task.method_name == REGRESS else ClassificationResponse()
                await self._examine(version, task.model_spec, task.method_name, request.input, part)
                result.model_spec.CopyFrom(part.model_spec)
                kind = "regression_result" if task.method_name == REGRESS else "classification_result"
                getattr(result, kind).CopyFrom(part.result)
            return response

    async def _examine(self, version, spec, method, examples, response):
        signature = operations.signature_for(version.signatures, spec.signature_name, method, self._check_method)
        examples = operations.examples_of(examples)
        outputs = await version.run(signature, *operations.feed(signature, examples))
        _describe(response.model_spec, version, signature)
        if method == REGRESS:
            for value in operations.regressions(outputs, len(examples)).tolist():
                response.result.regressions.add(value=value)
            return
        classes, scores = operations.classes_and_scores(outputs, len(examples))
        for row in range(len(examples)):
            classifications = response.result.classifications.add()
            for column in range((classes if scores is None else scores).shape[1]):
                classifications.classes.add(
                    label="" if classes is None else classes[row, column].decode("utf-8", "replace"),
                    score=0 if scores is None else scores[row, column],
                )

    async def GetModelMetadata(self, request, context):
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


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, manager):
        self._manager = manager

    async def GetModelStatus(self, request, context):
        """The state of every version of a model, or of one."""
        async with _statuses(context):
            if not request.HasField("model_spec"):
                raise invalid("Missing ModelSpec")
            return messages.status_message(self._manager, request.model_spec.name, _number(request.model_spec))

    async def HandleReloadConfigRequest(self, request, context):
        """Serve another configuration; answers when its new models are available."""
        async with _statuses(context):
            if request.config.WhichOneof("config") != "model_config_list":
                raise invalid(
                    "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                    "Only ModelConfigList is currently supported"
                )
            await asyncio.to_thread(self._manager.reload, request.config)
            response = ReloadConfigResponse()
            response.status.error_code = 0
            return response


def _number(spec):
    return spec.version.value if spec.HasField("version") else None


def _describe(spec, version, signature):
    """Tell in an answer which version and signature gave it."""
    spec.name, spec.signature_name, spec.version.value = version.name, signature.name, version.number


def _check_tasks(tasks, signatures):
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
        signature = operations.signature_for(signatures, name, task.method_name)
        tensor_names |= {spec.name for spec in signature.inputs.values()}
    if len(tensor_names) > 1:
        raise invalid("Input tensor must be the same for all Signatures.")
