"""`semgap doctor --worker`: reports differences between both sides, and whether a model is the same there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from semgap.doctor import Finding, _versions, _wall_clock, examine_worker
from semgap.telemetry.clock import offset_s, read_clock

if TYPE_CHECKING:
    from started_workers import StartedWorker


def _told(worker: StartedWorker, root: Path, model: str | None = None) -> dict[str, Finding]:
    return {finding.thing: finding for finding in examine_worker(worker.address, worker.secret_file, root, model)}


def test_versions_clock_link_and_model_of_a_worker_are_compared_with_this_side(
    start_worker: Callable[..., StartedWorker], llama: Path, tmp_path: Path
) -> None:
    worker = start_worker()  # one that holds no model yet
    (tmp_path / "resources/models").mkdir(parents=True)
    (tmp_path / "resources/models/tiny").symlink_to(llama)
    told = _told(worker, tmp_path)
    things = ["worker", "versions there", "clock there", "wall clock there", "round trip", "goodput", "model tiny there"]
    assert list(told) == things and {finding.state for finding in told.values()} == {"ok"}
    assert told["versions there"].meaning == "the same on both sides" and told["clock there"].meaning == "one machine, one clock"
    assert told["model tiny there"].meaning.startswith("the same on both sides, by hash; 0 MB were there, ")
    assert "0 MB were sent" in _told(worker, tmp_path, "tiny")["model tiny there"].meaning


def test_a_worker_that_does_not_answer_or_has_another_secret_is_broken_with_the_reason(worker: StartedWorker, tmp_path: Path) -> None:
    (gone,) = examine_worker("127.0.0.1:1", None, tmp_path, None)
    assert gone.state == "broken" and "no worker answers at 127.0.0.1:1" in gone.meaning
    (stranger,) = examine_worker(worker.address, None, tmp_path, None)
    assert stranger.state == "broken" and "does not hold this client's secret" in stranger.meaning


def test_another_version_of_a_package_there_is_named_with_both() -> None:
    (found,) = _versions({"semgap": "0.0.1"})
    assert found.state == "lacks" and "semgap 0.0.1 there and " in found.meaning and "install the same ones" in found.meaning


@pytest.mark.parametrize(("clock", "ahead_s"), [("monotonic_s", 1e6), ("wall_s", -3.0)])
def test_the_offsets_of_another_hosts_clocks_are_reported(clock: str, ahead_s: float) -> None:
    def theirs() -> dict[str, Any]:
        own = read_clock()
        return own | {"monotonic_s": own["monotonic_s"] + 1e6, "wall_s": own["wall_s"] - 3, "boot_id": "another"}

    offset, error = offset_s(theirs, clock)
    assert abs(offset - ahead_s) <= error < 0.1


def test_wall_clocks_further_apart_than_people_would_think_are_told_with_the_way_out() -> None:
    assert _wall_clock(0.4, 0.001).state == "ok"
    off = _wall_clock(-3.0, 0.001)
    assert off.state == "lacks" and off.value == "-3.000000 s, give or take 0.001000 s" and "chrony" in off.meaning
