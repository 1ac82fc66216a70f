"""Arrays as TensorProto messages and back."""

import numpy as np

from serving.server.signatures import DTYPES, NUMBERS
from serving.server.status import invalid

# the TensorProto field that holds elements of a type one by one
_FIELDS = {
    "float": "float_val", "double": "double_val", "int32": "int_val", "uint8": "int_val", "int16": "int_val",
    "int8": "int_val", "uint16": "int_val", "string": "string_val", "int64": "int64_val", "bool": "bool_val",
    "uint32": "uint32_val", "uint64": "uint64_val", "half": "half_val", "bfloat16": "half_val",
    "complex64": "scomplex_val", "complex128": "dcomplex_val",
}  # fmt: skip


def from_proto(message):
    """A TensorProto as an array; strings become an object array of bytes."""
    name, numpy_type = DTYPES.get(message.dtype, (None, None))
    if name is None:
        raise invalid(f"tensors of type number {message.dtype} are not served")
    if message.tensor_shape.unknown_rank or any(dim.size < 0 for dim in message.tensor_shape.dim):
        raise invalid("a tensor in a request must have a fully known shape")
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    count = int(np.prod(shape, dtype=np.int64))
    if message.tensor_content:
        if name == "string" or len(message.tensor_content) != count * np.dtype(numpy_type).itemsize:
            raise invalid(
                f"tensor_content holds {len(message.tensor_content)} bytes, which is no {name} tensor of "
                f"shape {list(shape)}"
            )
        return np.frombuffer(message.tensor_content, numpy_type).reshape(shape)
    values = getattr(message, _FIELDS[name])
    if name in ("half", "bfloat16"):
        flat = np.array(values, np.uint16).view(numpy_type)
    elif name in ("complex64", "complex128"):
        flat = np.array(values, np.float32 if name == "complex64" else np.float64).view(numpy_type)
    elif name == "string":
        flat = np.empty(len(values), np.object_)
        flat[:] = list(values)
    else:
        flat = np.array(values, np.int64 if _FIELDS[name] == "int_val" else numpy_type).astype(numpy_type)
    if flat.size != count:
        if not flat.size or flat.size > count:
            raise invalid(f"a {name} tensor of shape {list(shape)} needs {count} values, the request has {flat.size}")
        flat = np.concatenate([flat, np.repeat(flat[-1:], count - flat.size)])  # the last value stands for the rest
    return flat.reshape(shape)


def to_proto(array, message):
    """Fill the TensorProto `message` with an array, element by element as the stock server answers."""
    name, _ = DTYPES[NUMBERS[array.dtype]]
    message.dtype = NUMBERS[array.dtype]
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    flat = np.ascontiguousarray(array).reshape(-1)
    if name in ("half", "bfloat16"):
        flat = flat.view(np.uint16)
    elif name in ("complex64", "complex128"):
        flat = flat.view(np.float32 if name == "complex64" else np.float64)
    getattr(message, _FIELDS[name]).extend(flat.tolist())


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
    message.dtype = NUMBERS[array.dtype]
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    message.tensor_content = np.ascontiguousarray(array).tobytes()
