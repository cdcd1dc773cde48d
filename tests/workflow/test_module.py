"""semgap as a Snakemake module of another workflow, in another directory (docs/running.md)."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from clone import CONFIG, SNAKEMAKE, Clone, environment, job_names, merged, trials

from semgap.experiment.config import Coordinates
from semgap.experiment.staleness import content_digest

PAGE = (Path(__file__).resolve().parents[2] / "docs/running.md").read_text(encoding="utf-8")
(DOCUMENTED,) = re.findall(r"^```python\n(module semgap:.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SMALL = ("--config", "modes=local,remote_cache", "trials=1", "--", "results/results.csv")
OWN_ALL = """
configfile: "config.yaml"


module semgap:
    snakefile:
        "{}/Snakefile"
    config:
        config


use rule * from semgap as semgap_*


rule all:
    input:
        rules.semgap_all.input,
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The directory of another workflow."""
    return tmp_path


def snakemake(project: Path, snakefile: str, clone: Clone, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a workflow of the directory `project` with the clone's profile, stderr in stdout."""
    (project / "Snakefile").write_text(snakefile)
    profile = str(clone.root / "profiles/default")
    command = [str(SNAKEMAKE), "--cores", "1", "--workflow-profile", profile, *arguments]
    return subprocess.run(command, cwd=project, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)


def documented(clone: Clone) -> str:
    """The Snakefile of docs/running.md, with the clone's path."""
    return DOCUMENTED.replace("/path/to/semgap", str(clone.root))


def files_of(clone: Clone) -> set[Path]:
    return {path for path in clone.root.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_a_run_as_a_module_measures_the_clone_s_own_cells_leaves_all_files_here_and_runs_once(fresh: Clone, project: Path) -> None:
    tiny, before = ("--configfile", str(fresh.root / CONFIG)), files_of(fresh)
    done = snakemake(project, documented(fresh), fresh, *tiny, *SMALL)
    assert done.returncode == 0, done.stdout
    assert files_of(fresh) == before
    rows = pd.read_csv(project / "results/results.csv")
    assert list(rows["mode"]) == ["local", "remote_cache"]
    manifest = json.loads((project / "results" / rows["directory"][1] / "manifest.json").read_text())
    cell = fresh.config().cell(Coordinates("tiny", "loopback", "remote_cache", "decode", 1))
    assert manifest["cell_digest"] == content_digest(cell)
    assert (project / "resources/models/tiny/digest.json").is_file()
    assert job_names(snakemake(project, documented(fresh), fresh, "--dry-run", *tiny, *SMALL).stdout) == []


def test_a_module_s_default_target_is_all_of_semgap_for_semgap_s_own_default_config(fresh: Clone, project: Path) -> None:
    done = snakemake(project, documented(fresh), fresh, "--dry-run", "--config", "modes=sys")
    assert done.returncode == 0, done.stdout
    planned = job_names(done.stdout)
    assert "making the explorer" in planned and "measuring sys, decode, trial 3 (smollm2-135m, loopback)" in planned


def test_a_workflow_with_a_rule_all_renames_semgap_s_rules_and_may_give_a_whole_config(fresh: Clone, project: Path) -> None:
    default, tiny = (yaml.safe_load((fresh.root / name).read_text()) for name in ("config/config.yaml", CONFIG))
    (project / "config.yaml").write_text(yaml.safe_dump(merged(default, tiny)))
    done = snakemake(project, OWN_ALL.format(fresh.root), fresh, "--dry-run", "all")
    assert done.returncode == 0, done.stdout
    assert trials(["local", "remote_cache", "sys_simulated"], [1, 2]) < set(job_names(done.stdout))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the run asks for")
def test_the_documented_onstart_refuses_what_this_machine_lacks_before_any_job(fresh: Clone, project: Path) -> None:
    done = snakemake(project, documented(fresh), fresh, "--configfile", str(fresh.root / CONFIG), "--config", "device=cuda")
    assert done.returncode == 1
    assert "device" in done.stdout and "cuda" in done.stdout
    assert not list(project.glob("results/**/*.parquet")) and not (project / "resources").exists()


@pytest.fixture
def served(fresh: Clone) -> Iterator[str]:
    """The address at which the clone can be read over HTTP."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(fresh.root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_module_that_is_no_directory_of_this_disk_is_refused_with_the_way_out(fresh: Clone, project: Path, served: str) -> None:
    remote = documented(fresh).replace(str(fresh.root), served)
    done = snakemake(project, remote, fresh, "--dry-run", "--configfile", str(fresh.root / CONFIG))
    assert done.returncode == 1
    assert "semgap runs from a directory of this disk" in done.stdout and "clone it" in done.stdout
