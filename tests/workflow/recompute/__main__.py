"""Recomputes every number of results.csv and the tables from a run's raw files, and names each one that differs.

    python tests/workflow/recompute [RESULTS] [--configfile FILE ...]

It imports nothing of semgap: each formula is that of results/README.md and docs/method.md. It reads the trials, the exactness, the codecs
and the config; of the tables it reads only the numbers that it compares. Exit status 1 if one differs or a row is missing.

Not recomputed: numbers of a GPU's samples, which it names where there are any; prices of modes with `ahead`; the reasons of nulls; a load's
row of results.csv, whose numbers are in table load; table load_facts; prices of loads and of waits for KV blocks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from facts import facts
from handovers import handover
from hypotheses import hypotheses
from intervals import Row, is_null
from loads import load
from prefixes import prefix
from pressure import recovery, recovery_pairs
from prices import network, price
from run import Run, read_config
from tables import break_even, codecs, exactness, gap, ladder, results, summary

ROOT = Path(__file__).resolve().parents[3]


AT = ("model", "network", "phase", "mode")


RELATIVE, ABSOLUTE = 1e-9, 1e-12  # the second for differences of numbers that are nearly equal


TABLES: dict[str, tuple[Callable[[Run], list[Row]], tuple[str, ...]]] = {
    "results": (results, ("model", "network", "mode", "phase", "trial")),
    "gap": (gap, AT),
    "summary": (summary, AT),
    "ladder": (ladder, AT),
    "facts": (facts, ("model", "network", "phase", "fact")),
    "network": (network, ("model", "network", "mode", "phase", "metric")),
    "price": (price, ("model", "phase", "mode", "metric")),
    "recovery": (recovery, (*AT, "evict_fraction")),
    "recovery_pairs": (recovery_pairs, (*AT, "against", "evict_fraction")),
    "prefix": (prefix, (*AT, "prefix_tokens")),
    "handover": (handover, AT),
    "load": (load, (*AT, "level")),
    "exactness": (exactness, ("model", "mode")),
    "codecs": (codecs, ("model", "tensor", "dtype", "codec", "device")),
    "break_even": (break_even, ("model", "tensor", "dtype", "codec", "device")),
    "hypotheses": (hypotheses, ("hypothesis", *AT)),
}


def equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        theirs = json.loads(theirs)
        return len(theirs) == len(ours) and all(map(equal, theirs, ours))
    if is_null(theirs) or is_null(ours):
        return is_null(theirs) and is_null(ours)
    if isinstance(ours, (bool | np.bool_, str)):
        return str(theirs) == str(ours)
    return math.isclose(float(theirs), float(ours), rel_tol=RELATIVE, abs_tol=ABSOLUTE)


def compare(table: str, theirs: pd.DataFrame, ours: list[Row], keys: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """Compared values, a line for each mismatch, and the numeric columns that no function recomputes."""

    def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple("" if is_null(row[key]) else f"{row[key]:g}" if isinstance(row[key], float) else str(row[key]) for key in keys)

    found, wanted = ({key_of(row): row for row in rows} for rows in (theirs.to_dict("records"), ours))
    lines = [f"{table}: {' '.join(key)}: theirs: no row" for key in wanted if key not in found]
    lines += [f"{table}: {' '.join(key)}: ours: no row" for key in found if key not in wanted]
    columns = {column for row in ours for column in row}
    lines += [f"{table}: theirs: no column {column}" for column in columns - set(theirs.columns)]
    values = 0
    for key, column in itertools.product(found, [name for name in theirs.columns if name in columns]):
        if key in wanted:
            values += 1
            one, other = found[key][column], wanted[key].get(column)
            if not equal(one, other):
                lines.append(f"{table}: {' '.join(key)}: {column}: theirs {one!r}, ours {other!r}")
    numeric = [name for name in theirs.columns if pd.api.types.is_numeric_dtype(theirs[name]) and theirs[name].notna().any()]
    return values, lines, [name for name in numeric if name not in columns]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "results", help="the directory of the run's results")
    parser.add_argument("--configfile", type=Path, nargs="*", default=[], help="as the run's: merged over config/config.yaml")
    parser.add_argument("--tables", nargs="*", default=list(TABLES), choices=list(TABLES), metavar="TABLE", help="only these")
    arguments = parser.parse_args()
    run = Run(arguments.results, read_config([ROOT / "config/config.yaml", *arguments.configfile]))
    if not (run.results / "results.csv").is_file():
        parser.error(f"{run.results} has no results.csv; name the directory of a finished run, e.g. results")
    status = 0
    for table in arguments.tables:
        make, keys = TABLES[table]
        file = run.results / ("results.csv" if table == "results" else f"tables/{table}.csv")
        theirs = pd.read_csv(file)
        if table == "price":
            theirs = theirs[~theirs["metric"].str.endswith("of a load") & (theirs["metric"] != "wait for KV blocks")]
        if table == "results":
            theirs = theirs[theirs["phase_kind"] != "load"]
        values, lines, left = compare(table, theirs, make(run), keys)
        print(*lines, sep="\n", end="\n" if lines else "")
        print(f"{table}: {values} values compared, {len(lines)} mismatches" + (f"; not recomputed: {', '.join(left)}" if left else ""))
        status |= bool(lines)
    return status


if __name__ == "__main__":
    sys.exit(main())
