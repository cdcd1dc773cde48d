"""The output head on a client, by the product of executor `fused`: bitwise the worker's logits, without torch."""

from __future__ import annotations

import numpy as np

from semgap.engine import cpu_kernels
from semgap.engine.architecture import architecture_of, head_names
from semgap.engine.model_files import ModelFiles
from semgap.tensors import Tensor, TensorClass


class FusedHead:
    """The linear map from a final hidden state (after the final norm) to logits: weight [vocab, hidden], bias (vocab,) or None."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self._weight, self._bias = np.array(weight), None if bias is None else np.array(bias)
        address = 0 if self._bias is None else self._bias.ctypes.data
        self._linear = np.array([self._weight.ctypes.data, *self._weight.shape, address, 0], np.int64)

    @classmethod
    def load(cls, model: ModelFiles) -> FusedHead:
        """The head out of a model's files."""
        found = dict(zip((tensor.name for tensor in model.digest.tensors), model.map(), strict=True))
        weight, bias = head_names(architecture_of(model.config), found)
        cpu_kernels.load()  # here, not in the first call, which may be timed
        return cls(found[weight].numpy(), found[bias].numpy() if bias else None)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocab) of hidden states (n, hidden)."""
        return Tensor.from_numpy(cpu_kernels.project(self._linear, np.array(hidden.numpy(), np.float32)), TensorClass.LOGITS)
