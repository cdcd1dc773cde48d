"""The config as a whole: what it refuses and how it says so, what it fills in, and the grid it makes."""

from __future__ import annotations

import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from snakemake.utils import update_config

from semgap.experiment.cell import Cell
from semgap.experiment.config import Config, Coordinates, check_config, read_config
from semgap.experiment.config_checks import ConfigError
from semgap.experiment.staleness import content_digest
from semgap.policy import policy_from

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = yaml.safe_load((ROOT / "config/config.yaml").read_text())
MISSING = object()


OPEN = {"kind": "load", "prompt_lengths": [8], "steps": 1}
TRACED = {"kind": "load", "trace": {"file": "resources/traces/none.jsonl"}}
PRESSED = DEFAULT | {"phases": [*DEFAULT["phases"], "recovery-budget_1_2"]}


def changed(path: str, value: Any, base: dict[str, Any] = PRESSED) -> dict[str, Any]:
    """The default config with one value set, or taken out, at a dotted path."""
    values = deepcopy(base)
    *parents, last = path.split(".")
    below = values
    for key in parents:
        below = below[key]
    if value is MISSING:
        del below[last]
    else:
        below[last] = value
    return values


def checked(path: str, value: Any) -> Config:
    return check_config(changed(path, value), ROOT)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modes", ["local", "sys_simulatd"], "mode 'sys_simulatd' is not in config.define.modes; did you mean 'sys_simulated'?"),
        ("phases", ["decoding"], "phase 'decoding' is not in config.define.phases; did you mean 'decode'?"),
        ("models", ["smollm"], "model 'smollm' is not in config.define.models; did you mean 'smollm2-135m'?"),
        ("networks", ["lan"], "network 'lan' is not in config.define.networks; use one of loopback, 1gbit_20ms"),
        ("modes", [], "config.modes is []: [] should be non-empty"),
        ("modes", "", "mode '' is not in config.define.modes; use one of local, naive"),
        ("modes", ["local", "local"], "config.modes is ['local', 'local']: ['local', 'local'] has non-unique elements"),
        ("modes", {"mine": {}}, "config.modes holds rows (mine); it lists names, and rows go under define.modes"),
        ("temperature", 0.8, "config has no key 'temperature'; it belongs to sampling.rule: use sampling.rule.temperature"),
        ("name", "trials", "config.name is 'trials', which results/ keeps for files of its own; use another name"),
        (
            "define.modes.naive.networks",
            ["lan"],
            "mode 'naive' runs over network 'lan', which is not in config.define.networks; use one of",
        ),
        (
            "define.modes.sys.rung.after",
            "know_lop",
            "mode 'sys': rung.after 'know_lop' is not in config.define.modes; did you mean 'know_loop'?",
        ),
        ("define.modes.sys.claims.against", "none", "mode 'sys': claims.against 'none' is not in config.define.modes; use one of local"),
        ("define.modes.remote_cache.rung.after", "know_position", "the rungs remote_cache, know_position stand on each other"),
        (
            "define.modes.remote_cache_again.kv_cache",
            "offloaded",
            "mode 'remote_cache_again' is the twin of 'remote_cache', and their rows",
        ),
        (
            "define.modes.sys.twin_trials",
            {"loopback": 6},
            "mode 'sys' has twin_trials {'loopback': 6} and no twin; name its twin, or leave",
        ),
        (
            "define.modes.remote_cache_again.twin_trials",
            {"lopback": 6},
            "mode 'remote_cache_again': twin_trials names network 'lopback', which is not in config.define.networks; did you mean",
        ),
        ("define.modes.remote_cache_again.twin_trials", {"loopback": 0}, "twin_trials.loopback is 0: 0 is less than the minimum of 1"),
        ("define.modes.local.plant_us", 5, "mode 'local': plant_us 5 with placement local; a worker plants it"),
        ("define.networks.1gbit_20ms.delay_ms", 5, "network '1gbit_20ms': delay_ms 5 and rtt_ms 20 are both given"),
        ("modes", 3, "config.modes is 3: 3 is not of type 'array'"),
        ("trials", 0, "config.trials is 0: 0 is less than the minimum of 1 (Fresh-worker repeats"),
        ("trials", "many", "config.trials is 'many': 'many' is not of type 'integer'"),
        ("trials", 2.5, "config.trials is 2.5: 2.5 is not of type 'integer'"),
        ("trails", 3, "config has no key 'trails'; did you mean 'trials'?"),
        ("worker.adress", "h:1", "config.worker has no key 'adress'; did you mean 'address'?"),
        ("executor", "graph", "config.executor is 'graph'; did you mean 'cuda_graph'?"),
        ("worker", {"launch": "external"}, "config.worker.launch is 'external' without an address; set worker.address to HOST:PORT"),
        ("define.networks.loopback.kind", "host", "config.define.networks.loopback.kind is 'host'; did you mean 'hosts'?"),
        ("define.networks.loopback.kind", "hosts", "network 'loopback' is of kind hosts with config.worker.launch 'local'"),
        ("worker", {"launch": "srun"}, "network 'loopback' is of kind loopback with config.worker.launch 'srun', which needs kind: hosts"),
        ("define.modes.naive.wieghts", "once", "config.define.modes.naive has no key 'wieghts'; did you mean 'weights'?"),
        ("define.modes.naive.weights", "evry_step", "config.define.modes.naive.weights is 'evry_step'; did you mean 'every_step'?"),
        ("define.modes.naive.kv_cache", "resident", "mode 'naive': weights every_step leaves no model for a resident cache"),
        ("define.modes.naive.max_steps", 0, "config.define.modes.naive.max_steps is 0: 0 is less than the minimum of 1"),
        ("define.modes.sys_simulated.codec.reply", "fp16_zlb", "codec.reply 'fp16_zlb' is not known; did you mean 'fp16_zlib'?"),
        (
            "define.modes.sys_simulated.codec.logits",
            "raw",
            "config.define.modes.sys_simulated.codec has no key 'logits'; use one of tokens",
        ),
        ("define.modes.sys_simulated.keeps", "bitwise", "mode 'sys_simulated': it promises keeps: bitwise, but loses in reply fp16_zlib"),
        ("define.phases.decode.kind", "decod", "config.define.phases.decode.kind is 'decod'; did you mean 'decode'?"),
        ("define.phases.decode.steps", 0, "phase 'decode' is of kind decode with steps: 0; it needs 1 or more"),
        ("define.phases.prefill.steps", 1, "phase 'prefill' is of kind prefill with steps: 1; leave steps out, or say kind: decode"),
        (
            "define.phases.decode.prompt_lengths",
            [8, 249],
            "phase 'decode' needs 257 positions (prompt 249 + steps 8), more than max_length",
        ),
        ("define.phases.decode.prompt_lengths", [0], "config.define.phases.decode.prompt_lengths.0 is 0: 0 is less than the minimum of 1"),
        ("define.phases.decode.prompt_lengths", [], "phase 'decode' is of kind decode without prompt_lengths; give one or more"),
        ("define.phases.decode.concurrency", [2], "phase 'decode' is of kind decode with concurrency; leave that out, or say kind: load"),
        ("define.phases.load.live_requests", 2, "phase 'load' is of kind load with live_requests; leave that out"),
        ("define.phases.load.classes", [{"prompt_length": 9}], "phase 'load' has prompt_lengths and classes; give one of prompt_lengths"),
        ("define.phases.load.concurrency", [], "phase 'load' is a load without concurrency, arrivals or trace; give one of them"),
        ("define.phases.load.arrivals", {"per_s": [1]}, "phase 'load' has concurrency and arrivals; a loop is closed or open"),
        ("define.phases.load.shared_prefix", 8, "phase 'load' has prompts of 8 tokens with shared_prefix 8; leave each prompt tokens"),
        ("define.phases.load.steps", 256, "phase 'load' needs 264 positions (prompt 8 + steps 256), more than max_length 256"),
        (
            "define.phases.load.concurrency",
            [2000],
            "phase 'load' has concurrency 2000, and mode 'serial' serves 1088 (batching.max_requests",
        ),
        ("define.phases.load", TRACED, "phase 'load' cannot be run: trace"),
        ("define.phases.load", OPEN | {"arrivals": {"per_s": [1], "share": [1]}}, "has arrivals with per_s and share, or neither"),
        ("define.phases.load", OPEN | {"arrivals": {"share": [1]}}, "has arrivals with share without of, or of without share"),
        ("define.phases.load", OPEN | {"arrivals": {"share": [1], "of": "sys"}}, "a share of mode 'sys', which has no row with batching"),
        (
            "define.phases.load",
            OPEN | {"requests": 2, "arrivals": {"per_s": [1e-3]}},
            "2 requests at 0.001/s, which last longer than timeouts.trial_s",
        ),
        (
            "define.phases.load",
            OPEN | {"arrivals": {"per_s": [1]}},
            "has arrivals with requests 1; the window lasts from the first measured",
        ),
        ("sampling.rule.kind", "sample", "phase 'load' is a load with sampling.rule.kind 'sample'"),
        ("define.modes.serial.phases", ["decode"], "mode 'serial' runs in phase 'decode', which is no load, with batching"),
        ("define.modes.sys.phases", ["load"], "mode 'sys' runs in load phase 'load' without batching"),
        (
            "define.modes.serial.weights",
            "every_step",
            "mode 'serial': batching with weights every_step, kv_cache resident; the engine keeps",
        ),
        ("define.modes.serial.keeps", "lossy", "mode 'serial': batching with keeps: lossy, whose steps are fed the reference's tokens"),
        ("define.modes.serial.batching.merges", "alike", "mode 'serial': turns: whole with merges: alike"),
        ("define.modes.serial.batching.merge", "alike", "config.define.modes.serial.batching has no key 'merge'; did you mean 'merges'?"),
        (
            "define.models.smollm2-135m.source",
            "ftp",
            "config.define.models.smollm2-135m.source is 'ftp'; use one of pypi, hub, path, random",
        ),
        ("define.models.a/b", {"source": "random"}, "config.define.models is"),
        ("define.modes", MISSING, "config.define: 'modes' is a required property; see config/README.md"),
        ("define", MISSING, "config: 'define' is a required property; see config/README.md"),
        ("define", 3, "config.define is 3: 3 is not of type 'object'"),
        ("prompts", "resources/no.txt", "config.prompts 'resources/no.txt' is not a file under"),
        ("define.modes.sys_delta.shadow", "kv_host", "config.define.modes.sys_delta.shadow is 'kv_host'; did you mean 'kvhost'?"),
        ("define.modes.sys_delta.recovery", "recompute", "mode 'sys_delta': shadow kvhost with recovery recompute, which saves no blocks"),
        ("define.modes.sys_delta.kv_cache", "offloaded", "mode 'sys_delta' runs in recovery phase 'recovery-evict' with"),
        ("define.modes.remote_cache_reload.replay", "prefill", "but replay: prefill gives other last bits; say keeps: tokens"),
        ("define.modes.naive.shadow", "kvhost", "mode 'naive': shadow kvhost with kv_cache every_step"),
        (
            "define.modes.remote_cache_reload.codec",
            {"kv": "auto"},
            "mode 'remote_cache_reload': codec.kv 'auto' with kv_cache resident, recovery",
        ),
        ("define.modes.naive.codec", {"kv": "auto"}, "mode 'naive': codec.kv 'auto' with kv_cache every_step, recovery reload"),
        ("define.modes.sys_delta.codec.kv", "int4", "mode 'sys_delta': it promises keeps: tokens, but loses in kv int4; say keeps: lossy"),
        ("define.phases.recovery-evict.evict_fractions", [0, 1.5], "evict_fractions.1 is 1.5: 1.5 is greater than the maximum of 1"),
        ("define.phases.recovery-evict.evict_fractions", [-0.1], "evict_fractions.0 is -0.1: -0.1 is less than the minimum of 0"),
        ("define.phases.recovery-evict.steps", 0, "phase 'recovery-evict' is of kind recovery with steps: 0; it needs 1 or more"),
        ("define.phases.decode.kv_budget", 0.5, "phase 'decode' is of kind decode with kv_budget; leave that out, or say kind: recovery"),
        ("define.phases.recovery-budget_1_2.requests", 3, "has live_requests 4 and 3 requests in all, so that there is no pressure"),
        ("define.phases.recovery-budget_1_2.kv_budget", 0.2, "less than the one cache that a step needs; use 0.25 or more"),
        ("exactness.passages", [-1], "config.exactness.passages.0 is -1: -1 is less than the minimum of 0"),
        ("remeasure", "block", "config.remeasure is 'block'; did you mean 'blocks'?"),
    ],
)
def test_a_wrong_value_is_refused_by_name_in_one_line_with_the_way_out(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(path, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_graphs_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="executor is 'cuda_graph' with device 'cpu'; it needs CUDA"):
        read_config([], ROOT, {"executor": "cuda_graph", "device": "cpu"})


def test_a_head_on_the_clients_cpu_promises_nothing_beside_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"mode .know_head. promises keeps: bitwise with device .cuda., but .* say keeps: lossy"):
        read_config([], ROOT, {"device": "cuda"})
    merged = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    update_config(merged, yaml.safe_load((ROOT / "config/gpu.yaml").read_text()))
    config = check_config(merged, ROOT)
    assert (config["device"], config["dtype"], config.policy("know_head")["keeps"]) == ("cuda", "float16", "lossy")


@pytest.mark.parametrize("text", ["", "- modes", "modes: [local", "just words"])
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config([tmp_path / "config.yaml"], ROOT)


def test_a_missing_comma_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("define:\n  modes:\n    mine: {weights: once kv_cache: resident}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 3, column 34 is not valid YAML: ") as refused:
        read_config([tmp_path / "mine.yaml"], ROOT)
    assert "\n" not in str(refused.value)


def test_a_config_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        read_config([tmp_path / "absent.yaml"], ROOT)


def test_the_default_config_is_valid_and_comes_from_its_file() -> None:
    assert read_config([], ROOT) == check_config(DEFAULT, ROOT)


def test_checking_leaves_its_input_as_it_was() -> None:
    before = deepcopy(DEFAULT)
    check_config(DEFAULT, ROOT)
    assert before == DEFAULT


def test_a_row_that_is_not_chosen_may_not_fit_together() -> None:
    values = changed("define.phases.long", {"kind": "prefill", "prompt_lengths": [4096]})
    assert check_config(values, ROOT)["phases"] == PRESSED["phases"]


def test_left_out_keys_get_the_schemas_defaults_at_every_depth() -> None:
    config = check_config({"define": DEFAULT["define"]}, ROOT)
    assert config["trials"] == 3
    through_ssh = {"host": None, "python": "python3", "ssh_config": None}
    started = {"launch": "local", "address": None, "secret_file": None, "tls": False, "kv_host_bytes": 4294967296, "weight_cache": None}
    assert config["worker"] == started | through_ssh
    assert config["define"]["modes"]["naive"]["codec"] == {"tokens": "raw", "weights": "raw", "kv": "raw", "reply": "raw"}
    assert config["modes"] == list(DEFAULT["define"]["modes"])


@pytest.mark.parametrize("axis", ["modes", "phases", "models", "networks"])
@pytest.mark.parametrize("form", ["{},{}", "[{},{}]", " {} , {} ", "[{}, {}]"])
def test_a_selection_may_be_a_string_with_commas(axis: str, form: str) -> None:
    values = changed(f"define.{axis}.other", next(iter(DEFAULT["define"][axis].values())))
    names = [next(iter(DEFAULT["define"][axis])), "other"]
    assert check_config(values | {axis: form.format(*names)}, ROOT)[axis] == names


def test_the_grid_is_every_combination_block_by_block() -> None:
    config = check_config(DEFAULT | {"modes": "local,naive", "phases": "decode", "networks": "loopback", "trials": 2}, ROOT)
    model, network = "smollm2-135m", "loopback"
    assert list(config.grid()) == [Coordinates(model, network, mode, "decode", trial) for trial in (1, 2) for mode in ("local", "naive")]


def test_twins_run_trials_of_their_own_number_where_both_are_chosen() -> None:
    config = check_config(DEFAULT | {"phases": ["prefill", "decode"]}, ROOT)
    last = {(at.mode, at.phase): at.trial for at in config.grid() if at.network == "loopback"}
    assert {cell for cell, trials in last.items() if trials == 10} == {("remote_cache", "decode"), ("remote_cache_again", "decode")}
    assert set(last.values()) == {3, 10}
    assert max(at.trial for at in config.grid() if at.network == "1gbit_20ms") == 3
    alone = check_config(DEFAULT | {"modes": ["local", "remote_cache"]}, ROOT)
    assert max(at.trial for at in alone.grid()) == 3
    more = check_config(DEFAULT | {"phases": ["decode"], "trials": 12}, ROOT)
    assert {sum(at == Coordinates(at.model, at.network, at.mode, at.phase, 12) for at in more.grid())} == {
        sum(at.trial == 1 for at in more.grid())
    }


def test_a_mode_runs_over_the_networks_that_its_row_names_and_over_all_if_none_of_them_is_chosen() -> None:
    config = check_config(DEFAULT, ROOT)
    assert config.networks_of("modes", "naive") == ["loopback"] and config.networks_of("modes", "sys") == config["networks"]
    assert {at.network for at in config.grid() if at.mode == "naive"} == {"loopback"}
    assert check_config(DEFAULT | {"networks": ["1gbit_20ms"]}, ROOT).networks_of("modes", "naive") == ["1gbit_20ms"]


def test_a_model_on_this_disk_must_be_there() -> None:
    values = changed("define.models.own", {"source": "path", "path": "models/nowhere"}) | {"models": ["own"]}
    with pytest.raises(ConfigError, match=r"model 'own': its path 'models/nowhere' is not a directory"):
        check_config(values, ROOT)


def test_a_config_file_is_merged_over_the_default_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("define: {modes: {mine: {keeps: bitwise}}}\n")
    config = read_config([tmp_path / "mine.yaml"], ROOT, {"modes": ["mine", "local"]})
    assert config.policy("mine")["keeps"] == "bitwise" and config["trials"] == DEFAULT["trials"]


@given(seed=st.integers(0, 2**32), trials=st.integers(1, 6))
def test_the_run_order_is_the_grid_with_whole_blocks_in_turn_the_same_for_a_seed(seed: int, trials: int) -> None:
    config = Config({**DEFAULT, "seed": seed, "trials": trials}, ROOT)
    order = config.run_order()
    assert sorted(order) == sorted(config.grid())
    assert [at.trial for at in order] == sorted(at.trial for at in order)
    assert order == Config({**DEFAULT, "seed": seed, "trials": trials}, ROOT).run_order()


def test_blocks_run_in_orders_of_their_own_which_the_seed_decides() -> None:
    def order(seed: int) -> list[tuple[str, str]]:
        return [(at.mode, at.phase) for at in Config({**DEFAULT, "seed": seed, "trials": 2}, ROOT).run_order()]

    half = len(order(1)) // 2
    assert order(1)[:half] != order(1)[half:]
    assert order(1)[:half] != order(2)[:half]


def at(mode: str, trial: int = 1, phase: str = "decode") -> Coordinates:
    return Coordinates("smollm2-135m", "loopback", mode, phase, trial)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "mine"),
        ("define.modes.remote_cache.rung.adds", "nothing"),
        ("define.modes.remote_cache.networks", ["loopback"]),
        ("seed", 5),
        ("trials", 9),
        ("remeasure", "blocks"),
        ("modes", ["remote_cache"]),
        ("define.modes.local", {"placement": "local", "keeps": "tokens"}),
        ("define.modes.new", {}),
        ("define.phases.prefill.requests", 9),
        ("define.networks.other", {"kind": "loopback"}),
    ],
)
def test_a_cell_does_not_depend_on_what_is_not_its_own(path: str, value: Any) -> None:
    assert checked(path, value).cell(at("remote_cache")) == check_config(DEFAULT, ROOT).cell(at("remote_cache"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("define.modes.sys_simulated.kv_cache", "resident"),
        ("define.phases.decode.steps", 31),
        ("define.phases.decode.warmup_steps", 1),
        ("define.networks.loopback.congestion", "cubic"),
        ("define.models.smollm2-135m.version", "0.1.3"),
        ("dtype", "bfloat16"),
        ("threads", 2),
        ("max_length", 255),
        ("cpus", {"worker": [0]}),
        ("probe", {"round_trips": 49}),
        ("telemetry", {"interval_s": 0.2}),
    ],
)
def test_a_cell_changes_with_all_that_shapes_it(path: str, value: Any) -> None:
    cells = [config.cell(at("sys_simulated")) for config in (checked(path, value), check_config(DEFAULT, ROOT))]
    assert content_digest(cells[0]) != content_digest(cells[1])


def test_cells_of_the_same_mode_under_two_names_differ_only_in_the_name() -> None:
    config = check_config(DEFAULT, ROOT)
    cell, again = config.cell(at("remote_cache")), config.cell(at("remote_cache_again"))
    assert cell | {"mode": again["mode"]} == again


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return value


def test_the_order_of_the_configs_keys_shows_in_no_param_of_a_job() -> None:
    """Snakemake compares params as text."""
    config, other = check_config(DEFAULT, ROOT), check_config(reordered(DEFAULT), ROOT)
    assert repr(config.cell(at("sys_simulated"))) == repr(other.cell(at("sys_simulated")))
    assert repr(config.reference_cell("smollm2-135m", "decode")) == repr(other.reference_cell("smollm2-135m", "decode"))
    assert repr(config.model_cell("smollm2-135m")) == repr(other.model_cell("smollm2-135m"))


def test_the_prompt_text_counts_by_its_content(tmp_path: Path) -> None:
    digests = []
    for text in ("One passage.", "One passage.", "Another."):
        (tmp_path / "prompts.txt").write_text(text)
        config = checked("prompts", str(tmp_path / "prompts.txt"))
        digests.append(content_digest(config.cell(at("local"))))
    assert digests[0] == digests[1] != digests[2]


def test_a_script_and_the_codecs_are_part_of_a_remote_cell_and_the_codecs_of_no_local_one(tmp_path: Path) -> None:
    for part in ("workflow", "resources/prompts"):
        shutil.copytree(ROOT / part, tmp_path / part)
    config = check_config(DEFAULT, tmp_path)
    before, check = config.cell(at("local"))["code"], config.exactness_cell("smollm2-135m", "remote_cache")["code"]
    assert before != config.cell(at("remote_cache"))["code"] != check
    with (tmp_path / "workflow/scripts/measure_trial.py").open("a") as script:
        script.write("# changed\n")
    assert before != config.cell(at("local"))["code"]
    assert check == config.exactness_cell("smollm2-135m", "remote_cache")["code"]


def cells_of_each_kind() -> dict[str, dict[str, Any]]:
    config, model = check_config(DEFAULT, ROOT), "smollm2-135m"
    return {
        "trial": config.cell(at("sys_delta")),
        "reference": config.reference_cell(model, "decode"),
        "exactness": config.exactness_cell(model, "sys_delta"),
        "exactness reference": config.exactness_reference_cell(model),
        "network": config.network_cell("loopback"),
        "tensors": config.tensors_cell(model),
        "codecs": config.codecs_cell(model),
    }


@pytest.mark.parametrize("kind", cells_of_each_kind())
def test_a_cell_is_read_key_for_key(kind: str) -> None:
    raw = cells_of_each_kind()[kind]
    expected = {key: raw[key] for key in raw.keys() - {"code", "model_spec", "phase", "prompts_digest", "trial"}}  # for the digest alone
    if "policy" in raw:
        expected["policy"] = msgspec.to_builtins(policy_from(raw["policy"], ""))
    read = msgspec.json.decode(msgspec.json.encode(Cell.of(raw)))
    assert {key: read[key] for key in expected} == expected


def test_modes_that_run_in_none_of_the_chosen_phases_are_named() -> None:
    with pytest.raises(ConfigError, match="none of modes sys_delta runs in phases decode"):
        check_config({**DEFAULT, "modes": "sys_delta", "phases": "decode"}, ROOT)


def test_a_recovery_phase_is_run_by_modes_that_name_it_alone() -> None:
    config = check_config(PRESSED, ROOT)
    assert config.phases_of("remote_cache") == ["prefill", "decode"]
    assert config.phases_of("sys_delta") == ["recovery-evict", "recovery-budget_1_2"]


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ({"address": "{nod}:0"}, "config.worker.address is '{nod}:0' with launch 'srun'; it is HOST:PORT, where {node} stands for"),
        ({"address": "{node}-ib0"}, "config.worker.address is '{node}-ib0' with launch 'srun'"),
        ({"secret_file": "token"}, "config.worker.secret_file is set with launch 'srun', which gets a new secret for each trial"),
        ({}, "config.worker.launch is 'srun' and there is no srun on this machine's PATH; run on a cluster"),
    ],
)
def test_srun_is_refused_where_it_cannot_be(worker: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    raw = deepcopy(DEFAULT)
    raw["define"]["networks"]["loopback"]["kind"] = "hosts"
    raw |= {"networks": ["loopback"], "worker": {"launch": "srun"} | worker}
    with pytest.raises(ConfigError) as error:
        check_config(raw, ROOT)
    assert message in str(error.value)


@pytest.mark.parametrize("field", ["weights", "reply"])
def test_a_codec_of_the_gpu_is_refused_in_a_run_without_one(field: str) -> None:
    values = changed("define.modes.know_position.codec", {field: "nvcomp_ans"})
    said = f"mode 'know_position': codec.{field} 'nvcomp_ans' needs a GPU at both ends, and config.device is 'cpu'; use codec planes_zstd"
    with pytest.raises(ConfigError, match=said):
        check_config(values | {"device": "cpu"}, ROOT)
    assert check_config(values | {"device": "auto"}, ROOT)["device"] == "auto"  # which is not this machine's to say


def test_a_weight_cache_is_no_matter_of_this_config_where_the_worker_is_external() -> None:
    worker = {"launch": "external", "address": "127.0.0.1:1", "weight_cache": "cache"}
    with pytest.raises(ConfigError, match=r"weight_cache with launch 'external'; start that worker with `semgap serve --weight-cache DIR`"):
        check_config({"define": DEFAULT["define"], "worker": worker}, ROOT)


def networked(row: dict[str, Any], **worker: Any) -> dict[str, Any]:
    """The default config over one network of one's own, called lan, with one mode."""
    values = deepcopy(DEFAULT) | {"networks": ["lan"], "modes": ["remote_cache"]}
    values["define"]["networks"]["lan"] = row
    values["worker"] |= worker
    return values


@pytest.mark.parametrize(
    ("row", "worker", "message"),
    [
        ({"kind": "relais"}, {}, "config.define.networks.lan.kind is 'relais'; did you mean 'relay'?"),
        (
            {"kind": "relay", "rate": "1Gb"},
            {},
            "network 'lan': rate '1Gb' is not a number above 0 with one of bit, kbit, Mbit, Gbit, e.g. 100Mbit",
        ),
        (
            {"kind": "relay", "rate": 1e9},
            {},
            "config.define.networks.lan.rate is 1000000000.0: 1000000000.0 is not of type 'string', 'null'",
        ),
        (
            {"kind": "relay", "delay_ms": -1},
            {},
            "config.define.networks.lan.delay_ms is -1: -1 is less than the minimum of 0 (One-way delay",
        ),
        ({"kind": "relay", "delay": 5}, {}, "config.define.networks.lan has no key 'delay'; did you mean 'delay_ms'?"),
        (
            {"kind": "relay", "loss_percent": 1},
            {},
            "network 'lan' is of kind relay with loss_percent; a relay ends TCP, and packets can be lost",
        ),
        (
            {"kind": "loopback", "delay_ms": 5},
            {},
            "network 'lan' is of kind loopback, to which nothing is added, with delay_ms; leave that out",
        ),
        (
            {"kind": "hosts"},
            {},
            "network 'lan' is of kind hosts with config.worker.launch 'local', which starts the worker on this machine",
        ),
        (
            {"kind": "netns"},
            {"launch": "external", "address": "h:1"},
            "network 'lan' is of kind netns with config.worker.launch 'external'; its worker is started on its far side, use launch: local",
        ),
        ({"kind": "hosts"}, {"launch": "ssh"}, "config.worker.launch is 'ssh' with host None; set worker.host to a name that ssh knows"),
        ({"kind": "hosts"}, {"launch": "ssh", "host": "-oX"}, "config.worker.launch is 'ssh' with host '-oX'; set worker.host to a name"),
        (
            {"kind": "loopback"},
            {"launch": "ssh", "host": "h"},
            "network 'lan' is of kind loopback with config.worker.launch 'ssh', which needs kind: hosts",
        ),
        (
            {"kind": "hosts"},
            {"launch": "ssh", "host": "h", "secret_file": "x"},
            "config.worker.secret_file is set with launch 'ssh', which gets a new",
        ),
        (
            {"kind": "hosts"},
            {"launch": "external", "address": "h:1", "tls": True},
            "config.worker.tls with launch 'external' needs the secret that says who is there; set worker.secret_file too",
        ),
        ({"kind": "loopback"}, {"host": "h"}, "config.worker.host is 'h' with launch 'local'; say launch: ssh, or leave it out"),
    ],
)
def test_a_network_or_a_host_that_cannot_be_is_refused_by_name_with_the_way_out(
    row: dict[str, Any], worker: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(networked(row, **worker), ROOT)
    assert str(refused.value).startswith(message)


def test_a_kv_host_is_not_started_through_ssh_and_the_error_says_what_to_do() -> None:
    values = networked({"kind": "hosts"}, launch="ssh", host="h") | {"modes": ["remote_cache_reload"], "phases": ["recovery-evict"]}
    with pytest.raises(
        ConfigError, match=r"mode 'remote_cache_reload' keeps KV blocks in a KV host, which worker.launch 'ssh' does not start"
    ):
        check_config(values, ROOT)


def over_a_kv_link(rows: dict[str, Any], **worker: Any) -> dict[str, Any]:
    """`networked` with kv `far`, for a mode with a KV host; `rows`: further rows."""
    values = networked({"kind": "loopback", "kv": "far"}, **worker) | {"modes": ["sys_delta"], "phases": ["recovery-evict"]}
    values["define"]["networks"] |= {"far": {"kind": "relay", "rtt_ms": 1}, **rows}
    return values


@pytest.mark.parametrize(
    ("rows", "worker", "message"),
    [
        ({"lan": {"kind": "loopback", "kv": "fra"}}, {}, "network 'lan': kv 'fra' is not in config.define.networks; did you mean 'far'?"),
        ({"lan": {"kind": "relay", "kv": "lan"}}, {}, "network 'lan': kv 'lan' is the network itself; name another row"),
        ({"far": {"kind": "relay", "kv": "1gbit_1ms"}}, {}, "network 'lan': kv 'far' has a kv of its own, '1gbit_1ms'; there is one link"),
        (
            {"far": {"kind": "relay", "congestion": "reno"}},
            {},
            "network 'lan': kv 'far' has congestion 'reno', which is set on the client's",
        ),
        ({"far": {"kind": "relay", "rate": "1Gb"}}, {}, "network 'far': rate '1Gb' is not a number above 0"),
        ({"far": {"kind": "loopback", "rtt_ms": 1}}, {}, "network 'far' is of kind loopback, to which nothing is added, with rtt_ms"),
        (
            {"far": {"kind": "hosts"}},
            {},
            "network 'lan': kv 'far' is of kind hosts; with config.worker.launch 'local' the KV host starts on this machine, use kind: "
            "loopback or kind: relay or kind: netns or networks without kv",
        ),
        (
            {},
            {"launch": "external", "address": "h:1"},
            "network 'lan': kv 'far' is of kind relay; with config.worker.launch 'external' the KV host is the external worker's own, use",
        ),
    ],
)
def test_a_kv_that_cannot_lie_between_worker_and_kv_host_is_refused_with_the_way_out(
    rows: dict[str, Any], worker: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(over_a_kv_link(rows, **worker), ROOT)
    assert str(refused.value).startswith(message)


def test_a_probe_that_no_frame_to_the_kv_host_holds_is_refused() -> None:
    raw = over_a_kv_link({}) | {"probe": {"round_trips": 3, "payload_bytes": 1 << 25}}
    check_config(raw, ROOT)
    raw["worker"] = raw.get("worker", {}) | {"kv_host_bytes": 1 << 20}
    with pytest.raises(ConfigError, match=r"config.probe.payload_bytes 33,554,432 is more than a frame to the KV host of network 'lan'"):
        check_config(raw, ROOT)


def test_a_network_whose_kv_link_no_mode_crosses_is_checked_without_it() -> None:
    crossed, beside = over_a_kv_link({}), over_a_kv_link({})
    beside["define"]["modes"]["sys_delta"] = beside["define"]["modes"]["sys_delta"] | {"shadow": "worker"}
    beside["modes"] = ["sys_delta"]
    with_link, without = check_config(crossed, ROOT), check_config(beside, ROOT)
    assert with_link.network_cell("lan")["policy"] == {"shadow": "kvhost"} and with_link.is_checked("lan")
    assert without.network_cell("lan")["policy"] == {"shadow": "worker"} and not without.is_checked("lan")


def test_an_external_workers_kv_host_may_be_another_host_and_a_mode_without_one_crosses_no_link() -> None:
    external = {"launch": "external", "address": "h:1"}
    check_config(over_a_kv_link({"far": {"kind": "hosts", "rtt_ms": 1}}, **external), ROOT)
    without = over_a_kv_link({}, **external) | {"modes": ["remote_cache"], "phases": ["decode"], "networks": ["lan", "loopback"]}
    assert {at.network for at in check_config(without, ROOT).grid()} == {"loopback"}


def test_over_a_network_with_kv_only_recovery_phases_run() -> None:
    config = check_config(DEFAULT, ROOT)
    ran = {(at.mode, at.phase) for at in config.grid() if at.network == "kv_1gbit_1ms"}
    assert ran == {("remote_cache_reload", "recovery-evict"), ("sys_delta", "recovery-evict")}
    with pytest.raises(
        ConfigError, match=r"nothing runs over networks kv_1gbit_1ms: over one with kv \(kv_1gbit_1ms\) only phases of kinds recovery"
    ):
        check_config(DEFAULT | {"modes": "remote_cache", "phases": "decode", "networks": "kv_1gbit_1ms"}, ROOT)


def test_trials_and_check_of_a_network_depend_on_the_row_that_its_kv_names_and_its_exactness_does_not() -> None:
    def cells(rtt_ms: float) -> list[dict[str, Any]]:
        config = checked("define.networks.1gbit_1ms.rtt_ms", rtt_ms)
        where = Coordinates("smollm2-135m", "kv_1gbit_1ms", "sys_delta", "recovery-evict", 1)
        return [config.cell(where), config.network_cell("kv_1gbit_1ms"), config.exactness_cell("smollm2-135m", "sys_delta")]

    (trial, check, exactness), (trial_2, check_2, exactness_2) = cells(1), cells(2)
    assert trial["kv_network_spec"]["rtt_ms"] == 1 and trial != trial_2 and check != check_2 and exactness == exactness_2
    config = check_config(DEFAULT, ROOT)
    assert config.is_checked("kv_1gbit_1ms") and config.network_cell("kv_1gbit_1ms")["policy"] == {"shadow": "kvhost"}
    assert "kv_network_spec" not in config.cell(at("sys_delta", phase="recovery-evict"))


def test_loopback_to_a_worker_of_the_trials_own_has_no_check_and_any_other_network_has() -> None:
    config = check_config(networked({"kind": "relay", "rate": "1Gbit"}), ROOT)
    assert config.is_checked("lan") and not config.is_checked("loopback")
    elsewhere = check_config(networked({"kind": "hosts"}, launch="external", address="h:1"), ROOT)
    assert elsewhere.is_checked("lan") and elsewhere.is_checked("loopback")  # whether its worker answers
    assert config.network_cell("lan") == check_config(networked({"kind": "relay", "rate": "1Gbit"}), ROOT).network_cell("lan")
    assert config.network_cell("lan") != check_config(networked({"kind": "relay", "rate": "2Gbit"}), ROOT).network_cell("lan")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "config").glob("*.yaml")))
def test_the_head_of_a_config_states_its_trials(name: str) -> None:
    trials = len(list(read_config([] if name == "config.yaml" else [ROOT / "config" / name], ROOT).grid()))
    text = (ROOT / "config" / name).read_text()
    head = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]
    assert [int(number) for number in re.findall(r"(\d+) trials", head)] == [trials]
    assert re.findall(r"(\d+) x [\d.]+ s", head) in ([str(trials)], []), "its duration is of another number of trials"


def test_the_documents_state_the_trials_of_the_complete_experiment() -> None:
    (stated,) = re.findall(r"config/full.yaml` has (\d+) trials", (ROOT / "docs/modes.md").read_text())
    assert int(stated) == len(list(read_config([ROOT / "config/full.yaml"], ROOT).grid()))
