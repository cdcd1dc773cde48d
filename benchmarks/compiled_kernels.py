"""The Triton kernels of decode steps, compiled for a GPU that need not be here, and what its machine code says. Nothing runs.

A model of meta tensors is launched by its executor, as on a GPU; instead of running, each kernel is compiled. Needs ptxas, cuobjdump
and nvdisasm, which lie in Triton's wheel; `set_up` also a C compiler and Python's headers. TRITON_INTERPRET must not be set;
TRITON_CACHE_DIR keeps what was compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import itertools
import math
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from semgap.codecs import device_planes
from semgap.engine.cuda_graph import GraphExecutor
from semgap.engine.graph_batch import GraphBatch
from semgap.kv.gpu_block_pool import GpuBlockPool
from semgap.kv.pool import BLOCK
from semgap.policy import SamplingRule

TARGETS = (80, 90, 100)  # A100; H100 and H200; B200
DTYPES = ("float16", "bfloat16", "float32")
MAX_LENGTHS = (256, 2048)
MODELS: dict[str, dict[str, Any]] = {
    "gpt-j-6b": {"model_type": "gptj", "vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16}
    | {"rotary_dim": 64},
    "llama-3-8b": {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "hidden_size": 4096}
    | {"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "hidden_size": 576}
    | {"intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0}
    | {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 2048, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "qwen3-8b": {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "hidden_size": 4096, "head_dim": 128}
    | {"intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0},
}
PRODUCTS = ("_project", "_gate", "_merge")


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its executor asks for it."""

    kernel: JITFunction
    programs: int
    args: tuple[Any, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def named(self) -> dict[str, Any]:
        """Arguments by name."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | dict(self.options)

    @property
    def shape(self) -> str:
        """The sizes that make kernels of one name differ, for a table."""
        named = self.named
        if self.name == "_project":
            return f"{sum(named[f'N{index}'] for index in range(4))} x {named['K']}"
        if self.name == "_gate":
            return f"2 x {named['N']} x {named['K']}"
        if self.name == "_merge":
            return f"{named['N']} x {named['K1'] + named['K2']}"
        return ""

    def bytes_to_read(self, position: int) -> int:
        """Weights, or keys and values of `position` earlier tokens of each row, that the launch must read from memory.

        Activations lie in L2, and so do the few rows of _place, _combine_parts and _activate.
        """
        named = self.named
        biases = sum(bool(named.get(key)) for key in ("HAS_BIAS", "HAS_BIAS1", "HAS_BIAS2"))
        if self.name == "_project":
            rows = sum(named[f"N{index}"] for index in range(4))
            return (rows * named["K"] + biases * rows) * named["weight"].itemsize
        if self.name == "_gate":
            return 2 * (named["N"] * named["K"] + biases * named["N"]) * named["gate"].itemsize
        if self.name == "_merge":
            return (named["N"] * (named["K1"] + named["K2"]) + biases * named["N"]) * named["weight1"].itemsize
        if self.name == "_attend":
            return 2 * named["KV_HEADS"] * position * named["D"] * named["qkv"].itemsize
        if self.name == "_attend_blocks":
            return 2 * named["KV_HEADS"] * position * named["D"] * named["qkv"].itemsize * len(named["qkv"])
        if self.name == "_embed":
            return (1 + named["HAS_POSITIONS"]) * named["H"] * named["tokens"].itemsize
        if self.name == "_norm":
            return (1 if named["RMS"] else 2) * named["H"] * named["weight"].itemsize
        if self.name == "_norm_heads":
            return 2 * named["D"] * named["query_weight"].itemsize
        return 0


@dataclass(frozen=True)
class Wait:
    """Loads of one loop: `in_flight` at the first use of each, and the `waits` for them, the uses before which new ones were issued."""

    in_flight: tuple[int, ...]
    waits: int


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: registers a thread, bytes of stack a thread and of shared memory a program, threads of a program."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    wide_loads: int  # of 16 bytes, in PTX
    wide_stores: int
    loops: tuple[Wait, ...]  # of the products: 16-byte loads of weights

    @property
    def loads_a_wait(self) -> float | None:
        """Loads of weights that a thread has on their way when it waits, on average over the kernel; None if it reads none."""
        loads = sum(len(loop.in_flight) for loop in self.loops)
        return loads / sum(loop.waits for loop in self.loops) if loads else None


class _Target:
    """Triton's driver up to the moment at which a kernel is to run."""

    def __init__(self) -> None:
        self.sm = TARGETS[0]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def build_launchers_of(self, module: ModuleType) -> None:
        """Has the launchers of this version's, or of another version's, driver.py; builds what they need first, as Triton's driver does."""
        self.launcher_cls, self.utils = module.CudaLauncher, nvidia.CudaUtils()


_target = _Target()
_run = JITFunction.run


def launches(config: Mapping[str, Any], dtype: str, max_length: int) -> list[Launch]:
    """All launches of one decode step and of the draw after it, for a model of a Hugging Face config."""
    found: list[Launch] = []
    with _run_is(_recorder(found)), torch.device("meta"):
        executor = GraphExecutor(_without_weights(config, dtype), max_length, SamplingRule())
        found.clear()
        executor._run_step()
        executor._run_draw()
    return found


def batch_launches(config: Mapping[str, Any], dtype: str, max_length: int) -> list[Launch]:
    """One launch of each kernel that differs, of passes over many requests of every captured size, without torch's products."""
    found: list[Launch] = []
    with _run_is(_recorder(found)), torch.device("meta"):
        executor = GraphExecutor(_without_weights(config, dtype), max_length, SamplingRule())
        found.clear()
        with _NoProducts():
            _batch_of(executor, max_length)
    return list({_kernel_of(launch): launch for launch in reversed(found)}.values())[::-1]


def _batch_of(executor: GraphExecutor, max_length: int) -> GraphBatch:
    """The graphs of an executor over a pool of two blocks, wherever it is."""
    shape = replace(executor.kv_shape, max_length=BLOCK)
    pool = GpuBlockPool(shape, executor.dtype, "meta", 2 * shape.nbytes(executor.dtype.itemsize))
    return GraphBatch(executor._architecture, executor._decoder, executor._plain.layers, pool, max_length)


def _kernel_of(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches of one compiled kernel: its name, and what is constant in it."""
    own = {param.name for param in launch.kernel.params if param.is_constexpr}
    return launch.name, *((name, value) for name, value in launch.named.items() if name in own)


@dataclass(frozen=True)
class Product:
    """One of torch's matrix products, or sums with a bias, of a pass over many rows; and the bytes of weights that it reads."""

    name: str
    nbytes: int


class _NoProducts(TorchDispatchMode):
    """Leaves torch's products undone, of which a meta tensor would have the shape alone, and late."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = kwargs or {}
        return given["out"] if op.overloadpacket.__name__ in ("mm", "addmm") else op(*args, **given)


class _Products(TorchDispatchMode):
    """Notes torch's products and sums; a bias that goes into rows of a wider tensor is copied there by a launch of its own."""

    def __init__(self, found: list[Launch | Product]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name = op.overloadpacket.__name__
        given = kwargs or {}
        if name in ("mm", "addmm", "add_"):
            self._found.append(Product(name, args[-1].nbytes))
            if name == "addmm" and args[0].dim() == 1 and not given["out"].is_contiguous():
                self._found.append(Product("copy_", args[0].nbytes))
        return op(*args, **given)


def pass_launches(config: Mapping[str, Any], dtype: str, max_length: int, rows: int) -> list[Launch | Product]:
    """All launches of one captured pass of so many rows, the output head included, without the draws."""
    found: list[Launch | Product] = []
    with _run_is(_recorder(found)), torch.device("meta"), torch.no_grad():
        executor = GraphExecutor(_without_weights(config, dtype), max_length, SamplingRule())
        batch = _batch_of(executor, max_length)
        found.clear()
        with _Products(found):
            batch._replays[rows]()
            hidden = batch._buffers(rows).hidden
            executor._last_logits(hidden) if rows == 1 else torch.mm(hidden, executor._decoder.head.weight.t())
    return found


@dataclass(frozen=True)
class SetUp:
    """What an executor compiles and builds side by side as it is made, and `later` would one by one; seconds of the first.

    Seconds are of compiling and building: nothing is loaded on a GPU, captured or run. An empty TRITON_CACHE_DIR makes them those of a
    first session.
    """

    kernels: int
    launchers: int
    later_kernels: int
    later_launchers: int
    took_s: float


def set_up(config: Mapping[str, Any], dtype: str, max_length: int, target: int, drivers: Path | None = None, batch: bool = False) -> SetUp:
    """Makes a model's executor; with `batch` also a pool of KV blocks, and what runs batches over it.

    `drivers`: driver.py of another Triton, whose launchers are built. A library stands in for CUDA's.
    """
    _target.sm = target
    driver.set_active(_target)
    compiled: list[Any] = []
    later: list[Any] = []

    def compile_alone(kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **options: Any) -> None:
        known = len(kernel.device_caches[target][0])
        made = _run(kernel, *args, grid=grid, warmup=True, **options)
        if warmup:
            compiled.append(made)
        elif len(kernel.device_caches[target][0]) > known:
            later.append(made)

    with _run_is(compile_alone), torch.device("meta"), _no_cuda_driver():
        model = _without_weights(config, dtype)
        begin = time.perf_counter()
        _target.build_launchers_of(_module(drivers) if drivers else nvidia)
        executor = GraphExecutor(model, max_length, SamplingRule())
        batches = _batch_of(executor, max_length) if batch else None
        took_s = time.perf_counter() - begin
        for run in batches._replays.values() if batches else ():
            run()
        kernels = {kernel.hash: kernel for kernel in (getattr(each, "result", lambda each=each: each)() for each in compiled)}
        launchers = _launchers()
        for kernel in (*kernels.values(), *later):
            _target.launcher_cls(kernel.src, kernel.metadata)
    return SetUp(len(kernels), len(launchers), len(later), len(_launchers() - launchers), took_s)


def _launchers() -> set[Path]:
    return set(Path(knobs.cache.dir).glob("*/__triton_launcher.*.so"))


def _module(file: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("drivers", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("drivers", loader))
    loader.exec_module(module)
    module.include_dirs, module.libdevice_dir = nvidia.include_dirs, nvidia.libdevice_dir
    return module


@contextlib.contextmanager
def _no_cuda_driver() -> Iterator[None]:
    """What launchers are linked with where there is no libcuda.so.1: a library of its names, each of which only fails."""
    sources = (Path(nvidia.__file__).with_suffix(suffix).read_text() for suffix in (".c", ".py"))
    names = {name for source in sources for name in re.findall(r"\bcu[A-Z]\w+", source)}
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder) / "libcuda.so.1", Path(folder) / "cuda.c"
        source.write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in sorted(names)))
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], check=True, timeout=60)
        ctypes.CDLL(str(library))  # so that the loader has it
        with knobs.nvidia.scope():
            knobs.nvidia.libcuda_path = folder
            yield


def plane_launches() -> list[Launch]:
    """The launches of the codecs' byte planes, for each dtype."""
    found: list[Launch] = []
    with _run_is(_recorder(found)), torch.device("meta"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            planes = device_planes.split(torch.empty(4, 8192, dtype=dtype), 8192)
            device_planes.join(planes[0], 8192, dtype)
        source, target = (torch.empty(1 << 16, dtype=torch.uint8) for _ in range(2))
        device_planes.move(source, target, *(torch.empty(4, dtype=torch.int64) for _ in range(3)), 8192)
    return found


def compile_for(target: int, launched: Iterable[Launch]) -> list[Compiled]:
    """The machine code of each launch for compute capability `target` (90 for 9.0). Equal ones are one object.

    All products' code is disassembled at once: the disassembler takes longer to start than for a hundred kernels.
    """
    _target.sm = target
    driver.set_active(_target)
    kernels = [_run(each.kernel, *each.args, grid=(each.programs,), warmup=True, **each.options) for each in launched]
    different = {kernel.hash: kernel for kernel in kernels}
    products = [kernel for kernel in different.values() if kernel.name in PRODUCTS]
    loops = {kernel.hash: waits(code) for kernel, code in zip(products, disassembled(products), strict=True)}
    made = {name: _read(kernel, loops.get(name, ())) for name, kernel in different.items()}
    return [made[kernel.hash] for kernel in kernels]


def _without_weights(config: Mapping[str, Any], dtype: str) -> PreTrainedModel:
    """A model on the current device, which is meta."""
    shape = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **shape)
    return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype), attn_implementation="eager")


def _recorder(found: list[Any]) -> Callable[..., None]:
    def record(kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, math.prod(grid), args, options))

    return record


@contextlib.contextmanager
def _run_is(function: Any) -> Iterator[None]:
    """Kernels are given to `function` instead of being launched."""
    JITFunction.run = function
    try:
        yield
    finally:
        JITFunction.run = _run


def _read(kernel: Any, loops: Sequence[Wait]) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    wide = [len(re.findall(rf"\b{way}\.global\S*\.v4\.b32", kernel.asm["ptx"])) for way in ("ld", "st")]
    return Compiled(kernel.name, registers, stack + local, kernel.metadata.shared, 32 * kernel.metadata.num_warps, *wide, tuple(loops))


def _output(tool: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    command = [Path(triton.__file__).parent / f"backends/nvidia/bin/{tool}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_REGISTER = re.compile(r"\bR(\d+)\b")
_INSTRUCTION_BYTES = 16


Code = list[tuple[int, str, str]]
"""Instructions: address, operation and operands."""


def disassembled(kernels: Sequence[Any]) -> list[Code]:
    """The code of each kernel. All are for one GPU, and their code lies end to end in one file, whose addresses are absolute."""
    if not kernels:
        return []
    texts = [_text(kernel.asm["cubin"]) for kernel in kernels]
    (architecture,) = {re.search(r"^\.target sm_(\w+)", kernel.asm["ptx"], re.MULTILINE)[1] for kernel in kernels}
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        sass = _output("nvdisasm", "--binary", f"SM{architecture}", file.name)
    found = [(int(at, 16), operation, operands) for at, operation, operands in _INSTRUCTION.findall(sass)]
    assert len(found) == sum(map(len, texts)) // _INSTRUCTION_BYTES
    instructions = iter(found)
    return [list(itertools.islice(instructions, len(text) // _INSTRUCTION_BYTES)) for text in texts]


def _text(cubin: bytes) -> bytes:
    """The section `.text.NAME` of a cubin, which has one: an ELF file of 64 bits (its header and section headers: elf(5))."""
    (begin,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, begin + number * size) for number in range(count)]
    named = sections[names][4]
    (text,) = (cubin[at : at + nbytes] for name, _, _, _, at, nbytes in sections if cubin.startswith(b".text.", named + name))
    return text


def waits(code: Code) -> list[Wait]:
    """The loops that load weights, and the code outside of loops if it does: 16 bytes that leave the cache first, `LDG.E.EF.128`."""
    jumps = [(at, _TARGET.search(operands)) for at, operation, operands in code if operation.startswith("BRA")]
    spans = [(int(target[1], 16), at) for at, target in jumps if target and int(target[1], 16) < at]
    loops = [[line for line in code if begin <= line[0] <= end] for begin, end in spans]
    rest = [line for line in code if not any(begin <= line[0] <= end for begin, end in spans)]
    return [found for found in (_wait(rest, 1), *(_wait(loop, 2) for loop in loops)) if found.in_flight]


def _wait(code: Code, turns: int) -> Wait:
    """Follows the code as often as said, a loop twice, since a load may be used in the next turn; counts in the last one."""
    issued: dict[int, range] = {}  # by the order in which they were issued: the registers of loads that nothing has used yet
    in_flight, waited, waited_for, count = [], 0, -1, 0
    for turn in range(turns):
        for _, operation, operands in code:
            target, _, sources = operands.partition(",")
            used = {int(register) for register in _REGISTER.findall(sources)}
            for number in [number for number, registers in issued.items() if used & set(registers)]:
                if turn == turns - 1:
                    in_flight.append(len(issued))
                    waited += number > waited_for
                waited_for = max(waited_for, *issued)  # loads arrive in order: who waits for one has the earlier ones, and soon the later
                del issued[number]
            if operation.startswith("LDG") and ".EF" in operation and operation.endswith(".128"):
                first = int(_REGISTER.search(target)[1])
                issued[count] = range(first, first + 4)
                count += 1
    return Wait(tuple(in_flight), waited)
