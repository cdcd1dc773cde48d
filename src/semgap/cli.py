# PYTHON_ARGCOMPLETE_OK
"""The `semgap` command: run a worker, run one trial without Snakemake, measure a link, check a machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from semgap.cli_options import parser

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from semgap.experiment.config import Config
    from semgap.experiment.trial_schemas import TrialResult
    from semgap.experiment.trial_setup import Paths


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; gives its exit status. Prints an expected error to stderr, in one line."""
    known = parser()
    _complete(known)
    options = known.parse_args(arguments)
    try:
        if getattr(options, "parent_pid", None):
            from semgap.processes.lifetime import end_with_parent

            end_with_parent(options.parent_pid)
        return _COMMANDS[options.name](options) or 0
    except MemoryError as error:
        from semgap.processes.machine import out_of_memory

        print(f"semgap {options.name}: {out_of_memory(error)}", file=sys.stderr)
        return 1
    except _expected_errors() as error:
        print(f"semgap {options.name}: {error}", file=sys.stderr)
        return 1


def _complete(known: argparse.ArgumentParser) -> None:
    """Answers the shell's request for completions and ends, if this is one (docs/running.md)."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(known)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is enough for a user, ConfigError among the ValueErrors. Imported late: --help stays quick."""
    from semgap.engine.model_files import ModelFileError
    from semgap.experiment.exactness import BrokenPromise
    from semgap.experiment.fetch_model import SourceError
    from semgap.experiment.trial_setup import TrialError
    from semgap.seal import SealError
    from semgap.wire.frames import WireError
    from semgap.wire.ledger import LedgerError

    expected = (BrokenPromise, LedgerError, ModelFileError, SealError, SourceError, TrialError, WireError, ValueError, OSError)
    try:
        from semgap.analysis.load import UnusableTrial
    except ImportError:  # a worker's machine may lack pandas, and then nothing raises it
        return expected
    return (*expected, UnusableTrial)


def _serve(options: argparse.Namespace) -> None:
    from semgap.worker.serve import ServeOptions, serve

    serve(ServeOptions(**_fields_of(ServeOptions, options)))


def _kvhost(options: argparse.Namespace) -> None:
    from semgap.kv.host import KVHostOptions, serve_kv

    serve_kv(KVHostOptions(**_fields_of(KVHostOptions, options)))


def _relay(options: argparse.Namespace) -> None:
    from semgap.network.relay import RelayOptions, relay

    relay(RelayOptions(**_fields_of(RelayOptions, options)))


def _fields_of(dataclass: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The command's options that `dataclass` has as fields."""
    return {field.name: getattr(options, field.name) for field in fields(dataclass) if hasattr(options, field.name)}


def _run(options: argparse.Namespace) -> None:
    from semgap.experiment.by_hand import screen, summary_of

    with contextlib.redirect_stdout(sys.stderr if options.json else sys.stdout):
        summary = summary_of(*_measured(options))
    print(json.dumps(summary) if options.json else screen(summary))


def _measured(options: argparse.Namespace) -> tuple[TrialResult, Path]:
    """The trial, and the directory of its files. Prints each stage before it begins."""
    from semgap.experiment.by_hand_run import require_place, run_by_hand
    from semgap.experiment.check_network import check_network
    from semgap.experiment.config import Coordinates, read_config
    from semgap.experiment.preflight import require_machine

    config = read_config(options.config, options.root, _chosen(options))
    require_machine(config)
    at = Coordinates(config["models"][0], config["networks"][0], options.mode, options.phase, 1)
    output = options.output or options.root / "results/by-hand" / at.mode / at.phase
    require_place(output)
    if config.is_checked(at.network) and not config.is_local(options.mode):
        print(f"checking network {at.network}", flush=True)
        check_network(config.network_cell(at.network), options.root)
    return run_by_hand(config, at, _fetched(config, at.model), output), output


def _fetched(config: Config, model: str) -> Paths:
    """The paths of a model, which is fetched if it is not there."""
    from semgap.experiment.config_checks import models_directory
    from semgap.experiment.fetch_model import fetch_model
    from semgap.experiment.trial_setup import Paths

    paths = Paths(config.root / models_directory(config.values) / model, config.root)
    if not (paths.model_directory / "digest.json").exists():
        print(f"fetching model {model} into {paths.model_directory}", flush=True)
        fetch_model(config["define"]["models"][model], model, config["dtype"], paths.model_directory)
    return paths


def _ties(options: argparse.Namespace) -> None:
    from semgap.experiment.config import read_config
    from semgap.experiment.ties import ties

    config = read_config(options.config, options.root, {"models": [options.model]} if options.model else {})
    model, chosen, found = config["models"][0], config["exactness"], []
    print(f"{model}, prompts of {chosen['prompt_length']} tokens, {chosen['tokens']} tokens drawn after each", flush=True)
    for passage, departure in ties(config.exactness_reference_cell(model), _fetched(config, model)):
        if departure is None:
            print(f"passage {passage:>2}  stays", flush=True)
            continue
        found.append(passage)
        tokens = f"token {departure.fp16_token} instead of {departure.token}, whose logit is larger by {departure.margin:.2g}"
        print(f"passage {passage:>2}  leaves at step {departure.step}: {tokens}", flush=True)
    print(f"exactness: {{passages: {found}}}")


def _chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The changes that the options of `semgap run` make to the config."""
    chosen: dict[str, Any] = {"modes": [options.mode], "phases": [options.phase]}
    chosen |= {"models": [options.model]} if options.model else {}
    chosen |= {"networks": [options.network]} if options.network else {}
    worker: dict[str, Any] = {"tls": True} if options.tls else {}
    if options.worker:
        of_another = {"host": None, "weight_cache": None}
        worker |= {"launch": "external", "address": options.worker, "secret_file": options.secret_file, **of_another}
    return chosen | ({"worker": worker} if worker else {})


def _price(options: argparse.Namespace) -> None:
    from semgap.analysis.link_grid import LinkGrid
    from semgap.analysis.price_text import price_text
    from semgap.analysis.results import load_recorded, recorded_cells
    from semgap.experiment.config import read_config
    from semgap.experiment.config_checks import ConfigError

    grid = LinkGrid.parsed(options.rtt, options.rate)
    if (options.kv_rtt is None) != (options.kv_rate is None):
        raise ConfigError("--kv-rtt and --kv-rate describe one link, between worker and KV host; give both, or neither")
    kv_grid = LinkGrid.parsed(options.kv_rtt, options.kv_rate) if options.kv_rtt else None
    if options.figure:
        from semgap.analysis.figures.style import require_format

        require_format(options.figure)
    cells = recorded_cells(options.results)
    if not options.as_recorded:
        _refuse_stale(cells, read_config(options.configfile, options.root), "price them anyway with --as-recorded, ")
    results = load_recorded(options.results, cells)
    try:
        print(price_text(results, grid, kv_grid, options.window, options.figure, options.csv), end="")
    except LookupError as error:
        raise ConfigError(f"{options.results} {error.args[0]}") from error


def _crate(options: argparse.Namespace) -> None:
    from semgap.analysis.results import recorded_cells
    from semgap.crate import make_crate, recorded_selection
    from semgap.experiment.config import read_config

    cells = recorded_cells(options.results)
    _refuse_stale(cells, read_config(options.configfile, options.root))
    config = read_config(options.configfile, options.root, recorded_selection(options.results, cells))
    output = options.output or options.results / "crate.zip"
    print(f"{output}: {make_crate(options.results, config, output) / 1e6:,.1f} MB, a Workflow RO-Crate of {len(cells)} trials")


def _verify(options: argparse.Namespace) -> int:
    from semgap.analysis.verify import verify

    verdict = verify(options.results)
    print(*(f"semgap verify: {fault}\n" for fault in verdict.faults), sep="", end="", file=sys.stderr)
    print(verdict.line())
    return int(bool(verdict.faults))


def _refuse_stale(cells: pd.DataFrame, config: Config, otherwise: str = "") -> None:
    """ConfigError unless all recorded trials are of the current config and code. `otherwise`: another way out."""
    from semgap.experiment.config import Coordinates
    from semgap.experiment.config_checks import ConfigError
    from semgap.experiment.staleness import content_digest

    stale = []
    for cell in cells.to_dict("records"):
        at = Coordinates(cell["model"], cell["network"], cell["mode"], cell["phase"], cell["trial"])
        if not config.defines(at) or content_digest(config.cell(at)) != cell["cell_digest"]:
            stale.append(f"{at.mode}, {at.phase}, trial {at.trial} over {at.network}")
    if stale:
        raise ConfigError(
            f"{len(stale)} of {len(cells)} recorded trials are not of the current config and code (first: {stale[0]}). Pass the "
            f"--configfile of that run, {otherwise}or run snakemake again"
        )


def _ping(options: argparse.Namespace) -> int:
    from semgap.client.probe import probe_kv_link, probe_link
    from semgap.wire.frames import Limits
    from semgap.wire.handshake import read_secret, shake_hands_as_client
    from semgap.wire.link import connect
    from semgap.wire.listen import pin

    if options.cpus:
        pin(options.cpus)
    secret = read_secret(options.secret_file)
    link = connect(options.address)
    granted = shake_hands_as_client(link, secret, {}, options.tls)
    link.limits = Limits(payload_bytes=options.payload_bytes)
    probe = probe_link(link, options.round_trips, options.payload_bytes)
    kv_probe = probe_kv_link(link, options.round_trips, options.payload_bytes) if options.kv else None
    link.close()
    if options.json:
        print(json.dumps(probe | {"threads": granted["threads"], "kv": kv_probe}))
        return 0
    print(f"worker      pid {granted['pid']}, {granted['device']}, {granted['threads']} thread(s), semgap {granted['versions']['semgap']}")
    _print_probe(probe)
    if kv_probe:
        print("its KV host")
        _print_probe(kv_probe)
    return 0


def _print_probe(probe: dict[str, float]) -> None:
    print(f"round trip  {1e6 * probe['rtt_s']:.0f} us (median of {probe['round_trips']}, 64 bytes)")
    for way in ("up", "down"):
        warm, cold = (probe[f"{kind}_{way}_bytes_per_s"] / 1e6 for kind in ("goodput", "cold"))
        print(f"{'goodput up' if way == 'up' else '     down'}  {warm:>6,.0f} MB/s, {cold:,.0f} on a new connection")
    print(f"            {probe['payload_bytes']:,} bytes each, round trip included")


def _doctor(options: argparse.Namespace) -> int:
    from semgap.doctor import examine, examine_worker, measurable

    here = examine(options.root)
    there = examine_worker(options.worker, options.secret_file, options.root, options.model, options.tls) if options.worker else []
    findings = [*here, *there]
    for finding in findings:
        print(f"{finding.state:<7} {finding.thing:<22} {finding.value}")
        if finding.meaning:
            print(f"{'':<30} {finding.meaning}")
    print(measurable(here))
    return int(any(finding.state == "broken" for finding in findings))


def _secret(options: argparse.Namespace) -> None:
    from semgap.wire.handshake import write_secret

    write_secret(options.file)
    print(json.dumps({"secret_file": str(options.file)}))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "serve": _serve,
    "kvhost": _kvhost,
    "relay": _relay,
    "run": _run,
    "price": _price,
    "crate": _crate,
    "verify": _verify,
    "ties": _ties,
    "ping": _ping,
    "doctor": _doctor,
    "secret": _secret,
}


if __name__ == "__main__":
    sys.exit(main())
