"""Rendered tables as a reader's tools take them: columns in all forms, and what LaTeX refuses, by rules and by pdflatex."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

COMMANDS = {
    *("begin", "end", "centering", "small", "caption", "resizebox", "ifdim", "width", "linewidth", "else", "fi", "par", "footnotesize"),
    *("toprule", "midrule", "bottomrule", "textbackslash", "textasciitilde", "textasciicircum", "textbar", "textless", "textgreater"),
}
RULES = {r"\toprule", r"\midrule", r"\bottomrule"}


def columns(path: Path) -> list[int]:
    """The number of columns of each table of a file .html, .md or .tex."""
    text = path.read_text()
    if path.suffix == ".html":
        return [head.count("<th") - 1 for head in re.findall(r"<thead>.*?</thead>", text, re.DOTALL)]  # <thead> itself
    if path.suffix == ".md":
        return [rule.count("|") - 1 for rule in re.findall(r"^\|[:|-]+\|$", text, re.MULTILINE)]
    return [len(aligned) for aligned in re.findall(r"\\begin\{tabular\}\{(\w+)\}", text)]


def latex_faults(text: str) -> list[str]:
    """What keeps LaTeX with booktabs and graphicx from compiling `text`, line by line; empty if nothing does."""
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    return [*_unbalanced(lines), *(fault for line in lines for fault in _line_faults(line)), *_row_faults(lines)]


def compiled(directory: Path, texts: dict[str, str]) -> str:
    """The log of pdflatex for a document with all `texts`, one after the other. Skips without pdflatex and booktabs.

    No test installs them: 48 MB, 19 s of CPU.
    """
    if shutil.which("pdflatex") is None or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        pytest.skip("no pdflatex with booktabs here (Debian's texlive-latex-recommended)")
    for name, text in texts.items():
        (directory / f"{name}.tex").write_text(text)
    pages = "\n".join(rf"\input{{{name}}}\clearpage" for name in texts)
    preamble = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n"
    (directory / "document.tex").write_text(f"{preamble}\\begin{{document}}\n{pages}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "document.tex"]
    done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def _unbalanced(lines: list[str]) -> list[str]:
    open_, text = [], "\n".join(lines)
    for way, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if way == "begin":
            open_.append(name)
        elif not open_ or open_.pop() != name:
            return [f"\\end{{{name}}} ends nothing"]
    braces = re.sub(r"\\.", "", text)
    uneven = braces.count("{") != braces.count("}")
    return [f"{name} never ends" for name in open_] + (["braces are not balanced"] if uneven else [])


def _line_faults(line: str) -> list[str]:
    unknown = set(re.findall(r"\\([a-zA-Z]+)", line)) - COMMANDS
    bare = re.sub(r"\\[a-zA-Z]+|\\.|\$-\$", "", line)
    bare = re.sub(r"^\{.*?\}\{!\}\{%$", "", bare)  # \resizebox to the line
    special = set(re.findall(r"[#$%^_~<>|]|[^\x00-\x7f]", bare))
    return [f"{sign!r} in {line!r}" for sign in sorted(unknown | special)]


def _row_faults(lines: list[str]) -> list[str]:
    faults, wide = [], 0
    for line in lines:
        begins = re.match(r"\\begin\{tabular\}\{(\w+)\}", line)
        if begins:
            wide = len(begins.group(1))
        elif line.startswith(r"\end{tabular}"):
            wide = 0
        elif wide and line not in RULES:
            cells = len(re.findall(r"(?<!\\)&", line)) + 1
            if not line.endswith(r"\\") or cells != wide or line.startswith(("[", "*")):
                faults.append(f"{line!r} is no row of {wide} cells")
        elif not wide and re.search(r"(?<!\\)&", line):
            faults.append(f"& outside a table: {line!r}")
    return faults
