"""Refuses a model that does not fit its device, before anything is allocated."""

from collections.abc import Sequence

import psutil
import torch
from transformers import AutoConfig

from semgap.engine.families import ModelError, require_family
from semgap.engine.footprint import footprint, with_workspace
from semgap.policy import Policy
from semgap.tensors import nbytes_of
from semgap.wire.messages import WeightSpec


def require_room(
    config: dict, specs: Sequence[WeightSpec], dtype: torch.dtype, device: torch.device, max_length: int, policy: Policy, **load: float
) -> None:
    """DoesNotFit if the device has no room for the model, ModelError for an invalid model. Allocates nothing.

    `load`: the `handles` and `kv_budget` of footprint.footprint.
    """
    family = require_family(config)
    weights_bytes = sum(nbytes_of(spec.dtype, spec.shape) for spec in specs)
    try:
        whole = AutoConfig.for_model(**config)
        require_context(whole.max_position_embeddings, max_length)
        needed = footprint(whole.to_dict(), weights_bytes, dtype.itemsize, max_length, policy, **load)  # type: ignore[arg-type]
    except ModelError:
        raise
    except Exception as error:  # a client may send any config, and the libraries raise anything
        raise ModelError(f"the model's config is not a {family} config: {error}") from error
    (with_workspace(needed) if device.type == "cuda" else needed).require(_free_bytes(device), str(device))


def require_context(context: int, max_length: int) -> None:
    """ModelError if a model of `context` positions cannot hold `max_length`."""
    if max_length > context:
        raise ModelError(f"max_length {max_length} is more than the model's context of {context} positions")


def require_free(what: str, nbytes: int, device: torch.device) -> None:
    """ModelError if the device has fewer than `nbytes` free: otherwise the kernel would kill whichever process is largest."""
    free = _free_bytes(device)
    if nbytes > free:
        raise ModelError(f"{what} {nbytes:,} bytes and {device} has {free:,} free; use a smaller model, dtype or max_length")


def _free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated; on a GPU including torch's unused cache of this process."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
