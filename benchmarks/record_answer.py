"""README's answer: the picture, the explorer, the rows and the sentence of a finished default run, and where they come from.

`make recorded` takes them from results/ into docs/recorded/ and README.md. `--check` writes nothing: exit status 1 if README's block is not
what docs/recorded/answer.json gives.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from semgap.analysis.aggregate import by_setting
from semgap.analysis.figures import gap as gap_figure
from semgap.analysis.figures.style import save_as
from semgap.analysis.gaps import difference_ms
from semgap.analysis.marks import marks_of, rungs
from semgap.analysis.results import Results, load_recorded, recorded_cells
from semgap.analysis.tables import gap

ROOT = Path(__file__).resolve().parents[1]
RECORDED, README = ROOT / "docs/recorded", ROOT / "README.md"
BEGIN, END = "<!-- recorded: `make recorded` writes this block -->\n", "<!-- end of the recorded block -->\n"
PICTURE = "docs/recorded/gap.svg"


def main() -> int:
    """Records, or checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.check:
        record(ROOT / "results", RECORDED)
        write_block(README, block(json.loads((RECORDED / "answer.json").read_text())))
    return check()


def record(results: Path, recorded: Path) -> None:
    """Writes answer.json, the picture and the explorer of a finished run into the directory `recorded`.

    SystemExit if its code was in no commit.
    """
    found = _decoding(load_recorded(results, recorded_cells(results)))
    came = run(found)
    if came["dirty"]:
        sys.exit(f"{results} was measured with files that commit {came['commit'][:10]} does not have; commit them and run `make run` again")
    recorded.mkdir(parents=True, exist_ok=True)
    (recorded / "answer.json").write_text(json.dumps({"rows": rows(found), "gains": gains(found), "run": came}, indent=1) + "\n")
    save_as(gap_figure.plot(found), recorded / Path(PICTURE).name)
    shutil.copyfile(results / "explorer.html", recorded / "explorer.html")


def _decoding(results: Results) -> Results:
    """The decode trials of local modes, of the ladder, and of other modes that claim something."""
    marks = marks_of({name: row for name, row in _modes().items() if set(row) & {"rung", "claims"}})
    wanted = results.rows["mode"].isin(marks) | (results.rows["placement"] == "local")
    shown = results.rows[(results.rows["phase_kind"] == "decode") & wanted]
    return replace(results, rows=shown, marks=marks)


def _modes() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "config/config.yaml").read_text())["define"]["modes"]


def rows(results: Results) -> list[dict[str, Any]]:
    """One row a mode, local ones first, then the ladder: bytes a token, and over each network the gap with its interval, in ms, and the
    number of trials.
    """
    table, payload = gap.table(results), results.rows.groupby("mode", sort=False)["payload_bytes_per_token"].mean()
    made = []
    for mode, own in table.groupby("mode", sort=False):
        gaps = {row["network"]: [row["gap_ms"], row["gap_ms_low"], row["gap_ms_high"]] for _, row in own.iterrows()}
        keeps = results.rows.loc[results.rows["mode"] == mode, "keeps"].iloc[0]
        trials = results.rows[results.rows["mode"] == mode].groupby("network", sort=False)["trial"].nunique().to_dict()
        made.append({"mode": mode, "bytes_per_token": float(payload[mode]), "gap_ms": gaps, "trials": trials, "keeps": keeps})
    local = results.rows.loc[results.rows["placement"] == "local", "mode"].unique().tolist()
    order = [*local, *rungs(results.marks), *results.marks]  # a mode's first place counts
    return sorted(made, key=lambda row: order.index(row["mode"]))


def gains(results: Results) -> list[dict[str, Any]]:
    """Of each network the gap of the ladder's lowest rung less that of the last but one, and that less the highest's, in ms.

    With Welch's 95% interval over trials; nulls where a gap is not known. Rungs that were not run have no place.
    """
    made = []
    for setting, modes in by_setting(results.rows):
        ladder = [mode for mode in rungs(results.marks) if mode in modes]
        for base, mode in ((ladder[0], ladder[-2]), (ladder[-2], ladder[-1])) if len(ladder) > 2 else ():
            gain = difference_ms(results.gaps, setting, base, mode)
            made.append({"network": setting["network"], "base": base, "mode": mode, "gain_ms": [gain.value, gain.low, gain.high]})
    return made


def run(results: Results) -> dict[str, Any]:
    """The run behind the rows: machine, code, time, command."""
    manifest = next(each for each in results.trials.manifests if each["cell"]["phase_spec"]["kind"] == "decode")
    came = manifest["provenance"]
    return {
        "utc": came["utc"],
        "commit": came["git"]["commit"],
        "dirty": came["git"]["dirty"],
        "cpu": came["machine"]["cpu"],
        "cpus": came["machine"]["cpus"],
        "command": "make run",
        "model": manifest["cell"]["model"],
        "dtype": manifest["cell"]["dtype"],
        "steps": manifest["cell"]["phase_spec"]["steps"],
    }


def block(answer: dict[str, Any]) -> str:
    """README's block."""
    return BEGIN + "\n".join(_lines(answer["rows"], answer["gains"], answer["run"])) + "\n" + END


def _lines(found: list[dict[str, Any]], gained: list[dict[str, Any]], came: dict[str, Any]) -> Iterator[str]:
    ladder = rungs(marks_of({name: row for name, row in _modes().items() if row.get("rung")}))
    by_mode = {row["mode"]: row for row in found}
    base, top = by_mode[ladder[0]], by_mode[[mode for mode in ladder if mode in by_mode][-1]]
    networks = list(dict.fromkeys(network for row in found for network in row["gap_ms"]))
    far = networks[-1]
    times = base["bytes_per_token"] / top["bytes_per_token"]
    tokens = "other tokens" if top["keeps"] == "lossy" else "the same tokens"
    yield (
        f"**The finding.** Over {_network(far)}, a remote GPU that only keeps weights and KV cache (`{base['mode']}`) adds "
        f"{_ms(base['gap_ms'][far])} to each token. A runtime that knows what it sends (`{top['mode']}`) adds {_ms(top['gap_ms'][far])}, "
        f"with {times:,.0f} times fewer bytes and {tokens}. {_shares([each for each in gained if each['network'] == far], came['steps'])}"
    )
    yield ""
    yield f"![Where a token's time goes, by mode and network]({PICTURE})"
    yield ""
    yield f"| mode | it knows or does | bytes a token | {' | '.join(f'gap (ms), {_network(name)}' for name in networks)} | keeps |"
    yield "| --- | --- | ---: |" + " ---: |" * len(networks) + " --- |"
    for row in found:
        gaps = [_interval(row["gap_ms"].get(network)) for network in networks]
        adds = _adds(row["mode"], ladder, by_mode)
        yield f"| `{row['mode']}` | {adds} | {_bytes(row['bytes_per_token'])} | {' | '.join(gaps)} | {row['keeps']} |"
    yield ""
    yield (
        f"{came['model']}, {came['dtype']}, {_trials(found)}; gaps are milliseconds per token, means with 95% intervals over "
        f"trials. Up to `{top['mode']}`, a row knows what those above it know, and its own. "
        f"`{came['command']}` at commit {came['commit'][:10]}, {came['utc'][:10]}, {came['cpus']} cores of {came['cpu']}."
    )


def _trials(found: list[dict[str, Any]]) -> str:
    """The number of trials of a mode over a network, and which have more."""
    counts = {(row["mode"], network): count for row in found for network, count in row["trials"].items()}
    least = min(counts.values())
    more = [f"{count} of `{mode}` over {_network(network)}" for (mode, network), count in counts.items() if count > least]
    return ", ".join([f"{least} trials a mode", *more])


def _shares(gained: list[dict[str, Any]], steps: int) -> str:
    """The parts of the gain: of the rungs below the highest, and of the highest, if it wants several tokens in one round trip."""
    if not gained or _modes()[gained[-1]["mode"]].get("window", 1) < 2:
        return ""
    (below, of_bytes), (top, of_trips) = ((each["mode"], _resolved(each["gain_ms"])) for each in gained)
    asks = f"`{top}` asks for the {steps} tokens of a request in one round trip, where the others need one for each"
    unresolved = "The run does not resolve"
    first = f"The bytes are worth {of_bytes} of that (`{below}`)." if of_bytes else f"{unresolved} the worth of the bytes (`{below}`)."
    second = f"It is worth {of_trips} that {asks}." if of_trips else f"{unresolved} what it is worth that {asks}."
    return f"{first} {second}"


def _resolved(gain_ms: list[float]) -> str | None:
    """A difference with its interval; None if the interval holds 0 or is not known."""
    value, low, high = gain_ms
    return None if low is None or low <= 0 <= high else f"{value:.1f} ms [{low:.1f} to {high:.1f}]"


def _adds(mode: str, ladder: list[str], by_mode: dict[str, Any]) -> str:
    """The words of a row: a rung's own, after those of the rungs before it that were not run; or another mode's."""
    define = _modes()
    if mode not in ladder:
        return str(define[mode].get("reference", "no network"))
    at = ladder.index(mode)
    first = max((number for number in range(at) if ladder[number] in by_mode), default=-1) + 1
    return "; ".join(define[each]["rung"]["adds"] for each in ladder[first : at + 1])


def _bytes(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.1f}"


def _network(name: str) -> str:
    row = yaml.safe_load((ROOT / "config/config.yaml").read_text())["define"]["networks"][name]
    return name if row["kind"] == "loopback" else f"{row['rate'][:-4]} {row['rate'][-4:]} and {row['rtt_ms']} ms"


def _ms(gap_ms: list[float]) -> str:
    return f"{gap_ms[0]:.1f} ms"


def _interval(gap_ms: list[float] | None) -> str:
    return "-" if gap_ms is None else f"{gap_ms[0]:.2f} [{gap_ms[1]:.2f} to {gap_ms[2]:.2f}]"


def write_block(readme: Path, text: str) -> None:
    """Puts the block in its place in README."""
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + text + rest.partition(END)[2])


def check() -> int:
    """1, with the first line that differs, if README's block is not that of docs/recorded/answer.json."""
    expected = block(json.loads((RECORDED / "answer.json").read_text())).splitlines()
    found = (BEGIN + README.read_text().partition(BEGIN)[2].partition(END)[0] + END).splitlines()
    for theirs, ours in zip(found + [""] * len(expected), expected, strict=False):
        if theirs != ours:
            print(f"README.md says\n  {theirs}\nthe recorded run gives\n  {ours}\nrun `make recorded` after a default run", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
