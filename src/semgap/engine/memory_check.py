"""Refuses a model that does not fit its device, before anything is allocated. Imports torch for a GPU alone."""

from collections.abc import Sequence

from semgap.engine.architecture import Architecture, ModelError
from semgap.engine.footprint import footprint, with_workspace
from semgap.engine.footprint import free_bytes as known_free_bytes
from semgap.policy import Policy
from semgap.processes.machine import memory_left_bytes
from semgap.tensors import DType, nbytes_of
from semgap.wire.messages import WeightSpec


def require_room(
    model: Architecture, specs: Sequence[WeightSpec], dtype: DType, device: str, max_length: int, policy: Policy, **load: float
) -> None:
    """DoesNotFit if the device has no room for the model, ModelError if its context is too short. Allocates nothing.

    `load`: the `handles` and `kv_budget` of footprint.footprint. For a policy with batching NVML says what is free: its model is another
    process's, and asking CUDA would take memory of the device.
    """
    model.require_length(max_length)
    weights_bytes = sum(nbytes_of(spec.dtype, spec.shape) for spec in specs)
    needed = footprint(model, weights_bytes, dtype.itemsize, max_length, policy, **load)  # type: ignore[arg-type]
    free = free_bytes(device) if policy.batching is None else known_free_bytes(device)
    if free is not None:
        (with_workspace(needed) if device == "cuda" else needed).require(free, device)


def require_free(what: str, nbytes: int, device: str) -> None:
    """ModelError if the device has fewer than `nbytes` free: otherwise the kernel would kill whichever process is largest."""
    free = free_bytes(device)
    if nbytes > free:
        raise ModelError(f"{what} {nbytes:,} bytes and {device} has {free:,} free; use a smaller model, dtype or max_length")


def free_bytes(device: str) -> int:
    """Bytes that can be allocated; on a GPU including torch's unused cache of this process."""
    if device == "cpu":
        return memory_left_bytes()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
