"""The IDX format of the MNIST family: a magic number, the dimensions, then the values, all big-endian.

bytes 0-1  zero            byte 2  type of the values            byte 3  number of dimensions
then one unsigned 32-bit size per dimension, then the values with the last dimension running fastest
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from course.core.errors import InputError

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}  # byte 2 -> NumPy type


def read_idx(path, dtype=None, ndim=None):
    """Array of an IDX file, plain or gzipped (told by content), in the machine's byte order.

    dtype, ndim: what the caller expects, checked where given.  Raises `InputError`, naming the file, for anything
    that is not exactly one well-formed IDX array.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch it again") from error

    def refuse(why):
        return InputError(f"{path} is not the IDX file expected: {why}")

    if len(content) < 4:
        raise refuse(f"it has {len(content)} bytes, too few for a header")
    zero, code, dimensions = struct.unpack(">HBB", content[:4])
    if zero != 0 or code not in TYPES:
        raise refuse(f"its magic number is {content[:4].hex(' ')}; 00 00, a type of 08 to 0e, and a rank belong there")
    if dimensions == 0 or len(content) < 4 + 4 * dimensions:
        raise refuse(f"its header of {dimensions} dimensions is not whole")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    kind = np.dtype(TYPES[code])
    start = 4 + 4 * dimensions
    needed = start + kind.itemsize * math.prod(shape)  # Python integers: a forged size cannot overflow
    if len(content) != needed:
        raise refuse(f"shape {shape} of {kind.newbyteorder('=')} needs {needed:,} bytes, it has {len(content):,}")
    if ndim is not None and dimensions != ndim:
        raise refuse(f"it has {dimensions} dimensions, not {ndim}")
    if dtype is not None and kind.newbyteorder("=") != np.dtype(dtype):
        raise refuse(f"its values are {kind.newbyteorder('=')}, not {np.dtype(dtype)}")
    return np.frombuffer(content, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))
