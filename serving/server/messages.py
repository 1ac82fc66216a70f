"""The protocol's messages that more than one place fills: status and metadata, for gRPC and (as JSON) for REST, and
the answers of Classify and Regress."""

import contextlib
import json

from google.protobuf import json_format
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataResponse, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusResponse, ModelVersionStatus

from serving.server import operations
from serving.server.signatures import REGRESS
from serving.server.status import StatusError


def status_message(manager, name, number=None):
    """The `GetModelStatusResponse` for a model, or for one version of it."""
    from grpc import StatusCode

    response = GetModelStatusResponse()
    for version, state, error in manager.statuses(name, number):
        entry = response.model_version_status.add(version=version, state=ModelVersionStatus.State.Value(state))
        if error is not None:
            entry.status.error_code = StatusCode[error.code].value[0]
        entry.status.error_message = error.message if error is not None else ""
        entry.status.SetInParent()
    return response


def metadata_message(manager, name, number=None, label=""):
    """The `GetModelMetadataResponse` for a version: its signatures."""
    response = GetModelMetadataResponse()
    signatures = SignatureDefMap()
    with manager.lease(name, number, label) as version:
        for key, signature in version.signatures.items():
            signatures.signature_def[key].CopyFrom(signature.proto)
        response.model_spec.name = name
        response.model_spec.version.value = version.number
    response.metadata["signature_def"].Pack(signatures)
    return response


def describe(spec, version, signature):
    """Tell in an answer which version and signature gave it."""
    spec.name, spec.signature_name, spec.version.value = version.name, signature.name, version.number


def fill_result(result, method, outputs, count):
    """Fill a `ClassificationResult` or `RegressionResult` with the outputs of a run over `count` examples."""
    if method == REGRESS:
        for value in operations.regressions(outputs, count).tolist():
            result.regressions.add(value=value)
        return
    classes, scores = operations.classes_and_scores(outputs, count)
    for row in range(count):
        classifications = result.classifications.add()
        for column in range((classes if scores is None else scores).shape[1]):
            classifications.classes.add(
                label="" if classes is None else classes[row, column].decode("utf-8", "replace"),
                score=0 if scores is None else scores[row, column],
            )


def status_json(manager, name, number=None):
    """The status as REST answers it (bytes)."""
    return _to_json(status_message(manager, name, number))


def models_json(manager):
    """Every model with the status of its versions, as REST answers it (bytes); the stock server has no such call.

    {"models": [{"name": "mnist", "model_version_status": [{"version": "2", "state": "AVAILABLE", ...}, ...]}, ...]}
    """
    models = []
    for name in manager.models():
        status = GetModelStatusResponse()
        with contextlib.suppress(StatusError):  # no version of it has been found yet
            status = status_message(manager, name)
        models.append({"name": name, **json.loads(_to_json(status))})
    return json.dumps({"models": models}, indent=1).encode()


def metadata_json(manager, name, number=None, label=""):
    """The metadata as REST answers it (bytes): the signature map stands where the message has an `Any`."""
    response = metadata_message(manager, name, number, label)
    signatures = SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return b'{\n"model_spec": %b,\n"metadata": {"signature_def": %b}\n}\n' % (
        _to_json(response.model_spec),
        _to_json(signatures),
    )


def _to_json(message):
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    ).encode()
