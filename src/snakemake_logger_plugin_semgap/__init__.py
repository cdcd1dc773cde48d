"""`snakemake --logger semgap`: the bars of the plugin `rich`, and the time left. Where no terminal is, a line for each job that ended."""

from collections.abc import Mapping
from logging import LogRecord
from time import monotonic

from rich.progress import ProgressColumn, Task
from rich.text import Text
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_logger_plugin_rich import LogHandler as RichLogHandler

from snakemake_logger_plugin_semgap.job_times import JobTimes, left_text

REFRESHES_PER_SECOND = 1
"""Fewer than the plugin's 8: the bars are drawn on the cores that measure."""


class LogHandler(RichLogHandler):
    """The handler that Snakemake makes, by its name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times = JobTimes()
        self.progress.columns = (*self.progress.columns, _TimeLeft(self.times))
        self.live_display.refresh_per_second = REFRESHES_PER_SECOND

    def emit(self, record: LogRecord) -> None:
        """Handles a record of Snakemake's log."""
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            counts: Mapping[str, int] = getattr(record, "stats", {})
            self.times.plan({rule: count for rule, count in counts.items() if rule != "total"})
        elif event == LogEvent.JOB_INFO:
            job = vars(record)  # Snakemake's own attributes
            self.times.start(job["jobid"], job["rule_name"], job["rule_msg"], monotonic())
        super().emit(record)
        if event == LogEvent.JOB_FINISHED:
            said = self.times.finish(vars(record)["job_id"], monotonic())
            if not self.console.is_terminal:
                self.console.print(f"{self.times.done} of {self.times.total} jobs{self._left()}: {said}", soft_wrap=True, highlight=False)

    def _left(self) -> str:
        text = left_text(self.times.left_s(monotonic()))
        return f", {text}" if text else ""


class _TimeLeft(ProgressColumn):
    """The time left of the whole run, beside the bar of all jobs."""

    max_refresh = 1.0

    def __init__(self, times: JobTimes) -> None:
        super().__init__()
        self._times = times

    def render(self, task: Task) -> Text:
        """Rules have no time of their own: which of them waits for which is not known here."""
        whole = "Total Progress" in task.description and not task.finished
        return Text(left_text(self._times.left_s(monotonic())) if whole else "", style="cyan")
