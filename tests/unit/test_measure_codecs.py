"""Tensors of a real (tiny) model, and every codec measured on them."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from semgap.codecs import CODECS, Codec, CodecError, codec_named
from semgap.experiment import fetch_model, measure_codecs_speeds
from semgap.experiment.cell import Cell
from semgap.experiment.config import Config, check_config
from semgap.experiment.dump_tensors import DUMPED_STEPS, GROUPS, Dump, dump_tensors, load_executor
from semgap.experiment.measure_codecs import SPEEDS, TABLE, Effects, entropy_bits, measure_codec, measure_codecs, sample_of
from semgap.experiment.measure_codecs_speeds import CPU, DeviceRun, HostRun, Sample, evictor, fresh, largest_cache_bytes, measure, repeat
from semgap.experiment.staleness import content_digest
from semgap.experiment.trial_setup import Paths
from semgap.processes import machine
from semgap.tensors import DType, Tensor, TensorClass

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MAX_LENGTH = 80
PROMPT = MAX_LENGTH - DUMPED_STEPS


@dataclass(frozen=True)
class Bench:
    """A dump and a measurement of a tiny random model."""

    config: Config
    place: Paths
    tensors: Path
    measured: Path

    @property
    def rows(self) -> pd.DataFrame:
        return pq.read_table(self.measured, partitioning=None).to_pandas()

    def row(self, tensor: str, dtype: str, codec: str) -> Any:
        rows = self.rows
        (found,) = rows[(rows["tensor"] == tensor) & (rows["dtype"] == dtype) & (rows["codec"] == codec)].itertuples()
        return found


@pytest.fixture(scope="module")
def own_affinity() -> Iterator[None]:
    """Measuring pins the process that does it; the tests after it may use what those before it used."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, own_affinity: None) -> Bench:
    directory = tmp_path_factory.mktemp("bench")
    raw = {
        "max_length": MAX_LENGTH,
        "define": {
            "models": {"tiny": {"source": "random", "architecture": "llama", "config": SHAPE, "seed": 3}},
            "networks": {"loopback": {"kind": "loopback"}},
            "modes": {"remote_cache": {}},
            "phases": {"decode": {"kind": "decode", "prompt_lengths": [8], "steps": 2}},
        },
        "exactness": {"prompt_length": 8, "tokens": 8},
    }
    config = check_config(raw, ROOT)
    fetch_model.fetch_model(config["define"]["models"]["tiny"], "tiny", "float32", directory / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOCK", directory / "measure.lock")  # the machine's own one may be held for minutes
        return _measured(config, directory)


def _measured(config: Config, directory: Path) -> Bench:
    made = Bench(config, Paths(directory / "model", ROOT), directory / "model=tiny/tensors.safetensors", directory / "model=tiny.parquet")
    dump_tensors(config.tensors_cell("tiny"), made.place, made.tensors)
    measure_codecs(config.codecs_cell("tiny"), made.place, made.tensors, made.measured)
    return made


def test_the_dump_holds_what_crosses_in_the_dtype_of_the_run(bench: Bench) -> None:
    groups = Dump.read(bench.tensors).groups
    assert {name: tuple(tensors[0].shape) for name, tensors in groups.items() if name != "weights_sample"} == {
        "tokens_prompt": (PROMPT,),
        "tokens_step": (1,),
        "logits_all": (PROMPT, 300),
        "logits_last": (1, 300),
        "hidden_last": (1, 64),
        "kv_prompt": (2, 2, 1, PROMPT, 32),
    }
    assert torch.equal(groups["logits_all"][0][-1], groups["logits_last"][0][0])
    floats = [tensor for name, tensors in groups.items() if not name.startswith("tokens") for tensor in tensors]
    assert {tensor.dtype for tensor in floats} == {torch.float32}


def test_the_sample_of_weights_is_spread_over_the_file(bench: Bench) -> None:
    sampled = Dump.read(bench.tensors).groups["weights_sample"]
    assert len(sampled) == 8
    assert len({tuple(tensor.shape) for tensor in sampled}) > 2


def test_the_dumped_cache_decodes_on_as_the_one_that_was_never_moved(bench: Bench) -> None:
    dump, executor = Dump.read(bench.tensors), load_executor(Cell.of(bench.config.tensors_cell("tiny")), bench.place)
    cache, loaded = executor.new_cache(), executor.new_cache()
    executor.forward(dump.groups["tokens_prompt"][0].numpy(), cache)
    loaded.load(dump.groups["kv_prompt"][0])
    token = dump.following[:1]
    assert torch.equal(executor.forward(token, loaded), executor.forward(token, cache))


def test_every_codec_is_measured_on_every_tensor_that_it_accepts_in_every_dtype(bench: Bench) -> None:
    measured = {(row.tensor, row.dtype, row.codec) for row in bench.rows.itertuples()}
    floats = ("float32", "float16", "bfloat16")
    assert measured == {
        (tensor, dtype, codec.name)
        for tensor, cls in GROUPS.items()
        for dtype in (("int64",) if cls is TensorClass.TOKENS else floats)
        for codec in CODECS.values()
        if cls in codec.accepts
    }
    assert pq.read_schema(bench.measured).equals(TABLE)


def test_ratios_are_of_the_same_dtype_and_of_fp16(bench: Bench) -> None:
    fp32, fp16 = bench.row("kv_prompt", "float32", "fp16"), bench.row("kv_prompt", "float16", "raw")
    assert (fp32.ratio, fp32.ratio_to_fp16) == (2, 1)
    assert (fp16.ratio, fp16.ratio_to_fp16) == (1, 1)
    zlib = bench.row("kv_prompt", "float32", "fp16_zlib")
    assert zlib.ratio_to_fp16_zlib == 1
    assert fp32.ratio_to_fp16_zlib == zlib.payload_bytes / fp32.payload_bytes
    assert fp32.raw_bytes == 2 * 2 * PROMPT * 32 * 4


def test_exact_says_whether_the_very_bytes_came_back(bench: Bench) -> None:
    assert not bench.row("kv_prompt", "float32", "fp16").exact
    assert bench.row("kv_prompt", "float16", "fp16").exact
    rows = bench.rows
    assert rows.loc[rows["codec"].isin([name for name, codec in CODECS.items() if codec.exact]), "exact"].all()


def test_losses_in_a_cache_show_in_the_text_that_follows(bench: Bench) -> None:
    raw, int8, int4 = (bench.row("kv_prompt", "float32", codec) for codec in ("raw", "int8", "int4"))
    assert (raw.kl_nats, raw.max_abs_diff, raw.rows_compared) == (0, 0, DUMPED_STEPS)
    assert 0 < int8.kl_nats < int4.kl_nats
    assert bench.row("kv_prompt", "float16", "raw").max_abs_diff > 0, "the cast to another dtype is a loss too"


def test_losses_in_logits_and_hidden_states_show_row_by_row(bench: Bench) -> None:
    topk = bench.row("logits_all", "float32", "topk")
    assert topk.kl_nats > 0
    assert topk.rows_compared == PROMPT
    assert bench.row("hidden_last", "float32", "fp16").max_abs_diff > 0
    assert bench.row("hidden_last", "float32", "planes_zstd").max_abs_diff == 0


def test_what_has_no_effect_that_was_measured_is_null_with_a_reason(bench: Bench) -> None:
    for tensor, dtype in (("weights_sample", "float32"), ("tokens_prompt", "int64")):
        row = bench.row(tensor, dtype, "fp16")
        assert np.isnan(row.kl_nats)
        assert row.kl_reason


def test_memory_that_is_handed_on_has_no_speed_and_says_so(bench: Bench) -> None:
    raw, planes = bench.row("logits_all", "float32", "raw"), bench.row("logits_all", "float32", "planes_zstd")
    assert all(getattr(raw, name) is None for name in SPEEDS)
    assert raw.speed_reason
    assert [len(getattr(planes, name)) for name in SPEEDS] == [3] * 4, "a value for each process"
    assert min(min(getattr(planes, name)) for name in SPEEDS) > 0
    assert pd.isna(planes.speed_reason)


def test_ratios_on_what_random_weights_compute_are_marked_and_token_ids_are_not(bench: Bench) -> None:
    marked = bench.rows.groupby("tensor_class")["ratio_meaningful"].first().to_dict()
    assert marked == {"tokens": True, "logits": False, "hidden": False, "kv": False, "weights": False}
    assert set(bench.rows.loc[~bench.rows["ratio_meaningful"], "ratio_reason"]) == {fetch_model.RANDOM_REASON}


def test_the_file_holds_the_digest_of_its_cell(bench: Bench) -> None:
    stored = pq.read_schema(bench.measured).metadata[b"semgap.cell_digest"].decode()
    assert stored == content_digest(bench.config.codecs_cell("tiny"))


def floats(array: np.ndarray, cls: TensorClass = TensorClass.KV) -> Tensor:
    return Tensor.from_numpy(array, cls)


def test_entropy_of_constant_and_of_uniform_bytes() -> None:
    constant = floats(np.full(512, 1.5, dtype=np.float32))
    uniform = Tensor.from_numpy(np.arange(65536, dtype=np.uint16), TensorClass.TOKENS)
    halves = Tensor.from_numpy(np.arange(256, dtype=np.uint16) % 2, TensorClass.TOKENS)
    assert entropy_bits([constant]) == 0
    assert entropy_bits([uniform]) == pytest.approx(16)
    assert entropy_bits([halves]) == pytest.approx(1)
    assert entropy_bits([halves, halves]) == pytest.approx(1)


class Slow:
    """Takes 30 ms, and counts its runs."""

    runs = 0

    def __call__(self) -> int:
        self.runs += 1
        time.sleep(0.03)
        return self.runs


@pytest.mark.parametrize(("budget_s", "runs", "median"), [(0, 1, 1), (0.004, 1, 1), (0.007, 2, 2), (0.08, 4, 3)])
def test_a_run_that_is_not_long_by_itself_warms_up_for_those_that_count(budget_s: float, runs: int, median: int) -> None:
    run = Slow()
    assert (repeat(run, budget_s), run.runs) == (median, runs)


def test_short_runs_are_repeated_fifteen_times_within_the_budget() -> None:
    came: list[int] = []
    assert repeat(lambda: came.append(len(came)) or len(came), 60) == 9  # the median of 2 to 16
    assert len(came) == 16


class Told(Codec):
    """Writes down when it runs, and copies."""

    name, code, exact = "raw", 0, True

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def encode(self, tensor: Tensor) -> list[memoryview]:
        self.events.append("encode")
        return [memoryview(bytes(tensor.data))]

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        raise AssertionError("the wire's code finds the codec that decodes")


def test_each_round_of_cold_runs_follows_an_eviction_and_warm_runs_come_before() -> None:
    events: list[str] = []
    samples = [Sample(name, (floats(np.ones(8, np.float32)),)) for name in ("kv_prompt", "logits_all")]
    speeds = list(measure(samples, [Told(events)], CPU, lambda: events.append("evict")))
    assert [speed.group for speed in speeds] == ["kv_prompt", "logits_all"]
    cold = [*["evict", "encode", "encode"] * 3, *["evict"] * 3]
    assert events[-len(cold) :] == cold and set(events[: -len(cold)]) == {"encode"}
    assert all(speed.cold_encode and speed.warm_encode and not speed.cold_decode for speed in speeds)


def test_a_cold_run_touches_its_output_for_the_first_time() -> None:
    def faults(call: Callable[[], object]) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def touch() -> int:
        return len(b"x" * (1 << 20))

    touch()
    assert faults(touch) < 128 < faults(lambda: fresh(touch)), "memory that is freed stays with the process, 256 pages here"


def test_the_eviction_reads_as_much_as_the_largest_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_codecs_speeds, "_CACHES", tmp_path)
    assert largest_cache_bytes() == 64 << 20
    for index, size in enumerate(("48K", "2048K", "3M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}/size").write_text(f"{size}\n")
    assert largest_cache_bytes() == 3 << 20
    assert evictor()() == (3 << 20) // 8


def test_a_sample_is_the_first_rows_of_the_middle_tensor_up_to_half_a_mebibyte() -> None:
    rows, small = floats(np.arange(3 << 18, dtype=np.float32).reshape(12, -1), TensorClass.LOGITS), floats(np.ones(10, np.float32))
    (taken,) = sample_of("logits_all", [small, rows, small]).tensors
    assert taken.shape == (2, 1 << 16) and bytes(taken.data) == bytes(rows.data[: 1 << 19])
    assert sample_of("kv_prompt", [rows, small]).tensors == (small,)


class Forgetful(Codec):
    """Says it is exact, and loses the last byte."""

    name, code, exact = "raw", 0, True

    def encode(self, tensor: Tensor) -> list[memoryview]:
        return [memoryview(bytes(tensor.data[:-1]) + b"\xff")]

    def decode(self, payload: memoryview, dtype: DType, shape: tuple[int, ...]) -> memoryview:
        return payload


def test_a_codec_that_says_it_is_exact_and_is_not_fails_the_measurement(bench: Bench) -> None:
    effects = Effects(load_executor(Cell.of(bench.config.tensors_cell("tiny")), bench.place), Dump.read(bench.tensors))
    tensor = floats(np.ones((1, 64), dtype=np.float32), TensorClass.HIDDEN)
    with pytest.raises(CodecError, match="says it is exact"):
        measure_codec("hidden_last", [tensor], Forgetful(), effects)


def test_a_tensor_that_a_codec_refuses_is_a_row_with_its_reason(bench: Bench) -> None:
    effects = Effects(load_executor(Cell.of(bench.config.tensors_cell("tiny")), bench.place), Dump.read(bench.tensors))
    row = measure_codec("kv_prompt", [floats(np.full((1, 2, 1, 4, 32), np.nan, dtype=np.float32))], codec_named("int8"), effects)
    assert row["payload_bytes"] is None
    assert "finite" in row["reason"]


def test_the_cell_of_the_dump_ignores_what_only_measures_codecs(bench: Bench) -> None:
    dump, codecs = bench.config.tensors_cell("tiny"), bench.config.codecs_cell("tiny")
    assert dump["code"] != codecs["code"]
    assert {key: value for key, value in dump.items() if key != "code"} == {key: value for key, value in codecs.items() if key != "code"}
    assert {"telemetry", "worker", "phase_spec"} & set(dump) == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and what is tested is that it has none")
def test_a_codec_that_needs_a_gpu_has_rows_without_numbers_that_say_so(bench: Bench) -> None:
    rows = bench.rows[bench.rows["codec"] == "nvcomp_ans"]
    assert set(rows["tensor"]) == {"logits_all", "logits_last", "hidden_last", "kv_prompt", "weights_sample"}
    assert set(rows["device"]) == {"cuda"} and rows[["ratio", "cold_encode_mb_per_s", "exact"]].isna().all(axis=None)
    assert set(rows["reason"]) == {"codec 'nvcomp_ans' cannot be used here: there is no usable GPU"}
    assert set(bench.rows.loc[bench.rows["codec"] != "nvcomp_ans", "device"]) == {"cpu"}


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_codec_measured_where_the_tensor_is_gives_what_it_gives_on_the_host(bench: Bench, name: str) -> None:
    dumped = Dump.read(bench.tensors).groups["kv_prompt"][0]
    tensor = Tensor.from_numpy(dumped.numpy(), TensorClass.KV)
    there, here = DeviceRun([tensor], codec_named(name), "cpu"), HostRun([tensor], codec_named(name))
    for run in (there, here):
        assert run.encode() > 0
        run.join()
        assert run.decode() > 0
    assert there.payloads == here.payloads
    assert bytes(there.decoded[0].data) == bytes(here.decoded[0].data)
