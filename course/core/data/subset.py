"""How the committed Fashion-MNIST subset was drawn and packed: `python -m course.core.data make-subset [PATH]`.

The same command makes the same bytes again (with zlib 1.2.13 or another version whose deflate chooses alike).
"""

import hashlib
import io
import struct
import zipfile
import zlib
from collections import Counter

import numpy as np

from course.core import files
from course.core.data import images

TRAIN_EACH, TEST_EACH = 1_000, 200  # images a class
LICENCE = """The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def make_subset(target):
    """Write the subset of `fashion_mnist` to the zip file `target` (deterministic bytes); returns its sha256.

    Images with an exact twin anywhere in the 70,000 take no part in the draw.
    """
    full = images.load("fashion_mnist", source="package")
    twins = Counter(_pixel_hash(image) for x in (full.x_train, full.x_test) for image in x)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        _add(archive, "LICENSE.txt", LICENCE.encode(), zipfile.ZIP_DEFLATED)  # the PNG files would only grow
        for part, x, y, each in (
            ("train", full.x_train, full.y_train, TRAIN_EACH),
            ("test", full.x_test, full.y_test, TEST_EACH),
        ):
            single = np.array([twins[_pixel_hash(image)] == 1 for image in x])
            for number, label in enumerate(full.labels):
                members = np.flatnonzero(single & (y == number))
                drawn = np.random.default_rng([0, number]).choice(members, each, replace=False)
                for index in np.sort(drawn):
                    _add(archive, f"{part}/{images.slug(label)}/{index:05d}.png", smallest_png(x[index, :, :, 0]))
    files.write_atomic(target, content.getvalue())
    return files.sha256(target)


def _pixel_hash(image):
    return hashlib.sha256(image.tobytes()).digest()


def _add(archive, path, content, compression=zipfile.ZIP_STORED):
    """Add a file with nothing in its entry that depends on the machine or the day."""
    info = zipfile.ZipInfo(path)  # dated 1 January 1980
    info.create_system, info.external_attr, info.compress_type = 3, 0o644 << 16, compression
    archive.writestr(info, content, compresslevel=9)


def smallest_png(image):
    """The smallest PNG found for a uint8 [H,W] image: every filter type and zlib strategy is tried.

    Filter types (PNG specification, section 9): 0 none, 1 sub, 2 up, 3 average, 4 Paeth, and as a sixth the usual
    heuristic, the type of least absolute sum for each row.
    """
    rows = np.pad(image.astype(np.int16), ((1, 0), (1, 0)))  # what lies outside the image counts as 0
    here, left, up, corner = rows[1:, 1:], rows[1:, :-1], rows[:-1, 1:], rows[:-1, :-1]
    a, b, c = (abs(left + up - corner - near) for near in (left, up, corner))
    paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, up, corner))
    filtered = np.stack([(here - guess).astype(np.uint8) for guess in (0 * here, left, up, (left + up) // 2, paeth)])
    least = np.abs(filtered.view(np.int8).astype(np.int16)).sum(2).argmin(0)  # [H]
    streams = [_rows(kind, filtered[kind]) for kind in range(5)]
    streams.append(_rows(least, filtered[least, np.arange(len(image))]))
    strategies = zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE
    data = min((_deflate(stream, strategy) for stream in streams for strategy in strategies), key=len)
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 0, 0, 0, 0)  # 8 bits, grey, not interlaced
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _rows(kinds, values):
    """[H,W] filtered values with each row's filter type in front, as bytes."""
    kinds = np.broadcast_to(np.asarray(kinds, np.uint8), len(values))[:, None]
    return np.concatenate([kinds, values], axis=1).tobytes()


def _deflate(content, strategy):
    packer = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return packer.compress(content) + packer.flush()


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
