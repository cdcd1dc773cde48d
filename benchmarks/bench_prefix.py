"""Requests whose first 256 tokens another session has computed, over emulated links between worker and KV host: ratios of TTFT.

`python benchmarks/bench_prefix.py --repeats 3` prints these lines alone; `make bench` prints them too. Sessions take turns: each request is
run by all of them, in a random order.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from bench_executor import MODEL, Promise, print_ratios

from semgap.client.prompts import load_passages, make_prompt
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.trial_processes import running
from semgap.experiment.trial_relay import relay_command
from semgap.network.spec import Network
from semgap.policy import CodecChoice, Policy, Reply, SessionSpec
from semgap.processes import machine
from semgap.wire import frames
from semgap.wire.handshake import shake_hands_as_client
from semgap.wire.link import connect
from semgap.wire.messages import Kind
from semgap.wire.reconcile import reconcile

ROOT = Path(__file__).resolve().parents[1]
CORES = sorted(os.sched_getaffinity(0))
THIN, COMPUTING = CORES[0], CORES[-1]
PREFIX, REST, TEXTS = 256, 16, 6
RATES = ("100Mbit", "1Gbit", "4Gbit")


def _mode(prefix: str, kv: str = "raw") -> Policy:
    shadow = "worker" if prefix == "recompute" else "kvhost"
    codec = CodecChoice(kv=kv)
    return Policy(weights="by_hash", reply=Reply("logits_last"), prefix=prefix, shadow=shadow, codec=codec)  # type: ignore[arg-type]


MODES = {
    "recompute": _mode("recompute"),
    "whole": _mode("fetch_whole"),
    "blocks": _mode("fetch_blocks"),
    "planes": _mode("fetch_blocks", "planes_zstd"),
    "auto": _mode("auto"),
}
PROMISES = {
    "blocks 1Gbit": Promise("TTFT, prefix of 256, fetch_blocks / recompute, 1Gbit", 0.5),
    "planes 1Gbit": Promise("TTFT, prefix of 256, planes_zstd / recompute, 1Gbit", 0.5),
    "whole 1Gbit": Promise("TTFT, prefix of 256, fetch_blocks / whole, 1Gbit", 1.0),
    **{f"auto {rate}": Promise(f"TTFT, prefix of 256, auto / the better way, {rate}", 1.1) for rate in RATES},
    "bytes": Promise("bytes fetched / missing bytes, prefix of 256, raw", 1.01),
    "bytes planes": Promise("bytes fetched / missing / ratio, planes_zstd", 1.01),
}


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with machine.measuring():
        print_ratios(prefix_ratios(options.repeats), PROMISES)


def prefix_ratios(repeats: int) -> dict[str, list[float]]:
    """A ratio for each of PROMISES and repeat, which has processes of its own."""
    found: dict[str, list[float]] = {name: [] for name in PROMISES}
    for repeat in range(repeats):
        for rate in RATES:
            print(f"prefixes: repeat {repeat + 1} of {repeats}, {rate}", file=sys.stderr, flush=True)
            with worker_over(Network("relay", rtt_ms=1, rate=rate)) as address:
                ttft_s, moved = _measure(address, repeat)
            found[f"auto {rate}"].append(ttft_s["auto"] / min(ttft_s["recompute"], ttft_s["blocks"]))
            if rate == "1Gbit":
                found["blocks 1Gbit"].append(ttft_s["blocks"] / ttft_s["recompute"])
                found["planes 1Gbit"].append(ttft_s["planes"] / ttft_s["recompute"])
                found["whole 1Gbit"].append(ttft_s["blocks"] / ttft_s["whole"])
                found["bytes"].append(moved["blocks"])
                found["bytes planes"].append(moved["planes"])
    return found


def _measure(address: str, repeat: int) -> tuple[dict[str, float], dict[str, float]]:
    """By mode: the median TTFT over the texts, and fetched bytes over missing bytes / ratio of the codec, by the ledger's own payload."""
    model = ModelFiles(MODEL, load_digest(MODEL))
    fetching = [name for name in MODES if name != "recompute"]
    publishers = {name: opened(address, model, MODES[name], name) for name in fetching}
    runtimes = {name: opened(address, model, policy, name) for name, policy in MODES.items()}
    times: dict[str, list[float]] = {name: [] for name in MODES}
    order = random.Random(repeat)
    for number, prompt in enumerate(prompts()):
        for name in fetching if number else ():  # nothing is known of the first text, which warms up
            publishers[name].prefill(prompt[:PREFIX], number, Kind.SETUP)
            publishers[name].publish()
            publishers[name].end_request()
        for name in order.sample(list(MODES), len(MODES)):
            begin = time.perf_counter()
            runtimes[name].prefill(prompt, number, Kind.REGULAR)
            if number:
                times[name].append(time.perf_counter() - begin)
            runtimes[name].end_request()
    moved = {name: _fetched_to_payload(runtimes[name]) for name in ("blocks", "planes")}
    for runtime in (*publishers.values(), *runtimes.values()):
        runtime.link.close()
    return {name: statistics.median(each) for name, each in times.items()}, moved


def prompts() -> list[np.ndarray]:
    """Prompts of PREFIX + REST tokens."""
    from tokenizers import Tokenizer

    tokenizer, passages = Tokenizer.from_file(str(MODEL / "tokenizer.json")), load_passages(ROOT / "resources/prompts/english.txt")
    return [make_prompt(tokenizer, passages, index, PREFIX + REST) for index in range(TEXTS + 1)]


def _fetched_to_payload(runtime: RemoteRuntime) -> float:
    """Bytes of all frames of fetches over the missing tensors / the codec's ratio, which are the payloads of their blocks."""
    peer = reconcile(runtime.link)["peer"]
    payload = sum(
        row["payload_bytes"] for row in peer["kv_host"]["rows"] if row["operation"] == "fetch_prefix" and row["tensor_class"] == "kv"
    )
    fetched: int = sum(step["recovered"]["fetched_network_bytes"] for step in peer["steps"] if step["recovered"]["missing_bytes"])
    return fetched / payload


def opened(address: str, model: ModelFiles, policy: Policy, salt: str) -> RemoteRuntime:
    """A session with the model, from the thin core."""
    os.sched_setaffinity(0, {THIN})
    link = connect(address)
    asked = SessionSpec(policy, model.config, model.digest.dtype, max_length=PREFIX + 64, model_id=model.digest.sha256, salt=salt)
    shake_hands_as_client(link, b"", msgspec.to_builtins(asked))
    link.limits = frames.Limits()
    runtime = RemoteRuntime(link, policy, model, Drawing())
    runtime.upload_weights()
    return runtime


@contextlib.contextmanager
def worker_over(link: Network) -> Iterator[str]:
    """A worker whose KV host lies behind a relay of `link`; gives its address. Only the worker runs on the computing core."""
    python = [sys.executable, "-m", "semgap"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:

        def start(role: str, command: list[str]) -> str:
            return stack.enter_context(running(role, command, Path(scratch) / f"{role}.log", 1, serves=True)).await_address(60)

        parent, thin = ["--parent-pid", str(os.getpid())], ["--cpus", str(THIN)]
        host = start("KV host", [*python, "kvhost", "--budget-bytes", str(2 << 30), *thin, *parent])
        relay = start("relay", relay_command(link, host, (THIN,), Path(scratch) / "relay.json"))
        sessions = ["--max-sessions", str(2 * len(MODES)), "--io-cpus", str(THIN)]
        yield start("worker", [*python, "serve", "--cpus", str(COMPUTING), *sessions, "--kv-host", relay, *parent])


if __name__ == "__main__":
    main()
