"""What a model takes and gives: the signature, seen from the protocol's side."""

from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np

from serving.server.status import StatusError, invalid

DEFAULT = "serving_default"
MAX_RANK = 32  # TensorFlow bears 254, but its way from NumPy overruns its memory, and ends the process, beyond 32
PREDICT, CLASSIFY, REGRESS = (f"tensorflow/serving/{method}" for method in ("predict", "classify", "regress"))

# TensorFlow's DataType number -> (name in the protocol's messages, NumPy type); strings are object arrays of bytes
DTYPES = {
    1: ("float", np.float32), 2: ("double", np.float64), 3: ("int32", np.int32), 4: ("uint8", np.uint8),
    5: ("int16", np.int16), 6: ("int8", np.int8), 7: ("string", np.object_), 8: ("complex64", np.complex64),
    9: ("int64", np.int64), 10: ("bool", np.bool_), 14: ("bfloat16", ml_dtypes.bfloat16), 17: ("uint16", np.uint16),
    18: ("complex128", np.complex128), 19: ("half", np.float16), 22: ("uint32", np.uint32), 23: ("uint64", np.uint64),
}  # fmt: skip
NAMES = {np.dtype(numpy_type): name for name, numpy_type in DTYPES.values()}
NUMBERS = {np.dtype(numpy_type): number for number, (_, numpy_type) in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` is None for an unknown rank and holds None for an unknown size."""

    dtype: np.dtype
    shape: tuple[int | None, ...] | None
    name: str  # of the tensor in the graph

    @classmethod
    def from_proto(cls, info):
        """Read a `TensorInfo`; types the protocol cannot carry (resources, variants) read as None."""
        _, numpy_type = DTYPES.get(info.dtype, (None, None))
        shape = None
        if not info.tensor_shape.unknown_rank:
            shape = tuple(None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim)
        return cls(None if numpy_type is None else np.dtype(numpy_type), shape, info.name)

    def admits(self, shape):
        """Whether an array of `shape` is what the signature declares."""
        if self.shape is None:
            return True
        return len(shape) == len(self.shape) and all(
            want is None or want == size for want, size in zip(self.shape, shape, strict=True)
        )

    def __str__(self):
        sizes = "any shape" if self.shape is None else str([-1 if size is None else size for size in self.shape])
        return f"{NAMES.get(self.dtype, self.dtype)} {sizes}"


@dataclass(frozen=True, eq=False)
class Signature:
    """A named entry point of a model; `proto` is its `SignatureDef`, as the metadata calls answer it."""

    name: str
    method: str
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    proto: object
    defaults: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, name, proto, defaults=None):
        """Read a `SignatureDef`."""
        inputs = {alias: TensorSpec.from_proto(info) for alias, info in sorted(proto.inputs.items())}
        outputs = {alias: TensorSpec.from_proto(info) for alias, info in sorted(proto.outputs.items())}
        return cls(name, proto.method_name, inputs, outputs, proto, defaults or {})

    @cached_property
    def row_wise(self):
        """Whether every input and output has an unknown leading size, so that requests may share one run."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        return bool(specs) and all(spec.shape and spec.shape[0] is None for spec in specs)

    def __str__(self):
        def listed(specs):
            return ", ".join(f"{alias}: {spec}" for alias, spec in specs.items())

        return f"{self.name}({listed(self.inputs)}) -> ({listed(self.outputs)})"

    def complete(self, inputs):
        """Return `inputs` with the signature's defaults filled in, checked for names and types.

        Shapes are left to the model: see `backends.SavedModel.run`.
        """
        if inputs.keys() != self.inputs.keys():
            inputs = self._matched(inputs)
        for alias, value in inputs.items():
            want = self.inputs[alias].dtype
            if value.ndim > MAX_RANK:
                raise invalid(f"input {alias} has {value.ndim} dimensions; no more than {MAX_RANK} are served")
            if value.dtype != want:
                given, position = NAMES.get(value.dtype, value.dtype), list(self.inputs).index(alias)
                raise invalid(
                    f"input {alias}: Expects arg[{position}] to be {NAMES.get(want, want)} but {given} is provided. "
                    f"Expected signature: {self}"
                )
        return inputs

    def _matched(self, inputs):
        extra, missing = inputs.keys() - self.inputs.keys(), self.inputs.keys() - inputs.keys()
        if len(inputs) > len(self.inputs) or (len(inputs) < len(self.inputs) and not self.defaults):
            given, wanted, extra, missing = (
                "{" + ",".join(sorted(names)) + "}" for names in (inputs, self.inputs, extra, missing)
            )
            raise invalid(
                f"input size does not match signature: {len(inputs)}!={len(self.inputs)} len({given}) != "
                f"len({wanted}). Sent extra: {extra}. Missing but required: {missing}."
            )
        wanted = ",".join(self.inputs)
        for alias in sorted(extra):
            raise invalid(
                f"input tensor alias not found in signature: {alias}. Inputs expected to be in the set {{{wanted}}}."
            )
        for alias in sorted(missing - self.defaults.keys()):
            raise invalid(f"input {alias} is missing and has no default. Inputs expected: {{{wanted}}}.")
        return {**{alias: self.defaults[alias] for alias in missing}, **inputs}

    def select(self, wanted):
        """Return the output aliases that a request's `output_filter` names, or all of them."""
        chosen = tuple(wanted)
        for position, alias in enumerate(chosen):
            if alias not in self.outputs:
                raise invalid(
                    f"output tensor alias not found in signature: {alias} "
                    f"Outputs expected to be in the set {{{','.join(self.outputs)}}}."
                )
            if alias in chosen[:position]:
                raise invalid(f"duplicate output tensor alias: {alias}")
        return chosen or tuple(self.outputs)


def signature_named(signatures, name, check_method=False):
    """The signature that a Predict call asks for (the default one where `name` is empty)."""
    signature = signatures.get(name or DEFAULT)
    if signature is None:
        raise StatusError("FAILED_PRECONDITION", f'Serving signature key "{name or DEFAULT}" not found.')
    methods = (PREDICT, CLASSIFY, REGRESS)
    if check_method and signature.method not in methods:
        raise StatusError(
            "INTERNAL",
            f"Expected prediction signature method_name to be one of {{{', '.join(methods)}}}. Was: {signature.method}",
        )
    return signature
