"""What the documents state is what the code does: keys, columns, numbers on the wire, captions."""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import jinja2
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from docutils.core import publish_parts
from snakemake.utils import update_config

import semgap
from semgap import cli_options, codecs, seal
from semgap.analysis import price
from semgap.analysis.columns import ENDINGS
from semgap.analysis.link_grid import LINK_COLUMNS
from semgap.analysis.load import load_trials
from semgap.analysis.results import Results, load_codecs, load_exactness
from semgap.analysis.tables.make_tables import TABLES, TableModule, name_of
from semgap.client import session
from semgap.codecs import CODECS
from semgap.experiment import (
    check_exactness,
    compute_exactness_reference,
    compute_reference,
    dump_tensors,
    fetch_model,
    measure_codecs,
    measure_trial,
    staleness,
    trial_schemas,
    trial_setup,
)
from semgap.experiment.config import Config, Coordinates, check_config, read_config
from semgap.network.spec import Network
from semgap.telemetry import dmon, host, nvml
from semgap.telemetry.samples import Cost
from semgap.tensors import DType, Tensor, TensorClass
from semgap.wire import frames, messages

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())


def table_rows(text: str) -> list[list[str]]:
    """The cells of every body row of every Markdown table in `text`."""
    rows, in_body = [], False
    for line in text.splitlines():
        if re.fullmatch(r"\|( *:?-+:? *\|)+", line):
            in_body = True
        elif not line.startswith("|"):
            in_body = False
        elif in_body:
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or a higher one."""
    level = heading.index(" ")
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{level}}} ", text[start:], re.MULTILINE)
    return text[start : start + end.start()] if end else text[start:]


def schema_keys(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every key below a schema node by its dotted path, with the cells that its row in config/README.md must have."""
    for name, below in node.get("properties", {}).items():
        here, child = f"{path}{name}", resolved(below)
        yield here, [type_cell(child), default_cell(child, name in node.get("required", [])), allowed_cell(child)]
        yield from schema_keys(child, f"{here}.")
        if isinstance(child.get("additionalProperties"), dict):
            yield from schema_keys(resolved(child["additionalProperties"]), f"{here}.NAME.")


def resolved(node: Mapping[str, Any]) -> dict[str, Any]:
    """A schema node with its $ref followed; what stands beside the $ref wins."""
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] | node if "$ref" in node else dict(node)


def type_cell(node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return "text"
    types = node["type"] if isinstance(node["type"], list) else [node["type"]]
    name = " or ".join({"string": "text", "array": "list", "object": "mapping"}.get(each, each) for each in types)
    return name.replace("list", f"list of {type_cell(node['items'])}") if "items" in node else name


def default_cell(node: Mapping[str, Any], required: bool) -> str:
    if "default" in node:
        return f"`{json.dumps(node['default'])}`"
    return "required" if required else ""


def allowed_cell(node: Mapping[str, Any]) -> str:
    values = node.get("enum", node.get("items", {}).get("enum", []))
    low, high, above = (node.get("items", {}).get(key, node.get(key)) for key in ("minimum", "maximum", "exclusiveMinimum"))
    parts = [", ".join(f"`{value}`" for value in values)]
    parts.append(f"above {above}" if above is not None else "")
    bounds = {(True, True): f"{low} to {high}", (True, False): f"{low} or more", (False, True): f"up to {high}"}
    parts.append(bounds.get((low is not None, high is not None), ""))
    parts.append(f"`{node['pattern']}`" if "pattern" in node else "")
    parts.append("not empty" if node.get("minItems") or node.get("minLength") else "")
    parts.append("none twice" if node.get("uniqueItems") else "")
    return "; ".join(filter(None, parts))


def names_in(rows: list[list[str]], column: int = 0) -> list[str]:
    """The words in backticks in one column, in order."""
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[column])]


def columns_in(rows: list[list[str]]) -> list[str]:
    """The columns in the first cells; `X*` stands for X and its interval."""
    return [f"{name.rstrip('*')}{ending}" for name in names_in(rows) for ending in (ENDINGS if name.endswith("*") else [""])]


CONFIG_README, RESULTS_README, WIRE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("config/README.md", "results/README.md", "docs/wire.md")
)


def test_every_key_of_the_config_is_documented_with_its_type_default_and_bounds_and_no_other() -> None:
    documented = {row[0].strip("`"): row[1:4] for row in table_rows(CONFIG_README) if len(row) == 5}
    assert documented == dict(schema_keys(SCHEMA))


def test_the_keys_of_each_model_source_are_documented() -> None:
    rows = [row for row in table_rows(section(CONFIG_README, "## Models")) if len(row) == 3]
    documented = {row[0].strip("`"): set(names_in([row], 1)) for row in rows}
    assert documented == {source.__struct_config__.tag: set(source.__struct_fields__) for source in get_args(fetch_model.Source)}


def test_every_codec_is_documented_with_its_number_and_whether_it_is_exact() -> None:
    said = {True: "yes", False: "no"}
    in_wire = [row[:3] for row in rows_under(WIRE, "codec")]
    assert in_wire == [[f"`{codec.name}`", str(codec.code), said[codec.exact]] for codec in CODECS.values()]
    in_config = [row[:2] for row in rows_under(CONFIG_README, "codec")]
    assert in_config == [[f"`{codec.name}`", said[codec.exact]] for codec in CODECS.values()]


def rows_under(text: str, first_column: str) -> list[list[str]]:
    """Body rows of the table whose first column has this title."""
    start = text.index(f"\n| {first_column} |")
    return table_rows(text[start:].split("\n\n")[0])


def test_what_each_kind_of_reply_sends_is_documented() -> None:
    kinds = SCHEMA["$defs"]["mode"]["properties"]["reply"]["properties"]["kind"]["enum"]
    assert [row[0].strip("`") for row in rows_under(WIRE, "reply kind")] == kinds


@pytest.mark.parametrize(
    ("title", "numbers"),
    [
        ("operation", {each.name.lower(): each.value for each in messages.Operation}),
        ("kind", {each.name.lower(): each.value for each in messages.Kind}),
        ("flag", {name.lower(): value for name, value in vars(frames.Flag).items() if name.isupper()}),
        ("tensor class", {each.name.lower(): each.value for each in TensorClass}),
        ("dtype", {each.name.lower(): each.value for each in DType}),
    ],
)
def test_numbers_on_the_wire_are_documented(title: str, numbers: dict[str, int]) -> None:
    assert {row[0].strip("`"): int(row[1]) for row in rows_under(WIRE, title)} == numbers


def test_sizes_of_dtypes_are_documented() -> None:
    assert {row[0].strip("`"): int(row[2]) for row in rows_under(WIRE, "dtype")} == {each.name.lower(): each.itemsize for each in DType}


def test_headers_of_each_operation_are_documented() -> None:
    documented = {row[0].strip("`"): [cell.strip("`") for cell in row[2:4]] for row in rows_under(WIRE, "operation")}
    assert documented == {
        each.name.lower(): [messages.REQUEST_HEADERS[each].__name__, messages.REPLY_HEADERS[each].__name__] for each in messages.Operation
    }


def test_fields_of_every_header_are_documented_in_order() -> None:
    parts = [messages.TensorHeader, messages.WeightSpec, messages.KVLayout, messages.Call, messages.Gained]
    structs = [*parts, *header_types(messages.Header)]
    documented = {row[0].strip("`"): tuple(names_in([row], 1)) for row in rows_under(WIRE, "struct")}
    assert documented == {struct.__name__: struct.__struct_fields__ for struct in structs}


def header_types(base: type[messages.Header]) -> list[type[messages.Header]]:
    return [base, *(each for below in base.__subclasses__() for each in header_types(below))]


def test_every_error_code_is_documented_and_no_other() -> None:
    raised = r"FrameError\(|Refused\(|ShadowError\(|CallError\(|__init__\("
    code = rf'(?:{raised}|reply_error\(None, |_say_why\(link, |code = |error, "code", )\s*"([a-z_]+)"'
    used = {name for file in (ROOT / "src/semgap").rglob("*.py") for name in re.findall(code, file.read_text(encoding="utf-8"))}
    documented = names_in(rows_under(WIRE, "code"))
    assert sorted(documented) == sorted(used)


def test_limits_are_documented() -> None:
    defaults, closed = frames.Limits(), frames.UNAUTHENTICATED
    rows = {row[0]: row[1:] for row in rows_under(WIRE, "receiver")}
    assert rows["worker, before the client is authenticated"] == [str(closed.header_bytes), str(closed.payload_bytes), str(closed.buffers)]
    assert rows["client, afterwards"] == [str(defaults.header_bytes), str(session._MAX_REPLY_BYTES), str(defaults.buffers)]
    assert rows["worker, afterwards"][::2] == [str(defaults.header_bytes), str(defaults.buffers)]


def test_the_example_frame_is_what_a_decode_step_sends() -> None:
    token = codecs.encode(Tensor.from_numpy(np.array([42], dtype=np.int64), TensorClass.TOKENS), "raw")
    header = messages.Forward(frames.tensor_headers([token]), 1, 128)
    start = frames.pack(messages.Operation.FORWARD, messages.Kind.REGULAR, 0, 7, header, token.buffers)
    example = WIRE.split("```")[1]
    assert bytes.fromhex(example) == start + b"".join(token.buffers)


def test_the_frame_prefix_is_documented_byte_by_byte() -> None:
    rows = rows_under(WIRE, "offset")[:9]
    offsets = [int(row[0]) for row in rows]
    assert offsets == [sum(int(row[1]) for row in rows[:index]) for index in range(9)]
    assert offsets[-1] + int(rows[-1][1]) == frames.PREFIX_BYTES
    assert int(rows[0][3], 16) == frames.MAGIC
    assert int(rows[1][3]) == frames.VERSION


COLUMN_TYPES = {"text": "string", "bool": "bool", "int64": "int64", "float64": "double"}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("requests", {field.name: str(field.type) for field in trial_schemas.REQUESTS}),
        ("steps", {field.name: str(field.type) for field in trial_schemas.STEPS}),
        ("control", {field.name: str(field.type) for field in trial_schemas.CONTROL}),
        ("load", {field.name: str(field.type) for field in trial_schemas.LOAD}),
        ("batches", {field.name: str(field.type) for field in trial_schemas.BATCHES}),
        ("ledger", {field.name: str(field.type) for field in trial_schemas.LEDGER}),
        ("tcp", {field.name: str(field.type) for field in trial_schemas.TCP}),
        ("relay", {field.name: str(field.type).replace("float64", "double") for field in trial_schemas.RELAY}),
        ("host", {column.name: column.kind.replace("float64", "double") for column in host.COLUMNS}),
        ("gpu", {column.name: column.kind.replace("float64", "double") for column in nvml.COLUMNS}),
        ("dmon", {column.name: column.kind.replace("float64", "double") for column in dmon.table_columns()}),
    ],
)
def test_every_column_of_a_trial_is_documented_with_its_type_and_a_meaning(name: str, columns: dict[str, str]) -> None:
    rows = table_rows(section(RESULTS_README, f"## {name}.parquet"))
    assert [(row[0].strip("`"), COLUMN_TYPES[row[1]]) for row in rows] == list(columns.items())
    assert all(row[2] and row[3] for row in rows)


@dataclass(frozen=True)
class Trial:
    """A real trial of a tiny model over a real worker, its references, and what tables are made of: the trial, its exactness, codecs."""

    manifest: dict[str, Any]
    tables: Mapping[str, pa.Table]
    reference: Path
    results: Results
    exactness: dict[str, Any]


@pytest.fixture(scope="module")
def tiny_trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    directory = tmp_path_factory.mktemp("trial")
    config = check_config(tiny_config(), ROOT)
    fetch_model.fetch_model(config["define"]["models"]["tiny"], "tiny", "float32", directory / "model")
    place, cell = trial_setup.Paths(directory / "model", ROOT), config.cell(Coordinates("tiny", "loopback", "remote_cache", "decode", 1))
    compute_reference.compute_reference(config.reference_cell("tiny", "decode"), place, directory / "reference.npz")
    measure_trial.measure_trial(cell, place, directory / "reference.npz").write(directory / "result")
    manifest = json.loads((directory / "result/manifest.json").read_text())
    trials = load_trials([directory / "result"], {str(directory / "result"): manifest["cell_digest"]})
    check = measured_exactness(config, place, directory)
    codecs_file = measured_codecs(config, place, directory)
    results = Results.of(
        trials,
        load_exactness([directory / "exactness.json"], {str(directory / "exactness.json"): check["cell_digest"]}),
        load_codecs([codecs_file], {str(codecs_file): staleness.content_digest(config.codecs_cell("tiny"))}),
        {},
    )
    tables = {file.stem: pq.read_table(file) for file in (directory / "result").glob("*.parquet")}
    return Trial(manifest, tables, directory / "reference.npz", results, check)


def measured_exactness(config: Config, place: trial_setup.Paths, directory: Path) -> dict[str, Any]:
    drawn, text = directory / "drawn.npz", directory / "text.npz"
    compute_exactness_reference.compute_exactness_reference(config.exactness_reference_cell("tiny"), place, drawn, text)
    check = check_exactness.check_exactness(config.exactness_cell("tiny", "remote_cache"), place, drawn, text)
    (directory / "exactness.json").write_bytes(seal.sealed_json(check))
    return check


def measured_codecs(config: Config, place: trial_setup.Paths, directory: Path) -> Path:
    """Measured in a process that ends, since measuring pins it to a core."""
    file = directory / "codecs.parquet"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(dump_tensors.dump_tensors, config.tensors_cell("tiny"), place, directory / "t.safetensors").result()
        pool.submit(measure_codecs.measure_codecs, config.codecs_cell("tiny"), place, directory / "t.safetensors", file).result()
    return file


def tiny_config() -> dict[str, Any]:
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return {
        "max_length": 32,
        "exactness": {"prompt_length": 8, "tokens": 4},
        "probe": {"round_trips": 2, "payload_bytes": 1024},
        "telemetry": {"interval_s": 0.05},
        "define": {
            "models": {"tiny": {"source": "random", "architecture": "llama", "config": shape, "seed": 1}},
            "networks": {"loopback": {"kind": "loopback"}},
            "modes": {"remote_cache": {}},
            "phases": {"decode": {"kind": "decode", "prompt_lengths": [8], "steps": 2}},
        },
    }


def test_the_files_of_a_trial_hold_the_documented_columns_in_order(tiny_trial: Trial) -> None:
    documented = {
        name: [row[0].strip("`") for row in table_rows(section(RESULTS_README, f"## {name}.parquet"))] for name in tiny_trial.tables
    }
    assert {name: table.column_names for name, table in tiny_trial.tables.items()} == documented
    assert set(documented) == set(re.findall(r"^## (\w+)\.parquet$", RESULTS_README, re.MULTILINE))


# Mappings of the manifest whose keys are explained elsewhere: the config's in config/README.md, the rest are names of things.
WHOLE = ("policy", "sampling", "phase_spec", "model_spec", "network_spec", "cpus", "worker", "telemetry", "probe", "timeouts")
WHOLE_KEYS = {*(f"cell.{name}" for name in WHOLE), "files", "provenance.packages", "reconciliation.frame_bytes_by_kind"}


def manifest_keys(node: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, below in node.items():
        here = re.sub(r"^telemetry\.(host|gpu|dmon)", "telemetry.SOURCE", f"{path}{name}")
        if isinstance(below, dict) and here not in WHOLE_KEYS and not here.endswith(("SOURCE.cost", "worker_clock")):
            yield from manifest_keys(below, f"{here}.")
        else:
            yield here


def test_every_key_of_the_manifest_is_documented_and_no_other(tiny_trial: Trial) -> None:
    documented = names_in(table_rows(section(RESULTS_README, "## manifest.json")))
    assert len(documented) == len(set(documented))
    only_elsewhere = {"setup.weights_load_s", "setup.head_load_s", "setup.head_bytes"}  # in local, and with reply hidden_last
    assert set(documented) == set(manifest_keys(tiny_trial.manifest)) | only_elsewhere


def test_what_a_sampler_cost_is_documented_and_no_more() -> None:
    (row,) = (row for row in table_rows(section(RESULTS_README, "## manifest.json")) if row[0] == "`telemetry.SOURCE.cost`")
    assert names_in([row], 2) == list(Cost(1, 1.0, 1.0, 1.0).describe())


def test_every_column_of_results_csv_is_documented_and_no_other(tiny_trial: Trial) -> None:
    documented = names_in(table_rows(section(RESULTS_README, "## results.csv")))
    assert sorted(documented) == sorted([*tiny_trial.results.rows.columns, "directory"])


@pytest.mark.parametrize("table", TABLES, ids=name_of)
def test_every_column_of_a_table_is_documented_and_no_other(table: TableModule, tiny_trial: Trial) -> None:
    documented = columns_in(table_rows(section(RESULTS_README, f"## tables/{name_of(table)}")))
    assert sorted(documented) == sorted(table.table(tiny_trial.results).columns)


def test_every_column_of_semgap_price_is_documented_and_no_other() -> None:
    documented = columns_in(table_rows(section(RESULTS_README, "## What `semgap price` prints")))
    assert sorted(documented) == sorted([*LINK_COLUMNS, *price.COLUMNS])


def test_every_key_of_an_exactness_file_is_documented_and_no_other(tiny_trial: Trial) -> None:
    documented = set(names_in(table_rows(section(RESULTS_README, "## tables/exactness"))))
    computed = {"cross_entropy_change_nats", "perplexity_change"}
    assert set(tiny_trial.exactness) - {"cell_digest"} == documented - computed


def test_every_array_of_a_reference_is_documented_with_its_type(tiny_trial: Trial) -> None:
    rows = table_rows(section(RESULTS_README, "## reference/model=M/phase=P.npz"))
    with np.load(tiny_trial.reference, allow_pickle=False) as arrays:
        assert {row[0].strip("`"): row[1].split()[0] for row in rows} == {name: str(arrays[name].dtype) for name in arrays.files}


WITHOUT_TRIALS = ("telemetry", "exactness", "codecs", "break_even")
CAPTIONS = sorted((ROOT / "workflow/report").glob("*.rst"))


@pytest.mark.parametrize("selection", [["local", "remote_cache"], "local, remote_cache"])
@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda path: path.stem)
def test_captions_render_with_the_run_s_own_config_as_a_list_or_with_commas(caption: Path, selection: list[str] | str) -> None:
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text()) | {"modes": selection, "trials": 7}
    config["phases"] = "prefill, decode" if isinstance(selection, str) else ["prefill", "decode"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(caption.read_text()).render(snakemake=SimpleNamespace(config=config))
    html = publish_parts(text, writer="html", settings_overrides={"halt_level": 2, "report_level": 5})["html_body"]
    assert "{{" not in html
    assert "7" in html or caption.stem in WITHOUT_TRIALS


def test_every_table_and_figure_has_a_caption() -> None:
    assert {path.stem for path in CAPTIONS} == {
        "workflow",
        "explorer",
        *map(name_of, TABLES),
        *names_in(table_rows(section(RESULTS_README, "## figures"))),
    }


def test_every_staleness_list_is_documented() -> None:
    documented = names_in(rows_under((ROOT / "CONTRIBUTING.md").read_text(), "list"))
    assert sorted(documented) == sorted(name for name in vars(staleness) if name.endswith("_CODE"))


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "config/README.md", ROOT / "results/README.md", *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_every_promise_of_reliability_is_held_by_tests_that_exist() -> None:
    rows = rows_under((ROOT / "docs/reliability.md").read_text(), "promise")
    named = [name.split("::") for row in rows for name in re.findall(r"`(tests/[^`]+)`", row[1])]
    assert all("`tests/" in row[1] for row in rows) and len(rows) > 10
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


def test_the_campaigns_table_has_every_attack_and_adds_up() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    rows = [row for row in table_rows(text) if len(row) in (7, 8)]  # campaigns before `missed` was counted have 7
    counts = [[int(cell.replace(",", "")) for cell in row[2:]] for row in rows]
    assert [sum(column) for column in zip(*counts[:-1], strict=True)] == counts[-1] and rows[-1][0] == "all"
    assert {row[0] for row in rows[:-1]} == {row[0].strip("`") for row in rows_under(text, "attack") if len(row) == 2}
    assert all(tries == refused + survived + wrong for tries, _, refused, survived, wrong, *_ in counts)


def test_the_modes_that_docs_list_are_those_of_the_config_and_it_says_which_the_default_run_leaves_out() -> None:
    listed, config = (ROOT / "docs/modes.md").read_text(), yaml.safe_load((ROOT / "config/config.yaml").read_text())
    rows, modes = rows_under(listed, "mode"), config["define"]["modes"]
    assert [row[0].strip("`") for row in rows] == list(modes)
    assert {row[0].strip("`"): row[5] for row in rows} == {name: row["keeps"] for name, row in modes.items()}
    (left_out,) = re.findall(r"leaves out (.*?)\.", listed, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", left_out)) == set(modes) - set(config["modes"])


def test_the_networks_that_readme_says_the_default_run_uses_are_those_of_the_config() -> None:
    config = check_config(yaml.safe_load((ROOT / "config/config.yaml").read_text()), ROOT)
    near = {at for at in config.grid() if at.network == "loopback"}
    far = {(at.mode, at.phase) for at in config.grid() if at.network == "1gbit_20ms"}
    to_kv_host = {at.phase for at in config.grid() if at.network == "kv_1gbit_1ms"}
    assert config["networks"] == ["loopback", "1gbit_20ms", "kv_1gbit_1ms"] and to_kv_host == {"recovery-evict"}
    assert {phase for _, phase in far} == {"decode"} and {at.phase for at in near} == set(config["phases"])
    assert {at.mode for at in near if at.phase == "decode"} - {mode for mode, _ in far} == {
        *("local", "naive", "remote_cache_zstd", "remote_cache_planted")
    }


def test_the_complete_experiment_is_the_default_one_with_all_modes_phases_and_a_longer_check() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    merged = deepcopy(default)
    update_config(merged, yaml.safe_load((ROOT / "config/full.yaml").read_text()))  # as snakemake --configfile does
    config = check_config(merged, ROOT)
    assert set(config["modes"]) == set(config["define"]["modes"]) > set(default["modes"])
    assert set(config["phases"]) == set(config["define"]["phases"])
    ordinary = [phase for phase in config["phases"] if not phase.startswith(("recovery-", "load"))]
    recovery = [phase for phase in config["phases"] if phase.startswith("recovery-")]
    somewhere = {mode for mode in default["modes"] if config.phases_of(mode) not in (ordinary, recovery, ["load"])}
    assert somewhere == {"naive"}
    assert (config["trials"], config["max_length"]) == (5, 512)
    longer = {"prompts": 3, "prompt_length": 96, "tokens": 256}
    assert config["exactness"].items() >= longer.items()


def test_the_network_sweep_crosses_round_trips_with_rates_as_the_names_say_and_runs_those_that_a_relay_carries() -> None:
    merged = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    update_config(merged, yaml.safe_load((ROOT / "config/network-sweep.yaml").read_text()))
    config = check_config(merged, ROOT)
    rows = {name: msgspec.convert(row, Network) for name, row in config["define"]["networks"].items() if name.startswith("rtt")}
    crossed = {(rtt, rate) for rtt in (0.2, 1, 10, 50) for rate in ("100Mbit", "1Gbit", "10Gbit")}
    assert {(2 * row.delay_ms, row.rate) for row in rows.values() if row.delay_ms} == crossed
    assert {name: f"rtt{2 * (row.delay_ms or 0):g}ms-{(row.rate or '').lower()}" for name, row in rows.items()} == {
        name: name for name in rows
    }
    assert set(config["networks"]) == {name for name, row in rows.items() if row.kind == "relay" and row.rate != "10Gbit"}
    assert {"local", "remote_cache", "sys", *(mode for mode in config["modes"] if mode.startswith("know_"))} <= set(config["modes"])
    assert all(config.phases_of(mode) == ["prefill", "decode-96"] for mode in config["modes"])
    beyond = check_config(merged | {"networks": [name for name in rows if rows[name].kind == "netns"]}, ROOT)
    assert len(beyond["networks"]) == 4


def test_readme_says_what_the_recorded_run_gave_and_fits_its_screen() -> None:
    assert subprocess.run([sys.executable, ROOT / "benchmarks/record_answer.py", "--check"]).returncode == 0
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_one_version_is_in_the_package_the_citation_and_the_changelog() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (released, *_) = re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == released
    assert citation["version"] == semgap.__version__


def test_commands_and_targets_that_documents_name_exist() -> None:
    readme = (ROOT / "README.md").read_text() + (ROOT / "docs/running.md").read_text()
    commands = set(re.findall(r"^semgap (\w+)", readme, re.MULTILINE))
    actions = [action for action in cli_options.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert commands == set(actions[0].choices)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", readme, re.MULTILINE))
    assert {"run", "test"} <= named <= targets


@pytest.mark.parametrize("over", [{}, {"device": "cpu", "dtype": "float32"}])
def test_the_qwen3_preset_runs_in_bfloat16_on_a_gpu_and_in_float32_on_a_cpu(over: dict[str, Any]) -> None:
    config = read_config([ROOT / "config/qwen3.yaml"], ROOT, over)
    assert (config["dtype"], config["device"]) == ((over or {"dtype": "bfloat16"})["dtype"], over.get("device", "cuda"))
    assert (config["models"], config.policy("naive")["max_steps"], config.policy("know_head")["keeps"]) == (["qwen3-0.6b"], 5, "lossy")
    assert all(config.phases_of(mode) for mode in config["modes"])
    uploads = {mode for mode in config["modes"] if config.policy(mode)["weights"] == "once" and not config.is_local(mode)}
    assert config["worker"]["weight_cache"] and uploads == {"remote_cache", "remote_cache_again"}


def test_the_gptj_preset_runs_every_mode_of_the_default_run_in_half_precision_and_uploads_a_model_once() -> None:
    default = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    merged = deepcopy(default)
    update_config(merged, yaml.safe_load((ROOT / "config/gptj-6b.yaml").read_text()))
    config = check_config(merged, ROOT)
    batched = {mode for mode, row in default["define"]["modes"].items() if row.get("batching")}
    assert set(config["modes"]) == {*default["define"]["modes"], "know_layout_ans", "sys_delta_int4"} - {"remote_cache_planted"} - batched
    assert all(config.phases_of(mode) for mode in config["modes"])
    assert (config["dtype"], config["device"], config["models"]) == ("float16", "cuda", ["gptj-6b"])
    decode = config["define"]["phases"]["decode"]
    assert (decode["prompt_lengths"], decode["steps"], config.policy("naive")["max_steps"]) == ([128], 50, 5)
    random = config["define"]["models"]["gptj-6b-random"]
    shape = {"vocab_size": 50400, "n_positions": 2048, "n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64}
    assert random["source"] == "random" and random["config"] == shape
    kept = {mode: config.policy(mode)["keeps"] for mode in config["modes"]}
    assert {mode for mode in kept.keys() & {*default["define"]["modes"]} if kept[mode] != default["define"]["modes"][mode]["keeps"]} == {
        "know_head",
        "remote_cache_recompute",
    }
    assert config["worker"]["weight_cache"]
    uploads = {mode for mode in config["modes"] if config.policy(mode)["weights"] == "once" and not config.is_local(mode)}
    assert uploads == {"remote_cache", "remote_cache_again"}
