"""`semgap crate`: a finished run as a Workflow RO-Crate, and the directories that it refuses."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import yaml
from clone import CONFIG, MODES, Clone, Finished, environment
from rocrate.rocrate import ROCrate

import semgap
from semgap import cli, results
from semgap.experiment.config import check_config
from semgap.experiment.trial_schemas import sealed_manifest

PROFILES = ("ro-crate-1.1", "workflow-ro-crate", "process-run-crate", "workflow-run-crate")
VALIDATOR = "roc-validator==0.13.0"
# The validator asks for the JSON-LD context that a crate names, that of RO-Crate 1.1. Without a network it gets the one that the library
# rocrate ships, that of 1.3, with bioschemas' terms as 1.1 writes them.
VALIDATE = """
import sys
from pathlib import Path
import requests
from rocrate_validator import models, services
from rocrate_validator.utils.http import HttpRequester

def shipped(self, url, **options):
    answer = requests.Response()
    context = Path(sys.argv[2]).read_bytes().replace(b"bioschemas.org/terms/", b"bioschemas.org/")
    answer.status_code, answer.url, answer._content = 200, url, context
    answer.headers["Content-Type"] = "application/ld+json"
    return answer

HttpRequester.get = shipped
for profile in sys.argv[3:]:
    settings = models.ValidationSettings(rocrate_uri=sys.argv[1], profile_identifier=profile, requirement_severity=models.Severity.REQUIRED)
    for issue in services.validate(settings).get_issues():
        print(profile, issue.check.identifier, issue.message)
"""


@dataclass(frozen=True)
class Done:
    """What a command gave."""

    status: int
    out: str
    err: str


def semgap_crate(clone: Clone, results: str, *arguments: str, configfile: str | None = CONFIG) -> Done:
    """`semgap crate` of a directory of the clone, by its absolute path."""
    out, err = io.StringIO(), io.StringIO()
    config = ["--configfile", str(clone.root / configfile)] if configfile else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["crate", str(clone.root / results), "--root", str(clone.root), *config, *arguments])
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def crated(finished_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A finished clone, and beside its files results/crate.zip. Read only by agreement."""
    clone = finished_run.clone.copy(tmp_path_factory.mktemp("crated") / "clone")
    command = [sys.executable, "-m", "semgap", "crate", "results", "--configfile", CONFIG]
    surroundings = environment() | {"PYTHONPATH": str(clone.root / "src")}
    done = subprocess.run(command, cwd=clone.root, env=surroundings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("results/crate.zip: ") and done.stdout.endswith("a Workflow RO-Crate of 6 trials\n")
    return clone


@pytest.fixture(scope="module")
def crate(crated: Clone) -> ROCrate:
    """The crate as the library's own reader reads it."""
    return ROCrate(crated.root / "results/crate.zip")


@pytest.fixture(scope="module")
def unpacked(crated: Clone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(crated.root / "results/crate.zip") as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(set(archive.namelist()))
        archive.extractall(directory)
    return directory


def test_a_crate_holds_the_run_byte_for_byte(crated: Clone, unpacked: Path) -> None:
    run = crated.root / "results"
    kept = [run / "results.csv", run / "explorer.html", run / "README.md"]
    kept += [
        file for name in ("tables", "figures", "trials", "exactness", "codecs") for file in (run / name).rglob("*.*") if file.is_file()
    ]
    kept = [file for file in kept if file.suffix != ".npz"]  # references, which tables are not made from
    assert {file.relative_to(unpacked / "results") for file in (unpacked / "results").rglob("*") if file.is_file()} == {
        file.relative_to(run) for file in kept
    }
    assert all((unpacked / "results" / file.relative_to(run)).read_bytes() == file.read_bytes() for file in kept)


def test_a_crate_holds_the_workflow_without_caches(crated: Clone, unpacked: Path) -> None:
    for name in ("Snakefile", "rules", "workflow", "src", "config", "envs", "profiles", "docs", "Makefile", "requirements.lock", "LICENSE"):
        files = [crated.root / name] if (crated.root / name).is_file() else sorted((crated.root / name).rglob("*"))
        for file in (file for file in files if file.is_file() and "__pycache__" not in file.parts):
            assert (unpacked / file.relative_to(crated.root)).read_bytes() == file.read_bytes()
    assert not list(unpacked.rglob("__pycache__")) and not (unpacked / "resources/models").exists()


def test_each_described_file_has_the_size_and_sha256_that_the_crate_states(crate: ROCrate, unpacked: Path) -> None:
    files = [entity for entity in crate.data_entities if "File" in entity.type]
    assert len(files) > 80
    for file in files:
        content = (unpacked / unquote(file.id)).read_bytes()
        assert (file["contentSize"], file["sha256"]) == (str(len(content)), hashlib.sha256(content).hexdigest())


def test_the_run_is_an_action_from_config_prompts_and_model_to_tables_figures_and_explorer(crate: ROCrate, crated: Clone) -> None:
    action = crate.root_dataset["mentions"]
    assert action.type == "CreateAction" and action["instrument"] is crate.mainEntity and crate.mainEntity.id == "Snakefile"
    config, prompts, model = action["object"]
    assert (config.id, prompts.id) == ("run-config.yaml", "resources/prompts/english.txt")
    digest = json.loads((crated.root / "resources/models/tiny/digest.json").read_text())["sha256"]
    assert (model["name"], model["sha256"]) == ("tiny", digest)
    products = {product.id for product in action["result"]}
    assert {"results/results.csv", "results/tables/gap.csv", "results/figures/gap.pdf", "results/explorer.html"} < products
    assert action["startTime"] <= action["endTime"] == crate.root_dataset["datePublished"]


def test_every_trial_is_described_by_its_coordinates(crate: ROCrate) -> None:
    names = {entity["name"] for entity in crate.data_entities if entity["name"].startswith("trial: ")}
    assert names == {
        f"trial: model tiny, network loopback, mode {mode}, phase decode, trial {number}" for mode in MODES for number in (1, 2)
    }


def test_the_config_in_a_crate_gives_the_cells_of_its_trials(unpacked: Path) -> None:
    config = check_config(yaml.safe_load((unpacked / "run-config.yaml").read_text()), unpacked)
    recorded = {json.dumps(manifest["cell"], sort_keys=True) for manifest in results.load(unpacked / "results").manifests}
    assert recorded == {json.dumps(config.cell(at), sort_keys=True) for at in config.grid()}


def test_a_crate_names_the_version_and_the_commits_of_its_trials(finished: Clone) -> None:
    for mode, git in (("local", {"commit": "abc", "dirty": False}), ("remote_cache", {"commit": "abd", "dirty": True})):
        for number in (1, 2):
            change(finished.trial(mode, number) / "manifest.json", lambda it, git=git: it["provenance"].update(git=git | {"reason": None}))
    assert semgap_crate(finished, "results", "--output", str(finished.root / "mine.zip")).status == 0
    version = ROCrate(finished.root / "mine.zip").mainEntity["version"]
    assert version.startswith(f"{semgap.__version__}, commit abc; commit abd with changes that are not committed; commit unknown: git does")


def test_a_named_experiment_keeps_its_place_beside_the_trials_that_it_shares(named_run: Clone, tmp_path: Path) -> None:
    done = semgap_crate(named_run, "results/mine", "--output", str(tmp_path / "crate.zip"))
    assert done.status == 0, done.err
    with zipfile.ZipFile(tmp_path / "crate.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    loaded = results.load(tmp_path / "unpacked/results/mine")
    assert sorted(loaded.trials["mode"]) == ["local", "local", "remote_cache", "remote_cache"]
    assert (tmp_path / "unpacked" / loaded.trials["directory"][0].replace("../", "results/")).is_dir()


def test_trials_that_the_tables_leave_out_are_in_the_crate_with_the_reason(finished: Clone) -> None:
    change(finished.trial("sys_simulated", 2) / "manifest.json", lambda it: it.update(apart="the link was off"))
    without_last_row(finished.root / "results/results.csv")
    assert semgap_crate(finished, "results").status == 0
    trial = finished.trial("sys_simulated", 2).relative_to(finished.root)
    left_out = ROCrate(finished.root / "results/crate.zip").get(quote(f"{trial}/"))
    assert left_out["description"] == "The tables leave it out: the link was off"


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_bytes(sealed_manifest(content, file.parent))


def without_last_row(file: Path) -> None:
    rows = list(csv.reader(file.read_text().splitlines()))
    with file.open("w") as changed:
        csv.writer(changed, lineterminator="\n").writerows(rows[:-1])


def test_a_file_beside_the_run_that_no_table_took_is_left_out_and_stops_nothing(finished: Clone) -> None:
    stray = finished.root / "results/exactness/model=tiny/mode=remote_cache.json"  # a mode of equal bits, which has no check of its own
    assert not stray.exists()
    stray.write_text('{"tokens_equal": 99}')  # as an earlier version wrote it, without a seal
    done = semgap_crate(finished, "results")
    assert (done.status, done.err) == (0, "")
    with zipfile.ZipFile(finished.root / "results/crate.zip") as archive:
        assert str(stray.relative_to(finished.root)) not in archive.namelist()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: run.rename(run.with_name("gone")), "results is no directory; name the directory of a finished run"),
        (lambda run: (run / "results.csv").unlink(), "results has no results.csv; name the directory of a finished run"),
        (lambda run: (run / "tables/ladder.tex").unlink(), "half a run: it lacks 1 of its tables and figures, first tables/ladder.tex"),
        (lambda run: (run / "explorer.html").unlink(), "half a run: it lacks 1 of its tables and figures, first explorer.html"),
        (lambda run: next(run.glob("trials/**/steps.parquet")).unlink(), "has no steps.parquet; rerun it"),
        (
            lambda run: without_last_row(run / "results.csv"),
            "results.csv lacks the trial of model tiny, network loopback, mode sys_simulated, phase decode, trial 2, which is in",
        ),
        (
            lambda run: (run / "exactness/model=tiny/mode=local.json").write_text('{"tokens_equal": 99}'),
            "exactness/model=tiny/mode=local.json is not as it was written: it holds 0 seals",
        ),
        (
            lambda run: change(next(run.glob("trials/**/manifest.json")), lambda it: it["model"].update(sha256="0" * 64)),
            "trials of model tiny have different weights",
        ),
        (
            lambda run: change(next(run.glob("trials/**/manifest.json")), lambda it: it.update(cell_digest="0" * 64)),
            "is stale: it was measured with cell digest 0000",
        ),
    ],
)
def test_a_directory_without_a_whole_run_of_one_config_is_refused_by_name(
    finished: Clone, harm: Callable[[Path], Any], message: str
) -> None:
    harm(finished.root / "results")
    done = semgap_crate(finished, "results")
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1)
    assert message in done.err
    assert not list(finished.root.rglob("*.zip*"))


def test_trials_of_another_config_than_the_given_one_are_refused_with_the_way_out(crated: Clone, tmp_path: Path) -> None:
    done = semgap_crate(crated, "results", "--output", str(tmp_path / "crate.zip"), configfile=None)
    assert done.status == 1 and not list(tmp_path.iterdir())
    assert "6 of 6 recorded trials are not of the current config" in done.err and "--configfile of that run" in done.err


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has `VALIDATOR`, whose versions of other packages do not go with requirements.lock's."""
    directory = tmp_path_factory.mktemp("validator")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    python = directory / "bin/python"
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", VALIDATOR], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{VALIDATOR} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return python


def test_the_validator_of_ro_crates_finds_no_fault_under_all_profiles_that_the_crate_names(
    crated: Clone, validator: Path, tmp_path: Path
) -> None:
    import rocrate

    context = Path(rocrate.__file__).parent / "data/ro-crate.jsonld"
    found = subprocess.run(
        [validator, "-c", VALIDATE, crated.root / "results/crate.zip", context, *PROFILES], cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
