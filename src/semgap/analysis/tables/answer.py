"""The run's answer on one screen: bytes, gap and exactness in a line each, the ladder, and what the run can resolve."""

from collections.abc import Iterator

import pandas as pd

from semgap.analysis.aggregate import PAYLOAD, SETTING
from semgap.analysis.marks import base_of, rungs
from semgap.analysis.power import power_notes
from semgap.analysis.results import Results
from semgap.analysis.tables import gap, ladder, load


def answer(results: Results) -> str:
    """Text of at most a screen for a run of a ladder in decode phases. Without a ladder: the modes that decoded. A load adds a line."""
    table, loads = ladder.table(results), list(_load_lines(results))
    decoding = results.rows.loc[results.rows["phase_kind"] == "decode", SETTING].drop_duplicates()
    table = table.astype(dict.fromkeys(SETTING, "str")).merge(decoding.astype("str"), on=SETTING)
    run = [mode for mode in rungs(results.marks) if (table["mode"] == mode).any()]
    base = base_of(results.marks)
    if len(run) < 2 or base not in run:
        return "\n".join(_without_ladder(results, loads)) + "\n"
    lines = [_bytes_line(table, base, run[-1]), _gap_line(table, base, run[-1]), _exactness_line(results), *loads]
    return "\n".join([*lines, "", *_ladder_lines(table), *_meaningless_lines(results), "", *_power_lines(results, table)]) + "\n"


def _without_ladder(results: Results, loads: list[str]) -> Iterator[str]:
    """Bytes and gap of each mode of a decode phase, and whether modes keep what they promise."""
    decoding = results.rows[results.rows["phase_kind"] == "decode"]
    if decoding.empty:
        yield from ("No decode phase was run; results/tables/ has the modes.", *loads)
        return
    payload = decoding.groupby([*SETTING, "mode"], sort=False)[PAYLOAD].mean().reset_index()
    yield "A ladder needs two of its modes in a decode phase; results/tables/ has more on these modes."
    yield from (_exactness_line(results), *loads, "")
    yield from _ladder_lines(payload.merge(gap.table(results), on=[*SETTING, "mode"]))
    yield from _meaningless_lines(results)


def _bytes_line(table: pd.DataFrame, base: str, top: str) -> str:
    low, high = (_first(table, mode)[PAYLOAD] for mode in (base, top))
    return f"bytes      {top} sends {high:,.0f} B a token, {base} {low:,.0f} B: {low / high:,.0f} times as many"


def _gap_line(table: pd.DataFrame, base: str, top: str) -> str:
    each = [
        f"over {network} {_gap(_first(rows, top))}, {base} {_gap(_first(rows, base))}"
        for network, rows in table.groupby("network", sort=False)
        if {base, top} <= set(rows["mode"])
    ]
    return f"gap        {top} costs a token {'; '.join(each)}"


def _load_lines(results: Results) -> Iterator[str]:
    """The last mode of each closed loop under its heaviest load, against the best mode that knows nothing."""
    table = load.table(results)
    for _, rows in table[table["concurrency"].notna()].groupby(SETTING, sort=False):
        most = rows[rows["concurrency"] == rows["concurrency"].max()]
        last, blind = most.iloc[-1], most[most["mode"] == most["blind"].iloc[-1]]
        if blind.empty or last["mode"] == last["blind"]:
            continue
        times = last["tokens_per_s"] / blind["tokens_per_s"].iloc[0]
        yield (
            f"load       {last['load'].removeprefix('N = ')} requests at once get {last['tokens_per_s']:.0f} tokens/s from {last['mode']} "
            f"({last['phase']}, {last['network']}): {times:.1f} times {last['blind']}'s"
        )


def _exactness_line(results: Results) -> str:
    """The modes that promise equal tokens or bits, and whether each kept it in all its trials and in its check."""
    columns = ["mode", "keeps", "promise_kept", "tokens_compared", "tokens_equal"]
    each = pd.concat([results.rows[columns], results.exactness[columns]]).dropna(subset="promise_kept")
    exact = each[each["keeps"].isin(("tokens", "bitwise"))]
    if exact.empty:
        return "exactness  not checked"
    kept = exact["promise_kept"].astype(bool).groupby(exact["mode"]).all()
    compared, equal = int(exact["tokens_compared"].sum()), int(exact["tokens_equal"].sum())
    return (
        f"exactness  {int(kept.sum())} of {len(kept)} exact modes keep their promise in every trial and check; "
        f"{equal:,} of {compared:,} of their tokens equal the reference's"
    )


def _ladder_lines(table: pd.DataFrame) -> Iterator[str]:
    networks = list(dict.fromkeys(table["network"]))
    wide = max(map(len, [*table["mode"], "mode"])) + 2
    yield f"{'mode':<{wide}}{'B/token':>12}  " + "".join(f"{'gap, ' + network:<28}" for network in networks)
    for mode in dict.fromkeys(table["mode"]):
        own = table[table["mode"] == mode]
        gaps = [_gap(_first(own[own["network"] == network], mode)) if (own["network"] == network).any() else "-" for network in networks]
        yield f"{mode:<{wide}}{_first(own, mode)[PAYLOAD]:>12,.0f}  " + "".join(f"{gap:<28}" for gap in gaps)


def _meaningless_lines(results: Results) -> Iterator[str]:
    """The modes whose bytes depend on values that no trained model gave."""
    known = results.rows.dropna(subset="ratios_reason")
    for reason, rows in known[known["phase_kind"] == "decode"].groupby("ratios_reason", sort=False):
        yield f"B/token of {', '.join(dict.fromkeys(rows['mode']))}: {reason}"


def _power_lines(results: Results, table: pd.DataFrame) -> Iterator[str]:
    notes = power_notes(results)
    for setting in table[SETTING].drop_duplicates().itertuples(index=False):
        note = notes.get(tuple(setting))
        if note:
            yield f"{setting.network}: {note}"


def _first(table: pd.DataFrame, mode: str) -> pd.Series:
    return table[table["mode"] == mode].iloc[0]


def _gap(row: pd.Series) -> str:
    if pd.isna(row["gap_ms"]):
        return "not known"
    if pd.isna(row["gap_ms_low"]):
        return f"{row['gap_ms']:.2f} ms"
    return f"{row['gap_ms']:.2f} ms [{row['gap_ms_low']:.2f} to {row['gap_ms_high']:.2f}]"
