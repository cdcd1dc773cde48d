"""The executors by name: which one a device runs, and how it is made. Imports no torch until one is made."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semgap.policy import SamplingRule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from semgap.engine.executor import Executor

EXECUTORS = ("auto", "fused", "eager", "cuda_graph")


def choose_executor(name: str, device: torch.device, dtype: str, config: Mapping[str, Any]) -> str:
    """The executor that one of EXECUTORS stands for, for a model of a Hugging Face `config` in `dtype`.

    auto is cuda_graph on a GPU; on a CPU fused, or eager if fused cannot run the model. ValueError if the named one cannot run here.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not known; use one of {', '.join(EXECUTORS)}")
    if name == "cuda_graph" or (name == "auto" and device.type == "cuda"):
        _require_cuda_graph(device)
        return "cuda_graph"
    if name == "eager":
        return "eager"
    reason = _no_fused(device, dtype, config)
    if reason and name == "fused":
        raise ValueError(f"executor fused cannot run this model: {reason}; use executor: eager, or auto")
    return "eager" if reason else "fused"


def _require_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"executor cuda_graph cannot run on {device}: it needs CUDA; use executor: eager, or see `semgap doctor`")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("executor cuda_graph needs Triton, which torch for CUDA brings along on Linux; install it, or use executor: eager")


def _no_fused(device: torch.device, dtype: str, config: Mapping[str, Any]) -> str | None:
    """Why fused cannot run a model here, or None."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device}"
    try:
        from semgap.engine.fused import unsupported
    except ImportError as error:
        return f"numba does not load: {error}"
    return unsupported(config, dtype)


def make_executor(kind: str, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None, threads: int = 1) -> Executor:
    """The executor named by `choose_executor`, for `model`, whose weights may arrive later. ModelError if it cannot run the model.

    `threads` are fused's; eager's are torch's own (`limit_threads`).
    """
    if kind == "cuda_graph":
        from semgap.engine.cuda_graph import GraphExecutor

        return GraphExecutor(model, max_length, rule)
    if kind == "fused":
        from semgap.engine.fused import FusedExecutor

        return FusedExecutor(model, max_length, rule, threads)
    from semgap.engine.eager import EagerExecutor

    return EagerExecutor(model, max_length, rule)


def load_kernels(device: str) -> None:
    """Loads the compiled kernels of a CPU, so that processes forked from this one have them. Nothing for a GPU or without numba.

    Asks no CUDA library: a process that did could not fork one that uses the GPU.
    """
    has_gpu = device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())
    if not has_gpu:
        with contextlib.suppress(ImportError):  # `choose_executor` then says why it takes eager
            from semgap.engine import cpu_kernels

            cpu_kernels.load()
