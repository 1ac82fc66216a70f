"""First runs of a freshly loaded model, so that no client pays for them."""

import contextlib
from pathlib import Path

import numpy as np

from serving.server import operations, tensors
from serving.server.signatures import CLASSIFY, PREDICT, REGRESS, signature_named
from serving.server.status import StatusError, invalid

FILE = "assets.extra/tf_serving_warmup_requests"
MAX_RECORDS = 1000


def warm_up(model, folder, iterations=1):
    """Run the requests recorded with a model, each `iterations` times; `StatusError` where one fails, which makes the
    version unfit.

    Without a record every signature whose inputs are numbers of declared sizes is run once on zeros: TensorFlow
    optimises a graph in its first run, and that takes longer than a thousand others.
    """
    path = Path(folder) / FILE
    if path.is_file():
        for number, record in enumerate(_records(path)):
            if number == MAX_RECORDS:
                raise invalid(f"{path} holds more than {MAX_RECORDS} warm-up requests")
            for _ in range(max(1, iterations)):
                _replay(model, record)
        return
    for signature in model.signatures.values():
        inputs = {alias: _zeros(spec) for alias, spec in signature.inputs.items()}
        if inputs and signature.method == PREDICT and all(value is not None for value in inputs.values()):
            with contextlib.suppress(StatusError):  # zeros may be no valid input; nobody asked for this run
                model.run(signature, inputs, tuple(signature.outputs))


def _zeros(spec):
    """One row of zeros for an input; None where the signature leaves open what it takes."""
    if spec.dtype is None or spec.dtype == np.object_ or not spec.shape or None in spec.shape[1:]:
        return None
    return np.zeros([1 if size is None else size for size in spec.shape], spec.dtype)


def _records(path):
    import tensorflow as tf

    yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()


def _replay(model, record):
    """Run one recorded request."""
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    log = PredictionLog.FromString(record)
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        request = log.predict_log.request
        signature = signature_named(model.signatures, request.model_spec.signature_name)
        inputs = signature.complete(tensors.from_protos(request.inputs))
        model.run(signature, inputs, signature.select(request.output_filter))
        return
    if kind == "multi_inference_log":
        request = log.multi_inference_log.request
        tasks = [(task.model_spec.signature_name, task.method_name) for task in request.tasks]
    elif kind in ("classify_log", "regress_log"):
        request = getattr(log, kind).request
        tasks = [(request.model_spec.signature_name, CLASSIFY if kind == "classify_log" else REGRESS)]
    else:
        raise StatusError("UNIMPLEMENTED", f"Unsupported log_type for warmup: {kind}")
    for name, method in tasks:
        signature = operations.signature_for(model.signatures, name, method)
        model.run(signature, *operations.feed(signature, operations.examples_of(request.input)))
