"""What a step's communication costs on paper: ResNet-50 at 8 to 256 GPUs, against what has been published.

python -m models.scale.cost                            the setting of Goyal et al. 2017: 8 GPUs a server, 50 Gbit/s
python -m models.scale.cost --gbit 10 --gpus 64 256    the same on another network

Data-parallel training sums the gradients of all workers in every step.  The GPUs of one server sum theirs over NVLink,
which is part of the measured step of 8 GPUs; p servers then all-reduce M bytes over Ethernet.  With a bandwidth B and a
start-up time a of each message,

    ring:              2 (p - 1) a  +  2 (p - 1) / p  M / B                                                  (1)
    halving/doubling:  2 ceil(log2 p) a  +  2 (p - 1) / p  M / B                                             (2)

Nothing sends less than the second term: it is the bound of every all-reduce (Patarasuk and Yuan 2009).  What of it the
GPUs wait for depends on when the gradients are there.  The backward pass makes them last layer first, so each can be
summed while the next is computed; only what is left when the backward pass ends is waited for (3).

Published figures are in PUBLISHED, each with its source; everything else in this file is computed from them.
"""

import dataclasses
import math

from course.core import InputError, bounds, cli, flags

GOYAL = "Goyal et al. 2017, arXiv:1706.02677"
TENSORFLOW = "TensorFlow benchmarks, May 2017, tensorflow/docs_src/performance/benchmarks.md"

PUBLISHED = {  # name -> (value, unit, source)
    "images of a GPU": (32, "a step", f"{GOYAL}, section 5.1"),
    "GPUs of a server": (8, "", f"{GOYAL}, section 4.3: Tesla P100 joined by NVLink"),
    "network": (50, "Gbit/s", f"{GOYAL}, section 4.3: Ethernet, one card a server"),
    "backward pass": (120, "ms", f"{GOYAL}, section 4.3: of ResNet-50 on one P100"),
    "epoch of 352 GPUs": (30, "s", f"{GOYAL}, figure 7: about"),
    "slower than 8 GPUs": (1.12, "", f"{GOYAL}, section 5.5: a step of 352 GPUs, over one of 8"),
    "training images": (1_281_167, "", "Russakovsky et al. 2015, arXiv:1409.0575, table 2: ILSVRC 2012"),
    "start-up of a ring of 16": (
        *(908.0981, "us"),
        "Shi, Chu, Li 2019 (MG-WFBP), measured on 10 Gbit/s Ethernet: HKBU-HPML/MG-WFBP, distributed_optimizer.py",
    ),
    "bucket": (25, "MiB", "PyTorch 1.7 documentation, DistributedDataParallel: bucket_cap_mb=25"),
    "multiply-adds": (3.8, "1e9", "He et al. 2016, arXiv:1512.03385, table 1: of a picture, stride in the 1x1s"),
    "peak of a P100": (10.6, "TFLOP/s", "NVIDIA, Tesla P100 white paper WP-08019-001: float32, with NVLink"),
    "images of one P100": (195, "1/s", f"{TENSORFLOW}: batch 32, synthetic data"),
}
# what was measured: (GPUs, efficiency in %, of what, against how many GPUs where it is said, source)
MEASURED = (
    (256, 90.0, "ResNet-50, 50 Gbit/s Ethernet", 8, f"{GOYAL}, abstract and section 5.5: about"),
    (128, 90.0, "ResNet-50, ChainerMN", "", "Akiba, Fukuda, Suzuki 2017, arXiv:1710.11351, abstract"),
    (512, 90.0, "ResNet-101, 25 Gbit/s RoCE", "", "Sergeev, Del Balso 2018, arXiv:1802.05799; Horovod's benchmarks"),
    (512, 68.0, "VGG-16, 25 Gbit/s RoCE", "", "Sergeev, Del Balso 2018, arXiv:1802.05799; Horovod's benchmarks"),
    (64, 100 * 2744 / (8 * 378), "ResNet-50, K80, EC2", 8, f"{TENSORFLOW}: 2,744 / 8 times 378 images/s"),
)
BYTES = 4  # of a gradient's number: float32
# scheme -> (algorithm, bytes that are sent together): 0 sends every tensor by itself, infinity all of them at the end
SCHEMES = {
    "ring, one buffer": ("ring", math.inf),
    "ring, each tensor": ("ring", 0),
    "ring, 25 MiB buckets": ("ring", PUBLISHED["bucket"][0] * 2**20),
    "halving/doubling, each tensor": ("halving/doubling", 0),  # as Goyal et al.
}


def published(name):
    """The value of a published constant."""
    return PUBLISHED[name][0]


# --- the network ------------------------------------------------------------------------------------------------------


def resnet50(stride_at=3):
    """ResNet-50's trainable tensors, first layer first: [(name, numbers, multiply-adds of one 224x224 picture)].

    He et al. 2016, table 1: convolutions without bias, each followed by batch normalisation.  `stride_at`: the kernel
    size (1 or 3) of the convolution that halves a stage's map: 1 in that paper, 3 in Goyal et al. (section 5.1).
    """
    tensors = []

    def convolution(name, size, inputs, outputs, side):
        numbers = size * size * inputs * outputs
        tensors.append((f"{name}/kernel", numbers, numbers * side**2))
        tensors.extend([(f"{name}/gamma", outputs, 0), (f"{name}/beta", outputs, 0)])

    convolution("conv1", 7, 3, 64, 112)
    inputs, side = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for block in range(blocks):
            before, side = side, 224 // 2**stage
            middle = side if stride_at == 1 else before  # of the first 1x1 convolution's map
            name = f"conv{stage}_{block + 1}"
            convolution(f"{name}a", 1, inputs, width, middle)
            convolution(f"{name}b", 3, width, width, side)
            convolution(f"{name}c", 1, width, 4 * width, side)
            if not block:
                convolution(f"{name}shortcut", 1, inputs, 4 * width, side)
            inputs = 4 * width
    return [*tensors, ("fc/kernel", 2048 * 1000, 2048 * 1000), ("fc/bias", 1000, 0)]


# --- the model of its cost --------------------------------------------------------------------------------------------


def all_reduce(size, members, bandwidth, start_up, algorithm="ring"):
    """Seconds in which `members` sum `size` bytes, by eq. 1 ("ring") or eq. 2 ("halving/doubling").

    bandwidth: bytes a second that each member sends, and receives at the same time; start_up: seconds of a message.
    """
    messages = members - 1 if algorithm == "ring" else math.ceil(math.log2(members))
    return 2 * messages * start_up + bound(size, members, bandwidth)


def bound(size, members, bandwidth):
    """Seconds below which no all-reduce gets: each member sends 2 (p - 1) / p of the bytes."""
    return 2 * (members - 1) / members * size / bandwidth


def exposed(tensors, backward, seconds, together=0.0):
    """(seconds of communication, seconds of it that remain after the backward pass): eq. 3.

    tensors: as `resnet50` gives them; backward: seconds of the pass, shared out by multiply-adds; seconds: function
    bytes -> seconds of an all-reduce; together: bytes that are gathered before they are sent.  One all-reduce runs
    at a time, in the order in which the gradients appear.
    """
    total = sum(work for *_, work in tensors)
    ready = finished = spent = waiting = 0.0
    for i, (_, numbers, work) in enumerate(reversed(tensors), 1):
        ready += backward * work / total
        waiting += BYTES * numbers
        if waiting >= together or i == len(tensors):
            spent += seconds(waiting)
            finished = max(finished, ready) + seconds(waiting)
            waiting = 0.0
    return spent, max(0.0, finished - backward)


def single_server():
    """Seconds of a step of 8 GPUs, from the published epoch of 352 GPUs: all of it that is not between servers."""
    steps = published("training images") / (352 * published("images of a GPU"))
    return published("epoch of 352 GPUs") / steps / published("slower than 8 GPUs")


def start_up():
    """Seconds of one message: a ring of 16 sends 30, one after another (eq. 1)."""
    return 1e-6 * published("start-up of a ring of 16") / (2 * 15)


@dataclasses.dataclass
class Setting:
    """The machines."""

    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # in all; whole servers of 8
    gbit: float = float(published("network"))  # Gbit/s of a server's network card
    start_up_us: float = 1e6 * start_up()  # microseconds of each message


def table(setting=None):
    """Rows of the model: one for each number of GPUs and scheme.  Raises `InputError` for what is no whole server.

    {"gpus", "servers", "scheme", "bound_ms", "communication_ms", "exposed_ms", "share" of communication in the
    step's computation, "step_ms", "efficiency" in % against 8 GPUs, "images_per_second"}
    """
    setting = setting or Setting()
    size, tensors = published("GPUs of a server"), resnet50()
    if wrong := [gpus for gpus in setting.gpus if gpus < size or gpus % size]:
        raise InputError(f"--gpus {wrong[0]} is not a number of whole servers: give multiples of {size}")
    if setting.gbit <= 0 or setting.start_up_us < 0:
        raise InputError("--gbit must be above 0 and --start-up-us not below it")
    compute, rows = single_server(), []
    bandwidth, first = setting.gbit * 1e9 / 8, 1e-6 * setting.start_up_us
    for gpus in setting.gpus:
        servers = gpus // size
        for scheme, (algorithm, together) in SCHEMES.items():

            def seconds(count, servers=servers, algorithm=algorithm):
                return all_reduce(count, servers, bandwidth, first, algorithm)

            spent, left = exposed(tensors, 1e-3 * published("backward pass"), seconds, together)
            step = compute + left
            rows.append({
                "gpus": gpus, "servers": servers, "scheme": scheme,
                "bound_ms": 1e3 * bound(BYTES * sum(numbers for _, numbers, _ in tensors), servers, bandwidth),
                "communication_ms": 1e3 * spent, "exposed_ms": 1e3 * left, "share": spent / compute,
                "step_ms": 1e3 * step, "efficiency": 100 * compute / step,
                "images_per_second": gpus * published("images of a GPU") / step,
            })  # fmt: skip
    return rows


def checks():
    """Computed figures beside published ones: [(what, computed, published, source)]."""
    tensors, step = resnet50(), single_server()
    macs = sum(work for *_, work in resnet50(stride_at=1))
    flops = 3 * 2 * sum(work for *_, work in tensors) * published("images of a GPU")  # forward once, backward twice
    return [
        ("ResNet-50, million parameters", sum(n for _, n, _ in tensors) / 1e6, "about 25", f"{GOYAL}, section 4.3"),
        ("multiply-adds, 1e9, stride in 1x1", macs / 1e9, "3.8", PUBLISHED["multiply-adds"][2]),
        ("multiply-adds, 1e9, stride in 3x3", sum(work for *_, work in tensors) / 1e9, "", ""),
        ("step of 8 GPUs, ms", 1e3 * step, "", "from the epoch of 352 GPUs and its 12 %"),
        ("images/s of one P100 in it", published("images of a GPU") / step, "195", PUBLISHED["images of one P100"][2]),
        ("share of the P100's peak, %", 100 * flops / step / (1e12 * published("peak of a P100")), "", ""),
        ("hours of 90 epochs on 8 GPUs", 90 * published("training images") / 256 * step / 3600, "29",
         "developer.nvidia.com/facebook-trains-imagenet-1-hour"),
        ("peak need of the network, Gbit/s", 8e-6 * 2 * BYTES * sum(n for _, n, _ in tensors)
         / published("backward pass"), "12.8", f"{GOYAL}, section 4.3: 200 MB in 0.125 s"),
    ]  # fmt: skip


# --- shown ------------------------------------------------------------------------------------------------------------


def figure(rows):
    """Efficiency over the number of GPUs: lines of the model, points of what was measured elsewhere."""
    from course.core import plots

    gpus = sorted({row["gpus"] for row in rows})
    series = {scheme: [row["efficiency"] for row in rows if row["scheme"] == scheme] for scheme in SCHEMES}
    drawn = plots.curves(series, x=gpus, xscale="log", xlabel="GPUs", ylabel="efficiency, %", size=(7.2, 4.2),
                         title="ResNet-50, 8 GPUs a server: lines computed, points published")  # fmt: skip
    (axes,) = drawn.axes
    for i, (count, efficiency, what, *_) in enumerate(MEASURED):
        axes.scatter(count, efficiency, marker="sD^vo"[i], color="#444444", zorder=3, label=what)
    axes.minorticks_off()
    axes.set_xticks(ticks := [*gpus, max(count for count, *_ in MEASURED)], labels=ticks)
    axes.set(ylim=(30, 103))
    axes.legend(loc="lower left", fontsize=7)
    return drawn


def markdown(rows):
    """`table`'s rows, what was measured elsewhere and the constants as the tables of a README."""
    lines = [
        f"| GPUs | servers | bound, ms | {' | '.join(f'{scheme}, ms' for scheme in SCHEMES)} |",
        "|---" * (3 + len(SCHEMES)) + "|",
    ]
    for gpus in sorted({row["gpus"] for row in rows}):
        own = [row for row in rows if row["gpus"] == gpus]
        cells = " | ".join(
            f"{row['communication_ms']:.0f} / {row['exposed_ms']:.0f} / {row['efficiency']:.0f} %" for row in own
        )
        lines.append(f"| {gpus} | {own[0]['servers']} | {own[0]['bound_ms']:.0f} | {cells} |")
    lines += ["", "| published elsewhere | GPUs | from | efficiency | source |", "|---" * 5 + "|"]
    lines += [f"| {what} | {gpus} | {base} | {percent:.0f} % | {source} |"
              for gpus, percent, what, base, source in MEASURED]  # fmt: skip
    lines += ["", "| published, and used | value | source |", "|---" * 3 + "|"]
    lines += [f"| {name} | {value:,} {unit} | {source} |" for name, (value, unit, source) in PUBLISHED.items()]
    lines += ["", "| computed | value | published | source |", "|---" * 4 + "|"]
    lines += [f"| {what} | {value:.4g} | {given} | {source} |" for what, value, given, source in checks()]
    return "\n".join(lines)


def main(argv):
    """Print the table, what was published, and the constants' checks."""
    setting = flags.read(Setting(), argv, prog="python -m models.scale.cost", description=__doc__)
    columns = ("GPUs", "scheme", "bound ms", "all-reduce ms", "of compute", "waited ms", "step ms", "efficiency")
    lines = [
        (str(row["gpus"]), row["scheme"], f"{row['bound_ms']:.1f}", f"{row['communication_ms']:.1f}",
         f"{100 * row['share']:.0f} %", f"{row['exposed_ms']:.1f}", f"{row['step_ms']:.0f}",
         f"{row['efficiency']:.1f} %")
        for row in table(setting)
    ]  # fmt: skip
    title = f"computed: ResNet-50, {setting.gbit:g} Gbit/s, {setting.start_up_us:.0f} us a message"
    bounds.table(title, columns, lines)
    lines = [(what, str(gpus), str(base), f"{percent:.0f} %") for gpus, percent, what, base, _ in MEASURED]
    bounds.table("published, each on machines of its own", ("what", "GPUs", "from", "efficiency"), lines)
    lines = [(what, f"{value:.4g}", given) for what, value, given, _ in checks()]
    bounds.table("the constants", ("what", "computed", "published"), lines)
    print("sources: models/scale/README.md")


if __name__ == "__main__":
    cli(main)
