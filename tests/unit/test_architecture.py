"""The package's floors (contracts of import-linter in pyproject.toml), and what makes results stale, against the imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import grimp
import pytest

from semgap.codecs import CODECS
from semgap.experiment import staleness
from semgap.experiment.staleness import codec_files, python_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/semgap"
# Which trial runs where is decided by config and workflow; nothing that a trial computes depends on them.
SHAPE_NO_TRIAL = {"semgap.experiment.provenance", "semgap.experiment.staleness"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("semgap", include_external_packages=True)


def test_the_contracts_of_floors_circles_and_torch_hold() -> None:
    lint = subprocess.run([Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout


def test_no_module_imports_snakemake_or_pickle(graph: grimp.ImportGraph) -> None:
    for forbidden in {"snakemake", "pickle", "marshal", "shelve"} & graph.modules:
        assert not graph.find_modules_that_directly_import(forbidden), forbidden


def _module(file: Path) -> str:
    return "semgap." + str(file.relative_to(PACKAGE)).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _run_by(graph: grimp.ImportGraph, modules: Collection[str]) -> set[str]:
    """The modules of semgap that these import, and theirs, and they themselves."""
    return {name for module in modules for name in {module, *graph.find_upstream_modules(module)} if name.startswith("semgap.")}


@pytest.mark.parametrize(
    ("roots", "code"),
    [
        # A trial's processes: the job, the client, the worker, the KV host, the relay and the samplers.
        (
            (
                *("semgap.experiment.measure_trial", "semgap.client.measure", "semgap.worker.serve", "semgap.kv.host"),
                *("semgap.network.relay", "semgap.telemetry.sampler_process"),
            ),
            (*staleness.TRIAL_CODE, *staleness.REMOTE_CODE, "experiment/measure_trial.py"),
        ),
        *(
            ((f"semgap.experiment.{rule}",), (*staleness.TRIAL_CODE, *staleness.REMOTE_CODE, f"experiment/{rule}*.py"))
            for rule in ("check_network", "compute_reference", "compute_exactness_reference", "check_exactness")
        ),
        (("semgap.analysis.collect_trials",), staleness.COLLECT_CODE),
        (("semgap.analysis.tables.make_tables",), staleness.TABLE_CODE),
        (("semgap.analysis.figures.plot_figures",), staleness.FIGURE_CODE),
        (("semgap.analysis.explorer.make_explorer",), staleness.EXPLORER_CODE),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if value[0].startswith("semgap.") else "",
)
def test_whatever_a_result_runs_makes_it_stale(graph: grimp.ImportGraph, roots: tuple[str, ...], code: tuple[str, ...]) -> None:
    packages = {"semgap"} | {f"semgap.{path.name}" for path in PACKAGE.iterdir() if path.is_dir()}  # their __init__ holds a docstring
    covered = {_module(file) for file in python_files(code)}
    assert _run_by(graph, roots) - SHAPE_NO_TRIAL - packages <= covered


@pytest.mark.parametrize(
    ("codecs", "with_them", "without"),
    [
        ([], {"raw", "base", "arrays", "clock"}, {"cast", "zstd", "planes", "groups", "ans", "topk", "compact"}),
        (["planes_zstd"], {"planes", "zstd"}, {"cast", "groups", "ans"}),
        (["int4"], {"groups", "groups_format", "device_groups", "cast"}, {"zstd", "ans", "topk"}),
        (["topk"], {"topk", "largest", "cast"}, {"zstd", "groups"}),
        (["nvcomp_ans"], {"ans", "ans_format", "device_ans", "device_planes", "nvcomp"}, {"zstd", "cast"}),
    ],
)
def test_of_the_codecs_a_mode_counts_its_own_and_what_they_import(codecs: list[str], with_them: set[str], without: set[str]) -> None:
    files = {Path(name).stem for name in codec_files(codecs)}
    assert with_them < files and not without & files


def test_all_codecs_together_are_the_package() -> None:
    assert {*python_files(codec_files(CODECS))} == {*python_files(["codecs"])}


def test_a_list_that_names_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no module of semgap matches 'experiment/nothing"):
        python_files(["experiment/nothing.py"])
