"""Loaded models.  A model is anything with `signatures`, `run(signature, inputs, outputs)` and `close()`, and with
`steady`: the names of the signatures whose inputs' sizes tell how long a run takes, since no loop, branch or wait hangs
on values.

Two kinds exist: a SavedModel, run in a TensorFlow session as the stock server runs it, and a TFLite file.
"""

import contextlib
import queue
import re
import threading
from pathlib import Path

import numpy as np

from serving.server.signatures import DEFAULT, NUMBERS, PREDICT, Signature
from serving.server.status import StatusError, invalid

_UNSTEADY = re.compile(r"\w*(While|Dataset|Iterator|Queue|PyFunc)\w*|(Stateless)?(If|Case)|(Ref)?Enter|ReadFile")
_UNSTEADY_LITE = {"WHILE", "IF", "CALL_ONCE", "CUSTOM"}

SAVED_MODEL, LITE_MODEL = "saved_model.pb", "model.tflite"


def is_complete(folder):
    """Whether a version folder holds a model; the model file is written last, so without it nothing is there yet."""
    return any((Path(folder) / name).is_file() for name in (SAVED_MODEL, LITE_MODEL))


def load(folder, settings):
    """Load the model in a version folder; `StatusError` where it cannot be."""
    folder = Path(folder)
    lite = (folder / LITE_MODEL).is_file()
    if lite and (settings.prefer_tflite_model or not (folder / SAVED_MODEL).is_file()):
        threads = settings.tensorflow_intra_op_parallelism or 1
        return LiteModel(folder / LITE_MODEL, settings.batching.num_batch_threads, threads)
    return SavedModel(folder, settings.session_config(), settings.saved_model_tags.split(","))


class SavedModel:
    """A SavedModel of either TensorFlow generation; `tags` name its graph, `config` is the session's `ConfigProto`.

    It runs in a session on the graph, as in the stock server, rather than through `tf.saved_model.load`: a session
    feeds and fetches the tensors that the signature names, computes only the outputs asked for, frees its memory when
    it is closed, and takes half as long for a single image as calling the restored function.
    """

    def __init__(self, folder, config=None, tags=("serve",)):
        import tensorflow as tf

        self._tf = tf
        tf.get_logger().setLevel("ERROR")  # it recommends `tf.saved_model.load`, for every model anew
        with _load_errors(), tf.Graph().as_default() as self._graph:
            self._session = tf.compat.v1.Session(graph=self._graph, config=config)
            try:
                meta_graph = tf.compat.v1.saved_model.load(self._session, list(tags), str(folder))
            except BaseException:
                self._session.close()
                raise
        self.signatures = {
            name: Signature.from_proto(
                name, proto, {alias: tf.make_ndarray(value) for alias, value in proto.defaults.items()}
            )
            for name, proto in meta_graph.signature_def.items()
        }
        self.steady = {
            name
            for name, signature in self.signatures.items()
            if not any(map(_UNSTEADY.fullmatch, _operations(meta_graph.graph_def, signature)))
        }
        self._calls = {}  # (signature name, output aliases) -> compiled call
        self._inlined = {}  # signature name -> its graph with the functions inlined, for shape inference
        self._shapes = {}  # (signature name, input shapes) -> why the graph refuses them, or None
        self._lock = threading.Lock()

    def run(self, signature, inputs, outputs):
        """Run a `Signature` on arrays by alias; returns arrays for the aliases in `outputs`.

        An input need not have the shape that the signature declares, only one that the graph can take: the protocol
        lets [3] stand for [-1, 1] where the graph does not mind.  Whether it minds is asked of TensorFlow's shape
        inference first, because some kernels abort the whole process on a rank they do not expect.
        """
        if not all(
            spec.shape is not None and spec.admits(inputs[alias].shape) for alias, spec in signature.inputs.items()
        ):
            self._check_shapes(signature, inputs)
        call = self._calls.get((signature.name, outputs)) or self._compile(signature, outputs)
        try:
            values = call(*(inputs[alias] for alias in signature.inputs))
        except self._tf.errors.OpError as error:
            raise _from_op_error(error, f". Expected signature: {signature}") from error
        except UnicodeDecodeError as error:  # the error's message, which quotes the bytes of an input at fault
            raise invalid(f"{error.object.decode('utf-8', 'replace')}. Expected signature: {signature}") from error
        return dict(zip(outputs, map(_as_array, values), strict=True))

    def _compile(self, signature, outputs):
        """Prepare one feed-and-fetch; the session's own `run` would look every name up again in each call."""
        from tensorflow.core.protobuf.config_pb2 import CallableOptions

        options = CallableOptions(
            feed=[spec.name for spec in signature.inputs.values()],
            fetch=[signature.outputs[alias].name for alias in outputs],
        )
        options.run_options.inter_op_thread_pool = -1  # the caller is a worker thread already: stay on it
        with self._lock:
            # `make_callable` is this with 110 us of Python around it, a third of a small model's time
            call = self._session._make_callable_from_options(options)
            return self._calls.setdefault((signature.name, outputs), call)

    def _check_shapes(self, signature, inputs):
        """Refuse shapes that the graph's shape inference refuses; the leading size is left open."""
        shapes = tuple((None, *value.shape[1:]) if value.ndim else () for value in inputs.values())
        key = signature.name, tuple(inputs), shapes
        with self._lock:
            if key not in self._shapes:
                if len(self._shapes) > 1000:
                    self._shapes.clear()
                self._shapes[key] = self._infer(signature, dict(zip(inputs, shapes, strict=True)))
            refusal = self._shapes[key]
        if refusal:
            given = ", ".join(f"{alias}: {list(value.shape)}" for alias, value in inputs.items())
            raise invalid(
                f"The model cannot take inputs of these shapes ({given}): {refusal}. Expected signature: {signature}"
            )

    def _infer(self, signature, shapes):
        tf = self._tf
        graph_def = self._inlined.get(signature.name)
        if graph_def is None:
            graph_def = self._inlined[signature.name] = self._inline(signature)
        try:
            with tf.Graph().as_default():
                feeds = {
                    signature.inputs[alias].name: tf.compat.v1.placeholder(signature.inputs[alias].dtype, shape)
                    for alias, shape in shapes.items()
                }
                tf.import_graph_def(graph_def, feeds, name="")
        except ValueError as error:
            return str(error).split("{{")[0].strip().removesuffix("for '").strip()
        return None

    def _inline(self, signature):
        """The part of the graph behind `signature`, function calls inlined, without the shapes it was saved with."""
        from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef
        from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
        from tensorflow.python.grappler import tf_optimizer  # no public name: Grappler on a graph that is not run

        tf = self._tf
        meta_graph = MetaGraphDef(graph_def=self._graph.as_graph_def())
        fetches = meta_graph.collection_def["train_op"].node_list  # how Grappler is told what to keep
        fetches.value.extend(spec.name for spec in signature.outputs.values())
        options = tf.compat.v1.ConfigProto()
        rewrites = options.graph_options.rewrite_options
        rewrites.optimizers.append("function")
        rewrites.meta_optimizer_iterations = RewriterConfig.ONE
        rewrites.min_graph_nodes = -1
        graph_def = tf.compat.v1.graph_util.extract_sub_graph(
            tf_optimizer.OptimizeGraph(options, meta_graph),
            [spec.name.split(":")[0] for spec in signature.outputs.values()],
        )
        for node in graph_def.node:
            node.attr.pop("_output_shapes", None)
        return graph_def

    def close(self):
        """Free the model's memory."""
        self._session.close()
        self._calls.clear()


class LiteModel:
    """A TFLite file.  An interpreter serves one call at a time, so there is one for each worker thread.

    `threads`: XNNPACK's, in each interpreter.  One is best under load, when all cores have calls of their own.
    """

    def __init__(self, path, interpreters=2, threads=1):
        from ai_edge_litert.interpreter import Interpreter
        from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

        content = Path(path).read_bytes()
        self._free = queue.LifoQueue()  # the interpreter used last has its memory in the cache
        with _load_errors():
            for _ in range(interpreters):
                interpreter = Interpreter(model_content=content, num_threads=threads)
                interpreter.allocate_tensors()
                names = interpreter.get_signature_list() or {None: None}
                self._free.put({name or DEFAULT: interpreter.get_signature_runner(name) for name in names})
        # the operators have no public name; a signature's own ones are not listed where there are several
        operators = {operator["op_name"] for operator in interpreter._get_ops_details()}
        self.steady = (
            {name or DEFAULT for name in names} if len(names) == 1 and not operators & _UNSTEADY_LITE else set()
        )
        self.signatures = {}
        with self._borrow() as runners:
            for name, runner in runners.items():
                proto = SignatureDef(method_name=PREDICT)
                for fields, details in (
                    (proto.inputs, runner.get_input_details()),
                    (proto.outputs, runner.get_output_details()),
                ):
                    for alias, detail in details.items():
                        fields[alias].name = detail["name"]
                        fields[alias].dtype = NUMBERS[_lite_dtype(detail)]
                        for size in detail.get("shape_signature", detail["shape"]):
                            fields[alias].tensor_shape.dim.add(size=int(size))
                self.signatures[name] = Signature.from_proto(name, proto)

    @contextlib.contextmanager
    def _borrow(self):
        runners = self._free.get()
        try:
            yield runners
        finally:
            self._free.put(runners)

    def run(self, signature, inputs, outputs):
        """Run a `Signature` on arrays by alias; the shapes must be the declared ones, unknown sizes are resized."""
        for alias, spec in signature.inputs.items():
            if not spec.admits(inputs[alias].shape):
                raise invalid(f"input {alias} has shape {list(inputs[alias].shape)}. Expected signature: {signature}")
        with self._borrow() as runners:
            try:
                values = runners[signature.name](**inputs)
            except (ValueError, RuntimeError) as error:
                raise invalid(f"{error}. Expected signature: {signature}") from error
        return {alias: values[alias] for alias in outputs}

    def close(self):
        """Let go of the interpreters; their memory goes with them."""
        self._free = queue.LifoQueue()


def _operations(graph, signature):
    """The kinds of operation in a `GraphDef` that a signature's outputs hang on, those of called functions included."""
    nodes = {node.name: node for node in graph.node}
    functions = {function.signature.name: function.node_def for function in graph.library.function}
    kinds, seen = set(), set()
    waiting = [spec.name.split(":")[0] for spec in signature.outputs.values()]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        body = [nodes[name]] if name in nodes else functions[name]
        for node in body:
            kinds.add(node.op)
            called = (function.name for attr in node.attr.values() for function in (attr.func, *attr.list.func))
            waiting += [function for function in called if function in functions]
        if name in nodes:  # a function runs whole
            waiting += [source.split(":")[0].lstrip("^") for source in nodes[name].input]
    return kinds


def _as_array(value):
    """A fetched value as an array; a session gives a scalar string as plain bytes, which NumPy would make its own."""
    return np.asarray(value, np.object_) if isinstance(value, bytes) else np.asarray(value)


def _lite_dtype(detail):
    dtype = np.dtype(detail["dtype"])
    return np.dtype(np.object_) if dtype.kind in "SU" else dtype


def _from_op_error(error, suffix=""):
    from grpc import StatusCode

    codes = {code.value[0]: code.name for code in StatusCode}
    message = (error.message or str(error)).split("\n")[0].rstrip(".")
    return StatusError(codes.get(error.error_code, "UNKNOWN"), message + suffix)


@contextlib.contextmanager
def _load_errors():
    """Turn whatever loading a broken model raises into a status."""
    try:
        yield
    except StatusError:
        raise
    except Exception as error:  # TensorFlow's loaders raise a dozen types over a damaged file
        if hasattr(error, "error_code"):
            raise _from_op_error(error) from error
        code = "NOT_FOUND" if isinstance(error, FileNotFoundError) else "INVALID_ARGUMENT"
        raise StatusError(code, str(error).split("\n")[0] or type(error).__name__) from error
