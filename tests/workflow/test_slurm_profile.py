"""The same workflow through the Slurm profile: dry runs only, which need no cluster."""

from __future__ import annotations

import pytest
import yaml
from clone import REPOSITORY, Clone

pytestmark = pytest.mark.alone

SLURM = ("--workflow-profile", "profiles/slurm")


def test_on_slurm_a_fresh_clone_plans_the_same_jobs(fresh: Clone) -> None:
    assert fresh.planned(*SLURM) == fresh.planned()


def test_on_slurm_a_finished_run_has_nothing_to_do(finished: Clone) -> None:
    assert finished.planned(*SLURM) == set()


def test_the_slurm_profile_repeats_all_settings_of_the_default_one_which_it_replaces() -> None:
    default, slurm = (yaml.safe_load((REPOSITORY / f"profiles/{name}/config.yaml").read_text()) for name in ("default", "slurm"))
    assert default.items() <= slurm.items()
