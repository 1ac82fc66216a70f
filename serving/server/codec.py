"""Requests and answers as JSON: row and column format for Predict, tf.Examples for Classify and Regress.

A request takes one of two ways in.  Where it holds regular arrays of numbers for numeric inputs - images, usually -
simdjson reads each straight into a buffer; everything else is parsed into Python values.  Both ways give the same
arrays, and every refusal comes from the second, which names the element at fault.
"""

import base64
import binascii
import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import simdjson

from serving.server import jsontext
from serving.server.jsontext import show
from serving.server.signatures import DTYPES, MAX_RANK, NAMES
from serving.server.status import StatusError, invalid

_INTEGERS = {np.dtype(DTYPES[number][1]) for number in (3, 4, 5, 6, 9, 22, 23)}
_FLOATS = {np.dtype(np.float32), np.dtype(np.float64)}
_STRING, _BOOL = np.dtype(np.object_), np.dtype(np.bool_)


@dataclass
class PredictRequest:
    """A decoded Predict body; `by_row` tells which of the two formats the answer takes."""

    signature_name: str
    inputs: dict[str, np.ndarray]
    by_row: bool


def decode_predict(body, inputs_of):
    """Decode a Predict body.  `inputs_of(signature_name)` gives the input specs by alias, or raises."""
    return _decode_numbers(body, inputs_of) or _decode_document(_document(body), inputs_of)


# --- numbers, read by simdjson ----------------------------------------------------------------------------------------

_NOT_SKELETON = b"0123456789.+-eE \t\r\n"
_CACHED_PATTERN = 2**16  # bytes; longer ones are built anew, lest a few large requests stay in memory for ever


def _decode_numbers(body, inputs_of):
    """The fast way in; None where the body is anything but regular arrays of numbers, one for each numeric input."""
    try:
        document = simdjson.Parser().parse(body)
    except (ValueError, RuntimeError, UnicodeDecodeError):  # malformed, too deep, or NaN: the other way says which
        return None
    if not isinstance(document, simdjson.Object):
        return None
    by_row = "instances" in document
    if by_row == ("inputs" in document):
        return None
    name = document.get("signature_name", "")
    values = document["instances" if by_row else "inputs"]
    if not isinstance(values, simdjson.Array | simdjson.Object) or not isinstance(name, str):
        return None
    specs = inputs_of(name)
    if not specs or any(spec.dtype not in _FLOATS | _INTEGERS for spec in specs.values()):
        return None
    named = isinstance(values, simdjson.Object) or (len(values) and isinstance(values[0], simdjson.Object))
    if not named:
        arrays = _one_array(body, values, specs)
    elif by_row:
        arrays = _named_rows(body, values, specs)
    else:
        arrays = _named_columns(body, values, specs)
    return arrays and PredictRequest(name, arrays, by_row)


def _one_array(body, values, specs):
    """[[1, 2], [3, 4]]: the only input, or None."""
    if len(specs) != 1:
        return None
    ((alias, spec),) = specs.items()
    shape = _leading_shape(values, simdjson.Array)
    if 0 in shape or not _is_skeleton(body, _length(shape), lambda: _pattern(shape[0], _row_pattern(shape[1:]))):
        return None
    array = _joined([values], shape, spec.dtype)
    return None if array is None else {alias: array.reshape(shape)}


def _named_columns(body, columns, specs):
    """{"a": [[1], [2]], "b": [3, 4]}: each input as a whole, or None."""
    if not isinstance(columns, simdjson.Object) or sorted(columns) != sorted(specs):
        return None
    shapes = {alias: _leading_shape(columns[alias], simdjson.Array) for alias in columns}
    if any(not shape or 0 in shape for shape in shapes.values()):
        return None
    keys = [b"", *(b"," + _key(alias) for alias in [*shapes][1:])]
    length = sum(len(key) + _length(shape) for key, shape in zip(keys, shapes.values(), strict=True))
    if not _is_skeleton(
        body, length, lambda: b"".join(k + _row_pattern(s) for k, s in zip(keys, shapes.values(), strict=True))
    ):
        return None
    arrays = {alias: _joined([columns[alias]], shapes[alias], spec.dtype) for alias, spec in specs.items()}
    if any(array is None for array in arrays.values()):
        return None
    return {alias: array.reshape(shapes[alias]) for alias, array in arrays.items()}


def _named_rows(body, rows, specs):
    """[{"a": [1], "b": [2, 3]}, ...]: the rows of each input, or None."""
    if not isinstance(rows, simdjson.Array) or sorted(rows[0]) != sorted(specs):
        return None
    shapes = {alias: _leading_shape(rows[0][alias], simdjson.Array) for alias in rows[0]}
    if any(not shape or 0 in shape for shape in shapes.values()):
        return None
    keys = {alias: _key(alias) for alias in shapes}
    length = sum(len(keys[alias]) + _length(shape) for alias, shape in shapes.items()) + len(shapes) - 1 + 2
    count = len(rows)

    def pattern():
        return _pattern(count, b"{" + b",".join(keys[a] + _row_pattern(shape) for a, shape in shapes.items()) + b"}")

    if not _is_skeleton(body, count * length + count - 1 + 2, pattern):
        return None
    rows, arrays = list(rows), {}
    for alias, spec in specs.items():
        try:
            column = [row[alias] for row in rows]
        except KeyError:  # a name that differs from the first row's in its digits alone
            return None
        if not all(isinstance(value, simdjson.Array) for value in column):
            return None
        array = _joined(column, shapes[alias], spec.dtype)
        if array is None:
            return None
        arrays[alias] = array.reshape(count, *shapes[alias])
    return arrays


def _joined(values, shape, dtype):
    """The numbers of simdjson arrays, each of `shape`, one after another as `dtype`; None where one is not that."""
    if dtype in _FLOATS:
        kind, wide = "d", np.float64
    else:
        kind, wide = ("u", np.uint64) if dtype == np.uint64 else ("i", np.int64)
    try:
        parts = [np.frombuffer(value.as_buffer(of_type=kind), wide) for value in values]
    except (TypeError, ValueError):  # an element that is not a number of this kind
        return None
    size = math.prod(shape)
    if any(part.size != size for part in parts):
        return None
    flat = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if dtype in _INTEGERS and not _in_range(flat, dtype):
        return None
    with np.errstate(over="ignore"):  # a number beyond float32 is infinite, as in the stock server
        return flat.astype(dtype)


def _leading_shape(values, kind):
    """The shape that the first element of every list gives: what the whole must have if it is regular."""
    shape = []
    while isinstance(values, kind) and len(shape) <= MAX_RANK:
        shape.append(len(values))
        if not shape[-1]:
            break
        values = values[0]
    return tuple(shape)


def _is_skeleton(body, length, pattern):
    """Whether the brackets, commas and names in `body`, from the first [ to the last ], are those of `pattern()`.

    simdjson's buffer is flat: [[1, 2], [3]] and [[1], [2, 3]] look alike in it.  With digits and spaces removed, what
    is left of regular arrays is a pattern that names and shapes alone decide.  It is built only where its `length` is
    right: the first rows may promise more than the body holds.
    """
    skeleton = body.translate(None, _NOT_SKELETON)
    start, end = skeleton.find(b"["), skeleton.rfind(b"]") + 1
    return end - start == length and skeleton[start:end] == pattern()


def _key(alias):
    """A name and its colon as they stand in a skeleton."""
    return f'"{alias}":'.encode().translate(None, _NOT_SKELETON)


def _length(shape):
    """Length in bytes of the pattern of an array of `shape`: brackets and commas."""
    length = 0
    for position, size in enumerate(reversed(shape)):
        length = (size if position else 0) * length + size - 1 + 2
    return length


def _pattern(size, item):
    return b"[" + b",".join([item] * size) + b"]"


def _row_pattern(shape):
    return _cached_pattern(shape) if _length(shape) <= _CACHED_PATTERN else _cached_pattern.__wrapped__(shape)


@functools.lru_cache(maxsize=64)
def _cached_pattern(shape):
    pattern = b""
    for size in reversed(shape):
        pattern = _pattern(size, pattern)
    return pattern


def _in_range(values, dtype):
    bounds = np.iinfo(dtype)
    return bool(values.size == 0 or (values.min() >= bounds.min and values.max() <= bounds.max))


# --- anything else, as Python values ----------------------------------------------------------------------------------


def _document(body):
    """Parse `body`, which must be a JSON object."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    document = jsontext.parse(body)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {show(document)} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise invalid(
            f"JSON Value: {show(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return document


def _decode_document(document, inputs_of):
    name = document.get("signature_name", "")
    specs = inputs_of(name)
    if not specs:
        raise invalid(f"Failed to get input map for signature: {name or 'DEFAULT'}")
    if "instances" in document and "inputs" in document:
        raise invalid(
            f"JSON Value: {show(document)} Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist "
        )
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid(f"JSON Value: {show(document)} Expecting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {show(document)} No values in 'instances' array")
        return PredictRequest(name, _from_rows(instances, specs), True)
    if "inputs" in document:
        return PredictRequest(name, _from_columns(document["inputs"], specs), False)
    raise invalid("Missing 'inputs' or 'instances' key")


def _from_columns(inputs, specs):
    """Column format: each input's whole array, or the array itself where there is one input."""
    if not isinstance(inputs, dict) or _is_base64(inputs):
        if len(specs) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required "
                "as per tensorinfo_map"
            )
        ((alias, spec),) = specs.items()
        return {alias: _tensor(inputs, spec.dtype)}
    for alias in specs:
        if alias not in inputs:
            raise invalid(f"Missing named input: {alias} in 'inputs' object.")
    return {alias: _tensor(inputs[alias], spec.dtype) for alias, spec in specs.items()}


def _from_rows(instances, specs):
    """Row format: a list of examples, each an object with every input, or a plain value where there is one input."""
    if not isinstance(instances[0], dict) and len(specs) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as "
            "per tensorinfo_map"
        )
    named = _is_named(instances[0])
    if any(_is_named(item) != named for item in instances) or (
        named and any(item.keys() != specs.keys() for item in instances)
    ):
        _refuse_row(instances, specs, named)
    columns = {}
    for alias, spec in specs.items():
        column = [item[alias] for item in instances] if named else instances
        shape, leaves = _flatten(column)
        columns[alias] = None if leaves is None else _leaves_to_array(leaves, shape, spec.dtype)
        if columns[alias] is None:
            _refuse_row(instances, specs, named)
    return columns


def _refuse_row(instances, specs, named):
    """Raise for the first example at fault, reading them one by one as the stock server does."""
    first = {}  # alias -> shape in the first example
    for number, item in enumerate(instances):
        if _is_named(item) != named:
            wanted, given = ("object", "list") if named else ("value/list", "object")
            raise invalid(f"Expecting {wanted} but got {given} at item {number} of input list")
        values = item if named else {next(iter(specs)): item}
        for alias, value in values.items():
            key = f" key: {alias}" if named else ""
            try:
                if alias not in specs:
                    raise invalid(f"JSON object: does not have named input: {alias}")
                shape = _tensor(value, specs[alias].dtype).shape
                known = first.setdefault(alias, shape)
                if np.prod(shape) != np.prod(known):
                    raise invalid(f"Expecting tensor size: {np.prod(known):.0f} but got: {np.prod(shape):.0f}")
                if shape != known:
                    raise invalid(f"Expecting shape {_shape_text(known)} but got: {_shape_text(shape)}")
            except StatusError as error:
                raise invalid(f"Failed to process element: {number}{key} of 'instances' list. Error: {error}") from None
        if named and item.keys() != specs.keys():
            raise invalid(
                f"Failed to process element: {number} of 'instances' list. JSON object: {show(item)} keys "
                f"must be equal to: {','.join(sorted(specs))}"
            )
    raise invalid("Failed to process the 'instances' list: its elements differ")


def _shape_text(shape):
    return "[" + ",".join(map(str, shape)) + "]"


def _is_base64(value):
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _is_named(value):
    return isinstance(value, dict) and not _is_base64(value)


def _tensor(value, dtype):
    """A parsed value (a scalar, or lists of one shape) as an array; `StatusError` names the element at fault."""
    shape, leaves = _flatten([value])
    array = None if leaves is None else _leaves_to_array(leaves, shape[1:], dtype)
    if array is None:
        _refuse_tensor(value, dtype)
    return array


def _flatten(values):
    """Lists of lists as (shape, flat list of leaves), one level at a time; the leaves are None where it is ragged."""
    shape = [len(values)]
    while values and list in (kinds := set(map(type, values))):
        sizes = set(map(len, values)) if len(kinds) == 1 else ()
        if len(sizes) != 1 or len(shape) > MAX_RANK:
            return shape, None
        shape.append(sizes.pop())
        values = list(itertools.chain.from_iterable(values))
    return shape, values


def _leaves_to_array(leaves, shape, dtype):
    """The leaves as an array of `shape` and `dtype`; None where one of them is not of that type."""
    kinds = set(map(type, leaves))
    if not leaves:
        return np.empty(shape, dtype)
    if dtype in _FLOATS and kinds <= {int, float}:
        try:
            with np.errstate(over="ignore"):
                return np.array(leaves, np.float64).astype(dtype).reshape(shape)
        except OverflowError:
            raise invalid("JSON Parse error: Number too big to be stored in double.") from None
    if dtype in _INTEGERS and kinds == {int}:
        try:
            wide = np.array(leaves, np.uint64 if dtype == np.uint64 else np.int64)
        except OverflowError:
            return None
        return wide.astype(dtype).reshape(shape) if _in_range(wide, dtype) else None
    if dtype == _BOOL and kinds == {bool}:
        return np.array(leaves, dtype).reshape(shape)
    if dtype == _STRING and kinds <= {str, dict} and (dict not in kinds or all(map(_is_string, leaves))):
        array = np.empty(len(leaves), np.object_)
        array[:] = [_bytes(leaf) for leaf in leaves]
        return array.reshape(shape)
    return None


def _is_string(leaf):
    return isinstance(leaf, str) or _is_base64(leaf)


def _bytes(leaf):
    """A string's bytes: base64 decoded where it is written so (padding optional, spaces ignored), UTF-8 otherwise."""
    if isinstance(leaf, str):
        try:
            return leaf.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise invalid("JSON Parse error: The surrogate pair in string is invalid.") from None
    text = b"".join(leaf["b64"].encode("utf-8", "replace").split())
    digits = text.rstrip(b"=.")  # absl, which decodes this in the stock server, pads with either
    missing = -len(digits) % 4
    try:
        if len(text) - len(digits) not in (0, missing):
            raise ValueError
        return base64.b64decode(digits + b"=" * missing, validate=True)
    except (binascii.Error, ValueError):
        raise invalid("Unable to base64 decode") from None


def _refuse_tensor(value, dtype):
    """Raise for the first element of `value`, in document order, that does not belong in a tensor of `dtype`."""
    shape = _leading_shape(value, list)
    if len(shape) > MAX_RANK:
        raise invalid(f"JSON Value: {show(value, 40)} is nested deeper than a tensor's {MAX_RANK} dimensions")
    stack = [(value, 0)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, list):
            if level >= len(shape):
                raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
            if len(item) != shape[level]:
                raise invalid(
                    f"Encountered list at unexpected size: {len(item)} at level: {level} expected size: {shape[level]}"
                )
            stack.extend((inner, level + 1) for inner in reversed(item))
            continue
        if level != len(shape):
            raise invalid(
                f"JSON Value: {show(item)} found at incorrect level: {level + 1} in the JSON DOM. Expected "
                f"at level: {len(shape)}"
            )
        _refuse_leaf(item, dtype)
    raise invalid(f"JSON Value: {show(value)} cannot be read as a tensor of type: {NAMES[dtype]}")


def _refuse_leaf(leaf, dtype):
    """Raise where `leaf` is not an element of a tensor of `dtype`."""
    if dtype not in _FLOATS | _INTEGERS | {_BOOL, _STRING} and not isinstance(leaf, dict):
        raise StatusError("UNIMPLEMENTED", f"Conversion of JSON Value: {show(leaf)} to type: {NAMES.get(dtype, dtype)}")
    if dtype == _STRING and isinstance(leaf, dict):
        if not _is_base64(leaf):
            raise invalid(f"JSON Value: {show(leaf)} not formatted correctly for base64 data")
        _bytes(leaf)
    elif _leaves_to_array([leaf], (), dtype) is None:
        raise invalid(
            f"JSON Value: {show(leaf)} Type: {jsontext.kind(leaf)} is not of expected type: {NAMES.get(dtype, dtype)}"
        )


# --- tf.Examples ------------------------------------------------------------------------------------------------------


def decode_examples(body):
    """Decode a Classify or Regress body: (signature name, serialised tf.Examples as an array of bytes, shape [n])."""
    document = _document(body)
    context = b""
    if "context" in document:
        context = _example(document["context"])
    if "examples" not in document:
        raise invalid(
            f"JSON Value: {show(document)} When method is classify, key 'examples' is expected and was not found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        raise invalid(f"JSON Value: {show(document)} Expecting 'examples' value to be an list/array")
    if not examples:
        raise invalid(f"JSON Value: {show(document)} 'examples' value is an empty array")
    serialised = np.empty(len(examples), np.object_)
    # two messages in a row parse as their merger, the later one's features winning: that is how a context applies
    serialised[:] = [context + _example(example) for example in examples]
    return document.get("signature_name", ""), serialised


def _example(value):
    """A JSON object as a serialised tf.Example."""
    from tensorflow.core.example.example_pb2 import Example

    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {jsontext.kind(value)}")
    example = Example()
    for name, content in value.items():
        try:
            feature = example.features.feature[name]
        except (UnicodeEncodeError, ValueError):  # what only an escape can write, or bytes that are no UTF-8
            raise invalid(f"Feature name {show(name)} is no valid Unicode") from None
        _fill(feature, name, content if isinstance(content, list) else [content])
    return example.SerializeToString()


def _fill(feature, name, values):
    """Put JSON values into a tf.Feature, whose kind the first one decides."""
    for value in values:
        kind = "bytes_list"
        if isinstance(value, bool) or jsontext.is_integer(value):
            kind = "int64_list"
        elif isinstance(value, int | float):
            kind = "float_list"
        elif not _is_string(value):
            raise invalid(f"Feature: {name} has element with unexpected JSON type: {jsontext.kind(value)}")
        chosen = feature.WhichOneof("kind")
        if chosen not in (None, kind):
            raise invalid(f"Unexpected element type in feature: {name} expecting type: {chosen.removesuffix('_list')}")
        if kind == "int64_list" and value > np.iinfo(np.int64).max:
            raise invalid(f"Feature: {name} has uint64_t element. Only int64_t is supported.")
        with np.errstate(over="ignore"):
            value = {"int64_list": int, "float_list": np.float32, "bytes_list": _bytes}[kind](value)
        getattr(feature, kind).value.append(value)


# --- answers ----------------------------------------------------------------------------------------------------------


def encode_predict(outputs, by_row):
    """The answer of Predict as JSON (bytes), in the format of the request."""
    if not outputs:
        raise invalid("Cannot convert empty tensor map to JSON")
    if not by_row:
        columns = {alias: jsontext.rows(_texts(alias, value), (1, *value.shape)) for alias, value in outputs.items()}
        body = next(iter(columns.values()))[0]
        if len(columns) > 1:
            body = "{" + ", ".join(f"{jsontext.quote(alias)}: {text}" for alias, (text,) in columns.items()) + "}"
        return f'{{"outputs": {body}}}'.encode()
    batch = None
    for alias, value in outputs.items():
        if not value.ndim:
            raise invalid(f"Tensor name: {alias} has no shape information ")
        if batch is not None and len(value) != batch:
            raise invalid(f"Tensor name: {alias} has inconsistent batch size: {len(value)} expecting: {batch}")
        batch = len(value)
    columns = {alias: jsontext.rows(_texts(alias, value), value.shape) for alias, value in outputs.items()}
    if len(columns) == 1:
        (items,) = columns.values()
    else:
        keys = [jsontext.quote(alias) for alias in columns]
        items = [
            "{" + ", ".join(f"{key}: {text}" for key, text in zip(keys, row, strict=True)) + "}"
            for row in zip(*columns.values(), strict=True)
        ]
    return f'{{"predictions": [{", ".join(items)}]}}'.encode()


def _texts(alias, array):
    """The elements of an array as JSON texts, flat."""
    if array.dtype in _FLOATS:
        return jsontext.decimals(array)
    if array.dtype == np.float16:
        return jsontext.decimals(array.astype(np.float32))
    flat = array.reshape(-1).tolist()
    if array.dtype in _INTEGERS:
        return list(map(str, flat))
    if array.dtype == _BOOL:
        return ["true" if value else "false" for value in flat]
    if array.dtype == _STRING:
        if alias.endswith("_bytes"):
            return [f'{{"b64": "{base64.b64encode(value).decode()}"}}' for value in flat]
        return list(map(jsontext.quote, flat))
    if not flat:
        return []
    raise invalid(f"Failed to write JSON value for tensor type: {NAMES.get(array.dtype, array.dtype)}")


def encode_classifications(classes, scores):
    """The answer of Classify: [label, score] pairs per example; either may be missing, as in the signature."""
    shape = (classes if scores is None else scores).shape
    labels = ['""'] * int(np.prod(shape)) if classes is None else _texts("classes", classes)
    numbers = ["0.0"] * len(labels) if scores is None else _texts("scores", scores)
    pairs = [f"[{label}, {number}]" for label, number in zip(labels, numbers, strict=True)]
    return f'{{"results": [{", ".join(jsontext.rows(pairs, shape))}]}}'.encode()


def encode_regressions(values):
    """The answer of Regress: one number per example."""
    return f'{{"results": [{", ".join(_texts("outputs", values))}]}}'.encode()


def encode_error(message):
    """The body of every refusal."""
    return f'{{"error": {jsontext.quote(message.encode("utf-8", "replace"))}}}'.encode()
