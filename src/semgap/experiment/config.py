"""The config: reads it, checks it as a whole before any work, and cuts it into cells, one for each job of a rule."""

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import yaml

from semgap.client.prompts import text_digest
from semgap.client.spec import Phase
from semgap.codecs import codec_named
from semgap.experiment.config_checks import AXES, ConfigError, check_schema, check_values, policy_row, uses_kv_host
from semgap.experiment.config_prefix import longest_prefix
from semgap.experiment.staleness import CODEC_CODE, DUMP_CODE, TRIAL_CODE, code_digest, remote_code
from semgap.phases import KINDS, MOVE_KV
from semgap.policy import AUTO, KV_CODECS

_RULE_CODE = {"measure_capacity": ("measure_trial", "measure_capacity")}
"""The modules of rules that run another rule's too."""
_KEEP_BUSY = 4  # live requests with which a capacity is measured


@dataclass(frozen=True, order=True)
class Coordinates:
    """The names of a grid cell; `trial` counts from 1."""

    model: str
    network: str
    mode: str
    phase: str
    trial: int


@dataclass(frozen=True)
class Config:
    """A checked config with every default filled in. `root` is the workflow's directory; relative paths start there.

    A cell is a dict that holds all that a job's result depends on, but the model's bytes: values of the config, the digest of the prompts
    and the digest of the code that the job runs. Its own digest is what aggregation compares.
    """

    values: Mapping[str, Any]
    root: Path

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def grid(self) -> Iterator[Coordinates]:
        """All grid cells, block by block (a block: all cells of one trial number)."""
        cells = list(self._cells())
        most = max((trials for _, trials in cells), default=0)
        yield from (Coordinates(*names, trial) for trial in range(1, most + 1) for names, trials in cells if trial <= trials)

    def _cells(self) -> Iterator[tuple[tuple[str, str, str, str], int]]:
        """Model, network, mode and phase of every cell, and the number of its trials."""
        for model, network, mode in itertools.product(self["models"], self["networks"], self["modes"]):
            for phase in self.phases_of(mode):
                if self._runs(network, mode, phase):
                    yield (model, network, mode, phase), max([self["trials"], *self._twin_trials(network, mode, phase)])

    def _runs(self, network: str, mode: str, phase: str) -> bool:
        named = network in self.networks_of("modes", mode) and network in self.networks_of("phases", phase)
        return named and self._fits(network, phase)

    def _twin_trials(self, network: str, mode: str, phase: str) -> Iterator[int]:
        """The trials that each chosen pair of twins with this mode asks for here."""
        for twin in self["modes"]:
            row = self["define"]["modes"][twin]
            pair, trials = (twin, row.get("twin")), row.get("twin_trials") or {}
            if network in trials and mode in pair and all(name in self["modes"] and phase in self.phases_of(name) for name in pair):
                yield trials[network]

    def phases_of(self, mode: str) -> list[str]:
        """The chosen phases in which a mode runs: those that its row names.

        By default those that move no KV blocks and are no load; the load phases, if the mode has `batching`.
        """
        named = self["define"]["modes"][mode].get("phases")
        if named is not None:
            return [phase for phase in self["phases"] if phase in named]
        unnamed = [phase for phase in self["phases"] if not KINDS[self._kind(phase)].moves_kv]
        return [phase for phase in unnamed if (self._kind(phase) == "load") == self.is_batched(mode)]

    def networks_of(self, axis: str, name: str) -> list[str]:
        """The chosen networks over which a mode or phase runs: those that its row names; all if it names none, or none that is chosen."""
        named = self["define"][axis][name].get("networks") or ()
        return [network for network in self["networks"] if network in named] or self["networks"]

    def _fits(self, network: str, phase: str) -> bool:
        """True if the phase may run over the network. Over one with `kv` only phases that move KV blocks do; requests of two workers run
        where the client is beside both.
        """
        kind = KINDS[self._kind(phase)]
        if kind.workers > 1 and self["define"]["networks"][network]["kind"] != "loopback":
            return False
        return self._kv_row(network) is None or kind.moves_kv

    def _kv_row(self, network: str) -> dict[str, Any] | None:
        """The row of a network's link between worker and KV host; None if it has none."""
        networks: dict[str, dict[str, Any]] = self["define"]["networks"]
        kv = networks[network].get("kv")
        return networks[kv] if kv else None

    def _network_specs(self, network: str) -> dict[str, Any]:
        """The keys of a cell for its links."""
        kv = self._kv_row(network)
        return {"network_spec": self["define"]["networks"][network]} | ({"kv_network_spec": kv} if kv else {})

    def _kind(self, phase: str) -> str:
        kind: str = self["define"]["phases"][phase]["kind"]
        return kind

    def defines(self, at: Coordinates) -> bool:
        """True if every name of a grid cell has its row, chosen or not, and so has the network's kv."""
        rows = self["define"]["networks"]
        return all(getattr(at, axis[:-1]) in self["define"][axis] for axis in AXES) and (rows[at.network].get("kv") or at.network) in rows

    def run_order(self) -> list[Coordinates]:
        """The grid cells as they should run: blocks in turn, each in a seeded random order."""
        cells = []
        for trial, block in itertools.groupby(self.grid(), lambda cell: cell.trial):
            shuffled = list(block)
            random.Random(f"{self['seed']}/{trial}").shuffle(shuffled)
            cells += shuffled
        return cells

    def cell(self, at: Coordinates) -> dict[str, Any]:
        """The cell of a trial."""
        return _ordered({**self._trial_cell(at.model, at.network, at.mode, at.phase, "measure_trial"), "trial": at.trial})

    def capacity_cell(self, model: str, network: str, phase: str) -> dict[str, Any]:
        """The cell of the capacity of which a load phase's arrivals are shares: its mode in a closed loop that keeps it busy."""
        mode, requests = self["define"]["phases"][phase]["arrivals"]["of"], self["define"]["phases"][phase]["requests"]
        cell = self._trial_cell(model, network, mode, phase, "measure_capacity")
        fewer = (requests + -(-requests // 4) + 1) // 2  # the reference has no more prompts
        closed = {**cell["phase_spec"], "arrivals": None, "concurrency": [max(1, min(_KEEP_BUSY, fewer))]}
        return _ordered({**cell, "phase_spec": closed, "trial": 1})

    def has_shares(self, phase: str) -> bool:
        """True if a load phase's arrivals are shares of a mode's capacity."""
        return bool((self["define"]["phases"][phase]["arrivals"] or {}).get("of"))

    def network_cell(self, network: str) -> dict[str, Any]:
        """The cell of a network's check."""
        keys = ("cpus", "threads", "device", "timeouts", "worker", "telemetry", "probe")
        shadow = "kvhost" if self._kv_row(network) and uses_kv_host(self.values) else "worker"
        spec = {"network": network, **self._network_specs(network), "policy": {"shadow": shadow}}
        return _ordered(spec | {key: self[key] for key in keys} | {"code": self._code("check_network", remote_code([]))})

    def is_checked(self, network: str) -> bool:
        """True if the network is probed before the first trial: a link of any kind but loopback, or an external worker.

        False with srun: its nodes are known only when a job runs.
        """
        kv = self._kv_row(network) if uses_kv_host(self.values) else None
        launch, rows = self["worker"]["launch"], (self["define"]["networks"][network], kv)
        return launch == "external" or (launch != "srun" and any(row and row["kind"] != "loopback" for row in rows))

    def reference_cell(self, model: str, phase: str, rule: str = "compute_reference") -> dict[str, Any]:
        """The cell of a phase's reference."""
        return _ordered({"model": model, "phase": phase, **self._shared(model, phase), "code": self._code(rule, TRIAL_CODE)})

    def model_cell(self, model: str) -> dict[str, Any]:
        """All that the files of a model depend on."""
        return _ordered({"spec": self["define"]["models"][model], "dtype": self["dtype"]})

    def exactness_cell(self, model: str, mode: str) -> dict[str, Any]:
        """The cell of a mode's exactness check: that of a trial over the first network, with requests of its own.

        A lossy mode that chooses by the link what crosses it is checked with all its blocks in the least exact codec that it may choose:
        over loopback it might choose nothing that changes them.
        """
        cell = self._trial_cell(model, self["networks"][0], mode, self["phases"][0], "check_exactness")
        del cell["phase"]
        cell.pop("kv_network_spec", None)  # over loopback
        kinds = [KINDS[self._kind(phase)] for phase in self.phases_of(mode)]
        pressed = any(kind.moves_kv and kind.measures == "decode" for kind in kinds)  # blocks of the handle's own shadow, in its codec
        known = [longest_prefix(self.values)] if self.policy(mode)["prefix"] != "recompute" else []
        pressure = {"evict_fractions": [0.5] if pressed else [], "prefix_lengths": known}
        return _ordered(cell | {"phase_spec": self._exactness_phase() | pressure, "policy": _with_least_exact_kv(cell["policy"])})

    def exactness_reference_cell(self, model: str) -> dict[str, Any]:
        """The cell of the exactness check's reference."""
        cell = self.reference_cell(model, self["phases"][0], "compute_exactness_reference")
        return _ordered(cell | {"phase": "exactness", "phase_spec": self._exactness_phase()})

    def checked_modes(self) -> list[str]:
        """The chosen modes whose exactness is checked by itself: local ones against transformers, and those that promise less than equal
        bits.

        The trials of the other modes compare every step's bits already, those of modes with batching every token.
        """
        run = [mode for mode in self["modes"] if self.phases_of(mode) and not self.is_batched(mode)]
        return [mode for mode in run if self.is_local(mode) or not self.is_bitwise(mode)]

    def tensors_cell(self, model: str) -> dict[str, Any]:
        """The cell of the dumped tensors on which codecs are measured."""
        return self._text_cell(model, self._code("dump_tensors", DUMP_CODE))

    def codecs_cell(self, model: str) -> dict[str, Any]:
        """The cell of the measured codecs."""
        return self._text_cell(model, self._code("measure_codecs", CODEC_CODE))

    def _trial_cell(self, model: str, network: str, mode: str, phase: str, rule: str) -> dict[str, Any]:
        policy = self.policy(mode)
        names = {"model": model, "network": network, "mode": mode, "phase": phase, "policy": policy, **self._network_specs(network)}
        used = {name for codec in policy["codec"].values() for name in (KV_CODECS if codec == AUTO else (codec,))}
        used |= {"topk"} if policy["reply"]["kind"] == "topk" else set()
        code = self._code(rule, TRIAL_CODE if self.is_local(mode) else (*TRIAL_CODE, *remote_code(used)))
        if self.has_shares(phase):
            names["capacity_policy"] = self.policy(self["define"]["phases"][phase]["arrivals"]["of"])
        return names | self._shared(model, phase) | {key: self[key] for key in ("worker", "telemetry", "probe")} | {"code": code}

    def _code(self, rule: str, patterns: Iterable[str]) -> str:
        """The digest of the code that a rule runs: modules by `patterns`, and the rule's module and script, which have its name."""
        own = [f"experiment/{name}*.py" for name in _RULE_CODE.get(rule, (rule,))]
        return code_digest([*patterns, *own], self.root / f"workflow/scripts/{rule}.py")

    def _text_cell(self, model: str, code: str) -> dict[str, Any]:
        shared = self._shared(model, self["phases"][0]) | {"model": model, "code": code}
        return _ordered({key: value for key, value in shared.items() if key not in ("phase_spec", "sampling", "timeouts")})

    def _exactness_phase(self) -> dict[str, Any]:
        chosen = self["exactness"]
        phase = Phase(
            "decode",
            (chosen["prompt_length"],),
            passages=tuple(chosen["passages"]),
            requests=chosen["prompts"],
            warmup_requests=0,
            warmup_steps=0,
            steps=chosen["tokens"] - 1,
        )
        spec: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(phase))
        return spec

    def is_local(self, mode: str) -> bool:
        """True if the mode has no worker."""
        return self.policy(mode)["placement"] == "local"

    def is_batched(self, mode: str) -> bool:
        """True if the mode's requests run in the worker's engine: in load phases alone."""
        return self.policy(mode).get("batching") is not None

    def is_bitwise(self, mode: str) -> bool:
        """True if the mode promises local's bits, which each of its trials checks at every step."""
        return self.policy(mode)["keeps"] == "bitwise"

    def policy(self, name: str) -> dict[str, Any]:
        """The policy of a mode, as a dict."""
        return policy_row(self.values, name)

    def _shared(self, model: str, phase: str) -> dict[str, Any]:
        keys = ("dtype", "threads", "max_length", "device", "executor", "prompts", "sampling", "cpus", "timeouts")
        spec = {key: value for key, value in self["define"]["phases"][phase].items() if key != "networks"}
        specs = {"model_spec": self["define"]["models"][model], "phase_spec": spec}
        if spec["trace"]:
            specs["trace_digest"] = text_digest(self.root / spec["trace"]["file"])
        return specs | {key: self[key] for key in keys} | {"prompts_digest": text_digest(self.root / self["prompts"])}


def _with_least_exact_kv(policy: dict[str, Any]) -> dict[str, Any]:
    """A policy whose blocks are all saved, and fetched, in the least exact codec that it may choose; as it is if its blocks stay exact."""
    kv = KV_CODECS[-1] if policy["codec"]["kv"] == AUTO else policy["codec"]["kv"]
    if policy["keeps"] != "lossy" or codec_named(kv).exact:
        return policy
    fetching = {key: other for key, other in (("recovery", "delta"), ("prefix", "fetch_blocks")) if policy[key] == "auto"}
    return policy | fetching | {"codec": policy["codec"] | {"kv": kv}}


def _ordered(value: Any) -> Any:
    """A copy with its keys sorted at every depth: Snakemake compares params as text, and another order of keys is no change."""
    if isinstance(value, Mapping):
        return {key: _ordered(value[key]) for key in sorted(value)}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        at, what = error.problem_mark, error.problem or error.context
        where = f", line {at.line + 1}, column {at.column + 1}" if at else ""
        raise ConfigError(f"config file {path}{where} is not valid YAML: {what}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path} holds no keys; copy config/config.yaml and change it")
    return raw


def read_config(paths: Sequence[Path], root: Path, over: Mapping[str, Any] | None = None) -> Config:
    """The config of `root`, over which each YAML file is merged, key by key, as `snakemake --configfile` does; then `over`."""
    merged: dict[str, Any] = {}
    for path in (root / "config/config.yaml", *paths):
        _merge(merged, _read_yaml(path))
    _merge(merged, over or {})
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
    values = deepcopy(dict(raw))
    for axis in AXES:
        values[axis] = _selection(values.get(axis, _rows(values, axis)))
    check_schema(values, _schema(root / "workflow/schemas/config.schema.yaml"))
    check_values(values, root)
    config = Config(values, root)
    if not any(config.phases_of(mode) for mode in values["modes"]):
        raise ConfigError(f"none of modes {', '.join(values['modes'])} runs in phases {', '.join(values['phases'])}; see the modes' rows")
    if not any(config.grid()):
        raise ConfigError(f"nothing runs over networks {', '.join(values['networks'])}: {_why_empty(values)}")
    return config


def _why_empty(values: Mapping[str, Any]) -> str:
    """Why no chosen mode runs in its phases over a chosen network, and the way out."""
    rows, phases = values["define"]["networks"], values["define"]["phases"]
    moving = [phase for phase in values["phases"] if KINDS[phases[phase]["kind"]].workers > 1]
    if moving and all(rows[network]["kind"] != "loopback" for network in values["networks"]):
        where = "networks of kind loopback, whose kv is the link that requests move over"
        return f"phases with two workers ({', '.join(moving)}) run over {where}; choose such a network, or another phase"
    with_kv = [network for network in values["networks"] if rows[network]["kv"]]
    if with_kv:
        kinds = f"over one with kv ({', '.join(with_kv)}) only phases of kinds {', '.join(MOVE_KV)} run"
        return f"{kinds}; choose such a phase and a mode that runs in it, or another network"
    return "the rows of the chosen modes and phases name no network in common; change their networks, or choose others"


@cache
def _schema(path: Path) -> dict[str, Any]:
    schema: dict[str, Any] = yaml.safe_load(path.read_text())
    return schema


def _rows(values: Mapping[str, Any], axis: str) -> list[str]:
    """All names of an axis, which run by default; none if `define` is malformed, which the schema then says."""
    define = values.get("define")
    rows = define.get(axis) if isinstance(define, Mapping) else None
    return list(rows) if isinstance(rows, Mapping) else []


def _selection(value: Any) -> Any:
    if isinstance(value, str):
        value = value.strip("[] ").split(",")
    return [str(item).strip() for item in value] if isinstance(value, list) else value
