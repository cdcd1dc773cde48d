"""A causal LM over weight memory that was allocated before its bytes arrived, from a file or from the wire alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from semgap.footprint import footprint, with_workspace
from semgap.kv.blocks import KVShape
from semgap.policy import Policy
from semgap.staging import Passage, Staging
from semgap.tensors import bytes_view, nbytes_of
from semgap.wire import Sink, WeightSpec

FAMILIES = ("llama", "gptj", "gpt2")
_ATTENTION = {"llama": "sdpa", "gptj": "eager", "gpt2": "sdpa"}  # transformers' GPT-J knows no other
_ALIGNMENT = 64  # a cache line, and what torch's own allocator gives


class ModelError(ValueError):
    """A model that this side cannot build or hold; the message says why. `code` travels in error frames."""

    code = "model"


class Weights:
    """The memory of a model's weights, on its device and nowhere else. On the CPU bytes land in it; on a GPU they come through `staging`.

    The same layout for a model read from a file and one received, so that where weights came from cannot change a step's time.
    """

    def __init__(self, specs: Sequence[WeightSpec], device: torch.device, staging: Staging | None = None) -> None:
        self.specs = tuple(specs)
        self.device = device
        self.sizes = [nbytes_of(spec.dtype, spec.shape) for spec in self.specs]
        self._offsets: list[int] = []
        end = 0
        for nbytes in self.sizes:
            self._offsets.append(end)
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        refuse_what_does_not_fit("the model's weights need", end, device)
        self._memory = torch.empty(end, dtype=torch.uint8, device=device)
        self._staging = staging or (Staging(device) if device.type == "cuda" else None)
        self._bytes = None if self._staging else bytes_view(self._memory.numpy())

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, without padding."""
        return sum(self.sizes)

    @property
    def slot_bytes(self) -> int | None:
        """Of the staging memory that weights pass through; None where they do not."""
        return self._staging.slot_bytes if self._staging else None

    def place(self, index: int) -> memoryview | Passage:
        """Where a receiver puts weight `index`: its memory, or a sink that copies to the device meanwhile."""
        part = slice(self._offsets[index], self._offsets[index] + self.sizes[index])
        if self._staging:
            return self._staging.into(self._memory[part])
        assert self._bytes is not None
        return self._bytes[part]

    def sink(self, index: int) -> Sink:
        """The same, always as a sink."""
        place = self.place(index)
        return _Direct(place) if isinstance(place, memoryview) else place

    def take_copied(self) -> int:
        """Bytes that went to a device since this was asked last: 0 on the CPU, where nothing crosses."""
        return self._staging.take_copied() if self._staging else 0

    def settle(self) -> None:
        """Waits until all that came is in the model's memory. Before a forward pass."""
        if self._staging:
            self._staging.settle()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Views of the weights by name, on the device."""
        return {spec.name: self._view(index, spec) for index, spec in enumerate(self.specs)}

    def read_file(self, path: Path, offsets: Sequence[int]) -> None:
        """Fills all weights from `path`, weight i at byte offsets[i]."""
        with path.open("rb", buffering=0) as file:
            for index, offset in enumerate(offsets):
                sink, done = self.sink(index), 0
                while done < sink.nbytes:
                    got = os.preadv(file.fileno(), [sink.window()], offset + done)
                    if not got:
                        raise ModelError(f"{path} ends inside weight {self.specs[index].name!r}")
                    sink.took(got)
                    done += got
        self.settle()

    def _view(self, index: int, spec: WeightSpec) -> torch.Tensor:
        flat = self._memory[self._offsets[index] : self._offsets[index] + self.sizes[index]]
        return flat.view(getattr(torch, spec.dtype.torch_name)).view(spec.shape)


class _Direct:
    """A wire.Sink over memory that is where the bytes belong."""

    def __init__(self, memory: memoryview) -> None:
        self.nbytes = memory.nbytes
        self._left = memory

    def window(self) -> memoryview:
        return self._left

    def took(self, count: int) -> None:
        self._left = self._left[count:]


def fill(sink: Sink, data: memoryview) -> None:
    """Puts bytes that are here already, as many as it takes, through a sink."""
    done = 0
    while done < sink.nbytes:
        window = sink.window()
        count = min(window.nbytes, sink.nbytes - done)
        window[:count] = data[done : done + count]
        sink.took(count)
        done += count


def build_model(config: dict, weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a Hugging Face `config` whose parameters are views of `weights`. Never runs remote code.

    ModelError for a family that is not supported, or where names, shapes or dtypes of the weights are not the model's.
    """
    family = _require_family(config)
    try:
        parsed = AutoConfig.for_model(**config)
        with torch.device("meta"):
            attention = _ATTENTION[config["model_type"]]
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise at a config that a client made up
        raise ModelError(f"the model's config is not a {family} config: {error}") from error
    _bind(model, weights, dtype)
    _compute_buffers(model, weights.device)
    return model.eval()


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes what a model derives from its config (rotary tables, causal masks) as `from_pretrained` does.

    The model was built on the meta device under its own dtype. There a float16 GPT-J computes its rotary frequencies in float16, and the
    sine of position 2047 is off by 0.76. transformers' own initialisation computes them in float32 and leaves bound weights alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
    model.initialize_weights()


def require_room(
    config: dict, specs: Sequence[WeightSpec], dtype: torch.dtype, device: torch.device, max_length: int, policy: Policy, **load: float
) -> None:
    """Before anything is allocated: DoesNotFit where the device has no room for the model, ModelError for one that cannot be.

    `load`: the `handles` and `kv_budget` of footprint.footprint.
    """
    family = _require_family(config)
    weights_bytes = sum(nbytes_of(spec.dtype, spec.shape) for spec in specs)
    try:
        whole = AutoConfig.for_model(**config)
        _require_context(whole.max_position_embeddings, max_length)
        needed = footprint(whole.to_dict(), weights_bytes, dtype.itemsize, max_length, policy, **load)  # type: ignore[arg-type]
    except ModelError:
        raise
    except Exception as error:  # whatever the libraries raise at a config that a client made up
        raise ModelError(f"the model's config is not a {family} config: {error}") from error
    (with_workspace(needed) if device.type == "cuda" else needed).require(_free_bytes(device), str(device))


def _require_family(config: dict) -> str:
    family = config.get("model_type")
    if family not in FAMILIES or "quantization_config" in config:
        raise ModelError(f"model type {family!r} is not supported; use an unquantised model of {', '.join(FAMILIES)}")
    return str(family)


def _require_context(context: int, max_length: int) -> None:
    if max_length > context:
        raise ModelError(f"max_length {max_length} is more than the model's context of {context} positions")


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
    free = _free_bytes(device)
    if nbytes > free:
        raise ModelError(f"{what} {nbytes:,} bytes and {device} has {free:,} free; use a smaller model, dtype or max_length")


def _free_bytes(device: torch.device) -> int:
    """What can be allocated: on a GPU also what torch holds for this process and nothing uses."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
