"""Knowledge distillation: a small network learns from a large one's probabilities, not from the labels alone.

Sources: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2; the optional hint:
Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", eq. 3.
"""

import dataclasses

import keras
from keras import layers, ops

from compression.training import Training, cross_entropy, fit
from course.core import runtime
from course.core.errors import InputError

WIDTHS = {"Conv2D": "filters", "SeparableConv2D": "filters", "Conv1D": "filters", "Dense": "units"}
MULTIPLE = 8  # of the channels that a student's layers have


@dataclasses.dataclass
class Distillation:
    """How the student is made and what it is asked to match."""

    width: float = 0.5  # the student's channels and units over the teacher's, in its widest layer
    taper: float = 1.0  # narrower layers keep less: `width` times (own / widest) ** taper of theirs; 0: all the same
    temperature: float = 4.0  # of both softmaxes in the soft loss; 1: plain probabilities
    hard: float = 0.1  # weight of the labels' cross-entropy; the rest is the teacher's
    hint: str = ""  # layer of teacher and student whose outputs are to match as well; "": none
    hint_weight: float = 1.0  # weight of that term
    seed: int = 0  # of the student's initial weights
    training: Training = dataclasses.field(
        default_factory=lambda: Training(epochs=30, lr=0.1)
    )  # from scratch: many epochs, a large rate


def distill(teacher, data, settings=None, student=None, *, checkpoint=None):
    """A student of `teacher` (inputs -> logits [B, classes]), trained on `data`; the teacher is not changed.

    student: a model of the same input and output shapes, trained in place; default: `narrowed(teacher)`.  checkpoint:
    a folder from which the same call goes on.  The teacher answers for the very pictures that the student sees,
    augmentation included.
    """
    settings = settings or Distillation()
    if not 0 <= settings.hard <= 1 or not settings.temperature > 0:
        raise InputError(
            f"hard is {settings.hard} and temperature {settings.temperature}: give a share, and a number above 0"
        )
    if student is None:
        runtime.seed(settings.seed)
        student = narrowed(teacher, settings.width, settings.taper)
    if (student.input_shape, student.output_shape) != (teacher.input_shape, teacher.output_shape):
        raise InputError(
            f"the student maps {student.input_shape} to {student.output_shape}, the teacher {teacher.input_shape} to "
            f"{teacher.output_shape}: they must agree"
        )
    classes = teacher.output_shape[-1]
    pair = together(student, teacher, settings.hint)
    fit(
        pair, data, settings.training, loss=distillation_loss(settings, classes), checkpoint=checkpoint,
        metrics=[student_accuracy(classes)], label="student",
    )  # fmt: skip
    return student


def narrowed(model, width, taper=0.0):
    """A fresh network of `model`'s layers with fewer channels and units in all but the output layer.

    Of C channels a layer keeps width * C * (C / C_max) ** taper, to the nearest multiple of 8 (kernels compute so many
    at a time), at least one of it, and never more than C.  With a taper, most goes where a network is narrow: there the
    maps are large, and a channel costs the most time and the fewest weights.  Layers of equal width stay equal, so that
    a shortcut still fits.  Raises `InputError` where a layer's shape is fixed and the narrower network cannot be put
    together.
    """
    last = {tensor._keras_history.operation.name for tensor in keras.tree.flatten(model.outputs)}
    last.add(_last_with_weights(model))
    own = {layer.name: getattr(layer, WIDTHS[type(layer).__name__]) for layer in model.layers
           if type(layer).__name__ in WIDTHS and layer.name not in last}  # fmt: skip
    widest = max(own.values(), default=1)

    def scaled(layer):
        config = layer.get_config()
        if count := own.get(layer.name):
            wanted = width * count * (count / widest) ** taper
            config[WIDTHS[type(layer).__name__]] = min(count, MULTIPLE * max(1, int(wanted / MULTIPLE + 0.5)))
        return type(layer).from_config(config)

    try:
        student = keras.models.clone_model(model, clone_function=scaled)
    except ValueError as error:
        raise InputError(
            f"{model.name} cannot be made narrower layer by layer ({str(error).splitlines()[0]}): give a student"
        ) from error
    for layer, original in zip(student.layers, model.layers, strict=True):
        if isinstance(layer, layers.Normalization):  # the data's moments, not something to learn
            layer.set_weights(original.get_weights())
    return student


def _last_with_weights(model):
    """Name of the layer whose width is the number of classes, though something without weights may follow it."""
    return next(layer.name for layer in reversed(model.layers) if type(layer).__name__ in WIDTHS)


def together(student, teacher, hint=""):
    """The model that is trained: inputs -> [student's logits, teacher's logits, hint error] as float32
    [B, 2 * classes + 1].

    The teacher is a frozen copy in inference mode.  hint: name of a layer of both; the student's output h is mapped by
    a linear layer r (of the training alone) to the teacher's number of channels, and the column holds
    mean |r(h) - h_teacher|^2 / 2 (Romero et al., eq. 3, by the mean where they take the sum); without one it is 0.
    """
    image = keras.Input(teacher.input_shape[1:], name="inputs")
    frozen = keras.models.clone_model(teacher)
    frozen.set_weights(teacher.get_weights())
    seen = [_with_hint(frozen, "teacher", hint), _with_hint(student, "student", hint)]
    seen[0].trainable = False
    (wanted, *target), (given, *own) = (keras.tree.flatten(net(image, **mode)) for net, mode in
                                        zip(seen, ({"training": False}, {}), strict=True))  # fmt: skip
    if hint and own[0].shape[1:-1] != target[0].shape[1:-1]:
        raise InputError(f"hint {hint}: the student's map {own[0].shape} and the teacher's {target[0].shape} differ")
    if hint:
        own[0] = layers.Dense(target[0].shape[-1], name="hint_map")(own[0])  # on the last axis: a 1x1 convolution
    columns = _Columns(dtype="float32", name="columns")([given, wanted, *own, *target])
    return keras.Model(image, columns, name="distillation")


def _with_hint(model, name, hint):
    if not hint:
        return keras.Model(model.inputs[0], model.outputs, name=name)
    if hint not in {layer.name for layer in model.layers}:
        raise InputError(f"the {name} has no layer {hint!r}: choose from {', '.join(la.name for la in model.layers)}")
    return keras.Model(model.inputs[0], [*model.outputs, model.get_layer(hint).output], name=name)


class _Columns(layers.Layer):
    """[student's logits, teacher's logits(, mapped map, teacher's map)] -> one matrix, as a loss takes it."""

    def call(self, tensors):
        given, wanted, *maps = tensors
        error = ops.zeros_like(given[:, :1])
        if maps:
            difference = ops.reshape(maps[0] - maps[1], (ops.shape(given)[0], -1))
            error = ops.mean(ops.square(difference), axis=1, keepdims=True) / 2
        return ops.concatenate([given, wanted, error], axis=1)


def soft_loss(wanted, given, temperature):
    """Logits of teacher and student [B, classes] -> [B]: T^2 KL(softmax(v / T) || softmax(z / T)) in nats.

    Hinton et al. write the cross-entropy, which differs by the teacher's entropy and has the same gradient.  The
    gradient of the softened term falls as 1 / T^2; the factor keeps its weight against the labels' (their section 2).
    """
    target, answer = (ops.log_softmax(logits / temperature, axis=-1) for logits in (wanted, given))
    return temperature**2 * ops.sum(ops.exp(target) * (target - answer), axis=-1)


def distillation_loss(settings, classes):
    """The Keras loss of `together`'s output: hard * CE(labels) + (1 - hard) * soft + hint_weight * hint."""
    labelled = cross_entropy(settings.training.label_smoothing)

    def loss(labels, columns):
        given, wanted, hint = columns[:, :classes], columns[:, classes : 2 * classes], columns[:, -1]
        mixed = settings.hard * labelled(labels, given)
        mixed += (1 - settings.hard) * soft_loss(wanted, given, settings.temperature)
        return mixed + settings.hint_weight * hint

    return loss


def student_accuracy(classes):
    """The Keras metric of the student's columns."""

    def accuracy(labels, columns):
        return keras.metrics.sparse_categorical_accuracy(labels, columns[:, :classes])

    return accuracy
