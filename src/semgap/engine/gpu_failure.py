"""Errors of a failing GPU: how to tell them from other errors, and their message. Imports no torch."""

from semgap.telemetry.nvml import find_device, other_processes

_SIGNS = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "NCCL error", "Triton Error [CUDA]")
_FULL = ("out of memory", "ALLOC_FAILED")  # not torch's own allocation: a context's, a capture's, a library's workspace
_TAKEN = "busy or unavailable"


def gpu_failure(error: BaseException) -> str | None:
    """The message for an error of the GPU, its driver or its libraries, or None for any other error.

    torch raises AcceleratorError for the runtime's errors and a plain RuntimeError for its libraries'; Triton raises RuntimeError for
    all. After most of them the process's CUDA context is dead.
    """
    text, kind = str(error), type(error).__name__
    of_gpu = kind == "AcceleratorError" or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))
    if kind == "OutOfMemoryError" or (of_gpu and any(sign in text for sign in _FULL)):
        full = f"{device_title()} has no memory left: {_first_line(text)}"
        return f"{full}; use a smaller model, dtype or max_length, or end other processes on it{_others()}"
    if not of_gpu:
        return None
    if _TAKEN in text:
        taken = f"{device_title()} lets no further process compute: {_first_line(text)}"
        return f"{taken}; end the process that holds it{_others()}, or see its compute mode (`nvidia-smi -q -d COMPUTE`)"
    return (
        f"{device_title()} failed in the middle of the work: {_first_line(text)}; the results so far are lost. See `semgap doctor`, "
        "`nvidia-smi -q` (ECC errors, retired pages) and the kernel's log (Xid), then run it again"
    )


def device_title() -> str:
    """CUDA's device 0, by its index, name and UUID in NVML."""
    try:
        device = find_device()
    except Exception as error:  # a lost GPU may have no name either
        return f"the GPU (NVML: {error})"
    return f"GPU {device.index} ({device.name}, {device.uuid})"


def _others() -> str:
    """Who else holds memory of CUDA's device 0, if NVML knows: its free bytes were checked, and taken before they were allocated."""
    try:
        found = other_processes(find_device())
    except Exception:  # no NVML, no permission, a lost GPU
        return ""
    held = (f"pid {pid} holds {'unknown' if nbytes is None else f'{nbytes:,}'} bytes" for pid, nbytes in found)
    return f" ({', '.join(held)})" if found else ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
