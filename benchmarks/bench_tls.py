"""The cost of TLS: steps and an upload with it over those without, in turns, over loopback to two workers on one core.

`python benchmarks/bench_tls.py --rounds 2` prints these lines alone; `make bench` prints them too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import msgspec
from bench_executor import CORES, MODEL, Promise, print_ratios

from semgap.client.prompts import make_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Drawing
from semgap.client.spec import ClientSpec, Phase
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.experiment.config import read_config
from semgap.policy import Policy, SessionSpec, policy_from
from semgap.processes import machine
from semgap.wire import frames
from semgap.wire.handshake import read_secret, shake_hands_as_client, write_secret
from semgap.wire.link import connect
from semgap.wire.messages import Kind

ROOT = Path(__file__).resolve().parents[1]
_PAIRS, _UPLOADS, _PROMPT = 12, 3, 32
PROMISES = {
    "sys": Promise("step of sys (a window of 8), TLS / without", 1.02),
    "remote_cache": Promise("step of remote_cache, TLS / without", 1.05),
    "upload": Promise("upload of all weights, TLS / without", 4.0),
}


def tls_ratios(model: ModelFiles, rounds: int) -> dict[str, list[float]]:
    """A ratio a round for each of PROMISES: of medians of times, with TLS over without. Each round has fresh workers."""
    found: dict[str, list[float]] = {name: [] for name in PROMISES}
    config = read_config([], ROOT)
    for number in range(rounds):
        print(f"tls: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        with _two_workers() as addresses, ExitStack() as stack:
            for mode, count in (("sys", 8), ("remote_cache", 1)):
                policy = msgspec.structs.replace(policy_from(config.policy(mode), mode), weights="by_hash")
                pair = [stack.enter_context(_opened(model, policy, each)) for each in addresses]
                for runtime in pair:
                    runtime.upload_weights()
                found[mode].append(_ratio([_decoding(runtime, policy, count) for runtime in pair], _PAIRS))
            uploads = [stack.enter_context(_opened(model, Policy(), each)) for each in addresses]
            for runtime in uploads:
                runtime.upload_weights()  # into fresh memory
            found["upload"].append(_ratio([partial(_send_all, runtime) for runtime in uploads], _UPLOADS))
    return found


def _send_all(runtime: RemoteRuntime) -> None:
    runtime.send_weights(range(len(runtime.weights)))


def _ratio(works: list[Callable[[], object]], pairs: int) -> float:
    """Median time of the first work over that of the second, in turns; the first turn warms up."""
    times: list[list[float]] = [[], []]
    for turn in range(pairs + 1):
        for at in (0, 1) if turn % 2 else (1, 0):
            begin = time.perf_counter()
            works[at]()
            if turn:
                times[at].append(time.perf_counter() - begin)
    return statistics.median(times[0]) / statistics.median(times[1])


def _decoding(runtime: RemoteRuntime, policy: Policy, count: int) -> Callable[[], object]:
    """Decodes `count` tokens after a prompt, from the same position each time."""
    phase = Phase("decode", (_PROMPT,), steps=count)
    spec = ClientSpec("", str(MODEL), str(ROOT / "resources/prompts/english.txt"), policy, phase, "float32", 1, 256, "cpu")
    prompt = make_prompts(spec)[0][0]
    token = runtime.prefill(prompt, 0, Kind.SETUP).tokens[0]

    def decode() -> None:
        runtime.rewind(len(prompt))
        for _ in runtime.decode(token, count, Kind.REGULAR):
            pass

    return decode


@contextmanager
def _opened(model: ModelFiles, policy: Policy, at: tuple[str, Path, bool]) -> Iterator[RemoteRuntime]:
    address, secret, tls = at
    link = connect(address)
    asked = SessionSpec(policy, model.config, model.digest.dtype, max_length=256, model_id=model.digest.sha256)
    shake_hands_as_client(link, read_secret(secret), msgspec.to_builtins(asked), tls)
    link.limits = frames.Limits()
    try:
        yield RemoteRuntime(link, policy, model, Drawing())
    finally:
        link.close()


@contextmanager
def _two_workers() -> Iterator[list[tuple[str, Path, bool]]]:
    """Two fresh workers on the last core: address, token file, and whether it speaks TLS, first the one that does."""
    os.sched_setaffinity(0, {CORES[0]})
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        secret = Path(scratch) / "secret"
        write_secret(secret)
        found = []
        for tls in (True, False):
            options = ["--secret-file", str(secret), "--cpus", str(CORES[-1]), "--parent-pid", str(os.getpid())]
            options += ["--tls"] if tls else []
            process = subprocess.Popen([sys.executable, "-m", "semgap", "serve", *options], stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            assert process.stdout is not None
            found.append((json.loads(process.stdout.readline())["address"], secret, tls))
        yield found


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with machine.measuring():
        print_ratios(tls_ratios(ModelFiles(MODEL, load_digest(MODEL)), options.rounds), PROMISES)


if __name__ == "__main__":
    main()
