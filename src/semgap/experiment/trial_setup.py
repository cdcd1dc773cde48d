"""What a trial needs before any process starts: its model, its cores, its client's spec, and whether this machine can run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from semgap.client.runtime import Drawing
from semgap.client.spec import ClientSpec, Phase
from semgap.engine.footprint import DoesNotFit, footprint, free_bytes
from semgap.engine.model_files import ModelDigest, ModelFiles, load_digest, verify_model
from semgap.policy import Policy, SamplingRule, policy_from, unrunnable
from semgap.processes import slurm
from semgap.processes.machine import split_cores
from semgap.tensors import DType


class TrialError(Exception):
    """A trial that failed; the message says which process, why, and the last lines of its log."""


@dataclass(frozen=True)
class Paths:
    """Where a trial finds what it needs: the model's directory and the workflow's."""

    model_directory: Path
    root: Path


def require_other_node(cell: Mapping[str, Any], policy: Policy) -> None:
    """AllocationError, before anything is waited for or started, where srun has no other node to start a worker on."""
    if cell["worker"]["launch"] == "srun" and not policy.is_local:
        slurm.allocation()


def runnable_policy(cell: Mapping[str, Any]) -> Policy:
    """The cell's policy. TrialError, before any work, where it cannot be run on this machine."""
    policy = policy_from(cell["policy"], cell["mode"])
    reason = unrunnable(policy, cell["mode"], cell["worker"]["launch"])
    if reason:
        raise TrialError(reason)
    return policy


def check_model(directory: Path, cell: Mapping[str, Any]) -> ModelDigest:
    """The model's digest, after its file was read once and found whole, which also brings it into the page cache.

    Before that file is read: TrialError where the device has no room for the model, as far as this process can know.
    """
    digest = load_digest(directory)
    if digest.dtype != cell["dtype"]:
        raise TrialError(f"{directory} holds {digest.dtype}, the config says dtype: {cell['dtype']}; rerun rule fetch_model")
    if cell["max_length"] > digest.max_positions:
        raise TrialError(
            f"config.max_length {cell['max_length']} is more than the context of model {digest.name!r}, {digest.max_positions} positions"
        )
    _require_room(ModelFiles(directory, digest), cell)
    return verify_model(directory)


def _require_room(model: ModelFiles, cell: Mapping[str, Any]) -> None:
    policy = policy_from(cell["policy"], cell["mode"]) if "policy" in cell else Policy(placement="local")
    phase = cell.get("phase_spec", {"live_requests": 1, "kv_budget": 1.0})
    elsewhere = not policy.is_local and cell["worker"]["launch"] != "local"
    free = None if elsewhere else free_bytes(cell["device"])
    if free is None:
        return
    weights_bytes = sum(tensor.nbytes for tensor in model.digest.tensors)
    itemsize = DType.from_torch_name(cell["dtype"]).itemsize
    kv_budget = 1.0 if policy.is_local else phase["kv_budget"]
    needed = footprint(model.config, weights_bytes, itemsize, cell["max_length"], policy, phase["live_requests"], kv_budget)
    try:
        needed.require(free, f"device {cell['device']}")
    except DoesNotFit as error:
        raise TrialError(str(error)) from error


def client_spec(cell: Mapping[str, Any], policy: Policy, place: Paths, scratch: Path) -> ClientSpec:
    computing, thin = cores(cell)
    phase = msgspec.convert(cell["phase_spec"], Phase)
    files = ModelFiles(place.model_directory, load_digest(place.model_directory))
    return ClientSpec(
        directory=str(scratch),
        model_directory=str(place.model_directory),
        prompts_file=str(place.root / cell["prompts"]),
        policy=policy,
        phase=msgspec.structs.replace(phase, steps=min(phase.steps, policy.max_steps or phase.steps)),
        dtype=cell["dtype"],
        threads=cell["threads"],
        max_length=cell["max_length"],
        device=cell["device"],
        executor=cell["executor"],
        drawing=Drawing(msgspec.convert(cell["sampling"]["rule"], SamplingRule), cell["sampling"]["seed"]),
        cpus=computing if policy.is_local else thin,
        layers=files.layers,
        model_id=files.digest.sha256,
    )


def computing_cores(cell: Mapping[str, Any]) -> tuple[int, ...]:
    """Cores of the side that computes."""
    return cores(cell)[0]


def cores(cell: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores of the side that computes and of the thin side: the config's, or the last `threads` allowed ones and the rest."""
    try:
        return split_cores(cell["threads"], tuple(cell["cpus"]["worker"] or ()), tuple(cell["cpus"]["client"] or ()))
    except ValueError as error:
        raise TrialError(f"config.cpus: {error}") from error
