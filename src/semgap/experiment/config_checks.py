"""Checks of a config: against the schema, and of what no schema can express."""

import difflib
import json
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import msgspec

from semgap.codecs import CODECS
from semgap.experiment.config_handover import handover_faults
from semgap.experiment.config_load import LOAD_KEYS, load_faults
from semgap.experiment.config_prefix import prefix_faults
from semgap.kv.host import LEAST_PAYLOAD_BYTES
from semgap.network.spec import Network, bits_per_s
from semgap.phases import KINDS, foreign_keys
from semgap.policy import AUTO, Policy, PolicyError, SamplingRule, coded_by, policy_from
from semgap.wire.tcp import parse_address

AXES = ("models", "networks", "modes", "phases")
_TAKEN = (
    *("trials", "reference", "exactness", "tensors", "codecs", "networks", "blocks", "by-hand", "logs", "tables", "figures"),
    *("results.csv", "report.zip", "README.md"),
)
"""Names in results/ that no experiment may take."""


class ConfigError(ValueError):
    """A wrong config. The message names the key, the value and the way out."""


def models_directory(values: Mapping[str, Any]) -> str:
    """Where an experiment's models lie, relative to the directory of the run: two experiments may define one name differently."""
    return f"resources/{values['name']}/models" if values["name"] else "resources/models"


def check_schema(values: Any, schema: dict[str, Any]) -> None:
    """Fills the schema's defaults into `values`. ConfigError for the first fault."""
    for axis in AXES:
        if isinstance(values.get(axis), Mapping):
            raise ConfigError(f"config.{axis} holds rows ({', '.join(values[axis])}); it lists names, and rows go under define.{axis}")
    for error in _schema_validator(schema).iter_errors(values):
        raise ConfigError(_explained(error, schema))


def _schema_validator(schema: dict[str, Any]) -> Any:
    """A validator that fills in defaults as it goes, as jsonschema's documentation shows."""
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


def _explained(error: Any, schema: dict[str, Any]) -> str:
    """One line: where, what, and the nearest valid name."""
    where = ".".join(["config", *(str(part) for part in error.absolute_path)])
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = next(key for key in error.instance if key not in known)
        nested = next((path for path in _paths(schema["properties"]) if path.rpartition(".")[2] == unknown and "." in path), None)
        if not error.absolute_path and nested:
            return f"config has no key {unknown!r}; it belongs to {nested.rpartition('.')[0]}: use {nested}"
        return f"{where} has no key {unknown!r}; {_nearest(unknown, known)}"
    if error.validator == "enum" and isinstance(error.instance, str):
        return f"{where} is {error.instance!r}; {_nearest(error.instance, [str(value) for value in error.validator_value])}"
    if error.validator == "required":
        return f"{where}: {error.message}; see config/README.md"
    described = f" ({error.schema['description']})" if "description" in error.schema else ""
    return f"{where} is {error.instance!r}: {error.message}{described}"


def _paths(properties: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The dotted paths of all keys below `properties`."""
    for name, below in properties.items():
        yield above + name
        yield from _paths(below.get("properties", {}), f"{above}{name}.")


def _nearest(name: str, known: list[str]) -> str:
    """'did you mean ...?', or what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"


def check_values(values: Mapping[str, Any], root: Path) -> None:
    """ConfigError for the first fault in values that fit the schema, defaults filled in. `root`: the workflow's directory."""
    _check_names(values)
    for mode in values["modes"]:
        _check_mode(values, mode)
        _check_vocabulary(values, mode, root)
    try:
        msgspec.convert(values["sampling"]["rule"], SamplingRule)
    except msgspec.ValidationError as error:
        raise ConfigError(f"config.sampling.rule: {error}") from error
    for phase in values["phases"]:
        for fault in _faults_of_phase(values, phase, root):
            raise ConfigError(f"phase {phase!r} {fault}")
    needed = values["exactness"]["prompt_length"] + values["exactness"]["tokens"]
    if needed > values["max_length"]:
        raise ConfigError(f"config.exactness needs {needed} positions, more than max_length {values['max_length']}; shorten it")
    for network in values["networks"]:
        _check_network(values, network)
    for model in values["models"]:
        _check_source(values, model, root)
    if values["name"] in _TAKEN:
        raise ConfigError(f"config.name is {values['name']!r}, which results/ keeps for files of its own; use another name")
    _check_worker(values)
    for network in values["networks"]:
        _check_kv_place(values, network)
    if values["executor"] == "cuda_graph" and values["device"] == "cpu":
        raise ConfigError("config.executor is 'cuda_graph' with device 'cpu'; it needs CUDA, use device: cuda, or executor: eager")
    if not (root / values["prompts"]).is_file():
        raise ConfigError(f"config.prompts {values['prompts']!r} is not a file under {root}")


def policy_row(values: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """The part of a mode's row that shapes its trials: not where it runs, nor its place in the tables."""
    return {key: value for key, value in values["define"]["modes"][mode].items() if key in Policy.__struct_fields__}


def _check_names(values: Mapping[str, Any]) -> None:
    for axis in AXES:
        known = list(values["define"][axis])
        for name in values[axis]:
            if name not in known:
                raise ConfigError(f"{axis[:-1]} {name!r} is not in config.define.{axis}; {_nearest(name, known)}")
    phases = values["define"]["phases"]
    for axis in ("modes", "phases"):
        for name in values[axis]:
            for network in values["define"][axis][name]["networks"] or []:
                if network not in values["define"]["networks"]:
                    near = _nearest(network, list(values["define"]["networks"]))
                    raise ConfigError(f"{axis[:-1]} {name!r} runs over network {network!r}, which is not in config.define.networks; {near}")
    for mode in values["modes"]:
        row = values["define"]["modes"][mode]
        _check_place(values, mode)
        for phase in row["phases"] or []:
            if phase not in phases:
                near = _nearest(phase, list(phases))
                raise ConfigError(f"mode {mode!r} runs in phase {phase!r}, which is not in config.define.phases; {near}")
            is_load, batched = phases[phase]["kind"] == "load", row["batching"] is not None
            if is_load != batched:
                what = f"load phase {phase!r} without batching" if is_load else f"phase {phase!r}, which is no load, with batching"
                raise ConfigError(f"mode {mode!r} runs in {what}; an engine serves loads alone, correct the row's phases")
            kept = row["kv_cache"]
            kind = phases[phase]["kind"]
            for fault in handover_faults(values, mode, phase) if KINDS[kind].workers > 1 else ():
                raise ConfigError(f"mode {mode!r} {fault}")
            if KINDS[kind].moves_kv and kept != "resident":
                raise ConfigError(f"mode {mode!r} runs in {kind} phase {phase!r} with kv_cache {kept}; it needs kv_cache: resident")


def _check_place(values: Mapping[str, Any], mode: str) -> None:
    """ConfigError unless the modes that a row names beside its own exist, its twin is equal, and its rungs end below."""
    rows = values["define"]["modes"]
    rung, claims, twin = rows[mode]["rung"] or {}, rows[mode]["claims"] or {}, rows[mode]["twin"]
    named = {"rung.after": rung.get("after"), "twin": twin} | {f"claims.{key}": claims.get(key) for key in ("against", "cast")}
    for key, other in named.items():
        if other is not None and other not in rows:
            raise ConfigError(f"mode {mode!r}: {key} {other!r} is not in config.define.modes; {_nearest(other, list(rows))}")
    own, others = (policy_row(values, name) | {"plant_us": 0} for name in (mode, twin or mode))
    if twin in values["modes"] and own != others:
        raise ConfigError(f"mode {mode!r} is the twin of {twin!r}, and their rows differ; change both, or leave twin out")
    _check_twin_trials(values, mode)
    below = [mode]
    while (rung := rows[below[-1]]["rung"]) and rung["after"] in rows:
        if rung["after"] in below:
            raise ConfigError(f"mode {mode!r}: the rungs {', '.join(below)} stand on each other; let one be the lowest, without after")
        below.append(rung["after"])


def _check_twin_trials(values: Mapping[str, Any], mode: str) -> None:
    row, networks = values["define"]["modes"][mode], list(values["define"]["networks"])
    if row["twin_trials"] and row["twin"] is None:
        raise ConfigError(f"mode {mode!r} has twin_trials {row['twin_trials']} and no twin; name its twin, or leave twin_trials out")
    for network in row["twin_trials"]:
        if network not in networks:
            near = _nearest(network, networks)
            raise ConfigError(f"mode {mode!r}: twin_trials names network {network!r}, which is not in config.define.networks; {near}")


def _check_mode(values: Mapping[str, Any], mode: str) -> None:
    row = values["define"]["modes"][mode]
    for field, codec in row["codec"].items():
        known = [*CODECS, *([AUTO] if field == "kv" else [])]
        if codec not in known:
            raise ConfigError(f"mode {mode!r}: codec.{field} {codec!r} is not known; {_nearest(codec, known)}")
    try:
        policy = policy_from(policy_row(values, mode), mode)
    except PolicyError as error:
        raise ConfigError(f"config.define.modes: {error}") from error
    gpu_codecs = [(field, codec) for field, codec in coded_by(policy, "worker").items() if CODECS[codec].needs_gpu]
    if values["device"] == "cpu" and gpu_codecs:  # other runs see when a trial starts what their machines have
        field, codec = gpu_codecs[0]
        way_out = "use codec planes_zstd, or device: auto"
        raise ConfigError(f"mode {mode!r}: codec.{field} {codec!r} needs a GPU at both ends, and config.device is 'cpu'; {way_out}")
    if values["device"] == "cuda" and policy.reply.kind == "hidden_last" and policy.keeps != "lossy":
        raise ConfigError(
            f"mode {mode!r} promises keeps: {policy.keeps} with device 'cuda', but its client applies the output head on its CPU, which "
            "gives other last bits; say keeps: lossy, as config/gpu.yaml does, or leave the mode out"
        )


def _check_vocabulary(values: Mapping[str, Any], mode: str, root: Path) -> None:
    k = values["define"]["modes"][mode]["reply"]["k"]
    for model in values["models"]:
        row, digest = values["define"]["models"][model], root / models_directory(values) / model / "digest.json"
        vocabulary = json.loads(digest.read_text())["vocab_size"] if digest.exists() else row.get("config", {}).get("vocab_size")
        if k is not None and vocabulary is not None and k > vocabulary:
            raise ConfigError(f"mode {mode!r}: reply.k is {k}, more than the vocabulary of model {model!r}, {vocabulary}; use a smaller k")


def _check_source(values: Mapping[str, Any], model: str, root: Path) -> None:
    """ConfigError for a model of this disk that is not there and was not fetched before."""
    row = values["define"]["models"][model]
    if row["source"] != "path" or "path" not in row or (root / models_directory(values) / model / "digest.json").exists():
        return
    directory = root / row["path"]
    if not directory.is_dir():
        raise ConfigError(f"model {model!r}: its path {row['path']!r} is not a directory ({directory}); correct define.models.{model}.path")


def _faults_of_phase(values: Mapping[str, Any], name: str, root: Path) -> Iterator[str]:
    spec = values["define"]["phases"][name]
    if spec["kind"] == "load":
        yield from load_faults(values, name, root)
        return
    yield from _phase_faults(spec, values["max_length"])
    if spec["kind"] == "prefix":
        yield from prefix_faults(values, name, root)


def _phase_faults(spec: Mapping[str, Any], max_length: int) -> Iterator[str]:
    kind, steps, live, budget = spec["kind"], spec["steps"], spec["live_requests"], spec["kv_budget"]
    loads = [key for key in LOAD_KEYS if spec[key]]
    if loads:
        yield f"is of kind {kind} with {', '.join(loads)}; leave that out, or say kind: load"
    if not spec["prompt_lengths"]:
        yield f"is of kind {kind} without prompt_lengths; give one or more"
        return
    measures = KINDS[kind].measures
    if measures == "decode" and steps < 1:
        yield f"is of kind {kind} with steps: {steps}; it needs 1 or more"
    foreign = foreign_keys(kind, spec)
    if foreign:
        yield f"is of kind {kind} with {', '.join(foreign)}; leave that out, or say kind: {' or '.join(dict.fromkeys(foreign.values()))}"
    requests = spec["requests"] * len(spec["prompt_lengths"])
    if live > requests:
        yield f"has live_requests {live} and {requests} requests in all, so that there is no pressure; set requests to {live} or more"
    if budget * live < 1:
        yield f"has kv_budget {budget} of {live} live requests, less than the one cache that a step needs; use {1 / live:.4g} or more"
    if measures == "prefill" and steps:
        yield f"is of kind {kind} with steps: {steps}; leave steps out, or say kind: decode"
    longest = max(spec["prompt_lengths"])
    if longest + steps > max_length:
        needed = f"{longest + steps} positions (prompt {longest} + steps {steps})"
        yield f"needs {needed}, more than max_length {max_length}; shorten it or raise max_length"


def _check_network(values: Mapping[str, Any], name: str) -> None:
    network, launch = _network_of(values, name), values["worker"]["launch"]
    where = f"network {name!r} is of kind {network.kind}"
    if network.kv is not None:
        _check_kv_link(values, name, network.kv)
    if network.kind == "netns" and launch != "local":
        raise ConfigError(f"{where} with config.worker.launch {launch!r}; its worker is started on its far side, use launch: local")
    if network.kind == "loopback" and launch in ("ssh", "srun"):
        raise ConfigError(f"{where} with config.worker.launch {launch!r}, which needs kind: hosts")
    if network.kind == "hosts" and launch == "local":
        raise ConfigError(
            f"{where} with config.worker.launch 'local', which starts the worker on this machine; use launch: external, ssh or srun, or "
            "kind: loopback, relay or netns"
        )


def _network_of(values: Mapping[str, Any], name: str) -> Network:
    """A row of define.networks. ConfigError for a fault that it has wherever it lies."""
    try:
        network = msgspec.convert(values["define"]["networks"][name], Network)
    except msgspec.ValidationError as error:
        raise ConfigError(f"network {name!r}: {error}") from error
    where = f"network {name!r} is of kind {network.kind}"
    if network.rate is not None:
        try:
            bits_per_s(network.rate)
        except ValueError as error:
            raise ConfigError(f"network {name!r}: {error}") from error
    asked = [key for key in ("delay_ms", "rtt_ms", "rate") if getattr(network, key) is not None]
    if network.kind == "loopback" and asked:
        raise ConfigError(f"{where}, to which nothing is added, with {' and '.join(asked)}; leave that out, or say kind: relay")
    if network.loss_percent and network.kind != "netns":
        raise ConfigError(f"{where} with loss_percent; a relay ends TCP, and packets can be lost in kind: netns alone")
    return network


def _check_kv_link(values: Mapping[str, Any], name: str, kv: str) -> None:
    """ConfigError unless row `kv` can be the link between the worker and the KV host of network `name`."""
    where, rows = f"network {name!r}: kv {kv!r}", values["define"]["networks"]
    if kv not in rows:
        raise ConfigError(f"{where} is not in config.define.networks; {_nearest(kv, [row for row in rows if row != name])}")
    if kv == name:
        raise ConfigError(f"{where} is the network itself; name another row, which lies between worker and KV host, or leave kv out")
    link = _network_of(values, kv)
    if link.kv is not None:
        raise ConfigError(f"{where} has a kv of its own, {link.kv!r}; there is one link to a KV host, name a row without kv")
    if link.congestion is not None:
        raise ConfigError(f"{where} has congestion {link.congestion!r}, which is set on the client's connection alone; leave it out there")


_KV_KINDS = {"local": ("loopback", "relay", "netns"), "external": ("loopback", "hosts"), "srun": ("hosts",)}
"""The kinds that a link between worker and KV host can be of, by config.worker.launch; `ssh` starts no KV host."""
_KV_PLACES = {"local": "starts on this machine", "external": "is the external worker's own", "srun": "is on this node, its worker is not"}


def _check_kv_place(values: Mapping[str, Any], name: str) -> None:
    """ConfigError if a chosen mode would cross the link to a KV host of network `name`, and the KV host's place allows no such link."""
    launch, kv = values["worker"]["launch"], values["define"]["networks"][name]["kv"]
    if kv is None or not uses_kv_host(values):
        return
    kind = values["define"]["networks"][kv]["kind"]
    if kind not in _KV_KINDS.get(launch, ()):
        place = f"with config.worker.launch {launch!r} the KV host {_KV_PLACES.get(launch, 'does not start')}"
        ways = " or ".join([*(f"kind: {each}" for each in _KV_KINDS.get(launch, ())), "networks without kv"])
        raise ConfigError(f"network {name!r}: kv {kv!r} is of kind {kind}; {place}, use {ways}")
    probe, frame = values["probe"]["payload_bytes"], max(values["worker"]["kv_host_bytes"], LEAST_PAYLOAD_BYTES)
    if launch != "external" and probe > frame:
        raise ConfigError(
            f"config.probe.payload_bytes {probe:,} is more than a frame to the KV host of network {name!r} may hold, {frame:,}; raise "
            "config.worker.kv_host_bytes, or probe with less"
        )


def uses_kv_host(values: Mapping[str, Any]) -> bool:
    """True if a chosen mode keeps blocks in a KV host, in a chosen phase."""
    rows, phases = values["define"]["modes"], values["define"]["phases"]
    pressed = {phase for phase in values["phases"] if KINDS[phases[phase]["kind"]].moves_kv}
    return any(rows[mode]["shadow"] == "kvhost" and bool(pressed & set(rows[mode]["phases"] or ())) for mode in values["modes"])


def _check_worker(values: Mapping[str, Any]) -> None:
    worker, launch = values["worker"], values["worker"]["launch"]
    if launch in ("ssh", "srun") and worker["secret_file"]:
        raise ConfigError(f"config.worker.secret_file is set with launch {launch!r}, which gets a new secret for each trial; leave it out")
    if launch == "ssh":
        _check_ssh(values)
    elif worker["host"]:
        raise ConfigError(f"config.worker.host is {worker['host']!r} with launch {launch!r}; say launch: ssh, or leave it out")
    if launch == "srun":
        _check_srun(worker)
    if launch == "external" and not worker["address"]:
        raise ConfigError("config.worker.launch is 'external' without an address; set worker.address to HOST:PORT of a `semgap serve`")
    if launch == "external" and worker["tls"] and not worker["secret_file"]:
        raise ConfigError("config.worker.tls with launch 'external' needs the secret that says who is there; set worker.secret_file too")
    if launch == "external" and worker["weight_cache"]:
        raise ConfigError("config.worker.weight_cache with launch 'external'; start that worker with `semgap serve --weight-cache DIR`")


def _check_ssh(values: Mapping[str, Any]) -> None:
    worker = values["worker"]
    if not worker["host"] or worker["host"].startswith("-"):
        raise ConfigError(f"config.worker.launch is 'ssh' with host {worker['host']!r}; set worker.host to a name that ssh knows")
    for mode in values["modes"]:
        if values["define"]["modes"][mode]["shadow"] == "kvhost":
            raise ConfigError(
                f"mode {mode!r} keeps KV blocks in a KV host, which worker.launch 'ssh' does not start; use shadow: worker, or launch: "
                "external with a worker that has one (semgap serve --kv-host)"
            )


def _check_srun(worker: Mapping[str, Any]) -> None:
    try:
        host, _ = parse_address(worker["address"] or "node:0")
        host.format(node="node")
    except (ValueError, KeyError, IndexError) as error:
        example = "HOST:PORT, where {node} stands for the worker's node, e.g. '{node}-ib0:0'"
        raise ConfigError(f"config.worker.address is {worker['address']!r} with launch 'srun'; it is {example}") from error
    if shutil.which("srun") is None:
        raise ConfigError("config.worker.launch is 'srun' and there is no srun on this machine's PATH; run on a cluster (docs/cluster.md)")
