"""The wait of steps that miss KV blocks over four links to the KV host, each priced from trials over the others: the median error.

`python benchmarks/bench_kv_price.py --repeats 2` prints these lines alone; `make bench` prints them too. An error is |priced - measured|
as a part of what was measured, of waits above 1 ms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from bench_executor import MODEL, Promise, print_ratios

from semgap.analysis.load import load_trials
from semgap.analysis.restores import restores_held_out
from semgap.analysis.results import Results, load_codecs, load_exactness
from semgap.experiment.compute_reference import compute_reference
from semgap.experiment.config import Config, Coordinates, read_config
from semgap.experiment.measure_trial import measure_trial
from semgap.experiment.trial_setup import Paths

ROOT = Path(__file__).resolve().parents[1]
PHASE = "recovery-evict"
LINKS = {"4gbit_1ms": ("4Gbit", 1), "1gbit_1ms": ("1Gbit", 1), "500mbit_2ms": ("500Mbit", 2), "200mbit_1ms": ("200Mbit", 1)}
TOLERANCE = {"rtt_ms": 0.5, "goodput": 0.5, "lateness_ms": 4}
PROMISES = {
    "remote_cache_reload": Promise("wait over a held-out KV link, priced, reload, median error", 0.1),
    "sys_delta": Promise("wait over a held-out KV link, priced, delta, median error", 0.1),
}


def main() -> None:
    """Prints the lines, and the waits of each repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    print_ratios(kv_price_errors(parser.parse_args().repeats), PROMISES)


def kv_price_errors(repeats: int) -> dict[str, list[float]]:
    """For each of PROMISES and repeat, the median error of the prices. Takes the machine's lock for each trial."""
    config, place = _config(), Paths(MODEL, ROOT)
    model, found = config["models"][0], {mode: list[float]() for mode in PROMISES}
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.npz"
        compute_reference(config.reference_cell(model, PHASE), place, reference)
        for repeat in range(1, repeats + 1):
            expected: dict[str, str] = {}
            for network in config["networks"][:: 1 if repeat % 2 else -1]:
                for mode in PROMISES:
                    print(f"KV prices: repeat {repeat} of {repeats}, {network}, {mode}", file=sys.stderr, flush=True)
                    result = measure_trial(config.cell(Coordinates(model, network, mode, PHASE, repeat)), place, reference)
                    directory = Path(scratch) / f"{network}-{mode}-{repeat}"
                    result.write(directory)
                    expected[str(directory)] = result.manifest["cell_digest"]
            held = _held_out(expected)
            print(held.to_string(index=False, float_format="{:.4f}".format), file=sys.stderr, flush=True)
            for mode, errors in found.items():
                errors.append(statistics.median(held.loc[held["mode"] == mode, "gap_error"].dropna().abs()))
    return found


def _held_out(expected: Mapping[str, str]) -> pd.DataFrame:
    """The held-out prices of written trials, given by directory with their digests."""
    trials = load_trials([Path(name) for name in expected], expected)
    made = Results.of(trials, load_exactness([], {}), load_codecs([], {}), {}).restores
    columns = ["network", "mode", "evict_fraction", "measured_s", "priced_s", "gap_error", "from_networks"]
    return restores_held_out(made)[columns]


def _config() -> Config:
    """The default config's recovery modes over four links to the KV host."""
    links = {name: {"kind": "relay", "rtt_ms": rtt_ms, "rate": rate, "tolerance": TOLERANCE} for name, (rate, rtt_ms) in LINKS.items()}
    networks = {f"kv_{name}": {"kind": "loopback", "kv": name} for name in LINKS}
    modes = {mode: {"networks": list(networks)} for mode in PROMISES}
    own = {"networks": list(networks), "modes": list(PROMISES), "phases": [PHASE], "define": {"networks": links | networks, "modes": modes}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(own, file)
        file.flush()
        return read_config([Path(file.name)], ROOT)


if __name__ == "__main__":
    main()
