"""The device that a process computes on, and torch's thread counts. Imports torch only where there may be a GPU."""

from pathlib import Path

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's on Linux, and under WSL


def may_have_gpu(name: str) -> bool:
    """True if device `name` ('cpu', 'cuda' or 'auto') may be a GPU here. Asks no CUDA library: a process that did could not fork one that
    uses the GPU."""
    return name == "cuda" or (name == "auto" and any(Path(driver).exists() for driver in _DRIVERS))


def choose_device(name: str) -> str:
    """'cpu' or 'cuda', for 'cpu', 'cuda' or 'auto' (the GPU if there is one). ValueError for cuda without a usable GPU."""
    if not may_have_gpu(name):
        return "cpu"
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError(
            f"device 'cuda' needs a usable GPU, which this machine lacks: {why_no_cuda()}; use device: cpu, or see `semgap doctor`"
        )
    return "cuda" if has_cuda else "cpu"


def why_no_cuda() -> str:
    """Why torch has no usable GPU, in its own words: it is built without CUDA, or there is no driver, or one too old for its CUDA."""
    import torch

    version = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{version}: {str(error).strip().splitlines()[0]}"
    return f"{version}: it counts {torch.cuda.device_count()} GPUs"


def limit_threads(threads: int) -> None:
    """Fixes torch's thread counts, before any work: with other counts, logits may differ in their last bits."""
    import torch

    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:  # torch accepts it once
        torch.set_num_interop_threads(1)
