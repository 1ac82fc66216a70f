"""Classify and Regress on a loaded model, between the wire format and the run.

REST, gRPC and the warm-up share them.
"""

import numpy as np

from serving.server.signatures import CLASSIFY, DEFAULT, NAMES, REGRESS
from serving.server.status import StatusError, invalid

_INPUTS = "inputs"
_CLASSES, _SCORES, _VALUES = "classes", "scores", "outputs"
_WORDS = {CLASSIFY: "classification", REGRESS: "regression"}


def signature_for(signatures, name, method, check_method=False):
    """The signature that a Classify or Regress call (`method`) asks for, if it has the inputs and outputs for it."""
    signature = signatures.get(name or DEFAULT)
    word = _WORDS[method]
    if signature is None:
        raise invalid(f"No signature was found with the name: {name or DEFAULT}")
    if check_method and signature.method != method:
        raise invalid(f"Expected {word} signature method_name to be {method}. Was: {signature.method}")
    if len(signature.inputs) != 1:
        raise invalid(f"Expected one input Tensor. Signature: {signature}")
    if _INPUTS not in signature.inputs:
        raise StatusError("FAILED_PRECONDITION", f"No {word} inputs found in SignatureDef: {signature}")
    if method == REGRESS:
        if len(signature.outputs) != 1:
            raise invalid(f"Expected one output Tensor. Signature: {signature}")
        if _VALUES not in signature.outputs:
            raise StatusError("FAILED_PRECONDITION", f"No regression outputs found in SignatureDef: {signature}")
    else:
        if len(signature.outputs) not in (1, 2):
            raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
        if not {_CLASSES, _SCORES} & signature.outputs.keys():
            raise StatusError(
                "FAILED_PRECONDITION",
                "Expected classification signature outputs to contain at least "
                f'one of "{_CLASSES}" or "{_SCORES}". Signature was: {signature}',
            )
    return signature


def feed(signature, examples):
    """The inputs and the outputs of a Classify or Regress run; `examples` are serialised tf.Examples, shape [n]."""
    if not len(examples):
        raise invalid("Input is empty.")
    outputs = tuple(alias for alias in signature.outputs if alias in (_CLASSES, _SCORES, _VALUES))
    return signature.complete({_INPUTS: examples}), outputs


def examples_of(message):
    """The tf.Examples of an `Input` message, serialised, each with the context merged in."""
    kind = message.WhichOneof("kind")
    listed = getattr(message, kind).examples if kind else ()
    context = message.example_list_with_context.context.SerializeToString() if kind != "example_list" else b""
    serialised = np.empty(len(listed), np.object_)
    serialised[:] = [context + example.SerializeToString() for example in listed]
    return serialised


def classes_and_scores(outputs, count):
    """Check the outputs of a Classify run over `count` examples: (classes or None, scores or None), shape [n, k]."""
    classes, scores = outputs.get(_CLASSES), outputs.get(_SCORES)
    for name, value, dtype in ((_CLASSES, classes, np.object_), (_SCORES, scores, np.float32)):
        if value is None:
            continue
        if value.ndim != 2:
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got {list(value.shape)}")
        if value.dtype != dtype:
            raise invalid(f"Expected {name} Tensor of DT_{NAMES[np.dtype(dtype)].upper()}. Got: {value.dtype}")
        if len(value) != count:
            raise invalid(f"Expected {name} output batch size of {count}. Got: {len(value)}")
    if classes is not None and scores is not None and classes.shape != scores.shape:
        raise invalid(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    return classes, scores


def regressions(outputs, count):
    """Check the output of a Regress run over `count` examples: values of shape [n]."""
    value = outputs[_VALUES]
    if value.ndim != 1 and not (value.ndim == 2 and value.shape[1] == 1):
        raise invalid(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {list(value.shape)}"
        )
    if len(value) != count:
        raise invalid(f"Input batch size did not match output batch size: {count} vs. {len(value)}")
    if value.dtype != np.float32:
        raise invalid(f"Expected output Tensor of DT_FLOAT.  Got: {value.dtype}")
    return value.reshape(-1)
