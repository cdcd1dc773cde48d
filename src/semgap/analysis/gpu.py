"""Utilisation, power, energy per token and time of a trial's GPU during its measured steps, and the cost of the samplers.

Time outside the measured steps does not count: import, load, upload, warm-up, prefills of decode phases, client work between steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from semgap.analysis.aggregate import mean_of

Floats = npt.NDArray[np.float64]
GPM_MEANS = {
    f"gpu_{name}": f"gpm_{name}"
    for name in (
        *("sm_activity_percent", "sm_occupancy_percent", "tensor_activity_percent", "dram_bandwidth_percent"),
        *("pcie_tx_mib_per_s", "pcie_rx_mib_per_s"),
    )
}
SOURCES = ("host", "gpu", "dmon")
INSIDE = 0.9  # a GPM window counts if measured steps fill this part of it
MIN_POWER_SAMPLES = 3  # in measured steps, to integrate power
COUNTER, INSTANT = "energy counter", "integral of instantaneous power"
AVERAGED = "integral of NVML's power, on newer GPUs its mean over a second"


@dataclass(frozen=True)
class MeasuredTime:
    """The measured steps of one trial as disjoint intervals (n,) of CLOCK_MONOTONIC seconds, in order."""

    begins_s: Floats
    ends_s: Floats

    @property
    def total_s(self) -> float:
        return float((self.ends_s - self.begins_s).sum())

    def within(self, begin_s: Floats, end_s: Floats) -> Floats:
        """Seconds of measured steps between `begin_s` and `end_s`, element by element."""
        lengths = self.ends_s - self.begins_s
        edges = np.column_stack([self.begins_s, self.ends_s]).ravel()
        before = np.column_stack([np.cumsum(lengths) - lengths, np.cumsum(lengths)]).ravel()
        return np.interp(end_s, edges, before) - np.interp(begin_s, edges, before)

    def holds(self, t_s: Floats) -> npt.NDArray[np.bool_]:
        """True for each moment in a measured step."""
        index = np.searchsorted(self.begins_s, t_s, side="right") - 1
        return (index >= 0) & (t_s <= self.ends_s[np.maximum(index, 0)])


def measured_time(steps: pd.DataFrame) -> MeasuredTime:
    """The union of the measured steps' intervals: `latency_s` from `begin_s` on. `steps`: one trial's rows of steps.parquet."""
    measured = steps[steps["measured"] & (steps["latency_s"] > 0)]
    begins, lasted = measured[["begin_s", "latency_s"]].to_numpy("float64").T
    order = np.argsort(begins, kind="stable")
    begins, ends = begins[order], np.maximum.accumulate((begins + lasted)[order])
    apart = begins > np.append(-np.inf, ends)[: len(ends)]  # from the steps before
    return MeasuredTime(begins[apart], ends[np.append(apart, True)[1:]])


def gpu_columns(samples: pd.DataFrame, steps: pd.DataFrame, sampler_reason: str | None) -> dict[str, Any]:
    """Utilisation, power and energy of one trial over its measured steps; null with a reason if unknown. `samples`: its gpu.parquet.

    NVML's own values are means of the samples in measured steps. A GPM value covers the window before its stamp: it counts if measured
    steps fill 90% of the window, and its weight is the window's length.
    """
    time = measured_time(steps)
    samples = samples.sort_values("t_s", kind="stable")
    inside = samples[time.holds(samples["t_s"].to_numpy(dtype="float64"))]
    power = samples["power_instant_w"].astype("float64")
    basis = INSTANT if power.notna().any() else AVERAGED
    power = power if basis == INSTANT else samples["power_w"].astype("float64")
    means = {"gpu_util_percent": mean_of(inside["gpu_percent"].dropna()), "gpu_power_w": mean_of(power[inside.index].dropna())}
    return {
        **means,
        "gpu_samples": len(inside),
        "gpu_reason": _nvml_reason(means, len(inside), sampler_reason if samples.empty else None),
        **_gpm_columns(samples, time, sampler_reason),
        **_energy_columns(samples, power, basis, time, int(steps["measured"].sum()), sampler_reason),
    }


def window_energy(samples: pd.DataFrame, begin_s: float, end_s: float, tokens: int, sampler_reason: str | None) -> dict[str, Any]:
    """Joules per token of one trial's GPU between two moments, by the power samples; null with a reason. `samples`: its gpu.parquet."""
    time = MeasuredTime(np.array([begin_s]), np.array([end_s]))
    power = samples["power_instant_w"].where(samples["power_instant_w"].notna(), samples["power_w"]).astype("float64")
    known = power.notna().to_numpy()
    t_s = samples["t_s"].to_numpy(dtype="float64")[known]
    why = "no token came" if not tokens else _no_integral(t_s, time, sampler_reason)
    watts = np.asarray(power, dtype="float64")[known]
    joules = None if why else integral(t_s, watts, time.begins_s, time.ends_s) / tokens
    return {"joules_per_token": joules, "joules_reason": why}


def gpu_time_columns(gpu_s_per_token: float | None, latency_mean_s: float, device: str) -> dict[str, Any]:
    """GPU time (CUDA events) over the steps' latencies: the part of an ITL in which the GPU worked or waited for its host."""
    if gpu_s_per_token is not None and not pd.isna(gpu_s_per_token):
        return {"gpu_time_share": gpu_s_per_token / latency_mean_s, "gpu_time_reason": None}
    why = "computed on the CPU: no CUDA events" if device == "cpu" else "a step has no GPU time"
    return {"gpu_time_share": None, "gpu_time_reason": why}


def sampler_columns(telemetry: Mapping[str, Any]) -> dict[str, Any]:
    """CPU time of all samplers over wall time (1: a whole core), and CPU time per sample of each source.

    `telemetry` is the manifest's. The reason names the sources that the sum leaves out.
    """
    costs = {source: [cost for cost in telemetry[source]["cost"].values() if cost] for source in SOURCES}
    shares = [cost["core_share"] for each in costs.values() for cost in each if cost["core_share"] is not None]
    absent = [f"without {source}: {telemetry[source]['reason']}" for source in SOURCES if not costs[source]]
    return {
        "samplers_core_share": sum(shares) if shares else None,
        **{f"{source}_sampler_cpu_s_per_sample": _per_sample(costs[source]) for source in SOURCES},
        "samplers_reason": "; ".join(absent) or None,
    }


def integral(t_s: Floats, values: Floats, begins_s: Floats, ends_s: Floats) -> float:
    """Integral of the line through samples (n,) over intervals (m,) within their range, in units of `values` x s."""
    areas = np.concatenate([[0.0], np.cumsum(np.diff(t_s) * (values[1:] + values[:-1]) / 2)])

    def up_to(moments: Floats) -> Floats:
        index = np.clip(np.searchsorted(t_s, moments, side="right") - 1, 0, len(t_s) - 1)
        return areas[index] + (moments - t_s[index]) * (values[index] + np.interp(moments, t_s, values)) / 2

    return float((up_to(ends_s) - up_to(begins_s)).sum())


def _nvml_reason(means: Mapping[str, float | None], count: int, sampler_reason: str | None) -> str | None:
    missing = [name for name, mean in means.items() if mean is None]
    if not missing:
        return None
    if not count:
        return sampler_reason or "no GPU sample fell into a measured step"
    return f"the GPU reported no {' and no '.join(missing)}"


def _gpm_columns(samples: pd.DataFrame, time: MeasuredTime, sampler_reason: str | None) -> dict[str, Any]:
    windows = samples[samples["gpm_window_s"].notna()]
    ends, lengths = (windows[name].to_numpy(dtype="float64") for name in ("t_s", "gpm_window_s"))
    filled = time.within(ends - lengths, ends) / lengths
    counted = windows[filled >= INSIDE]
    means = {target: _weighted_mean(counted[source], counted["gpm_window_s"]) for target, source in GPM_MEANS.items()}
    missing = [target for target, mean in means.items() if mean is None]
    reason = f"GPM gave no {' and no '.join(missing)}" if missing else None
    if windows.empty:
        reason = sampler_reason or "no GPM sample"
    elif counted.empty:
        reason = f"measured steps fill at most {filled.max():.0%} of a GPM window of {lengths.min():.2g} s, {INSIDE:.0%} are needed"
    return {**means, "gpm_windows": len(counted), "gpm_reason": reason}


def _energy_columns(
    samples: pd.DataFrame, power: pd.Series, power_basis: str, time: MeasuredTime, tokens: int, sampler_reason: str | None
) -> dict[str, Any]:
    """Joules of the measured steps: by the energy counter if they fill 99% of the time between its readings, else by the power samples.

    `gpu_energy_j` is the counter's difference over all samples. `gpu_energy_check` is the integral of power over that time / it.
    """
    known = power.notna().to_numpy()
    t_s, watts = samples["t_s"].to_numpy(dtype="float64")[known], power.to_numpy()[known]
    counted_j, (first_s, last_s) = _counter(samples)
    check = None
    if counted_j and len(t_s) > 1 and t_s[0] <= first_s and last_s <= t_s[-1]:
        check = integral(t_s, watts, np.array([first_s]), np.array([last_s])) / counted_j
    joules, basis, why = counted_j, COUNTER, None
    if not counted_j or time.within(np.array(first_s), np.array(last_s)) < 0.99 * max(last_s - first_s, time.total_s):
        basis, why = power_basis, _no_integral(t_s, time, sampler_reason)
        joules = None if why else integral(t_s, watts, time.begins_s, time.ends_s)
    return {
        "joules_per_token": None if joules is None else joules / tokens,
        "joules_basis": None if joules is None else basis,
        "joules_reason": why,
        "gpu_energy_j": counted_j,
        "gpu_energy_check": check,
    }


def _counter(samples: pd.DataFrame) -> tuple[float | None, tuple[float, float]]:
    """Joules between the first and the last reading of the energy counter, and the times of both."""
    read = samples[samples["energy_j"].notna()]
    if len(read) < 2:
        return None, (0.0, 0.0)
    first, last = read.iloc[0], read.iloc[-1]
    return float(last["energy_j"] - first["energy_j"]), (float(first["t_s"]), float(last["t_s"]))


def _no_integral(t_s: Floats, time: MeasuredTime, sampler_reason: str | None) -> str | None:
    if not len(t_s):
        return sampler_reason or "no power sample"
    inside = int(time.holds(t_s).sum())
    if inside < MIN_POWER_SAMPLES:
        return f"{inside} power samples in measured steps, {MIN_POWER_SAMPLES} are needed: more steps, or a smaller telemetry.interval_s"
    if t_s[0] > time.begins_s[0] or t_s[-1] < time.ends_s[-1]:
        return "the power samples do not reach over all measured steps"
    return None


def _weighted_mean(values: pd.Series, weights: pd.Series) -> float | None:
    known = values.notna()
    return float(np.average(values[known].astype("float64"), weights=weights[known])) if known.any() else None


def _per_sample(costs: list[Mapping[str, Any]]) -> float | None:
    samples = sum(cost["samples"] for cost in costs)
    return sum(cost["cpu_s"] for cost in costs) / samples if samples else None
