"""`python -m semgap` is the `semgap` command."""

import sys

from semgap.cli import main

sys.exit(main())
