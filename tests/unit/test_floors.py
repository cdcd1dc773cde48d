"""The package's floors: a module imports only from floors below its own, and every module has its place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from semgap import provenance

PACKAGE = Path(__file__).resolve().parents[2] / "src/semgap"
# Lowest first; the units of one line may import each other only within a package.
FLOORS = (
    ("tensors", "selection"),
    ("codecs",),
    ("wire",),
    ("ledger",),
    ("machine",),
    ("slurm", "attachment"),
    ("lifetime", "link", "network"),
    ("books", "listen", "netns", "hosts"),
    ("relay",),
    ("sampling",),
    ("policy",),
    ("prompts", "sources"),
    ("telemetry",),
    ("footprint", "gpufault"),
    ("bridge", "gputime"),
    ("kvhost",),
    ("kv",),
    ("staging",),
    ("model",),
    ("executor",),
    ("kernels", "device_sampling"),
    ("cuda_graph",),
    ("weightstore",),
    ("session",),
    ("worker",),
    ("runtime",),
    ("client",),
    ("exactness",),
    ("provenance",),
    ("config",),
    ("preflight",),
    ("emulation",),
    ("trial",),
    ("tensordump",),
    ("codecbench",),
    ("logs",),
    ("analysis",),
    ("doctor",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {unit: number for number, units in enumerate(FLOORS) for unit in units}
ALONE = {"telemetry": {"telemetry", "lifetime"}, "analysis": {"analysis"}}  # what these may import, whatever lies below
FILES = sorted(PACKAGE.rglob("*.py"))


def _unit(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported(file: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; of `from semgap import x`, semgap.x."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import at line {node.lineno}"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "semgap" else {module}
    return names


def _units_imported(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imported(file) if name.startswith("semgap.")} - {"__version__"}


def test_every_module_has_a_floor() -> None:
    assert {_unit(file) for file in FILES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_from_floors_below_it(file: Path) -> None:
    unit = _unit(file)
    for imported in _units_imported(file):
        assert imported == unit or FLOOR_OF[imported] < FLOOR_OF[unit], f"{unit} imports {imported}"
        assert imported in ALONE.get(unit, {imported}), f"{unit} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_imports_snakemake_or_pickle(file: Path) -> None:
    assert not {name.split(".")[0] for name in _imported(file)} & {"snakemake", "pickle", "marshal", "shelve"}


def test_every_module_is_in_exactly_one_list_of_what_makes_trials_stale() -> None:
    measured = (provenance.TRIAL_MODULES, provenance.REMOTE_MODULES, provenance.CODEC_BENCH_MODULES)
    lists = (*measured, provenance.ANALYSIS_MODULES, provenance.OTHER_MODULES)
    placed = [name for names in lists for name in names]
    assert len(placed) == len(set(placed))
    assert set(placed) == {file.relative_to(PACKAGE).parts[0] for file in FILES}


def test_the_modules_of_each_part_of_the_analysis_exist() -> None:
    for name in (*provenance.COLLECT_MODULES, *provenance.TABLE_MODULES, *provenance.FIGURE_MODULES):
        assert (PACKAGE / name).is_file(), name


def test_what_a_local_trial_runs_imports_no_module_that_leaves_it_fresh() -> None:
    """A trial's outcome may depend only on modules whose change makes it stale."""
    fresh = {
        name.removesuffix(".py")
        for name in (*provenance.ANALYSIS_MODULES, "cli.py", "doctor.py", "config.py", "preflight.py", "__main__.py")
    }
    for name in (*provenance.TRIAL_MODULES, *provenance.REMOTE_MODULES):
        path = PACKAGE / name
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            assert not _units_imported(file) & fresh, file
