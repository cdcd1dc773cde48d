"""Steps that miss KV blocks, over an emulated link of 1 Gbit and 1 ms between worker and KV host: what `delta` costs beside `reload`.

`python benchmarks/bench_recovery.py --repeats 3` prints these lines alone; `make bench` prints them too. Sessions take turns, step by step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
from bench_executor import MODEL, Promise, print_ratios
from bench_prefix import opened, prompts, worker_over

from semgap.client.pressure import layers_to_evict
from semgap.client.remote_runtime import RemoteRuntime
from semgap.engine.model_files import ModelFiles, load_digest
from semgap.network.spec import Network
from semgap.policy import CodecChoice, Policy, Reply
from semgap.processes import machine
from semgap.wire.messages import Kind
from semgap.wire.reconcile import reconcile

LINK = Network("relay", rtt_ms=1, rate="1Gbit")
FRACTIONS = {"1/8": 1 / 8, "1/4": 1 / 4}
PROMPT = 128  # tokens, as in the recovery phases of the default run
MISSES = 12  # of a session, a fraction and a repeat
WARM_UP = 2
POLICIES = {
    "reload": Policy(weights="by_hash", reply=Reply("logits_last"), recovery="reload", shadow="kvhost"),
    "delta": Policy(weights="by_hash", reply=Reply("logits_last"), recovery="delta", shadow="kvhost"),
    "planes": Policy(weights="by_hash", reply=Reply("logits_last"), recovery="delta", shadow="kvhost", codec=CodecChoice(kv="planes_zstd")),
}
PROMISES = {
    "delta": Promise("step longer by a miss of 1/8, delta / reload, KV over 1 Gbit and 1 ms", 0.2),
    "planes": Promise("step longer by a miss of 1/8, delta in planes_zstd / reload, KV over 1 Gbit and 1 ms", 0.2),
    **{f"hidden {name}": Promise(f"1 - wait / restore alone, miss of {name}, KV over 1 Gbit and 1 ms", 0.5, True) for name in FRACTIONS},
    "bytes": Promise("delta, bytes fetched / missing bytes, KV over 1 Gbit and 1 ms", 1.01),
}


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with machine.measuring():
        print_ratios(recovery_ratios(options.repeats), PROMISES)


def recovery_ratios(repeats: int) -> dict[str, list[float]]:
    """A ratio for each of PROMISES and repeat, which has processes of its own."""
    found: dict[str, list[float]] = {name: [] for name in PROMISES}
    model = ModelFiles(MODEL, load_digest(MODEL))
    for repeat in range(repeats):
        print(f"recovery over a relay: repeat {repeat + 1} of {repeats}", file=sys.stderr, flush=True)
        with worker_over(LINK) as address:
            runtimes = {name: opened(address, model, policy, name) for name, policy in POLICIES.items()}
            prompt, layers = prompts()[0][:PROMPT], model.architecture.layers
            missed = {name: interleaved_misses(layers, runtimes, prompt, fraction, MISSES) for name, fraction in FRACTIONS.items()}
            eighth_s = {name: statistics.median(each.longer_s) for name, each in missed["1/8"].items()}
            for name in ("delta", "planes"):
                found[name].append(eighth_s[name] / eighth_s["reload"])
            restored = [step["recovered"] for step in reconcile(runtimes["delta"].link)["peer"]["steps"] if step["recovered"]]
            for at, (name, each) in enumerate(missed.items()):
                begin = at * (WARM_UP + MISSES) + WARM_UP
                waited_s = statistics.median(step["stall_ns"] / 1e9 for step in restored[begin : begin + MISSES])
                found[f"hidden {name}"].append(1 - waited_s / statistics.median(each["delta"].alone_s))
            found["bytes"].append(sum(each["fetched_network_bytes"] for each in restored) / sum(each["missing_bytes"] for each in restored))
            for runtime in runtimes.values():
                runtime.link.close()
    return found


@dataclass
class Misses:
    """Of one session's steps that miss blocks: the seconds by which each is longer than the mean of its two neighbours, which miss none,
    and those of the same restore alone before it. And the bytes that were saved when clean blocks were evicted.
    """

    longer_s: list[float]
    alone_s: list[float]
    saved_clean_bytes: int


def interleaved_misses(
    layers: int, runtimes: dict[str, RemoteRuntime], prompt: np.ndarray, fraction: float, count: int
) -> dict[str, Misses]:
    """Runs `count` steps of each session that miss this fraction of the layers, after WARM_UP others. Sessions take turns, step by step.

    All steps follow the same evictions and restores, so that no difference comes from processors' caches. SystemExit for different
    tokens.
    """
    token = {name: runtime.prefill(prompt, 0, Kind.SETUP).tokens[0] for name, runtime in runtimes.items()}
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    alone: dict[str, list[float]] = {name: [] for name in runtimes}
    saved_clean, names = dict.fromkeys(runtimes, 0), list(runtimes)
    steps = 2 * (WARM_UP + count) + 1
    for step in range(steps):
        chosen, misses = layers_to_evict(layers, fraction, step // 2), step % 2
        for name in names:
            runtime = runtimes[name]
            runtime.evict(chosen)
            alone[name].append(runtime.restore())
            saved_clean[name] += runtime.evict(chosen).saved_payload_bytes
            if not misses:
                runtime.restore()
            begin = time.perf_counter()
            (arrival,) = runtime.decode(token[name], 1, Kind.REGULAR)
            times[name].append(time.perf_counter() - begin)
            token[name] = arrival.tokens[0]
        names = names[1:] + names[:1]
    for runtime in runtimes.values():
        runtime.end_request()
    if len(set(token.values())) != 1:
        raise SystemExit(f"the sessions drew different tokens: {token}")
    missing = range(2 * WARM_UP + 1, steps, 2)
    longer = {name: [took[at] - (took[at - 1] + took[at + 1]) / 2 for at in missing] for name, took in times.items()}
    return {name: Misses(longer[name], [alone[name][at] for at in missing], saved_clean[name]) for name in runtimes}


if __name__ == "__main__":
    main()
