"""The memory that a model needs on its device, compared with the free memory before anything is read, sent or allocated. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from semgap.policy import Policy
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
    config: Mapping[str, Any], weights_bytes: int, itemsize: int, max_length: int, policy: Policy, handles: int, kv_budget: float
) -> Footprint:
    """The footprint of a model with this Hugging Face config, whose weights, cache and activations have elements of `itemsize` bytes.

    `handles` requests are alive at a time, over KV memory for the fraction `kv_budget` of their caches. Activations are those of a pass
    over n = max_length positions: 8 tensors of the hidden size and 3 of the MLP's, the logits of the policy's reply (twice), and for
    GPT-J, whose attention is not fused, the scores (n x n a head, twice in float32 and once in the dtype). KeyError,
    ZeroDivisionError, TypeError or ValueError for an invalid config.
    """
    hidden, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    cache = 2 * _first(config, "num_hidden_layers", "n_layer") * kv_heads * head_dim * max_length * itemsize
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    rows = max_length if policy.reply.kind == "logits_all" else 1
    activations = (max_length * (8 * hidden + 3 * inner) + 2 * rows * config["vocab_size"]) * itemsize
    if config["model_type"] == "gptj":
        activations += heads * max_length**2 * (8 + itemsize)
    return Footprint(weights_bytes, cache if policy.is_stateless else int(kv_budget * handles * cache), activations)


def free_bytes(device: str) -> int | None:
    """Free bytes of 'cpu', 'cuda' or 'auto' (the larger of both), or None if they cannot be known. Without torch."""
    memory = psutil.virtual_memory().available
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
            try:
                return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(uuid)).free)
            except nvml.NVMLError:
                return None
    except NoDevice:
        return None


def with_workspace(footprint: Footprint) -> Footprint:
    """The footprint plus the memory of a GPU's libraries."""
    return Footprint(footprint.weights, footprint.kv, footprint.activations + _GPU_WORKSPACE_BYTES)


def _first(config: Mapping[str, Any], *names: str) -> int:
    """The config's value under the first of `names` that the family uses."""
    return int(config[next((name for name in names if name in config), names[0])])
