"""The protocol's conformance cases, as tests of the embedded server and as a command against any server.

`python -m tests.serving_conformance --url http://host:8501 --grpc host:8500` asks a running server, which must serve
the models that `--build DIR` writes (DIR/models.config) with --allow_version_labels_for_unavailable_models=true.
"""

import argparse
import gzip
import http.client
import json
import math
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from course import core

CASES, MORE = (
    json.loads((Path(__file__).parent / "data" / name).read_text())
    for name in ("serving_conformance.json", "serving_contract.json")
)
REST, GRPC = (CASES[kind] + MORE[kind] for kind in ("rest_cases", "grpc_cases"))
# what a server's address alone cannot show: other flags, another folder, another config
NEEDS_CONTROL = {"ver-03", "grpc-08", "grpc-16", "grpc-17", "grpc-19"}


def ask(url, request):
    """Send a case's request to `url`, its path untouched; returns (status, headers in lower case, body text)."""
    parts = urlsplit(url)
    body = request.get("body", "").encode()
    if packed := re.fullmatch(r"gzip\((.*)\)", request.get("body", ""), re.DOTALL):
        body = gzip.compress(packed[1].encode())
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    try:
        connection.request(request["method"], request["path"], body or None, request.get("headers", {}))
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return response.status, headers, response.read().decode()
    finally:
        connection.close()


def check(expect, status, headers, body):
    """Raise AssertionError where an answer is not what a case expects."""
    assert status == expect["status"], f"status {status}, expected {expect['status']}: {body[:300]}"
    for name, value in expect.get("headers", {}).items():
        assert headers.get(name.lower(), "").split(";")[0] == value, f"header {name}: {headers.get(name.lower())}"
    if "json" in expect:
        assert json.loads(body) == expect["json"], body
    if "json_with_nonfinite_text" in expect:
        assert "".join(body.split()) == expect["json_with_nonfinite_text"], body
    for part in expect.get("error_contains", ()):
        error = json.loads(body)
        assert error.keys() == {"error"}, body
        assert part in error["error"], f"{part!r} is not in {error['error'][:500]!r}"
    for part in expect.get("body_contains", ()):
        assert part in body, body
    if expect.get("body_empty"):
        assert body == "", body
    known = {"status", "headers", "json", "json_with_nonfinite_text", "error_contains", "body_contains", "body_empty"}
    assert expect.keys() <= known, f"the case expects something that is not checked: {expect.keys() - known}"


def run_rest(case, url):
    """Run one REST case against `url`."""
    check(case["expect"], *ask(url, case["request"]))


def run_grpc(case, channel):
    """Run one gRPC case that a channel to the server suffices for."""
    import grpc
    from google.protobuf import text_format
    from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
    from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

    method = re.match(r"(?:\w+/)?(\w+)", case["rpc"])[1]
    stub = (ModelServiceStub if case["rpc"].startswith("ModelService") else PredictionServiceStub)(channel)
    expect = case["expect"]
    if "request_text" in case:
        request = text_format.Parse(case["request_text"], _request_type(method)())
    else:
        request = grpc_request(method, case["request"])
    try:
        response = getattr(stub, method)(request, timeout=30)
    except grpc.RpcError as error:
        assert error.code().name == expect.get("grpc_status"), f"{error.code()}: {error.details()}"
        assert expect.get("message_contains", "") in error.details(), error.details()
        return
    assert "grpc_status" not in expect, f"answered, expected {expect}"
    _check_grpc(expect, response)


def _request_type(method):
    from tensorflow_serving.apis import (
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        model_management_pb2,
        predict_pb2,
        regression_pb2,
    )

    return {
        "Predict": predict_pb2.PredictRequest,
        "Classify": classification_pb2.ClassificationRequest,
        "Regress": regression_pb2.RegressionRequest,
        "MultiInference": inference_pb2.MultiInferenceRequest,
        "GetModelStatus": get_model_status_pb2.GetModelStatusRequest,
        "GetModelMetadata": get_model_metadata_pb2.GetModelMetadataRequest,
        "HandleReloadConfigRequest": model_management_pb2.ReloadConfigRequest,
    }[method]


def grpc_request(method, described):
    """The protobuf request that a case describes."""
    request = _request_type(method)()
    spec = described.get("model_spec", {"name": "product"})  # one case leaves its model to the fixture
    request.model_spec.name = spec["name"]
    request.model_spec.signature_name = spec.get("signature_name", "") if method != "GetModelStatus" else ""
    inputs = described.get("inputs", {"x": {"float_val": described["x"]}} if "x" in described else {})
    for alias, tensor in inputs.items():
        values = tensor["float_val"] if isinstance(tensor, dict) else [1.0]  # "ok" stands for any good tensor
        request.inputs[alias].dtype = 1
        request.inputs[alias].tensor_shape.dim.add(size=len(values))
        request.inputs[alias].float_val.extend(values)
    for name, values in described.get("example", {}).items():
        example = request.input.example_list.examples.add()
        example.features.feature[name].float_list.value.extend(values)
    if "output_filter" in described:
        request.output_filter.extend(described["output_filter"])
    if "metadata_field" in described:
        request.metadata_field.extend(described["metadata_field"])
    return request


def _check_grpc(expect, response):
    from google.protobuf import text_format

    for key, wanted in expect.items():
        if key == "response":
            assert response == text_format.Parse(wanted, type(response)()), response
        elif key == "values":
            given = [
                entry.value if hasattr(entry, "value") else entry.classes[0].score
                for result in response.results
                for entry in (*result.regression_result.regressions, *result.classification_result.classifications)
            ]
            assert given == wanted, response
        elif key == "outputs" or key == "y":
            outputs = wanted if key == "outputs" else {"y": {"float_val": wanted}}
            assert response.outputs.keys() == outputs.keys()
            for alias, tensor in outputs.items():
                assert list(response.outputs[alias].float_val) == tensor["float_val"]
                assert response.outputs[alias].dtype == 1
        elif key == "model_spec":
            for field, value in wanted.items():
                given = getattr(response.model_spec, field)
                assert (given.value if field == "version" else given) == value, response.model_spec
        elif key == "model_spec.version":
            spec = response.model_spec
            assert spec.version.value == wanted
        elif key == "classes":
            (given,) = response.result.classifications
            assert [{"label": entry.label, "score": entry.score} for entry in given.classes] == wanted
        elif key == "regressions":
            given = [entry.value for entry in response.result.regressions]
            assert len(given) == len(wanted)
            assert all(map(math.isclose, given, wanted))
        elif key == "metadata_keys":
            assert sorted(response.metadata) == wanted
        elif key == "model_version_status":
            given = [
                {"version": entry.version, "error_code": entry.status.error_code}
                for entry in response.model_version_status
            ]
            assert given == wanted
        else:
            raise AssertionError(f"the case expects something that is not checked: {key}")


def main(argv):
    """Run every case that an address suffices for; exit status 1 where one fails."""
    import grpc

    parser = argparse.ArgumentParser(prog="python -m tests.serving_conformance", description=__doc__)
    parser.add_argument("--url", help="REST address, as http://127.0.0.1:8501")
    parser.add_argument("--grpc", help="gRPC address, as 127.0.0.1:8500")
    parser.add_argument("--build", metavar="DIR", help="write the fixture models and their models.config, and stop")
    options = parser.parse_args(argv)
    if options.build:
        from tests.serving_models import build_conformance

        print(build_conformance(Path(options.build).absolute()))
        return
    if not options.url and not options.grpc:
        raise core.InputError("nothing to test: give --url, --grpc, or both")
    runs = []
    if options.url:
        runs += [("REST", case, run_rest, options.url) for case in REST if "server_flags" not in case]
    if options.grpc:
        channel = grpc.insecure_channel(options.grpc)
        runs += [("gRPC", case, run_grpc, channel) for case in GRPC]
    failed = 0
    runs = [run for run in runs if run[1]["id"] not in NEEDS_CONTROL]
    for kind, case, run, where in runs:
        try:
            run(case, where)
        except (AssertionError, OSError, ValueError) as error:
            failed += 1
            print(f"{kind} {case['id']}: {' '.join(str(error).split())[:500]}")
    left = len(REST) + len(GRPC) - len(runs)
    print(
        f"{len(runs) - failed} of {len(runs)} cases passed; {left} were not asked (no address, or other flags needed)"
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    core.cli(main) if len(sys.argv) > 1 else core.cli(main, ["--help"])
