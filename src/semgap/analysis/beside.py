"""Experiments beside each other: each writes under its own directory of results, and takes an equal result from another's instead of
measuring it again. Equal: made of a cell of the same digest."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from semgap.seal import SealError, read_sealed

CODECS_DIGEST = b"semgap.cell_digest"  # in the metadata of the Parquet schema


def experiments(results: Path, own: Path) -> list[Path]:
    """The directories of all experiments under `results`: `own`, the unnamed one's (`results` itself), the other named ones'."""
    return list(dict.fromkeys([own, results, *sorted(trials.parent for trials in results.glob("*/trials"))]))


def first_equal(places: Sequence[Path], digest: str, digest_of: Callable[[Path], str | None]) -> Path:
    """The first place that holds a whole result of this digest; else the first of all, where it is to be made."""
    return next((place for place in places if digest_of(place) == digest), places[0])


def digest_of_trial(directory: Path, names: Sequence[str]) -> str | None:
    """The digest in a trial's manifest; None if one of its files, `names`, is missing."""
    return digest_of_json(directory / "manifest.json") if all((directory / name).is_file() for name in names) else None


def digest_of_json(file: Path) -> str | None:
    """`cell_digest` of a manifest or an exactness check; None without one, and for a file that is not as it was written."""
    try:
        found = json.loads(read_sealed(file))["cell_digest"]
    except (OSError, SealError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def digest_of_codecs(file: Path) -> str | None:
    """The digest in the metadata of measured codecs; None without one, and for a file that is not as it was written."""
    try:
        return (pq.read_schema(pa.BufferReader(read_sealed(file))).metadata or {}).get(CODECS_DIGEST, b"").decode() or None
    except (OSError, SealError, pa.ArrowInvalid):
        return None
