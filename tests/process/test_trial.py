"""One grid cell with real processes: its tables are exact, its failures say why, and nothing outlives it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from semgap.analysis.load import checked_trials
from semgap.client.prompts import load_passages
from semgap.engine import kernel_cache
from semgap.engine.model_files import ModelFileError, load_digest
from semgap.experiment import check_exactness, compute_exactness_reference, exactness, trial_schemas
from semgap.experiment.cell import Cell, Cpus
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, check_config
from semgap.experiment.config_checks import ConfigError
from semgap.experiment.exactness import BrokenPromise, Logits
from semgap.experiment.measure_trial import measure_trial, require_promise_of_each_session
from semgap.experiment.staleness import content_digest
from semgap.experiment.ties import Departure, first_departure, ties
from semgap.experiment.trial_schemas import TrialResult
from semgap.experiment.trial_setup import Paths, TrialError
from semgap.experiment.trial_tables import shifted
from semgap.policy import Policy
from semgap.processes.machine import measuring
from semgap.processes.scratch import sweep
from semgap.seal import SealError, write_sealed_npz

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("own_run")]

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS, REQUESTS, VOCAB = 10, 3, 2, 512
Wait = Callable[..., None]


@pytest.fixture(scope="module")
def config(llama: Path) -> Config:
    """The default config over the tiny llama."""
    raw = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    raw["define"]["models"], raw["models"] = {"tiny": load_digest(llama).source}, ["tiny"]
    decode = {"kind": "decode", "prompt_lengths": [PROMPT], "requests": REQUESTS, "steps": STEPS, "warmup_requests": 1}
    raw["define"]["phases"], raw["phases"] = {"decode": decode}, ["decode"]
    raw["define"]["modes"]["naive"]["max_steps"] = STEPS
    raw["modes"] = ["local", "naive", "remote_cache", "remote_cache_fp16", "sys_simulated", "know_layout", "know_head", "know_loop"]
    raw["exactness"] = {"prompts": 2, "prompt_length": 8, "tokens": 6}
    raw |= {"max_length": 64, "device": "cpu", "probe": {"round_trips": 3, "payload_bytes": 65536}}
    raw["telemetry"] = {"interval_s": 0.05, "sources": ["host", "gpu", "dmon"]}
    return check_config(raw, ROOT)


@pytest.fixture(scope="module")
def cell_of(config: Config) -> Callable[..., dict[str, Any]]:
    """The cell of a mode, as the workflow would cut it from a config; `more` replaces parts of it."""

    def make(mode: str, **more: Any) -> dict[str, Any]:
        cell = config.cell(Coordinates("tiny", "loopback", mode, "decode", 1))
        return copy.deepcopy(cell) | more

    return make


@pytest.fixture(scope="module")
def place(llama: Path) -> Paths:
    return Paths(llama, ROOT)


@pytest.fixture(scope="module")
def reference(cell_of: Callable[..., dict[str, Any]], place: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "deep" / "reference.npz"
    compute_reference(cell_of("local"), place, output)
    return output


@pytest.fixture(scope="module")
def trial_of(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path) -> Callable[[str], TrialResult]:
    """The result of a mode's trial, run once."""
    done: dict[str, TrialResult] = {}

    def run(mode: str) -> TrialResult:
        if mode not in done:
            done[mode] = measure_trial(cell_of(mode), place, reference)
        return done[mode]

    return run


def _steps(result: TrialResult) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result.tables["steps"].to_pylist()
    return rows


def _kv_bytes(positions: int) -> int:
    """Of the tiny llama: layers x [K, V] x KV heads x positions x head_dim x 4 bytes."""
    return 3 * 2 * 2 * positions * 32 * 4


MODES = ["local", "naive", "remote_cache", "sys_simulated"]


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_leaves_every_table_and_a_whole_manifest(
    trial_of: Callable[[str], TrialResult], cell_of: Callable[..., dict[str, Any]], tmp_path: Path, mode: str
) -> None:
    result = trial_of(mode)
    result.write(tmp_path / "trial")
    checked_trials([tmp_path / "trial"], {str(tmp_path / "trial"): content_digest(cell_of(mode))})  # its sums hold
    tmp_path /= "trial"
    names = {"steps", "requests", "control", "load", "batches", "ledger", "tcp", "relay", "gpu", "dmon", "host"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.parquet" for name in names} | {"manifest.json"}
    for name, schema in {
        "steps": trial_schemas.STEPS,
        "requests": trial_schemas.REQUESTS,
        "control": trial_schemas.CONTROL,
        "ledger": trial_schemas.LEDGER,
        "tcp": trial_schemas.TCP,
    }.items():
        assert pq.read_schema(tmp_path / f"{name}.parquet").equals(schema)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema"] == 2 and manifest["cell"] == cell_of(mode) and manifest["cell_digest"] == content_digest(cell_of(mode))
    assert manifest["exactness"]["promise_kept"] and manifest["exactness"]["tokens_compared"] == REQUESTS * (STEPS + 1)
    assert manifest["cut"] is None
    assert manifest["device"] == "cpu" and manifest["measured"]["start_s"] < manifest["measured"]["end_s"]
    assert manifest["executor"] == "fused" and manifest["executor_compiled_for"] == kernel_cache.compiled_for()
    assert manifest["memory"]["client_peak_rss_anon_bytes"] > 0
    assert manifest["memory"]["worker_weight_store_bytes"] == (None if mode == "local" else 0)
    assert manifest["provenance"]["packages"]["torch"] and manifest["session"] and manifest["fingerprint"]
    remote = mode != "local"
    for key in ("probe", "reconciliation"):
        assert (manifest[key] is not None) == remote
    assert (manifest["setup"]["worker_start_s"] is not None) == remote
    for source in ("gpu", "dmon"):
        note = manifest["telemetry"][source]
        assert note["rows"] == result.tables[source].num_rows and (note["rows"] > 0 or note["reason"])
    assert manifest["telemetry"]["worker_clock"] == ({"offset_s": 0, "error_s": 0} if remote else None)
    for side in ("client", "worker") if remote else ("client",):
        cost = manifest["telemetry"]["host"]["cost"][side]
        assert cost["samples"] > 0 and 0 < cost["cpu_s_per_sample"] < 0.1 and 0 < cost["core_share"] < 1 and 0 < cost["wall_share"] < 1
    assert set(result.tables["host"]["side"].to_pylist()) == ({"client", "worker"} if remote else {"client"})


@pytest.mark.parametrize("mode", MODES)
def test_every_request_and_step_has_its_row(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    steps = _steps(trial_of(mode))
    assert [row["step"] for row in steps if not row["warmup"]] == list(range(STEPS + 1)) * REQUESTS
    for row in steps:
        assert row["measured"] == (not row["warmup"] and row["step"] > 0)
        assert row["kind"] == ("decode" if row["step"] else "prefill")
        assert (row["tokens_in"], row["position"]) == ((1, PROMPT + row["step"] - 1) if row["step"] else (PROMPT, 0))
        assert (row["reference_token"] is None) == row["warmup"]
        assert row["gpu_s"] is None
    requests = trial_of(mode).tables["requests"].to_pylist()
    assert [row["warmup"] for row in requests] == [True] + [False] * REQUESTS


def test_local_computes_within_its_latency_and_has_no_codec(trial_of: Callable[[str], TrialResult]) -> None:
    for row in _steps(trial_of("local")):
        assert 0 < row["worker_compute_s"] < row["latency_s"] and row["client_compute_s"] == 0
        assert row["client_codec_s"] is None and row["worker_codec_s"] is None


@pytest.mark.parametrize("mode", ["remote_cache", "sys_simulated", "know_head"])
def test_the_parts_of_a_remote_step_fit_its_latency(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    for row in _steps(trial_of(mode)):
        parts = [row[name] for name in ("worker_compute_s", "client_compute_s", "client_codec_s", "worker_codec_s")]
        assert sum(parts) < row["latency_s"]
        assert row["worker_compute_s"] > 0 and (row["client_compute_s"] > 0) == (mode == "know_head")


@pytest.mark.parametrize("mode", ["local", "remote_cache", "sys_simulated", "know_loop"])
def test_the_control_decodes_the_positions_of_every_measured_step(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    result = trial_of(mode)
    rows = result.tables["control"].to_pylist()
    steps = {(row["request"], row["step"]): row["position"] for row in _steps(result) if row["measured"]}
    assert {(row["request"], row["step"]): row["position"] for row in rows} == steps and len(rows) == len(steps)
    assert all(row["compute_s"] > 0 for row in rows)
    assert result.manifest["control"] == {"rows": REQUESTS * STEPS, "reason": None}


def test_a_mode_that_leaves_the_worker_no_cache_has_no_control_and_the_manifest_says_why(trial_of: Callable[[str], TrialResult]) -> None:
    result = trial_of("naive")
    assert result.tables["control"].num_rows == 0
    assert result.manifest["control"]["rows"] == 0 and "stateless" in result.manifest["control"]["reason"]


def test_windows_of_the_control_run_before_and_after_their_steps_in_turn(
    cell_of: Callable[..., dict[str, Any]], place: Paths, tmp_path: Path
) -> None:
    longer = cell_of("local")["phase_spec"] | {"steps": 16, "requests": 1}
    compute_reference(cell_of("local", phase_spec=longer), place, tmp_path / "reference.npz")
    result = measure_trial(cell_of("remote_cache", phase_spec=longer), place, tmp_path / "reference.npz")
    begins = {row["step"]: row["begin_s"] for row in _steps(result) if row["measured"]}
    windows: dict[int, list[dict[str, Any]]] = {}
    for row in result.tables["control"].to_pylist():
        windows.setdefault(row["window"], []).append(row)
    assert [len(rows) for rows in windows.values()] == [4] * 4
    before = [rows[0]["begin_s"] < begins[rows[0]["step"]] for rows in windows.values()]
    after = [rows[0]["begin_s"] > begins[rows[-1]["step"]] for rows in windows.values()]
    assert before in ([True, False] * 2, [False, True] * 2) and after == [not first for first in before]


def test_a_planted_wait_is_in_the_gap_of_each_step_and_not_in_its_compute_or_control(
    cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path
) -> None:
    cell = cell_of("know_loop")
    result = measure_trial(cell | {"policy": cell["policy"] | {"plant_us": 100_000, "max_steps": 2}}, place, reference)
    assert result.manifest["cut"] == {"steps": 2, "phase_steps": STEPS}
    rows, alone = _steps(result), result.tables["control"].to_pylist()
    assert sum(row["latency_s"] - row["worker_compute_s"] for row in rows) > 0.095 * len(rows)
    assert min(row["worker_compute_s"] for row in rows) < 0.1 and min(row["compute_s"] for row in alone) < 0.1  # one of a calm moment


def test_the_codec_time_of_the_steps_is_the_ledgers(trial_of: Callable[[str], TrialResult]) -> None:
    result = trial_of("sys_simulated")
    for side in ("client", "worker"):
        rows = [row for row in result.tables["ledger"].to_pylist() if row["side"] == side and row["kind"] == "regular"]
        in_steps = sum(row[f"{side}_codec_s"] for row in _steps(result) if row["measured"])
        assert in_steps == pytest.approx(1e-9 * sum(row["encode_ns"] + row["decode_ns"] for row in rows)) and in_steps > 0


def test_the_first_token_of_a_frame_has_its_codec_time(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path) -> None:
    cell = cell_of("know_loop")
    measured = [
        row for row in _steps(measure_trial(cell | {"policy": cell["policy"] | {"coalesce": 3}}, place, reference)) if row["measured"]
    ]
    for first, *others in (measured[at : at + 3] for at in range(0, len(measured), 3)):
        for side in ("client", "worker"):
            assert first[f"{side}_codec_s"] > 0 and [row[f"{side}_codec_s"] for row in others] == [0, 0]
        assert all(row["worker_compute_s"] > 0 for row in (first, *others))


def test_samples_of_another_host_are_put_on_the_clients_clock_and_keep_their_columns() -> None:
    schema = pa.schema([pa.field("t_s", pa.float64(), metadata={"meaning": "when"}), ("side", pa.string())], metadata={"a": "b"})
    samples = pa.Table.from_pylist([{"t_s": 1010.0, "side": "worker"}, {"t_s": 1010.5, "side": "worker"}], schema)
    moved = shifted(samples, -1000.0)
    assert moved["t_s"].to_pylist() == [10.0, 10.5]
    assert moved.schema.equals(schema, check_metadata=True)
    assert shifted(samples, 0.0) is samples


@pytest.mark.parametrize("mode", ["local", "remote_cache", "know_loop"])
def test_steps_begin_where_the_client_asked_for_them_on_the_clock_of_the_samples(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    result = trial_of(mode)
    steps = sorted(_steps(result), key=lambda row: (row["request"], row["step"]))
    measured = result.manifest["measured"]
    assert measured["start_s"] <= steps[0]["begin_s"]
    assert steps[-1]["begin_s"] + steps[-1]["latency_s"] <= measured["end_s"]
    for before, after in itertools.pairwise(steps):
        gap_s = after["begin_s"] - before["begin_s"] - before["latency_s"]
        assert gap_s > -1e-6
        if mode == "know_loop" and before["step"] >= 1 and after["step"] > before["step"]:
            assert gap_s < 1e-6  # within a window
    stamps = result.tables["host"]["t_s"].to_pylist()
    assert min(stamps) < steps[-1]["begin_s"] + 1 and max(stamps) > steps[0]["begin_s"] - 1  # a sample each 0.05 s, and few steps


def test_local_moves_no_byte(trial_of: Callable[[str], TrialResult]) -> None:
    result = trial_of("local")
    assert result.tables["ledger"].num_rows == result.tables["tcp"].num_rows == 0
    for row in _steps(result):
        assert not any(value for name, value in row.items() if name.endswith(("_bytes", "_segments")) or name == "round_trips")


def test_remote_cache_moves_tokens_up_and_raw_logits_down(trial_of: Callable[[str], TrialResult]) -> None:
    for row in _steps(trial_of("remote_cache")):
        n = row["tokens_in"]
        assert row["up_payload_bytes"] == row["up_tensor_bytes"] == 8 * n
        assert row["down_payload_bytes"] == row["down_tensor_bytes"] == VOCAB * 4 * n
        assert 28 < row["up_frame_bytes"] - row["up_payload_bytes"] < 64
        assert 28 < row["down_frame_bytes"] - row["down_payload_bytes"] < 64
        assert row["round_trips"] == 1


def test_naive_moves_the_weights_and_the_filled_cache_every_step(trial_of: Callable[[str], TrialResult], llama: Path) -> None:
    weights = sum(tensor.nbytes for tensor in load_digest(llama).tensors)
    for row in _steps(trial_of("naive")):
        n, position = row["tokens_in"], row["position"]
        assert row["up_payload_bytes"] == weights + 8 * n + _kv_bytes(position)
        assert row["down_payload_bytes"] == VOCAB * 4 * n + _kv_bytes(position + n)
    assert _kind_bytes(trial_of("naive"), "weights", "setup") == weights * (1 + 2 + REQUESTS)


def _kind_bytes(result: TrialResult, tensor_class: str, kind: str) -> int:
    rows = result.tables["ledger"].to_pylist()
    return sum(r["payload_bytes"] for r in rows if (r["side"], r["tensor_class"], r["kind"]) == ("client", tensor_class, kind))


def test_sys_simulated_moves_zlib_of_the_cast_and_is_fed_the_references_tokens(
    trial_of: Callable[[str], TrialResult], reference: Path
) -> None:
    local = Logits.read(reference)
    measured = [row for row in _steps(trial_of("sys_simulated")) if row["measured"]]
    expected = [zlib.compress(local.last_logits[r, s].astype(np.float16).tobytes()) for r in range(REQUESTS) for s in range(1, STEPS + 1)]
    assert [row["down_payload_bytes"] for row in measured] == [len(payload) for payload in expected]
    fed = [int(local.tokens[r, s - 1]) for r in range(REQUESTS) for s in range(1, STEPS + 1)]
    assert [row["up_payload_bytes"] for row in measured] == [len(zlib.compress(np.int64(token).tobytes())) for token in fed]
    assert all(row["down_tensor_bytes"] == VOCAB * 4 for row in measured)
    summary = trial_of("sys_simulated").manifest["exactness"]
    assert not summary["logits_bitwise"] and summary["max_abs_diff"] > 0


@pytest.mark.parametrize("mode", MODES[1:])
def test_both_ledgers_the_steps_and_the_kernel_agree_to_the_byte(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    result = trial_of(mode)
    rows = result.tables["ledger"].to_pylist()
    for direction in ("up", "down"):
        measured = sum(row[f"{direction}_frame_bytes"] for row in _steps(result) if row["measured"])
        for side in ("client", "worker"):
            mine = [row for row in rows if (row["side"], row["direction"], row["link"]) == (side, direction, "network")]
            assert sum(row["payload_bytes"] + row["header_bytes"] for row in mine if row["kind"] == "regular") == measured
    up = sum(r["payload_bytes"] + r["header_bytes"] for r in rows if (r["side"], r["direction"]) == ("client", "up"))
    ends = {(row["side"], row["moment"]): row for row in result.tables["tcp"].to_pylist()}
    assert set(ends) == {("client", "start"), ("client", "end"), ("worker", "end")}
    assert ends["client", "end"]["bytes_sent"] - ends["client", "end"]["bytes_retrans"] == up == ends["worker", "end"]["bytes_received"]
    assert result.manifest["reconciliation"]["agreed"] is True
    assert result.manifest["reconciliation"]["frame_bytes_by_kind"]["delta"] == 0
    assert {row["kind"] for row in rows} == {"setup", "regular"}


@pytest.mark.parametrize("mode", ["naive", "remote_cache"])
def test_exact_modes_give_locals_tokens_and_logits(trial_of: Callable[[str], TrialResult], mode: str) -> None:
    for row in _steps(trial_of(mode)):
        if not row["warmup"]:
            assert row["token"] == row["reference_token"] and row["token_match"] and row["logits_bitwise"]
            assert row["logits_max_abs_diff"] == row["kl_nats"] == 0.0


def write_sealed(file: Path, **arrays: np.ndarray) -> None:
    np.savez(file, allow_pickle=False, **arrays)
    write_sealed_npz(file, file)


def test_a_reference_that_was_altered_is_refused_before_anything_starts(
    cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path, tmp_path: Path
) -> None:
    with np.load(reference) as arrays:
        np.savez(tmp_path / "other.npz", allow_pickle=False, **{**arrays, "tokens": arrays["tokens"] + 1})
    for measure in (
        lambda: measure_trial(cell_of("local"), place, tmp_path / "other.npz"),
        lambda: check_exactness.check_exactness(cell_of("local"), place, reference, tmp_path / "other.npz"),
    ):
        with pytest.raises(
            SealError, match=r"other\.npz is not as it was written: it holds 0 seals instead of one; delete it and run snake"
        ):
            measure()


def test_a_broken_promise_fails_the_trial(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path, tmp_path: Path) -> None:
    local = Logits.read(reference)
    digests = local.digests.copy()
    digests[1, 2] ^= np.uint64(1)
    write_sealed(tmp_path / "other.npz", tokens=local.tokens, digests=digests, last_logits=local.last_logits)
    with pytest.raises(BrokenPromise, match="mode 'local' says keeps: bitwise, but 8 of 8 tokens"):
        measure_trial(cell_of("local"), place, tmp_path / "other.npz")


def test_a_session_before_the_last_that_breaks_the_promise_fails_the_trial_by_its_number(
    cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path, tmp_path: Path
) -> None:
    local = Logits.read(reference)
    cell = cell_of("remote_cache")
    cell["phase_spec"]["sessions"] = 2
    write_sealed(tmp_path / "other.npz", tokens=local.tokens + 1)
    with pytest.raises(BrokenPromise, match="mode 'remote_cache' in session 1 of 2 says keeps: bitwise, but 0 of 8 tokens"):
        measure_trial(cell, place, tmp_path / "other.npz")
    result = measure_trial(cell, place, reference)
    assert result.manifest["exactness"]["promise_kept"] and len(result.manifest["setup"]["weights_bytes_by_session"]) == 2


def test_a_promise_broken_in_the_first_session_alone_is_broken() -> None:
    good = exactness.compare(Logits(np.zeros((1, 3), np.int64)), Logits(np.zeros((1, 3), np.int64)), whole=False)
    bad = exactness.compare(Logits(np.zeros((1, 3), np.int64)), Logits(np.array([[0, 7, 0]])), whole=False)
    cell = Cell(device="cpu", threads=1, cpus=Cpus(), mode="m", policy=Policy(keeps="tokens"))
    with pytest.raises(BrokenPromise, match="mode 'm' in session 1 of 2 says keeps: tokens, but 2 of 3"):
        require_promise_of_each_session([bad, good], cell)


def test_a_worker_that_dies_while_loading_fails_the_trial_with_its_last_words(
    cell_of: Callable[..., dict[str, Any]],
    place: Paths,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    started_anew: None,
) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError('libgpu.so.7 is from another age')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(TrialError, match=r"the worker died while it started \(exit 1\): ImportError: libgpu.so.7 is from"):
        measure_trial(cell_of("remote_cache"), place, reference)


def test_a_worker_whose_port_is_taken_fails_the_trial_by_its_address(
    cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        cell = cell_of("remote_cache")
        cell["worker"]["address"] = address
        with pytest.raises(TrialError, match=f"(?s)the worker died.*address {address} is taken by another process"):
            measure_trial(cell, place, reference)


def test_weights_go_up_in_the_first_trial_and_the_next_ones_fresh_worker_has_them_and_both_manifests_say_so(
    cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path, llama: Path, tmp_path: Path
) -> None:
    cell = cell_of("remote_cache")
    cell["policy"]["weights"], cell["worker"]["weight_cache"] = "by_hash", str(tmp_path / "cache")
    whole = sum(tensor.nbytes for tensor in load_digest(llama).tensors)
    manifests = [measure_trial(cell, place, reference).manifest for _ in range(2)]
    setups = [manifest["setup"] for manifest in manifests]
    sent = [(setup["weights_bytes"], setup["weights_held_bytes"]) for setup in setups]
    again = manifests[0]["earlier_faults"]  # measured again, it finds what its first run left
    assert sent == [(0, whole) if again else (whole, 0), (0, whole)]
    assert again or 0 < setups[0]["weights_put_s"] < setups[0]["weights_upload_s"]
    assert setups[1]["weights_held_bytes_by_session"] == [whole] and setups[1]["weights_bytes_by_session"] == [0]


def test_cores_that_do_not_exist_are_named(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path) -> None:
    with pytest.raises(TrialError, match=r"config.cpus: cores \[4095\] are not among this process's"):
        measure_trial(cell_of("remote_cache", cpus={"worker": [4095], "client": None}), place, reference)


def test_a_max_length_beyond_the_models_context_is_refused(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path) -> None:
    with pytest.raises(TrialError, match=r"config\.max_length 129 is more than the context of model 'llama', 128 positions"):
        measure_trial(cell_of("local", max_length=129), place, reference)


def test_a_max_length_beyond_the_models_window_is_refused(
    cell_of: Callable[..., dict[str, Any]], model_of: Callable[..., Path], reference: Path
) -> None:
    with pytest.raises(TrialError, match=r"model 'mistral': max_length 101 is more than the model's 100 positions beyond which its layers"):
        measure_trial(cell_of("local", max_length=101), Paths(model_of("mistral"), ROOT), reference)


@pytest.mark.parametrize("mode", ["local", "remote_cache"])
def test_a_model_that_does_not_fit_is_refused_before_its_file_is_read_or_a_worker_started(
    cell_of: Callable[..., dict[str, Any]], llama: Path, reference: Path, tmp_path: Path, mode: str
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 << 30}))  # its hash is not looked at any more
    before = psutil.Process().children()
    with pytest.raises(
        TrialError, match=r"weights need [\d,]+ bytes, its KV memory 70,368,744,177,664 and .*, and device cpu has [\d,]+ free"
    ):
        measure_trial(cell_of(mode), Paths(tmp_path / "model", ROOT), reference)
    assert psutil.Process().children() == before


def test_a_model_of_another_dtype_is_refused(cell_of: Callable[..., dict[str, Any]], place: Paths, reference: Path) -> None:
    with pytest.raises(TrialError, match="holds float32, the config says dtype: bfloat16"):
        measure_trial(cell_of("local", dtype="bfloat16"), place, reference)


def test_a_damaged_model_file_is_named_with_both_digests(
    cell_of: Callable[..., dict[str, Any]], llama: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        ModelFileError, match=f"{weights} is damaged: expected xxh3-128 {load_digest(llama).xxh3_128}, found [0-9a-f]{{32}}"
    ):
        measure_trial(cell_of("local"), Paths(tmp_path / "model", ROOT), reference)
    weights.unlink()
    with pytest.raises(ModelFileError, match=f"{weights} is missing"):
        measure_trial(cell_of("local"), Paths(tmp_path / "model", ROOT), reference)


def test_one_trial_measures_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    began = threading.Event()

    def second() -> None:
        with measuring():
            began.set()

    with measuring():
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not began.wait(0.4)
    assert began.wait(5)
    waiting.join()
    assert "another trial measures on this machine" in capsys.readouterr().err


DRIVER = """
import json, sys
from pathlib import Path
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_setup import Paths
from semgap.processes import machine
machine.LOCK = Path(sys.argv[1]) / "lock"
cell = json.loads((Path(sys.argv[1]) / "cell.json").read_text())
measure_trial(cell, Paths(Path(sys.argv[2]), Path(sys.argv[3])), Path(sys.argv[4]))
"""


@pytest.fixture
def long_trial(
    cell_of: Callable[..., dict[str, Any]], llama: Path, reference: Path, tmp_path: Path, wait_until: Wait, started_anew: None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, list[psutil.Process]]]]:
    """A long trial in a process of its own, once its client measures; and its descendants by what they are."""
    cell = cell_of("remote_cache")
    cell["phase_spec"]["requests"] = 5_000
    (tmp_path / "cell.json").write_text(json.dumps(cell))
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(llama), str(ROOT), str(reference)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until(lambda: len(_by_role(process.pid).get("sampler", [])) == 2, "the trial measures", 60)
        yield process, _by_role(process.pid)
    finally:
        process.kill()
        process.communicate()


def _by_role(pid: int) -> dict[str, list[psutil.Process]]:
    """Descendants of a trial by what they are; both the listening worker and its session are 'worker'."""
    found: dict[str, list[psutil.Process]] = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        role = next((role for role, sign in SIGNS.items() if sign in words), "other")
        found.setdefault(role, []).append(child)
    return found


SIGNS = {"sampler": "semgap.telemetry.sampler_process", "client": "semgap.client.measure", "worker": "semgap serve"}


def _all_gone(roles: dict[str, list[psutil.Process]]) -> bool:
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for children in roles.values() for child in children)


def test_a_killed_trial_leaves_no_process_and_the_next_start_removes_its_files(
    long_trial: tuple[subprocess.Popen[str], dict[str, list[psutil.Process]]], wait_until: Wait
) -> None:
    process, roles = long_trial
    assert {role: len(children) for role, children in roles.items()} == {"sampler": 2, "client": 1, "worker": 2}
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: _all_gone(roles), "all of the trial's processes end", 5)
    pids = [process.pid, *(worker.pid for worker in roles["worker"])]
    left = [path for pid in pids for path in Path(tempfile.gettempdir()).glob(f"semgap-*-{pid}-*")]
    assert sorted(path.name.split("-")[1] for path in left) == ["telemetry", "trial"]
    assert any((path / "secret").exists() for path in left)
    sweep()  # as every trial does at its start
    assert not any(path.exists() for path in left)


def test_a_killed_client_fails_the_trial_which_takes_everything_along(
    long_trial: tuple[subprocess.Popen[str], dict[str, list[psutil.Process]]],
) -> None:
    process, roles = long_trial
    roles["client"][0].kill()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "TrialError: the client failed (exit -9): its log is empty" in said
    assert _all_gone(roles)


def test_exactness_is_measured_apart_from_any_trial(
    cell_of: Callable[..., dict[str, Any]], llama: Path, tmp_path: Path, config: Config
) -> None:
    place = Paths(llama, ROOT)
    drawn, text = tmp_path / "drawn.npz", tmp_path / "text.npz"
    compute_exactness_reference.compute_exactness_reference(config.exactness_reference_cell("tiny"), place, drawn, text)
    results = {
        mode: check_exactness.check_exactness(config.exactness_cell("tiny", mode), place, drawn, text)
        for mode in ("know_layout", "sys_simulated", "know_loop")
    }
    local = check_exactness.check_exactness(config.exactness_cell("tiny", "local"), place, drawn, text)  # against transformers
    assert local["keeps"] == "tokens" and local["tokens_equal"] + local["edge_draws"] >= local["tokens_compared"] > 0
    assert not local["text_logits_bitwise"] and 0 < local["text_max_abs_diff"] < 1e-4
    with np.load(text) as arrays:
        write_sealed(tmp_path / "other.npz", **{**arrays, "last_logits": arrays["last_logits"] + np.float32(0.01)})
    with pytest.raises(exactness.BrokenPromise, match="the executor's logits differ from transformers' by up to"):
        check_exactness.check_exactness(config.exactness_cell("tiny", "local"), place, drawn, tmp_path / "other.npz")
    short = config.exactness_cell("tiny", "naive")
    cut = check_exactness.check_exactness(short | {"policy": short["policy"] | {"max_steps": 2}}, place, drawn, text)
    assert cut["text_cross_entropy_nats"] == cut["text_reference_cross_entropy_nats"]
    assert all(result["tokens_compared"] == result["tokens_equal"] == 12 for result in results.values())
    exact, cast, loop = results.values()
    assert exact["text_logits_bitwise"] and exact["text_max_kl_nats"] == 0
    assert exact["text_cross_entropy_nats"] == exact["text_reference_cross_entropy_nats"] > 0
    assert not cast["text_logits_bitwise"] and 0 < cast["text_max_abs_diff"] < 0.01
    assert loop["text_cross_entropy_nats"] is None and loop["text_reason"] == "the client sees tokens, no logits"


def test_a_lossy_mode_leaves_the_path_where_ties_said_that_it_would(place: Paths, tmp_path: Path, config: Config) -> None:
    longer = Config({**config.values, "exactness": config["exactness"] | {"tokens": 56}}, ROOT)
    affinity = os.sched_getaffinity(0)
    try:
        found = dict(ties(longer.exactness_reference_cell("tiny"), place))
    finally:
        os.sched_setaffinity(0, affinity)
    assert list(found) == list(range(len(load_passages(ROOT / config["prompts"]))))
    passage, departure = next((passage, departure) for passage, departure in found.items() if departure)
    chosen = longer["exactness"] | {"prompts": 1, "passages": [passage]}
    there = Config({**config.values, "exactness": chosen}, ROOT)
    drawn, text = tmp_path / "drawn.npz", tmp_path / "text.npz"
    compute_exactness_reference.compute_exactness_reference(there.exactness_reference_cell("tiny"), place, drawn, text)
    result = check_exactness.check_exactness(there.exactness_cell("tiny", "sys_simulated"), place, drawn, text)
    assert result["first_difference"] == departure.step and result["tokens_equal"] < result["tokens_compared"]
    with np.load(drawn) as reference:
        assert reference["tokens"][0, departure.step] == departure.token != departure.fp16_token
    assert 0 <= departure.margin < 1e-2


def test_the_first_departure_is_the_first_row_whose_greedy_token_changes_in_fp16() -> None:
    rows = np.zeros((3, 4), np.float32)
    rows[:, 2] = [9.0, 9.001, 9.001]
    rows[1:, 1] = 9.0  # equal to 9.001 in float16, and the lower id
    assert first_departure(rows) == Departure(1, 2, 1, pytest.approx(0.001, rel=1e-3))
    assert first_departure(rows[:1]) is None


def test_departures_are_of_greedy_decoding_alone(place: Paths, config: Config) -> None:
    cell = config.exactness_reference_cell("tiny")
    with pytest.raises(ConfigError, match=r"sampling.rule.kind is 'sample'; a departure is one of greedy decoding"):
        next(ties(cell | {"sampling": {"rule": {"kind": "sample"}, "seed": 0}}, place))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and what is tested is that it has none")
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"codec": {"reply": "nvcomp_ans"}}, "codec.reply 'nvcomp_ans' cannot be encoded or decoded by the client"),
        ({"codec": {"weights": "nvcomp_ans"}}, "codec.weights 'nvcomp_ans' cannot be encoded or decoded by the client"),
        ({"codec": {"kv": "nvcomp_ans"}, "kv_cache": "every_step"}, "codec.kv 'nvcomp_ans' cannot be encoded or decoded by the client"),
        ({"codec": {"kv": "nvcomp_ans"}, "recovery": "delta"}, "codec.kv 'nvcomp_ans' cannot be encoded or decoded by the worker"),
    ],
)
def test_a_codec_that_an_end_on_this_machine_lacks_is_refused_before_anything_is_read_or_started(
    cell_of: Callable[..., dict[str, Any]], row: dict, said: str
) -> None:
    cell, nowhere = cell_of("remote_cache", policy=row) | {"mode": "mine"}, Path("/nowhere")
    with pytest.raises(TrialError, match=f"mode 'mine' cannot be run on this machine: {said}: there is no usable GPU"):
        measure_trial(cell, Paths(nowhere, nowhere), nowhere)
