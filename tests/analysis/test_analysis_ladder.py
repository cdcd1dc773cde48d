"""The tables ladder, facts and exactness, and the ladder's figure, on trials with known numbers."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from figure_texts import texts, unreadable_texts
from written_trials import RAW, ROWS, TTFT_S, Trial, load, repeated, results, results_of

from semgap.analysis.figures import ladder as ladder_figure
from semgap.analysis.figures.style import bytes_text
from semgap.analysis.load import AlteredError, StaleTrialError, Trials, UnusableTrial
from semgap.analysis.marks import marks_of
from semgap.analysis.results import load_exactness
from semgap.analysis.tables import exactness, facts, ladder
from semgap.analysis.tables.facts import allowed_orders, needs_of, worths
from semgap.seal import sealed_json

FRAMING = 70
SIZES = {
    "remote_cache": {"tokens": 8, "logits": 200_000},
    "know_position": {"tokens": 8, "logits": 200_000},
    "know_layout": {"tokens": 2, "logits": 150_000},
    "know_head": {"tokens": 2, "hidden": 1_500},
    "know_consumer": {"reply": 4},  # the token that goes up is in the header
    "know_loop": {"reply": 4},
    "sys": {"reply": 4},
}
TENSORS = {mode: {"tokens": 8, "logits": 200_000} for mode in SIZES} | {"know_head": {"tokens": 8, "hidden": 3_000}}
TENSORS |= {mode: {"reply": 4} for mode in ("know_consumer", "know_loop", "sys")}
CODECS = {"know_layout": {"tokens": "compact", "reply": "planes_zstd"}, "know_head": {"tokens": "compact", "reply": "planes_zstd"}}
CODECS |= {mode: {"tokens": "compact"} for mode in ("know_consumer", "know_loop", "sys")}
FRAMINGS = {"know_consumer": 80, "know_loop": 5, "sys": 5}
RUNGS = list(SIZES)
NEEDS = needs_of({mode: mark.rung for mode, mark in marks_of(ROWS).items() if mark.rung})
CHECK: dict[str, Any] = {
    "model": "smollm2",
    "mode": "remote_cache",
    "keeps": "bitwise",
    "promise_kept": True,
    "tokens_compared": 64,
    "tokens_equal": 64,
    "first_difference": None,
    "edge_draws": 0,
    "logits_bitwise": True,
    "max_abs_diff": 0.0,
    "max_kl_nats": 0.0,
    "text_logits_bitwise": True,
    "text_max_abs_diff": 0.0,
    "text_mean_kl_nats": 0.0,
    "text_max_kl_nats": 0.0,
    "text_cross_entropy_nats": 3.5,
    "text_reference_cross_entropy_nats": 3.5,
    "text_reference_nats_by_prompt": [3.5],
    "text_tokens": 64,
    "text_reason": None,
    "cell_digest": "now",
}


def climbed(root: Path, **latencies_ms: tuple[float, ...]) -> Trials:
    """Trials of the whole ladder, and of a reference."""
    default = dict.fromkeys((*SIZES, "sys_simulated"), (60.0, 61.0, 62.0))
    cells = [
        trial
        for mode, values in (default | latencies_ms).items()
        for trial in repeated(
            mode,
            values,
            sizes=SIZES.get(mode, {"tokens": 8, "logits": 80_000}),
            tensor_sizes=TENSORS.get(mode),
            codec=RAW | CODECS.get(mode, {}),
            framing=FRAMINGS.get(mode, FRAMING),
        )
    ]
    return load(root, *cells)


def payload_of(mode: str) -> int:
    return sum(SIZES[mode].values()) + FRAMINGS.get(mode, FRAMING)


def checked(root: Path, *changes: dict[str, Any]) -> pd.DataFrame:
    files = []
    for number, change in enumerate(changes or ({},)):
        files.append(root / f"check{number}.json")
        files[-1].write_bytes(sealed_json(CHECK | change))
    return load_exactness(files, {str(file): "now" for file in files})


def test_the_ladder_has_its_rungs_in_order_and_references_below(tmp_path: Path) -> None:
    table = ladder.table(results_of(climbed(tmp_path)))
    assert table["mode"].tolist() == [*RUNGS, "sys_simulated"]
    assert table["role"].tolist() == ["rung"] * 7 + ["reference"]


def test_a_rung_has_its_ratios_of_bytes_and_paired_latencies_to_the_rung_before(tmp_path: Path) -> None:
    table = ladder.table(results_of(climbed(tmp_path, know_head=(30.0, 30.5, 31.0)))).set_index("mode")
    step = table.loc["know_head"]
    assert step.before == "know_layout"
    assert step.bytes_to_before == step.bytes_to_before_low == (1_502 + FRAMING) / (150_002 + FRAMING)
    assert step.latency_to_before == pytest.approx(0.5)
    assert step.latency_to_before_low == pytest.approx(0.5)
    assert (step.latency_to_before_pairs, step.trials) == (3, 3)
    assert (step.ttft_ms, step.itl_ms) == (pytest.approx(1e3 * TTFT_S), pytest.approx(30.5))
    assert step.round_trips_per_token == 1


def test_the_lowest_rung_and_references_have_no_ratio_and_say_why(tmp_path: Path) -> None:
    table = ladder.table(results_of(climbed(tmp_path))).set_index("mode")
    assert table.loc[["remote_cache", "sys_simulated"], ["before", "bytes_to_before", "latency_to_before"]].isna().all(axis=None)
    assert table.loc["remote_cache"].latency_to_before_reason == "the lowest rung"
    assert table.loc["sys_simulated"].bytes_to_before_reason == "a reference, not a rung"


def test_a_rung_is_compared_with_the_next_lower_one_that_was_run(tmp_path: Path) -> None:
    layout = repeated("know_layout", (60, 61), sizes=SIZES["know_layout"])
    trials = load(tmp_path / "two", *repeated("remote_cache", (60, 61)), *layout)
    row = ladder.table(results_of(trials)).set_index("mode").loc["know_layout"]
    assert row.before == "remote_cache" and 0 < row.bytes_to_before < 1 and row.latency_to_before == pytest.approx(1)
    row = ladder.table(results_of(load(tmp_path / "one", *layout))).set_index("mode").loc["know_layout"]
    assert pd.isna(row.bytes_to_before) and row.bytes_to_before_reason == row.latency_to_before_reason == "the lowest rung"


def test_payload_is_set_against_the_cross_entropy_of_the_check_that_read_the_most_text(tmp_path: Path) -> None:
    """The first check was cut to 9 tokens."""
    cut = {"text_reference_nats_by_prompt": [99.0], "text_tokens": 9}
    whole = {"mode": "sys", "text_reference_nats_by_prompt": [7 * math.log(2), 9 * math.log(2)], "text_tokens": 128}
    row = ladder.table(results_of(climbed(tmp_path), checked(tmp_path, cut, whole))).set_index("mode").loc["know_loop"]
    assert row.entropy_bytes_per_token == pytest.approx(1)
    assert row.entropy_bytes_per_token_low < 1 < row.entropy_bytes_per_token_high
    assert row.payload_to_entropy == pytest.approx(payload_of("know_loop"))


def test_one_prompt_gives_a_cross_entropy_without_an_interval(tmp_path: Path) -> None:
    row = ladder.table(results_of(climbed(tmp_path), checked(tmp_path))).iloc[0]
    assert row.entropy_bytes_per_token == pytest.approx(3.5 / math.log(2) / 8) and pd.isna(row.entropy_bytes_per_token_low)
    assert "one prompt has no interval" in row.entropy_bytes_per_token_reason


def test_without_an_exactness_check_there_is_no_entropy_and_the_reason_is_given(tmp_path: Path) -> None:
    table = ladder.table(results_of(climbed(tmp_path)))
    assert table["payload_to_entropy"].isna().all()
    assert table["payload_to_entropy_reason"].str.contains("no exactness check").all()


def test_a_promise_counts_as_kept_only_if_the_exactness_check_says_so_too(tmp_path: Path) -> None:
    table = ladder.table(results_of(climbed(tmp_path), checked(tmp_path, {"promise_kept": False}))).set_index("mode")
    assert not table.loc["remote_cache"].promise_kept
    assert table.loc["know_head"].promise_kept


def test_uploads_of_earlier_sessions_have_their_own_column(tmp_path: Path) -> None:
    trials = load(tmp_path, Trial("remote_cache_zstd", uploads=(538_000_000, 0)), Trial("remote_cache"))
    table = ladder.table(results_of(trials)).set_index("mode")
    assert table.loc["remote_cache_zstd", ["weights_bytes", "earlier_sessions_weights_bytes"]].tolist() == [0, 538_000_000]
    assert table.loc["remote_cache"].weights_bytes == 538_000_000
    assert pd.isna(table.loc["remote_cache"].earlier_sessions_weights_bytes)


def test_the_ladder_stands_in_prefill_phases_too_by_ttft(tmp_path: Path) -> None:
    row = ladder.table(results(tmp_path, *repeated("remote_cache", (60, 62), phase="prefill"))).iloc[0]
    assert (row.ttft_ms, row.itl_ms_reason) == (pytest.approx(61), "a prefill has no ITL") and pd.isna(row.itl_ms)


def test_bytes_are_set_against_the_blind_baseline_that_sent_the_fewest(tmp_path: Path) -> None:
    small = repeated("remote_cache_zstd", (60, 61), sizes={"tokens": 8, "logits": 100_000})
    table = ladder.table(results(tmp_path, *repeated("remote_cache", (60, 61)), *small, *repeated("sys", (60, 61), sizes={"reply": 4})))
    row = table.set_index("mode").loc["sys"]
    assert row.blind == "remote_cache_zstd" and row.bytes_to_blind == (4 + FRAMING) / (100_008 + FRAMING)


def test_fifteen_orders_put_each_fact_after_those_that_it_needs() -> None:
    orders = allowed_orders(NEEDS)
    assert len(orders) == len(set(orders)) == 15
    assert all(order.index("position") < order.index("consumer") < order.index("loop") for order in orders)
    assert all(order.index("position") < order.index("head") for order in orders)
    assert ("layout", "position", "consumer", "loop", "head") in orders


def test_facts_that_replace_each_other_share_their_worth() -> None:
    either = worths(lambda known: 10.0 if known else 1000.0, {"a": frozenset(), "b": frozenset()})
    assert either["a"].log_ratio == pytest.approx(math.log(100) / 2)
    assert either["a"].bytes_saved == either["b"].bytes_saved == 495
    assert (either["a"].ladder_bytes_saved, either["b"].ladder_bytes_saved) == (990, 0)


def test_a_fact_that_works_only_after_another_is_worth_what_it_adds_there() -> None:
    value = {frozenset(): 100.0, frozenset("a"): 100.0, frozenset("ab"): 4.0}
    after = worths(value.__getitem__, {"a": frozenset(), "b": frozenset("a")})
    assert (after["a"].log_ratio, after["b"].log_ratio) == (0, pytest.approx(math.log(25)))


def test_facts_of_a_decode_step_add_up_to_the_whole_ladder(tmp_path: Path) -> None:
    table = facts.table(results_of(climbed(tmp_path))).set_index("fact")
    whole = payload_of("remote_cache") / payload_of("know_loop")
    assert table["log_ratio"].sum() == pytest.approx(math.log(whole))
    assert table["factor"].prod() == pytest.approx(whole)
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["position", "factor"] == 1, "a decode step has one row"


def test_at_its_position_in_the_ladder_a_fact_is_worth_the_ratio_of_the_ladders_payloads(tmp_path: Path) -> None:
    """A token in the header of the consumer's request counts once."""
    found = results_of(climbed(tmp_path))
    worth, rungs = facts.table(found).set_index("fact"), ladder.table(found).set_index("mode")
    for fact in NEEDS:
        assert worth.loc[fact, "ladder_factor"] == pytest.approx(1 / rungs.loc[f"know_{fact}", "bytes_to_before"])


def test_the_head_is_worth_less_over_all_orders_since_the_consumer_can_replace_it(tmp_path: Path) -> None:
    """By hand: v({position}) = 200,078, + layout 150,072, + head 3,078, + both 1,572; once the consumer is known it adds nothing."""
    table = facts.table(results_of(climbed(tmp_path))).set_index("fact")
    orders = [order for order in allowed_orders(NEEDS) if order.index("head") < order.index("consumer")]
    late = sum(order.index("layout") < order.index("head") for order in orders)
    by_hand = late * math.log(150_072 / 1_572) + (len(orders) - late) * math.log(200_078 / 3_078)
    assert table.loc["head", "log_ratio"] == pytest.approx(by_hand / 15)
    assert table.loc["head", "factor"] < table.loc["head", "ladder_factor"]
    assert table.loc["consumer", "factor"] > table.loc["consumer", "ladder_factor"]


def test_facts_without_a_rung_are_null_with_its_name(tmp_path: Path) -> None:
    cells = [trial for mode in ("remote_cache", "know_position") for trial in repeated(mode, (60, 61), sizes=SIZES[mode])]
    table = facts.table(results(tmp_path, *cells))
    assert table["factor"].isna().all()
    assert set(table["reason"]) == {"know_layout was not run"}


def test_without_any_rung_above_the_lowest_there_are_no_facts(tmp_path: Path) -> None:
    assert facts.table(results(tmp_path, Trial("remote_cache"))).empty


def test_a_size_in_a_codec_that_no_rung_sent_comes_from_the_measured_codecs(tmp_path: Path) -> None:
    """In a prefill all rows of logits are larger than the last one; planes_zstd on them was measured on the dumped tensors."""
    all_rows = {"tokens": 1_024, "logits": 25_600_000}
    sizes = {mode: {"tokens": 256, **sizes} for mode, sizes in SIZES.items()} | {"remote_cache": all_rows}
    sizes |= {"know_position": {"tokens": 1_024, "logits": 200_000}}
    tensors = {mode: {**each, "tokens": 1_024} for mode, each in TENSORS.items()} | {"remote_cache": all_rows}
    cells = [
        trial
        for mode in SIZES
        for trial in repeated(
            mode, (60, 61), phase="prefill", sizes=sizes[mode], tensor_sizes=tensors[mode], codec=RAW | CODECS.get(mode, {})
        )
    ]
    dumped = pd.DataFrame(
        [{"model": "smollm2", "run_dtype": True, "codec": "planes_zstd", "raw_bytes": 25_600_000, "payload_bytes": 20_000_000}]
    )
    trials = load(tmp_path, *cells)
    known, unknown = (facts.table(results_of(trials, codecs=codecs)).set_index("fact") for codecs in (dumped, None))
    assert known.loc["layout", "factor"] > unknown.loc["layout", "factor"]
    assert known.loc["position", "ladder_factor"] == pytest.approx((25_601_024 + FRAMING) / (201_024 + FRAMING))
    assert known.loc["loop", "factor"] == 1


def test_exactness_states_the_change_of_perplexity(tmp_path: Path) -> None:
    losses = {"text_cross_entropy_nats": 3.5 + math.log(1.02), "keeps": "lossy", "first_difference": 5, "tokens_equal": 60}
    table = exactness.table(results_of(climbed(tmp_path), checked(tmp_path, {}, losses)))
    assert table["perplexity_change"].tolist() == [0, pytest.approx(0.02)]
    assert table["first_difference"].isna().tolist() == [True, False]
    assert table.loc[1, "first_difference"] == 5


def test_a_mode_whose_client_sees_no_logits_has_null_and_a_reason_for_them(tmp_path: Path) -> None:
    unseen = {name: None for name in CHECK if "logits" in name or "diff" in name or "kl" in name}
    reason = "the client sees tokens, no logits"
    checks = checked(tmp_path, unseen | {"text_cross_entropy_nats": None, "text_reason": reason})
    row = exactness.table(results_of(climbed(tmp_path), checks)).iloc[0]
    assert row[["logits_bitwise", "max_abs_diff", "text_max_kl_nats", "perplexity_change"]].isna().all()
    assert (row.text_reason, row.tokens_equal) == (reason, 64)


def test_the_exactness_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StaleTrialError, match="stale: it was made with cell digest then"):
        checked(tmp_path, {"cell_digest": "then"})


def test_a_damaged_or_missing_exactness_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mode=x.json"
    with pytest.raises(UnusableTrial, match=r"mode=x\.json cannot be read"):
        load_exactness([file], {str(file): "now"})
    file.write_bytes(sealed_json(CHECK)[:40])
    with pytest.raises(AlteredError, match=r"mode=x\.json is not as it was written: it holds 0 seals instead of one; delete it and run"):
        load_exactness([file], {str(file): "now"})


def test_the_figure_names_every_rung_and_its_bytes_and_no_texts_collide(tmp_path: Path) -> None:
    figure = ladder_figure.plot(results_of(climbed(tmp_path), checked(tmp_path)))
    figure.canvas.draw()
    shown = texts(figure) + [label.get_text() for ax in figure.axes for label in ax.get_yticklabels()]
    assert {*RUNGS, *NEEDS} <= set(shown)
    assert bytes_text(payload_of("remote_cache")) in shown
    assert unreadable_texts(figure) == []


def test_the_figure_shows_the_entropy_of_the_text_only_where_it_was_measured(tmp_path: Path) -> None:
    trials = climbed(tmp_path)
    with_line, without = (ladder_figure.plot(each) for each in (results_of(trials, checked(tmp_path)), results_of(trials)))
    assert len(with_line.axes[0].lines) == len(without.axes[0].lines) + 1


def test_a_run_without_the_ladder_gives_a_figure_that_says_so(tmp_path: Path) -> None:
    figure = ladder_figure.plot(results(tmp_path, Trial("local")))
    assert [text.get_text() for text in figure.texts] == ["no mode of the ladder was run in a prefill or decode phase"]
