"""The server's settings: the stock server's flags under their stock names, and the text files they point to."""

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from course.core.errors import InputError

MIB = 2**20


@dataclass
class Batching:
    """How requests share runs; the names are those of the stock server's batching parameters file.

    There is no `batch_timeout_micros`: a file may give it, but nothing ever waits for a fuller batch.
    """

    enabled: bool = True
    max_batch_size: int = 64
    max_enqueued_batches: int = 100
    num_batch_threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    allowed_batch_sizes: tuple[int, ...] = ()


@dataclass
class Settings:
    """Serve SavedModels and TFLite files over the TensorFlow Serving protocol, REST and gRPC."""

    port: int = 8500  # gRPC port; 0 is off, -1 any free one
    rest_api_port: int = 8501  # REST port; 0 is off, -1 any free one
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 opens the server to the network
    grpc_socket_path: str = ""  # UNIX socket for gRPC, besides the port
    model_name: str = "default"  # name of the model in model_base_path
    model_base_path: str = ""  # folder whose integer-named folders are the model's versions
    model_config_file: str = ""  # ModelServerConfig text proto: several models, policies, labels
    model_config_file_poll_wait_seconds: float = 0  # how often to read that file again; 0 is never
    file_system_poll_wait_seconds: float = 1  # how often to look for new versions; 0 is once, at the start
    allow_version_labels_for_unavailable_models: bool = False  # labels may name a version before it is loaded
    prefer_tflite_model: bool = False  # model.tflite serves even where saved_model.pb stands beside it
    enable_model_warmup: bool = True  # run assets.extra/tf_serving_warmup_requests before a version serves
    enable_signature_method_name_check: bool = False  # Classify and Regress only on signatures saved for them
    enable_batching: bool = True  # requests that arrive during a run share the next; the stock default is false
    batching_parameters_file: str = ""  # BatchingParameters text proto
    monitoring_config_file: str = ""  # MonitoringConfig text proto: whether and where metrics are shown
    rest_api_timeout_in_ms: int = 30000  # a REST call that takes longer is answered 504
    rest_api_enable_cors_support: bool = False  # answer browsers of any origin
    rest_api_max_body_bytes: int = 100 * MIB  # larger request bodies are answered 413
    grpc_max_message_bytes: int = 1024 * MIB  # both ways
    exit_with_parent: bool = False  # stop when standard input closes: whoever started this process has gone
    num_load_threads: int = 1  # versions loaded at the same time
    tensorflow_intra_op_parallelism: int = 0  # threads inside one operation; 0 lets TensorFlow choose
    tensorflow_inter_op_parallelism: int = 0  # operations at the same time; 0 lets TensorFlow choose

    def __post_init__(self):
        self.batching = Batching(enabled=self.enable_batching)
        if self.batching_parameters_file:
            self.batching = read_batching(self.batching_parameters_file, self.enable_batching)
        self.metrics_path = read_metrics_path(self.monitoring_config_file) if self.monitoring_config_file else ""
        for name in ("rest_api_timeout_in_ms", "rest_api_max_body_bytes", "grpc_max_message_bytes", "num_load_threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("port", "rest_api_port"):
            if not -1 <= getattr(self, name) < 65536:
                raise InputError(f"--{name} is {getattr(self, name)}: give a port, 0 (off) or -1 (any free one)")
        if self.port == self.rest_api_port and self.port > 0:
            raise InputError(f"--port and --rest_api_port are both {self.port}: gRPC and REST need a port each")

    def model_config(self):
        """The `ModelServerConfig` that the flags ask for."""
        if self.model_config_file:
            return read_model_config(self.model_config_file)
        if not self.model_base_path:
            raise InputError("no model to serve: give --model_base_path DIR, or --model_config_file FILE")
        return single_model(self.model_name, self.model_base_path)


def single_model(name, base_path):
    """The `ModelServerConfig` of one model that serves its latest version."""
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    config = ModelServerConfig()
    config.model_config_list.config.add(
        name=name, base_path=str(Path(base_path).absolute()), model_platform="tensorflow"
    )
    return config


def read_model_config(path):
    """Read a models.config file."""
    from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

    return _read_text_proto(path, ModelServerConfig())


def read_batching(path, enabled=True):
    """Read a batching parameters file."""
    message = _read_text_proto(path, _messages()["BatchingParameters"]())
    batching = Batching(enabled)
    for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads"):
        if message.HasField(name):
            value = getattr(message, name).value
            if value < 1:
                raise InputError(f"{path}: {name} is {value}, it must be at least 1")
            setattr(batching, name, value)
    batching.allowed_batch_sizes = sizes = tuple(message.allowed_batch_sizes)
    if sizes and (list(sizes) != sorted(set(sizes)) or sizes[-1] != batching.max_batch_size):
        raise InputError(
            f"{path}: allowed_batch_sizes must grow, and the last must be max_batch_size ({batching.max_batch_size})"
        )
    return batching


def read_metrics_path(path):
    """Read a monitoring config file: the URL path of the metrics, or "" where they are off."""
    prometheus = _read_text_proto(path, _messages()["MonitoringConfig"]()).prometheus_config
    return (prometheus.path or "/monitoring/prometheus/metrics") if prometheus.enable else ""


def _read_text_proto(path, message):
    from google.protobuf import text_format

    try:
        return text_format.Parse(Path(path).read_text(), message)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a {message.DESCRIPTOR.name} text proto: {error}") from error


@cache
def _messages():
    """The two configuration messages that tensorflow-serving-api does not ship, field numbers as in the stock ones."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

    field_type = descriptor_pb2.FieldDescriptorProto
    wrappers = {"int64": ".google.protobuf.Int64Value", "string": ".google.protobuf.StringValue"}
    scalars = {"bool": field_type.TYPE_BOOL, "string": field_type.TYPE_STRING, "int64s": field_type.TYPE_INT64}

    file = descriptor_pb2.FileDescriptorProto(
        name="serving/server/settings.proto",
        package="workbook.serving",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )

    def message(name, **fields):
        """Add a message; each field is (number, type)."""
        entry = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            added = entry.field.add(name=field_name, number=number, label=field_type.LABEL_OPTIONAL)
            if kind in scalars:
                added.type = scalars[kind]
                if kind == "int64s":
                    added.label = field_type.LABEL_REPEATED
            else:
                added.type, added.type_name = field_type.TYPE_MESSAGE, kind

    message("PrometheusConfig", enable=(1, "bool"), path=(2, "string"))
    message("MonitoringConfig", prometheus_config=(1, ".workbook.serving.PrometheusConfig"))
    message(
        "BatchingParameters",
        max_batch_size=(1, wrappers["int64"]), batch_timeout_micros=(2, wrappers["int64"]),
        max_enqueued_batches=(3, wrappers["int64"]), num_batch_threads=(4, wrappers["int64"]),
        thread_pool_name=(5, wrappers["string"]), allowed_batch_sizes=(6, "int64s"),
        pad_variable_length_inputs=(7, "bool"),
    )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in ("BatchingParameters", "MonitoringConfig")
    }
