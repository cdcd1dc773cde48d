"""A GPU that fails in the middle of the work: how that is told from other errors, and what is said of it. Imports no torch."""

from __future__ import annotations

from semgap.telemetry.nvml import find_device

_SIGNS = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL error", "Triton Error [CUDA]")


def gpu_failure(error: BaseException) -> str | None:
    """What to tell of an error of the GPU, its driver or its libraries; None for any other one.

    torch has AcceleratorError for the runtime's errors and a plain RuntimeError for its libraries'; Triton has that for all. After most of
    them the process's CUDA context is of no more use, whatever is asked of it next.
    """
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError":
        told = f"{device_title()} has no memory left: {_first_line(text)}"
        return f"{told}; use a smaller model, dtype or max_length, or end what else runs on it"
    if type(error).__name__ != "AcceleratorError" and not (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)):
        return None
    return (
        f"{device_title()} failed in the middle of the work: {_first_line(text)}; what was computed is lost. See `semgap doctor`, "
        "`nvidia-smi -q` (ECC errors, retired pages) and the kernel's log (Xid), then run it again"
    )


def device_title() -> str:
    """The GPU that CUDA calls device 0 here, by index, name and UUID as NVML has them."""
    try:
        device = find_device()
    except Exception as error:  # a GPU that is lost may have no name either
        return f"the GPU (NVML: {error})"
    return f"GPU {device.index} ({device.name}, {device.uuid})"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
