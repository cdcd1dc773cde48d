"""No number changes unseen: an altered file of a trial, or another result, is refused by name; `semgap verify` says what stands."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from written_trials import Pressed, Trial, reseal, write_trial

from semgap import cli
from semgap.analysis.load import TRIAL_TABLES, AlteredError, UnusableTrial, load_trials
from semgap.analysis.results import EXACTNESS_COLUMNS, load_codecs, load_exactness
from semgap.analysis.verify import Verdict, verify
from semgap.experiment.measure_codecs import sealed_codecs
from semgap.seal import place_of, write_sealed_json, write_sealed_npz, write_whole

TRIAL = Trial(
    *("sys_delta", "recovery"),
    pressed=(Pressed(0.06, 0.5, "delta"), Pressed(0.06, 1.0, "delta")),
    latency_s=(0.06, 0.06),
    delta_bytes=77,
    kv_host_bytes=900,
    gpu_percent=(10.0, 20.0),
    control_s=((0.05, 0.05),),
)
FLIPS, SEED = 40, 17
FILES = (*(f"{table}.parquet" for table in TRIAL_TABLES), "manifest.json")


def written_run(results: Path) -> Path:
    """Writes the results of a run: two trials, one by hand, and one of each other result."""
    for trial in (TRIAL, Trial("local")):
        write_trial(results / "trials", trial)
    made = write_trial(results / "made", Trial("remote_cache"))
    (results / "by-hand/remote_cache").mkdir(parents=True)
    made.rename(results / "by-hand/remote_cache/decode")
    shutil.rmtree(results / "made")
    for name, value in {
        "exactness/model=m/mode=x.json": {**dict.fromkeys(EXACTNESS_COLUMNS), "cell_digest": "now", "tokens_equal": 12, "max_kl_nats": 0.5},
        "capacity/model=m/network=n/phase=p.json": {"cell_digest": "now", "per_s": 3.5},
        "networks/network=n.json": {"network": "n", "asked": {"rtt_ms": 20}},
    }.items():
        write_sealed_json(results / name, value)
    codecs = results / "codecs/model=m.parquet"
    write_whole(codecs, sealed_codecs(pa.table({"ratio": [1.5, 2.5]}), "now", place_of(codecs)))
    np.savez(results / "unsealed.npz", allow_pickle=False, tokens=np.arange(30))
    write_sealed_npz(results / "reference/model=m/phase=p.npz", results / "unsealed.npz")
    (results / "results.csv").write_text("not sealed: made of the trials")
    return results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of `written_run`."""
    return written_run(tmp_path_factory.mktemp("run") / "results")


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(run, tmp_path / "results"))


def trial_in(results: Path) -> Path:
    (directory,) = results.glob("trials/*/*/mode=sys_delta/*/trial=1")
    return directory


@pytest.mark.parametrize(
    ("file", "other"),
    [
        ("networks/network=n.json", "networks/network=m.json"),
        ("networks/network=n.json", "capacity/model=m/network=n/phase=p.json"),
        ("capacity/model=m/network=n/phase=p.json", "capacity/model=m/network=n/phase=q.json"),
        ("reference/model=m/phase=p.npz", "reference/model=m/phase=q.npz"),
        ("codecs/model=m.parquet", "codecs/model=n.parquet"),
    ],
)
def test_a_whole_file_at_the_place_of_another_result_is_named(own: Path, file: str, other: str) -> None:
    (own / other).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(own / file, own / other)
    (fault,) = verify(own).faults
    assert str(own / other) in fault and f"as {other}" in fault


def test_a_run_stands_wherever_its_directory_is_moved(own: Path) -> None:
    assert not verify(Path(shutil.move(own, own.with_name("others")))).faults


def refusal(directory: Path) -> str:
    with pytest.raises(UnusableTrial) as refused:
        load_trials([directory], {str(directory): TRIAL.digest})
    assert str(directory) in str(refused.value) and f"delete {directory} and run snakemake again" in str(refused.value)
    return str(refused.value)


def test_the_written_trial_stands(run: Path) -> None:
    trials = load_trials([trial_in(run)], {str(trial_in(run)): TRIAL.digest})
    assert set(trials.ledger["side"]) == {"client", "worker", "worker_to_kv_host", "kv_host"}


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_in_a_file_of_a_trial_passes(own: Path, name: str) -> None:
    file = trial_in(own) / name
    data = file.read_bytes()
    for position in random.Random(SEED).sample(range(8 * len(data)), FLIPS):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        assert name in refusal(file.parent), f"bit {position}"
    file.write_bytes(data)
    test_the_written_trial_stands(own)


def halve(column: str) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({column: row[column] / 2 if isinstance(row[column], float) else (row[column] or 2) // 2})


def add_one(column: str) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({column: row[column] + 1})


COLUMNS = {
    "steps": ["latency_s", "worker_compute_s", "up_frame_bytes", "down_payload_bytes", "token", "stall_s", "missing_bytes"],
    "requests": ["ttft_s", "prompt_tokens"],
    "control": ["compute_s"],
    "ledger": ["payload_bytes", "header_bytes"],
    "tcp": ["bytes_sent", "bytes_received", "segment_header_bytes"],
    "host": ["cpu_percent", "rss_bytes"],
    "gpu": ["gpu_percent"],
}


@pytest.mark.parametrize(("table", "column"), [(table, column) for table, columns in COLUMNS.items() for column in columns])
def test_an_edited_column_is_refused_by_the_name_of_its_file(own: Path, table: str, column: str) -> None:
    file = trial_in(own) / f"{table}.parquet"
    edit_rows(file, halve(column))
    assert f"its manifest says sha256 {json.loads((file.parent / 'manifest.json').read_text())['files'][file.name]}" in refusal(file.parent)
    assert f"of {table}.parquet" in refusal(file.parent)


@pytest.mark.parametrize("table", [table for table in TRIAL_TABLES if table not in COLUMNS])
def test_rows_added_to_an_empty_table_are_refused(own: Path, table: str) -> None:
    file = trial_in(own) / f"{table}.parquet"
    pq.write_table(pa.Table.from_pylist([{}], schema=pq.read_schema(file)), file)
    assert f"of {table}.parquet" in refusal(file.parent)


def edit_rows(file: Path, edit: Callable[[dict[str, Any]], None], where: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
    table = pq.read_table(file, partitioning=None)
    rows = table.to_pylist()
    chosen = [row for row in rows if where(row)]
    assert chosen
    for row in chosen:
        edit(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "probe": lambda it: it["probe"].update(rtt_s=1e-6),
    "exactness": lambda it: it["exactness"].update(tokens_equal=99),
    "cell": lambda it: it["cell"]["policy"].update(window=2),
    "floor": lambda it: it["floor"].update(step_bytes=1),
    "telemetry": lambda it: it["telemetry"]["host"]["cost"]["client"].update(cpu_s=0.0),
    "kernel": lambda it: it["reconciliation"].update(kernel_bytes_sent=1),
    "fingerprint": lambda it: it.update(fingerprint="the same"),
    "apart": lambda it: it.update(apart="the link was off"),
    "files": lambda it: it["files"].pop("relay.parquet"),
    "seal": lambda it: it.pop("seal"),
}


@pytest.mark.parametrize("edit", MANIFEST_EDITS)
def test_an_edited_manifest_is_refused(own: Path, edit: str) -> None:
    file = trial_in(own) / "manifest.json"
    manifest = json.loads(file.read_text())
    MANIFEST_EDITS[edit](manifest)
    file.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    assert "is not as it was measured: of manifest.json, it" in refusal(file.parent)


def of(**values: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda row: all(row[key] == value for key, value in values.items())


def resent(row: dict[str, Any]) -> None:
    row.update(bytes_sent=row["bytes_sent"] + 1, bytes_retrans=row["bytes_retrans"] + 1)


END, UPLOAD = {"moment": "end"}, {"kind": "setup", "tensor_class": "weights", "link": "network"}
FORGED: dict[str, tuple[str, Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], bool], str]] = {
    "step": ("steps", halve("up_frame_bytes"), of(measured=True), r"its measured steps hold \d+ bytes up, its ledger's .* frames \d+"),
    "client": ("ledger", halve("payload_bytes"), of(side="client", tensor_class="logits"), r"its measured steps hold \d+ bytes down"),
    "worker": ("ledger", halve("header_bytes"), of(side="worker", kind="setup"), r"ledgers differ in 0/up/forward/setup/header: client"),
    "frames": ("ledger", add_one("frames"), of(side="worker", tensor_class="kv"), r"ledgers differ in 0/up/forward/delta/kv: client"),
    "gone": ("ledger", lambda row: row.update(side="?"), of(side="worker", tensor_class="tokens"), r"ledgers differ in .*worker None"),
    "KV host": ("ledger", halve("payload_bytes"), of(side="kv_host"), r"ledgers differ in .*: worker_to_kv_host counted .*, kv_host"),
    "both KV": ("ledger", halve("payload_bytes"), lambda row: "kv_host" in row["side"], r"says kv_host frame_bytes_by_kind .*900"),
    "sent": ("tcp", halve("bytes_sent"), of(side="client", **END), r"the client's ledger of connection 0 has \d+ bytes sent"),
    "received": ("tcp", add_one("bytes_received"), of(side="worker", **END), r"the worker's ledger of connection 0 has"),
    "resent": ("tcp", resent, of(side="worker", **END), "retransmitted_bytes 2, its tables 3"),
    "upload": ("ledger", halve("payload_bytes"), of(**UPLOAD), r"the client's ledger of connection 0 has"),
}


@pytest.mark.parametrize("edit", FORGED)
def test_sums_that_do_not_hold_are_refused_even_if_the_hashes_were_computed_anew(own: Path, edit: str) -> None:
    table, change, where, said = FORGED[edit]
    directory = trial_in(own)
    edit_rows(directory / f"{table}.parquet", change, where)
    reseal(directory)
    with pytest.raises(AlteredError, match=rf"trial {directory} is not as it was measured: .*{said}"):
        load_trials([directory], {str(directory): TRIAL.digest})


def test_a_table_without_a_column_that_the_sums_need_is_refused(own: Path) -> None:
    file = trial_in(own) / "ledger.parquet"
    pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["header_bytes"]), file)
    reseal(file.parent)
    assert "its tables or its manifest lack 'header_bytes'" in refusal(file.parent)


@pytest.mark.parametrize("key", ["kernel_bytes_sent", "kernel_bytes_received", "closing_frame_bytes", "retransmitted_bytes"])
def test_totals_of_the_manifest_that_its_tables_do_not_hold_are_refused(own: Path, key: str) -> None:
    directory = trial_in(own)
    said = json.loads((directory / "manifest.json").read_text())["reconciliation"]
    reseal(directory, reconciliation=said | {key: said[key] + 1})
    refusal(directory)


def test_verify_counts_what_stands_in_one_line_and_reads_named_experiments_too(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trial(own / "mine/trials", Trial("naive"))
    (own / "trials/model=smollm2/.trial=9.partial").mkdir()
    (own / "trials/model=smollm2/.trial=9.partial/steps.parquet").write_text("of a writer that was killed")
    (own / "trials/model=smollm2/trial=8").mkdir()  # as a failed job leaves it
    assert cli.main(["verify", str(own)]) == 0
    line = f"{own} stands: 4 trials, whose sums hold, and 5 other results are as they were written\n"
    assert tuple(capsys.readouterr()) == (line, "")
    assert verify(own / "mine") == Verdict(own / "mine", 1, 0, (), ())
    assert verify(trial_in(own)).trials == 1


OTHERS = ("exactness/model=m/mode=x.json", "capacity/model=m/network=n/phase=p.json", "networks/network=n.json")
OTHERS += ("codecs/model=m.parquet", "reference/model=m/phase=p.npz")


def test_verify_names_every_file_that_does_not_stand_and_ends_with_1(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS:
        data = (own / name).read_bytes()
        (own / name).write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    (trial_in(own) / "manifest.json").unlink()
    assert cli.main(["verify", str(own)]) == 1
    out, err = capsys.readouterr()
    assert out == f"{own} does not stand: 1 of 3 trials and 5 of 5 other results are not as they were written\n"
    lines = err.splitlines()
    assert len(lines) == 6 and all(line.startswith("semgap verify: ") and "run snakemake again" in line for line in lines)
    assert f"trial {trial_in(own)} has no manifest.json" in err and all(f"{own / name} is not as it was written" in err for name in OTHERS)


def test_verify_of_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"semgap verify: {tmp_path} holds no results; name the directory of a run, e.g. results/\n"


def test_edited_exactness_and_codecs_are_refused_by_name(own: Path) -> None:
    exactness, codecs = own / OTHERS[0], own / "codecs/model=m.parquet"
    exactness.write_text(json.dumps(json.loads(exactness.read_text()) | {"max_kl_nats": 0.0}, indent=1, sort_keys=True) + "\n")
    with pytest.raises(AlteredError, match=rf"{exactness} is not as it was written: .*delete it and run snakemake again"):
        load_exactness([exactness], {str(exactness): "now"})
    edit_rows(codecs, halve("ratio"))
    with pytest.raises(AlteredError, match=rf"{codecs} is not as it was written"):
        load_codecs([codecs], {str(codecs): "now"})
