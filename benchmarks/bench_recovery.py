"""Steps that miss KV blocks, over an emulated link of 1 Gbit and 1 ms between worker and KV host: what `delta` costs beside `reload`.

`python benchmarks/bench_recovery.py --repeats 3` prints these lines alone; `make bench` prints them too. Sessions take turns, step by step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

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
MISSES = 12  # of a session, a fraction and a repeat; two more warm up
ODD = MISSES + 2
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
            longer = {name: _longer(model.architecture.layers, runtimes, fraction) for name, fraction in FRACTIONS.items()}
            eighth_s = {name: step_s for name, (step_s, _) in longer["1/8"].items()}
            for name in ("delta", "planes"):
                found[name].append(eighth_s[name] / eighth_s["reload"])
            restored = [step["recovered"] for step in reconcile(runtimes["delta"].link)["peer"]["steps"] if step["recovered"]]
            for at, (name, each) in enumerate(longer.items()):
                steps = restored[at * ODD : (at + 1) * ODD]
                found[f"hidden {name}"].append(1 - statistics.median(step["stall_ns"] for step in steps) / 1e9 / each["delta"][1])
            found["bytes"].append(sum(each["fetched_network_bytes"] for each in restored) / sum(each["missing_bytes"] for each in restored))
            for runtime in runtimes.values():
                runtime.link.close()
    return found


def _longer(layers: int, runtimes: dict[str, RemoteRuntime], fraction: float) -> dict[str, tuple[float, float]]:
    """By session: the median of the seconds that a step which misses so many of the layers takes longer than the steps before and after it,
    which miss none; and of its restore alone. All steps follow the same evictions and restores. SystemExit for different tokens."""
    prompt = prompts()[0][:PROMPT]
    token = {name: runtime.prefill(prompt, 0, Kind.SETUP).tokens[0] for name, runtime in runtimes.items()}
    times: dict[str, list[float]] = {name: [] for name in runtimes}
    alone: dict[str, list[float]] = {name: [] for name in runtimes}
    names = list(runtimes)
    for step in range(2 * ODD + 1):
        chosen, misses = layers_to_evict(layers, fraction, step // 2), step % 2
        for name in names:
            runtime = runtimes[name]
            runtime.evict(chosen)
            alone[name].append(runtime.restore())
            runtime.evict(chosen)
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
    missing = range(5, 2 * ODD, 2)  # the first ones warm up
    longer = {name: statistics.median(took[at] - (took[at - 1] + took[at + 1]) / 2 for at in missing) for name, took in times.items()}
    return {name: (longer[name], statistics.median(alone[name][at] for at in missing)) for name in runtimes}


if __name__ == "__main__":
    main()
