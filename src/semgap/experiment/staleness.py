"""Digests over the code that makes results: a change to it makes them stale.

A list names the packages and modules that a result runs; the module and the script of its rule are added by name (config.py).
Contents count, comments included; times and directories do not. tests/unit/test_architecture.py compares the lists with the imports.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from semgap.codecs import CODECS

_SOURCE = Path(__file__).resolve().parents[1]

TRIAL_CODE = (
    *("seal.py", "tensors.py", "phases.py", "policy.py", "processes", "telemetry", "kv", "engine", "client"),
    *("experiment/cell.py", "experiment/trial_*.py", "experiment/exactness.py"),
)
"""Every trial and reference."""

REMOTE_CODE = ("codecs", "wire", "network", "worker")
"""The trials of remote modes, and the checks of networks. Of `codecs` each mode counts its own (`codec_files`)."""

DUMP_CODE = (
    *("seal.py", "tensors.py", "codecs/arrays.py", "kv", "engine", "client/prompts.py"),
    *("experiment/cell.py", "experiment/dump_tensors.py"),
)
"""The dumped tensors on which codecs are measured."""

CODEC_CODE = (*DUMP_CODE, "codecs", "experiment/exactness.py")
"""The measured codecs."""

COLLECT_CODE = ("seal.py", "phases.py", "network/spec.py", "experiment/trial_schemas.py", "analysis/*.py")
"""results.csv, and with it every table and figure."""

TABLE_CODE = (*COLLECT_CODE, "analysis/tables", "analysis/tables/page.html")
FIGURE_CODE = (*TABLE_CODE, "analysis/figures")
EXPLORER_CODE = (
    *(*COLLECT_CODE, "analysis/tables/__init__.py", "analysis/tables/network.py", "analysis/tables/render.py"),
    *("analysis/figures/__init__.py", "analysis/figures/style.py", "analysis/explorer", "analysis/explorer/page.*"),
)


def remote_code(codecs: Iterable[str]) -> list[str]:
    """REMOTE_CODE, of whose codecs only `codecs` run, by name."""
    return [*(pattern for pattern in REMOTE_CODE if pattern != "codecs"), *codec_files(codecs)]


def codec_files(used: Iterable[str]) -> list[str]:
    """The modules of `codecs` without those that only other codecs run."""
    imports, always = _codec_imports()
    own = {f"{type(CODECS[name]).__module__.rpartition('.')[2]}.py" for name in {*used, "raw"}}  # a window's tokens are raw
    return [f"codecs/{name}" for name in sorted(_reached(always | own, imports) | {"__init__.py"})]


@functools.cache
def _codec_imports() -> tuple[dict[str, set[str]], set[str]]:
    """The imports of each file of `codecs` in the package, and the files that other code runs, whatever the codec."""
    imports = {path.name: _imports(path) for path in python_files(["codecs"]) if path.name != "__init__.py"}
    others = python_files([*TRIAL_CODE, *(pattern for pattern in REMOTE_CODE if pattern != "codecs")])
    return imports, set().union(*map(_imports, others)) & imports.keys()


def _reached(roots: Iterable[str], imports: Mapping[str, set[str]]) -> set[str]:
    """The files that `roots` import, those that these import, and `roots`."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports[name] & imports.keys()
    return found


def _imports(path: Path) -> set[str]:
    """The files of the package `codecs` that a module imports, anywhere in it."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    modules = {node.module.rpartition(".")[2] for node in found if node.module and node.module.startswith("semgap.codecs.")}
    modules |= {alias.name for node in found if node.module == "semgap.codecs" for alias in node.names}
    return {f"{module}.py" for module in modules}


def content_digest(value: Any) -> str:
    """sha256 (hex) of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def code_digest(patterns: Iterable[str], *files: Path) -> str:
    """sha256 (hex) over the contents of semgap's modules that match `patterns` (`python_files`), and of `files`."""
    digest = hashlib.sha256()
    for path in [*python_files(patterns), *files]:
        content = path.read_bytes()
        digest.update(path.name.encode() + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def python_files(patterns: Iterable[str]) -> list[Path]:
    """The modules of semgap that match: a package's name stands for all its modules, a pattern with `*` for each matching file.

    ValueError for a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        directory = _SOURCE / pattern
        files = sorted(directory.rglob("*.py")) if directory.is_dir() else sorted(_SOURCE.glob(pattern))
        if not files:
            raise ValueError(f"no module of semgap matches {pattern!r}; correct the list in {__file__}")
        found |= dict.fromkeys(files)
    return list(found)
