"""Table and figure of requests that move, on trials with known numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from written_trials import PROBE, Trial, results

from semgap.analysis.figures import handover as handover_figure
from semgap.analysis.results import Results
from semgap.analysis.tables import gap, handover, network, summary
from semgap.analysis.tables.render import to_markdown

TTFT_S, STEP_S, CACHE = 1.0, 0.02, 10_000_000
LINK = {"network": "kv_far", "network_spec": {"kind": "loopback", "kv": "far"}, "kv_network_spec": {"kind": "relay", "rtt_ms": 1}}


def moving(mode: str, adds_ms: tuple[float, ...], recovery: str = "delta", trial: int = 1, **sent: Any) -> Trial:
    """A trial of pairs of requests, one of which moves and adds so many ms, half of it before its first token."""
    rows: list[Mapping[str, Any]] = []
    for pair, added_ms in enumerate(adds_ms):
        for place in (0, 1):
            moves, request = (place == 0) == (pair % 2 == 0), 1 + 2 * pair + place
            extra_s = added_ms / 1e3 if moves else 0.0
            at = {"request": request, "moves": moves, "kind": "decode", "worker_compute_s": STEP_S}
            rows.append(at | {"step": 0, "kind": "prefill", "measured": False, "latency_s": TTFT_S + extra_s / 2})
            stall_s = extra_s / 4
            blocks = (
                {"missing_bytes": CACHE, "recovery": recovery, "stall_s": stall_s, "worker_compute_s": STEP_S + stall_s} if moves else {}
            )
            rows.append(at | {"step": 1, "latency_s": STEP_S + extra_s / 2} | blocks | (sent if moves else {}))
            rows.append(at | {"step": 2, "latency_s": STEP_S})
    latencies = tuple(row["latency_s"] for row in rows)
    made = Trial(mode, "handover", trial, latencies, rows=tuple(rows), recovery=recovery, kv_probe=PROBE | {"rtt_s": 1e-3}, **LINK)
    return replace(made, kind="handover")


def test_the_codecs_of_the_layers_are_means_over_the_requests_that_were_handed_over(tmp_path: Path) -> None:
    trials = [
        moving("sys", (20, 22), trial=trial, **SENT, sent_after_s=0.02, kv_codecs=codecs)
        for trial, codecs in ((1, "raw x 12, int8 x 18"), (2, "raw x 11, raw+int4 x 1, int8 x 18"))
    ]
    trials += [moving("know_consumer", (900, 900), "recompute", handed=False, sent_network_bytes=0)]
    table = handover.table(results(tmp_path, *trials)).set_index("mode")
    assert table.loc["sys", "kv_codecs"] == "raw x 11.5, int8 x 18, raw+int4 x 0.5"
    assert table["kv_codecs"].isna().to_dict() == {"sys": False, "know_consumer": True}


SENT = {"handed": True, "saved_tensor_bytes": CACHE, "saved_payload_bytes": 8_000_000, "sent_network_bytes": 8_040_000, "sent_s": 0.1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    trials = []
    for trial, noise in ((1, 0.0), (2, 1.0)):
        trials += [
            moving("remote_cache", (200 + noise, 210 + noise, 220 + noise, 230 + noise), "reload", trial, **SENT, sent_after_s=0.1),
            moving("sys", (20 + noise, 22 + noise, 24 + noise, 26 + noise), trial=trial, **SENT, sent_after_s=0.02),
            moving("know_consumer", (900 + noise, 900 + noise), "recompute", trial, handed=False, sent_network_bytes=0),
        ]
    return results(tmp_path_factory.mktemp("handover"), *trials)


def test_a_mode_adds_its_wait_without_compute_and_to_the_second_token_also_the_slower_prefill(measured: Results) -> None:
    table = handover.table(measured).set_index("mode")
    for mode, second_ms in (("remote_cache", 215.5), ("sys", 23.5), ("know_consumer", 900.5)):
        assert table.loc[mode, "second_adds_ms"] == pytest.approx(second_ms)
        assert table.loc[mode, "adds_ms"] == pytest.approx(second_ms / 2), "the step's wait, stall included, without compute"
    assert table.loc["sys", "adds_ms_low"] < 23.5 / 2 < table.loc["sys", "adds_ms_high"]
    assert table.loc["sys", "ttft_stayed_ms"] == pytest.approx(1000) and table.loc["sys", "wait_stayed_ms"] == pytest.approx(20)
    assert table.loc["sys", "second_ms"] == pytest.approx(1020 + 23.5) and table.loc["sys", "moved_per_trial"] == 4


def test_bytes_and_the_hidden_part_are_those_of_the_blocks_that_were_sent(measured: Results) -> None:
    table = handover.table(measured).set_index("mode")
    own = table.loc["sys"]
    assert (own["saved_tensor_bytes_per_request"], own["sent_network_bytes_per_request"]) == (CACHE, 8_040_000)
    assert own["codec_ratio"] == pytest.approx(1.25) and own["sent_to_payload"] == pytest.approx(1.005)
    assert own["hidden_share"] == pytest.approx(0.8) and table.loc["remote_cache", "hidden_share"] == 0
    computed = table.loc["know_consumer"]
    assert computed["recomputed_requests"] == 4 and computed["handed_requests"] == 0
    assert computed["hidden_share_reason"] == computed["bytes_reason"] == handover.NOT_SENT


def test_no_other_table_takes_such_a_phase_for_alike_steps(measured: Results) -> None:
    assert summary.table(measured).empty and gap.table(measured).empty and network.table(measured).empty


def test_the_readable_tables_and_the_figure_name_the_link_and_each_mode(measured: Results) -> None:
    text = to_markdown(handover.table(measured), handover.VIEWS)
    assert "### Handover, time: model smollm2, network kv_far, kv network far, phase handover\n" in text
    figure = handover_figure.plot(measured)
    (ax,) = figure.axes
    assert "KV host over far" in ax.get_title(loc="left") and len(ax.get_yticks()) == 3


def test_a_run_without_such_a_phase_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, Trial("remote_cache"))
    assert handover.table(found).empty and "adds_ms" in handover.table(found).columns
    assert "no request moved" in handover_figure.plot(found).texts[0].get_text()
