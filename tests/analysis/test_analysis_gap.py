"""The gap of each trial, its table and figure, twins, planted effects, and the power that the notes state."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_texts import texts, unreadable_texts
from matplotlib.markers import CARETRIGHT
from written_trials import ROWS, Trial, load, repeated, results, results_of

from semgap.analysis.figures import gap as gap_figure
from semgap.analysis.gaps import PARTS
from semgap.analysis.marks import base_of, first_rungs, marks_of, rungs
from semgap.analysis.power import power_rows
from semgap.analysis.stats import difference_interval, mean_interval, p_difference_below, pooled_sd, smallest_effect
from semgap.analysis.tables import gap, hypotheses
from semgap.analysis.tables.answer import answer
from semgap.analysis.tables.render import to_markdown

SOMEWHAT_APART = (2.2, 2.6, 3.0)  # gaps in ms
PAIRED = {"mode": "remote_cache", "latency_s": (0.06,) * 4, "compute_s": 0.05, "codec_s": (0.002, 0.001), "client_compute_s": 0.004}


def table_of(root: Path, *trials: Trial) -> pd.DataFrame:
    return gap.table(results(root, *trials)).set_index("mode")


def gaps_of(mode: str, gaps_ms: tuple[float, ...], **fields: Any) -> list[Trial]:
    """Trials of 50 ms of compute with these gaps."""
    return repeated(mode, tuple(50 + each for each in gaps_ms), **fields)


def test_the_parts_of_a_latency_add_up_and_the_gap_is_what_is_no_compute(tmp_path: Path) -> None:
    row = table_of(tmp_path, Trial(**PAIRED)).loc["remote_cache"]
    parts = dict(zip(PARTS, (50, 4, 2, 1, 3), strict=True))
    assert {part: row[f"{part}_ms"] for part in PARTS} == pytest.approx(parts)
    assert (row.latency_ms, row.compute_ms, row.gap_ms) == (pytest.approx(60), pytest.approx(54), pytest.approx(6))
    assert row.own_ratio == pytest.approx(60 / 54)


def test_the_workers_compute_stands_over_the_time_to_read_the_weights_once(tmp_path: Path) -> None:
    floor = {"read_bytes_per_s": 20e9, "step_bytes": 800_000_000, "reason": None}
    row = table_of(tmp_path / "with", Trial(**PAIRED, floor=floor)).loc["remote_cache"]
    assert (row.floor_ms, row.compute_to_floor) == (pytest.approx(40), pytest.approx(50 / 40))
    row = table_of(tmp_path / "without", Trial(**PAIRED)).loc["remote_cache"]
    assert pd.isna(row.floor_ms) and row.compute_to_floor_reason == "no floor in this test"


def test_one_trial_gives_point_estimates_without_intervals(tmp_path: Path) -> None:
    row = table_of(tmp_path, Trial(**PAIRED), Trial("local", latency_s=(0.05,) * 4)).loc["remote_cache"]
    assert row.gap_ms == pytest.approx(6) and row.ratio_to_local == pytest.approx(1.2) and row.compute_to_local == pytest.approx(54 / 50)
    assert row[["gap_ms_low", "gap_ms_high", "ratio_to_local_low", "compute_to_local_low"]].isna().all()
    assert "set trials to 2 or more" in row.gap_ms_reason


def test_the_gap_has_a_t_interval_over_the_trials_means(tmp_path: Path) -> None:
    row = table_of(tmp_path, *gaps_of("remote_cache", (1.0, 2.0, 3.0))).loc["remote_cache"]
    assert (row.gap_ms, row.trials, row.calls_per_trial) == (pytest.approx(2), 3, 4)
    assert row.gap_ms_high - row.gap_ms == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_a_window_is_one_call_with_its_time_over_its_tokens(tmp_path: Path) -> None:
    """8 ms once and 4 x 50 ms of compute: 2 ms a token."""
    first = ({"round_trips": 1}, *({"round_trips": 0},) * 3)
    row = table_of(tmp_path, Trial("sys", latency_s=(0.058, 0.05, 0.05, 0.05), rows=first)).loc["sys"]
    assert (row.calls_per_trial, row.gap_ms, row.gap_median_ms) == (1, pytest.approx(2), pytest.approx(2))


def test_unmeasured_compute_gives_no_gap_and_unmeasured_codecs_no_parts(tmp_path: Path) -> None:
    table = table_of(tmp_path, Trial("remote_cache", compute_s=None), Trial("local", latency_s=(0.0502,) * 4))
    assert pd.isna(table.loc["remote_cache"].gap_ms) and table.loc["remote_cache"].gap_reason == "the step's compute was not measured"
    assert table.loc["local"].gap_ms == pytest.approx(0.2) and pd.isna(table.loc["local"].link_ms)
    assert "nothing crosses" in table.loc["local"].parts_reason


def test_compute_that_differs_from_locals_is_flagged(tmp_path: Path) -> None:
    computed = zip((50, 51, 52), (62, 64, 66), (50.1, 51.05, 51.9), strict=True)
    trials = []
    for number, each in enumerate(computed, 1):
        for mode, ms in zip(("local", "remote_cache", "sys"), each, strict=True):
            trials.append(Trial(mode, trial=number, latency_s=((ms + 1) / 1e3,) * 4, compute_s=ms / 1e3))
    table = table_of(tmp_path, *trials)
    assert (table.loc["remote_cache"].compute_verdict, table.loc["sys"].compute_verdict) == ("slower", "no difference found")
    assert table.loc["remote_cache"].compute_to_local == pytest.approx(1.255, rel=0.01)


def test_a_prefill_of_all_rows_says_that_it_computes_more_than_local(tmp_path: Path) -> None:
    table = table_of(tmp_path, *(Trial(mode, phase="prefill") for mode in ("local", "remote_cache", "know_position")))
    assert "logits of all rows" in table.loc["remote_cache"].compute_note
    assert pd.isna(table.loc["know_position"].compute_note) and pd.isna(table.loc["local"].compute_note)


def test_the_control_is_paired_with_the_calls_at_its_own_positions(tmp_path: Path) -> None:
    """Windows of 2 steps each; the machine slowed down by half for the second pair, in latency, compute and control alike."""
    rows = tuple({"worker_compute_s": compute_s} for compute_s in (0.05, 0.05, 0.075, 0.075))
    trial = Trial("remote_cache", latency_s=(0.06, 0.06, 0.09, 0.09), rows=rows, control_s=((0.04, 0.04), (0.06, 0.06)))
    row = table_of(tmp_path, trial).loc["remote_cache"]
    assert (row.control_ratio, row.compute_to_control, row.control_windows) == (pytest.approx(1.5), pytest.approx(1.25), 2)


def test_a_control_inside_a_window_is_paired_with_the_whole_window(tmp_path: Path) -> None:
    first = ({"round_trips": 1}, *({"round_trips": 0},) * 3)
    trial = Trial("sys", latency_s=(0.09, 0.05, 0.05, 0.05), rows=first, control_s=((0.05, 0.05),))
    assert table_of(tmp_path, trial).loc["sys"].control_ratio == pytest.approx(0.24 / 4 / 0.05)


def test_without_a_control_the_manifests_reason_is_given(tmp_path: Path) -> None:
    row = table_of(tmp_path, Trial("naive")).loc["naive"]
    assert pd.isna(row.control_ratio) and row.control_ratio_reason == "no control in this test"


def test_h2_compares_at_equal_compute_whatever_the_machine_did_between_trials(tmp_path: Path) -> None:
    """Gaps of 50 and 10 ms; compute of 50 ms, or up to half as much again in some trials."""
    slow = {"remote_cache": (1.0, 1.5, 1.2), "sys": (1.2, 1.0, 1.5)}
    both = [
        Trial(mode, trial=number, latency_s=(0.05 * times + gap_s,) * 4, compute_s=0.05 * times)
        for mode, gap_s in (("remote_cache", 0.05), ("sys", 0.01))
        for number, times in enumerate(slow[mode], 1)
    ]
    row = hypotheses.table(results(tmp_path, *both)).query("hypothesis == 'H2'").iloc[0]
    compute_s = 0.05 * 3.7 / 3
    assert (row.basis, row.verdict) == ("the gap, at equal compute", "yes")
    assert row.cut == pytest.approx(1 - (compute_s + 0.01) / (compute_s + 0.05)) and row.cut_high - row.cut_low < 1e-9


@pytest.mark.parametrize(("slower", "said"), [(1.1, True), (1.005, False)])
def test_a_cut_says_if_the_controls_find_the_modes_compute_apart(tmp_path: Path, slower: float, said: bool) -> None:
    """The mode itself slows its compute down: the gap does not show it, the control does."""
    both = [
        Trial(mode, trial=number, latency_s=(0.06 + 0.04 * (mode != "sys"),) * 4, control_s=((0.05,) * 4,), compute_s=compute_s)
        for mode, compute_s in (("remote_cache", 0.05), ("sys", 0.05 * slower))
        for number in (1, 2, 3)
    ]
    row = hypotheses.table(results(tmp_path, *both)).query("hypothesis == 'H2'").iloc[0]
    assert ("its compute is 1.100 times the baseline's" in str(row.cut_reason)) == said


@pytest.mark.parametrize(
    ("gaps_ms", "verdict"), [((1.0, 1.1, 0.9), "same"), ((3.0, 3.1, 2.9), "different"), ((0.2, 2.0, 1.4), "inconclusive")]
)
def test_twins_are_the_same_only_if_their_difference_lies_within_one_percent(
    tmp_path: Path, gaps_ms: tuple[float, ...], verdict: str
) -> None:
    found = results(tmp_path, *gaps_of("remote_cache", (1.0, 0.9, 1.05)), *gaps_of("remote_cache_again", gaps_ms))
    (row,) = hypotheses.table(found).query("hypothesis == 'A/A'").to_dict("records")
    assert (row["mode"], row["baseline"], row["verdict"]) == ("remote_cache_again", "remote_cache", verdict)


def test_twins_over_many_networks_differ_only_by_a_p_value_that_counts_them_all(tmp_path: Path) -> None:
    """Alone p is 3%; of three such rows each has 9%, though each interval by itself leaves out 1%."""
    verdicts = {}
    for networks in (("loopback",), ("loopback", "near", "far")):
        trials = [
            dataclasses.replace(trial, network=network)
            for network in networks
            for trial in (*gaps_of("remote_cache", (1.0, 0.9, 1.05)), *gaps_of("remote_cache_again", SOMEWHAT_APART))
        ]
        rows = hypotheses.table(results(tmp_path / str(len(networks)), *trials)).query("hypothesis == 'A/A'")
        assert (rows["cut_high"] < -0.01).all()
        verdicts[len(networks)] = (set(rows["verdict"]), rows["p_holm_no"].tolist())
    (alone, (p,)), (many, ps) = verdicts.values()
    assert 0.02 < p < 0.05 and ps == pytest.approx([3 * p] * 3)
    assert (alone, many) == ({"different"}, {"inconclusive"})


@pytest.mark.parametrize(
    ("gaps_ms", "verdict"),
    [((2.0, 2.1, 1.95), "found"), ((1.0, 1.1, 0.95), "not found, not as planted"), ((4.0, 4.1, 4.05), "found, not as planted")],
)
def test_a_planted_wait_is_found_in_the_gap(tmp_path: Path, gaps_ms: tuple[float, ...], verdict: str) -> None:
    """1 ms was planted."""
    modes = {"remote_cache": (1.0, 0.9, 1.05), "remote_cache_again": (1.0, 0.95, 1.05), "remote_cache_planted": gaps_ms}
    rows = hypotheses.table(results(tmp_path, *(trial for each in modes.items() for trial in gaps_of(*each)))).set_index("mode")
    row = rows.loc["remote_cache_planted"]
    assert (row.planted_ms, row.verdict) == (1, verdict)
    assert row.found_ms == pytest.approx(np.mean(gaps_ms) - 2.95 / 3)
    assert rows.loc["remote_cache_again"].verdict == "same"


def test_without_local_over_a_network_its_trials_over_another_one_count(tmp_path: Path) -> None:
    far = [Trial("remote_cache", network="far", trial=n, latency_s=(0.08 + n * 1e-3,) * 4) for n in (1, 2)]
    table = gap.table(results(tmp_path, *repeated("local", (40, 41)), *far)).set_index("network")
    assert table.loc["far"].ratio_to_local == pytest.approx(math.sqrt(81 / 40 * 82 / 41))
    assert table.loc["far"].compute_to_local == pytest.approx(1)


def test_a_claim_stands_beside_the_strongest_blind_baseline_and_the_first_rung(tmp_path: Path) -> None:
    sizes = {"tokens": 8, "logits": 100_000}
    found = results(
        tmp_path,
        *gaps_of("remote_cache", (10.0, 10.1)),
        *gaps_of("remote_cache_zstd", (20.0, 20.1), sizes=sizes),
        *gaps_of("know_position", (5.0, 5.1)),
        *gaps_of("sys", (1.0, 1.1), sizes={"reply": 4}),
    )
    rows = hypotheses.table(found).set_index("hypothesis")
    assert (rows.loc["H1"].blind, rows.loc["H2"].blind) == ("remote_cache_zstd", "remote_cache"), "by bytes, and by the gap"
    assert rows.loc["H1"].cut_to_blind == 1 - 74 / 100_078
    assert rows.loc["H2"].first_rung == "know_position" and rows.loc["H2"].cut_to_first_rung < rows.loc["H2"].cut


def test_the_ladder_is_read_from_the_modes_rows_in_any_order() -> None:
    named = {"top": {"rung": {"after": "mid", "adds": "c"}}, "mid": {"rung": {"after": "low", "adds": "b"}}, "low": {"rung": {"adds": "a"}}}
    marks = marks_of({**named, "beside": {}, "window": {"window": 32}})
    assert (rungs(marks), base_of(marks), first_rungs(marks)) == (["low", "mid", "top"], "low", ["mid"])
    assert rungs(marks_of(ROWS))[0] == "remote_cache"


def test_no_mode_is_named_in_the_analysis() -> None:
    source = Path(gap.__file__).parents[1]
    texts_of = {path.name: path.read_text() for path in source.rglob("*.py")}
    named = {name: [mode for mode in ROWS if len(mode) > 5 and mode in text] for name, text in texts_of.items()}
    assert {name: modes for name, modes in named.items() if modes} == {}


def test_the_pooled_spread_is_that_within_modes() -> None:
    assert pooled_sd([(1.0, 3.0), (10.0, 12.0), (5.0,)]) == pytest.approx(math.sqrt(2))
    assert pooled_sd([(1.0,), ()]) is None


@pytest.mark.parametrize("trials", [2, 3, 5])
def test_a_t_test_finds_the_smallest_effect_in_80_percent_of_cases_and_nothing_in_5(trials: int) -> None:
    dice = np.random.default_rng(trials)
    noise = dice.normal(size=(4000, trials))

    def found(shift: float) -> float:
        intervals = [mean_interval(values) for values in (noise + shift).tolist()]
        return float(np.mean([not interval.low <= 0 <= interval.high for interval in intervals]))  # type: ignore[operator]

    assert found(0.0) == pytest.approx(0.05, abs=0.012)
    assert found(smallest_effect(1.0, trials)) == pytest.approx(0.8, abs=0.025)


@pytest.mark.parametrize("trials", [3, 5])
def test_the_difference_of_two_modes_is_found_as_often_as_the_note_says(trials: int) -> None:
    dice = np.random.default_rng(trials)
    ours, base = dice.normal(size=(2, 3000, trials))

    def found(shift: float) -> float:
        intervals = (difference_interval(a, b) for a, b in zip((ours + shift).tolist(), base.tolist(), strict=True))
        return float(np.mean([not interval.low <= 0 <= interval.high for interval in intervals]))  # type: ignore[operator]

    assert found(0.0) <= 0.06
    assert found(smallest_effect(1.0, trials, samples=2)) == pytest.approx(0.8, abs=0.025)


def test_equivalence_is_declared_of_modes_that_are_1_percent_apart_in_at_most_5_percent_of_cases() -> None:
    dice = np.random.default_rng(1)
    edge, sd = math.log(1.01), 0.002
    pairs = dice.normal(scale=sd, size=(3000, 2, 3)).tolist()
    same = [p_difference_below([edge + value for value in ours], base, edge) < 0.05 for ours, base in pairs]
    assert np.mean(same) <= 0.06


def test_more_trials_find_smaller_effects() -> None:
    effects = [smallest_effect(1.0, trials, samples) for samples in (1, 2) for trials in (5, 4, 3, 2)]
    assert sorted(effects[:4]) == effects[:4] and sorted(effects[4:]) == effects[4:] and effects[0] < effects[4]


def test_the_notes_state_the_smallest_effects_of_the_compared_modes_alone(tmp_path: Path) -> None:
    noisy = gaps_of("naive", (500.0, 900.0, 1300.0))
    found = results(tmp_path, *gaps_of("remote_cache", (1.0, 1.2, 1.4)), *gaps_of("remote_cache_again", (1.0, 1.2, 1.4)), *noisy)
    (row,) = power_rows(found)
    assert row["smallest_gap_ms"] == pytest.approx(smallest_effect(0.2, 3, samples=2))
    assert f"With 3 trials a mode this run finds, in 80% of cases: a difference of {row['smallest_gap_ms']:.2g} ms" in row["power"]
    assert row["power"] in to_markdown(gap.table(found), gap.VIEWS)


def test_one_trial_has_no_power_and_says_so(tmp_path: Path) -> None:
    (row,) = power_rows(results(tmp_path, Trial("remote_cache")))
    assert row["smallest_gap_ms"] is None and "one trial shows no spread" in row["power"]


def test_the_answer_is_one_screen_with_bytes_gap_exactness_and_power(tmp_path: Path) -> None:
    far = [*gaps_of("remote_cache", (21.0, 22.0), network="far"), *gaps_of("sys", (1.0, 1.2), network="far", sizes={"reply": 4})]
    near = [*gaps_of("remote_cache", (1.0, 1.2)), *gaps_of("sys", (0.3, 0.4), sizes={"reply": 4}), *gaps_of("know_position", (1.0, 1.1))]
    text = answer(results(tmp_path, *near, *far))
    assert "sys sends 74 B a token, remote_cache 196,686 B: 2,658 times as many" in text
    assert "over loopback 0.35 ms [" in text and "over far 1.10 ms [" in text
    assert (
        "exactness  3 of 3 exact modes keep their promise in every trial and check" in text
        and text.count("this run finds, in 80% of cases") == 2
    )
    assert len(text.splitlines()) < 25 and text.index("remote_cache ") < text.index("know_position ")


def test_the_answer_counts_the_exact_modes_that_broke_their_promise_in_a_trial(tmp_path: Path) -> None:
    kept = [*gaps_of("remote_cache", (1.0, 1.2)), *gaps_of("sys", (0.3, 0.4))]
    broken, lossy = (Trial(mode, keeps=keeps, promise_kept=False) for mode, keeps in (("know_head", "tokens"), ("know_layout", "lossy")))
    assert "exactness  2 of 3 exact modes keep their promise" in answer(results(tmp_path, *kept, broken, lossy))


def test_a_run_without_a_ladder_says_so_and_has_the_bytes_and_gaps_of_its_modes(tmp_path: Path) -> None:
    far = gaps_of("mine", (21.0, 22.0), network="far", sizes={"reply": 4})
    text = answer(results(tmp_path, *gaps_of("remote_cache", (1.0, 1.2)), *gaps_of("mine", (0.3, 0.4), sizes={"reply": 4}), *far))
    assert text.startswith(
        "A ladder needs two of its modes in a decode phase; results/tables/ has more on these modes.\nexactness  2 of 2 exact modes keep"
    )
    head, first, second = ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[3:])
    assert [head[0], first[0], second[0]] == ["mode", "remote_cache", "mine"]
    assert [first[1], second[1]] == ["196,686", "74"] and len(first) == len(second) == 4
    assert first[2].startswith("1.10 ms [") and second[2].startswith("0.35 ms [") and second[3].startswith("21.50 ms [")


def test_a_run_without_a_decode_phase_has_no_answer_and_says_so(tmp_path: Path) -> None:
    assert answer(results(tmp_path, Trial("remote_cache", "prefill"))) == "No decode phase was run; results/tables/ has the modes.\n"


def test_the_figure_stacks_the_parts_and_an_arrow_stands_for_a_bar_far_above_the_others(tmp_path: Path) -> None:
    modes = [
        t for mode, gap_ms in (("remote_cache", 3), ("sys", 1)) for t in gaps_of(mode, (gap_ms, gap_ms + 0.1), codec_s=(0.0005, 0.0001))
    ]
    head = gaps_of("know_head", (14, 14.2), client_compute_s=0.012)
    every = [*modes, *head, *gaps_of("local", (0.1, 0.11)), *gaps_of("know_position", (2, 2.1)), *gaps_of("naive", (900, 910))]
    figure = gap_figure.plot(results_of(load(tmp_path, *every)))
    whole, alone = figure.axes
    assert alone.get_xlim()[1] < 10 and CARETRIGHT in {line.get_marker() for line in alone.lines}
    assert {"3.05 ms", "905 ms"} <= set(texts(figure))
    assert whole.get_xlabel() == "ITL (ms)"
    assert unreadable_texts(figure) == []
