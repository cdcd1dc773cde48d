"""The output head: the linear map from a final hidden state to logits, in the executor or in the client."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from semgap.codecs.arrays import from_wire, to_wire
from semgap.engine.architecture import ModelError, architecture_of, head_names
from semgap.engine.model_files import ModelFiles
from semgap.engine.weights import Weights
from semgap.tensors import Tensor, TensorClass


class OutputHead:
    """The linear map from a final hidden state (after the final norm) to logits, with the model's bias and divisor of logits, if any."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, divisor: float) -> None:
        self.weight, self.bias, self.divisor = weight, bias, divisor

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """The head of `model`. ModelError if it is not a linear map."""
        linear = model.get_output_embeddings()
        if not isinstance(linear, torch.nn.Linear):
            raise ModelError(f"the output head of {type(model).__name__} is {type(linear).__name__}, not a linear map")
        return cls(linear.weight, linear.bias, architecture_of(model.config.to_dict()).logits_divisor)

    @torch.inference_mode()
    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocab) of hidden states (n, hidden)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.divisor == 1 else logits / self.divisor

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The same for a client: logits in host memory of hidden states that came over the wire."""
        return to_wire(self(from_wire(hidden, "cpu")), TensorClass.LOGITS)


def load_head(model: ModelFiles) -> OutputHead:
    """The output head out of a model's weights file, in memory laid out as the executor's.

    The layout matters: a matrix-vector product over memory that is not aligned to 64 bytes gives other last bits.
    """
    specs, architecture = model.specs(), architecture_of(model.config)
    weight_name, bias_name = head_names(architecture, {spec.name for spec in specs})
    chosen = [index for index, spec in enumerate(specs) if spec.name in (weight_name, bias_name)]
    weights = Weights([specs[index] for index in chosen], "cpu")
    weights.read_file(model.weights_file, [model.digest.tensors[index].offset for index in chosen])
    found = weights.tensors()
    bias = found[bias_name] if bias_name else None
    return OutputHead(found[weight_name], bias, architecture.logits_divisor)
