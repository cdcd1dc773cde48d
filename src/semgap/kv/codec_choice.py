"""The codec of each layer's KV blocks, so that they are here before the layer computes: `policy.AUTO`.

Layers compute in order, and their blocks cross one after the other. A layer's deadline is the time at which it would compute if all blocks
came in the quickest codec: a wait that no codec avoids puts it off. The first blocks may take a round trip and one layer's compute, the
filling of the pipeline, which nothing can hide. A layer gets the preferred one of the codecs with which it is in time if all layers before
have that codec too, and the same must hold for every later layer. So each layer is here at its deadline, and over a slower link no layer
gets a codec with more bytes. To spend what time is left layer by layer, as CacheGen does with chunks (Liu et al., SIGCOMM 2024,
arXiv:2310.07240), keeps the first alone: a layer that only just fits exactly over the faster link starves those after it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CodecSpeed:
    """A codec on blocks of a cache: tensor bytes over payload bytes, and tensor bytes encoded and decoded per second."""

    ratio: float = 1.0
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf


@dataclass(frozen=True)
class Coming:
    """The blocks of one layer: their tensor bytes, whose codec is to be chosen, and `fixed_s`, the time of all that crosses beside them.

    At `due_s` the layer would compute if it waited for nothing: seconds from the request.
    """

    tensor_bytes: int
    due_s: float
    fixed_s: float = 0.0


def choose(layers: Sequence[Coming], s_per_byte: Mapping[str, float], trip_s: float, layer_s: float) -> list[str]:
    """A codec for each of `layers`, which are in the order of their compute.

    `s_per_byte`: seconds that a tensor byte takes in each codec to cross and to be encoded or decoded; the preferred codec first. `trip_s`:
    a round trip, before the first byte comes. `layer_s`: the compute of one layer.
    """
    names = _each_quicker(s_per_byte)
    arrivals = [arrivals_s(layers, [s_per_byte[name]] * len(layers), trip_s) for name in names]
    deadlines = deadlines_s(layers, arrivals[-1], trip_s, layer_s)
    chosen, least = [], 0
    for index in reversed(range(len(layers))):
        in_time = next(number for number, own in enumerate(arrivals) if own[index] <= deadlines[index])
        least = max(least, in_time)
        chosen.append(names[least])
    return chosen[::-1]


def arrivals_s(layers: Sequence[Coming], s_per_byte: Sequence[float], trip_s: float) -> list[float]:
    """When each layer's blocks are here, in codecs of `s_per_byte`: crossing and codec of one layer after those of the one before."""
    now_s, here = trip_s, []
    for layer, cost in zip(layers, s_per_byte, strict=True):
        now_s += layer.fixed_s + layer.tensor_bytes * cost
        here.append(now_s)
    return here


def deadlines_s(layers: Sequence[Coming], quickest_s: Sequence[float], trip_s: float, layer_s: float) -> list[float]:
    """When each layer would compute if all came at `quickest_s`, with a first wait of up to a round trip and one layer's compute."""
    waited_s, deadlines = 0.0, []
    for layer, here_s in zip(layers, quickest_s, strict=True):
        begins_s = max(layer.due_s + waited_s, trip_s + layer_s, here_s)
        waited_s = begins_s - layer.due_s
        deadlines.append(begins_s)
    return deadlines


def _each_quicker(s_per_byte: Mapping[str, float]) -> list[str]:
    """The codecs without those that take as long as one preferred to them."""
    names: list[str] = []
    for name, cost in s_per_byte.items():
        if not names or cost < s_per_byte[names[-1]]:
            names.append(name)
    return names


def by_run(codecs: Sequence[str]) -> str:
    """Codecs of layers in their order, as text: `raw x 3, int8 x 9`."""
    runs: list[tuple[str, int]] = []
    for name in codecs:
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    return ", ".join(f"{name} x {count}" for name, count in runs)
