"""The server's settings: the stock server's flags under their stock names, and the text files they point to."""

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from course.core.errors import InputError

MIB = 2**20
BATCHING_FILE = "batching_params.pbtxt"  # in a version folder


@dataclass
class Batching:
    """How requests share runs; the names are those of the stock server's batching parameters file.

    There is no `batch_timeout_micros`: a file may give it, but nothing ever waits for a fuller batch.  Nor is there
    `pad_variable_length_inputs`: requests of different lengths run beside one another.
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
    force_allow_any_version_labels_for_unavailable_models: bool = False  # labels in use may, too: a risk
    prefer_tflite_model: bool = True  # model.tflite serves where saved_model.pb stands beside it; stock default false
    saved_model_tags: str = "serve"  # tags of the graph to load from a SavedModel, with commas between them
    enable_model_warmup: bool = True  # run assets.extra/tf_serving_warmup_requests before a version serves
    num_request_iterations_for_warmup: int = 1  # how often each of them is run
    enable_signature_method_name_check: bool = False  # each call only on signatures saved for it
    enable_batching: bool = True  # requests that arrive during a run share the next; the stock default is false
    batching_parameters_file: str = ""  # BatchingParameters text proto
    enable_per_model_batching_parameters: bool = False  # only models with a batching_params.pbtxt are batched, by it
    monitoring_config_file: str = ""  # MonitoringConfig text proto: whether and where metrics are shown
    rest_api_timeout_in_ms: int = 30000  # longer REST calls are answered 504; 408, if they take as long to arrive
    rest_api_enable_cors_support: bool = False  # answer browsers of any origin
    rest_api_max_body_bytes: int = 100 * MIB  # larger request bodies are answered 413
    rest_api_max_connections: int = 1000  # further ones are answered 503
    grpc_max_message_bytes: int = 1024 * MIB  # both ways
    grpc_channel_arguments: str = ""  # gRPC server options, as grpc.max_connection_age_ms=2000,...
    ssl_config_file: str = ""  # SSLConfig text proto: gRPC over TLS
    enable_grpc_healthcheck_service: bool = False  # the standard grpc.health.v1.Health beside the two services
    enable_serialization_as_tensor_content: bool = False  # gRPC answers in one piece: faster for large tensors
    exit_with_parent: bool = False  # stop when standard input closes: whoever started this process has gone
    num_load_threads: int = 1  # versions loaded at the same time
    num_unload_threads: int = 1  # versions unloaded at the same time
    max_num_load_retries: int = 0  # further attempts to load a version that failed; the stock default is 5
    load_retry_interval_micros: int = 60_000_000  # between two attempts
    tensorflow_session_parallelism: int = 0  # both of the next two in one
    tensorflow_intra_op_parallelism: int = 0  # threads inside one operation; 0: TensorFlow chooses, TFLite takes one
    tensorflow_inter_op_parallelism: int = 0  # operations at the same time; 0 lets TensorFlow choose
    tensorflow_session_config_file: str = ""  # ConfigProto text proto, which the flags above and below override
    per_process_gpu_memory_fraction: float = 0  # of the GPU's memory, taken at the start; 0 takes what is needed

    def __post_init__(self):
        if self.batching_parameters_file and not self.enable_batching:
            raise InputError("--batching_parameters_file is given, but --enable_batching is false")
        self.batching = Batching(enabled=self.enable_batching)
        if self.batching_parameters_file:
            self.batching = read_batching(self.batching_parameters_file, self.enable_batching)
        self.metrics_path = read_metrics_path(self.monitoring_config_file) if self.monitoring_config_file else ""
        self.ssl = _read_text_proto(self.ssl_config_file, _messages()["SSLConfig"]()) if self.ssl_config_file else None
        if self.ssl and self.ssl.client_verify and not self.ssl.custom_ca:
            raise InputError(f"{self.ssl_config_file}: client_verify needs custom_ca, whose certificates clients show")
        self.grpc_options = read_grpc_options(self.grpc_channel_arguments)
        if self.tensorflow_session_config_file:
            self.session_config()  # a file that cannot be read is told now
        for name in (
            "rest_api_timeout_in_ms", "rest_api_max_body_bytes", "rest_api_max_connections", "grpc_max_message_bytes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("port", "rest_api_port"):
            if not -1 <= getattr(self, name) < 65536:
                raise InputError(f"--{name} is {getattr(self, name)}: give a port, 0 (off) or -1 (any free one)")
        if self.port == self.rest_api_port and self.port > 0:
            raise InputError(f"--port and --rest_api_port are both {self.port}: gRPC and REST need a port each")
        threads = self.tensorflow_intra_op_parallelism, self.tensorflow_inter_op_parallelism
        if self.tensorflow_session_parallelism > 0 and min(threads) > 0:
            raise InputError(
                "give either --tensorflow_session_parallelism, or --tensorflow_intra_op_parallelism and "
                "--tensorflow_inter_op_parallelism, not all three"
            )

    def model_config(self):
        """The `ModelServerConfig` that the flags ask for."""
        if self.model_config_file:
            return read_model_config(self.model_config_file)
        if not self.model_base_path:
            raise InputError("no model to serve: give --model_base_path DIR, or --model_config_file FILE")
        return single_model(self.model_name, self.model_base_path)

    def session_config(self):
        """The TensorFlow session's `ConfigProto`."""
        from tensorflow.core.protobuf.config_pb2 import ConfigProto

        config = ConfigProto()
        config.gpu_options.allow_growth = True
        if self.tensorflow_session_config_file:
            _read_text_proto(self.tensorflow_session_config_file, config)
        both = self.tensorflow_session_parallelism
        if intra := self.tensorflow_intra_op_parallelism or both:
            config.intra_op_parallelism_threads = intra
        if inter := self.tensorflow_inter_op_parallelism or both:
            config.inter_op_parallelism_threads = inter
        if self.per_process_gpu_memory_fraction > 0:
            config.gpu_options.per_process_gpu_memory_fraction = self.per_process_gpu_memory_fraction
        return config

    def batching_for(self, folder):
        """The `Batching` of the model in a version folder; the threads are always those of all models."""
        if not (self.enable_batching and self.enable_per_model_batching_parameters):
            return self.batching
        path = Path(folder) / BATCHING_FILE
        batching = read_batching(path) if path.is_file() else Batching(enabled=False)
        return dataclasses.replace(batching, num_batch_threads=self.batching.num_batch_threads)


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
    for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads", "max_execution_batch_size"):
        if message.HasField(name):
            value = getattr(message, name).value
            if value < 1:
                raise InputError(f"{path}: {name} is {value}, it must be at least 1")
            if hasattr(batching, name):
                setattr(batching, name, value)
    if message.enable_large_batch_splitting.value and message.HasField("max_execution_batch_size"):
        batching.max_batch_size = message.max_execution_batch_size.value  # the largest run, not the largest request
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


def read_grpc_options(text):
    """Read gRPC server options, `name=value` with commas between them; whole numbers are passed on as such."""
    options = []
    for word in filter(None, text.split(",")):
        name, given, value = word.partition("=")
        if not name or not given:
            raise InputError(f"--grpc_channel_arguments has {word!r}: give name=value, with commas between them")
        options.append((name, int(value) if value.lstrip("-").isdecimal() else value))
    return options


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
    """The configuration messages that tensorflow-serving-api does not ship; a text proto knows fields by name alone."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2

    field_type = descriptor_pb2.FieldDescriptorProto
    wrappers = {kind: f".google.protobuf.{kind.title()}Value" for kind in ("bool", "int64", "string")}
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
        pad_variable_length_inputs=(7, "bool"), enable_large_batch_splitting=(8, wrappers["bool"]),
        max_execution_batch_size=(9, wrappers["int64"]),
    )  # fmt: skip
    message(
        "SSLConfig",
        server_key=(1, "string"), server_cert=(2, "string"), custom_ca=(3, "string"), client_verify=(4, "bool"),
    )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}"))
        for name in ("BatchingParameters", "MonitoringConfig", "SSLConfig")
    }
