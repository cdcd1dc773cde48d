"""`make recorded`: README's answer is that of the finished run in results/."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from explored_runs import COMPUTE_S, KNOW_CONSUMER, LOCAL, REMOTE_CACHE, SYS, decoded, prefilled
from simulated_links import Network
from written_trials import reseal, write_trial

from semgap.analysis.collect_trials import collect_trials
from semgap.analysis.results import load_recorded, recorded_cells
from semgap.analysis.stats import difference_interval

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import record_answer

NEAR, FAR = Network("loopback", 20e-6, 12e9), Network("1gbit_20ms", 0.01, 1e9)
COMMIT = "0123456789abcdef"


def finished(results: Path, **git: Any) -> Path:
    """A run of some modes of the default one: local over loopback alone, the others over both networks; prefills beside them."""
    remote = [decoded(mode, at, trial) for trial in (1, 2) for at in (NEAR, FAR) for mode in (SYS, KNOW_CONSUMER, REMOTE_CACHE)]
    local = [decoded(LOCAL, NEAR, trial) for trial in (1, 2)]
    written = {}
    for trial in [*remote, *local, prefilled("remote_cache", 1)]:
        directory = write_trial(results / "trials", trial)
        written[str(directory)] = trial.digest
        complete(directory, git)
    collect_trials(written, results / "results.csv")
    (results / "explorer.html").write_text("the explorer of this run")
    return results


def complete(directory: Path, git: dict[str, Any]) -> None:
    found = json.loads((directory / "manifest.json").read_text())
    provenance = found["provenance"] | {"git": {"commit": COMMIT, "dirty": False} | git}
    reseal(directory, cell=found["cell"] | {"dtype": "float32"}, provenance=provenance)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded")
    record_answer.record(finished(directory / "results"), directory / "docs")
    return directory / "docs"


def answer(recorded: Path) -> dict[str, Any]:
    return dict(json.loads((recorded / "answer.json").read_text()))


def test_a_row_has_the_bytes_and_the_gap_of_each_network_local_first_then_the_ladder(recorded: Path) -> None:
    rows = {row["mode"]: row for row in answer(recorded)["rows"]}
    assert list(rows) == ["local", "remote_cache", "know_consumer", "sys"]
    assert list(rows["local"]["gap_ms"]) == ["loopback"] and rows["local"]["bytes_per_token"] == 0
    # remote_cache: a round trip, and 196,700 bytes down at 1 Gbit; its steps' compute is not in it.
    gap_ms, low_ms, high_ms = rows["remote_cache"]["gap_ms"]["1gbit_20ms"]
    assert gap_ms == pytest.approx(20 + 196_700 * 8 / 1e6, rel=0.02) and low_ms < gap_ms < high_ms
    assert rows["sys"]["gap_ms"]["1gbit_20ms"][0] == pytest.approx(20 / 8, rel=0.05)
    assert rows["remote_cache"]["bytes_per_token"] == 196_760
    assert rows["sys"]["bytes_per_token"] == pytest.approx(30 + 50 / 8)


def test_the_parts_of_the_gain_have_welch_s_intervals_over_trials(recorded: Path) -> None:
    made = {(each["network"], each["base"], each["mode"]): each["gain_ms"] for each in answer(recorded)["gains"]}
    pairs = [("remote_cache", "know_consumer"), ("know_consumer", "sys")]
    assert list(made) == [(at.name, *pair) for at in (NEAR, FAR) for pair in pairs]
    run = recorded.parent / "results"
    gaps = load_recorded(run, recorded_cells(run)).gaps.query("phase == 'decode'")
    for (network, base, mode), gain_ms in made.items():
        of = [gaps[(gaps["network"] == network) & (gaps["mode"] == name)] for name in (base, mode)]
        ours, theirs = (1e3 * each["gap_s"].astype("float64") for each in of)
        assert len(ours) == len(theirs) == 2
        expected = difference_interval(ours.tolist(), theirs.tolist())
        assert gain_ms == pytest.approx([expected.value, expected.low, expected.high])


@pytest.mark.parametrize(
    ("gain_ms", "said"),
    [
        ([2.1, 0.32, 3.87], "The bytes are worth 2.1 ms [0.3 to 3.9] of that (`know_consumer`)."),
        ([2.1, -0.1, 4.3], "The run does not resolve the worth of the bytes (`know_consumer`)."),
        ([2.1, None, None], "The run does not resolve the worth of the bytes (`know_consumer`)."),
    ],
)
def test_a_part_of_the_gain_whose_interval_holds_0_has_no_figure(recorded: Path, gain_ms: list[float | None], said: str) -> None:
    found = answer(recorded)
    (far,) = (each for each in found["gains"] if each["network"] == FAR.name and each["mode"] == "know_consumer")
    far["gain_ms"] = gain_ms
    text = record_answer.block(found)
    assert said in text and text.count("2.1 ms") == said.count("2.1 ms")
    (far,) = (each for each in found["gains"] if each["network"] == FAR.name and each["mode"] == "sys")
    assert f"It is worth {far['gain_ms'][0]:.1f} ms [" in text
    far["gain_ms"] = gain_ms
    assert ("does not resolve what it is worth that `sys` asks for" in record_answer.block(found)) == ("does not" in said)


def test_the_run_behind_the_rows_is_named(recorded: Path) -> None:
    came = answer(recorded)["run"]
    assert (came["commit"], came["command"], came["cpu"]) == (COMMIT, "make run", "a CPU")
    assert (came["model"], came["dtype"], came["steps"]) == ("smollm2", "float32", 32)


def test_a_mode_with_more_trials_than_the_others_is_named(recorded: Path) -> None:
    found = answer(recorded)
    assert all(set(row["trials"].values()) == {2} for row in found["rows"]) and ", 2 trials a mode; " in record_answer.block(found)
    (row,) = (row for row in found["rows"] if row["mode"] == "remote_cache")
    row["trials"]["loopback"] = 10
    assert ", 2 trials a mode, 10 of `remote_cache` over loopback; " in record_answer.block(found)


def test_the_picture_is_that_of_the_run_and_the_same_each_time(recorded: Path, tmp_path: Path) -> None:
    picture = (recorded / "gap.svg").read_bytes()
    assert b"<svg" in picture and b"remote_cache" in picture
    record_answer.record(recorded.parent / "results", tmp_path)
    assert (tmp_path / "gap.svg").read_bytes() == picture


def test_the_explorer_is_that_of_the_run(recorded: Path) -> None:
    assert (recorded / "explorer.html").read_text() == "the explorer of this run"


def test_readme_s_block_says_the_answer_and_nothing_else_of_readme_changes(recorded: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n{record_answer.BEGIN}an older answer\n{record_answer.END}after\n")
    record_answer.write_block(readme, record_answer.block(answer(recorded)))
    text = readme.read_text()
    assert text.startswith(f"# before\n{record_answer.BEGIN}") and text.endswith(f"{record_answer.END}after\n")
    assert "an older answer" not in text
    gap = {row["mode"]: row["gap_ms"]["1gbit_20ms"][0] for row in answer(recorded)["rows"] if row["mode"] != "local"}
    assert f"(`remote_cache`) adds {gap['remote_cache']:.1f} ms to each token" in text and f"(`sys`) adds {gap['sys']:.1f} ms" in text
    assert f"The bytes are worth {gap['remote_cache'] - gap['know_consumer']:.1f} ms [" in text
    assert "`make run` at commit 0123456789, 2026-11-23" in text


def test_a_run_of_code_that_is_in_no_commit_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="files that commit 0123456789 does not have; commit them and run `make run` again"):
        record_answer.record(finished(tmp_path / "results", dirty=True), tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_gap_is_latency_less_compute(recorded: Path) -> None:
    (local,) = (row for row in answer(recorded)["rows"] if row["mode"] == "local")
    assert local["gap_ms"]["loopback"][0] == pytest.approx(0, abs=1e3 * COMPUTE_S * 0.01)
