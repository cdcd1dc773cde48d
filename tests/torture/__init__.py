"""A campaign against the program: real processes, damaged on purpose, and after each try a look whether all is still right.

`make torture` runs it (CONTRIBUTING.md); docs/reliability.md has the promises that it tests and what the last one found.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
for _name in ("process", "workflow", "analysis"):  # whose helpers the attacks use
    if str(_TESTS / _name) not in sys.path:
        sys.path.append(str(_TESTS / _name))
