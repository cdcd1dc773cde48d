"""The memory that a model needs on its device, compared with the free memory before anything is read, sent or allocated. No torch."""

from dataclasses import dataclass, replace

from semgap.engine.architecture import Architecture
from semgap.kv.pool import BLOCK
from semgap.policy import Policy
from semgap.processes.machine import memory_left_bytes
from semgap.telemetry.nvml import NoDevice, find_device, open_nvml

_GPU_WORKSPACE_BYTES = 256 << 20  # of cuBLAS (32 MiB a handle and stream on an H100), and the allocator's rounding


class DoesNotFit(ValueError):
    """The device has no room for the model. `code` travels in error frames."""

    code = "model"


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device: weights, KV memory, and room for the activations of the longest forward pass."""

    weights: int
    kv: int
    activations: int

    def require(self, free_bytes: int, device: str) -> None:
        """DoesNotFit, with every number, if the device has fewer bytes free."""
        total = self.weights + self.kv + self.activations
        if total > free_bytes:
            raise DoesNotFit(
                f"the model's weights need {self.weights:,} bytes, its KV memory {self.kv:,} and its activations up to "
                f"{self.activations:,}, together {total:,}, and {device} has {free_bytes:,} free; use a smaller model, dtype or max_length"
            )


def footprint(
    model: Architecture, weights_bytes: int, itemsize: int, max_length: int, policy: Policy, handles: int, kv_budget: float
) -> Footprint:
    """The footprint of a model whose weights, cache and activations have elements of `itemsize` bytes.

    `handles` requests are alive at a time, over KV memory for the fraction `kv_budget` of their caches; an engine's are whole blocks.
    Activations are those of a pass over n = max_length positions: 8 tensors of the hidden size and 3 of the MLP's, the logits of the
    policy's reply (twice), and for GPT-J, whose attention is not fused, the scores (n x n a head, twice in float32 and once in the dtype).
    """
    shape = model.kv_shape(max_length)
    cache = (replace(shape, max_length=shape.blocks * BLOCK) if policy.batching else shape).nbytes(itemsize)
    rows = max_length if policy.reply.kind == "logits_all" else 1
    activations = (max_length * (8 * model.hidden + 3 * model.feed) + 2 * rows * model.vocab) * itemsize
    if model.family == "gptj":
        activations += model.heads * max_length**2 * (8 + itemsize)
    return Footprint(weights_bytes, cache if policy.is_stateless else int(kv_budget * handles * cache), activations)


def free_bytes(device: str) -> int | None:
    """Free bytes of 'cpu', 'cuda' or 'auto' (the larger of both), or None if they cannot be known. Without torch."""
    memory = memory_left_bytes()
    if device == "cpu":
        return memory
    free = _gpu_free_bytes()
    if device == "cuda" or free is None:
        return memory if device == "auto" else free
    return max(free, memory)


def _gpu_free_bytes() -> int | None:
    """None if there is no GPU, or NVML does not know it."""
    try:
        uuid = find_device().uuid
        with open_nvml() as nvml:
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
    except NoDevice:
        return None


def with_workspace(footprint: Footprint) -> Footprint:
    """The footprint plus the memory of a GPU's libraries."""
    return Footprint(footprint.weights, footprint.kv, footprint.activations + _GPU_WORKSPACE_BYTES)
