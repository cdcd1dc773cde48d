"""A finished run stands by its seals, and an edit of it reaches no table."""

from __future__ import annotations

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from clone import Clone, Finished, environment

pytestmark = pytest.mark.alone


def test_verify_finds_every_kind_of_result_of_a_finished_run_as_it_was_written(finished_run: Finished) -> None:
    code = environment() | {"PYTHONPATH": str(finished_run.clone.root / "src")}
    command = [sys.executable, "-m", "semgap", "verify", "results"]
    done = subprocess.run(command, cwd=finished_run.clone.root, env=code, capture_output=True, text=True)
    # A reference, two of the exactness check and its three modes, the dumped tensors, the codecs.
    line = "results stands: 6 trials, whose sums hold, and 7 other results are as they were written\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, "")


def test_halved_latencies_reach_no_table_and_the_way_out_makes_the_run_whole(finished: Clone) -> None:
    file = finished.trial("remote_cache", 1) / "steps.parquet"
    steps, before = pq.read_table(file, partitioning=None), file.stat()
    column = steps.column_names.index("latency_s")
    pq.write_table(steps.set_column(column, "latency_s", pc.multiply(steps["latency_s"], pa.scalar(0.5))), file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    (finished.root / "results/results.csv").unlink()
    done = finished.snakemake("results/results.csv")
    trial = file.parent.relative_to(finished.root)
    assert done.returncode == 1
    assert f"AlteredError: trial {trial} is not as it was measured: its manifest says sha256" in done.stdout
    assert f"rerun it: delete {trial} and run snakemake again" in done.stdout
