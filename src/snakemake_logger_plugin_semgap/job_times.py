"""How long a run of Snakemake will still take, by the jobs that ended."""

from collections import Counter
from collections.abc import Mapping
from statistics import mean


class JobTimes:
    """The jobs of a run: the planned ones by rule, those that run, and the seconds that the ended ones took."""

    def __init__(self) -> None:
        self._planned: Counter[str] = Counter()
        self._running: dict[int, tuple[str, str, float]] = {}
        self._took_s: dict[str, list[float]] = {}

    @property
    def done(self) -> int:
        return sum(map(len, self._took_s.values()))

    @property
    def total(self) -> int:
        return self._planned.total()

    def plan(self, counts: Mapping[str, int]) -> None:
        """All jobs of the run, by rule."""
        self._planned = Counter(counts)

    def start(self, job: int, rule: str, words: str | None, now_s: float) -> None:
        """A job begins; `words` is its rule's message."""
        self._running[job] = (rule, words or rule.replace("_", " "), now_s)

    def finish(self, job: int, now_s: float) -> str:
        """A job ended; gives its words."""
        rule, words, began_s = self._running.pop(job)
        self._took_s.setdefault(rule, []).append(now_s - began_s)
        return words

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the last job ends, if they run one after the other; None before the first job of the most common rule ended.

        A job takes the mean of its rule's, or of all jobs where its rule's first one has not ended.
        """
        if not self._took_s or max(self._planned, key=lambda rule: self._planned[rule], default=None) not in self._took_s:
            return None
        of_any = mean(seconds for took in self._took_s.values() for seconds in took)
        each = {rule: mean(self._took_s.get(rule, [of_any])) for rule in self._planned}
        waiting = sum(each[rule] * (count - len(self._took_s.get(rule, []))) for rule, count in self._planned.items())
        spent = sum(min(now_s - began_s, each.get(rule, of_any)) for rule, _, began_s in self._running.values())
        return max(0.0, waiting - spent)


def left_text(seconds: float | None) -> str:
    """As people say it; empty if it is not known, or nothing is left."""
    if not seconds:
        return ""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s left"
    return f"about {seconds / 60:.0f} min left"
