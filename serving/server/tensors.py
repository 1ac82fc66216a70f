"""Arrays as TensorProto messages and back."""

import itertools
import math

import numpy as np

from serving.server.signatures import DTYPES, MAX_RANK, NUMBERS
from serving.server.status import StatusError, invalid

# the TensorProto field that holds elements of a type one by one
_FIELDS = {
    "float": "float_val", "double": "double_val", "int32": "int_val", "uint8": "int_val", "int16": "int_val",
    "int8": "int_val", "uint16": "int_val", "string": "string_val", "int64": "int64_val", "bool": "bool_val",
    "uint32": "uint32_val", "uint64": "uint64_val", "half": "half_val", "bfloat16": "half_val",
    "complex64": "scomplex_val", "complex128": "dcomplex_val",
}  # fmt: skip


# fields whose packed elements are, on the wire, the bytes that the array has in memory -> their number
_AS_IN_MEMORY = {"float_val": 5, "double_val": 6, "scomplex_val": 9, "bool_val": 11, "dcomplex_val": 12}

_AT_ONCE = 2**16  # elements that are appended to a field in one call, during which no other thread runs
_MAX_FILLED = 100 * 2**20  # bytes that a short list of values may be drawn out to: as for gzip, small stays small


def from_protos(inputs):
    """The TensorProtos of a request by alias, as arrays."""
    arrays = {}
    for alias, message in inputs.items():
        try:
            arrays[alias] = from_proto(message)
        except StatusError as error:
            raise invalid(f"tensor parsing error: {alias}: {error.message}") from error
    return arrays


def from_proto(message):
    """A TensorProto as an array; strings become an object array of bytes.

    As `Tensor::FromProto` (tensorflow/core/framework/tensor.cc) has it: the last of too few values stands for the rest,
    no values are zeros, of too many the first count, and integers are cut to their type's bits.
    """
    name, numpy_type = DTYPES.get(message.dtype, (None, None))
    if name is None:
        raise invalid(f"tensors of type number {message.dtype} are not served")
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    if any(size < 0 for size in shape):
        raise invalid("a tensor in a request must have a fully known shape")
    count = math.prod(shape)
    if len(shape) > MAX_RANK or math.prod(size or 1 for size in shape) >= 2**59:  # where bytes are no longer counted
        raise invalid(f"a tensor of shape {list(shape)} is too large, or has more than {MAX_RANK} dimensions")
    if message.tensor_content:
        return _from_content(message.tensor_content, name, numpy_type, shape, count)
    flat = _listed(message, name, numpy_type)
    if flat.size < count:
        if count * flat.itemsize > _MAX_FILLED:
            raise invalid(f"a {name} tensor of shape {list(shape)} needs {count} values, the request has {flat.size}")
        last = flat[-1:] if flat.size else np.array([b""] if name == "string" else [0]).astype(flat.dtype)
        flat = np.concatenate([flat, np.repeat(last, count - flat.size)])
    return flat[:count].reshape(shape)


def _listed(message, name, numpy_type):
    """The values in a TensorProto's field for elements one by one."""
    values = getattr(message, _FIELDS[name])
    if name == "string":
        flat = np.empty(len(values), np.object_)
        flat[:] = list(values)
        return flat
    flat = np.array(values)  # at one go: the field lends its memory
    if not flat.size:
        return np.empty(0, numpy_type)
    if name in ("half", "bfloat16"):
        return flat.astype(np.uint16).view(numpy_type)
    if name in ("complex64", "complex128"):
        return flat[: flat.size // 2 * 2].view(numpy_type)
    return flat.astype(numpy_type)


def _from_content(content, name, numpy_type, shape, count):
    """The values in a TensorProto's field for all elements in one piece."""
    if name == "string":
        flat = np.empty(count if count <= len(content) else 0, np.object_)
        flat[:] = _split(content, flat.size)
    elif len(content) == count * np.dtype(numpy_type).itemsize:
        flat = np.frombuffer(content, numpy_type)
        if name == "bool" and flat.view(np.uint8).max(initial=0) > 1:
            raise invalid("tensor_content has a byte that is neither 0 nor 1, which is no bool")
    else:
        flat = np.empty(0)
    if flat.size != count:
        raise invalid(f"tensor_content holds {len(content)} bytes, which is no {name} tensor of shape {list(shape)}")
    return flat.reshape(shape)


def _split(content, count):
    """Strings in one piece: the length of each as a varint, then their bytes on end."""
    lengths, position = [], 0
    while len(lengths) < count:
        length = shift = 0
        while True:
            if position == len(content) or shift > 28:
                raise invalid("tensor_content ends within the lengths of its strings")
            byte, position = content[position], position + 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        lengths.append(length)
    if position + sum(lengths) != len(content):
        raise invalid("tensor_content is not as long as the lengths of its strings say")
    ends = [position + end for end in itertools.accumulate(lengths)]
    return [content[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def to_proto(array, message):
    """Fill the TensorProto `message` with an array, element by element as the stock server answers."""
    name, _ = DTYPES[NUMBERS[array.dtype]]
    _describe(array, message)
    flat = np.ascontiguousarray(array).reshape(-1)
    field = _FIELDS[name]
    if field in _AS_IN_MEMORY:  # parsing the wire form takes a hundredth of the time of appending the elements
        content = flat.tobytes()
        message.MergeFromString(bytes([_AS_IN_MEMORY[field] << 3 | 2]) + _varint(len(content)) + content)
        return
    if name in ("half", "bfloat16"):
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, _AT_ONCE):
        getattr(message, field).extend(flat[start : start + _AT_ONCE].tolist())


def _varint(number):
    pieces = bytearray()
    while number > 127:
        pieces.append(number & 127 | 128)
        number >>= 7
    pieces.append(number)
    return bytes(pieces)


def _describe(array, message):
    message.dtype = NUMBERS[array.dtype]
    message.tensor_shape.SetInParent()
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)


def to_content(array, message):
    """Fill the TensorProto `message` with an array in one piece, as a client sends it; strings go one by one."""
    array = np.asarray(array)
    if array.dtype.kind in "SU":
        array = np.array(
            [value.encode() if isinstance(value, str) else bytes(value) for value in array.reshape(-1).tolist()],
            np.object_,
        ).reshape(array.shape)
    if array.dtype == np.object_:
        to_proto(array, message)
        return
    if array.dtype not in NUMBERS:
        raise invalid(f"arrays of type {array.dtype} cannot be sent")
    _describe(array, message)
    message.tensor_content = np.ascontiguousarray(array).tobytes()
