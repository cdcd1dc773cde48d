"""Phases whose requests begin with what another session has computed: their cells, and what the config refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from semgap.client.handover import moves
from semgap.client.spec import Phase
from semgap.experiment.config import Config, Coordinates, read_config
from semgap.experiment.config_checks import ConfigError, uses_kv_host
from semgap.experiment.staleness import TRIAL_CODE, python_files, remote_code
from semgap.phases import KINDS, MOVE_KV, foreign_keys
from semgap.policy import KV_CODECS

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "config/kv.yaml"


def preset(tmp_path: Path, text: str = "") -> Config:
    mine = tmp_path / "mine.yaml"
    mine.write_text(text or "{}")
    return read_config([PRESET, mine], ROOT)


def test_the_preset_runs_every_way_over_three_links_and_computing_over_one(tmp_path: Path) -> None:
    config = preset(tmp_path)
    over: dict[str, set[str]] = {}
    for at in (at for at in config.grid() if at.phase == "prefix"):
        over.setdefault(at.mode, set()).add(at.network)
    three = {"kv_100mbit_1ms", "kv_1gbit_1ms", "kv_4gbit_1ms"}
    one = {mode: {"kv_1gbit_1ms"} for mode in ("local", "prefix_recompute", "prefix_int8")}
    one["prefix_codec_auto"] = {"kv_100mbit_1ms"}
    assert over == one | dict.fromkeys(("prefix_whole", "prefix_blocks", "prefix_planes", "prefix_auto"), three)
    assert uses_kv_host(config.values) and all(config.is_checked(network) for network in three)
    ways = {mode: config.policy(mode)["prefix"] for mode in over}
    assert set(ways.values()) == {"recompute", "fetch_whole", "fetch_blocks", "auto"}


def test_the_preset_moves_each_of_two_neighbours_in_turn(tmp_path: Path) -> None:
    requests = preset(tmp_path)["define"]["phases"]["handover"]["requests"]
    assert {number % 2 for number in range(requests) if moves(number)} == {0, 1}


def test_the_exactness_check_of_a_mode_that_fetches_runs_over_the_longest_prefix_of_its_prompts(tmp_path: Path) -> None:
    config = preset(tmp_path)
    lengths = {mode: config.exactness_cell("smollm2-135m", mode)["phase_spec"]["prefix_lengths"] for mode in config["modes"]}
    assert lengths["prefix_int8"] == lengths["prefix_auto"] == [64] and lengths["local"] == lengths["prefix_recompute"] == []


@pytest.mark.parametrize("mode", ["prefix_codec_auto", "handover_codec_auto", "delta_codec_auto"])
def test_a_lossy_mode_that_chooses_codecs_is_checked_in_the_least_exact_one_and_measured_as_it_is(tmp_path: Path, mode: str) -> None:
    config = preset(tmp_path)
    at = next(at for at in config.grid() if at.mode == mode)
    assert config.cell(at)["policy"]["codec"]["kv"] == "auto" and mode in config.checked_modes()
    checked = config.exactness_cell("smollm2-135m", mode)["policy"]
    assert checked["codec"]["kv"] == "int4" and {**checked, "codec": None} == {**config.cell(at)["policy"], "codec": None}
    files = {path.name for path in python_files(remote_code(KV_CODECS))}
    assert {"groups.py", "planes.py"} <= files and config.cell(at)["code"] == config._code(
        "measure_trial", (*TRIAL_CODE, *remote_code(KV_CODECS))
    )


@pytest.mark.parametrize(("kv", "checked"), [("auto", "int4"), ("int8", "int8")])
def test_a_lossy_mode_that_chooses_ways_is_checked_by_the_way_that_fetches(tmp_path: Path, kv: str, checked: str) -> None:
    """Over loopback `auto` saves raw, or computes."""
    both = f"recovery: auto, prefix: auto, shadow: kvhost, codec: {{kv: {kv}}}, reply: {{kind: logits_last}}, phases: [prefix]"
    config = preset(tmp_path, f"define: {{modes: {{mine: {{{both}, keeps: lossy}}}}}}\nmodes: [mine]")
    lossy = config.exactness_cell("smollm2-135m", "mine")["policy"]
    assert (lossy["recovery"], lossy["prefix"], lossy["codec"]["kv"]) == ("delta", "fetch_blocks", checked)
    assert lossy["codec"]["tokens"] == "raw" and config.policy("mine")["recovery"] == "auto"


@pytest.mark.parametrize("kv", ["auto", "planes_zstd"])
@pytest.mark.parametrize("keeps", ["tokens", "lossy"])
def test_a_mode_whose_blocks_stay_exact_is_checked_as_it_is(tmp_path: Path, kv: str, keeps: str) -> None:
    both = f"recovery: auto, prefix: auto, shadow: kvhost, codec: {{kv: {kv}}}, reply: {{kind: logits_last}}, phases: [prefix]"
    config = preset(tmp_path, f"define: {{modes: {{mine: {{{both}, keeps: {keeps}}}}}}}\nmodes: [mine]")
    assert (config.exactness_cell("smollm2-135m", "mine")["policy"] == config.policy("mine")) is ((kv, keeps) != ("auto", "lossy"))


def test_a_cell_holds_the_link_and_the_lengths_and_a_phase_gives_them_in_turn(tmp_path: Path) -> None:
    cell = preset(tmp_path).cell(Coordinates("smollm2-135m", "kv_100mbit_1ms", "prefix_auto", "prefix", 1))
    assert cell["kv_network_spec"]["rate"] == "100Mbit" and cell["phase_spec"]["prefix_lengths"] == [0, 64, 128, 256, 512]
    phase = Phase("prefix", (100,), prefix_lengths=(0, 64))
    assert [phase.prefix_of(number) for number in range(3)] == [0, 64, 0] and Phase("prefill", (100,)).prefix_of(0) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{prefix_lengths: [0, 100]}", "100 is not a multiple of 64"),
        ("{prefix_lengths: []}", "phase 'prefix' is of kind prefix without prefix_lengths; give the tokens"),
        ("{prefix_lengths: [576]}", "phase 'prefix' has a prefix of 576 tokens and a prompt of 576; leave each prompt tokens of its own"),
        ("{prompt_lengths: [560, 576]}", "phase 'prefix' has several prompt_lengths; requests of one prefix length are compared"),
        ("{steps: 3}", "phase 'prefix' is of kind prefix with steps: 3; leave steps out"),
        ("{requests: 3}", "needs 16 prompts of different text, and resources/prompts/english.txt has 13 passages"),
        ("{kind: prefill}", "phase 'prefix' is of kind prefill with prefix_lengths; leave that out, or say kind: prefix"),
        ("{evict_fractions: [0.5]}", "phase 'prefix' is of kind prefix with evict_fractions; leave that out, or say kind: recovery"),
    ],
)
def test_a_phase_that_cannot_be_measured_is_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        preset(tmp_path, f"define: {{phases: {{prefix: {text}}}}}")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{shadow: worker}", "prefix fetch_blocks with shadow worker; a KV host alone keeps blocks by content, use shadow: kvhost"),
        ("{reply: {kind: logits_all}}", "prefix fetch_blocks with reply.kind logits_all; a fetched prefix has no logits"),
        ("{kv_cache: offloaded}", "mode 'prefix_blocks' runs in prefix phase 'prefix' with kv_cache offloaded; it needs"),
        ("{codec: {kv: int4}}", "it promises keeps: bitwise, but loses in kv int4; say keeps: lossy"),
        (
            "{codec: {kv: auto}, prefix: fetch_whole}",
            "mode 'prefix_blocks': codec.kv 'auto' with kv_cache resident, recovery reload, prefix fetch_",
        ),
        ("{codec: {kv: atuo}}", "codec.kv 'atuo' is not known; did you mean 'auto'?"),
        ("{prefix: fetch}", "config.define.modes.prefix_blocks.prefix is 'fetch'; did you mean 'fetch_"),
    ],
)
def test_a_mode_that_contradicts_itself_is_refused(tmp_path: Path, row: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        preset(tmp_path, f"define: {{modes: {{prefix_blocks: {row}}}}}")


def test_a_lossy_mode_needs_prompts_on_which_its_loss_can_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs in mode 'prefix_int8', which is lossy, and config.exactness.prompt_length 64 leaves no"):
        preset(tmp_path, "exactness: {prompt_length: 64}")


def test_kinds_of_phases_say_what_they_measure_and_which_keys_are_their_own() -> None:
    assert {name for name, kind in KINDS.items() if kind.measures == "prefill"} == {"prefill", "prefix"}
    assert set(MOVE_KV) >= {"recovery", "prefix"}
    spec: dict[str, Any] = {"live_requests": 2, "prefix_lengths": [64], "kv_budget": 1}
    assert foreign_keys("prefix", spec) == {"live_requests": "recovery"}
    assert foreign_keys("recovery", spec) == {"prefix_lengths": "prefix"}
