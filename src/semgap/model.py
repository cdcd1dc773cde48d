"""A causal LM over weight memory that was allocated before its bytes arrived, from a file or from the wire alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from semgap.kv.blocks import KVShape
from semgap.tensors import bytes_view, nbytes_of
from semgap.wire import WeightSpec

FAMILIES = ("llama", "gptj", "gpt2")
_ATTENTION = {"llama": "sdpa", "gptj": "eager", "gpt2": "sdpa"}  # transformers' GPT-J knows no other
_ALIGNMENT = 64  # a cache line, and what torch's own allocator gives
_READ_BYTES = 1 << 26


class ModelError(ValueError):
    """A model that this side cannot build or hold; the message says why. `code` travels in error frames."""

    code = "model"


class Weights:
    """The memory of a model's weights: one host buffer, and a copy on the device where that is not the CPU.

    The same layout for a model read from a file and one received, so that where weights came from cannot change a step's time.
    """

    def __init__(self, specs: Sequence[WeightSpec], device: torch.device) -> None:
        self.specs = tuple(specs)
        self.device = device
        self._offsets: list[int] = []
        end = 0
        for spec in self.specs:
            self._offsets.append(end)
            end += -(-nbytes_of(spec.dtype, spec.shape) // _ALIGNMENT) * _ALIGNMENT
        refuse_what_does_not_fit("the model's weights need", end, device)
        self._host = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes = bytes_view(self._host.numpy())
        self._device = self._host if device.type == "cpu" else torch.empty(end, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, without padding."""
        return sum(nbytes_of(spec.dtype, spec.shape) for spec in self.specs)

    def buffer(self, index: int) -> memoryview:
        """The host bytes of weight `index`, to be filled."""
        return self._bytes[self._offsets[index] : self._offsets[index] + self._nbytes(index)]

    def commit(self, indices: Sequence[int]) -> int:
        """Makes filled host bytes the model's; gives the bytes that went to a device (0 on the CPU, which reads them in place)."""
        if self.device.type == "cpu":
            return 0
        for index in indices:
            part = slice(self._offsets[index], self._offsets[index] + self._nbytes(index))
            self._device[part].copy_(self._host[part], non_blocking=True)
        torch.cuda.synchronize(self.device)
        return sum(self._nbytes(index) for index in indices)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of the weights by name, on the device."""
        return {spec.name: self._view(index, spec) for index, spec in enumerate(self.specs)}

    def read_file(self, path: Path, offsets: Sequence[int]) -> None:
        """Fills all weights from `path`, weight i at byte offsets[i]."""
        with path.open("rb", buffering=0) as file:
            for index, offset in enumerate(offsets):
                target = self.buffer(index)
                done = 0
                while done < target.nbytes:
                    got = os.preadv(file.fileno(), [target[done : done + _READ_BYTES]], offset + done)
                    if not got:
                        raise ModelError(f"{path} ends inside weight {self.specs[index].name!r}")
                    done += got
        self.commit(range(len(self.specs)))

    def _nbytes(self, index: int) -> int:
        return nbytes_of(self.specs[index].dtype, self.specs[index].shape)

    def _view(self, index: int, spec: WeightSpec) -> torch.Tensor:
        flat = self._device[self._offsets[index] : self._offsets[index] + self._nbytes(index)]
        return flat.view(getattr(torch, spec.dtype.torch_name)).view(spec.shape)


def build_model(config: dict, weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a Hugging Face `config` whose parameters are views of `weights`. Never runs remote code.

    ModelError for a family that is not supported, or where names, shapes or dtypes of the weights are not the model's.
    """
    family = config.get("model_type")
    if family not in FAMILIES or "quantization_config" in config:
        raise ModelError(f"model type {family!r} is not supported; use an unquantised model of {', '.join(FAMILIES)}")
    try:
        parsed = AutoConfig.for_model(**config)
        with no_init_weights():
            attention = _ATTENTION[config["model_type"]]
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise at a config that a client made up
        raise ModelError(f"the model's config is not a {family} config: {error}") from error
    _bind(model, weights, dtype)
    for module in model.modules():  # buffers such as RoPE's inv_freq are computed, not sent
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(weights.device))
    return model.eval()


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


def kv_shape(model: PreTrainedModel, max_length: int) -> KVShape:
    """The KV cache's shape for one handle of `model`."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVShape(config.num_hidden_layers, heads, max_length, head_dim)


def _bind(model: PreTrainedModel, weights: Weights, dtype: torch.dtype) -> None:
    given = weights.tensors()
    expected = model.state_dict()
    unknown = sorted(given.keys() - expected.keys())
    if unknown:
        raise ModelError(f"weights {', '.join(unknown[:3])} do not belong to the model")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape or tensor.dtype != dtype:
            raise ModelError(
                f"weight {name!r} is {tensor.dtype} {tuple(tensor.shape)}, the model wants {dtype} {tuple(expected[name].shape)}"
            )
    model.load_state_dict(given, strict=False, assign=True)
    model.tie_weights()
    bound = {tensor.data_ptr() for tensor in given.values()}
    unbound = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in bound]
    if unbound:
        raise ModelError(f"weights {', '.join(unbound[:3])} were not given")


def refuse_what_does_not_fit(what: str, nbytes: int, device: torch.device) -> None:
    """ModelError where `nbytes` are more than the device has free; else the kernel would kill whichever process is largest."""
    free = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if nbytes > free:
        raise ModelError(f"{what} {nbytes:,} bytes and {device} has {free:,} free; use a smaller model, dtype or max_length")
