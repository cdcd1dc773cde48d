"""Where compiled CPU kernels are kept: by the content of their source, so that checkouts share them and an edit compiles anew.

The directory is `$SEMGAP_KERNEL_CACHE`, or `semgap/kernels` in the user's cache directory. Numba adds the CPU and its features to the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
from numba.core.registry import cpu_target

_VECTOR_FEATURES = ("avx512f", "avx2", "fma", "sve", "neon")
_ROOM_BYTES = 4 << 20  # more than the compiled kernels take


def directory() -> Path:
    """The cache's directory, existing or not."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return Path(os.environ.get("SEMGAP_KERNEL_CACHE") or user / "semgap" / "kernels")


def is_usable() -> bool:
    """True if this user alone may write the directory. Compiled code is loaded from it, so nobody else may."""
    try:
        directory().mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory()) as file:
            file.write(bytes(_ROOM_BYTES))
            file.flush()
            found = directory().stat()
            return found.st_uid == os.geteuid() and not found.st_mode & 0o022
    except (OSError, RuntimeError):  # RuntimeError: this user has no home directory
        return False


@contextlib.contextmanager
def without_scipy() -> Iterator[None]:
    """Hides scipy, which numba imports for linear algebra as it first loads a kernel: 0.25 s for what no kernel uses."""
    hidden = "scipy" not in sys.modules
    if hidden:
        sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["scipy"]


def compiled_for() -> str:
    """The platform, CPU and vector instructions that kernels are compiled for here, and the compiler: parts of numba's cache key."""
    platform, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    vectors = [name for name in _VECTOR_FEATURES if f"+{name}" in features.split(",")]
    return f"{platform}, {cpu}, {' '.join(vectors) or 'no vector instructions'}, by numba {numba.__version__}"


class ContentLocator:
    """A numba cache locator (see NUMBA_CACHE_LOCATOR_CLASSES in numba's documentation). All files of kernels count: they share code."""

    def __init__(self, source: Path) -> None:
        self._digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(source.parent.glob("cpu_*.py")))).hexdigest()

    @classmethod
    def from_function(cls, function: Callable[..., object], source: str) -> ContentLocator:
        return cls(Path(source))

    def get_cache_path(self) -> str:
        return str(directory() / self._digest[:32])

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(mode=0o700, exist_ok=True)

    def get_source_stamp(self) -> str:
        return self._digest

    def get_disambiguator(self) -> str:
        return "semgap"


numba.config.CACHE_LOCATOR_CLASSES = f"{__name__}.{ContentLocator.__name__}"
