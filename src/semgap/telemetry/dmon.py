"""Parser of `nvidia-smi dmon`, driven by its header.

dmon prints two comment lines (the columns' names, their units), repeats them every few dozen lines, and prints one line per GPU and
sample in between. The columns depend on `-s`, `-o` and the driver, so the parser goes by names, never by positions.

A table's column is `{name}_{unit}`. Known names are spelled out (`pwr` W -> `power_w`, `gtemp` C -> `temperature_c`, `rxpci` MB/s ->
`pcie_rx_mb_per_s`), known units are words (`%` -> `percent`, `Idx` -> `index`); unknown ones become lower case. `Date` and `Time`
(`-o DT`) stay text in `date` and `time`. Units are dmon's: its MB are MiB for memory. `rx` is host to device, `tx` device to host.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from semgap.telemetry.samples import T_S, Column, ColumnType, Row, Value

_NAMES = {
    "pwr": "power",
    "gtemp": "temperature",
    "mtemp": "memory_temperature",
    "mem": "memory_controller",
    "enc": "encoder",
    "dec": "decoder",
    "jpg": "jpeg",
    "ofa": "optical_flow",
    "mclk": "memory_clock",
    "pclk": "processor_clock",
    "pviol": "power_violation",
    "tviol": "thermal_violation",
    "fb": "framebuffer",
    "ccpm": "protected_memory",
    "sbecc": "single_bit_ecc",
    "dbecc": "double_bit_ecc",
    "pci": "pcie_replay",
    "rxpci": "pcie_rx",
    "txpci": "pcie_tx",
}
_UNITS = {"%": "percent", "Idx": "index", "MB/s": "mb_per_s", "GB/s": "gb_per_s", "errs": "errors"}
_TEXT = ("date", "time")
_NULL = "-"


class DmonFormatError(ValueError):
    """A line of dmon does not fit its header; `line` is the line."""

    def __init__(self, problem: str, line: str) -> None:
        super().__init__(f"{problem}: {line.strip()!r}")
        self.line = line


@dataclass(frozen=True)
class DmonColumn:
    """One column: its `name` and `unit` in dmon's header, and its `key`, the name in the table."""

    name: str
    unit: str
    key: str


def column_key(name: str, unit: str) -> str:
    """The table's name of a dmon column, e.g. ('pwr', 'W') -> 'power_w'; see the module's docstring."""
    if name.lower() in _TEXT:
        return name.lower()
    return f"{_NAMES.get(name, name)}_{_UNITS.get(unit, unit)}".lower()


def parse_header(names_line: str, units_line: str) -> tuple[DmonColumn, ...]:
    """The columns of dmon's two header lines. DmonFormatError if they differ in length or give a column twice."""
    names, units = _words(names_line), _words(units_line)
    if len(names) != len(units):
        raise DmonFormatError(f"header has {len(names)} names, but its line of units has {len(units)}", units_line)
    columns = tuple(DmonColumn(name, unit, column_key(name, unit)) for name, unit in zip(names, units, strict=True))
    if len({column.key for column in columns}) != len(columns):
        raise DmonFormatError("header gives a column twice", names_line)
    return columns


class DmonParser:
    """Parses dmon's output line by line. `columns` are all columns so far, in order of appearance."""

    def __init__(self) -> None:
        self.columns: tuple[DmonColumn, ...] = ()
        self._header: tuple[DmonColumn, ...] = ()
        self._names_line: str | None = None

    def feed(self, line: str) -> Row | None:
        """The sample of a line, {key: value}, or None for a header line or an empty line.

        `-` is None; `gpu_index` is an int, dates and times are text, all others are floats. DmonFormatError for a line without a
        header, of another length than its header, or with a field that is not a number; the parser can go on with the next line.
        """
        if line.lstrip().startswith("#"):
            self._read_header_line(line)
            return None
        fields = line.split()
        if not fields:
            return None
        header = self._header
        if not header:
            raise DmonFormatError("data before the header", line)
        if len(fields) != len(header):
            raise DmonFormatError(f"{len(fields)} fields under a header of {len(header)} columns", line)
        return {column.key: _value(column, field, line) for column, field in zip(header, fields, strict=True)}

    def _read_header_line(self, line: str) -> None:
        if self._names_line is None:
            # Names without units are no header yet, and the old header no longer holds.
            self._names_line, self._header = line, ()
            return
        names_line, self._names_line = self._names_line, None
        self._header = parse_header(names_line, line)
        self.columns += tuple(column for column in self._header if column not in self.columns)


def table_columns(seen: Iterable[DmonColumn] = ()) -> tuple[Column, ...]:
    """The table's schema: `t_s`, the columns of `dmon -s pucvmet` on an H100, then the others of `seen`."""
    every = [*_H100_COLUMNS, *(column for column in seen if column.key not in _H100_KEYS)]
    kinds: dict[str, ColumnType] = {**dict.fromkeys(_TEXT, "string"), "gpu_index": "int64"}
    return (T_S, *(Column(c.key, kinds.get(c.key, "float64"), f"dmon {c.name} ({c.unit})") for c in every))


def _words(header_line: str) -> list[str]:
    return header_line.strip().removeprefix("#").split()


def _value(column: DmonColumn, field: str, line: str) -> Value:
    if field == _NULL:
        return None
    if column.key in _TEXT:
        return field
    if not re.fullmatch(r"-?\d+(\.\d+)?", field):
        raise DmonFormatError(f"column {column.name!r} holds {field!r}, which is not a number", line)
    return int(field) if column.key == "gpu_index" else float(field)


_H100_COLUMNS = parse_header(
    "# gpu pwr gtemp mtemp sm mem enc dec jpg ofa mclk pclk pviol tviol fb bar1 ccpm sbecc dbecc pci rxpci txpci",
    "# Idx W C C % % % % % % MHz MHz % bool MB MB MB errs errs errs MB/s MB/s",
)
_H100_KEYS = frozenset(column.key for column in _H100_COLUMNS)
