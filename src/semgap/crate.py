"""A finished run as a Workflow RO-Crate: one zip that an archive keeps and a paper cites.

It holds the workflow as it ran, the run's config, its trials, tables, figures and explorer, with sizes and sha256, and the digests of the
models, which it leaves out. ro-crate-metadata.json describes all of it (https://w3id.org/workflowhub/workflow-ro-crate/1.0).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import yaml

from semgap import __version__
from semgap.analysis.beside import digest_of_codecs, digest_of_json, digest_of_trial, experiments, first_equal
from semgap.analysis.load import KEYS, TRIAL_TABLES, CheckedTrial, UnusableTrial, checked_trials, keys_of
from semgap.analysis.results import recorded_cells
from semgap.experiment.config import Config, Coordinates
from semgap.experiment.config_checks import ConfigError
from semgap.experiment.staleness import content_digest
from semgap.seal import require_sealed

if TYPE_CHECKING:
    import pandas as pd
    from rocrate.model.data_entity import DataEntity
    from rocrate.rocrate import ROCrate

CONFIG_FILE = "run-config.yaml"
TRIAL_FILES = (*(f"{table}.parquet" for table in TRIAL_TABLES), "manifest.json")
WORKFLOW = ("rules", "workflow", "src", "config", "envs", "profiles", "docs")
"""Directories of the workflow that a crate holds, beside the files of `BESIDE`."""
BESIDE = ("Makefile", "pyproject.toml", "requirements.lock", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "results/README.md")
FORMATS = {
    ".csv": "text/csv",
    ".parquet": "application/vnd.apache.parquet",
    ".md": "text/markdown",
    ".tex": "application/x-tex",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".pdf": "application/pdf",
    ".html": "text/html",
    ".json": "application/json",
    ".yaml": "application/yaml",
    ".cff": "application/yaml",
    ".toml": "application/toml",
}
"""Every other file is text."""
# RO-Crate 1.1 has no term for it; this is the one of the Workflow Run profiles.
SHA256_TERM = {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"}
RUN_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
MAIN_PROFILE = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
REDO = "run snakemake again"


@dataclass(frozen=True)
class FinishedRun:
    """A run whose files are all there. `root`: the directory of all experiments, results/, in which the run has its own or is itself.

    `trials` are the whole grid, those that the tables leave out included; some may lie in another experiment's directory, as may
    `measured`, the exactness and codecs that tables were made from. `products`: results.csv, tables, figures, explorer.
    """

    root: Path
    trials: Sequence[CheckedTrial]
    measured: Sequence[Path]
    products: Sequence[Path]

    def place(self, path: Path) -> str:
        """The path in the crate of one of its files or directories."""
        return f"results/{path.relative_to(self.root)}"


def make_crate(results: Path, config: Config, output: Path) -> int:
    """Writes the run in `results` to the zip `output`; gives its bytes. `config`: the run's, with the recorded selection.

    Raises `UnusableTrial`, which names the fault and the way out, for a directory without a finished run, half a run, or trials of one
    model with two sets of weights; ConfigError for a run of another grid than the config's.
    """
    from rocrate.rocrate import ROCrate

    run = finished_run(results.absolute(), config)
    with tempfile.TemporaryDirectory() as scratch:
        crate = ROCrate(version="1.1")
        crate.metadata.extra_terms.update(SHA256_TERM)
        _describe(crate, run, config)
        _add_workflow(crate, run, config.root, Path(scratch))
        inputs = [*_add_inputs(crate, config, Path(scratch)), *_add_models(crate, run.trials)]
        _add_trials(crate, run)
        _add_run(crate, run, inputs, [_add_file(crate, file, run.place(file)) for file in (*run.measured, *run.products)])
        _write(crate, output)
    return output.stat().st_size


def finished_run(results: Path, config: Config) -> FinishedRun:
    """The run of `config` in `results`. UnusableTrial if it is none, or half of one; ConfigError for another grid."""
    cells = recorded_cells(results)
    root = results.parent if config["name"] else results
    places = experiments(root, results)
    expected = dict(_trial(places, at, config) for at in config.grid())
    trials = checked_trials([Path(directory) for directory in expected], expected)
    _require_recorded(trials, cells)
    lacking = [name for name in product_names() if not (results / name).is_file()]
    if lacking:
        raise UnusableTrial(f"{results} is half a run: it lacks {len(lacking)} of its tables and figures, first {lacking[0]}; {REDO}")
    return FinishedRun(root, trials, list(_measured(places, config)), [results / name for name in product_names()])


def _trial(places: Sequence[Path], at: Coordinates, config: Config) -> tuple[str, str]:
    """The directory of a trial, in the run's or another experiment's, and the digest that its manifest must hold."""
    digest = content_digest(config.cell(at))
    name = "trials/" + "/".join(f"{key}={value}" for key, value in vars(at).items())
    return str(first_equal([place / name for place in places], digest, lambda directory: digest_of_trial(directory, TRIAL_FILES))), digest


def _measured(places: Sequence[Path], config: Config) -> Iterator[Path]:
    """The files of exactness and codecs, where the config has them. SealError for one that was altered."""
    exactness = {
        f"exactness/model={m}/mode={mode}.json": config.exactness_cell(m, mode) for m in config["models"] for mode in config.checked_modes()
    }
    codecs = {f"codecs/model={model}.parquet": config.codecs_cell(model) for model in config["models"]}
    for cells, digest_of in ((exactness, digest_of_json), (codecs, digest_of_codecs)):
        for name, cell in cells.items():
            file = first_equal([place / name for place in places], content_digest(cell), digest_of)
            if file.is_file():
                require_sealed(file)
            if digest_of(file) == content_digest(cell):
                yield file


def product_names() -> Iterator[str]:
    """The files that every finished run leaves in its directory: results.csv, tables, figures, explorer."""
    from semgap.analysis.figures.plot_figures import FIGURES
    from semgap.analysis.tables.make_tables import TABLES, name_of

    yield "results.csv"
    yield "tables/answer.txt"
    yield from (f"tables/{name_of(table)}.{ending}" for table in TABLES for ending in ("csv", "parquet", "html", "md", "tex"))
    names = [figure.__name__.rpartition(".")[2] for figure in FIGURES]
    yield from (f"figures/{name}.{ending}" for name in names for ending in ("svg", "png", "pdf"))
    yield "explorer.html"


def recorded_selection(results: Path, cells: pd.DataFrame) -> dict[str, Any]:
    """The config keys that say which trials `cells` (`recorded_cells`) are, and the name of the experiment in `results`."""
    name = results.absolute().name
    axes = {f"{axis}s": list(dict.fromkeys(cells[axis])) for axis in KEYS[:-1]}
    return axes | {"trials": int(cells["trial"].max()), "name": None if name == "results" else name}


def _require_recorded(trials: Sequence[CheckedTrial], cells: pd.DataFrame) -> None:
    """ConfigError unless results.csv lists the trials, but for those that are kept apart."""
    recorded = set(cells[KEYS].itertuples(index=False, name=None))
    grid = {tuple(keys_of(trial.manifest).values()): trial.manifest["apart"] for trial in trials}
    lacking = [at for at, apart in grid.items() if at not in recorded and not apart]
    strange = [at for at in recorded if at not in grid]
    if lacking or strange:
        at, verb, fact = (lacking[0], "lacks", "is") if lacking else (strange[0], "has", "is not")
        trial = ", ".join(f"{key} {value}" for key, value in zip(KEYS, at, strict=True))
        raise ConfigError(
            f"results.csv {verb} the trial of {trial}, which {fact} in the config's grid; pass the --configfile of that run, or {REDO}"
        )


def _describe(crate: ROCrate, run: FinishedRun, config: Config) -> None:
    """The root dataset: name, authors and license of the crate, from CITATION.cff and the manifests."""
    citation = yaml.safe_load((config.root / "CITATION.cff").read_text(encoding="utf-8"))
    grid = ", ".join(f"{len(config[axis])} {axis}" for axis in ("modes", "phases", "models", "networks"))
    crate.name = f"A run of semgap: {len(run.trials)} trials of {grid}"
    start = " and ".join(run.place(file) for file in run.products if file.name in ("answer.txt", "explorer.html"))
    crate.description = " ".join(f"{citation['abstract']} Start with {start}.".split())
    crate.keywords = ", ".join(citation["keywords"])
    crate.root_dataset["datePublished"] = _times(run)[1]
    crate.license = _about(crate, f"https://spdx.org/licenses/{citation['license']}", "CreativeWork", name=citation["license"])
    authors = [_author(crate, number, author) for number, author in enumerate(citation["authors"], start=1)]
    crate.creator = crate.root_dataset["author"] = authors[0] if len(authors) == 1 else authors
    profiles = [_about(crate, uri, "CreativeWork", name=name, version=uri.rpartition("/")[2]) for uri, name in RUN_PROFILES.items()]
    crate.root_dataset["conformsTo"] = profiles


def _author(crate: ROCrate, number: int, author: Mapping[str, str]) -> Any:
    if "name" in author:
        return _about(crate, f"#author-{number}", "Organization", name=author["name"])
    return _about(crate, author.get("orcid", f"#author-{number}"), "Person", name=f"{author['given-names']} {author['family-names']}")


def _add_workflow(crate: ROCrate, run: FinishedRun, root: Path, scratch: Path) -> None:
    """The code: its main file, Snakefile, and all that it runs. Without caches."""
    main = crate.add_workflow(root / "Snakefile", "Snakefile", main=True, lang="snakemake", properties=_facts(root / "Snakefile"))
    main["name"], main["version"] = "semgap", _code_version(run.trials)
    main["description"] = f"Measures trials and makes tables and figures of them: snakemake --cores 1 --configfile {CONFIG_FILE}"
    main["license"], main["creator"], main["conformsTo"] = crate.license, crate.creator, {"@id": MAIN_PROFILE}
    for name in WORKFLOW:
        shutil.copytree(root / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        crate.add_dataset(scratch / name, name, properties={"name": f"the workflow's {name}"})
    for name in BESIDE:
        _add_file(crate, root / name, name)
    crate.get("README.md")["about"] = crate.root_dataset


def _code_version(trials: Sequence[CheckedTrial]) -> str:
    """semgap's version and the commits at which the trials were measured."""
    states = {json.dumps(trial.manifest["provenance"]["git"], sort_keys=True) for trial in trials}
    return f"{__version__}, {'; '.join(sorted(_said(json.loads(state)) for state in states))}"


def _said(git: Mapping[str, Any]) -> str:
    changed = " with changes that are not committed" if git["dirty"] else ""
    return f"commit {git['commit']}{changed}" if git["commit"] else f"commit unknown: {git['reason']}"


def _add_inputs(crate: ROCrate, config: Config, scratch: Path) -> list[DataEntity]:
    """The config with its defaults filled in, with which the run can be made again, and the prompts."""
    (scratch / CONFIG_FILE).write_text(yaml.safe_dump(dict(config.values), sort_keys=False), encoding="utf-8")
    prompts = Path(config["prompts"])
    kept = f"resources/prompts/{prompts.name}" if prompts.is_absolute() else str(prompts)
    return [_add_file(crate, scratch / CONFIG_FILE, CONFIG_FILE), _add_file(crate, config.root / prompts, kept)]


def _add_models(crate: ROCrate, trials: Sequence[CheckedTrial]) -> list[Any]:
    """Where each model came from, and the sha256 of its weights, which are left out."""
    digests: dict[str, set[str]] = {}
    sources = {trial.manifest["cell"]["model"]: trial.manifest["cell"]["model_spec"] for trial in trials}
    for trial in trials:
        digests.setdefault(trial.manifest["cell"]["model"], set()).add(trial.manifest["model"]["sha256"])
    for model, found in digests.items():
        if len(found) > 1:
            raise UnusableTrial(f"trials of model {model} have different weights, of sha256 {', '.join(sorted(found))}; {REDO}")
    return [
        _about(crate, f"#model-{model}", "CreativeWork", name=model, sha256=digest, description=json.dumps(sources[model], sort_keys=True))
        for model, (digest,) in digests.items()
    ]


def _add_trials(crate: ROCrate, run: FinishedRun) -> None:
    for trial in run.trials:
        name, apart = ", ".join(f"{key} {value}" for key, value in keys_of(trial.manifest).items()), trial.manifest["apart"]
        properties = {"name": f"trial: {name}"} | ({"description": f"The tables leave it out: {apart}"} if apart else {})
        crate.add_dataset(trial.directory, run.place(trial.directory), properties=properties)


def _add_run(crate: ROCrate, run: FinishedRun, inputs: Sequence[Any], products: Sequence[DataEntity]) -> None:
    """The run as an action: the workflow made these files of the config, the prompts and the models, in this time, on these machines."""
    begin, end = _times(run)
    machines = {json.dumps(trial.manifest["provenance"]["machine"], sort_keys=True) for trial in run.trials}
    properties = {"startTime": begin, "endTime": end, "description": f"Measured on {'; '.join(sorted(machines))}"}
    action = _about(crate, "#run", "CreateAction", name=crate.name, **properties)
    action["instrument"], action["object"], action["result"] = crate.mainEntity, list(inputs), list(products)
    crate.root_dataset["mentions"] = action


def _times(run: FinishedRun) -> tuple[str, str]:
    """When the first and the last trial were written, UTC."""
    times = sorted(trial.manifest["provenance"]["utc"] for trial in run.trials)
    return times[0], times[-1]


def _add_file(crate: ROCrate, file: Path, name: str) -> DataEntity:
    return crate.add_file(file, name, properties={"name": name} | _facts(file))


def _facts(file: Path) -> dict[str, str]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"contentSize": str(file.stat().st_size), "sha256": digest, "encodingFormat": FORMATS.get(file.suffix, "text/plain")}


def _about(crate: ROCrate, identifier: str, kind: str, **properties: str) -> Any:
    """Adds something that the crate speaks of and does not hold."""
    from rocrate.model.contextentity import ContextEntity

    return crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **properties}))


def _write(crate: ROCrate, output: Path) -> None:
    """The zip, whole or not at all. The library writes no entries for directories, by which validators look for them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.part")
    try:
        crate.write_zip(unfinished)
        with zipfile.ZipFile(unfinished, "a") as archive:
            for directory in (entity.id for entity in crate.data_entities if entity.type == "Dataset"):
                archive.mkdir(unquote(directory))
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)
