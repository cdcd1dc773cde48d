"""Trial directories as frames. Refuses a trial that is stale, incomplete or not reconciled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from semgap.analysis.sums import fault_of_trial
from semgap.experiment.trial_schemas import BATCHES, CONTROL, LEDGER, LOAD, MANIFEST_SCHEMA, RELAY, REQUESTS, STEPS, TCP
from semgap.seal import fault_of

KEYS = ["model", "network", "mode", "phase", "trial"]
CELL = KEYS[:-1]
LOADED = ("requests", "steps", "control", "load", "batches", "ledger", "tcp", "host", "gpu")
TRIAL_TABLES = (*LOADED, "relay", "dmon")
"""The tables of a trial. `Trials` leaves the last two out."""
SCHEMAS = {
    "requests": REQUESTS,
    "steps": STEPS,
    "control": CONTROL,
    "load": LOAD,
    "batches": BATCHES,
    "ledger": LEDGER,
    "tcp": TCP,
    "relay": RELAY,
}
"""The columns that this version reads. Samplers write those that their machine has."""
RERUN = "rerun it: delete {directory} and run snakemake again, or pass its files to snakemake --forcerun measure_trial"


class UnusableTrial(Exception):
    """A trial that cannot be used. The message names it, the fault, and the way out."""


class StaleTrialError(UnusableTrial):
    """A trial of another configuration or other code than the current one."""


class AlteredError(UnusableTrial):
    """A trial, or another result, that is not what was measured: a file was changed, or its sums do not hold."""


class OtherVersionError(UnusableTrial):
    """A trial that a version of semgap with another `MANIFEST_SCHEMA`, or without a column of `SCHEMAS`, wrote."""


@dataclass(frozen=True)
class CheckedTrial:
    """The directory of a trial that is whole, and its manifest."""

    directory: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """One frame per kind of file over all trials, with the columns of `KEYS` in front.

    `manifests` keep the order of the listed directories; tables and figures show modes in that order. `apart`: manifests of trials that
    the frames leave out, since their surroundings were at fault.
    """

    manifests: tuple[dict[str, Any], ...]
    requests: pd.DataFrame
    steps: pd.DataFrame
    ledger: pd.DataFrame
    tcp: pd.DataFrame
    host: pd.DataFrame
    gpu: pd.DataFrame
    control: pd.DataFrame
    load: pd.DataFrame
    batches: pd.DataFrame
    apart: tuple[dict[str, Any], ...] = ()


def load_trials(directories: Sequence[Path], expected: Mapping[str, str]) -> Trials:
    """The trials in `directories`, listed one by one.

    `expected` maps str(directory) to the cell's digest under the current configuration and code. Raises StaleTrialError for another
    digest, and UnusableTrial for a missing or damaged file, a trial that did not reconcile or measured no step, and a trial listed twice.
    """
    return trials_of(checked_trials(directories, expected))


def checked_trials(directories: Sequence[Path], expected: Mapping[str, str]) -> list[CheckedTrial]:
    """The trials of `load_trials`, those kept apart included, before their tables are read. Errors as there."""
    if not directories:
        raise UnusableTrial("no trial directories are listed; check modes, phases and trials in the config")
    checked = [CheckedTrial(Path(d), _checked_manifest(Path(d), expected.get(str(d)))) for d in directories]
    _refuse_duplicates(checked)
    return checked


def trials_of(checked: Sequence[CheckedTrial]) -> Trials:
    """The trials with their frames. UnusableTrial for a damaged file, a trial that measured no step, and if all are kept apart."""
    apart = tuple(each.manifest for each in checked if each.manifest["apart"])
    kept = [each for each in checked if not each.manifest["apart"]]
    if not kept:
        raise UnusableTrial(f"all {len(apart)} trials are kept apart, the first since {apart[0]['apart']}")
    frames = {name: table_of(name, kept).to_pandas() for name in LOADED}
    trials = Trials(manifests=tuple(each.manifest for each in kept), apart=apart, **frames)
    _refuse_unmeasured(trials)
    return trials


def table_of(name: str, trials: Sequence[CheckedTrial]) -> pa.Table:
    """The rows of one of `TRIAL_TABLES` over the trials, with `KEYS` in front. A column of nulls in one takes its type from the others."""
    tables = [_with_keys(_read_table(each.directory, name), keys_of(each.manifest)) for each in trials]
    return pa.concat_tables(tables, promote_options="permissive")


def keys_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The key columns of a trial, from its manifest's cell."""
    cell = manifest["cell"]
    return {**{key: str(cell[key]) for key in CELL}, "trial": int(cell["trial"])}


def _checked_manifest(directory: Path, expected_digest: str | None) -> dict[str, Any]:
    _require_files(directory, ["manifest.json"])
    manifest = _read_manifest(directory)
    _require_files(directory, [f"{name}.parquet" for name in TRIAL_TABLES])
    if expected_digest is None:
        raise StaleTrialError(
            f"trial {directory} is not in the current grid (its cell digest is {manifest.get('cell_digest')}); "
            "list only the trials of the current configuration"
        )
    if manifest.get("cell_digest") != expected_digest:
        raise StaleTrialError(
            f"trial {directory} is stale: it was measured with cell digest {manifest.get('cell_digest')}, the current "
            f"configuration and code have {expected_digest}; {RERUN.format(directory=directory)}"
        )
    _refuse_unreconciled(directory, manifest)
    _refuse_altered(directory, fault_of_trial(directory, manifest))
    return manifest


def _require_files(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        if not (directory / name).is_file():
            raise UnusableTrial(f"trial {directory} has no {name}; {RERUN.format(directory=directory)}")


def _read_manifest(directory: Path) -> dict[str, Any]:
    raw = (directory / "manifest.json").read_bytes()
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise UnusableTrial(f"{directory}/manifest.json is not JSON ({error}); {RERUN.format(directory=directory)}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != MANIFEST_SCHEMA:
        fault = f"{directory}/manifest.json has schema {schema!r}, this version reads {MANIFEST_SCHEMA}"
        raise OtherVersionError(f"{fault}; {RERUN.format(directory=directory)}")
    altered = fault_of(raw)
    _refuse_altered(directory, altered and f"of manifest.json, {altered}")
    return dict(manifest)


def _refuse_altered(directory: Path, fault: str | None) -> None:
    if fault:
        raise AlteredError(f"trial {directory} is not as it was measured: {fault}; {RERUN.format(directory=directory)}")


def _refuse_unreconciled(directory: Path, manifest: Mapping[str, Any]) -> None:
    reconciliation = manifest["reconciliation"]
    local = manifest["cell"]["policy"]["placement"] == "local"
    if not (local and reconciliation is None) and (reconciliation or {}).get("agreed") is not True:
        fault = f"its ledgers and the kernel's counters disagree ({reconciliation})"
        raise UnusableTrial(f"trial {directory} did not reconcile: {fault}; {RERUN.format(directory=directory)}")


def _refuse_duplicates(trials: Sequence[CheckedTrial]) -> None:
    seen: dict[tuple[Any, ...], Path] = {}
    for each in trials:
        key = tuple(keys_of(each.manifest).values())
        if key in seen:
            raise UnusableTrial(f"{each.directory} and {seen[key]} are the same trial {key}; list each trial once")
        seen[key] = each.directory


def _refuse_unmeasured(trials: Trials) -> None:
    measured = {
        key
        for rows in (trials.steps, trials.load)
        for key in rows.loc[rows["measured"].astype("bool"), KEYS].itertuples(index=False, name=None)
    }
    for manifest in trials.manifests:
        key = tuple(keys_of(manifest).values())
        if key not in measured:
            raise UnusableTrial(f"trial {key} has no measured step; give its phase at least one step and rerun it")


def _read_table(directory: Path, name: str) -> pa.Table:
    path = directory / f"{name}.parquet"
    try:
        # With partitioning pyarrow would add the columns of `model=M/...` in the path.
        table = pq.read_table(path, partitioning=None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnusableTrial(f"{path} cannot be read ({error}); {RERUN.format(directory=directory)}") from error
    missing = [column for column in SCHEMAS[name].names if column not in table.column_names] if name in SCHEMAS else []
    if missing:
        fault = f"{path} was written by another version of semgap: this one also reads the columns {', '.join(missing)}"
        raise OtherVersionError(f"{fault}; {RERUN.format(directory=directory)}")
    return table


def _with_keys(table: pa.Table, keys: Mapping[str, Any]) -> pa.Table:
    columns = {key: pa.repeat(pa.scalar(value), table.num_rows) for key, value in keys.items()}
    return pa.table(columns | {name: table[name] for name in table.column_names if name not in columns})
