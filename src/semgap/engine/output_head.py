"""The output head: the linear map from a final hidden state to logits, on whichever side applies it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from semgap.engine.memory_check import ModelError
from semgap.engine.model_files import ModelFiles
from semgap.engine.weights import Weights
from semgap.wire.messages import WeightSpec


def load_head(
    config: dict, specs: Sequence[WeightSpec], file: Path, offsets: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """Weight, bias and soft-capping of a model's output head, read from its weights file into memory laid out as the executor's.

    The same alignment matters: a matrix-vector product over memory that is not aligned to 64 bytes gives other last bits.
    """
    names = {spec.name for spec in specs}
    tied = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight", "gptj": "transformer.wte.weight"}
    wanted = {"lm_head.weight" if "lm_head.weight" in names else tied[config["model_type"]], "lm_head.bias"} & names
    chosen = [index for index, spec in enumerate(specs) if spec.name in wanted]
    weights = Weights([specs[index] for index in chosen], torch.device("cpu"))
    weights.read_file(file, [offsets[index] for index in chosen])
    found = weights.tensors()
    bias = found.pop("lm_head.bias", None)
    (weight,) = found.values()
    return weight, bias, config.get("final_logit_softcapping")


class OutputHead:
    """The linear map from a final hidden state (after the final norm) to logits, with bias and soft-capping where a model has them."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, soft_cap: float | None) -> None:
        self.weight, self.bias, self.soft_cap = weight, bias, soft_cap

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """The head of `model`. ModelError where that is not a linear map."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, torch.nn.Linear):
            raise ModelError(f"the output head of {type(model).__name__} is {type(linear).__name__}, not a linear map")
        return cls(linear.weight, linear.bias, getattr(model.config, "final_logit_softcapping", None))

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of hidden states (n, hidden)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def load_output_head(model: ModelFiles, threads: int) -> OutputHead:
    """The output head in this process: torch, and a copy of the head's weights where the executor would have them."""
    from semgap.engine.torch_device import limit_threads

    limit_threads(threads)
    return OutputHead(*load_head(model.config, model.specs(), model.weights_file, [t.offset for t in model.digest.tensors]))
