"""The short form of the campaign runs clean, and a campaign that finds a wrong token, an orphan or a forged trial counts it as wrong."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from written_trials import Trial, reseal, write_trial

from semgap.policy import Policy, Reply
from semgap.wire.frames import Flag
from semgap.wire.messages import Operation
from torture import edits, machine_state, misuse, mutated_frames, mutations, recording
from torture.campaign import Book, Only, Try, markdown, total
from torture.disks import whole_or_gone
from torture.machine_state import MARK, orphans
from torture.servers import Servers
from torture.trials import Bench, untyped

if TYPE_CHECKING:
    from started_workers import StartedWorker

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[2]


def test_the_short_form_finds_nothing_wrong(tmp_path: Path) -> None:
    report = tmp_path / "torture.json"
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torture", "--short", "--output", str(report)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["total"]["wrong"] == 0 and found["orphans_at_the_end"] == [] and found["broke"] == {}
    assert {row["attack"] for row in found["rows"]} == {"frames", "signals", "snakemake", "disk", "misuse", "edits"}
    assert all(row["tries"] for row in found["rows"])
    assert report.with_suffix(".md").read_text() == markdown(found["rows"])


@pytest.fixture
def book() -> Book:
    return Book("planted", 1, time.monotonic() + 600)


def judged(book: Book, faults: list[str]) -> int:
    """The wrong tries of a book after one with these faults."""
    (one,) = book.turns({"target": 1})
    book.judged(one, "survived", faults)
    return book.rows["target"].wrong


def test_a_wrong_token_counts_as_wrong(
    start_worker: Callable[..., StartedWorker], tmp_path: Path, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recording.tiny_model(tmp_path / "model")
    right = recording.expected_tokens(model)
    monkeypatch.setitem(recording.SOURCE, "seed", 8)
    other = recording.tiny_model(tmp_path / "other")
    worker, policy = start_worker(), Policy(reply=Reply("token"), keeps="tokens", window=4)
    assert mutated_frames.wrong_tokens(recording.run_session(worker.address, worker.secret, policy, model), right) == []
    faults = mutated_frames.wrong_tokens(recording.run_session(worker.address, worker.secret, policy, other), right)
    assert "right are" in faults[0] and judged(book, faults) == 1


def test_an_orphan_counts_as_wrong_and_is_ended(book: Book) -> None:
    sleeper = "import subprocess, sys; print(subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3).pid)"
    ended = subprocess.run([sys.executable, "-c", sleeper], env=os.environ | {MARK: "planted"}, capture_output=True, text=True)
    pid = int(ended.stdout)
    faults = orphans("planted", {}, within_s=0.5)
    assert faults == [f"process {pid} was left behind: sleep 600"] and judged(book, faults) == 1
    assert orphans("planted", {}, within_s=5) == []


@pytest.mark.parametrize("lives", [True, False])
def test_a_pristine_parent_is_an_orphan_once_its_workflow_is_dead(lives: bool) -> None:
    words = "import time; print(flush=True); time.sleep(600)  # semgap.processes.pristine_parent"
    command = [sys.executable, "-c", words]
    with subprocess.Popen(command, env=os.environ | {MARK: "parent"}, process_group=0, stdout=subprocess.PIPE) as parent:
        assert parent.stdout and parent.stdout.readline()
        assert bool(orphans("parent", {}, 0.2, workflow_lives=lives)) is not lives
        parent.kill()


def forged(directory: Path) -> None:
    """Halves a trial's latencies and bytes, and seals it anew."""
    file = directory / "steps.parquet"
    steps = pq.read_table(file, partitioning=None)
    for name in ("latency_s", "up_frame_bytes"):
        at = steps.column_names.index(name)
        steps = steps.set_column(at, steps.schema.field(at), pc.divide(steps[name], pa.scalar(2, steps.schema.field(at).type)))
    pq.write_table(steps, file)
    reseal(directory)


def test_a_forged_or_a_cut_trial_is_no_whole_one(tmp_path: Path) -> None:
    directory = write_trial(tmp_path, Trial("remote_cache"))
    assert whole_or_gone(directory) == ("2026-11-23T10:00:00+00:00", None)
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    forged(copy)
    assert "its measured steps hold" in str(whole_or_gone(copy)[1])
    (directory / "tcp.parquet").unlink()
    assert whole_or_gone(directory)[1]


def test_an_edit_that_nobody_notices_counts_as_wrong(tmp_path: Path, book: Book) -> None:
    (tmp_path / "kept").write_text("1")
    source = edits.Read.of(tmp_path, lambda root: {"value": (root / "kept").read_text()})
    (tmp_path / "kept").write_text("2")
    outcome, faults = edits.judged(source, tmp_path / "kept", "another number of kept", {tmp_path / "kept": b"1"})
    assert (outcome, faults) == ("survived", ["another number of kept changed value, and nobody noticed"])
    assert judged(book, faults) == 1 and (tmp_path / "kept").read_text() == "1"


def test_an_edit_that_ends_in_an_untyped_error_counts_as_wrong(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("1")
    source = edits.Read.of(tmp_path, lambda root: {"value": 1 / int((root / "kept").read_text())})
    (tmp_path / "kept").write_text("0")
    _, faults = edits.judged(source, tmp_path / "kept", "an edit", {tmp_path / "kept": b"1"})
    assert faults == ["an edit ended in ZeroDivisionError: division by zero"]


ANSWERS: dict[str, Any] = {"refused": 2, "codes": frozenset({"handle"}), "last": 9, "words": "", "ended": True, "granted": False}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, None),
        ({"last": 8}, None),  # a frame before could not be taken either
        ({"last": 10}, "the broken frame 9 was taken"),
        ({"last": None}, "ended without a word"),
        ({"answered": 8}, None),
        ({"answered": 9}, "the broken frame 9 was taken"),
        ({"ended": False}, "still open"),
        ({"codes": frozenset({"internal"})}, "an untyped error"),
        ({"granted": True}, "granted without the secret"),
    ],
)
def test_a_broken_frame_that_was_taken_and_an_untyped_answer_count_as_wrong(answers: dict[str, Any], said: str | None) -> None:
    faults = list(mutated_frames.faults_of(mutated_frames.Answers(**(ANSWERS | answers)), 9))
    assert (said is None and faults == []) or said in faults[0]


def test_a_broken_frame_that_was_taken_is_found_through_a_relay_which_may_lose_the_last_word() -> None:
    taken = b"".join(recording.RecordedFrame(Operation.PING, 0, Flag.REPLY, number, b"", b"", number).packed() for number in (8, 9))
    answers = mutated_frames._answers((taken, True), True)
    assert (answers.last, answers.answered) == (None, 9)
    assert "the broken frame 9 was taken" in next(mutated_frames.faults_of(answers, 9, through_relay=True))
    assert list(mutated_frames.faults_of(answers, 10, through_relay=True)) == []


def test_a_session_of_an_exact_mode_with_other_tokens_is_not_recorded(tmp_path: Path) -> None:
    model = recording.tiny_model(tmp_path / "model")
    with Servers.started(tmp_path, model) as servers, pytest.raises(AssertionError, match=r"gives tokens .*, right are \[1, 2\]"):
        mutated_frames.record_all(servers, [1, 2])


def test_what_must_be_refused_and_is_taken_counts_as_wrong(book: Book) -> None:
    assert misuse.refused(lambda: None) == ("survived", [])
    outcome, faults = misuse.refused(lambda: None, must=True)
    assert judged(book, faults) == 1 and outcome == "survived"


def test_words_that_end_in_a_traceback_alone_count_as_wrong() -> None:
    traceback = "Traceback (most recent call last):\n  File x\nKeyError: 'a'\n"
    assert untyped(traceback)
    said = "semgap worker: session of 127.0.0.1 ended: the client left\n"
    typed = "Traceback (most recent call last):\n  File y\nsemgap.experiment.trial_setup.TrialError: the client failed\n"
    assert untyped(said + traceback) and untyped(typed + traceback) and untyped("") and untyped(traceback + said)
    chained = traceback + "\nDuring handling of the above exception, another exception occurred:\n\n" + typed
    assert untyped(typed) == untyped(chained) == untyped("semgap: ended by SIGTERM\n") == []
    full = "Traceback (most recent call last):\n  File z\n[worker] a word in between\nOSError: [Errno 28] No space left on device: 'x'\n"
    assert untyped(full) == [] and untyped(full.replace("[Errno 28] ", ""))


def test_every_try_is_repeated_by_its_seed_and_number(book: Book) -> None:
    def draws(only: Only = Only()) -> dict[str, float]:  # noqa: B008
        return {one.name: one.rng.random() for one in Book("a", 5, time.monotonic() + 60, only).turns({"x": 3, "y": 2})}

    whole = draws()
    assert list(whole) == ["a:x:1", "a:y:1", "a:x:2", "a:y:2", "a:x:3"] and len(set(whole.values())) == 5
    assert draws(Only.of("a:y:2")[1]) == {"a:y:2": whole["a:y:2"]}
    assert Only.of("a:y") == ("a", Only("y"))
    assert [one.name for one in Book("a", 5, time.monotonic() - 1).turns({"x": 3, "y": 2})] == ["a:x:1", "a:y:1"]


def test_a_target_or_a_number_that_an_attack_has_not_is_refused() -> None:
    for text, said in (("a:z", "a has no 'z' here; its targets are x, y"), ("a:y:9", "has no 'y:9'"), ("a:x:1", "")):
        one = Book("a", 5, time.monotonic() + 60, Only.of(text)[1])
        for each in one.turns({"x": 3, "y": 2}):
            one.judged(each, "survived", [])
        with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
            one.require_what_was_asked_for()


def test_mutated_frames_are_requests_or_broken_as_they_say() -> None:
    ping = recording.RecordedFrame(11, 0, 0, 3, b"\x92\x90\x08", b"", 3)
    forward = recording.RecordedFrame(4, 1, 0, 4, bytes.fromhex("94919505000a910408000000"), bytes(range(8)), 4)
    rng = random.Random(3)
    for _ in range(300):
        assert mutations.is_request(mutations.request(rng, [ping]))
        name, data = mutations.broken(rng, [ping, forward], 5)
        assert data not in (ping.packed(5), forward.packed(5)), name
        for frame in (ping, forward):  # under no other operation's number either
            for operation in Operation:
                other = mutations._replaced(frame, operation=int(operation))
                assert data != other.packed(5) or not mutations.is_request(other), (name, operation)


@pytest.mark.parametrize("killed", [True, False])
def test_a_trial_that_was_killed_may_be_whole_and_a_cut_one_or_one_that_failed_counts_as_wrong(tmp_path: Path, killed: bool) -> None:
    directory = write_trial(tmp_path / "results", Trial("remote_cache"))
    bench = Bench(tmp_path, tmp_path, {}, tmp_path, tmp_path / "log")
    bench.log.write_text("semgap: no room")
    assert bool(bench.after_failure(1, killed)) != killed
    (directory / "tcp.parquet").unlink()
    assert f"a broken trial left {directory / 'manifest.json'}" in bench.after_failure(1, killed)[0]


def test_the_table_sums_its_rows() -> None:
    book = Book("frames", 1, time.monotonic() + 60)
    for one in book.turns({"worker": 3}):
        book.judged(one, "missed" if one.number == 3 else "refused", ["a fault"] if one.number == 2 else [])
    (row,) = book.rows.values()
    counts = {"tries": row.tries, "planned": 3, "refused": 1, "survived": 0, "wrong": 1, "missed": 1}
    rows = [{"attack": "frames", "target": "worker"} | counts]
    assert total(rows) == {"tries": 2, "planned": 3, "refused": 1, "survived": 0, "wrong": 1, "missed": 1}
    assert markdown(rows).splitlines()[-1] == "| all |  | 2 | 3 | 1 | 0 | 1 | 1 |"
    assert row.wrongs == [{"try": "frames:worker:2", "why": "a fault"}]
    assert isinstance(Try("a", "b", 1, random.Random(1)).name, str)


def test_a_process_of_another_campaign_is_no_orphan() -> None:
    with subprocess.Popen(["sleep", "60"], env=os.environ | {MARK: "another"}) as process:
        assert machine_state.marked("this one") == {} and len(machine_state.marked("another")) == 1
        process.kill()
