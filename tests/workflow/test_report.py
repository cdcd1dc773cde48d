"""The report, the linter, and that neither needs a network."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from clone import REPOSITORY, SNAKEMAKE, Clone, environment, job_names, trials

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analysis"))  # rendered.py

from rendered import columns, latex_faults

pytestmark = pytest.mark.alone

TABLES = (
    *("gap", "summary", "ladder", "facts", "network", "price", "load", "load_facts", "recovery", "recovery_pairs", "prefix", "handover"),
    *("exactness", "codecs", "break_even", "hypotheses"),
)
FIGURES = (
    *("gap", "ladder", "network", "price", "recovery", "prefix", "handover", "load"),
    *("codecs", "bytes_per_token", "latency", "telemetry"),
)
# A new network namespace has nothing but a loopback interface, which is down (netdevice(7): SIOCSIFFLAGS, IFF_UP | IFF_RUNNING).
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))
os.execvp(sys.argv[1], sys.argv[1:])
"""
WITHOUT_A_NETWORK = ("unshare", "--map-root-user", "--net", sys.executable, "-c", LOOPBACK_UP)


@pytest.fixture(scope="module")
def without_a_network() -> tuple[str, ...]:
    try:
        done = subprocess.run([*WITHOUT_A_NETWORK, "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) here to take the network away with")
    if done.returncode:
        pytest.skip(f"this user may not make a network namespace: {done.stderr.strip()}")
    return WITHOUT_A_NETWORK


def test_the_report_is_made_without_a_network_and_holds_every_table_and_figure_of_phases_that_were_run(
    finished: Clone, without_a_network: tuple[str, ...]
) -> None:
    finished.run("--report", "report.zip", within=without_a_network)
    with zipfile.ZipFile(finished.root / "report.zip") as report:
        names = {Path(name).name for name in report.namelist()}
    tables, figures = (set(each) - {"recovery", "recovery_pairs", "prefix", "handover", "load", "load_facts"} for each in (TABLES, FIGURES))
    files = {*(f"{table}.{ending}" for table in tables for ending in ("html", "csv")), *(f"{figure}.svg" for figure in figures)}
    assert names == {"report.html", "explorer.html", *files}


def test_every_readable_table_of_a_finished_run_has_at_most_eight_columns_and_is_valid_latex(finished: Clone) -> None:
    tables = finished.root / "results/tables"
    shapes = {(table, form): columns(tables / f"{table}.{form}") for table in TABLES for form in ("html", "md", "tex")}
    assert max(map(max, filter(None, shapes.values()))) <= 8
    assert all(shapes[table, "html"] == shapes[table, "md"] == shapes[table, "tex"] for table in TABLES)
    assert [fault for table in TABLES for fault in latex_faults((tables / f"{table}.tex").read_text())] == []


def test_a_trial_of_a_fetched_model_needs_no_network(finished: Clone, without_a_network: tuple[str, ...]) -> None:
    manifest = finished.trial("remote_cache", 1) / "manifest.json"
    manifest.unlink()
    output = finished.run(str(manifest.relative_to(finished.root)), within=without_a_network)
    assert trials(["remote_cache"], [1]) <= set(job_names(output))
    assert json.loads(manifest.read_text())["reconciliation"]["agreed"]


def test_snakemakes_linter_has_nothing_to_say() -> None:
    done = subprocess.run([SNAKEMAKE, "--lint"], cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Congratulations, your workflow is in a good condition!" in done.stderr
