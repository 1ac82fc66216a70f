"""A client of the TensorFlow Serving protocol: this project's embedded server, or the stock one.

    client = Client("http://127.0.0.1:8501", model="mnist")
    client.predict(instances=images)                                  # REST, row format
    client.predict_grpc({"image": images})                            # gRPC, arrays in and out

Run as a command: `python -m serving.client http://127.0.0.1:8501 mnist image.png`.
"""

import base64
import json
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np

from course import core


class ServingError(Exception):
    """The server's refusal, or why there was no answer: `status` is the gRPC status name, or HTTP's number."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


def encode_bytes(content):
    """Bytes as JSON carries them: {"b64": ...}."""
    return {"b64": base64.b64encode(content).decode()}


class Client:
    """Calls one model of one server; keeps its connections open, so close it or use it in a `with` block."""

    def __init__(self, url, grpc_target=None, model="default", timeout=30.0):
        self.model = model
        self.timeout = timeout
        try:
            self._http = httpx.Client(base_url=url, timeout=timeout)
        except httpx.InvalidURL as error:
            raise core.InputError(f"{url!r} is no address of a server, as http://127.0.0.1:8501: {error}") from error
        self._grpc_target = grpc_target
        self._channel = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the connections."""
        self._http.close()
        if self._channel is not None:
            self._channel.close()

    # --- REST ---------------------------------------------------------------------------------------------------------

    def status(self, version=None):
        """The state of every version of the model: [{"version": "3", "state": "AVAILABLE", "status": ...}, ...]."""
        return self._ask("GET", self._path(version))["model_version_status"]

    def available(self):
        """The versions that serve now, oldest first."""
        return sorted(int(entry["version"]) for entry in self.status() if entry["state"] == "AVAILABLE")

    def version_of(self, label=None):
        """The version that a request to `label` (without one: to the model) goes to at this moment."""
        return int(self._ask("GET", self._path(None, label) + "/metadata")["model_spec"]["version"])

    def metadata(self, version=None, label=None):
        """The model's signatures: {name: {"inputs": ..., "outputs": ..., "method_name": ...}}."""
        answer = self._ask("GET", self._path(version, label) + "/metadata")
        return answer["metadata"]["signature_def"]["signature_def"]

    def input_shape(self, signature="serving_default"):
        """Sizes of the only input of a signature, -1 where any will do; `ServingError` where there are several."""
        inputs = self.metadata()[signature]["inputs"]
        if len(inputs) != 1:
            raise ServingError("INVALID_ARGUMENT", f"{signature} takes {', '.join(sorted(inputs))}: name one")
        (info,) = inputs.values()
        return [int(dim["size"]) for dim in info["tensor_shape"].get("dim", [])]

    def predict(self, instances=None, inputs=None, signature=None, version=None, label=None):
        """Predict over REST: `instances` in row format or `inputs` in column format; returns what answers them.

        Arrays and NumPy numbers may stand anywhere a list or a number may; bytes are sent as base64.
        """
        if (instances is None) == (inputs is None):
            raise core.InputError("give instances (a list of examples) or inputs (whole arrays), not both")
        body = {"instances": instances} if inputs is None else {"inputs": inputs}
        if signature:
            body["signature_name"] = signature
        answer = self._ask("POST", self._path(version, label) + ":predict", json.dumps(body, default=_plain))
        return answer["predictions" if inputs is None else "outputs"]

    def _path(self, version=None, label=None):
        path = f"/v1/models/{quote(self.model, safe='')}"
        if version is not None:
            return f"{path}/versions/{version}"
        return path if label is None else f"{path}/labels/{quote(label, safe='')}"

    def _ask(self, method, path, content=None):
        try:
            response = self._http.request(method, path, content=content)
        except httpx.TimeoutException as error:
            raise ServingError(
                "DEADLINE_EXCEEDED", f"no answer from {self._http.base_url} within {self.timeout:g} seconds"
            ) from error
        except httpx.HTTPError as error:
            raise ServingError("UNAVAILABLE", f"no server answers at {self._http.base_url}: {error}") from error
        try:
            answer = json.loads(response.text)
        except ValueError as error:
            raise ServingError(
                response.status_code, f"{self._http.base_url} did not answer in JSON: is it a model server?"
            ) from error
        if response.status_code != 200:
            raise ServingError(response.status_code, answer.get("error", response.text))
        return answer

    # --- gRPC ---------------------------------------------------------------------------------------------------------

    def predict_grpc(self, inputs, outputs=(), signature=None, version=None, label=None):
        """Predict over gRPC on arrays by input name; returns arrays by output name (those in `outputs`, or all)."""
        import grpc
        from tensorflow_serving.apis.predict_pb2 import PredictRequest

        from serving.server import tensors

        request = PredictRequest(output_filter=outputs)
        request.model_spec.name = self.model
        request.model_spec.signature_name = signature or ""
        if version is not None:
            request.model_spec.version.value = int(version)
        elif label is not None:
            request.model_spec.version_label = label
        for name, value in inputs.items():
            tensors.to_content(np.asarray(value), request.inputs[name])
        try:
            response = self._stub().Predict(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise ServingError(error.code().name, error.details()) from error
        return {name: tensors.from_proto(value) for name, value in response.outputs.items()}

    def _stub(self):
        import grpc
        from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

        if self._channel is None:
            if self._grpc_target is None:
                raise core.InputError("this client has no gRPC address: give Client a grpc_target")
            self._channel = grpc.insecure_channel(
                self._grpc_target,
                options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
            )
        return PredictionServiceStub(self._channel)


def _plain(value):
    """What `json` does not know: arrays as lists, NumPy numbers as numbers, bytes as base64."""
    if isinstance(value, bytes):
        return encode_bytes(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be sent as JSON")


def _image_for(path, info):
    """An image file as the input that `info` (a TensorInfo from the metadata) declares: its bytes, or its pixels."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise core.InputError(f"cannot read {path}: {error.strerror}") from error
    if info["dtype"] == "DT_STRING":
        return encode_bytes(content)
    import io

    from PIL import Image, UnidentifiedImageError

    sizes = [int(dim["size"]) for dim in info["tensor_shape"].get("dim", [])]
    if len(sizes) != 4 or sizes[3] not in (1, 3):
        raise core.InputError(f"the model takes {info['dtype']} {sizes}, which is no image: use Client.predict")
    try:
        image = Image.open(io.BytesIO(content)).convert("L" if sizes[3] == 1 else "RGB")
    except UnidentifiedImageError as error:
        raise core.InputError(f"{path} is no image that can be read") from error
    if sizes[1] > 0 and sizes[2] > 0:
        image = image.resize((sizes[2], sizes[1]))
    pixels = np.asarray(image).reshape(*image.size[::-1], sizes[3])
    # 0..255, as every model here takes them
    return (pixels if "INT" in info["dtype"] else pixels.astype(float)).tolist()


def main(argv):
    """Send an image to a model and print what it answers."""
    if len(argv) != 3:
        raise core.InputError(
            "usage: python -m serving.client URL MODEL IMAGE (as http://127.0.0.1:8501 mnist digit.png)"
        )
    url, model, path = argv
    with Client(url, model=model) as client:
        try:
            inputs = client.metadata()["serving_default"]["inputs"]
            if len(inputs) != 1:
                raise core.InputError(f"{model} takes {', '.join(sorted(inputs))}: this command sends one image only")
            (info,) = inputs.values()
            print(json.dumps(client.predict(instances=[_image_for(path, info)])[0], indent=1))
        except ServingError as error:
            raise core.InputError(str(error)) from error


if __name__ == "__main__":
    core.cli(main)
