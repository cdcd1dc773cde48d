"""A finished run, read as results/README.md says."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import polars
import pytest
from clone import MODES, Clone, Finished

from semgap import results
from semgap.analysis.load import TRIAL_TABLES

pytestmark = pytest.mark.alone


def test_every_example_of_the_document_gives_the_same_medians(finished_run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = finished_run.clone
    monkeypatch.chdir(clone.root)
    examples = re.findall(r"```python\n(.*?)```", (clone.root / "results/README.md").read_text(), re.DOTALL)
    libraries = [re.findall(r"^import (\S+)$", example, re.MULTILINE)[-1] for example in examples]
    assert libraries == ["semgap.results", "pyarrow.dataset", "polars", "duckdb"]
    medians = [medians_of(example) for example in examples]
    assert set(medians[0]) == set(MODES)
    assert all(each == pytest.approx(medians[0]) for each in medians[1:])


def medians_of(example: str) -> dict[str, float]:
    """The medians that an example computes, by mode."""
    names: dict[str, Any] = {}
    exec(example, names)
    made = names["medians"]
    if isinstance(made, pd.Series):
        return {mode: value for (_, mode), value in made.items()}
    return {mode: value for _, mode, value in (made.rows() if isinstance(made, polars.DataFrame) else made.fetchall())}


def test_a_real_run_is_loaded_whole(finished: Clone) -> None:
    run = results.load(finished.root / "results")
    assert set(run.trials["mode"]) == set(MODES) and len(run.manifests) == len(run.trials) == 6
    assert {name for name in TRIAL_TABLES if getattr(run, name).empty} <= {"relay", "gpu", "dmon", "load", "batches"}
    assert run.tables["summary"]["mode"].nunique() == len(MODES)
