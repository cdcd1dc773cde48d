"""The explorer's data: the texts of `semgap price` for every link, parts, the map, and words for what a run cannot show."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from explored_runs import COMPUTE_S, NETWORKS, poor_run, prefilled, whole_run
from matplotlib.colors import to_rgb
from written_trials import Pressed, Trial, pressed, reseal, results, write_trial

from semgap.analysis.explorer.charts import NO_RUNG, ON_DARK, shades
from semgap.analysis.explorer.make_explorer import make_explorer, page
from semgap.analysis.explorer.prices import LINKS
from semgap.analysis.explorer.views import MEASURED, explored
from semgap.analysis.links import LinkModel
from semgap.analysis.load import UnusableTrial
from semgap.analysis.price import VIEWS, price
from semgap.analysis.results import Results, load_results
from semgap.analysis.tables import network
from semgap.analysis.tables.render import cell_text, to_markdown

SOME = (("0.05ms", "10Mbit"), ("20ms", "200Mbit"), ("200ms", "400Gbit"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("whole"), *whole_run())


@pytest.fixture(scope="module")
def shown(whole: Results) -> dict[str, Any]:
    return explored(whole)


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return explored(results(tmp_path_factory.mktemp("poor"), *poor_run()))


def view(shown: dict[str, Any], phase: str = "decode") -> dict[str, Any]:
    return next(each for each in shown["views"] if each["phase"] == phase)


def series(shown: dict[str, Any], mode: str, phase: str = "decode", window: int | None = None) -> dict[str, Any]:
    return next(each for each in view(shown, phase)["series"] if (each["mode"], each["window"]) == (mode, window))


def text(of: dict[str, Any], column: str, link: tuple[str, str]) -> str:
    texts = of["texts"][column]
    return str(texts[0] if len(texts) == 1 else texts[LINKS.index(link)])


@pytest.mark.parametrize("link", SOME, ids=" over ".join)
def test_every_figure_is_the_one_that_semgap_price_prints(whole: Results, shown: dict[str, Any], link: tuple[str, str]) -> None:
    table = price(whole, LinkModel.parsed(*link))
    printed = to_markdown(table, VIEWS)
    assert len(table) == 6
    for row in table.to_dict("records"):
        own = series(shown, row["mode"], row["phase"])
        texts = [text(own, column.source, link) for column in VIEWS[0].columns[1:]]
        assert texts == [cell_text(row, column) for column in VIEWS[0].columns[1:]]
        assert all(each in printed for each in texts)


def test_a_longer_window_is_priced_as_the_option_of_semgap_price_does(whole: Results, shown: dict[str, Any]) -> None:
    link = ("20ms", "200Mbit")
    assert view(shown)["windows"] == [16, 32, 64, 128]
    table = price(whole, LinkModel.parsed(*link), 32).query("phase == 'decode'").set_index("mode")
    row = table.loc["sys"].to_dict()
    own = series(shown, "sys", window=32)
    assert [text(own, column.source, link) for column in VIEWS[0].columns[1:]] == [
        cell_text(row, column) for column in VIEWS[0].columns[1:]
    ]
    assert row["itl_ms"] == pytest.approx(1e3 * COMPUTE_S + 20 / 32, rel=0.01)
    assert row["payload_bytes_per_token"] == pytest.approx(30 + 50 / 32)
    assert float(text(own, "gap_ms", link)) == pytest.approx(20 / 32, rel=0.1)
    unchanged = price(whole, LinkModel.parsed(*link)).query("phase == 'decode'").set_index("mode")
    assert table.loc["remote_cache", "itl_ms"] == unchanged.loc["remote_cache", "itl_ms"]
    assert {each["mode"] for each in view(shown)["series"] if each["window"]} == {"sys"}


def test_a_window_that_is_shorter_than_the_recorded_one_is_refused(whole: Results) -> None:
    with pytest.raises(ValueError, match="window 4 is shorter than the 8 tokens of a recorded call, and would be priced too low"):
        price(whole, LinkModel.parsed("20ms", "200Mbit"), 4)


def test_the_parts_add_up_to_the_latency(shown: dict[str, Any]) -> None:
    names = ("worker_compute_ms", "client_compute_ms", "worker_codec_ms", "client_codec_ms", "link_ms")
    for link in SOME:
        own = series(shown, "remote_cache")
        total = sum(float(text(own, name, link).replace(",", "")) for name in names)
        assert total == pytest.approx(float(text(own, "itl_ms", link).split()[0].replace(",", "")), rel=0.01)
        assert float(text(own, "worker_compute_ms", link)) == pytest.approx(1e3 * COMPUTE_S)


def test_the_map_has_the_lowest_rung_that_comes_within_5_percent_or_the_nearest_one_and_its_distance(shown: dict[str, Any]) -> None:
    own = view(shown)
    ladder = [each["mode"] for each in own["ladder"]]
    assert ladder == ["remote_cache", "know_consumer", "sys"]
    maps = [(each["window"], each["lowest"], each["nearest"]) for each in own["maps"]]
    for (window, lowest, near), link in ((each, link) for each in maps for link in LINKS[::37]):
        of = [series(shown, mode, window=window if mode == "sys" else None) for mode in ladder]
        close = [index for index, each in enumerate(of) if float(text(each, "own_ratio", link).replace(",", "")) <= 1.05]
        assert lowest[LINKS.index(link)] == (close[0] if close else None), link
        nearest = near[LINKS.index(link)]
        assert (nearest is None) == bool(close), link
        if nearest:
            ratios = [text(each, "own_ratio", link) for each in of]
            assert ratios[nearest["rung"]] == min(ratios, key=lambda each: float(each.replace(",", ""))), link
            assert 1 + float(nearest["above"].rstrip("%")) / 100 == pytest.approx(float(ratios[nearest["rung"]]), rel=1e-3)
    recorded = own["maps"][0]["lowest"]
    assert recorded[LINKS.index(("0.05ms", "400Gbit"))] == 0
    assert recorded[LINKS.index(("200ms", "400Gbit"))] is None
    assert recorded[LINKS.index(("2ms", "400Gbit"))] == 2, "0.25 ms a token of 6 with windows of 8"
    assert set(view(shown, "prefill")["maps"][0]["lowest"]) <= {0, None}


def test_measured_networks_are_points_and_their_errors_are_those_of_table_network(whole: Results, shown: dict[str, Any]) -> None:
    own = view(shown)
    assert [(each["network"], each["rtt"]) for each in own["points"]] == [
        (at.name, pytest.approx(2e3 * at.delay_s, rel=0.5)) for at in NETWORKS
    ]
    table = network.table(whole).query("phase == 'decode' and of_phase")
    assert [each["texts"] for each in own["measured"]] == [
        {column.source: cell_text(row, column) for column in MEASURED} for row in table.to_dict("records")
    ]
    for each in own["points"]:
        worst = 100 * table.loc[(table["network"] == each["network"]) & ~table["local"].astype(bool), "price_error"].abs().max()
        assert each["off"] == f"latency off by {worst:.2g}%"
        assert each["text"].startswith("measured, ") and each["text"].endswith(f"; priced without it: latency off by up to {worst:.2g}%")


def test_a_network_whose_rate_the_probe_could_not_tell_is_no_point_and_has_the_reason(tmp_path: Path) -> None:
    fast = {"goodput_up_bytes_per_s": 1e18, "goodput_down_bytes_per_s": 1e18}
    trials = [dataclasses.replace(each, probe={**each.probe, **fast}) if each.network == "near" else each for each in whole_run()]
    near, far = view(explored(results(tmp_path, *trials)))["points"]
    assert near["rtt"] is near["rate"] is None and near["reason"].startswith("the probe's transfer took no longer than its round trip")
    assert far["rate"] == pytest.approx(1e3, rel=0.05) and far["reason"] is None


def test_a_whole_run_has_no_word_on_what_is_missing_but_on_its_windows(shown: dict[str, Any]) -> None:
    assert shown["words"] == []
    (word,) = view(shown)["words"]
    assert word.startswith("A recorded call of sys has 8 tokens. Windows of 2 to 16 times as many")


@pytest.mark.parametrize(
    "word",
    [
        "One network was run (near): the error of these prices is not known",
        "One trial of each mode was run: nothing has an interval.",
        "No local mode was run: there are no ratios to local.",
        "No prefill phase was run: TTFT (time to first token) is that of the prefills before",
    ],
)
def test_what_a_run_cannot_show_has_a_word(poor: dict[str, Any], word: str) -> None:
    assert any(each.startswith(word) for each in [*poor["words"], *view(poor)["words"]])


@pytest.mark.parametrize(
    ("kept", "word"),
    [
        (lambda trial: trial.network == "near", "One network was run (near): the error of these prices is not known"),
        (lambda trial: trial.trial == 1, "One trial of each mode was run: nothing has an interval."),
        (lambda trial: trial.mode != "local", "No local mode was run: there are no ratios to local."),
        (lambda trial: trial.phase != "prefill", "No prefill phase was run: TTFT (time to first token) is that of the prefills before"),
        (lambda trial: trial.phase != "decode", "No decode phase was run: there is no ITL (inter-token latency)"),
        (lambda trial: trial.mode == "local", "No mode with a price is a rung"),
    ],
    ids=("one network", "one trial", "no local", "no prefill", "no decode", "no rung"),
)
def test_a_run_that_lacks_one_thing_has_its_word(tmp_path: Path, kept: Callable[[Trial], bool], word: str) -> None:
    trials = [each for each in whole_run() if each.mode in ("local", "remote_cache") and kept(each)]
    found = explored(results(tmp_path, *trials))
    words = [*found["words"], *(each for own in found["views"] for each in own["words"])]
    assert any(each.startswith(word) for each in words), words
    json.dumps(found, allow_nan=False)


def test_with_one_network_its_point_says_why_the_error_is_not_known(poor: dict[str, Any]) -> None:
    (point,) = view(poor)["points"]
    assert point["off"] == "error not known"
    assert point["text"].endswith("error of prices not known: one network was run: no other one to price it from")


def test_without_local_a_decode_phase_still_has_its_map(poor: dict[str, Any]) -> None:
    assert [each["mode"] for each in view(poor)["ladder"]] == ["sys"]
    assert set(view(poor)["maps"][0]["lowest"]) == {0, None}
    assert series(poor, "sys")["reasons"]["ratio_to_local"] == "no local mode was run"


def test_without_a_local_mode_a_prefill_phase_has_no_map_and_says_why(tmp_path: Path) -> None:
    found = explored(results(tmp_path, prefilled("remote_cache", 1)))
    assert found["words"] == ["No decode phase was run: there is no ITL (inter-token latency), and rates are those of first tokens."]
    assert view(found, "prefill")["map_chart"] is None and view(found, "prefill")["maps"] == []
    assert "Of the rungs of the ladder none can be compared with local: there is no map." in view(found, "prefill")["words"]


def test_recovery_phases_alone_have_nothing_to_explore_and_the_page_says_so(tmp_path: Path) -> None:
    found = results(tmp_path / "trials", *pressed("sys_delta", (Pressed(0.1, 0.5, "delta"),)))
    make_explorer(found, tmp_path / "explorer.html")
    assert "This run has no prefill or decode phase" in (tmp_path / "explorer.html").read_text()


def test_no_number_of_the_page_is_nan_or_infinite(shown: dict[str, Any], poor: dict[str, Any]) -> None:
    def numbers(node: Any) -> list[float]:
        if isinstance(node, dict | list):
            return [number for below in (node.values() if isinstance(node, dict) else node) for number in numbers(below)]
        return [node] if isinstance(node, float) else []

    assert all(math.isfinite(number) for number in numbers([shown, poor]))
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b", json.dumps([shown, poor]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        page({"views": math.nan})


def test_a_mode_s_name_cannot_end_the_page_s_script() -> None:
    html = page({"views": [], "mode": "</script><b>"})
    assert "</script><b>" not in html and "\\u003c/script>" in html


def test_the_page_names_no_other_host(shown: dict[str, Any]) -> None:
    style_and_data = page(shown).split('<script type="module">')[0]
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://", style_and_data)


def test_trials_that_another_version_wrote_are_refused_by_name(tmp_path: Path) -> None:
    trial = prefilled("remote_cache", 1)
    directory = write_trial(tmp_path, trial)
    reseal(directory, schema=99)
    expected: dict[str, Any] = {"trials": {str(directory): trial.digest}, "exactness": {}, "codecs": {}, "modes": {}}
    with pytest.raises(UnusableTrial, match=rf"{directory}/manifest.json has schema 99, this version reads"):
        load_results(expected)


# Machado, Oliveira and Fernandes 2009, severity 1: what red, green and blue light become for such eyes.
EYES = {
    "all cones": np.eye(3),
    "no red": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "no green": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "no blue": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def seen(colour: str, eyes: np.ndarray) -> np.ndarray:
    """A colour in CIELAB as such eyes see it."""
    light = np.array([part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)])
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in TO_XYZ @ np.clip(eyes @ light, 0, 1) / (0.95047, 1, 1.08883)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES.values(), ids=EYES)
@pytest.mark.parametrize(
    "colours", [[*shades(7), NO_RUNG], [*shades(2), NO_RUNG], list(ON_DARK), list(ON_DARK.values())], ids=("map", "two", "light", "dark")
)
def test_no_two_colours_of_a_chart_look_alike_to_colour_blind_readers(colours: list[str], eyes: np.ndarray) -> None:
    labs = [seen(colour, eyes) for colour in colours]
    assert min(np.linalg.norm(one - other) for at, one in enumerate(labs) for other in labs[:at]) > 12, "2.3 can just be told apart"


def test_the_csv_names_percentages_as_such_since_semgap_price_writes_fractions(shown: dict[str, Any]) -> None:
    names = {column["csv"] for column in shown["columns"]["priced"]}
    assert {"itl_ms", "itl_model_error_percent", "ttft_model_error_percent"} < names and "itl_model_error" not in names
