"""`semgap verify`: are the results in a directory those that were written, and do the sums of its trials hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from semgap.analysis.beside import digest_of_json, experiments
from semgap.analysis.load import UnusableTrial, checked_trials
from semgap.seal import SealError, require_sealed

TRIALS = ("trials", "by-hand")
OTHERS = ("reference", "exactness", "capacity", "networks", "tensors", "codecs")
"""The directories of sealed files that rules make and tables, or later rules, read."""


@dataclass(frozen=True)
class Verdict:
    """The number of trials and of other results in a directory, and a message for each that does not stand."""

    results: Path
    trials: int
    others: int
    wrong_trials: tuple[str, ...]
    wrong_others: tuple[str, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        return self.wrong_trials + self.wrong_others

    def line(self) -> str:
        if not self.faults:
            return f"{self.results} stands: {self.trials} trials, whose sums hold, and {self.others} other results are as they were written"
        wrong = f"{len(self.wrong_trials)} of {self.trials} trials and {len(self.wrong_others)} of {self.others} other results"
        return f"{self.results} does not stand: {wrong} are not as they were written"


def verify(results: Path) -> Verdict:
    """Reads every trial and every other sealed result of an experiment, and of the named ones below it.

    `results`: results/, results/NAME, or the directory of one trial. UnusableTrial if it holds none of them. Configuration and code may
    have changed since: stale results stand too.
    """
    places = experiments(results, results)
    trials = sorted({*_trials(results, places)})
    others = [file for place in places for kind in OTHERS for file in _files(place / kind)]
    if not trials and not others:
        raise UnusableTrial(f"{results} holds no results; name the directory of a run, e.g. results/")
    wrong = tuple(filter(None, map(_fault_of_trial, trials))), tuple(filter(None, map(_fault_of_file, others)))
    return Verdict(results, len(trials), len(others), *wrong)


def _trials(results: Path, places: list[Path]) -> Iterator[Path]:
    """The directories that hold files of a trial, a manifest or none."""
    for file in (results / "manifest.json", *(file for place in places for name in TRIALS for file in _files(place / name))):
        if file.is_file() and (file.name == "manifest.json" or file.suffix == ".parquet"):
            yield file.parent


def _files(directory: Path) -> list[Path]:
    """The files below, in order, but for those that a killed writer left."""
    found = (file for file in directory.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(directory).parts))


def _fault_of_trial(directory: Path) -> str | None:
    try:
        checked_trials([directory], {str(directory): digest_of_json(directory / "manifest.json") or ""})
    except UnusableTrial as error:
        return str(error)
    return None


def _fault_of_file(file: Path) -> str | None:
    try:
        require_sealed(file)
    except SealError as error:
        return str(error)
    return None
