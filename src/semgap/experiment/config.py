"""The config: read, checked as a whole before any work, and cut into the cells of the grid."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semgap.client.prompts import text_digest
from semgap.experiment.config_checks import (
    AXES,
    ConfigError,
    check_exactness_settings,
    check_head,
    check_mode,
    check_names,
    check_network_row,
    check_phase,
    check_sampling,
    check_vocabulary,
    check_worker,
    explained,
    schema_validator,
)
from semgap.experiment.staleness import CODEC_CODE, DUMP_CODE, REMOTE_CODE, TRIAL_CODE, code_digest, content_digest


@dataclass(frozen=True, order=True)
class Coordinates:
    """A grid cell by name; `trial` counts from 1."""

    model: str
    network: str
    mode: str
    phase: str
    trial: int


@dataclass(frozen=True)
class Config:
    """A checked config with every default filled in. `root` is the directory that its relative paths start from."""

    values: Mapping[str, Any]
    root: Path

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def grid(self) -> Iterator[Coordinates]:
        """All cells, block by block (a block: all cells of one trial number)."""
        for trial in range(1, self["trials"] + 1):
            for model in self["models"]:
                for network in self["networks"]:
                    for mode in self["modes"]:
                        for phase in self.phases_of(mode):
                            yield Coordinates(model, network, mode, phase, trial)

    def phases_of(self, mode: str) -> list[str]:
        """The chosen phases in which a mode runs: those that its row names, or all but recovery phases."""
        named = self["define"]["modes"][mode].get("phases")
        return [phase for phase in self["phases"] if (phase in named if named is not None else not self._is_recovery(phase))]

    def _is_recovery(self, phase: str) -> bool:
        return self["define"]["phases"][phase]["kind"] == "recovery"

    def defines(self, at: Coordinates) -> bool:
        """Every name of a cell has its row, chosen or not."""
        return all(getattr(at, axis[:-1]) in self["define"][axis] for axis in AXES)

    def run_order(self) -> list[Coordinates]:
        """The cells in the order in which they are to run: blocks in turn, each in a seeded random order."""
        cells = list(self.grid())
        for trial in range(1, self["trials"] + 1):
            block = [cell for cell in cells if cell.trial == trial]
            random.Random(f"{self['seed']}/{trial}").shuffle(block)
            cells = [cell for cell in cells if cell.trial != trial] + block
        return cells

    def cell(self, at: Coordinates, *scripts: Path) -> dict[str, Any]:
        """All that a trial depends on but the model's bytes: its slice of the config and the digest of the code that shapes it."""
        modules = TRIAL_CODE if self.is_local(at.mode) else TRIAL_CODE + REMOTE_CODE
        cell = {
            "model": at.model,
            "network": at.network,
            "mode": at.mode,
            "phase": at.phase,
            "trial": at.trial,
            "policy": self.policy(at.mode),
            "network_spec": self["define"]["networks"][at.network],
            **self._shared(at.model, at.phase),
            **{key: self[key] for key in ("worker", "telemetry", "probe")},
            "code": code_digest(modules, *scripts),
        }
        return _ordered(cell)

    def network_cell(self, network: str, *scripts: Path) -> dict[str, Any]:
        """All that the check of a network depends on, which is as a trial would have it."""
        keys = ("cpus", "threads", "device", "timeouts", "worker", "telemetry", "probe")
        spec = {"network": network, "network_spec": self["define"]["networks"][network], "policy": {"shadow": "worker"}}
        return _ordered(spec | {key: self[key] for key in keys} | {"code": code_digest(REMOTE_CODE, *scripts)})

    def is_checked(self, network: str) -> bool:
        """It is found out before any trial whether the network can be had: it is more than loopback, or its worker is somebody else's.

        Not with srun, whose nodes are there once a job runs.
        """
        launch = self["worker"]["launch"]
        return launch == "external" or (launch != "srun" and self["define"]["networks"][network]["kind"] != "loopback")

    def reference_cell(self, model: str, phase: str, *scripts: Path) -> dict[str, Any]:
        """All that the reference of a phase depends on: local's tokens and logits, which every mode is compared with."""
        return _ordered({"model": model, "phase": phase, **self._shared(model, phase), "code": code_digest(TRIAL_CODE, *scripts)})

    def model_cell(self, model: str) -> dict[str, Any]:
        """All that the files of a model depend on."""
        return _ordered({"spec": self["define"]["models"][model], "dtype": self["dtype"]})

    def exactness_cell(self, model: str, mode: str, *scripts: Path) -> dict[str, Any]:
        """All that the exactness of a mode depends on but the model's bytes."""
        cell = self.cell(Coordinates(model, self["networks"][0], mode, self["phases"][0], 1), *scripts)
        kept = {key: value for key, value in cell.items() if key not in ("phase", "trial")}
        pressed = any(self._is_recovery(phase) for phase in self.phases_of(mode))
        return _ordered(kept | {"phase_spec": self._exactness_phase() | {"evict_fractions": [0.5] if pressed else []}})

    def exactness_reference_cell(self, model: str, *scripts: Path) -> dict[str, Any]:
        """All that local's side of the exactness check depends on."""
        cell = self.reference_cell(model, self["phases"][0], *scripts)
        return _ordered(cell | {"phase": "exactness", "phase_spec": self._exactness_phase()})

    def tensors_cell(self, model: str, *scripts: Path) -> dict[str, Any]:
        """All that the tensors dumped for measuring codecs depend on but the model's bytes."""
        return _ordered(self._text_cell(model) | {"code": code_digest(DUMP_CODE, *scripts)})

    def codecs_cell(self, model: str, *scripts: Path) -> dict[str, Any]:
        """All that the measured codecs depend on but the model's bytes."""
        return _ordered(self._text_cell(model) | {"code": code_digest(CODEC_CODE, *scripts)})

    def _text_cell(self, model: str) -> dict[str, Any]:
        shared = self._shared(model, self["phases"][0])
        return {"model": model} | {key: value for key, value in shared.items() if key not in ("phase_spec", "sampling", "timeouts")}

    def _exactness_phase(self) -> dict[str, Any]:
        chosen = self["exactness"]
        shape = {"prompt_lengths": [chosen["prompt_length"]], "requests": chosen["prompts"], "steps": chosen["tokens"] - 1}
        alone = {"sessions": 1, "live_requests": 1, "kv_budget": 1, "evict_fractions": []}
        return {"kind": "decode", "warmup_requests": 0, "warmup_steps": 0} | alone | shape

    def prompts_file(self) -> Path:
        """The text that prompts are cut from."""
        return self.root / self["prompts"]

    def is_local(self, mode: str) -> bool:
        """The mode has no worker."""
        return self.policy(mode)["placement"] == "local"

    def policy(self, name: str) -> dict[str, Any]:
        """The policy of a mode: its row but for where it runs, which shapes no trial."""
        return {key: value for key, value in self["define"]["modes"][name].items() if key != "phases"}

    def _shared(self, model: str, phase: str) -> dict[str, Any]:
        return {
            "model_spec": self["define"]["models"][model],
            "phase_spec": self["define"]["phases"][phase],
            **{
                key: self[key]
                for key in ("dtype", "threads", "max_length", "device", "executor", "prompts", "sampling", "cpus", "timeouts")
            },
            "prompts_digest": text_digest(self.prompts_file()),
        }


def _ordered(value: Any) -> Any:
    """A copy with its keys sorted at every depth: Snakemake compares params as text, and the order of a config's keys is no change."""
    if isinstance(value, Mapping):
        return {key: _ordered(value[key]) for key in sorted(value)}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def cell_digest(cell: Mapping[str, Any]) -> str:
    """What a manifest holds and aggregation compares."""
    return content_digest(cell)


def read_config(path: Path, root: Path, over: Mapping[str, Any] | None = None) -> Config:
    """The config of a YAML file, top-level keys of `over` in place of its own."""
    return check_config({**_read_yaml(path), **(over or {})}, root)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} holds no keys; copy config/config.yaml and change it")
    return raw


def read_configs(paths: Sequence[Path], root: Path) -> Config:
    """The config of several YAML files, each merged over those before it, key by key, as `snakemake --configfile` does."""
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, _read_yaml(path))
    return check_config(merged, root)


def _merge(into: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def check_config(raw: Mapping[str, Any], root: Path) -> Config:
    """Checks `raw` against workflow/schemas/config.schema.yaml and as a whole, and fills in defaults. ConfigError for the first fault.

    Selections may be lists or, as `--config modes=a,b` gives them, strings with commas.
    """
    schema = yaml.safe_load((root / "workflow/schemas/config.schema.yaml").read_text())
    values = deepcopy(dict(raw))
    for axis in AXES:
        values[axis] = _selection(values.get(axis, _rows(values, axis)))
    for error in schema_validator(schema).iter_errors(values):
        raise ConfigError(explained(error))
    check_names(values)
    for mode in values["modes"]:
        check_mode(values, mode)
        check_vocabulary(values, mode, root)
    check_sampling(values)
    for phase in values["phases"]:
        check_phase(values, phase)
    check_exactness_settings(values)
    config = Config(values, root)
    if not any(config.phases_of(mode) for mode in values["modes"]):
        raise ConfigError(f"none of modes {', '.join(values['modes'])} runs in phases {', '.join(values['phases'])}; see the modes' rows")
    for network in values["networks"]:
        check_network_row(values, network)
    check_worker(values)
    if values["executor"] == "cuda_graph" and values["device"] == "cpu":
        raise ConfigError("config.executor is 'cuda_graph' with device 'cpu'; it needs CUDA, use device: cuda, or executor: eager")
    for mode in values["modes"]:
        check_head(config.policy(mode), mode, values["device"])
    if not config.prompts_file().is_file():
        raise ConfigError(f"config.prompts {values['prompts']!r} is not a file under {root}")
    return config


def _rows(values: Mapping[str, Any], axis: str) -> list[str]:
    """All names of an axis, which run where none are chosen; none where the schema has more to say."""
    define = values.get("define")
    rows = define.get(axis) if isinstance(define, Mapping) else None
    return list(rows) if isinstance(rows, Mapping) else []


def _selection(value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip("[] ").split(",")
    return [str(item).strip() for item in value] if isinstance(value, list) else value
