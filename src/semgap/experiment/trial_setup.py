"""Before a trial starts a process: can this machine run it, is the model whole, and what does its client need to know."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from semgap.client.control import no_control
from semgap.client.spec import ClientSpec
from semgap.engine.architecture import ModelError
from semgap.engine.footprint import DoesNotFit, footprint, free_bytes
from semgap.engine.model_files import ModelDigest, ModelFiles, load_digest, verify_model
from semgap.experiment.cell import Cell
from semgap.policy import unrunnable
from semgap.processes import slurm
from semgap.processes.machine import split_cores
from semgap.tensors import DType


class TrialError(Exception):
    """A trial failed. The message says which process, why, and quotes the end of its log."""


@dataclass(frozen=True)
class Paths:
    """The model's directory and the workflow's."""

    model_directory: Path
    root: Path


def require_runnable(cell: Cell) -> None:
    """TrialError if this machine cannot run the mode; AllocationError if srun has no other node for its worker. Takes no time."""
    reason = unrunnable(cell.policy, cell.mode, cell.worker.launch)
    if reason:
        raise TrialError(reason)
    if cell.worker.launch == "srun" and not cell.policy.is_local:
        slurm.allocation()


def check_model(directory: Path, cell: Cell) -> ModelDigest:
    """The model's digest, after reading the whole weights file, which also brings it into the page cache.

    ModelFileError for a damaged file. Before reading it: TrialError if the model is not the config's, or does not fit the device.
    """
    digest = load_digest(directory)
    if digest.dtype != cell.dtype:
        raise TrialError(f"{directory} holds {digest.dtype}, the config says dtype: {cell.dtype}; rerun rule fetch_model")
    if cell.max_length > digest.max_positions:
        context = f"the context of model {digest.name!r}, {digest.max_positions} positions"
        raise TrialError(f"config.max_length {cell.max_length} is more than {context}")
    model = ModelFiles(directory, digest)
    try:
        model.architecture.require_length(cell.max_length)
    except ModelError as error:
        raise TrialError(f"model {digest.name!r}: {error}") from error
    _require_room(model, cell)
    return verify_model(directory)


def _require_room(model: ModelFiles, cell: Cell) -> None:
    """TrialError if the device of this machine is too small. Another machine's worker checks its own."""
    local = cell.policy.is_local
    free = free_bytes(cell.device) if local or cell.worker.launch == "local" else None
    if free is None:
        return
    weights_bytes = sum(tensor.nbytes for tensor in model.digest.tensors)
    itemsize = DType.from_torch_name(cell.dtype).itemsize
    kv_budget = 1.0 if local else cell.phase.kv_budget
    handles = cell.phase.most_live + (no_control(cell.policy, cell.phase) is None)
    needed = footprint(model.architecture, weights_bytes, itemsize, cell.max_length, cell.policy, handles, kv_budget)
    try:
        needed.require(free, f"device {cell.device}")
    except DoesNotFit as error:
        raise TrialError(str(error)) from error


def client_spec(cell: Cell, paths: Paths, scratch: Path, text_pass: bool = False) -> ClientSpec:
    """The client's spec without its worker. Its files go to `scratch`."""
    computing, thin = cores(cell)
    policy, phase = cell.policy, cell.phase
    files = ModelFiles(paths.model_directory, load_digest(paths.model_directory))
    return ClientSpec(
        directory=str(scratch),
        model_directory=str(paths.model_directory),
        prompts_file=str(paths.root / cell.prompts),
        policy=policy,
        phase=msgspec.structs.replace(phase, steps=min(phase.steps, policy.max_steps or phase.steps)),
        dtype=cell.dtype,
        threads=cell.threads,
        max_length=cell.max_length,
        device=cell.device,
        executor=cell.executor,
        drawing=cell.drawing,
        cpus=computing if policy.is_local else thin,
        text_pass=text_pass,
        trial=cell.trial,
        layers=files.architecture.layers,
        model_id=files.digest.sha256,
        root=str(paths.root),
    )


def cores(cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cores of the computing side and of the thin side: the config's, or the last `threads` allowed ones and the rest. TrialError."""
    try:
        return split_cores(cell.threads, cell.cpus.worker or (), cell.cpus.client or ())
    except ValueError as error:
        raise TrialError(f"config.cpus: {error}") from error
