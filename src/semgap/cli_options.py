"""The options of the `semgap` command. Imports nothing of semgap: a shell's completion runs it at each key."""

import argparse
from pathlib import Path

_DOES = "The `semgap` command: run a worker, run one trial without Snakemake, measure a link, check a machine."
_THEIR_TLS = "the worker was started with --tls"


def parser() -> argparse.ArgumentParser:
    """The parser of `semgap`; the result's `name` is the command."""
    whole = argparse.ArgumentParser(prog="semgap", description=_DOES)
    commands = whole.add_subparsers(required=True, dest="name", metavar="COMMAND")
    _add_serve(commands)
    _add_kvhost(commands)
    _add_relay(commands)
    _add_run(commands)
    _add_price(commands)
    _add_crate(commands)
    verify = commands.add_parser("verify", help="check that results are as they were written, and that the trials' sums hold")
    verify.add_argument("results", type=Path, help="the directory of a run, e.g. results/, or of one trial")
    _add_ties(commands)
    ping = commands.add_parser("ping", help="round trip and goodput to a worker")
    ping.add_argument("address", help="HOST:PORT of a `semgap serve`")
    ping.add_argument("--secret-file", type=Path, help="the worker's token file")
    ping.add_argument("--tls", action="store_true", help=_THEIR_TLS)
    ping.add_argument("--round-trips", type=_positive, default=200, help="64-byte round trips (default: %(default)s)")
    ping.add_argument("--payload-bytes", type=_positive, default=64 << 20, help="bytes sent each way (default: %(default)s)")
    ping.add_argument("--kv", action="store_true", help="also those of the worker's link to its KV host")
    ping.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    ping.add_argument("--cpus", type=_cpus, default=(), help="cores to ping from, e.g. 0")
    ping.add_argument("--parent-pid", type=int, help="end when this process, which started the ping, ends")
    doctor = commands.add_parser("doctor", help="report what this machine has and lacks")
    doctor.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")
    doctor.add_argument("--worker", metavar="HOST:PORT", help="report on the link to this `semgap serve`, and on differences")
    doctor.add_argument("--secret-file", type=Path, help="the worker's token file")
    doctor.add_argument("--tls", action="store_true", help=_THEIR_TLS)
    doctor.add_argument("--model", help="model to compare with --worker (default: all fetched ones); sends missing weights")
    secret = commands.add_parser("secret", help="make a token file for a worker and its clients")
    secret.add_argument("file", type=Path)
    return whole


def _add_serve(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="run a GPU worker that waits for clients")
    serve.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    serve.add_argument("--secret-file", type=Path, help="token file of mode 0600; needed beyond loopback")
    serve.add_argument("--tls", action="store_true", help="take and make connections over TLS 1.3 alone; needs a secret")
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


def _add_kvhost(commands: argparse._SubParsersAction) -> None:
    host = commands.add_parser("kvhost", help="keep KV blocks for workers")
    kept = "most bytes of blocks to keep; drops the least recently used first"
    host.add_argument("--budget-bytes", type=_positive, required=True, metavar="N", help=kept)
    host.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT", help="port 0 takes a free one (default: %(default)s)")
    host.add_argument("--secret-file", type=Path, help="the workers' token file of mode 0600; needed beyond loopback")
    host.add_argument("--tls", action="store_true", help="take connections over TLS 1.3 alone; needs a secret")
    host.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the host to, e.g. 1 or 0,1")
    host.add_argument("--max-connections", type=_positive, default=64, help="workers at a time (default: %(default)s)")
    host.add_argument("--idle-s", type=float, default=3600.0, help="close a connection that is silent this long (default: %(default)s)")
    host.add_argument("--parent-pid", type=int, help="end when this process, which started the host, ends")


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
    run.add_argument("--tls", action="store_true", help="speak TLS with the worker, as worker.tls says; --worker was started with --tls")
    run.add_argument("--output", type=Path, help="directory for the trial's files (default: results/by-hand/MODE/PHASE)")
    run.add_argument("--json", action="store_true", help="print the result as one line of JSON, and progress to stderr")


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


def _add_crate(commands: argparse._SubParsersAction) -> None:
    crate = commands.add_parser("crate", help="archive a finished run as a Workflow RO-Crate")
    crate.add_argument("results", type=Path, help="the directory of a finished run, e.g. results/")
    crate.add_argument("--output", type=Path, metavar="FILE", help="default: crate.zip in the run's directory")
    merged = "the --configfile of the run, merged over config/config.yaml as snakemake does; may be repeated"
    crate.add_argument("--configfile", type=Path, action="append", default=[], metavar="FILE", help=merged)
    crate.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")


def _add_ties(commands: argparse._SubParsersAction) -> None:
    ties = commands.add_parser("ties", help="find prompts on which greedy decoding over fp16 logits leaves the path of local's own")
    ties.add_argument("--model", help="a row of define.models (default: the config's first)")
    merged = "merged over config/config.yaml; exactness has the prompts' length and the tokens after each; may be repeated"
    ties.add_argument("--config", type=Path, action="append", default=[], metavar="FILE", help=merged)
    ties.add_argument("--root", type=Path, default=Path.cwd(), help="directory of the workflow (default: here)")


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
