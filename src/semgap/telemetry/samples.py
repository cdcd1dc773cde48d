"""The recording of a source, and its file."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

ColumnType = Literal["float64", "int64", "string"]
Value = float | int | str | None
Row = Mapping[str, Value]
NULL_REASONS_KEY = b"semgap.null_reasons"


@dataclass(frozen=True)
class Column:
    """One column of a source's table: its name (with unit), its Arrow type, and its meaning."""

    name: str
    kind: ColumnType
    meaning: str


T_S = Column("t_s", "float64", "CLOCK_MONOTONIC of this host when the sample was taken, in seconds")


@dataclass(frozen=True)
class Cost:
    """Cost of a sampler from the end of its first sample to the end of its last, `span_s` seconds.

    `samples`: readings after the first. `cpu_s`: CPU time of its process and of its child. `busy_s`: wall time inside the readings,
    waits for the driver included; None for dmon, which reads by itself.
    """

    samples: int
    span_s: float
    cpu_s: float
    busy_s: float | None

    def describe(self) -> dict[str, float | None]:
        """The fields; CPU seconds per sample; CPU time and time inside readings as shares of wall time (CPU, 1: a whole core)."""
        return {
            **asdict(self),
            "cpu_s_per_sample": self.cpu_s / self.samples if self.samples else None,
            "core_share": self.cpu_s / self.span_s if self.span_s > 0 else None,
            "wall_share": self.busy_s / self.span_s if self.busy_s is not None and self.span_s > 0 else None,
        }


@dataclass(frozen=True)
class Recording:
    """The samples of one source.

    `null_reasons` says, per column, why values are missing; `reason` sums them up in one line (None: nothing is missing). `cost` is
    None if nothing was sampled.
    """

    columns: tuple[Column, ...]
    rows: Sequence[Row]
    null_reasons: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    cost: Cost | None = None


def write_samples(path: Path, recording: Recording) -> None:
    """Writes a recording as one JSON file, even without rows. The file appears whole or not at all.

    A sampler ends between a trial's last step and its next one, and loading a library of tables would take longer than all else there.
    """
    columns = [asdict(column) for column in recording.columns]
    rows = [[row.get(column.name) for column in recording.columns] for row in recording.rows]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"columns": columns, "rows": rows, "null_reasons": dict(recording.null_reasons)}))
    partial.replace(path)


def read_samples(path: Path) -> "pa.Table":
    """The table of a file of `write_samples`, with the full schema.

    The column meanings are field metadata; `null_reasons` is JSON under the schema's metadata key `semgap.null_reasons`.
    """
    import pyarrow as pa

    held = json.loads(path.read_text())
    columns = [Column(**column) for column in held["columns"]]
    fields = [pa.field(column.name, pa.type_for_alias(column.kind), metadata={"meaning": column.meaning}) for column in columns]
    schema = pa.schema(fields, metadata={NULL_REASONS_KEY: json.dumps(held["null_reasons"]).encode()})
    values = list(zip(*held["rows"], strict=True)) or [()] * len(columns)
    return pa.table([pa.array(value, field.type) for value, field in zip(values, fields, strict=True)], schema=schema)
