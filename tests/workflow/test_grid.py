"""Which trials run, in which order, and that no two are measured at once."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from clone import AFTERWARDS, CODECS, COMPARED, DUMP, FETCH, REFERENCE, Clone, Finished, blocks, checks, job_names, trials

pytestmark = pytest.mark.alone


def test_selections_with_commas_and_with_brackets_give_the_same_grid(fresh: Clone) -> None:
    commas = fresh.planned(
        "--config", "modes=local,remote_cache", "phases=prefill,decode", "models=tiny,smollm2-135m", "networks=loopback", "trials=1"
    )
    brackets = fresh.planned(
        "--config", "modes=[local,remote_cache]", "phases=[prefill,decode]", "models=[tiny,smollm2-135m]", "networks=[loopback]", "trials=1"
    )
    measured = {name for name in commas if re.match(r"measuring \w+, ", name)}
    expected = [
        trials(["local", "remote_cache"], [1], phase, model) for phase in ("prefill", "decode") for model in ("tiny", "smollm2-135m")
    ]
    assert measured == set().union(*expected)
    assert commas == brackets


def test_a_single_name_selects_one_row_of_each_axis(fresh: Clone) -> None:
    planned = fresh.planned("--config", "modes=sys_simulated", "phases=decode", "models=tiny", "networks=loopback", "trials=2")
    once = {FETCH, REFERENCE, COMPARED, DUMP, CODECS} | checks(["sys_simulated"])
    assert planned == once | blocks([1, 2]) | trials(["sys_simulated"], [1, 2]) | AFTERWARDS


def test_trials_run_block_by_block_in_the_seeded_order(finished_run: Finished) -> None:
    ran = re.findall(r"measuring (\w+), (\w+), trial (\d+)", "\n".join(job_names(finished_run.output)))
    assert ran == [(at.mode, at.phase, str(at.trial)) for at in finished_run.clone.config().run_order()]


def test_blocks_run_in_turn_with_their_phases_mixed(fresh: Clone, tmp_path: Path) -> None:
    """The scheduler's own order: all outputs are there, and a run touches them one by one."""
    clone, chosen = fresh.copy(tmp_path / "clone"), {"phases": ["prefill", "decode"], "trials": 3}
    clone.configure(chosen)
    outputs = [line.partition("\t")[0] for line in clone.run("--summary").splitlines() if "\tupdate pending" in line]
    for output in outputs:
        path = clone.root / output
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"vocab_size": 512, "generation": 0, "cell_digest": "", "session": ""}')
    ran = re.findall(r"measuring (\w+), (\w+), trial (\d+)", "\n".join(job_names(clone.run("--touch", "--forceall"))))
    assert ran == [(at.mode, at.phase, str(at.trial)) for at in clone.config().run_order()]


def test_a_trial_starts_only_when_the_one_before_has_ended_however_many_cores_there_are(finished_run: Finished) -> None:
    events = re.findall(r"(Job \d+: measuring \w+,|Finished jobid: \d+ \(Rule: measure_trial\))", finished_run.output)
    kinds = [event.split()[0] for event in events]
    assert kinds == ["Job", "Finished"] * 6


def test_no_two_trials_of_a_run_with_many_cores_were_measured_at_once(finished_run: Finished) -> None:
    windows = sorted(window(manifest) for manifest in (finished_run.clone.root / "results/trials").rglob("manifest.json"))
    assert len(windows) == 6
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(windows))


def window(manifest: Path) -> tuple[float, float]:
    """Both from the machine's monotonic clock, which all processes share."""
    measured = json.loads(manifest.read_text())["measured"]
    return measured["start_s"], measured["end_s"]
