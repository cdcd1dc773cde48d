"""Functions and paths that the stages share. No rule is here.

An experiment writes under OWN alone. Tables and figures take a trial, an exactness check or measured codecs of the same digest from another
experiment's directory instead, where no rule of this run makes it.
"""

import functools
import json
import os
import socket
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import Paramspace

import pandas as pd

if not isinstance(workflow.current_basedir, os.PathLike):
    raise WorkflowError(
        f"semgap runs from a directory of this disk, not from {workflow.current_basedir}: clone it, and name its Snakefile there"
    )

# Not workflow.basedir: another workflow may use this one as a module.
ROOT = Path(workflow.current_basedir).parent

# This copy's semgap, here and in all jobs: the code whose digest makes trials stale is the code that runs.
sys.path.insert(0, str(ROOT / "src"))
os.environ.update(PYTHONPATH=os.pathsep.join([sys.path[0], *filter(None, [os.environ.get("PYTHONPATH")])]))

from semgap.analysis.beside import digest_of_codecs, digest_of_json, digest_of_trial, experiments, first_equal
from semgap.analysis.marks import MARKED
from semgap.experiment.config import Coordinates, check_config
from semgap.experiment.config_checks import ConfigError, models_directory
from semgap.experiment.preflight import require_machine, require_slurm
from semgap.experiment.provenance import new_session_id
from semgap.experiment.staleness import COLLECT_CODE, EXPLORER_CODE, FIGURE_CODE, TABLE_CODE, code_digest, content_digest
from semgap.processes.slurm import cancel_leftovers

SCRIPTS = ROOT / "workflow/scripts"
TRIAL_TABLES = ("requests", "steps", "control", "load", "batches", "ledger", "tcp", "relay", "gpu", "dmon", "host")
TABLES = (
    *("gap", "summary", "ladder", "facts", "network", "price", "recovery", "recovery_pairs", "prefix", "handover"),
    *("load", "load_facts", "exactness", "codecs", "break_even", "hypotheses"),
)
FIGURES = (
    *("gap", "ladder", "network", "price", "recovery", "prefix", "handover", "load"),
    *("codecs", "bytes_per_token", "latency", "telemetry"),
)

# Tables and figures of one kind of phase: they are always made, and stand in the report if such a phase was run.
OF_KIND = dict(recovery="recovery", recovery_pairs="recovery", prefix="prefix", handover="handover", load="load", load_facts="load")

# Jobs are processes of their own and find here which run they belong to, and whose end is theirs (semgap.processes.lifetime).
os.environ.setdefault("SEMGAP_SESSION", new_session_id())
os.environ.setdefault("SEMGAP_WORKFLOW", f"{socket.gethostname()}:{os.getpid()}")

try:
    CONFIG = check_config(config, ROOT)
except ConfigError as error:
    raise WorkflowError(str(error))

OWN = f"results/{CONFIG['name']}" if CONFIG["name"] else "results"
MODELS = models_directory(CONFIG.values)
EXPERIMENTS = experiments(Path("results"), Path(OWN))
GRID = Paramspace(pd.DataFrame([vars(at) for at in CONFIG.grid()]), param_sep="=")
TRIAL = f"{OWN}/trials/{GRID.wildcard_pattern}"
TRIAL_FILES = [*(f"{table}.parquet" for table in TRIAL_TABLES), "manifest.json"]
ORDER = {at: -index for index, at in enumerate(CONFIG.run_order())}
FIRST = len(ORDER) + 1  # the priority of what trials wait for: a trial that cannot start yet loses its turn


wildcard_constraints:
    model="[^/]+",
    network="[^/]+",
    mode="[^/]+",
    phase="[^/]+",
    trial=r"\d+",


def refuse_what_this_machine_lacks():
    """WorkflowError with all that this machine lacks. Jobs on other nodes find out there."""
    try:
        if workflow.executor_plugin.name == "local":
            require_machine(CONFIG)
        if workflow.executor_plugin.name == "slurm":
            require_slurm()
    except ConfigError as error:
        raise WorkflowError(str(error))


def cancel_jobs_of_a_dead_run():
    """Slurm jobs go on when the snakemake that submitted them is killed; a run that takes its place starts their trials anew."""
    if workflow.executor_plugin.name == "slurm":
        for job in cancel_leftovers(Path.cwd()):
            logger.info(f"Cancelled Slurm job {job}, left here by a run that died.")


def coordinates(wildcards):
    return Coordinates(wildcards.model, wildcards.network, wildcards.mode, wildcards.phase, int(wildcards.trial))


def trial_cell(wildcards):
    return CONFIG.cell(coordinates(wildcards))


def network_cell(wildcards):
    return CONFIG.network_cell(wildcards.network)


def network_check(wildcards):
    """The check of a trial's network; none if it needs none."""
    checked = CONFIG.is_checked(wildcards.network) and not CONFIG.is_local(wildcards.mode)
    return f"{OWN}/networks/network={wildcards.network}.json" if checked else []


def reference_cell(wildcards):
    return CONFIG.reference_cell(wildcards.model, wildcards.phase)


def capacity_cell(wildcards):
    return CONFIG.capacity_cell(wildcards.model, wildcards.network, wildcards.phase)


def capacity_file(wildcards):
    """The capacity of which a load phase's arrivals are shares; none for other phases."""
    wanted = CONFIG.has_shares(wildcards.phase)
    return f"{OWN}/capacity/model={wildcards.model}/network={wildcards.network}/phase={wildcards.phase}.json" if wanted else []


def exactness_reference_cell(wildcards):
    return CONFIG.exactness_reference_cell(wildcards.model)


def exactness_cell(wildcards):
    return CONFIG.exactness_cell(wildcards.model, wildcards.mode)


@functools.cache
def exactness_files():
    """The exactness of each mode that is checked by itself, with the digest that the file must hold."""
    names = {(model, mode): f"exactness/model={model}/mode={mode}.json" for model in CONFIG["models"] for mode in CONFIG.checked_modes()}
    return dict(equal_or_own(name, CONFIG.exactness_cell(*of), digest_of_json) for of, name in names.items())


def tensors_cell(wildcards):
    return CONFIG.tensors_cell(wildcards.model)


def codecs_cell(wildcards):
    return CONFIG.codecs_cell(wildcards.model)


@functools.cache
def codec_files():
    """The measured codecs of each model, with the digest that the file must hold."""
    cells = {model: CONFIG.codecs_cell(model) for model in CONFIG["models"]}
    return dict(equal_or_own(f"codecs/model={model}.parquet", cell, digest_of_codecs) for model, cell in cells.items())


def result_files():
    """Every file that tables and figures are made from, one by one."""
    return [*all_trial_files(), *exactness_files(), *codec_files()]


def block_generation(wildcards):
    """The number of times that a block was opened again; a new number makes all its trials stale.

    `remeasure=blocks` opens a block whose trials come from more than one session, or some of which are missing or stale.
    """
    return generation_of(wildcards.model, wildcards.network, int(wildcards.trial))


@functools.cache
def generation_of(model, network, trial):
    marker = Path(f"{OWN}/blocks/model={model}/network={network}/trial={trial}.json")
    generation = json.loads(marker.read_text())["generation"] if marker.exists() else 0
    block = [at for at in CONFIG.grid() if (at.model, at.network, at.trial) == (model, network, trial)]
    return generation + (CONFIG["remeasure"] == "blocks" and is_mixed(block))


def is_mixed(block):
    """True if trials of the block exist, and some are missing, stale or of another session."""
    placed = [equal_or_own_trial(at) for at in block]
    manifests = [(Path(directory) / "manifest.json", digest) for directory, digest in placed]
    found = [json.loads(manifest.read_text()) for manifest, _ in manifests if manifest.exists()]
    whole = [manifest["cell_digest"] for manifest in found] == [digest for _, digest in manifests]
    return bool(found) and not (whole and len({manifest["session"] for manifest in found}) == 1)


def trial_priority(wildcards):
    """Blocks in turn, each in a seeded random order: a higher number runs earlier."""
    return ORDER.get(coordinates(wildcards), 0) + len(ORDER)


def equal_or_own(name, cell, digest_of):
    """The path of a result of this cell, here or in another experiment's directory, else the path where it will be made; and its digest."""
    digest = content_digest(cell)
    return str(first_equal([place / name for place in EXPERIMENTS], digest, digest_of)), digest


@functools.cache
def equal_or_own_trial(at):
    name = f"trials/{GRID.wildcard_pattern.format(**vars(at))}"
    return equal_or_own(name, CONFIG.cell(at), lambda directory: digest_of_trial(directory, TRIAL_FILES))


def placed(at):
    """A trial's directory and digest. A block that was opened again takes no trial from another experiment."""
    directory, digest = equal_or_own_trial(at)
    return TRIAL.format(**vars(at)) if generation_of(at.model, at.network, at.trial) else directory, digest


@functools.cache
def expected_digests():
    """The directory of each trial, with the digest that its manifest must hold."""
    return dict(placed(at) for at in CONFIG.grid())


def all_trial_files():
    """Every file of every trial, one by one: a directory would let stale trials in, and a deleted file go unnoticed."""
    return [f"{directory}/{name}" for directory in expected_digests() for name in TRIAL_FILES]


def collection(script, code):
    """The one param of the job that collects: the trials that it takes, and the digest of its code."""
    return dict(trials=expected_digests(), code=code_digest(code, SCRIPTS / script))


def marks():
    """What the modes' rows say of their place in tables."""
    rows = {mode: {key: row[key] for key in MARKED if row.get(key)} for mode, row in CONFIG["define"]["modes"].items()}
    return {mode: marked for mode, marked in rows.items() if marked}


def analysis(script, code):
    """The one param of a job that makes tables or figures: the same, the other measurements that it takes, and the marks of the modes."""
    measured = dict(exactness=exactness_files(), codecs=codec_files())
    return collection(script, code) | measured | dict(modes=marks())


def is_reported(name):
    """True if the report shows this table or figure: false if it is of a kind of phase that is not run."""
    kinds = {CONFIG["define"]["phases"][phase]["kind"] for phase in CONFIG["phases"]}
    return OF_KIND.get(name) in {None, *kinds}


def table_files(*endings):
    return [f"{OWN}/tables/{table}.{ending}" for table in TABLES for ending in endings]


def figure_files(*endings):
    return [f"{OWN}/figures/{figure}.{ending}" for figure in FIGURES for ending in endings]
