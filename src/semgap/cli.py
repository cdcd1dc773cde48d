"""`semgap serve | run | ping | doctor | secret`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """The command line. Gives the exit status; errors go to stderr in one line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    return options.command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semgap", description=__doc__)
    commands = parser.add_subparsers(required=True)
    serve = commands.add_parser("serve", help="run a GPU worker that waits for clients")
    serve.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT; port 0 takes a free one (default: %(default)s)")
    serve.add_argument("--secret-file", type=Path, help="token file of mode 0600; needed beyond loopback")
    serve.add_argument("--threads", type=int, default=1, help="CPU threads of the executor (default: %(default)s)")
    serve.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    serve.add_argument("--cpus", type=_cpus, default=(), help="cores to pin the worker to, e.g. 1 or 0,1")
    serve.add_argument("--max-sessions", type=int, default=8, help="clients at a time (default: %(default)s)")
    serve.add_argument("--idle-s", type=float, default=120.0, help="close a session that is silent this long (default: %(default)s)")
    serve.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)
    serve.set_defaults(command=_serve)
    return parser


def _cpus(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _serve(options: argparse.Namespace) -> int:
    from semgap.lifetime import end_with_parent
    from semgap.link import AuthError
    from semgap.worker import ServeError, ServeOptions, serve

    if options.parent_pid:
        end_with_parent(options.parent_pid)
    try:
        serve(
            ServeOptions(
                listen=options.listen,
                secret_file=options.secret_file,
                threads=options.threads,
                device=options.device,
                cpus=options.cpus,
                max_sessions=options.max_sessions,
                idle_s=options.idle_s,
            )
        )
    except (ServeError, AuthError, ValueError) as error:
        print(f"semgap serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
