"""Links as a user lists them: round trips crossed with rates, each a value or a range, e.g. 0.2ms,10ms and 100Mbit..10Gbit."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from semgap.analysis.links import LinkModel, rtt_s
from semgap.network.spec import bits_per_s

LINK_COLUMNS = ("rtt", "rate", "rtt_ms", "rate_mbit_per_s")


@dataclass(frozen=True)
class LinkGrid:
    """Every round trip with every rate. Both map the text of a value to its number, in the order of the list."""

    rtt_ms: Mapping[str, float]
    rate_mbit_per_s: Mapping[str, float]

    @classmethod
    def parsed(cls, rtts: str, rates: str) -> "LinkGrid":
        """From lists with commas; `a..b` stands for both ends and the preferred values between them. Equal values count once.

        ValueError names the wrong item and the way out.
        """
        trips, speeds = _ROUND_TRIP.listed(rtts), _RATE.listed(rates)
        return cls({text: 1e3 * value for text, value in trips.items()}, {text: value / 1e6 for text, value in speeds.items()})

    def __len__(self) -> int:
        return len(self.rtt_ms) * len(self.rate_mbit_per_s)

    def links(self) -> Iterator[tuple[dict[str, Any], LinkModel]]:
        """The columns `LINK_COLUMNS` of each link, and its model: all rates of the first round trip, then those of the second one."""
        for rtt, trip_ms in self.rtt_ms.items():
            for rate, mbit in self.rate_mbit_per_s.items():
                yield dict(zip(LINK_COLUMNS, (rtt, rate, trip_ms, mbit), strict=True)), LinkModel.parsed(rtt, rate)


@dataclass(frozen=True)
class _Quantity:
    """A quantity that a list holds, with an example of a list. `number` reads a text, `text` writes a number.

    Preferred values are `digits` times powers of 10, about evenly spread on a log scale.
    """

    name: str
    example: str
    number: Callable[[str], float]
    text: Callable[[float], str]
    digits: tuple[float, ...]

    def listed(self, texts: str) -> dict[str, float]:
        """The numbers of a list by their texts."""
        found: dict[float, str] = {}
        for item in texts.split(","):
            if not item.strip():
                raise ValueError(f"list of {self.name}s {texts!r} has an empty item; write values and ranges, e.g. {self.example}")
            for text in self._range(item.strip()) if ".." in item else [item.strip()]:
                found.setdefault(float(f"{self.number(text):.9g}"), text)
        return {text: self.number(text) for text in found.values()}

    def _range(self, item: str) -> list[str]:
        ends = [end.strip() for end in item.split("..")]
        if len(ends) != 2 or not all(ends):
            raise ValueError(f"{self.name} range {item!r} is not two values with .. between them; write it as in {self.example}")
        try:
            low, high = map(self.number, ends)
        except ValueError as error:
            raise ValueError(f"{self.name} range {item!r}: {error}") from error
        if low > high:
            raise ValueError(f"{self.name} range {item!r} falls; write {ends[1]}..{ends[0]}")
        if low == 0:
            raise ValueError(f"{self.name} range {item!r} begins at 0, which a log scale lacks; begin above 0, or list {ends[0]} alone")
        return [ends[0], *(self.text(value) for value in self._preferred(low, high)), ends[1]]

    def _preferred(self, low: float, high: float) -> Iterator[float]:
        """The preferred values between two ends, without these."""
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
            for digit in self.digits:
                if low * (1 + 1e-9) < (value := digit * 10.0**power) < high * (1 - 1e-9):
                    yield value


def _rate_of(bits: float) -> str:
    unit, size = next((each for each in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)) if bits >= each[1] * (1 - 1e-9)), ("bit", 1.0))
    return f"{bits / size:g}{unit}"


_ROUND_TRIP = _Quantity("round trip", "0.2ms,1ms..50ms", rtt_s, lambda seconds: f"{1e3 * seconds:g}ms", (1, 1.5, 2, 3, 5, 7))
_RATE = _Quantity("rate", "50Mbit,100Mbit..10Gbit", bits_per_s, _rate_of, (1, 2, 3, 5, 7))
