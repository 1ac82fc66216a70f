"""Clustering: a layer's weights share few values, which are trained on, and the numbers of those values are coded.

Sources: Han et al. 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
Huffman Coding" (k-means of each layer's weights and its starts, section 3.1-3.2; gradients, section 3.3; Huffman code,
section 4; gaps between what is not zero, section 2); Arthur and Vassilvitskii 2007, "k-means++"; Huffman 1952.

A clustered model is an ordinary one, in float32, whose kernels have few different values: its file is small once it is
compressed, its arithmetic is as before.
"""

import dataclasses
import heapq

import keras
import numpy as np

from compression.layers import Computed, assign, described
from compression.prune import copy_of
from compression.training import Training, fit
from course.core import InputError

STARTS = ("linear", "density", "k-means++")


@dataclasses.dataclass
class Clustering:
    """Weights that share values, while training on."""

    clusters: int = 16  # different values of a layer's kernel; 16 need 4 bits
    start: str = "linear"  # of k-means. linear: evenly over the range; density: equally many each; k-means++
    keep_zeros: bool = True  # weights that are zero stay so, and zero is one of the values: of a pruned model
    keep: tuple[str, ...] = ()  # names of layers left as they are
    training: Training = dataclasses.field(default_factory=Training)


# --- k-means on a line -----------------------------------------------------------------------------------------------


def first_centroids(values, count, start="linear", seed=0):
    """`count` centroids, ascending, for `values` [N] to begin k-means with (Han et al. 2016, section 3.2).

    linear: evenly from the smallest to the largest, so that the few large weights, which matter most, are stood for.
    density: quantiles, equally many weights for each.  k-means++: drawn from the values, the further from those drawn
    already the likelier (its square).
    """
    values = np.asarray(values, np.float64).ravel()
    if start == "linear":
        return np.linspace(values.min(), values.max(), count)
    if start == "density":
        return np.quantile(values, (np.arange(count) + 0.5) / count)
    if start != "k-means++":
        raise InputError(f"start {start!r} is not known: choose one of {', '.join(STARTS)}")
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(values)]
    squared = np.square(values - drawn[0])
    while len(drawn) < count and squared.sum() > 0:
        drawn.append(rng.choice(values, p=squared / squared.sum()))
        squared = np.minimum(squared, np.square(values - drawn[-1]))
    return np.sort(drawn)


def k_means(values, centroids, rounds=300):
    """Lloyd's iterations on a line: values [N], first centroids [K] -> centroids [K] ascending, members int32 [N].

    Where there are K different values, each centroid has members: one that has none moves to the value that is
    furthest from its own.
    """
    values = np.asarray(values, np.float64).ravel()
    centroids = np.sort(np.asarray(centroids, np.float64))
    if len(np.unique(values)) <= len(centroids):
        centroids, members = np.unique(values, return_inverse=True)
        return centroids, members.astype(np.int32)
    members = None
    for _ in range(rounds):
        before, members = members, np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values).astype(np.int32)
        counts = np.bincount(members, minlength=len(centroids))
        sums = np.bincount(members, values, minlength=len(centroids))
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
        distance = np.abs(values - moved[members])
        for empty in np.flatnonzero(counts == 0):
            furthest = distance.argmax()
            moved[empty] = values[furthest]
            distance[values == values[furthest]] = 0
        if before is not None and (counts > 0).all() and (before == members).all():
            break
        centroids = np.sort(moved)
    return centroids, np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values).astype(np.int32)


# --- training --------------------------------------------------------------------------------------------------------


def cluster(model, data, settings=None, checkpoint=None):
    """A copy of `model` in which each kernel has at most `settings.clusters` different values, trained on so.

    The members of a cluster are fixed at the start; its value is trained.  Departs: where Han et al. (section 3.3) move
    it by the sum of its members' gradients, gradient descent moves it here by their mean, because `layers.Computed`
    trains it times the root of their number; at a rate that suits free weights, the sum would take a step as many times
    too long.  Depthwise kernels, few and each of much weight, stay free, as do biases and normalisation.

    data: `compression.data.Data`; checkpoint: a folder from which the same call goes on.  Raises `InputError` where
    there is nothing to cluster.
    """
    settings = settings or Clustering()
    trained = prepare(model, settings)
    if settings.training.epochs:
        fit(trained, data, settings.training, checkpoint=checkpoint, label="clustering")
    result = copy_of(model)
    for layer, twin in zip(_layers(result), _layers(trained), strict=True):
        if isinstance(twin, Computed):
            kernel, bias = (np.asarray(value) for value in twin.folded())
            layer.set_weights([kernel, bias] if layer.use_bias else [kernel])
        else:
            layer.set_weights(twin.get_weights())
    return result


def prepare(model, settings):
    """The network that `cluster` trains, not trained yet: clustered layers are `layers.Computed`."""
    if settings.clusters < 2:
        raise InputError(f"clusters is {settings.clusters}: give 2 or more")
    inner = list(_layers(model))
    if missing := set(settings.keep) - {layer.name for layer in inner}:
        raise InputError(f"the model has no layer {', '.join(sorted(missing))} to keep")
    found = {layer.name: _clusters(layer, settings) for layer in inner if _is_clustered(layer, settings)}
    if not found:
        raise InputError(f"{model.name} has no kernels to cluster: no convolution or Dense layer beside those kept")

    def copy(layer):
        if layer.name not in found:
            return type(layer).from_config(layer.get_config())
        centroids, _, mask = found[layer.name]
        return Computed(described(layer), len(centroids), mask is not None, name=layer.name, dtype=layer.dtype_policy,
                        activation=keras.activations.serialize(layer.activation))  # fmt: skip

    clone = keras.models.clone_model(model, clone_function=copy)
    for layer, twin in zip(inner, _layers(clone), strict=True):
        if isinstance(twin, Computed):
            centroids, members, mask = found[layer.name]
            twin.share(centroids, members, mask)
            if layer.use_bias:
                assign(twin, bias=layer.bias)
        else:
            twin.set_weights(layer.get_weights())
    return clone


def _layers(model):
    return [layer for layer in model._flatten_layers(include_self=False) if not isinstance(layer, keras.Model)]


def _is_clustered(layer, settings):
    of = described(layer)
    return of is not None and of["kind"] != "DepthwiseConv2D" and layer.name not in settings.keep


def _clusters(layer, settings):
    """Centroids [K], members and mask of the shape of the kernel (None: no weight is held at zero)."""
    kernel = np.asarray(layer.kernel)
    held = kernel == 0 if settings.keep_zeros else np.zeros(kernel.shape, bool)
    free, members = kernel[~held], np.zeros(kernel.shape, np.int32)
    if not len(free):
        raise InputError(f"layer {layer.name} has no weight that is not zero: leave it out with keep")
    count = max(1, settings.clusters - bool(held.any()))
    start = first_centroids(free, count, settings.start, settings.training.seed)
    centroids, members[~held] = k_means(free, start)
    return centroids.astype(np.float32), members, ~held if held.any() else None


# --- Huffman's code --------------------------------------------------------------------------------------------------


def entropy(counts):
    """Bits a symbol that no code can go below on average: -sum p log2 p."""
    share = np.asarray(counts, float)[np.asarray(counts) > 0] / np.sum(counts)
    return float(-(share * np.log2(share)).sum()) + 0.0


def code_lengths(counts):
    """Bits of each symbol's code word, from how often each occurs: [K] -> int [K]; 0 for what never does.

    The two rarest are joined until one is left; each joining makes the words of all below it a bit longer.  A lone
    symbol needs none.
    """
    lengths = np.zeros(len(counts), int)
    heap = [(int(count), symbol, [symbol]) for symbol, count in enumerate(counts) if count > 0]
    heapq.heapify(heap)
    while len(heap) > 1:
        (first, _, some), (second, tie, others) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[some + others] += 1
        heapq.heappush(heap, (first + second, tie, some + others))
    return lengths


def _words(lengths):
    """The canonical code: symbols by length, then by number, get consecutive words.  The lengths say it all."""
    words, word, length = np.zeros(len(lengths), np.int64), 0, 0
    for symbol in sorted(np.flatnonzero(lengths), key=lambda symbol: (lengths[symbol], symbol)):
        word <<= int(lengths[symbol]) - length
        length = int(lengths[symbol])
        words[symbol] = word
        word += 1
    return words


def encode(symbols, lengths):
    """Symbols int [N] -> bytes, by the code of those lengths [K]."""
    lengths = np.asarray(lengths)
    own, words = lengths[symbols], _words(lengths)[symbols]
    ends = own.cumsum()
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(own.max(initial=0))):  # of a bit, from the end of its word
        reached = own > place
        bits[ends[reached] - 1 - place] = words[reached] >> place & 1
    return np.packbits(bits).tobytes()


def decode(content, lengths, count):
    """The inverse of `encode`: bytes -> `count` symbols, int [count]."""
    lengths = np.asarray(lengths)
    meaning = {(int(lengths[s]), int(word)): s for s, word in enumerate(_words(lengths)) if lengths[s]}
    if not meaning:
        return np.zeros(count, int)
    symbols, word, length = [], 0, 0
    for bit in np.unpackbits(np.frombuffer(content, np.uint8)):
        word, length = word << 1 | int(bit), length + 1
        if (length, word) in meaning and len(symbols) < count:
            symbols.append(meaning[length, word])
            word = length = 0
    return np.array(symbols, int)


# --- how small -------------------------------------------------------------------------------------------------------


def gaps(numbers, most=255):
    """Zeros left out: int [N] -> what is not zero and how many zeros stood before each, both int [M].

    More zeros than `most` in a row are broken by one that is kept (Han et al. 2016, figure 2).
    """
    kept, skipped, last = [], [], -1
    for place in np.flatnonzero(numbers):
        while place - last - 1 > most:
            last += most + 1
            kept.append(0)
            skipped.append(most)
        kept.append(numbers[place])
        skipped.append(place - last - 1)
        last = place
    return np.array(kept, int), np.array(skipped, int)


def coded(values):
    """Bytes that a kernel needs in Huffman's code, table and code lengths included, and which way is shorter.

    values [...] of at most 256 different ones -> {distinct, entropy, bits_per_weight, bytes, way}.  way: "all", every
    weight has a code word, at least a bit long, or "gaps", zeros are skipped.  `entropy` is that of "all".
    """
    table, numbers = np.unique(values, return_inverse=True)
    numbers = numbers.ravel()
    if len(table) > 256:
        raise InputError(f"{len(table)} different values are not a clustered kernel: 256 are the most")
    ways = {"all": _stream(numbers)}
    if (table == 0).any():
        zero = int(np.flatnonzero(table == 0)[0])
        numbered = np.where(numbers == zero, 0, np.where(numbers < zero, numbers + 1, numbers))  # zero is number 0
        ways["gaps"] = sum(map(_stream, gaps(numbered)))
    way = min(ways, key=ways.get)
    return {
        "distinct": len(table),
        "entropy": entropy(np.bincount(numbers)),
        "bits_per_weight": 8 * ways[way] / values.size,
        "bytes": table.nbytes + ways[way],
        "way": way,
    }


def _stream(symbols):
    """Bytes of coded symbols, the lengths of the code words (a byte each) included."""
    counts = np.bincount(symbols, minlength=1)
    lengths = code_lengths(counts)
    return len(lengths) + len(encode(symbols, lengths))


def table(model):
    """A row a kernel of a clustered model: {weight, size, ...} and what `coded` says; one of more than 256 values, and
    all other weights, are counted as they are, in float32, in a last row."""
    rows, free = [], 0
    for weight in model.weights:
        values = np.asarray(weight)
        if values.ndim >= 2 and len(np.unique(values)) <= 256:
            rows.append({"weight": weight.path, "size": values.size, **coded(values)})
        else:
            free += values.size
    return rows + [{"weight": "others", "size": free, "bytes": 4 * free}]


def coded_bytes(model):
    """Bytes of a clustered model in Huffman's code, all weights included."""
    return sum(row["bytes"] for row in table(model))
