"""A driver library and an `nvidia-smi` that stand in for NVIDIA's: two GPUs, of which CUDA sees the second."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data"
UUIDS = ("GPU-aaaa0000-0000", "GPU-bbbb0000-1111")

# Two GPUs. Power fails once (999), at its second call. A GPM metric is its number x 0.1 x the samples between the given two, so a
# pair in the wrong order shows; DRAM bandwidth (10) is not supported (3), and tensor activity (5) is not a number at first.
LIBRARY = r"""
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static const char *uuids[2] = {"GPU-aaaa0000-0000", "GPU-bbbb0000-1111"};
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { snprintf(s, n, "580.0"); return 0; }
const char *nvmlErrorString(int e) { return e == 3 ? "Not Supported" : "Unknown Error"; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) {
  *d = (void *)(uintptr_t)(i + 1); return getenv("STAND_IN_FORBIDDEN") ? 4 : 0; }
int nvmlDeviceGetHandleByUUID(const char *u, void **d) {
  for (unsigned i = 0; i < 2; i++) if (!strcmp(u, uuids[i])) { *d = (void *)(uintptr_t)(i + 1); return 0; }
  return 6; }
int nvmlDeviceGetUUID(void *d, char *u, unsigned n) {
  snprintf(u, n, "%s", uuids[(uintptr_t)d - 1]); return 0; }
int nvmlDeviceGetName(void *d, char *s, unsigned n) { snprintf(s, n, "Stand-in"); return 0; }
int nvmlDeviceGetIndex(void *d, unsigned *i) { *i = (unsigned)((uintptr_t)d - 1); return 0; }
int nvmlDeviceGetUtilizationRates(void *d, unsigned *u) { u[0] = 37; u[1] = 12; return 0; }
int nvmlDeviceGetMemoryInfo(void *d, uint64_t *m) { m[0] = 80; m[1] = 50; m[2] = 30; return 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *p) {
  static int calls; *p = 123456; return ++calls == 2 ? 999 : 0; }
int nvmlDeviceGetTemperature(void *d, int s, unsigned *t) { *t = 41; return s; }
int nvmlDeviceGetClockInfo(void *d, int k, unsigned *c) { *c = k == 1 ? 1980 : k == 2 ? 2619 : 0; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *d, uint64_t *e) { *e = 5000000000ull; return 0; }
struct field { unsigned id, scope; int64_t stamp, latency; unsigned type, status; union { double d; unsigned u; } value; };
int nvmlDeviceGetFieldValues(void *d, int n, struct field *f) {
  f->status = f->id == 186 ? 0 : 3; f->value.u = 200250; return 0; }
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *later) {
  *now = *later = getenv("STAND_IN_MIG") != NULL; return *now ? 0 : 3; }
struct holder { unsigned pid; uint64_t bytes; unsigned instance, slice; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, unsigned *n, struct holder *p) {
  if (*n < 1) { *n = 1; return 7; }
  p[0].pid = 4242; p[0].bytes = 40000000000ull * (uintptr_t)d; *n = 1; return 0; }
#ifndef OLD_DRIVER
struct support { unsigned version, supported; };
struct metric { unsigned id, status; double value; const char *names[3]; };
struct query { unsigned version, n; int *first, *second; struct metric metrics[]; };
int nvmlGpmQueryDeviceSupport(void *d, struct support *s) {
  s->supported = getenv("STAND_IN_NO_GPM") == NULL; return getenv("STAND_IN_GPM_FORBIDDEN") ? 4 : s->version == 1 ? 0 : 2; }
int nvmlGpmSampleAlloc(int **s) { *s = malloc(sizeof **s); return 0; }
int nvmlGpmSampleFree(int *s) { free(s); return getenv("STAND_IN_LOST") ? 15 : 0; }
int nvmlGpmSampleGet(void *d, int *s) {
  static int taken; *s = ++taken;
  return getenv("STAND_IN_GPM_FAILS") ? 4 : getenv("STAND_IN_LOST") && taken > 2 ? 15 : taken == 4 ? 999 : 0; }
int nvmlGpmMetricsGet(struct query *q) {
  if (q->version != 1) return 2;
  for (unsigned i = 0; i < q->n; i++) {
    struct metric *m = &q->metrics[i];
    m->status = m->id == 10 ? 3 : 0;
    m->value = m->id == 5 && *q->first == 1 ? NAN : m->id * 0.1 * (*q->second - *q->first); }
  return 0; }
#endif
"""

# Like dmon, it never flushes, prints a header and then samples, and starts a process of its own.
NVIDIA_SMI = """#!{python}
import subprocess, sys, time
assert sys.argv[1:] == ["dmon", "-s", "pucvmet", "-d", "1", "-i", "1"], sys.argv
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, file=open({pids!r}, "w"))
for line in open({data!r}):
    print(line, end="")
    time.sleep(0.01)
{then}
"""


def write_nvidia_smi(directory: Path, then: str) -> None:
    script = directory / "nvidia-smi"
    script.write_text(
        NVIDIA_SMI.format(python=sys.executable, pids=str(directory / "child.pid"), data=str(DATA / "dmon_h100_pucvmet.txt"), then=then)
    )
    script.chmod(0o755)


def build_driver(compiler: str, directory: Path, *options: str) -> None:
    source, library = directory / "nvml.c", directory / "libnvidia-ml.so.1"
    source.write_text(LIBRARY)
    subprocess.run([compiler, "-shared", "-fPIC", "-w", *options, "-o", str(library), str(source)], check=True)


def driver_environment(directory: Path) -> dict[str, str]:
    """Builds both in a directory; an environment in which NVML shows two GPUs, CUDA sees the second, and nvidia-smi is on PATH."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for the driver's library")
    build_driver(compiler, directory)
    write_nvidia_smi(directory, then="time.sleep(60)")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited | {
        "LD_LIBRARY_PATH": str(directory),
        "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": UUIDS[1],
    }
