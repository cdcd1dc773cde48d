"""The C compiler and Python's headers, with which Triton builds what launches a kernel, as it first runs one. Standard library alone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_SOURCE = "#include <Python.h>\nint semgap_builds(void) { return PY_MAJOR_VERSION; }\n"
_LIMIT_S = 30


def why_no_launcher() -> str | None:
    """Why Triton could not build a launcher here, with the way out, or None. Finds compiler and headers as Triton does, and builds."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "Triton needs a C compiler: there is no gcc or clang in PATH, and CC is not set; install gcc"
    if shutil.which(compiler) is None:
        return f"Triton needs a C compiler: CC is {compiler!r}, which is no command here; set CC to one, or unset it"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's local scheme has no headers
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    error = _build(compiler, headers)
    if error is None:
        return None
    if not (headers / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"Triton needs Python's headers: {headers}/Python.h is missing; install them (Debian: python{version}-dev)"
    return f"Triton needs a C compiler that builds a library: {compiler} says {error!r}; repair it, or set CC to another"


def _build(compiler: str, headers: Path) -> str | None:
    """Builds a library that includes Python.h; gives the compiler's last line if it fails."""
    with tempfile.TemporaryDirectory(prefix="semgap-launcher-") as folder:
        source = Path(folder) / "launcher.c"
        source.write_text(_SOURCE)
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{folder}/launcher.so", f"-I{headers}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else None
