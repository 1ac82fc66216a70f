"""JSON in and out: the two ways in agree, numbers keep their value, and what is wrong is named.  No TensorFlow runs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.server import codec, jsontext, tensors
from serving.server.signatures import DTYPES, TensorSpec
from serving.server.status import StatusError

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

FLOATS, INTEGERS = ("float", "double"), ("int32", "uint8", "int16", "int8", "int64", "uint32", "uint64")
NUMPY = {name: np.dtype(numpy_type) for name, numpy_type in DTYPES.values()}


def specs(name):
    """A signature's inputs: one of type `name`, any shape."""
    return {"x": TensorSpec(NUMPY[name], None, "x:0")}


def arrays(names):
    """Arrays of the named types with one to four dimensions, none empty."""
    shapes = hnp.array_shapes(max_dims=4, max_side=4)
    return st.sampled_from(names).flatmap(lambda name: hnp.arrays(NUMPY[name], shapes))


def outcome(decode, body, name):
    """What a way in makes of a body: the array, the refusal, or None where it leaves it to the other way."""
    try:
        request = decode(body, lambda _: specs(name))
    except StatusError as error:
        return error.code
    return request and (request.by_row, request.inputs["x"])


def by_document(body, inputs_of):
    """The second way in alone."""
    return codec._decode_document(codec._document(body), inputs_of)


def same(left, right):
    """Whether two outcomes are equal, types and NaN included."""
    if not isinstance(left, tuple) or not isinstance(right, tuple):
        return left == right
    (left_rows, left), (right_rows, right) = left, right
    return (
        left_rows == right_rows
        and left.dtype == right.dtype
        and left.shape == right.shape
        and (left.tobytes() == right.tobytes() or np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))
    )


@given(arrays(FLOATS + INTEGERS), st.sampled_from(["instances", "inputs"]), st.booleans())
def test_an_array_arrives_unchanged_by_both_ways(array, key, named):
    name = next(name for name, dtype in NUMPY.items() if dtype == array.dtype)
    body = {"signature_name": 'a[1]"', key: array.tolist()} if named else {key: array.tolist()}
    body = json.dumps(body).encode()
    want = key == "instances", array
    assert same(outcome(by_document, body, name), want)
    assert same(outcome(codec.decode_predict, body, name), want)


# documents near the edge between the two ways: ragged, mixed, empty, out of range, with other keys beside
leaves = st.one_of(
    st.integers(-(2**65), 2**65),
    st.floats(),
    st.sampled_from([0, 1, -1, 255, 256, 0.5, 1e39]),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
)
nested = st.recursive(
    st.one_of(st.integers(-3, 300), st.sampled_from([0.5, 2.0]), leaves),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=12,
)
documents = st.dictionaries(st.sampled_from(["instances", "inputs", "signature_name", "other"]), nested, max_size=3)


@given(st.one_of(documents, nested.map(lambda value: {"instances": value})), st.sampled_from(FLOATS + INTEGERS))
def test_both_ways_agree_on_any_document(document, name):
    body = json.dumps(document).encode()
    fast = outcome(codec._decode_numbers, body, name)
    assert fast is None or same(fast, outcome(by_document, body, name))


@given(st.text(alphabet='[]{}",:0123456789.-+eEINaflnrstuy \\"', max_size=30))
def test_any_text_is_answered_or_refused(text):
    for way in (codec.decode_predict, by_document):
        assert outcome(way, text.encode(), "float") is not None


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=4)),
)


@given(json_values, st.sampled_from([None, 1]))
def test_the_parser_without_recursion_agrees_with_the_library(value, indent):
    text = json.dumps(value, indent=indent)
    assert jsontext._parse_deep(text, 0) == value


@given(st.one_of(arrays(FLOATS), hnp.arrays(np.float32, 5), hnp.arrays(np.float64, 5)))
def test_numbers_read_back_to_themselves(array):
    texts = jsontext.decimals(array)
    back = np.array([float(text.replace("Infinity", "inf")) for text in texts]).astype(array.dtype)
    assert np.array_equal(back, array.reshape(-1), equal_nan=True)
    assert all("." in text or "e" in text or text in ("NaN", "Infinity", "-Infinity") for text in texts)


@given(arrays(FLOATS + INTEGERS + ("bool", "string")), st.booleans())
def test_an_answer_holds_the_outputs(array, by_row):
    if array.dtype == np.object_:
        array = np.frompyfunc(lambda value: str(value).encode(), 1, 1)(array).reshape(array.shape)
    answer = json.loads(codec.encode_predict({"y": array}, by_row))
    want = np.frompyfunc(bytes.decode, 1, 1)(array).astype(str) if array.dtype == np.object_ else array
    given = np.array(answer["predictions" if by_row else "outputs"], want.dtype)
    assert given.shape == want.shape
    assert np.array_equal(given, want, equal_nan=want.dtype.kind == "f")


@given(arrays(FLOATS + INTEGERS + ("bool", "half", "complex64", "uint16")))
def test_arrays_survive_tensor_messages(array):
    from tensorflow.core.framework.tensor_pb2 import TensorProto

    for write in (tensors.to_proto, tensors.to_content):
        message = TensorProto()
        write(array, message)
        back = tensors.from_proto(TensorProto.FromString(message.SerializeToString()))
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert np.array_equal(back, array, equal_nan=array.dtype.kind in "fc")


@pytest.mark.parametrize(("body", "parts"), [
    (b'{"instances": [[1, 2], [3]]}', ["Failed to process element: 1", "Expecting tensor size: 2 but got: 1"]),
    (b'{"inputs": [[1, 2], [3]]}', ["unexpected size: 1 at level: 1 expected size: 2"]),
    (b'{"instances": [[[1], [2, 3]]]}', ["unexpected size: 2 at level: 1 expected size: 1"]),
    (b'{"inputs": [[1], 2]}', ["JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"]),
    (b'{"instances": []}', ["No values in 'instances' array"]),
    (b'{"instances": [null]}', ["JSON Value: null Type: Null", "not of expected type: float"]),
    (b'{"instances": [1.5', ["JSON Parse error: Missing a comma or ] after an array element. at offset: 18"]),
    (b'{"instances": [1.]}', ["Miss fraction part in number."]),
    (b'{"instances": [1e]}', ["Miss exponent in number."]),
    (b'{"instances": [1' + b"0" * 400 + b"]}", ["Number too big to be stored in double."]),
    (b"  ", ["JSON Parse error: The document is empty."]),
    (b'{"a" 1}', ["Missing a colon after a name of object member. at offset: 5"]),
    (b'{"a": "b}', ["Missing a closing quotation mark in string."]),
])  # fmt: skip
def test_what_is_wrong_is_named(body, parts):
    with pytest.raises(StatusError) as caught:
        codec.decode_predict(body, lambda _: specs("float"))
    assert caught.value.code == "INVALID_ARGUMENT"
    for part in parts:
        assert part in caught.value.message


@given(st.lists(st.dictionaries(st.text(max_size=3), nested, max_size=3), max_size=3), st.none() | nested)
def test_any_examples_are_answered_or_refused(examples, context):
    document = {"examples": examples} if context is None else {"examples": examples, "context": context}
    try:
        _, serialised = codec.decode_examples(json.dumps(document).encode())
    except StatusError as error:
        assert error.code == "INVALID_ARGUMENT"
    else:
        assert len(serialised) == len(examples) > 0


@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\xff"'])
def test_what_is_no_unicode_is_refused_or_passed_on(text):
    with pytest.raises(StatusError) as caught:
        codec.decode_predict(b'{"instances": [%b]}' % text, lambda _: specs("float"))
    assert json.loads(codec.encode_error(caught.value.message))["error"].startswith("Failed to process element: 0")
    with pytest.raises(StatusError, match="no valid Unicode"):
        codec.decode_examples(b'{"examples": [{%b: 1}]}' % text)
    body = b'{"instances": [%b]}' % text
    if text == b'"\xff"':  # the stock server does not look inside strings either
        assert codec.decode_predict(body, lambda _: specs("string")).inputs["x"].tolist() == [b"\xff"]
    else:
        with pytest.raises(StatusError, match="The surrogate pair in string is invalid"):
            codec.decode_predict(body, lambda _: specs("string"))


def test_deep_nesting_is_answered():
    deep = b"[" * 500_000 + b"]" * 500_000
    for key in (b"signature_name", b"instances"):
        with pytest.raises(StatusError) as caught:
            codec.decode_predict(b'{"%b": %b}' % (key, deep), lambda _: specs("float"))
        assert len(caught.value.message) < 1000
    deep = b"[" * 5_000 + b"]" * 5_000
    assert codec.decode_predict(b'{"other": %b, "inputs": 1}' % deep, lambda _: specs("float")).inputs["x"] == 1


def test_text_after_the_document_and_equal_keys():
    request = codec.decode_predict(b'{"instances": [1], "instances": [2]} and more', lambda _: specs("float"))
    assert request.inputs["x"].tolist() == [1]
    parsed = jsontext.parse(b'{"b": 1, "a": {"d": 2, "c": 3}, "b": 4, "e": 5}')
    assert list(parsed.items()) == [("b", 1), ("a", {"d": 2, "c": 3}), ("e", 5)]
    assert list(parsed) == ["b", "a", "e"]
    assert list(parsed["a"]) == ["d", "c"]


def test_base64_may_lack_its_padding():
    request = codec.decode_predict(
        b'{"instances": [{"b64": "aGVsbG8"}, {"b64": "aGVs bG8="}, "\\u00e9"]}', lambda _: specs("string")
    )
    assert request.inputs["x"].tolist() == [b"hello", b"hello", "é".encode()]


def test_a_context_is_part_of_every_example():
    from tensorflow.core.example.example_pb2 import Example

    name, examples = codec.decode_examples(
        b'{"signature_name": "s", "context": {"a": 1, "b": "c"}, "examples": [{"a": 2}, {"d": [1.5, 2.5]}]}'
    )
    first, second = (Example.FromString(example).features.feature for example in examples)
    assert name == "s"
    assert (first["a"].int64_list.value, first["b"].bytes_list.value) == ([2], [b"c"])
    assert (second["a"].int64_list.value, second["d"].float_list.value) == ([1], [1.5, 2.5])
