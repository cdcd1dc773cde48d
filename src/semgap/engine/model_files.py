"""A model's files on disk: digest, config, weights, tokenizer, and their check against the digest."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from semgap.engine.architecture import Architecture, architecture_of
from semgap.seal import SealError, read_sealed
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import messages

DIGEST_FILE = "digest.json"
COMPANION_FILES = ("config.json", "tokenizer.json")
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class ModelFileError(Exception):
    """A model directory is incomplete or differs from its digest; the message names the file and the way out."""


class TensorDigest(msgspec.Struct, frozen=True):
    """One tensor of the weights file: `offset` is absolute in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    xxh3_128: str


class ModelDigest(msgspec.Struct, frozen=True):
    """The content of a model directory; the same content always gives the same digest.json.

    `companions` are the other files that decide the model's output, config and tokenizer, with their xxh3-128. `revision` is the commit
    to which a hub source resolved, null for other sources. `ratios_meaningful` is false, with a reason, if compression ratios on these
    weights say nothing about a trained model.
    """

    name: str
    dtype: str
    source: dict[str, Any]
    revision: str | None
    model_type: str
    vocab_size: int
    max_positions: int
    file: str
    file_bytes: int
    sha256: str
    xxh3_128: str
    tensors: tuple[TensorDigest, ...]
    companions: dict[str, str]
    ratios_meaningful: bool
    ratios_reason: str | None


def load_digest(directory: Path) -> ModelDigest:
    """Reads digest.json of a model directory. ModelFileError if it is missing, broken or not as it was written."""
    path = directory / DIGEST_FILE
    try:
        return msgspec.json.decode(read_sealed(path, _way_out(directory)), type=ModelDigest)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path} is missing: the fetch did not finish; {_way_out(directory)}") from error
    except SealError as error:
        raise ModelFileError(str(error)) from error
    except msgspec.DecodeError as error:
        raise ModelFileError(f"{path} cannot be read ({error}); {_way_out(directory)}") from error


def verify_model(directory: Path) -> ModelDigest:
    """Checks weights, config and tokenizer against digest.json by xxh3-128 (about 10 GB/s), and returns the digest.

    ModelFileError names the file, and the expected and the found value.
    """
    digest = load_digest(directory)
    path = directory / digest.file
    if not path.is_file():
        raise ModelFileError(f"{path} is missing: expected {digest.file_bytes:,} bytes; {_way_out(directory)}")
    size = path.stat().st_size
    if size != digest.file_bytes:
        raise ModelFileError(f"{path} is damaged: expected {digest.file_bytes:,} bytes, found {size:,}; {_way_out(directory)}")
    for name, expected in {digest.file: digest.xxh3_128, **digest.companions}.items():
        _verify_file(directory / name, expected)
    return digest


def _verify_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ModelFileError(f"{path} is missing: expected xxh3-128 {expected}; {_way_out(path.parent)}")
    found = hash_file(path)
    if found != expected:
        raise ModelFileError(f"{path} is damaged: expected xxh3-128 {expected}, found {found}; {_way_out(path.parent)}")


def hash_file(path: Path) -> str:
    """xxh3-128 of a whole file, in hex, streamed through one small buffer."""
    state, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def _way_out(directory: Path) -> str:
    return f"delete {directory} and run the rule fetch_model again"


@dataclass(frozen=True)
class ModelFiles:
    """A fetched model: its directory and its digest."""

    directory: Path
    digest: ModelDigest

    @property
    def weights_file(self) -> Path:
        return self.directory / self.digest.file

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config."""
        return msgspec.json.decode((self.directory / "config.json").read_bytes())

    @property
    def architecture(self) -> Architecture:
        """The config's architecture."""
        return architecture_of(self.config)

    def specs(self) -> tuple[messages.WeightSpec, ...]:
        """Names, dtypes and shapes of the weights, in file order."""
        return tuple(messages.WeightSpec(t.name, DType.from_torch_name(t.dtype), tuple(t.shape)) for t in self.digest.tensors)

    def map(self) -> list[Tensor]:
        """The weights over the mapped file: the kernel reads them as they are sent, and this process holds no copy."""
        with self.weights_file.open("rb") as opened:
            mapped = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        return [
            Tensor(TensorClass.WEIGHTS, spec.dtype, spec.shape, mapped[tensor.offset : tensor.offset + tensor.nbytes])
            for tensor, spec in zip(self.digest.tensors, self.specs(), strict=True)
        ]
