"""JSON text as the protocol reads and writes it.

Reading follows the stock server's parser: bare NaN and Infinity are numbers, text after the document is ignored, the
first of two equal keys counts, and deep nesting is read as well.  Writing follows its number rule: six significant
digits where they read back to the same number, otherwise all of them, and whole numbers keep a `.0`.
"""

import itertools
import json
import math
import re
from json.decoder import scanstring

import numpy as np

from serving.server.status import invalid

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:NaN|Inf(?:inity)?|(?:0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]*)?)")
_LITERALS = (("true", True), ("false", False), ("null", None))
_UINT64_MAX = 2**64 - 1
_MAX_DEPTH = 1_000_000  # some 200 bytes a level: a body of brackets alone must not take the machine's memory
_INT64_MIN = -(2**63)


def _first_wins(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        found.update(reversed(pairs))  # in their places
    return found


def _double(token):
    if math.isinf(value := float(token)):  # 1e999: Python takes it, the protocol does not
        raise ValueError(token)
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_first_wins, parse_float=_double)


def parse(body):
    """Parse `body` (bytes, UTF-8) into Python values; `StatusError` says what is wrong and at which byte."""
    text = body.decode("utf-8-sig", "surrogateescape")
    start = _SPACE.match(text).end()
    try:
        return _decoder.raw_decode(text, start)[0]
    except (ValueError, RecursionError):  # malformed, too big, spelled `Inf`, or too deep for a recursive parser
        return _parse_deep(text, start)


def _parse_deep(text, position):
    """Parse without recursion, so that depth is bounded by memory alone; slower, and names the exact fault."""

    def fault(what, at):
        offset = len(text[:at].encode("utf-8", "surrogateescape"))
        return invalid(f"JSON Parse error: {what} at offset: {offset}")

    def skip(at):
        return _SPACE.match(text, at).end() if text[at : at + 1] in " \t\n\r" else at

    def string(at):
        try:
            return scanstring(text, at + 1, True)
        except json.JSONDecodeError as error:
            closed = "Invalid" in error.msg
            what = "Invalid escape or character in string." if closed else "Missing a closing quotation mark in string."
            raise fault(what, error.pos) from None

    def key(at):
        """Read `"name" :` and return the name and where the value starts."""
        if text[at : at + 1] != '"':
            raise fault("Missing a name for object member.", at)
        name, at = string(at)
        at = skip(at)
        if text[at : at + 1] != ":":
            raise fault("Missing a colon after a name of object member.", at)
        return name, skip(at + 1)

    if position == len(text):
        raise fault("The document is empty.", position)
    stack = []  # (container, name under which the value being read goes; None in a list)
    while True:
        # a value starts at `position`
        character = text[position : position + 1]
        if character == "[" or character == "{":
            container, closing = ([], "]") if character == "[" else ({}, "}")
            at = skip(position + 1)
            if text[at : at + 1] != closing:
                name = None
                if character == "{":
                    name, at = key(at)
                stack.append((container, name))
                if len(stack) > _MAX_DEPTH:
                    raise fault(f"Nested deeper than {_MAX_DEPTH} levels.", position)
                position = at
                continue
            value, position = container, at + 1
        elif character == '"':
            value, position = string(position)
        else:
            value, position = _scalar(text, position, fault)
        # a value has ended: put it in its container, and close every container that ends here
        while True:
            if not stack:
                return value
            container, name = stack[-1]
            if name is None:
                container.append(value)
            else:
                container.setdefault(name, value)
            position = skip(position)
            character = text[position : position + 1]
            if character == ",":
                position = skip(position + 1)
                if name is not None:
                    name, position = key(position)
                    stack[-1] = (container, name)
                break
            closing = "]" if name is None else "}"
            if character != closing:
                kind = "] after an array element." if name is None else "} after an object member."
                raise fault(f"Missing a comma or {kind}", position)
            value, position = container, position + 1
            stack.pop()


def _scalar(text, position, fault):
    """Read a number or a literal."""
    for word, value in _LITERALS:
        if text.startswith(word, position):
            return value, position + len(word)
    match = _NUMBER.match(text, position)
    if not match:
        raise fault("Invalid value.", position)
    token, fraction, exponent = match.group(), match.group(1), match.group(2)
    if fraction == ".":
        raise fault("Miss fraction part in number.", match.end(1))
    if exponent is not None and not exponent[-1].isdigit():
        raise fault("Miss exponent in number.", match.end(2))
    if fraction is None and exponent is None and token[-1].isdigit() and len(token) < 400:
        return int(token), match.end()
    value = float(token)
    if np.isinf(value) and "Inf" not in token:
        raise fault("Number too big to be stored in double.", position)
    return value, match.end()


def kind(value):
    """The JSON type's name, as error messages give it."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return str(value)
    return {dict: "Object", list: "Array", str: "String"}.get(type(value), "Number")


def is_integer(value):
    """Whether a parsed number is an integer to the protocol: written without fraction or exponent, in 64 bits."""
    return type(value) is int and _INT64_MIN <= value <= _UINT64_MAX


def show(value, limit=200):
    """`value` as JSON for an error message, cut after `limit` characters (documents may be huge, or bottomless)."""
    pieces, length = [], 0
    for piece in json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).iterencode(value):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            return "".join(pieces)[:limit] + "..."
    return "".join(pieces)


def quote(text):
    """A JSON string from text or from bytes that should be UTF-8 (what is not, is replaced)."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return json.dumps(text, ensure_ascii=False)


def decimals(array):
    """The numbers of a float32 or float64 array (any shape, flattened) as a list of JSON texts."""
    flat = array.reshape(-1)
    count = flat.size
    if not count:
        return []
    values = flat.tolist()
    texts = ("%.6g " * count % tuple(values)).split()
    full = "%.9g" if flat.dtype == np.float32 else "%.17g"
    with np.errstate(over="ignore"):
        inexact = np.array(list(map(float, texts))).astype(flat.dtype) != flat  # true for NaN as well
    for index in np.flatnonzero(inexact | ~np.isfinite(flat)).tolist():
        value = values[index]
        if value != value:
            texts[index] = "NaN"
        elif value in (np.inf, -np.inf):
            texts[index] = "Infinity" if value > 0 else "-Infinity"
        else:
            texts[index] = full % value
    return [text if "." in text or "e" in text or text[-1] in "Ny" else text + ".0" for text in texts]


def rows(texts, shape):
    """Nest the flat list `texts` into `shape`; returns one JSON text for each of the first dimension's rows."""
    for depth in range(len(shape) - 1, 0, -1):
        size, groups = shape[depth], int(np.prod(shape[:depth]))
        parts = iter(texts)
        texts = ["[" + ", ".join(itertools.islice(parts, size)) + "]" for _ in range(groups)]
    return texts
