"""The `semgap` command: run a worker, run one trial without Snakemake, look at a link, look at a machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def _at_least_1(text: str) -> int:
    """ArgumentTypeError for anything but an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _delay_ms(text: str) -> float:
    """ArgumentTypeError for anything but a number from 0 to a minute's."""
    try:
        delay = float(text)
    except ValueError:
        delay = -1.0
    if not 0 <= delay <= 60_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no delay; use milliseconds from 0 to 60000")
    return delay


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and gives its exit status; what goes wrong is told in one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except _expected_errors() as error:
        print(f"semgap {options.name}: {error}", file=sys.stderr)
        return 1


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is all that a user needs; imported late, so that --help is quick."""
    from semgap.analysis.load import UnusableTrial as UnusableTrial
    from semgap.engine.model_files import ModelFileError
    from semgap.experiment.config_checks import ConfigError
    from semgap.experiment.exactness import BrokenPromise
    from semgap.experiment.fetch_model import SourceError
    from semgap.experiment.trial_setup import TrialError
    from semgap.wire.frames import WireError
    from semgap.wire.ledger import LedgerError

    return (
        *(ConfigError, BrokenPromise, LedgerError, ModelFileError, SourceError, TrialError, UnusableTrial, WireError),
        *(ValueError, OSError),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semgap", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="COMMAND")
    _add_serve(commands)
    _add_kvhost(commands)
    _add_relay(commands)
    _add_run(commands)
    _add_price(commands)
    ping = commands.add_parser("ping", help="round trip and goodput to a worker")
    ping.add_argument("address", help="HOST:PORT of a `semgap serve`")
    ping.add_argument("--secret-file", type=Path, help="the worker's token file")
    ping.add_argument("--round-trips", type=_positive, default=200, help="64-byte round trips (default: %(default)s)")
    ping.add_argument("--payload-bytes", type=_positive, default=64 << 20, help="bytes sent each way (default: %(default)s)")
    ping.add_argument("--json", action="store_true", help="print what was measured as one line of JSON")
    ping.add_argument("--cpus", type=_cpus, default=(), help="cores to ping from, e.g. 0")
    ping.add_argument("--parent-pid", type=int, help="end when this process, which started the ping, ends")
    ping.set_defaults(command=_ping)
    doctor = commands.add_parser("doctor", help="what this machine has and lacks, and what that means")
    doctor.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    doctor.add_argument("--worker", metavar="HOST:PORT", help="what lies between here and this `semgap serve`, and what differs")
    doctor.add_argument("--secret-file", type=Path, help="the worker's token file")
    doctor.add_argument("--model", help="the model to compare with --worker (default: each that is fetched); sends what it lacks")
    doctor.set_defaults(command=_doctor)
    secret = commands.add_parser("secret", help="make a token file for a worker and its clients")
    secret.add_argument("file", type=Path)
    secret.set_defaults(command=_secret)
    return parser


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="run a GPU worker that waits for clients")
    serve.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    serve.add_argument("--secret-file", type=Path, help="token file of mode 0600; needed beyond loopback")
    serve.add_argument("--threads", type=_at_least_1, default=1, help="CPU threads of the executor (default: %(default)s)")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    serve.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the worker to, e.g. 1 or 0,1")
    serve.add_argument("--io-cpus", type=_cpus, default=(), help="cores of the thread that brings KV blocks back (default: the worker's)")
    serve.add_argument("--max-sessions", type=int, default=8, help="clients at a time (default: %(default)s)")
    serve.add_argument("--idle-s", type=float, default=600.0, help="close a session that is silent this long (default: %(default)s)")
    kept = "keep weights that were offered by hash as files here, for later workers too (default: in memory, for this worker's sessions)"
    serve.add_argument("--weight-cache", type=Path, metavar="DIR", help=kept)
    budget = "bytes of weights kept at most (default: a quarter of the memory; in a directory half of what it holds and has free)"
    serve.add_argument("--weight-store-bytes", type=_positive, default=0, metavar="N", help=budget)
    serve.add_argument("--kv-host", metavar="HOST:PORT", help="a `semgap kvhost` with the same secret, for modes with shadow: kvhost")
    serve.add_argument("--parent-pid", type=int, help="end when this process, which started the worker, ends")
    attached = "take an order from standard input, its secret included, and end when that closes; a trial on another node says this"
    serve.add_argument("--attached", action="store_true", help=attached)
    serve.set_defaults(command=_serve)


def _add_kvhost(commands: argparse._SubParsersAction) -> None:
    host = commands.add_parser("kvhost", help="keep KV blocks for workers")
    kept = "bytes of blocks kept at most; the least recently used go first"
    host.add_argument("--budget-bytes", type=_positive, required=True, metavar="N", help=kept)
    host.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    host.add_argument("--secret-file", type=Path, help="the workers' token file of mode 0600; needed beyond loopback")
    host.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the host to, e.g. 1 or 0,1")
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
    relay.add_argument("--report", type=Path, help="file for what it did, JSON, written as it ends")
    relay.add_argument("--parent-pid", type=int, help="end when this process, which started the relay, ends")
    relay.set_defaults(command=_relay)


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="one trial without Snakemake")
    run.add_argument("--mode", required=True, help="a row of define.modes")
    run.add_argument("--phase", default="decode", help="a row of define.phases (default: %(default)s)")
    run.add_argument("--model", help="a row of define.models (default: the config's first)")
    run.add_argument("--network", help="a row of define.networks (default: the config's first)")
    run.add_argument("--config", type=Path, default=Path("config/config.yaml"), help="default: %(default)s")
    run.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    run.add_argument("--worker", metavar="HOST:PORT", help="use this worker; without it a fresh one is started")
    run.add_argument("--secret-file", help="token file of --worker")
    run.add_argument("--output", type=Path, help="directory for the trial's files (default: results/by-hand/MODE/PHASE)")
    run.set_defaults(command=_run)


def _add_price(commands: argparse._SubParsersAction) -> None:
    price = commands.add_parser("price", help="what recorded trials would take over another link")
    price.add_argument("results", type=Path, help="the directory that a finished run left, e.g. results/")
    price.add_argument("--rtt", required=True, metavar="TIME", help="round trip, e.g. 25ms, as `semgap ping` would measure it")
    price.add_argument("--rate", required=True, metavar="RATE", help="bits a second of payload each way, e.g. 400Mbit")
    price.add_argument("--csv", type=Path, metavar="FILE", help="write the unrounded table there as well")
    merged = "the config of the results is config/config.yaml with these merged over it, as for snakemake"
    price.add_argument("--configfile", type=Path, action="append", default=[], metavar="FILE", help=merged)
    price.add_argument("--as-recorded", action="store_true", help="price them whether or not they are of the current config and code")
    price.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    price.set_defaults(command=_price)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _cpus(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of cores, e.g. 1 or 0,1")
    return tuple(int(part) for part in text.split(","))


_STORE = ("weight_cache", "weight_store_bytes")


def _serve(options: argparse.Namespace) -> int:
    from semgap.processes.lifetime import end_with_parent
    from semgap.worker.serve import ServeOptions, serve

    if options.parent_pid:
        end_with_parent(options.parent_pid)
    names = ("listen", "secret_file", "threads", "device", "cpus", "io_cpus", "max_sessions", "idle_s", "kv_host", "attached", *_STORE)
    serve(ServeOptions(**{name: getattr(options, name) for name in names}))
    return 0


def _kvhost(options: argparse.Namespace) -> int:
    from semgap.kv.host import KVHostOptions, serve_kv
    from semgap.processes.lifetime import end_with_parent

    if options.parent_pid:
        end_with_parent(options.parent_pid)
    names = ("budget_bytes", "listen", "secret_file", "cpus", "idle_s")
    serve_kv(KVHostOptions(**{name: getattr(options, name) for name in names}))
    return 0


def _relay(options: argparse.Namespace) -> int:
    from semgap.network.relay import RelayOptions, relay
    from semgap.processes.lifetime import end_with_parent

    if options.parent_pid:
        end_with_parent(options.parent_pid)
    relay(RelayOptions(**{name: getattr(options, name) for name in ("to", "listen", "delay_ms", "rate", "cpus", "report")}))
    return 0


def _run(options: argparse.Namespace) -> int:
    from semgap.experiment.check_network import check_network
    from semgap.experiment.compute_reference import compute_reference
    from semgap.experiment.config import Coordinates, read_config
    from semgap.experiment.fetch_model import fetch_model
    from semgap.experiment.measure_trial import measure_trial
    from semgap.experiment.preflight import require_machine
    from semgap.experiment.trial_setup import Paths

    chosen: dict[str, Any] = {"modes": [options.mode], "phases": [options.phase]}
    chosen |= {"models": [options.model]} if options.model else {}
    chosen |= {"networks": [options.network]} if options.network else {}
    if options.worker:
        chosen["worker"] = {"launch": "external", "address": options.worker, "secret_file": options.secret_file}
    config = read_config(options.config, options.root, chosen)
    require_machine(config)
    at = Coordinates(config["models"][0], config["networks"][0], options.mode, options.phase, 1)
    place = Paths(options.root / "resources/models" / at.model, options.root)
    if config.is_checked(at.network) and not config.is_local(options.mode):
        print(f"checking network {at.network}", flush=True)
        check_network(config.network_cell(at.network), options.root)
    if not (place.model_directory / "digest.json").exists():
        print(f"fetching model {at.model} into {place.model_directory}", flush=True)
        fetch_model(config["define"]["models"][at.model], at.model, config["dtype"], place.model_directory)
    output = options.output or options.root / "results/by-hand" / at.mode / at.phase
    print("computing what local gives, to compare with", flush=True)
    compute_reference(config.reference_cell(at.model, at.phase), place, output / "reference.npz")
    print(f"measuring {at.mode}, {at.phase}", flush=True)
    result = measure_trial(config.cell(at), place, output / "reference.npz")
    result.write(output)
    print(_describe(result.manifest, result.tables["steps"].to_pylist()))
    print(f"files in {output}")
    return 0


def _price(options: argparse.Namespace) -> int:
    from semgap.analysis.links import LinkModel
    from semgap.analysis.results import load_recorded, recorded_cells
    from semgap.analysis.tables.price import PRICED_VIEWS, prices
    from semgap.analysis.tables.render import to_markdown
    from semgap.experiment.config_checks import ConfigError

    link = LinkModel.parsed(options.rtt, options.rate)
    cells = recorded_cells(options.results)
    if not options.as_recorded:
        _refuse_stale(cells, options.root, options.configfile)
    results = load_recorded(options.results, cells)
    table = prices(results, link)
    if table.empty:
        raise ConfigError(f"{options.results} holds no trials of prefill or decode phases; those of recovery phases have no price")
    if options.csv:
        table.to_csv(options.csv, index=False, lineterminator="\n")
    print(f"Over a link of {options.rtt} round trip and {options.rate} each way.\n")
    print(to_markdown(table, PRICED_VIEWS), end="")
    return 0


def _refuse_stale(cells: pd.DataFrame, root: Path, configfiles: list[Path]) -> None:
    """ConfigError where recorded trials are not those of the current config and code."""
    from semgap.experiment.config import Coordinates, read_configs
    from semgap.experiment.config_checks import ConfigError
    from semgap.experiment.staleness import content_digest

    config = read_configs([root / "config/config.yaml", *configfiles], root)
    stale = []
    for cell in cells.to_dict("records"):
        at = Coordinates(cell["model"], cell["network"], cell["mode"], cell["phase"], cell["trial"])
        if not config.defines(at) or content_digest(config.cell(at)) != cell["cell_digest"]:
            stale.append(f"{at.mode}, {at.phase}, trial {at.trial} over {at.network}")
    if stale:
        raise ConfigError(
            f"{len(stale)} of {len(cells)} recorded trials are not of the current config and code (first: {stale[0]}). Name the config "
            "that snakemake was given by --configfile, take them as they are by --as-recorded, or run snakemake again"
        )


def _describe(manifest: Mapping[str, Any], steps: list[dict[str, Any]]) -> str:
    """A few lines on a trial: latency, bytes per token, exactness."""
    from statistics import median

    measured = [step for step in steps if step["measured"]]
    payload = sum(step["up_frame_bytes"] + step["down_frame_bytes"] for step in measured) / len(measured)
    exact, fallbacks = manifest["exactness"], manifest["kv"]["fallbacks"]
    logits = "logits bitwise equal" if exact["logits_bitwise"] else "the client saw no logits"
    if exact["max_abs_diff"]:
        logits = f"logits differ by up to {exact['max_abs_diff']:.3g}"
    lines = [
        f"latency   median {1e3 * median(step['latency_s'] for step in measured):.2f} ms over {len(measured)} steps",
        f"traffic   {payload:,.0f} bytes per token (TCP payload, both directions)",
        f"exactness {exact['tokens_equal']} of {exact['tokens_compared']} tokens equal, {logits}",
    ]
    missed = [step for step in measured if step["recovery"]]
    if missed:
        fetched = sum(step["fetched_network_bytes"] + step["copied_bytes"] for step in missed) / len(missed)
        lines.append(f"recovery  {len(missed)} steps missed KV blocks, {fetched:,.0f} bytes brought back in each, mean")
    if fallbacks:
        lines.append(f"fallbacks {len(fallbacks)}: KV blocks that could not be saved or had back, the first {fallbacks[0]}")
    return "\n".join(lines)


def _ping(options: argparse.Namespace) -> int:
    from semgap.client.probe import probe_link
    from semgap.processes.lifetime import end_with_parent
    from semgap.wire.frames import Limits
    from semgap.wire.handshake import read_secret, shake_hands_as_client
    from semgap.wire.link import connect
    from semgap.wire.listen import pin

    if options.parent_pid:
        end_with_parent(options.parent_pid)
    if options.cpus:
        pin(options.cpus)
    secret = read_secret(options.secret_file)
    link = connect(options.address)
    granted = shake_hands_as_client(link, secret, {})
    link.limits = Limits(payload_bytes=options.payload_bytes)
    probe = probe_link(link, options.round_trips, options.payload_bytes)
    link.close()
    if options.json:
        print(json.dumps(probe | {"threads": granted["threads"]}))
        return 0
    print(f"worker      pid {granted['pid']}, {granted['device']}, {granted['threads']} thread(s), torch {granted['torch']}")
    print(f"round trip  {1e6 * probe['rtt_s']:.0f} us (median of {options.round_trips}, 64 bytes)")
    for way in ("up", "down"):
        warm, cold = (probe[f"{kind}_{way}_bytes_per_s"] / 1e6 for kind in ("goodput", "cold"))
        print(f"{'goodput up' if way == 'up' else '     down'}  {warm:>6,.0f} MB/s, {cold:,.0f} on a new connection")
    print(f"            {options.payload_bytes:,} bytes each, a round trip in it")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from semgap.doctor import examine, examine_worker

    findings = examine(options.root)
    if options.worker:
        findings += examine_worker(options.worker, options.secret_file, options.root, options.model)
    for finding in findings:
        print(f"{finding.state:<7} {finding.thing:<22} {finding.value}")
        if finding.meaning:
            print(f"{'':<30} {finding.meaning}")
    return int(any(finding.state == "broken" for finding in findings))


def _secret(options: argparse.Namespace) -> int:
    from semgap.wire.handshake import write_secret

    write_secret(options.file)
    print(json.dumps({"secret_file": str(options.file)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
