"""Requests that a server must refuse: ten thousand of them, the same in every run, each with the status that is right.

Most are wrong by construction.  What is mutated, cut or made by a grammar may by luck be right, so for those a second
reader decides: `verdict` reads the document with the standard library and walks its values one by one, which shares
nothing with the server's codec; a request that it finds right must be answered 200, with the values it read.
"""

import base64
import gzip
import itertools
import json
import math
import random
import re
import string
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SEED = 4
MAX_BODY = 2**21  # bytes, the --rest_api_max_body_bytes of the server that is asked
# the models that stand for each type: name -> (input alias, NumPy type); each gives its input back
IDENTITIES = {
    "ident_f32": np.float32,
    "ident_f64": np.float64,
    "ident_i32": np.int32,
    "ident_i64": np.int64,
    "ident_u64": np.uint64,
    "ident_bool": np.bool_,
    "ident_str": np.object_,
}
ALIAS = "default"
_LARGE = 50_000  # bytes of a request
_FLOATS, _INTEGERS = (np.float32, np.float64), (np.int32, np.int64, np.uint64)


@dataclass(frozen=True)
class Case:
    """One request as it goes over the wire, and the status that is right; `answer` is what a 200 must hold."""

    family: str
    request: bytes
    status: int
    answer: object = None
    closes: bool = False  # the connection is at an end: what follows cannot be told from what was wrong
    is_json: bool = True  # the answer: outside /v1/ it is plain text


# --- requests ---------------------------------------------------------------------------------------------------------


def head(method, path, *headers):
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(path, body, *headers):
    """A POST with a body."""
    return head("POST", path, f"Content-Length: {len(body)}", *headers) + body


def predict(model, body, *headers):
    """A Predict request."""
    return post(f"/v1/models/{model}:predict", body, *headers)


# --- the second reader ------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """The document is no request for the model."""


def verdict(body, dtype):
    """(status, array) that a Predict body deserves from the identity model of `dtype`; the array is None for 400."""
    try:
        array = _read(body, dtype)
    except Wrong:
        return 400, None
    return 200, array


def _read(body, dtype):
    document = _parse(body)
    if not isinstance(document, dict) or document.get("signature_name", "serving_default") not in SIGNATURE_NAMES:
        raise Wrong
    if ("instances" in document) == ("inputs" in document):
        raise Wrong
    if "instances" in document:
        rows = document["instances"]
        if not isinstance(rows, list) or not rows:
            raise Wrong
        named = [isinstance(row, dict) and not _is_base64(row) for row in rows]
        if any(named) and (not all(named) or any(row.keys() != {ALIAS} for row in rows)):
            raise Wrong
        return _array([row[ALIAS] for row in rows] if all(named) else rows, dtype)
    values = document["inputs"]
    if isinstance(values, dict) and not _is_base64(values):
        if ALIAS not in values:
            raise Wrong
        values = values[ALIAS]
    return _array(values, dtype)


SIGNATURE_NAMES = ("", "serving_default")


def _parse(body):
    """Read JSON as the protocol has it: text after the document is ignored, and the first of two equal keys counts."""

    def number(text):
        if math.isinf(value := float(text)):
            raise Wrong  # beyond a double
        return value

    decoder = json.JSONDecoder(parse_float=number, object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    text = body.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        return decoder.raw_decode(text.lstrip(" \t\r\n"))[0]
    except (ValueError, RecursionError):
        raise Wrong from None


def _is_base64(value):
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def _array(value, dtype):
    shape, elements = [], []
    _walk(value, 0, shape, elements, dtype)
    if len(shape) > 32:
        raise Wrong
    flat = np.empty(len(elements), dtype)
    with np.errstate(over="ignore"):
        flat[:] = elements
    return flat.reshape(shape)


def _walk(value, level, shape, elements, dtype, on_first_path=True):
    """Gather the elements in order; the first path down gives the shape, which everything after it must have."""
    if isinstance(value, list):
        if on_first_path:
            shape.append(len(value))
        if level >= len(shape) or len(value) != shape[level]:
            raise Wrong
        for position, item in enumerate(value):
            _walk(item, level + 1, shape, elements, dtype, on_first_path and position == 0)
        return
    if level != len(shape):
        raise Wrong
    elements.append(_element(value, dtype))


def _element(value, dtype):
    if dtype == np.object_:
        if _is_base64(value):
            return _unbase64(value["b64"])
        if isinstance(value, str):
            try:
                return value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise Wrong from None
    elif dtype == np.bool_:
        if isinstance(value, bool):
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        if dtype in _FLOATS:
            try:
                return float(value)
            except OverflowError:
                raise Wrong from None
        bounds = np.iinfo(dtype)
        if bounds.min <= value <= bounds.max:
            return value
    elif isinstance(value, float) and dtype in _FLOATS:
        return value
    raise Wrong


_BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def _unbase64(text):
    """Bytes of a base64 text: spaces do not count; the padding is whole or missing, and a dot stands for it as well."""
    text = re.sub("[ \t\n\v\f\r]", "", text)
    digits = re.match("[A-Za-z0-9+/]*", text)[0]
    padding = text[len(digits) :]
    if len(digits) % 4 == 1 or padding.strip("=.") or len(padding) not in (0, -len(digits) % 4):
        raise Wrong
    bits = "".join(f"{_BASE64.index(character):06b}" for character in digits)
    return bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) // 8 * 8, 8))


# --- families ---------------------------------------------------------------------------------------------------------


def judged(family, model, body):
    """The case of a body whose rightness is not known beforehand."""
    status, array = verdict(body, IDENTITIES[model])
    return Case(family, predict(model, body), status, array)


def made(strategy, count):
    """`count` values that hypothesis makes, the same in every run."""
    values = []

    @seed(SEED)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=HealthCheck
    )
    @given(strategy)
    def collect(value):
        values.append(value)

    collect()
    return values


def json_by_grammar(numbers):
    """JSON documents of random structure, made by hypothesis."""
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**66), 2**66),
        st.integers(-2, 300),
        st.floats(),
        st.text(max_size=6),
        st.fixed_dictionaries({"b64": st.one_of(st.text("abcd+/=-!", max_size=9), st.integers())}),
    )
    keys = st.one_of(st.sampled_from(["instances", "inputs", "signature_name", ALIAS, "b64"]), st.text(max_size=4))
    values = st.recursive(
        leaves,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=3)),
        max_leaves=14,
    )
    documents = st.one_of(
        values,
        st.dictionaries(keys, values, min_size=1, max_size=4),
        st.builds(lambda key, value: {key: value}, st.sampled_from(["instances", "inputs"]), values),
        st.builds(lambda key, value: {key: value}, st.sampled_from(["instances", "inputs"]), st.lists(values)),
    )
    for batch in made(st.lists(documents, min_size=16, max_size=16), 160):
        for document in batch:
            yield judged("JSON by grammar", numbers.choice(list(IDENTITIES)), json.dumps(document).encode())


def _valid(numbers):
    """A model and a right body for it."""
    model, dtype = numbers.choice(list(IDENTITIES.items()))
    shape = [numbers.randint(1, 3) for _ in range(numbers.randint(1, 3))]
    element = {
        np.float32: lambda: numbers.choice([round(numbers.uniform(-9, 9), 3), numbers.randint(-9, 9), 1e30, math.nan]),
        np.float64: lambda: numbers.uniform(-1e300, 1e300),
        np.int32: lambda: numbers.randint(-(2**31), 2**31 - 1),
        np.int64: lambda: numbers.randint(-(2**63), 2**63 - 1),
        np.uint64: lambda: numbers.randint(0, 2**64 - 1),
        np.bool_: lambda: numbers.random() < 0.5,
        np.object_: lambda: numbers.choice(["abc", "é\n", {"b64": base64.b64encode(numbers.randbytes(4)).decode()}]),
    }[dtype]

    def fill(sizes):
        return [fill(sizes[1:]) for _ in range(sizes[0])] if sizes else element()

    rows = fill(shape)
    document = numbers.choice(
        [
            {"instances": rows},
            {"inputs": rows},
            {"instances": [{ALIAS: row} for row in rows]},
            {"inputs": {ALIAS: rows}},
        ]
    )
    if numbers.random() < 0.3:
        document = {"signature_name": "serving_default", **document}
    return model, json.dumps(document, ensure_ascii=numbers.random() < 0.5).encode()


def mutated(numbers):
    """Right bodies with a few bytes changed, removed, put in, doubled or swapped."""
    inserts = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b".", b"e", b"0", b"\\", b"\x00", b"\xff", b"null", b"1"]
    for _ in range(1500):
        model, body = _valid(numbers)
        for _ in range(numbers.randint(1, 3)):
            at, to = numbers.randrange(len(body)), numbers.randrange(len(body))
            change = numbers.randrange(5)
            if change == 0:
                body = body[:at] + bytes([numbers.randrange(256)]) + body[at + 1 :]
            elif change == 1:
                body = body[:at] + body[at + 1 :] or b"["
            elif change == 2:
                body = body[:at] + numbers.choice(inserts) + body[at:]
            elif change == 3:
                body = body[: max(at, to)] + body[min(at, to) :]
            else:
                low, high = sorted((at, to))
                body = (
                    body[:low] + body[high : high + 1] + body[low + 1 : high] + body[low : low + 1] + body[high + 1 :]
                )
        yield judged("mutated JSON", model, body)


def truncated(numbers):
    """Right bodies that end too soon."""
    for _ in range(700):
        model, body = _valid(numbers)
        yield judged("truncated JSON", model, body[: numbers.randrange(len(body))])


def random_bytes(numbers):
    """Bodies of random bytes, some with a JSON beginning."""
    for number in range(500):
        body = numbers.randbytes(numbers.choice([1, 7, 64, 1000]))
        yield judged(
            "random bytes", numbers.choice(list(IDENTITIES)), body if number % 2 else b'{"instances": [' + body
        )


def wrong_keys(numbers):
    """Documents whose keys are not the protocol's, or not the model's."""
    bodies = [
        b"{}", b"[]", b"1", b'"instances"', b"null", b'{"instance": [1]}', b'{"Instances": [1]}', b'{"input": [1]}',
        b'{"instances": [1], "inputs": [1]}', b'{"instances": {}}', b'{"instances": null}', b'{"instances": []}',
        b'{"instances": "x"}', b'{"instances": 1}', b'{"inputs": {}}', b'{"inputs": {"x": [1]}}',
        b'{"instances": [{}]}', b'{"instances": [{"x": 1}]}', b'{"instances": [{"default": 1, "x": 1}]}',
        b'{"instances": [{"default": 1}, 1]}', b'{"instances": [1, {"default": 1}]}', b'{"signature_name": "none"}',
        b'{"signature_name": 1, "instances": [1]}', b'{"signature_name": "none", "instances": [1]}',
        b'{"signature_name": null, "instances": [1]}', b'{"signature_name": ["a"], "inputs": [1]}',
        b'{"signature_name": {"a": 1}, "inputs": [1]}', b'{"": [1]}', b'{"examples": [{"default": 1}]}',
    ]  # fmt: skip
    for model, body in itertools.product(IDENTITIES, bodies):
        yield judged("wrong keys", model, body)
    pairs = [
        b'{"instances": [1]}', b'{"instances": [{"int_tensor": 1}]}', b'{"inputs": [1]}',
        b'{"inputs": {"int_tensor": 1}}',
        b'{"instances": [{"int_tensor": 1, "str_tensor": "a", "x": 1}]}', b'{"inputs": {"str_tensor": "a"}}',
        b'{"instances": [{"int_tensor": 1, "str_tensor": "a"}, {"int_tensor": 1}]}', b'{"inputs": {"b64": "aa=="}}',
        b'{"instances": [{"int_tensor": 1, "str_tensor": 1}]}', b'{"instances": [{"b64": "aa=="}]}',
        b'{"instances": [{"int_tensor": [1], "str_tensor": "a"}, {"int_tensor": 1, "str_tensor": "a"}]}',
    ]  # fmt: skip
    for body in pairs:
        yield Case("wrong keys", predict("pair", body), 400)


def wrong_shapes(numbers):
    """Ragged, too deep, too shallow and empty arrays."""
    ones = {np.bool_: "true", np.object_: '"a"'}
    for model, dtype in IDENTITIES.items():
        for text in (
            "[[1,2],[3]]", "[[1],[2,3]]", "[1,[2]]", "[[1],2]", "[[],[1]]", "[[1],[]]", "[[[1]],[[2],[3]]]",
            "[[[]],[]]",
            "[[],[[]]]", "[[[1,2],[3,4]],[[5,6],[7]]]", "[1,[]]", "[[],1]", "[[[1]],[2]]", "[[[1]],[[[2]]]]",
        ):  # fmt: skip
            for digit in "1234567":
                text = text.replace(digit, ones.get(dtype, digit))
            for key in ("instances", "inputs"):
                yield judged("wrong shapes", model, f'{{"{key}": {text}}}'.encode())
        for depth in (31, 32, 33, 64, 65, 100, 254, 255, 256, 300, 900):
            one = "[" * depth + ones.get(dtype, "1") + "]" * depth
            yield judged("wrong shapes", model, f'{{"inputs": {one}}}'.encode())
            yield judged("wrong shapes", model, f'{{"instances": {one}}}'.encode())
    right = (None, 8, 8, 1)
    for model in ("convnet", "lite"):
        for number in range(160):
            shape = [numbers.randint(0, 9) for _ in range(numbers.randint(0, 6))]
            if number % 3 == 0:  # nearly right
                shape = [numbers.randint(1, 2), *right[1:]]
                shape[numbers.randrange(1, len(shape))] += numbers.choice([-1, 1, 2])
            fits = len(shape) == len(right) and all(
                want in (None, size) for want, size in zip(right, shape, strict=True)
            )
            if model == "convnet" and len(shape) == 4 and {shape[1], shape[2]} <= {8, 9}:  # its pooling drops a ninth
                continue
            if not fits and math.prod(shape) < 5000:
                body = json.dumps({"inputs": np.zeros(shape).tolist()}).encode()
                yield Case("wrong shapes", predict(model, body), 400)


def wrong_types(numbers):
    """Elements that are not of the model's type, at every place of an array."""
    elements = [
        "1",
        "1.0",
        "1e0",
        "-1",
        "true",
        "false",
        "null",
        '"1"',
        '"a"',
        "{}",
        '{"b64": "YQ=="}',
        '{"a": 1}',
        "[1]",
    ]
    right = {np.bool_: "true", np.object_: '"a"'}
    for (model, dtype), element in itertools.product(IDENTITIES.items(), elements):
        one = right.get(dtype, "1")
        for text in (f"[{element}]", f"[{one}, {element}]", f"[[{one}], [{element}]]", f"[{element}, {one}]"):
            for key in ("instances", "inputs"):
                yield judged("wrong types", model, f'{{"{key}": {text}}}'.encode())


def out_of_range(numbers):
    """Integers that the model's type does not hold, and numbers that no type holds."""
    for model, dtype in IDENTITIES.items():
        if dtype in _INTEGERS:
            bounds = np.iinfo(dtype)
            for distance in (1, 2, 1000, 2**31, 2**64, 10**30, 10**200):
                for value in (int(bounds.min) - distance, int(bounds.max) + distance):
                    for text in (f"[{value}]", f"[0, {value}]", f"[[0], [{value}]]", f"{value}"):
                        yield judged("out of range", model, f'{{"inputs": {text}}}'.encode())
    for model in IDENTITIES:
        for text in (
            "1e309", "-1e309", "1e400", "1e999999999", "1" + "0" * 309, "-1" + "0" * 400, "9" * 5000,
            "1" + "0" * 100_000,
            "0." + "0" * 5000 + "1", "1e-400", "1" * 400 + ".5", "1E+309", "01", "+1", "1.", ".5", "1e", "1e+", "0x10",
            "--1",
            "1_000", "1,5", "\u0661", "1e5.5", "- 1", "1 2",
        ):  # fmt: skip
            for body in (f'{{"inputs": [{text}]}}', f'{{"inputs": {text}}}', f'{{"instances": [0, {text}]}}'):
                yield judged("enormous and misspelt numbers", model, body.encode())


def not_finite(numbers):
    """NaN and Infinity where the type has none, and spellings that JSON parsers do not share."""
    spellings = ["NaN", "Infinity", "-Infinity", "nan", "inf", "INF", "infinity", "+Infinity", "1.#INF", "None", "True"]
    for model, spelling in itertools.product(IDENTITIES, spellings):
        for text in (f"[{spelling}]", f"[1, {spelling}]", f"[[{spelling}]]"):
            for key in ("instances", "inputs"):
                yield judged("not finite", model, f'{{"{key}": {text}}}'.encode())


def deep(numbers):
    """Nesting without end, closed or not."""
    for depth in (1_000, 20_000, 500_000):
        for opening, closing in (("[", "]"), ('{"a":', "}"), ("[{}, ".replace("{}, ", ""), "")):
            for key in ("instances", "inputs", "signature_name"):
                body = f'{{"{key}": {opening * depth}{"1" * bool(closing)}{closing * depth}}}'.encode()
                if len(body) <= MAX_BODY:
                    yield Case("deep nesting", predict(numbers.choice(list(IDENTITIES)), body), 400)
        yield Case("deep nesting", predict("ident_f32", b"[" * depth), 400)
        yield Case("deep nesting", post("/v1/models/m:classify", b'{"examples": [' * (depth // 10)), 400)
        examples = b'{"examples": [{"x": %b%b}]}' % (b"[" * depth, b"]" * depth)
        yield Case("deep nesting", post("/v1/models/m:classify", examples), 400)


def bad_text(numbers):
    """Bytes that are no UTF-8, and surrogates that are no character."""
    broken = [
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\xe2\x82",
        b"\x80",
        b"\xfe\xff",
        b"\xf0\x9f",
    ]
    for model in IDENTITIES:
        for bytes_ in broken:
            for body in (
                b'{"inputs": [%b]}', b"%b", b'{"inputs": [1]%b}', b'{"inputs": {"%b": 1}}', b'{"%b": [1]}',
                b'{"signature_name": "%b", "inputs": [1]}',
            ):  # fmt: skip
                yield judged("no UTF-8", model, body % bytes_)
    for surrogate in (rb"\ud800", rb"\udfff", rb"\ud800\ud800", rb"\udc00\ud800", rb"\ud800x", rb"\uD83D\u0041"):
        for body in (
            b'{"inputs": ["%b"]}', b'{"instances": ["%b"]}', b'{"instances": [["a"], ["%b"]]}',
            b'{"inputs": {"%b": 1}}',
            b'{"signature_name": "%b", "inputs": ["a"]}', b'{"instances": [{"%b": "a"}]}', b'{"%b": ["a"]}',
        ):  # fmt: skip
            for model in ("ident_str", "ident_f32", "ident_bool"):
                yield judged("lone surrogates", model, body % surrogate)
        yield Case("lone surrogates", post("/v1/models/m:classify", b'{"examples": [{"%b": 1}]}' % surrogate), 400)
        yield Case("lone surrogates", post("/v1/models/m:classify", b'{"examples": [{"x": "%b"}]}' % surrogate), 400)
    for escape in (rb"\u", rb"\u12", rb"\uzzzz", rb"\x41", rb"\ ", b"\x00", b"\x1f", b"\n", b"\\"):
        yield judged("misspelt escapes", "ident_str", b'{"inputs": ["%b"]}' % escape)
        yield judged("misspelt escapes", "ident_str", b'{"inputs": ["a", "%b"]}' % escape)


def bad_base64(numbers):
    """What stands for bytes and is no base64."""
    alphabet = string.ascii_letters + string.digits + "+/"
    for _ in range(300):
        text = "".join(numbers.choice(alphabet) for _ in range(numbers.randint(0, 12)))
        for _ in range(numbers.randint(1, 3)):
            at = numbers.randint(0, len(text))
            text = text[:at] + numbers.choice('!-_.é\u2028\\"#,~\x7f\u0000%') + text[at:]
        body = json.dumps({"inputs": [{"b64": text}]}).encode()
        yield judged("no base64", "ident_str", body)
    for value in (
        "1",
        "null",
        "[]",
        '["YQ=="]',
        "{}",
        '{"b64": "YQ=="}',
        "true",
        '"YQ==", "c": 1',
        '"="',
        '"A"',
        '"AAAAA"',
    ):
        for text in (f'[{{"b64": {value}}}]', f'["a", {{"b64": {value}}}]', f'{{"b64": {value}}}'):
            yield judged("no base64", "ident_str", f'{{"inputs": {text}}}'.encode())
            yield judged("no base64", "ident_f32", f'{{"inputs": {text}}}'.encode())


def bad_gzip(numbers):
    """Bodies that claim to be gzip: cut, damaged, doubled, too large, or nothing of the kind."""
    for _ in range(330):
        model, body = _valid(numbers)
        packed = gzip.compress(body, mtime=0)
        change = numbers.randrange(4)
        if change == 0:
            packed = packed[: numbers.randrange(len(packed))]
        elif change == 1:  # the header's first three bytes, the checksum or the length
            at = numbers.choice([0, 1, 2, *range(len(packed) - 8, len(packed))])
            packed = packed[:at] + bytes([packed[at] ^ (1 << numbers.randrange(8))]) + packed[at + 1 :]
        elif change == 2:
            packed = body
        else:
            packed = numbers.randbytes(numbers.randint(1, 99))
        yield Case("damaged gzip", predict(model, packed, "Content-Encoding: gzip"), 400)
    bomb = gzip.compress(b" " * (101 << 20), 9, mtime=0)
    for packed, status in ((bomb, 413), (bomb, 413), (gzip.compress(b""), 400), (gzip.compress(b""), 400)):
        yield Case("damaged gzip", predict("m", packed, "Content-Encoding: gzip"), status)


def lying_lengths(numbers):
    """Content-Length and chunk sizes that are not those of the body."""
    body = b'{"inputs": [1.0]}'
    path = "/v1/models/ident_f32:predict"
    for length in ("-1", "abc", "1e3", "0x11", "17 17", "17,17", "99999999999999999999999", "", "+17", "17.0", "٣"):
        value = length.encode().decode("latin-1")
        yield Case("lying lengths", head("POST", path, f"Content-Length: {value}") + body, 400, closes=True)
    for short in range(len(body)):
        cut = head("POST", path, f"Content-Length: {short}") + body  # what is left over is no request
        yield Case("lying lengths", cut, 400, closes=True)
    for headers in (("Content-Length: 17", "Content-Length: 16"), ("Content-Length: 17", "Transfer-Encoding: chunked")):
        yield Case("lying lengths", head("POST", path, *headers) + body, 400, closes=True)
    for length in (MAX_BODY + 1, 10**12, 10**18):  # refused before a byte of it is there
        request = head("POST", path, f"Content-Length: {length}", "Expect: 100-continue")
        yield Case("oversize bodies", request, 413, closes=True)
    chunked = "Transfer-Encoding: chunked"
    for chunk in (
        b"zz\r\n", b"-1\r\n", b"5\r\nabcdefgh\r\n", b"\r\n\r\n", b"fffffffffffffffffffff\r\n", b"5\r\nab\r\n\r\n",
        b"0x5\r\n",
        b"5 5\r\nabcde\r\n", b"\x00\r\n", b"1\r\nab\r\n0\r\n\r\n",
    ):  # fmt: skip
        yield Case("lying lengths", head("POST", path, chunked) + chunk, 400, closes=True)
    for _ in range(60):
        junk = bytes(numbers.choice(b"ghijklmnopqrstuvwxyz!#") for _ in range(numbers.randint(1, 20)))
        yield Case("lying lengths", head("POST", path, chunked) + junk + b"\r\n", 400, closes=True)


def oversize(numbers):
    """Bodies beyond the limit, sent whole."""
    for number in range(12):
        body = b'{"inputs": [' + b"1," * (MAX_BODY // 2) + b"1]}"
        if number % 2:
            yield Case("oversize bodies", predict("ident_f32", body), 413)
        else:
            chunks = [body[at : at + 200_000] for at in range(0, len(body), 200_000)]
            wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
            request = head("POST", "/v1/models/ident_f32:predict", "Transfer-Encoding: chunked") + wire
            yield Case("oversize bodies", request, 413)


def bad_paths(numbers):
    """Paths and methods that are not the protocol's, and names that would leave the folder of the models."""
    body = b'{"instances": [1.0]}'
    outside = [
        "/", "*", "//", "/index", "/v1", "/v2/models/m", "/V2/", "/etc/passwd", "/../etc/passwd", "/%2e%2e/etc/passwd",
               "/v1%2fmodels/m", "/metrics", "/favicon.ico", "/healthz/", "/readyz?x", "/.well-known/x",
               "//v1/models/m",
    ]  # fmt: skip
    for path, method in itertools.product(outside, ("GET", "POST", "PUT", "DELETE")):
        if path == "/readyz?x" and method == "GET":
            continue  # a query does not change what is asked for
        yield Case("malformed paths", head(method, path, "Content-Length: 0"), 404, is_json=False)
    malformed = [
        "/v1/", "/v1/model/m", "/v1/models//", "/v1/models/m/", "/v1/models/m/x", "/v1/models/m:explain",
        "/v1/models/m/versions",
        "/v1/models/m/versions/", "/v1/models/m/versions/x", "/v1/models/m/versions/-1", "/v1/models/m/versions/1.0",
        "/v1/models/m/labels/", "/v1/models/m/versions/1/labels/a", "/v1/models/m/labels/a/versions/1",
        "/v1/models/m/predict",
        "/v1/models/m:predict:predict", "/v1/models/m::predict", "/v1/models/:predict/", "/v1/models/m/metadata/x",
        "/v1/models/m/versions/%31", "/v1//models/m", "/v1/./models/m", "/v1/models/../models/m",
        "/v1/models/m;x:predict/y",
    ]  # fmt: skip
    for path, method in itertools.product(malformed, ("GET", "POST", "PATCH")):
        yield Case("malformed paths", head(method, path, "Content-Length: 0"), 400)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "LOCK", "SEARCH"):
        for path in ("/v1/models/m", "/v1/models/m:predict", "/v1/models/m/metadata", "/v1/models/m/versions/1"):
            yield Case("wrong methods", head(method, path, "Content-Length: 0"), 400)
    yield Case("wrong methods", head("GET", "/v1/models/m:predict"), 400)
    yield Case("wrong methods", head("POST", "/v1/models/m", "Content-Length: 0"), 400)
    for digits in ("9" * 19, "9" * 20, "1" + "0" * 40, "9" * 5000, "0" * 5000 + "9"):  # beyond 64 bits, beyond `int`
        status = 400 if int(digits[-4200:]) > 2**63 - 1 or len(digits.lstrip("0")) > 19 else 404
        yield Case("malformed paths", post(f"/v1/models/m/versions/{digits}:predict", body), status)
        yield Case("malformed paths", head("GET", f"/v1/models/m/versions/{digits}"), status)
        yield Case("malformed paths", head("GET", f"/v1/models/m/versions/{digits}/metadata"), status)
    escapes = [
        "..", ".", "../m", "../../etc/passwd", "/etc/passwd", "m/1", "m/../m", "..\\m", "~", "~root", "m\0", "\0",
        "m/.", "./m",
        "file:///etc", "$HOME", "`id`", "m/1/saved_model.pb", "….", "a" * 3000, "\u202e", "m\r\nX: y", "C:\\",
        "%2e%2e", "*", "?",
    ]  # fmt: skip
    for name in escapes:
        coded = quote(name, safe="")
        for fully in (coded, coded.replace(".", "%2e"), coded.replace(".", "%2E").lower(), coded.replace("%", "%25")):
            yield Case("path traversal", post(f"/v1/models/{fully}:predict", body), 404)
            yield Case("path traversal", head("GET", f"/v1/models/{fully}"), 404)
            yield Case("path traversal", head("GET", f"/v1/models/{fully}/metadata"), 404)
            yield Case("path traversal", post(f"/v1/models/m/labels/{fully}:predict", body), 400)
            yield Case("path traversal", post(f"/v1/models/m/versions/{fully}:predict", body), 400)
    for path in ("/v1/models/../../etc/passwd", "/v1/models/m/../../../etc/passwd", "/v1/../../etc/passwd"):
        yield Case("path traversal", head("GET", path), 400)
        yield Case("path traversal", post(path + ":predict", body), 400)


def no_http(numbers):
    """What is no HTTP at all."""
    for number in range(200):
        junk = numbers.randbytes(numbers.randint(5, 80)).replace(b"\r", b"").replace(b"\n", b"")
        start = [b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET", b"", b"GET / HTTP/9.9\r\n"][
            number % 5
        ]
        yield Case("no HTTP", (start or b"\x80") + junk + b"\r\n\r\n", 400, closes=True)
    for request in (
        b"GET /v1/models/m HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET /v1/models/m\x00 HTTP/1.1\r\n\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v1/models/m HTTP/1.1\r\nHost: a\r\n b\r\n: c\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET v1/models/m HTTP/1.1\r\nHost: a\r\n\r\n", b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    ):  # fmt: skip
        yield Case("no HTTP", request, 400, closes=True)


def bad_examples(numbers):
    """Classify and Regress with examples that are none, or that lack what the model needs."""
    documents = [
        "{}", "[]", "1", '{"examples": 1}', '{"examples": {}}', '{"examples": []}', '{"examples": [1]}',
        '{"examples": [[]]}',
        '{"examples": [null]}', '{"examples": ["x"]}', '{"examples": [{}]}', '{"examples": [{"y": 1.0}]}',
        '{"examples": [{"x": null}]}', '{"examples": [{"x": {}}]}', '{"examples": [{"x": [[1.0]]}]}',
        '{"examples": [{"x": [1.0, 2.0]}]}', '{"examples": [{"x": []}]}', '{"examples": [{"x": 1}]}',
        '{"examples": [{"x": "a"}]}', '{"examples": [{"x": [1.0, 1]}]}', '{"examples": [{"x": {"b64": "!"}}]}',
        '{"examples": [{"x": 1.0}, {"x": "a"}]}', '{"examples": [{"x": 1.0}, 1]}',
        '{"context": 1, "examples": [{"x": 1.0}]}',
        '{"context": {"x": null}, "examples": [{"x": 1.0}]}', '{"instances": [1.0]}', '{"inputs": [1.0]}',
        '{"examples": [{"x": 18446744073709551615}]}', '{"examples": [{"x": 1e400}]}', '{"examples": [{"x": true}]}',
        '{"examples": [{"x": 1.0}]', '{"examples": [{"x": 1.0}', '{"examples": [{"x": [1.0, 18446744073709551615]}]}',
    ]  # fmt: skip
    for document, (method, signature) in itertools.product(
        documents, (("classify", "classify_x_to_y"), ("regress", "regress_x_to_y"), ("regress", "classify_x_to_y"))
    ):
        if document.startswith('{"'):
            document = f'{{"signature_name": "{signature}", {document[1:]}'
        yield Case("malformed tf.Examples", post(f"/v1/models/m:{method}", document.encode()), 400)
    for name in ("", "none", "serving_default", "regress_x2_to_y3"):
        body = json.dumps({"signature_name": name, "examples": [{"x": 1.0}]}).encode()
        yield Case("malformed tf.Examples", post("/v1/models/m:classify", body), 400)
    for _ in range(200):  # bytes that are no tf.Example, for a graph that parses them
        content = base64.b64encode(bytes([numbers.choice([0x07, 0x0F, 0x0B, 0x0C])]) + numbers.randbytes(8)).decode()
        body = {"signature_name": "classify_x_to_y", "inputs": [{"b64": content}]}
        yield Case("malformed tf.Examples", predict("m", json.dumps(body).encode()), 400)
    leaves = st.one_of(
        st.none(), st.integers(2**63, 2**64 - 1), st.lists(st.lists(st.integers(), min_size=1), min_size=1)
    )
    for values in made(st.lists(leaves, min_size=8, max_size=8), 40):
        for value in values:
            body = json.dumps({"signature_name": "regress_x_to_y", "examples": [{"x": value}]}).encode()
            yield Case("malformed tf.Examples", post("/v1/models/m:regress", body), 400)


FAMILIES = (
    json_by_grammar, mutated, truncated, random_bytes, wrong_keys, wrong_shapes, wrong_types, out_of_range, not_finite,
    deep,
    bad_text, bad_base64, bad_gzip, lying_lengths, oversize, bad_paths, no_http, bad_examples,
)  # fmt: skip


def cases():
    """All the malformed requests over REST, in a random order, but the large ones in the first half."""
    numbers = random.Random(SEED)
    listed = [case for family in FAMILIES for case in family(numbers)]
    numbers.shuffle(listed)
    listed.sort(key=lambda case: len(case.request) <= _LARGE)
    first, second = listed[: len(listed) // 2], listed[len(listed) // 2 :]
    numbers.shuffle(first)
    return first, second


# --- gRPC -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One gRPC call as it goes over the wire: service and method, the message's bytes, and the status that is right."""

    family: str
    method: str
    message: bytes
    status: str


_PREDICTION, _MODEL = "/tensorflow.serving.PredictionService/", "/tensorflow.serving.ModelService/"


def _predict_message(model, alias, dtype, shape, **fields):
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    request = PredictRequest()
    request.model_spec.name = model
    tensor = request.inputs[alias]
    tensor.dtype = dtype
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    for name, value in fields.items():
        if name == "tensor_content":
            tensor.tensor_content = value
        else:
            getattr(tensor, name).extend(value)
    return request


def _judged_call(family, method, kind, message):
    """The call with bytes of a message that may by luck be whole: whether they are is asked of protobuf itself."""
    from google.protobuf.message import DecodeError

    try:
        request = kind.FromString(message)
    except DecodeError:
        return Call(family, method, message, "INTERNAL")  # gRPC's own word for a message that cannot be read
    spec = request.model_spec
    assert not request.inputs, "more than its model_spec is whole"
    known = spec.name in ("", "m", *IDENTITIES)
    return Call(family, method, message, "INVALID_ARGUMENT" if known else "NOT_FOUND")


def calls():
    """All the malformed gRPC calls, in a random order, as two halves."""
    from tensorflow_serving.apis import (
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        predict_pb2,
    )

    numbers, listed = random.Random(SEED), []

    def add(family, method, message, status="INVALID_ARGUMENT"):
        listed.append(Call(family, method, message.SerializeToString(), status))

    def predict_call(family, request, status="INVALID_ARGUMENT"):
        add(family, _PREDICTION + "Predict", request, status)

    whole = _predict_message("ident_f32", ALIAS, 1, [2, 2], float_val=[1, 2, 3, 4]).SerializeToString()
    for cut in range(len(whole)):
        listed.append(
            _judged_call("truncated protobuf", _PREDICTION + "Predict", predict_pb2.PredictRequest, whole[:cut])
        )
    for _ in range(250):
        message = numbers.randbytes(numbers.randint(1, 60))
        listed.append(_judged_call("random protobuf", _PREDICTION + "Predict", predict_pb2.PredictRequest, message))
    for number in (1, 2, 3, 9, 10, 23):
        for length in (1, 2, 3, 5, 7, 9, 15, 17, 33, 100):
            for shape in ([], [2], [2, 2], [3]):
                size = {1: 4, 2: 8, 3: 4, 9: 8, 10: 1, 23: 8}[number]
                if math.prod(shape) * size != length:
                    model = {1: "f32", 2: "f64", 3: "i32", 9: "i64", 10: "bool", 23: "u64"}[number]
                    request = _predict_message(f"ident_{model}", ALIAS, number, shape, tensor_content=b"\1" * length)
                    predict_call("tensor_content of the wrong size", request)
    predict_call(
        "tensor_content of the wrong size", _predict_message("ident_str", ALIAS, 7, [1], tensor_content=b"abc")
    )
    huge = [
        [2**62],
        [2**62, 4],
        [2**32, 2**32],
        [2**62, 2**62],
        [2**31, 2**31, 4],
        [2**63 - 1],
        [2**62, 0],
        [2**40],
        [2**33],
    ]
    for shape in huge:
        for model, number, field in (("f32", 1, "float_val"), ("i32", 3, "int_val"), ("str", 7, "string_val")):
            one = [b"a"] if number == 7 else [1]
            for values in ([], one, one * 5):
                predict_call("huge shapes", _predict_message(f"ident_{model}", ALIAS, number, shape, **{field: values}))
    for rank in (33, 64, 65, 254, 255, 1000):
        for model, number, field in (("f32", 1, "float_val"), ("str", 7, "string_val")):
            one = [b"a"] if number == 7 else [1]
            predict_call("huge shapes", _predict_message(f"ident_{model}", ALIAS, number, [1] * rank, **{field: one}))
    for shape in ([-1], [-2], [2, -1], [-1, -1], [-(2**63)], [0, -5]):
        for model, number in (("f32", 1), ("i64", 9), ("str", 7), ("bool", 10)):
            predict_call("negative sizes", _predict_message(f"ident_{model}", ALIAS, number, shape))
    for number in (0, 11, 20, 21, 24, 25, 50, 99, 101, 107, 1000, 2**31 - 1):
        for model in IDENTITIES:
            predict_call("unknown types", _predict_message(model, ALIAS, number, [1], float_val=[1]))
    for (model, right), (number, field) in itertools.product(
        (("f32", 1), ("f64", 2), ("i32", 3), ("i64", 9), ("bool", 10), ("str", 7), ("u64", 23)),
        ((1, "float_val"), (2, "double_val"), (3, "int_val"), (9, "int64_val"), (10, "bool_val"), (7, "string_val")),
    ):
        if number != right:
            values = [b"a"] if number == 7 else [1]
            predict_call("wrong types", _predict_message(f"ident_{model}", ALIAS, number, [1], **{field: values}))
    for alias in ("", "x", "Default", "default ", "default:0", "\u202e", "a" * 5000, "../default"):
        for model in IDENTITIES:
            predict_call("unknown inputs", _predict_message(model, alias, 1, [1], float_val=[1]))
    for wanted in (["x"], ["out", "out"], ["out", "x"], [""], ["out:0"], ["default"], ["out"] * 100, ["OUT"], ["\0"]):
        for model, number, field in (("f32", 1, "float_val"), ("i32", 3, "int_val")):
            request = _predict_message(f"ident_{model}", ALIAS, number, [1], **{field: [1]})
            request.output_filter.extend(wanted)
            predict_call("wrong output filters", request)
    for shape in (
        [1, 8, 8],
        [8, 8, 1],
        [1, 5, 8, 1],
        [1, 64],
        [64],
        [],
        [1, 8, 8, 1, 1],
        [0, 8],
        [1, 0, 8, 1],
    ):
        for model in ("convnet", "lite"):
            predict_call("wrong shapes", _predict_message(model, "image", 1, shape, float_val=[1] * math.prod(shape)))
    for name in (
        "..",
        "../m",
        "/etc/passwd",
        "m/1",
        "m\0",
        "M",
        " m",
        "m ",
        "a" * 5000,
        "\u202e",
        "%6d",
        "file:///m",
        ".",
    ):
        for version in (None, 1, -1, 2**62):
            request = _predict_message(name, "x", 1, [1], float_val=[1])
            if version is not None:
                request.model_spec.version.value = version
            predict_call("unknown models", request, "NOT_FOUND")
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = name
        add("unknown models", _MODEL + "GetModelStatus", status, "NOT_FOUND")
        metadata = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        metadata.model_spec.name = name
        add("unknown models", _PREDICTION + "GetModelMetadata", metadata, "NOT_FOUND")
        metadata.metadata_field[:] = [name]
        metadata.model_spec.name = "m"
        add("unknown fields", _PREDICTION + "GetModelMetadata", metadata)
    for version in (0, 2, -1, 2**62, -(2**63), 2**63 - 1):
        request = _predict_message("m", "x", 1, [1], float_val=[1])
        request.model_spec.version.value = version
        predict_call("unknown versions", request, "NOT_FOUND")
    for signature in ("none", "SERVING_DEFAULT", "\0", "a" * 5000, "../serving_default"):
        request = _predict_message("m", "x", 1, [1], float_val=[1])
        request.model_spec.signature_name = signature
        predict_call("unknown signatures", request, "FAILED_PRECONDITION")
    for kind in (classification_pb2.ClassificationRequest, predict_pb2.PredictRequest):
        method = "Predict" if kind is predict_pb2.PredictRequest else "Classify"
        add("empty requests", _PREDICTION + method, kind())
    for features in ({}, {"y": 1.0}, {"x": b"a"}, {"x": 1}, {"x": [1.0, 2.0]}, {"x": []}):
        for method, signature in (
            ("Classify", "classify_x_to_y"),
            ("Classify", "none"),
            ("Classify", "regress_x_to_y"),
        ):
            request = classification_pb2.ClassificationRequest()
            request.model_spec.name, request.model_spec.signature_name = "m", signature
            example = request.input.example_list.examples.add()
            for name, value in features.items():
                values = value if isinstance(value, list) else [value]
                kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
                part = getattr(example.features.feature[name], kinds[type(values[0]) if values else float])
                part.value.extend(values)
                part.SetInParent()
            status = "FAILED_PRECONDITION" if signature == "regress_x_to_y" else "INVALID_ARGUMENT"
            add("malformed tf.Examples", _PREDICTION + method, request, status)
    request = inference_pb2.MultiInferenceRequest()
    request.tasks.add(method_name="tensorflow/serving/classify").model_spec.name = ""
    add("empty requests", _PREDICTION + "MultiInference", request)
    for method in (
        _PREDICTION + "Explain",
        _PREDICTION + "predict",
        "/tensorflow.serving.SessionService/SessionRun",
        "/x/y",
    ):
        listed.append(Call("unknown methods", method, b"", "UNIMPLEMENTED"))
    numbers.shuffle(listed)
    return listed[::2], listed[1::2]
