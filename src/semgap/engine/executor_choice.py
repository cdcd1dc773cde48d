"""The executors by name: which one a device runs, and how it is made. Imports no torch until one is made."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from semgap.policy import SamplingRule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from semgap.engine.executor import Executor

EXECUTORS = ("auto", "eager", "cuda_graph")


def choose_executor(name: str, device: torch.device) -> str:
    """'eager' or 'cuda_graph' for one of EXECUTORS: auto is cuda_graph on a GPU. ValueError if this process cannot run cuda_graph."""
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not known; use one of {', '.join(EXECUTORS)}")
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return "eager"
    if device.type != "cuda":
        raise ValueError(f"executor cuda_graph cannot run on {device}: it needs CUDA; use executor: eager, or see `semgap doctor`")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("executor cuda_graph needs Triton, which torch for CUDA brings along on Linux; install it, or use executor: eager")
    return "cuda_graph"


def make_executor(kind: str, model: PreTrainedModel, max_length: int, rule: SamplingRule | None = None) -> Executor:
    """The executor named by `choose_executor`, for `model`, whose weights may arrive later. ModelError if it cannot run the model."""
    if kind == "cuda_graph":
        from semgap.engine.cuda_graph import GraphExecutor

        return GraphExecutor(model, max_length, rule)
    from semgap.engine.eager import EagerExecutor

    return EagerExecutor(model, max_length, rule)
