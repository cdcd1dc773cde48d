"""The default config's model, real weights and all, through the workflow: the figures that the whole project rests on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from clone import REPOSITORY, SNAKEMAKE, Clone, environment

MODES = ("local", "naive", "remote_cache", "remote_cache_fp16", "sys_simulated", "know_head", "know_consumer", "know_loop")
WEIGHTS_BYTES = 538_060_032  # SmolLM2-135M in float32, tied embeddings once
LOGITS_BYTES = 49_152 * 4
KV_BYTES_PER_POSITION = 30 * 2 * 3 * 64 * 4
PROMPT, REQUESTS, STEPS, NAIVE_STEPS = 32, 4, 8, 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """One decode trial of each mode; the model is taken over from the repository where it was fetched before."""
    clone = Clone.of_repository(tmp_path_factory.mktemp("default") / "clone")
    fetched = REPOSITORY / "resources/models/smollm2-135m"
    if (fetched / "digest.json").exists():
        (clone.root / "resources/models").mkdir()
        (clone.root / "resources/models/smollm2-135m").symlink_to(fetched)
    command = [SNAKEMAKE, "--cores", "1", "--config", f"modes={','.join(MODES)}", "phases=decode", "networks=loopback", "trials=1"]
    command += ["--", "results/results.csv"]
    done = subprocess.run(command, cwd=clone.root, env=environment(), text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return clone


def _trial(run: Clone, mode: str) -> Path:
    return run.root / f"results/trials/model=smollm2-135m/network=loopback/mode={mode}/phase=decode/trial=1"


def _regular(run: Clone, mode: str) -> pd.DataFrame:
    ledger = pq.read_table(_trial(run, mode) / "ledger.parquet").to_pandas()
    return ledger[(ledger["side"] == "client") & (ledger["kind"] == "regular")].set_index(["direction", "tensor_class"])


def _results(run: Clone) -> pd.DataFrame:
    return pd.read_csv(run.root / "results/results.csv").set_index("mode")


def test_local_moves_no_byte_and_has_no_ledger(run: Clone) -> None:
    assert _results(run).loc["local", ["tensor_bytes_per_token", "payload_bytes_per_token", "wire_bytes_per_token"]].eq(0).all()
    assert pq.read_table(_trial(run, "local") / "ledger.parquet").num_rows == 0


def test_naive_ships_weights_and_the_filled_cache_at_every_step(run: Clone) -> None:
    rows = _regular(run, "naive")
    filled = [PROMPT + step for step in range(NAIVE_STEPS)] * REQUESTS
    assert rows.loc[("up", "weights"), "payload_bytes"] == len(filled) * WEIGHTS_BYTES
    assert rows.loc[("up", "kv"), "payload_bytes"] == sum(filled) * KV_BYTES_PER_POSITION
    assert rows.loc[("down", "kv"), "payload_bytes"] == sum(n + 1 for n in filled) * KV_BYTES_PER_POSITION
    assert _results(run).loc["naive", "payload_bytes_per_token"] > 500e6


def test_remote_cache_brings_back_one_row_of_raw_logits_a_step(run: Clone) -> None:
    rows = _regular(run, "remote_cache")
    assert rows.loc[("down", "logits"), "payload_bytes"] == REQUESTS * STEPS * LOGITS_BYTES
    assert rows.loc[("up", "tokens"), "payload_bytes"] == REQUESTS * STEPS * 8
    assert rows.loc[[("up", "header"), ("down", "header")], "header_bytes"].sum() / (REQUESTS * STEPS) < 100


def test_the_cast_halves_the_logits_and_zlib_takes_a_little_more(run: Clone) -> None:
    cast = _regular(run, "remote_cache_fp16").loc[("down", "logits"), "payload_bytes"]
    both = _regular(run, "sys_simulated").loc[("down", "logits"), "payload_bytes"]
    assert cast == REQUESTS * STEPS * LOGITS_BYTES // 2
    assert 0.7 < both / cast < 0.98


def test_what_is_known_of_head_consumer_and_loop_is_worth_what_the_ladder_says(run: Clone) -> None:
    payload = _results(run)["payload_bytes_per_token"]
    assert payload["know_head"] <= payload["sys_simulated"] / 30
    assert payload["know_consumer"] <= 96
    assert payload["know_loop"] <= 40


@pytest.mark.parametrize("mode", ["local", "naive", "remote_cache", "know_head"])
def test_exact_modes_give_bitwise_the_logits_of_local(run: Clone, mode: str) -> None:
    row = _results(run).loc[mode]
    assert bool(row["logits_bitwise"])
    assert row["tokens_equal"] == row["tokens_compared"] == REQUESTS * ((NAIVE_STEPS if mode == "naive" else STEPS) + 1)
