"""Torch's device and thread counts, fixed before any work."""

import torch


def limit_threads(threads: int) -> None:
    """Fixes torch's thread counts, before any work: with other counts, logits may differ in their last bits."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:  # torch accepts it once
        torch.set_num_interop_threads(1)


def choose_device(name: str) -> torch.device:
    """The device of 'cpu', 'cuda' or 'auto' (the GPU if there is one). ValueError for cuda without a usable GPU."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' needs a usable GPU, which this machine lacks; use device: cpu, or see `semgap doctor`")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
