# PYTHON_ARGCOMPLETE_OK
"""The `semgap` command: run a worker, run one trial without Snakemake, measure a link, check a machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from semgap.experiment.config import Config
    from semgap.experiment.trial_schemas import TrialResult
    from semgap.experiment.trial_setup import Paths


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; gives its exit status. Prints an expected error to stderr, in one line."""
    parser = _parser()
    _complete(parser)
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "parent_pid", None):
            from semgap.processes.lifetime import end_with_parent

            end_with_parent(options.parent_pid)
        return options.command(options) or 0
    except MemoryError as error:
        from semgap.processes.machine import out_of_memory

        print(f"semgap {options.name}: {out_of_memory(error)}", file=sys.stderr)
        return 1
    except _expected_errors() as error:
        print(f"semgap {options.name}: {error}", file=sys.stderr)
        return 1


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell's request for completions and ends, if this is one (docs/running.md)."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            argcomplete.autocomplete(parser)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semgap", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="COMMAND")
    _add_serve(commands)
    _add_kvhost(commands)
    _add_relay(commands)
    _add_run(commands)
    _add_price(commands)
    _add_crate(commands)
    verify = commands.add_parser("verify", help="check that results are as they were written, and that the trials' sums hold")
    verify.add_argument("results", type=Path, help="the directory of a run, e.g. results/, or of one trial")
    verify.set_defaults(command=_verify)
    _add_ties(commands)
    ping = commands.add_parser("ping", help="round trip and goodput to a worker")
    ping.add_argument("address", help="HOST:PORT of a `semgap serve`")
    ping.add_argument("--secret-file", type=Path, help="the worker's token file")
    ping.add_argument("--round-trips", type=_positive, default=200, help="64-byte round trips (default: %(default)s)")
    ping.add_argument("--payload-bytes", type=_positive, default=64 << 20, help="bytes sent each way (default: %(default)s)")
    ping.add_argument("--kv", action="store_true", help="also those of the worker's link to its KV host")
    ping.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    ping.add_argument("--cpus", type=_cpus, default=(), help="cores to ping from, e.g. 0")
    ping.add_argument("--parent-pid", type=int, help="end when this process, which started the ping, ends")
    ping.set_defaults(command=_ping)
    doctor = commands.add_parser("doctor", help="report what this machine has and lacks")
    doctor.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    doctor.add_argument("--worker", metavar="HOST:PORT", help="report on the link to this `semgap serve`, and on differences")
    doctor.add_argument("--secret-file", type=Path, help="the worker's token file")
    doctor.add_argument("--model", help="model to compare with --worker (default: all fetched ones); sends missing weights")
    doctor.set_defaults(command=_doctor)
    secret = commands.add_parser("secret", help="make a token file for a worker and its clients")
    secret.add_argument("file", type=Path)
    secret.set_defaults(command=_secret)
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="run a GPU worker that waits for clients")
    serve.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    serve.add_argument("--secret-file", type=Path, help="token file of mode 0600; needed beyond loopback")
    serve.add_argument("--threads", type=_positive, default=1, help="CPU threads of the executor (default: %(default)s)")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    first = "executor whose code is loaded at the start; sessions may ask for another (default: %(default)s)"
    serve.add_argument("--executor", choices=("auto", "fused", "eager", "cuda_graph"), default="auto", help=first)
    serve.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the worker to, e.g. 1 or 0,1")
    serve.add_argument("--io-cpus", type=_cpus, default=(), help="cores of what does not compute (default: the worker's)")
    serve.add_argument("--max-sessions", type=int, default=8, help="clients at a time (default: %(default)s)")
    serve.add_argument("--idle-s", type=float, default=600.0, help="close a session that is silent this long (default: %(default)s)")
    kept = "keep weights offered by hash as files here, for later workers too (default: in memory, for this worker's sessions)"
    serve.add_argument("--weight-cache", type=Path, metavar="DIR", help=kept)
    budget = "most bytes of weights to keep (default: a quarter of the memory; in a directory half of its held and free bytes)"
    serve.add_argument("--weight-store-bytes", type=_positive, default=0, metavar="N", help=budget)
    serve.add_argument("--kv-host", metavar="HOST:PORT", help="a `semgap kvhost` with the same secret, for modes with shadow: kvhost")
    serve.add_argument("--parent-pid", type=int, help="end when this process, which started the worker, ends")
    attached = "read an order, with the secret, from standard input, and end when that closes: for a trial on another node"
    serve.add_argument("--attached", action="store_true", help=attached)
    serve.set_defaults(command=_serve)


def _add_kvhost(commands: argparse._SubParsersAction) -> None:
    host = commands.add_parser("kvhost", help="keep KV blocks for workers")
    kept = "most bytes of blocks to keep; drops the least recently used first"
    host.add_argument("--budget-bytes", type=_positive, required=True, metavar="N", help=kept)
    host.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    host.add_argument("--secret-file", type=Path, help="the workers' token file of mode 0600; needed beyond loopback")
    host.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the host to, e.g. 1 or 0,1")
    host.add_argument("--max-connections", type=_positive, default=64, help="workers at a time (default: %(default)s)")
    host.add_argument("--idle-s", type=float, default=3600.0, help="close a connection that is silent this long (default: %(default)s)")
    host.add_argument("--parent-pid", type=int, help="end when this process, which started the host, ends")
    host.set_defaults(command=_kvhost)


def _add_relay(commands: argparse._SubParsersAction) -> None:
    relay = commands.add_parser("relay", help="emulate a network between clients and a worker: delay and rate in each direction")
    relay.add_argument("--to", required=True, metavar="HOST:PORT", help="the worker")
    relay.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="on loopback; port 0 takes a free one")
    relay.add_argument("--delay-ms", type=_delay_ms, default=0.0, metavar="MS", help="one-way delay (default: %(default)s)")
    relay.add_argument("--rate", metavar="RATE", help="of TCP payload, e.g. 100Mbit (default: as fast as it goes)")
    relay.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the relay to, e.g. 1 or 0,1")
    relay.add_argument("--max-connections", type=_positive, default=64, help="connections at a time (default: %(default)s)")
    relay.add_argument("--report", type=Path, help="file for its report, JSON, written at its end")
    relay.add_argument("--parent-pid", type=int, help="end when this process, which started the relay, ends")
    relay.set_defaults(command=_relay)


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="one trial without Snakemake")
    run.add_argument("--mode", required=True, help="a row of define.modes")
    run.add_argument("--phase", default="decode", help="a row of define.phases (default: %(default)s)")
    run.add_argument("--model", help="a row of define.models (default: the config's first)")
    run.add_argument("--network", help="a row of define.networks (default: the config's first)")
    merged = "merged over config/config.yaml, as snakemake --configfile does; may be repeated"
    run.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help=merged)
    run.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    run.add_argument("--worker", metavar="HOST:PORT", help="use this worker; without it a fresh one is started")
    run.add_argument("--secret-file", help="token file of --worker")
    run.add_argument("--output", type=Path, help="directory for the trial's files (default: results/by-hand/MODE/PHASE)")
    run.add_argument("--json", action="store_true", help="print the result as one line of JSON, and progress to stderr")
    run.set_defaults(command=_run)


def _add_price(commands: argparse._SubParsersAction) -> None:
    price = commands.add_parser("price", help="price recorded trials over other links")
    price.add_argument("results", type=Path, help="the directory of a finished run, e.g. results/")
    price.add_argument("--rtt", required=True, metavar="TIMES", help="round trip as `semgap ping` measures it, e.g. 25ms or 1ms,5ms..50ms")
    price.add_argument("--rate", required=True, metavar="RATES", help="payload bits a second, each way, e.g. 400Mbit or 100Mbit..10Gbit")
    asked = "tokens of a call in modes with windows, at least as many as recorded (default: as recorded)"
    price.add_argument("--window", type=_positive, metavar="N", help=asked)
    price.add_argument("--kv-rtt", metavar="TIMES", help="also price recovery phases: round trip between worker and KV host, e.g. 1ms")
    price.add_argument("--kv-rate", metavar="RATES", help="and payload bits a second there, e.g. 1Gbit; both or neither")
    price.add_argument("--csv", type=Path, metavar="FILE", help="also write the unrounded table to this file")
    price.add_argument("--figure", type=Path, metavar="FILE", help="also draw latencies over these links: .svg, .png or .pdf")
    merged = "the --configfile of the run, merged over config/config.yaml as snakemake does; may be repeated"
    price.add_argument("--configfile", type=Path, action="append", default=[], metavar="FILE", help=merged)
    price.add_argument("--as-recorded", action="store_true", help="also price trials of another config or other code")
    price.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    price.set_defaults(command=_price)


def _add_crate(commands: argparse._SubParsersAction) -> None:
    crate = commands.add_parser("crate", help="archive a finished run as a Workflow RO-Crate")
    crate.add_argument("results", type=Path, help="the directory of a finished run, e.g. results/")
    crate.add_argument("--output", type=Path, metavar="FILE", help="default: crate.zip in the run's directory")
    merged = "the --configfile of the run, merged over config/config.yaml as snakemake does; may be repeated"
    crate.add_argument("--configfile", type=Path, action="append", default=[], metavar="FILE", help=merged)
    crate.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    crate.set_defaults(command=_crate)


def _add_ties(commands: argparse._SubParsersAction) -> None:
    ties = commands.add_parser("ties", help="find prompts on which greedy decoding over fp16 logits leaves the path of local's own")
    ties.add_argument("--model", help="a row of define.models (default: the config's first)")
    merged = "merged over config/config.yaml; exactness has the prompts' length and the tokens after each; may be repeated"
    ties.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help=merged)
    ties.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    ties.set_defaults(command=_ties)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _delay_ms(text: str) -> float:
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a delay; use milliseconds from 0 to 60000")
    return delay


def _cpus(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of cores, e.g. 1 or 0,1")
    return tuple(int(part) for part in text.split(","))


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
    """The config keys that the options of `semgap run` set."""
    chosen: dict[str, Any] = {"modes": [options.mode], "phases": [options.phase]}
    chosen |= {"models": [options.model]} if options.model else {}
    chosen |= {"networks": [options.network]} if options.network else {}
    if options.worker:
        chosen["worker"] = {"launch": "external", "address": options.worker, "secret_file": options.secret_file}
    return chosen


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
    granted = shake_hands_as_client(link, secret, {})
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
    there = examine_worker(options.worker, options.secret_file, options.root, options.model) if options.worker else []
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


if __name__ == "__main__":
    sys.exit(main())
