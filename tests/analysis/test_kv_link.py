"""Trials over a network between worker and KV host: named in tables and figure; test_restores.py has their prices."""

from __future__ import annotations

from pathlib import Path

import pytest
from explored_runs import poor_run
from pandas.testing import assert_frame_equal
from written_trials import PROBE, Pressed, Trial, pressed, results

from semgap.analysis.explorer.views import explored
from semgap.analysis.figures import recovery as recovery_figure
from semgap.analysis.links import LinkModel
from semgap.analysis.price import price
from semgap.analysis.results import Results
from semgap.analysis.tables import network, recovery, recovery_pairs
from semgap.analysis.tables.render import to_markdown

ROW = {"kind": "loopback", "kv": "far"}
FAR = {"kind": "relay", "rtt_ms": 4, "rate": "1Gbit"}
SLOW = PROBE | {"rtt_s": 0.004, "goodput_up_bytes_per_s": 1e8, "goodput_down_bytes_per_s": 1e8}
PER_BYTE = 1e-8 - 0.004 / PROBE["payload_bytes"]  # a transfer begins with a round trip


def pressed_trials(where: str = "kv_far") -> list[Trial]:
    """Two trials of a mode that reloads and of one with deltas, over a network with a link of its KV host, or over loopback."""
    steps = tuple((Pressed(0.04, 0.0), Pressed(ms / 1e3, 1.0, "reload", fetched=900_000)) for ms in (90, 91))
    link = {"network": where, "network_spec": ROW, "kv_network_spec": FAR, "kv_probe": SLOW} if where == "kv_far" else {}
    fields = {"control_s": ((0.03, 0.03),)} | link
    return [
        trial for mode, how in (("remote_cache", "reload"), ("sys", "delta")) for trial in pressed(mode, *steps, recovery=how, **fields)
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("both"), *pressed_trials("loopback"), *pressed_trials())


def test_a_row_of_results_names_the_network_of_its_kv_host_with_what_was_asked_and_probed(both: Results) -> None:
    rows = both.rows.set_index("network")
    columns = [
        "kv_network",
        "kv_network_kind",
        "kv_asked_rtt_s",
        "kv_asked_rate_bits_per_s",
        "kv_probe_rtt_s",
        "kv_probe_goodput_up_bytes_per_s",
    ]
    assert rows.loc["kv_far", columns].to_numpy().tolist() == [["far", "relay", 0.004, 1e9, 0.004, 1e8]] * 4
    assert rows.loc["loopback", columns].isna().all(axis=None) and set(rows["network_kind"]) == {"loopback"}


def test_the_table_of_recovery_names_it_and_has_the_means_of_its_probes(both: Results) -> None:
    table = recovery.table(both).set_index("network")
    assert set(table.loc["kv_far", "kv_network"]) == {"far"} and set(table.loc["kv_far", "kv_rtt_ms"]) == {4.0}
    for way in ("up", "down"):
        assert table.loc["kv_far", f"kv_goodput_{way}_mbit_per_s"].tolist() == pytest.approx([8e-6 / PER_BYTE] * 4)
    assert table.loc["kv_far", "kv_link_reason"].isna().all() and set(table.loc["loopback", "kv_link_reason"]) == {recovery.BESIDE}
    assert set(recovery_pairs.table(both).set_index("network")["kv_network"]["kv_far"]) == {"far"}
    text = to_markdown(recovery.table(both), recovery.VIEWS)
    assert "### Recovery, time: model smollm2, network kv_far, kv network far, phase recovery-evict\n" in text
    assert text.count("Link to the KV host, remote_cache: round trip 4.00 ms, 820 Mbit/s up, 820 Mbit/s down (probes, mean).") == 1


def test_the_figure_names_it_at_its_panels(both: Results) -> None:
    shown = [text.get_text() for text in recovery_figure.plot(both).texts]
    assert "recovery-evict (smollm2, kv_far, KV host over far)" in shown and "recovery-evict (smollm2, loopback)" in shown


def test_nothing_is_priced_from_it_and_no_other_table_or_page_takes_it_for_a_network_of_the_client(tmp_path: Path) -> None:
    alone, beside = results(tmp_path, *poor_run()), results(tmp_path / "beside", *poor_run(), *pressed_trials())
    link = LinkModel(0.02, 1e-8, 1e-8)
    assert_frame_equal(price(alone, link), price(beside, link))
    assert_frame_equal(network.table(alone), network.table(beside))
    assert "kv_far" not in str(explored(beside))
