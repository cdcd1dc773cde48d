"""The executors by name: which one a device runs, how it is made, and what to load before. Imports torch for eager and a GPU alone."""

import contextlib
import importlib.util
from typing import Any

from semgap.engine.architecture import ModelError, architecture_of
from semgap.engine.decoder_weights import require_kernels, unsupported
from semgap.engine.device import limit_threads, may_have_gpu
from semgap.engine.executor import Executor
from semgap.engine.host_compiler import why_no_launcher
from semgap.engine.weights import Weights
from semgap.policy import SamplingRule
from semgap.tensors import DType

EXECUTORS = ("auto", "fused", "eager", "cuda_graph")


def choose_executor(name: str, device: str, dtype: str, config: dict[str, Any] | None) -> tuple[str, str | None]:
    """The executor that one of EXECUTORS stands for, for a model of a Hugging Face `config` in `dtype` (None: no model); and why `auto`
    took eager, else None.

    auto is cuda_graph on a GPU and fused on a CPU, or eager if that cannot run the model. ValueError if the named one cannot run here.
    """
    if name not in EXECUTORS:
        raise ValueError(f"executor {name!r} is not known; use one of {', '.join(EXECUTORS)}")
    if name == "cuda_graph" or (name == "auto" and device == "cuda"):
        why = why_no_graphs(device) or (_no_kernel(config) if name == "auto" else None)
        if why and name == "cuda_graph":
            raise ValueError(f"executor cuda_graph cannot run on {device}: {why}; use executor: eager, or see `semgap doctor`")
        return ("eager", why) if why else ("cuda_graph", None)
    if name == "eager":
        return "eager", None
    reason = _no_fused(device, dtype, config)
    if reason and name == "fused":
        raise ValueError(f"executor fused cannot run this model: {reason}; use executor: eager, or auto")
    return ("eager", reason) if reason else ("fused", None)


def why_no_graphs(device: str) -> str | None:
    """Why no model can run as CUDA graphs here, with the way out, or None."""
    if device != "cuda":
        return "it needs CUDA"
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which torch for CUDA brings along on Linux; install it"
    return why_no_launcher()


def _no_fused(device: str, dtype: str, config: dict[str, Any] | None) -> str | None:
    """Why fused cannot run a model here, or None."""
    if device != "cpu":
        return f"it runs on a CPU, not on {device}"
    if dtype != "float32":
        return f"it computes in float32 only, not in {dtype}"
    try:
        from semgap.engine import cpu_kernels  # noqa: F401
    except ImportError as error:
        return f"numba does not load: {error}"
    return _no_kernel(config)


def _no_kernel(config: dict[str, Any] | None) -> str | None:
    """Why no compiled executor can run a model, or None."""
    why = unsupported(architecture_of(config)) if config is not None else None
    return why and f"it has no kernel for {why}"


def compiled_for(kind: str) -> str | None:
    """The machine that the kernels of executor `fused` are compiled for; None for another executor."""
    if kind != "fused":
        return None
    from semgap.engine import kernel_cache

    return kernel_cache.compiled_for()


def make_executor(
    kind: str, config: dict[str, Any], weights: Weights, dtype: str, threads: int, max_length: int, rule: SamplingRule | None = None
) -> Executor:
    """The executor named by `choose_executor`, for a model whose weights may arrive later. ModelError if it cannot run the model."""
    if kind == "fused":
        from semgap.engine.fused import FusedExecutor

        _require_dtype(weights, DType.from_torch_name(dtype))
        return FusedExecutor(architecture_of(config), weights, max_length, threads, rule)
    from semgap.engine.model import build_model

    limit_threads(threads)
    model = build_model(config, weights, dtype)
    if kind == "cuda_graph":
        from semgap.engine.cuda_graph import GraphExecutor

        return GraphExecutor(model, max_length, rule)
    from semgap.engine.eager import EagerExecutor

    return EagerExecutor(model, max_length, rule)


def check_executor(kind: str, config: dict[str, Any], weights: Weights, dtype: str, threads: int, max_length: int) -> None:
    """Raises as `make_executor`, for an executor that another process makes on its own device; `weights` are in host memory."""
    if kind == "cuda_graph":
        require_kernels(architecture_of(config))
        kind = "eager"
    make_executor(kind, config, weights, dtype, threads, max_length)


def _require_dtype(weights: Weights, dtype: DType) -> None:
    for spec in weights.specs:
        if spec.dtype is not dtype:
            raise ModelError(f"weight {spec.name!r} is {spec.dtype.name}, the session computes in {dtype.name}")


def preload(device: str, executor: str) -> None:
    """Loads an executor's libraries, so that processes forked from this one have them: compiled kernels, or torch and transformers.

    Initialises no GPU: a process that did could not fork one that uses it.
    """
    if may_have_gpu(device) or executor in ("eager", "cuda_graph"):
        import semgap.engine.eager
        import semgap.engine.model  # noqa: F401

        return
    with contextlib.suppress(ImportError):  # `choose_executor` then says why it takes eager
        from semgap.engine import cpu_kernels

        cpu_kernels.load()
