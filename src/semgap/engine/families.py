"""The model families that executors can run."""

from collections.abc import Collection

FAMILIES = ("llama", "gptj", "gpt2")
_EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight", "gptj": "transformer.wte.weight"}


class ModelError(ValueError):
    """This side cannot build or hold the model; the message says why. `code` travels in error frames."""

    code = "model"


def require_family(config: dict) -> str:
    """The family of a Hugging Face config. ModelError if it is not one of FAMILIES, or quantised."""
    family = config.get("model_type")
    if family not in FAMILIES or "quantization_config" in config:
        raise ModelError(f"model type {family!r} is not supported; use an unquantised model of {', '.join(FAMILIES)}")
    return str(family)


def head_names(family: str, names: Collection[str]) -> tuple[str, str | None]:
    """The names of the output head's weight, tied to the embeddings if the model has no own, and of its bias, if any."""
    weight = "lm_head.weight" if "lm_head.weight" in names else _EMBEDDINGS[family]
    return weight, "lm_head.bias" if "lm_head.bias" in names else None
