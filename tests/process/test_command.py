"""The `semgap` command itself: exit codes, completion, and the last line of `semgap doctor`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from semgap.doctor import Finding, examine, measurable

pytestmark = pytest.mark.alone
ROOT = Path(__file__).resolve().parents[2]


def semgap(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "semgap", *arguments], env=os.environ | more, capture_output=True, text=True, timeout=60)


def test_a_command_that_worked_ends_with_0(tmp_path: Path) -> None:
    assert semgap("secret", str(tmp_path / "secret")).returncode == 0


def test_an_expected_error_ends_with_1_and_one_line_that_names_the_way_out(tmp_path: Path) -> None:
    done = semgap("price", "--rtt", "1ms", "--rate", "1Gbit", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"semgap price: {tmp_path}/nowhere is no directory; name the directory of a finished run")


def test_an_address_space_that_is_too_small_for_a_trial_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    limited = ["bash", "-c", f"ulimit -v 1500000; exec {sys.executable} -m semgap run --mode sys --root {ROOT} --output {tmp_path}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "semgap run: a process may map 1,536,000,000 bytes here (ulimit -v) and a trial's needs 2,000,000,000 before the model's memory; "
        "raise the limit, e.g. ulimit -v unlimited\n"
    )


@pytest.mark.parametrize(("config", "options"), [("worker: {tls: true}", []), ("worker: {launch: ssh, host: h}", ["--tls"])])
def test_a_run_with_a_worker_of_ones_own_keeps_to_tls_whether_config_or_option_says_so(
    tmp_path: Path, config: str, options: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(config)
    chosen = ["--config", str(tmp_path / "mine.yaml"), "--worker", "127.0.0.1:1", *options]
    done = semgap("run", "--mode", "sys", "--root", str(ROOT), "--output", str(tmp_path / "out"), *chosen)
    assert done.returncode == 1
    assert done.stderr.startswith("semgap run: config.worker.tls with launch 'external' needs the secret that says who is there")


def test_a_wrong_command_line_ends_with_2() -> None:
    assert semgap("prise").returncode == semgap("relay").returncode == 2


@pytest.mark.parametrize(
    ("typed", "offered"), [("semgap pr", ["price"]), ("semgap serve --executor ", ["auto", "fused", "eager", "cuda_graph"])]
)
def test_a_shell_completes_commands_and_their_choices(typed: str, offered: list[str], tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    shell = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    assert semgap(COMP_LINE=typed, COMP_POINT=str(len(typed)), **shell).returncode == 0
    assert [word.strip() for word in answer.read_text().split("\n")] == offered


def test_doctor_ends_with_what_can_be_measured_here(tmp_path: Path) -> None:
    done = semgap("doctor", "--root", str(tmp_path))
    assert done.stdout.splitlines()[-1].startswith("You can measure here on ")
    assert done.returncode == 0


def test_doctor_says_what_a_machine_lacks_for_measuring() -> None:
    bare = [Finding("lacks", thing, "none") for thing in ("packages", "torch on GPU", "networks of netns", "sbatch", "load")]
    assert measurable(bare) == (
        "You can measure here on the CPU, over loopback and relays, with semgap run alone: no tables or figures; latencies will be noisy."
    )
    whole = [Finding("ok", each.thing, "here") for each in bare]
    assert measurable(whole) == (
        "You can measure here on the GPU and the CPU, over loopback, relays, network namespaces and Slurm's network between nodes, "
        "with snakemake and semgap run."
    )
    broken = [*whole, Finding("broken", "TCP_INFO", "Linux 2.4", "no remote trial can be reconciled")]
    assert measurable(broken) == "You can measure nothing here until this works: TCP_INFO: no remote trial can be reconciled"


def test_doctor_s_line_knows_the_names_of_its_findings(tmp_path: Path) -> None:
    things = {finding.thing for finding in examine(tmp_path)}
    assert {"packages", "torch on GPU", "networks of netns", "sbatch", "cores", "load"} <= things
