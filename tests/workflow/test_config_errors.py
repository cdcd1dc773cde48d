"""A config that cannot run ends at once with one clear line, before any job."""

from __future__ import annotations

import pytest
from clone import Clone, job_names


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("modes=local,sys_simulatd", "mode 'sys_simulatd' is not in config.define.modes; did you mean 'sys_simulated'?"),
        ("phases=[decod]", "phase 'decod' is not in config.define.phases; did you mean 'decode'?"),
        ("models=smollm-135m", "model 'smollm-135m' is not in config.define.models; did you mean 'smollm2-135m'?"),
        ("trails=3", "config has no key 'trails'; did you mean 'trials'?"),
        ("trials=0", "config.trials is 0: 0 is less than the minimum of 1"),
        ("max_length=18", "phase 'decode' needs 19 positions (prompt 16 + steps 3), more than max_length 18"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(fresh: Clone, setting: str, message: str) -> None:
    done = fresh.snakemake("--config", setting)
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith(message)], done.stdout
    assert "Traceback" not in done.stdout
    assert job_names(done.stdout) == []
    assert not (fresh.root / "results").exists() or not list((fresh.root / "results").glob("trials"))
