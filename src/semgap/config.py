"""The config: read, checked as a whole before any work, and cut into the cells of the grid."""

from __future__ import annotations

import difflib
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import yaml

from semgap.codecs import CODECS
from semgap.link import parse_address
from semgap.network import Network, bits_per_s
from semgap.policy import Policy, PolicyError, coded_by, policy_from
from semgap.prompts import text_digest
from semgap.provenance import CODEC_MODULES, DUMP_MODULES, REMOTE_MODULES, TRIAL_MODULES, code_digest, content_digest
from semgap.sampling import SamplingRule

AXES = ("models", "networks", "modes", "phases")


class ConfigError(ValueError):
    """A config that cannot be run: names the key, the value and the way out."""


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
        modules = TRIAL_MODULES if self.is_local(at.mode) else TRIAL_MODULES + REMOTE_MODULES
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
        return _ordered(spec | {key: self[key] for key in keys} | {"code": code_digest(REMOTE_MODULES, *scripts)})

    def is_checked(self, network: str) -> bool:
        """It is found out before any trial whether the network can be had: it is more than loopback, or its worker is somebody else's.

        Not with srun, whose nodes are there once a job runs.
        """
        launch = self["worker"]["launch"]
        return launch == "external" or (launch != "srun" and self["define"]["networks"][network]["kind"] != "loopback")

    def reference_cell(self, model: str, phase: str, *scripts: Path) -> dict[str, Any]:
        """All that the reference of a phase depends on: local's tokens and logits, which every mode is compared with."""
        return _ordered({"model": model, "phase": phase, **self._shared(model, phase), "code": code_digest(TRIAL_MODULES, *scripts)})

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
        return _ordered(self._text_cell(model) | {"code": code_digest(DUMP_MODULES, *scripts)})

    def codecs_cell(self, model: str, *scripts: Path) -> dict[str, Any]:
        """All that the measured codecs depend on but the model's bytes."""
        return _ordered(self._text_cell(model) | {"code": code_digest(CODEC_MODULES, *scripts)})

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
    for error in _validator(schema).iter_errors(values):
        raise ConfigError(_explain(error))
    _check_names(values)
    for mode in values["modes"]:
        _check_mode(values, mode)
        _check_vocabulary(values, mode, root)
    _check_sampling(values)
    for phase in values["phases"]:
        _check_phase(values, phase)
    _check_exactness(values)
    config = Config(values, root)
    if not any(config.phases_of(mode) for mode in values["modes"]):
        raise ConfigError(f"none of modes {', '.join(values['modes'])} runs in phases {', '.join(values['phases'])}; see the modes' rows")
    for network in values["networks"]:
        _check_network(values, network)
    _check_worker(values)
    if values["executor"] == "cuda_graph" and values["device"] == "cpu":
        raise ConfigError("config.executor is 'cuda_graph' with device 'cpu'; it needs CUDA, use device: cuda, or executor: eager")
    for mode in values["modes"]:
        _check_head(config.policy(mode), mode, values["device"])
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


def _validator(schema: dict[str, Any]) -> Any:
    """A validator that fills defaults in as it goes, as jsonschema's documentation shows."""
    base = jsonschema.Draft202012Validator
    check_properties, definitions = base.VALIDATORS["properties"], schema["$defs"]

    def fill_defaults(validator: Any, properties: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if isinstance(instance, dict):
            for name, below in properties.items():
                if "$ref" in below:
                    below = definitions[below["$ref"].rpartition("/")[2]] | below
                if "default" in below:
                    instance.setdefault(name, deepcopy(below["default"]))
        yield from check_properties(validator, properties, instance, schema)

    return jsonschema.validators.extend(base, {"properties": fill_defaults})(schema)


def _explain(error: Any) -> str:
    """One line: where, what, and the nearest valid name."""
    where = ".".join(["config", *(str(part) for part in error.absolute_path)])
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        return f"{where} has no key {unknown!r}; {nearest(unknown, known)}"
    if error.validator == "enum" and isinstance(error.instance, str):
        return f"{where} is {error.instance!r}; {nearest(error.instance, [str(value) for value in error.validator_value])}"
    if error.validator == "required":
        return f"{where}: {error.message}; see config/README.md"
    described = f" ({error.schema['description']})" if "description" in error.schema else ""
    return f"{where} is {error.instance!r}: {error.message}{described}"


def nearest(name: str, known: list[str]) -> str:
    """'did you mean ...?', or what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def _check_names(values: Mapping[str, Any]) -> None:
    for axis in AXES:
        known = list(values["define"][axis])
        for name in values[axis]:
            if name not in known:
                raise ConfigError(f"{axis[:-1]} {name!r} is not in config.define.{axis}; {nearest(name, known)}")
    for mode in values["modes"]:
        for phase in values["define"]["modes"][mode]["phases"] or []:
            if phase not in values["define"]["phases"]:
                known = list(values["define"]["phases"])
                raise ConfigError(f"mode {mode!r} runs in phase {phase!r}, which is not in config.define.phases; {nearest(phase, known)}")
            kept = values["define"]["modes"][mode]["kv_cache"]
            if values["define"]["phases"][phase]["kind"] == "recovery" and kept != "resident":
                raise ConfigError(f"mode {mode!r} runs in recovery phase {phase!r} with kv_cache {kept}; it needs kv_cache: resident")


def _check_mode(values: Mapping[str, Any], mode: str) -> None:
    row = values["define"]["modes"][mode]
    for field, codec in row["codec"].items():
        if codec not in CODECS:
            raise ConfigError(f"mode {mode!r}: codec.{field} {codec!r} is not known; {nearest(codec, list(CODECS))}")
    try:
        policy = policy_from({key: value for key, value in row.items() if key != "phases"}, mode)
    except PolicyError as error:
        raise ConfigError(f"config.define.modes: {error}") from error
    if values["device"] == "cpu":
        _refuse_gpu_codecs(policy, mode)


def _refuse_gpu_codecs(policy: Policy, mode: str) -> None:
    """A run without a GPU has no end that could decode them; whether the machines of another run have one is seen when a trial starts."""
    for field, codec in coded_by(policy, "worker").items():
        if CODECS[codec].needs_gpu:
            raise ConfigError(
                f"mode {mode!r}: codec.{field} {codec!r} needs a GPU at both ends, and config.device is 'cpu'; "
                "use codec planes_zstd, or device: auto"
            )


def _check_vocabulary(values: Mapping[str, Any], mode: str, root: Path) -> None:
    k = values["define"]["modes"][mode]["reply"]["k"]
    for model in values["models"]:
        vocabulary = _vocabulary(values["define"]["models"][model], root / "resources/models" / model / "digest.json")
        if k is not None and vocabulary is not None and k > vocabulary:
            raise ConfigError(f"mode {mode!r}: reply.k is {k}, more than the vocabulary of model {model!r}, {vocabulary}; use a smaller k")


def _vocabulary(row: Mapping[str, Any], digest: Path) -> int | None:
    """A model's vocabulary, as far as it is known before the model is fetched."""
    if digest.exists():
        return json.loads(digest.read_text())["vocab_size"]
    return row.get("config", {}).get("vocab_size")


def _check_exactness(values: Mapping[str, Any]) -> None:
    needed = values["exactness"]["prompt_length"] + values["exactness"]["tokens"]
    if needed > values["max_length"]:
        raise ConfigError(f"config.exactness needs {needed} positions, more than max_length {values['max_length']}; shorten it")


def _check_sampling(values: Mapping[str, Any]) -> None:
    try:
        msgspec.convert(values["sampling"]["rule"], SamplingRule)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config.sampling.rule: {error}") from error


def _check_phase(values: Mapping[str, Any], phase: str) -> None:
    spec = values["define"]["phases"][phase]
    if spec["kind"] != "prefill" and spec["steps"] < 1:
        raise ConfigError(f"phase {phase!r} is of kind {spec['kind']} with steps: {spec['steps']}; it needs 1 or more")
    pressure = [key for key, plain in (("live_requests", 1), ("kv_budget", 1), ("evict_fractions", [])) if spec[key] != plain]
    if pressure and spec["kind"] != "recovery":
        raise ConfigError(f"phase {phase!r} is of kind {spec['kind']} with {', '.join(pressure)}; leave that out, or say kind: recovery")
    requests = spec["requests"] * len(spec["prompt_lengths"])
    if spec["live_requests"] > requests:
        raise ConfigError(
            f"phase {phase!r} has live_requests {spec['live_requests']} and {requests} requests in all, so that there is no pressure; "
            f"set requests to {spec['live_requests']} or more"
        )
    if spec["kv_budget"] * spec["live_requests"] < 1:
        raise ConfigError(
            f"phase {phase!r} has kv_budget {spec['kv_budget']} of {spec['live_requests']} live requests, less than the one cache that a "
            f"step needs; use {1 / spec['live_requests']:.4g} or more"
        )
    if spec["kind"] == "prefill" and spec["steps"]:
        raise ConfigError(f"phase {phase!r} is of kind prefill with steps: {spec['steps']}; leave steps out, or say kind: decode")
    longest = max(spec["prompt_lengths"]) + spec["steps"]
    if longest > values["max_length"]:
        raise ConfigError(
            f"phase {phase!r} needs {longest} positions (prompt {max(spec['prompt_lengths'])} + steps {spec['steps']}), "
            f"more than max_length {values['max_length']}; shorten it or raise max_length"
        )


def _check_network(values: Mapping[str, Any], name: str) -> None:
    network = msgspec.convert(values["define"]["networks"][name], Network)
    where, launch = f"network {name!r} is of kind {network.kind}", values["worker"]["launch"]
    if network.rate is not None:
        try:
            bits_per_s(network.rate)
        except ValueError as error:
            raise ConfigError(f"network {name!r}: {error}") from error
    asked = [key for key in ("delay_ms", "rate") if getattr(network, key) is not None]
    if network.kind == "loopback" and asked:
        raise ConfigError(f"{where}, to which nothing is added, with {' and '.join(asked)}; leave that out, or say kind: relay")
    if network.loss_percent and network.kind != "netns":
        raise ConfigError(f"{where} with loss_percent; a relay ends TCP, and packets can be lost in kind: netns alone")
    if network.kind == "netns" and launch != "local":
        raise ConfigError(f"{where} with config.worker.launch {launch!r}; its worker is started on its far side, use launch: local")
    if network.kind == "loopback" and launch in ("ssh", "srun"):
        raise ConfigError(f"{where} with config.worker.launch {launch!r}, which needs kind: hosts")
    if network.kind == "hosts" and launch == "local":
        raise ConfigError(
            f"{where} with config.worker.launch 'local', which starts the worker on this machine; use launch: external, ssh or srun, or "
            "kind: loopback, relay or netns"
        )


def _check_head(policy: Mapping[str, Any], mode: str, device: str) -> None:
    if device == "cuda" and policy.get("reply", {}).get("kind") == "hidden_last" and policy.get("keeps", "bitwise") != "lossy":
        raise ConfigError(
            f"mode {mode!r} promises keeps: {policy.get('keeps', 'bitwise')} with device 'cuda', but its client applies the output head on "
            "its CPU, which gives other last bits; say keeps: lossy, as config/gpu.yaml does, or leave the mode out"
        )


def _check_worker(values: Mapping[str, Any]) -> None:
    worker = values["worker"]
    if worker["launch"] == "ssh":
        _check_ssh(values)
    elif worker["host"]:
        raise ConfigError(f"config.worker.host is {worker['host']!r} with launch {worker['launch']!r}; say launch: ssh, or leave it out")
    if worker["launch"] == "srun":
        _check_srun(worker)
    if worker["launch"] == "external" and not worker["address"]:
        raise ConfigError("config.worker.launch is 'external' without an address; set worker.address to HOST:PORT of a `semgap serve`")
    if worker["launch"] == "external" and worker["weight_cache"]:
        raise ConfigError("config.worker.weight_cache with launch 'external'; start that worker with `semgap serve --weight-cache DIR`")


def _check_ssh(values: Mapping[str, Any]) -> None:
    worker = values["worker"]
    if not worker["host"] or worker["host"].startswith("-"):
        raise ConfigError(f"config.worker.launch is 'ssh' with host {worker['host']!r}; set worker.host to a name that ssh knows")
    if worker["secret_file"]:
        raise ConfigError("config.worker.secret_file with launch 'ssh', which gets a new secret for each trial; leave it out")
    for mode in values["modes"]:
        if values["define"]["modes"][mode]["shadow"] == "kvhost":
            raise ConfigError(
                f"mode {mode!r} keeps KV blocks in a KV host, which worker.launch 'ssh' does not start; use shadow: worker, or launch: "
                "external with a worker that has one (semgap serve --kv-host)"
            )


def _check_srun(worker: Mapping[str, Any]) -> None:
    if worker["secret_file"]:
        raise ConfigError("config.worker.secret_file is set with launch 'srun', which gets a new secret for each trial; leave it out")
    try:
        host, _ = parse_address(worker["address"] or "node:0")
        host.format(node="node")
    except (ValueError, KeyError, IndexError) as error:
        example = "HOST:PORT, where {node} stands for the worker's node, e.g. '{node}-ib0:0'"
        raise ConfigError(f"config.worker.address is {worker['address']!r} with launch 'srun'; it is {example}") from error
    if shutil.which("srun") is None:
        raise ConfigError("config.worker.launch is 'srun' and there is no srun on this machine's PATH; run on a cluster (docs/cluster.md)")
