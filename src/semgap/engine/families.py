"""The model families that executors can run."""

from __future__ import annotations

FAMILIES = ("llama", "gptj", "gpt2")


class ModelError(ValueError):
    """This side cannot build or hold the model; the message says why. `code` travels in error frames."""

    code = "model"


def require_family(config: dict) -> str:
    """The family of a Hugging Face config. ModelError if it is not one of FAMILIES, or quantised."""
    family = config.get("model_type")
    if family not in FAMILIES or "quantization_config" in config:
        raise ModelError(f"model type {family!r} is not supported; use an unquantised model of {', '.join(FAMILIES)}")
    return str(family)
