"""Edits of every file of a run and of its model: what reads them refuses, or has the very values of the clean run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from test_verify import written_run

from semgap.analysis.beside import digest_of_codecs, digest_of_json
from semgap.analysis.load import UnusableTrial, load_trials
from semgap.analysis.results import load_codecs, load_exactness
from semgap.analysis.verify import OTHERS, verify
from semgap.engine.model_files import ModelFileError, verify_model
from torture.campaign import Book, Try
from torture.mutations import damaged
from torture.recording import tiny_model
from torture.workflows import Workflow

_EACH, _SHORT = 400, 40
_TYPED = (UnusableTrial, ModelFileError)
_FRAMES = ("requests", "steps", "ledger", "tcp", "host", "gpu", "control", "load", "batches")
Values = dict[str, Any]


@dataclass(frozen=True)
class Read:
    """A directory of files, and what is read of it."""

    root: Path
    read: Callable[[Path], Values]
    clean: Values

    @classmethod
    def of(cls, root: Path, read: Callable[[Path], Values]) -> Read:
        return cls(root, read, read(root))


def attack(book: Book, place: Path, short: bool) -> None:
    """Edits a copy of one file a try."""
    sources = {"results, written": _read(written_run(place / "written")), "model": Read.of(tiny_model(place / "model"), _values_of_model)}
    if not short:
        flow = Workflow.made(place / "clone")
        flow.run("--forceall")
        assert flow.clone.snakemake().returncode == 0
        sources["results, measured"] = _read(flow.clone.root / "results")
    for one in book.turns(dict.fromkeys(sources, _SHORT if short else _EACH)):
        source = sources[one.target]
        outcome, faults = judged(source, *_edit(one, source.root))
        book.judged(one, outcome, faults)
    for target in book.rows:
        book.note(target, "an edit of one file")


def _read(results: Path) -> Read:
    return Read.of(results, _Listed.of(results).values)


def judged(source: Read, file: Path, words: str, before: Mapping[Path, bytes | None]) -> tuple[str, list[str]]:
    """The outcome of an edit that was made, and its faults. Puts the files back."""
    try:
        values = source.read(source.root)
    except _TYPED as error:
        named = any(part in str(error) for part in (file.name, str(file.parent)))
        return "refused", [] if named else [f"{words} was refused without its name: {error}"]
    except Exception as error:
        return "refused", [f"{words} ended in {type(error).__name__}: {error}"]
    finally:
        for path, data in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
    wrong = [name for name in source.clean if not _same(values.get(name), source.clean[name])]
    return "survived", [f"{words} changed {', '.join(wrong)}, and nobody noticed"] if wrong else []


def _same(one: Any, other: Any) -> bool:
    return bool(one.equals(other)) if isinstance(one, pd.DataFrame) else one == other


@dataclass(frozen=True)
class _Listed:
    """What a run lists of its results, by file or directory, each with the digest of its cell: as Snakemake gives it to the tables."""

    trials: Mapping[str, str]
    exactness: Mapping[str, str]
    codecs: Mapping[str, str]

    @classmethod
    def of(cls, results: Path) -> _Listed:
        trials = {str(each.parent): digest_of_json(each) or "" for each in sorted(results.rglob("manifest.json"))}
        exactness = {str(each): digest_of_json(each) or "" for each in sorted((results / "exactness").rglob("*.json"))}
        return cls(trials, exactness, {str(each): digest_of_codecs(each) or "" for each in sorted((results / "codecs").rglob("*.parquet"))})

    def values(self, results: Path) -> Values:
        """All that tables and figures read of a run. UnusableTrial names what does not stand.

        The tables' own readers come first, then `semgap verify`, which alone reads what other rules use.
        """
        trials = load_trials([Path(each) for each in self.trials], self.trials)
        values = {name: getattr(trials, name) for name in _FRAMES} | {"manifests": trials.manifests}
        values["exactness"] = load_exactness([Path(each) for each in self.exactness], self.exactness)
        values["codecs"] = load_codecs([Path(each) for each in self.codecs], self.codecs)
        verdict = verify(results)
        if verdict.faults:
            raise UnusableTrial("; ".join(verdict.faults))
        rest = (file for kind in OTHERS if kind not in values for file in sorted((results / kind).rglob("*.*")))
        return values | {"others": {str(file.relative_to(results)): file.read_bytes() for file in rest}}


def _values_of_model(model: Path) -> Values:
    digest = verify_model(model)
    return {"digest": digest, "files": {name: (model / name).read_bytes() for name in (digest.file, *digest.companions)}}


def _edit(one: Try, root: Path) -> tuple[Path, str, dict[Path, bytes | None]]:
    """Edits a file so that its bytes are others. Gives it, words for it, and what was there before."""
    rng = one.rng
    files = sorted(file for file in root.rglob("*") if file.is_file() and file.stat().st_size)
    while True:
        file, name = rng.choice(files), rng.choice(list(EDITS))
        data = file.read_bytes()
        other = rng.choice([each for each in files if each.suffix == file.suffix])
        edited = EDITS[name](rng, file, data, other.read_bytes())
        if edited is NOTHING or edited == data or (edited is None and file.relative_to(root).parts[0] in OTHERS):
            continue  # Snakemake makes anew what it lists and does not find
        file.unlink() if edited is None else file.write_bytes(edited)
        return file, f"{name} of {file.relative_to(root)}", {file: data}


NOTHING = b"this edit does not apply"


def _rows(rng: random.Random, file: Path, _: bytes, __: bytes) -> bytes | None:
    """A table with a row more or less, or a column of other numbers, as a person might write it."""
    if file.suffix != ".parquet":
        return NOTHING
    table = pq.read_table(file, partitioning=None)
    if not table.num_rows:
        return NOTHING
    numbers = [at for at, field in enumerate(table.schema) if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)]
    kind = rng.choice(("less", "more", "halved"))
    if kind == "halved" and numbers:
        at = rng.choice(numbers)
        field = table.schema.field(at)
        values = [None if value is None else type(value)(value / 2) for value in table.column(at).to_pylist()]
        changed = table.set_column(at, field, pa.array(values, field.type))
    else:
        changed = table.slice(1) if kind == "less" else pa.concat_tables([table, table.slice(0, 1)])
    copy = file.with_suffix(".edited")
    pq.write_table(changed, copy)
    data = copy.read_bytes()
    copy.unlink()
    return data


def _number(rng: random.Random, file: Path, data: bytes, _: bytes) -> bytes | None:
    """JSON or CSV with another digit."""
    if file.suffix not in (".json", ".csv"):
        return NOTHING
    digits = [at for at, byte in enumerate(data) if byte in b"123456789"]
    if not digits:
        return NOTHING
    at = rng.choice(digits)
    return data[:at] + str(rng.choice([digit for digit in range(1, 10) if digit != data[at] - 48])).encode() + data[at + 1 :]


def _zeroed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


EDITS: dict[str, Callable[[random.Random, Path, bytes, bytes], bytes | None]] = {
    "a flipped bit": lambda rng, _, data, __: damaged(rng, data, 1),
    "flipped bits": lambda rng, _, data, __: damaged(rng, data, 30),
    "a cut": lambda rng, _, data, __: data[: rng.randrange(len(data))],
    "bytes more": lambda rng, _, data, __: data + rng.randbytes(rng.randint(1, 100)),
    "zeros": lambda rng, _, data, __: bytes(len(data)),
    "a block of zeros": lambda rng, _, data, __: _zeroed(data, rng.randrange(len(data))),
    "a removal": lambda *_: None,
    "another file's bytes": lambda _, __, ___, other: other,
    "other rows": _rows,
    "another number": _number,
}
