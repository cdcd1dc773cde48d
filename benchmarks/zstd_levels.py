"""Which level of zstd moves a tensor soonest? For each tensor of a model, level and rate: n/(r B) + n/e + n/d, beside n/B without a codec.

`python benchmarks/zstd_levels.py` after a run: it reads results/tensors/. Speeds are those over cold memory (as table codecs), of the whole
tensors, by CPU time, in fresh processes; mean and 95% t interval over them. Weights: scaled from the sample to the whole model.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from semgap.analysis.stats import Interval, mean_interval
from semgap.codecs.arrays import to_wire
from semgap.codecs.zstd import Zstd
from semgap.engine.model_files import load_digest
from semgap.experiment.dump_tensors import GROUPS, Dump
from semgap.experiment.measure_codecs_speeds import CPU, HostRun, Sample, Speed, evictor, measure
from semgap.network.spec import bits_per_s

MEASURED = ("weights_sample", "logits_all", "logits_last", "kv_prompt")


def main() -> None:
    """Prints a table for each tensor."""
    options = _parser().parse_args()
    samples = _samples(options.root, options.model)
    speeds: dict[tuple[str, int], list[Speed]] = {(sample.group, level): [] for sample in samples for level in options.level}
    for _ in range(options.processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            for level, speed in fresh.submit(_measure, options.root, options.model, options.level).result():
                speeds[speed.group, level].append(speed)
    weights = sum(tensor.nbytes for tensor in load_digest(options.root / "resources/models" / options.model).tensors)
    for sample in samples:
        nbytes = weights if sample.group == "weights_sample" else sample.nbytes
        print(f"\n{sample.group} {sample.tensors[0].dtype.torch_name}, {nbytes:,} bytes; ms in all over {', '.join(options.rate)}")
        print(f"{'raw':<52}" + "".join(f"{1e3 * nbytes / _bytes_per_s(rate):>22.3f}" for rate in options.rate))
        for level in options.level:
            payload = nbytes * _payload_share(sample, level)
            print(_line(level, nbytes, payload, speeds[sample.group, level], options.rate))


def _samples(root: Path, model: str) -> list[Sample]:
    groups = Dump.read(root / f"results/tensors/model={model}/tensors.safetensors").groups
    return [Sample(name, tuple(to_wire(tensor, GROUPS[name]) for tensor in groups[name])) for name in MEASURED]


def _measure(root: Path, model: str, levels: Sequence[int]) -> list[tuple[int, Speed]]:
    samples, evict = _samples(root, model), evictor()
    return [(level, speed) for level in levels for speed in measure(samples, [Zstd(level)], CPU, evict)]


def _payload_share(sample: Sample, level: int) -> float:
    run = HostRun(sample.tensors, Zstd(level))
    run.encode()
    run.join()
    return sum(payload.nbytes for payload in run.payloads) / sample.nbytes


def _line(level: int, nbytes: float, payload: float, speeds: Sequence[Speed], rates: Sequence[str]) -> str:
    """Payload, speeds, and the milliseconds of encoding, sending and decoding over each rate."""
    ways = [(speed.cold_encode or float("inf"), speed.cold_decode or float("inf")) for speed in speeds]  # bytes a nanosecond
    encode, decode = (mean_interval([1e3 * speed for speed in way]).value for way in zip(*ways, strict=True))
    codec_ms = [nbytes / 1e6 * (1 / encode + 1 / decode) for encode, decode in ways]
    totals = [mean_interval([ms + 1e3 * payload / _bytes_per_s(rate) for ms in codec_ms]) for rate in rates]
    return f"level {level:<2} {payload:>13,.0f} bytes, {encode:>6.0f} and {decode:>6.0f} MB/s" + "".join(map(_text, totals))


def _text(interval: Interval) -> str:
    assert interval.value is not None and interval.low is not None
    return f"{f'{interval.value:.3f} +- {interval.value - interval.low:.3f}':>22}"


def _bytes_per_s(rate: str) -> float:
    return bits_per_s(rate) / 8


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--level", type=int, nargs="+", default=[1, 3, 6])
    rates = "payload bits a second (default: %(default)s; 24Gbit is about this project's loopback)"
    parser.add_argument("--rate", nargs="+", default=["100Mbit", "1Gbit", "10Gbit", "24Gbit"], help=rates)
    parser.add_argument("--processes", type=int, default=3, help="fresh processes (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    return parser


if __name__ == "__main__":
    main()
