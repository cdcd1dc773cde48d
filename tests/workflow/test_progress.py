"""`--logger semgap`, as `make run` has it: progress with the time left."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from clone import REPOSITORY, SNAKEMAKE, environment

from snakemake_logger_plugin_semgap.job_times import JobTimes, left_text


def told(times: JobTimes, took_s: list[tuple[str, float]]) -> float:
    """Jobs that ran one after the other from 0 s on; gives the time at their end."""
    now_s = 0.0
    for job, (rule, seconds) in enumerate(took_s):
        times.start(job, rule, None, now_s)
        now_s += seconds
        times.finish(job, now_s)
    return now_s


def test_the_time_left_is_the_mean_of_each_rule_s_jobs_times_those_that_wait() -> None:
    times = JobTimes()
    times.plan({"fetch_model": 1, "measure_trial": 10, "make_tables": 1})
    now_s = told(times, [("fetch_model", 100.0)])
    assert times.left_s(now_s) is None, "a download says nothing of trials"
    for job, seconds in enumerate((6.0, 8.0), 1):
        times.start(job, "measure_trial", None, now_s)
        now_s += seconds
        times.finish(job, now_s)
    tables_s = (100 + 6 + 8) / 3  # unknown: as any job
    assert times.left_s(now_s) == pytest.approx(8 * 7 + tables_s)
    assert (times.done, times.total) == (3, 12)
    times.start(3, "measure_trial", None, now_s)
    assert times.left_s(now_s + 3) == pytest.approx(8 * 7 + tables_s - 3)
    assert times.left_s(now_s + 70) == pytest.approx(7 * 7 + tables_s), "a late job takes no time from those that wait"


def test_the_time_left_is_said_in_round_numbers() -> None:
    assert [left_text(seconds) for seconds in (None, 0, 0.2, 42, 89, 95, 601)] == [
        *("", "", "about 5 s left", "about 40 s left", "about 90 s left", "about 2 min left", "about 10 min left")
    ]


def test_make_run_shows_it() -> None:
    done = subprocess.run(["make", "--dry-run", "run"], cwd=REPOSITORY, capture_output=True, text=True)
    assert "snakemake --cores 1 --logger semgap" in done.stdout


def test_a_log_file_gets_a_line_for_each_job_with_the_time_left(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    done = subprocess.run(COMMAND, cwd=tmp_path, env=own_code(), stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^(\d) of 5 jobs(, about \d+ s left)?: (.*)$", done.stderr, re.MULTILINE)
    assert [int(number) for number, *_ in lines] == [1, 2, 3, 4, 5], done.stderr
    first, *trials, last = (words for *_, words in lines)
    assert (first, sorted(trials), last) == ("fetch model", [f"measuring trial {number}" for number in (1, 2, 3)], "all")
    assert [bool(left) for _, left, _ in lines] == [False, True, True, True, False], "a download says nothing of trials"


def test_a_terminal_gets_bars_with_the_time_left(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    shown, status = on_a_terminal(COMMAND, tmp_path)
    assert status == 0, shown
    assert "Total Progress" in shown and re.search(r"about \d+ s left", shown), shown


WORKFLOW = """
rule all:
    input: "1.txt", "2.txt", "3.txt"

rule fetch_model:
    output: "model.txt"
    shell: "touch {output}"

rule measure_trial:
    input: "model.txt"
    output: "{number}.txt"
    message: "measuring trial {wildcards.number}"
    shell: "sleep 1.5; touch {output}"
"""
COMMAND = [str(SNAKEMAKE), "--cores", "1", "--logger", "semgap"]


def own_code() -> dict[str, str]:
    """Snakemake finds its plugins on Python's path."""
    return environment() | {"PYTHONPATH": str(REPOSITORY / "src")}


def on_a_terminal(command: list[str], directory: Path) -> tuple[str, int]:
    """What a command shows on a terminal of 140 columns, and its exit status."""
    ours, its = pty.openpty()
    more = {"TERM": "xterm", "COLUMNS": "140", "LINES": "50"}
    process = subprocess.Popen(command, cwd=directory, env=own_code() | more, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the terminal's last user ended
            break
    os.close(ours)
    return shown.decode(errors="replace"), process.wait(timeout=60)
