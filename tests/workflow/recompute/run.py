"""A run: the trials of its config, and what two of its modes have to do with each other."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import yaml
from intervals import Row, interval, log_interval
from trials import Trial, results_row

MOVE_KV = ("recovery", "prefix", "handover")


@dataclass(eq=False)
class Run:
    """Trials of the config's grid, without those kept apart, with the config's marks of modes and the other measurements."""

    root: Path  # results/
    config: dict[str, Any]

    @property
    def results(self) -> Path:
        """The directory of this experiment."""
        return self.root / (self.config.get("name") or "")

    def file(self, name: str) -> Path:
        """A file of this experiment, or the equal one of another."""
        places = [self.results / name, self.root / name, *self.root.glob(f"*/{name}")]
        return next((place for place in places if place.exists()), places[0])

    @cached_property
    def shared(self) -> dict[tuple[Any, ...], str]:
        """The directory of each trial that results.csv names: it may be another experiment's."""
        rows = pd.read_csv(self.results / "results.csv", dtype={"model": str, "network": str, "mode": str, "phase": str})
        return {
            tuple(row): name for *row, name in rows[["model", "network", "mode", "phase", "trial", "directory"]].itertuples(index=False)
        }

    @cached_property
    def trials(self) -> list[Trial]:
        """Those of one request at a time."""
        return [trial for trial in self._found if trial.phase_spec["kind"] != "load"]

    @cached_property
    def loads(self) -> list[Trial]:
        return [trial for trial in self._found if trial.phase_spec["kind"] == "load"]

    @cached_property
    def _found(self) -> list[Trial]:
        found = []
        for model, network, mode, phase, number in self.grid():
            at = f"model={model}/network={network}/mode={mode}/phase={phase}/trial={number}"
            directory = self.results / self.shared.get((model, network, mode, phase, number), f"trials/{at}")
            found.append(Trial(directory, json.loads((directory / "manifest.json").read_text())))
        return [trial for trial in found if trial.manifest["apart"] is None]

    def grid(self) -> Iterator[tuple[str, str, str, str, int]]:
        """The cells: rows of modes and phases may name networks, and a mode that names no phases runs in those of kind load if it has
        batching, else in those of kinds prefill and decode. Over a network with kv phases that move KV blocks run alone.
        """
        config, define = self.config, self.config["define"]
        for model, network, mode, phase in itertools.product(*(config[key] for key in ("models", "networks", "modes", "phases"))):
            row, phase_row = define["modes"][mode], define["phases"][phase]
            kinds = ("load",) if row.get("batching") else ("prefill", "decode")
            in_phase = phase in row["phases"] if row.get("phases") else phase_row["kind"] in kinds
            in_phase &= phase_row["kind"] in MOVE_KV or not define["networks"][network].get("kv")
            if in_phase and all(network in self._networks(each) for each in (row, phase_row)):
                numbers = max([config.get("trials", 3), *self._twin_trials(network, mode, phase)])
                yield from ((model, network, mode, phase, number) for number in range(1, numbers + 1))

    def _twin_trials(self, network: str, mode: str, phase: str) -> Iterator[int]:
        """The trials that a twin's row asks for in its phases, if the mode is this twin or the mode that it repeats."""
        modes = self.config["define"]["modes"]
        for name, row in modes.items():
            pair = (name, row.get("twin"))
            if (
                mode in pair
                and set(pair) <= set(self.config["modes"])
                and all(phase in (modes[each].get("phases") or [phase]) for each in pair)
            ):
                yield (row.get("twin_trials") or {}).get(network, 0)

    def _networks(self, row: Mapping[str, Any]) -> list[str]:
        named = [network for network in self.config["networks"] if network in (row.get("networks") or [])]
        return named or self.config["networks"]

    def mark(self, mode: str) -> dict[str, Any]:
        return self.config["define"]["modes"][mode]

    @cached_property
    def rows(self) -> dict[Trial, Row]:
        """The row of results.csv of each trial."""
        return {trial: results_row(trial) for trial in self.trials}

    def column(self, trials: Iterable[Trial], name: str) -> list[Any]:
        return [self.rows[trial][name] for trial in trials]

    @cached_property
    def groups(self) -> dict[tuple[str, str, str], dict[str, list[Trial]]]:
        """Trials by model, network and phase, then by mode. All phases."""
        groups: dict[tuple[str, str, str], dict[str, list[Trial]]] = defaultdict(lambda: defaultdict(list))
        for trial in self.trials:
            groups[trial.model, trial.network, trial.phase][trial.mode].append(trial)
        return groups

    def cells(self, *kinds: str) -> Iterator[tuple[Row, list[Trial], dict[str, list[Trial]]]]:
        """Coordinates, trials, and the trials of all modes of the same model, network and phase."""
        for (model, network, phase), modes in self.groups.items():
            for mode, trials in modes.items():
                if trials[0].phase_spec["kind"] in kinds:
                    yield {"model": model, "network": network, "phase": phase, "mode": mode}, trials, modes

    @cached_property
    def exactness(self) -> list[Row]:
        define = self.config["define"]["modes"]
        checked = [
            m for m in self.config["modes"] if define[m].get("placement") == "local" or define[m].get("keeps", "bitwise") != "bitwise"
        ]
        ran = {trial.mode for trial in self.trials}
        files = [
            (model, mode, self.file(f"exactness/model={model}/mode={mode}.json"))
            for model in self.config["models"]
            for mode in checked
            if mode in ran
        ]
        return [json.loads(path.read_text()) | {"model": model, "mode": mode} for model, mode, path in files]

    @cached_property
    def codecs(self) -> pd.DataFrame:
        files = [self.file(f"codecs/model={model}.parquet") for model in self.config["models"]]
        return pd.concat([pq.read_table(file, partitioning=None).to_pandas() for file in files], ignore_index=True)

    def locals_of(self, trial: Trial) -> list[Trial]:
        """Trials of the local mode in the same model and phase: over this network, or over the first one that has them."""
        where = [trial.network, *self.config["networks"]]
        for network in where:
            modes = self.groups.get((trial.model, network, trial.phase), {})
            if found := [each for trials in modes.values() for each in trials if each.is_local]:
                return found
        return []

    @property
    def base(self) -> str:
        """The lowest rung, run or not."""
        return next(iter(self.ladder(self.config["define"]["modes"])), "")

    def ladder(self, modes: Iterable[str]) -> list[str]:
        """Those of `modes` that are rungs of the first ladder, lowest first; a rung that was not run is skipped.

        Ladders of loads are another matter: their tables are `load` and `load_facts`.
        """
        define = self.config["define"]["modes"]

        def below(mode: str) -> list[str]:
            after = define[mode]["rung"].get("after")
            return [mode] if after is None else [*below(after), mode]

        marked = [mode for mode in define if define[mode].get("rung")]
        first = next((mode for mode in marked if define[mode]["rung"].get("after") is None), None)
        return sorted((mode for mode in modes if mode in marked and below(mode)[0] == first), key=lambda mode: len(below(mode)))


def read_config(files: Iterable[Path]) -> dict[str, Any]:
    """The files merged key by key, later ones over earlier ones."""
    config: dict[str, Any] = {}
    for file in files:
        config = merged(config, yaml.safe_load(file.read_text()))
    for key in ("models", "networks", "modes", "phases"):
        chosen = config.get(key, list(config["define"][key]))
        config[key] = chosen.split(",") if isinstance(chosen, str) else chosen
    return config


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: merged(below[key], above[key]) for key in above if isinstance(above[key], dict) and isinstance(below.get(key), dict)}
    return {**below, **above, **both}


def is_prefill(trials: Sequence[Trial]) -> bool:
    return bool(trials[0].phase_spec["kind"] == "prefill")


def paired(a: Sequence[Trial], b: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Trials of one number, session and fingerprint."""

    def key(trial: Trial) -> tuple[Any, ...]:
        return trial.trial, trial.manifest["session"], trial.manifest["fingerprint"]

    others = {key(trial): trial for trial in b}
    return [(trial, others[key(trial)]) for trial in a if key(trial) in others]


def paired_ratio(name: str, a: Sequence[Trial], b: Sequence[Trial], of: str) -> Row:
    """Geometric mean and t interval of one attribute's ratio over paired trials, and the number of pairs."""
    pairs = paired(a, b)
    return log_interval(name, [getattr(x, of) / getattr(y, of) for x, y in pairs]) | {f"{name}_pairs": len(pairs)}


def byte_ratio(name: str, run: Run, a: Sequence[Trial], b: Sequence[Trial]) -> Row:
    """Payload bytes per token: exact if all trials of both modes agree, else a mean over trials of one number."""
    ours, base = ({t.trial: run.rows[t]["payload_bytes_per_token"] for t in trials} for trials in (a, b))
    if len(set(ours.values())) == len(set(base.values())) == 1:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), next(iter(ours.values())) / next(iter(base.values())))
    return interval(name, [ours[number] / base[number] for number in ours if number in base])


def to_local(run: Run, trials: Sequence[Trial]) -> Row:
    return paired_ratio("ratio_to_local", trials, run.locals_of(trials[0]), "latency_s")


def checks_of(run: Run, at: Row) -> list[Row]:
    return [row for row in run.exactness if (row["model"], row["mode"]) == (at["model"], at["mode"])]


def strongest_blind(run: Run, modes: Mapping[str, Sequence[Trial]], of: Callable[[Sequence[Trial]], float | None]) -> str | None:
    """Of the modes marked `blind` the one with the least."""
    known = {mode: of(trials) for mode, trials in modes.items() if run.mark(mode).get("blind")}
    return min((mode for mode, value in known.items() if value is not None), key=lambda mode: known[mode], default=None)


def equal_compute_logs(*modes: Sequence[Trial]) -> list[list[float]]:
    """ln of the gap of each trial's median call added to the mean, over the modes, of their mean compute."""
    compute_s = float(np.mean([np.mean([trial.compute_s for trial in trials]) for trials in modes]))
    return [[math.log(compute_s + trial.typical_gap_s) for trial in trials] for trials in modes]
