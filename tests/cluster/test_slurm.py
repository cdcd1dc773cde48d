"""The workflow on a real Slurm of two nodes: what the profile does, and what is left when something is cancelled or killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from clone import Clone, environment, job_names, trials
from cluster import Cluster

from semgap.processes.machine import measuring

pytestmark = pytest.mark.alone

WITHIN_S = 300.0  # others may be measuring on this machine
ENDS_WITHIN_S = 45.0
HEAD_NODE = ("unshare", "--uts", "sh", "-c", 'hostname head && exec "$@"', "sh")  # a host of its own, as far as names tell
HURRY = ("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "2")
ONE_NODE = {"modes": ["local", "remote_cache"], "phases": ["decode"], "networks": ["loopback"], "trials": 1, "worker": {"launch": "local"}}
RECOVERY = {"kind": "recovery", "prompt_lengths": [16], "steps": 4, "evict_fractions": [0, 1]}
TWO_NODES = {
    "modes": ["sys_delta"],
    "phases": ["recovery-evict"],
    "networks": ["nodes"],
    "trials": 1,
    "worker": {"launch": "srun"},
    "define": {"networks": {"nodes": {"kind": "hosts"}}, "phases": {"recovery-evict": RECOVERY}},
}
ON_TWO_NODES = "measuring sys_delta, recovery-evict, trial 1 (tiny, nodes)"


@dataclass(frozen=True)
class Site:
    """A clone on the cluster, with a profile made of the shipped one's commented site settings, and temporary files of its own."""

    clone: Clone
    profile: str
    temporary: Path
    targets: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--workflow-profile", self.profile, *HURRY, "--", *self.targets)

    @contextlib.contextmanager
    def running(self, log: str) -> Iterator[subprocess.Popen[bytes]]:
        """A snakemake on a head node, with its output in a file."""
        command = [*HEAD_NODE, *self.clone.command(*self.arguments)]
        with (self.clone.root / log).open("w") as file:
            process = subprocess.Popen(command, cwd=self.clone.root, env=self.environment(), stdout=file, stderr=file)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def environment(self) -> dict[str, str]:
        return environment() | {"TMPDIR": str(self.temporary)}

    def run(self, *more: str) -> str:
        """The output of a run that must succeed."""
        command = [*HEAD_NODE, *self.clone.command(*more, *self.arguments)]
        done = subprocess.run(command, cwd=self.clone.root, env=self.environment(), capture_output=True, text=True, timeout=WITHIN_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    def unlock(self) -> None:
        self.clone.run("--unlock")

    def planned(self) -> set[str]:
        return set(job_names(self.clone.run("--dry-run", *self.arguments)))

    def manifest(self, target: int = -1) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.clone.root / self.targets[target]).read_text())
        return manifest

    @property
    def log(self) -> Path:
        """That of the last trial."""
        name = self.targets[-1].replace("results/trials/", "results/logs/measure_trial/").removesuffix("/manifest.json")
        return self.clone.root / f"{name}.log"

    def is_waiting(self) -> bool:
        """The last trial's job has come to where it waits for who measures."""
        return self.log.exists() and "another trial measures on this machine" in self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        """All that runs in its Slurm jobs: they have the job and its temporary directory in their environment."""
        return [process for process in psutil.process_iter() if self._is_of_a_job(process)]

    def _is_of_a_job(self, process: psutil.Process) -> bool:
        try:
            variables = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False
        return variables.get("TMPDIR") == str(self.temporary) and "SLURM_JOB_ID" in variables


def site_profile(text: str, choice: int) -> str:
    """The shipped profile with its first or second commented `set-resources`, and with names for the site's."""
    head, *blocks = re.split(r"^# set-resources:\n", text, flags=re.MULTILINE)
    lines = [line.removeprefix("# ") for line in blocks[choice].splitlines() if line.startswith("#   ")]
    for name, ours in (("PARTITION", "all"), ("NODE,NODE", "n1,n2"), ("NODE", "n1")):
        lines = [line.replace(name, ours) for line in lines]
    return "\n".join([head, "set-resources:", *lines, ""])


def jobs(*states: str) -> list[str]:
    """Ids of Slurm's jobs in these states, RUNNING if not said."""
    command = ["squeue", "--noheader", "--format=%A", f"--states={','.join(states or ('RUNNING',))}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def trial_of(mode: str, phase: str = "decode", network: str = "loopback") -> str:
    return f"results/trials/model=tiny/network={network}/mode={mode}/phase={phase}/trial=1/manifest.json"


@pytest.fixture(scope="module")
def clone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """With the model and the references, made on this machine, and profiles of the site."""
    clone = Clone.of_repository(tmp_path_factory.mktemp("cluster") / "clone")
    clone.configure({"define": {"phases": {"recovery-evict": RECOVERY}}, "phases": ["decode", "recovery-evict"]})
    references = [f"results/reference/model=tiny/phase={phase}.npz" for phase in ("decode", "recovery-evict")]
    clone.run("--cores", "2", *references)
    shipped = (clone.root / "profiles/slurm/config.yaml").read_text()
    for choice, name in enumerate(("one-node", "two-nodes")):
        (clone.root / f"profiles/{name}").mkdir()
        (clone.root / f"profiles/{name}/config.yaml").write_text(site_profile(shipped, choice))
    return clone


@dataclass(frozen=True)
class Story:
    """What happened to a site's runs, for tests to look at: facts by name."""

    site: Site
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def one_node(cluster: Cluster, clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Two trials. During the second one its snakemake is killed, and another one takes its place."""
    clone.configure(ONE_NODE)
    order = [at.mode for at in clone.config().run_order()]
    site = Site(clone, "profiles/one-node", tmp_path_factory.mktemp("one"), tuple(trial_of(mode) for mode in order))
    facts: dict[str, Any] = {"second": trials(order[1:], [1])}
    with contextlib.ExitStack() as lock:
        with site.running("killed.log") as snakemake:
            wait_until((clone.root / site.targets[0]).exists, "the first trial is measured")
            lock.enter_context(measuring())
            wait_until(site.is_waiting, "the second trial waits for who measures")
            snakemake.kill()
            snakemake.wait()
        facts["left"] = jobs()
        site.unlock()
        facts["planned"] = site.planned()
        with site.running("again.log") as snakemake:  # the trial that is left must not end by itself
            wait_until(lambda: facts["left"][0] in jobs("CANCELLED"), "the job of the dead snakemake is cancelled")
            lock.close()
            assert snakemake.wait(300) == 0
    facts["output"] = (clone.root / "again.log").read_text()
    facts["planned afterwards"] = site.planned()
    return Story(site, facts)


def test_trials_run_through_the_profile_with_the_gpu_that_it_asks_for(one_node: Story) -> None:
    assert [one_node.site.manifest(target)["hosts"]["client"]["node"] for target in (0, 1)] == ["n1", "n1"]
    assert [one_node.site.manifest(target)["exactness"]["promise_kept"] for target in (0, 1)] == [True, True]
    submitted = (one_node.site.clone.root / "killed.log").read_text()
    assert "SLURM job submission failed" not in submitted


def test_a_trial_is_submitted_when_the_one_before_has_ended(one_node: Story) -> None:
    told = (one_node.site.clone.root / "killed.log").read_text()
    events = re.findall(r"(Job \d+: measuring \w+,|Finished jobid: \d+ \(Rule: measure_trial\))", told)
    assert [event.split()[0] for event in events] == ["Job", "Finished", "Job"]


def test_no_two_trials_were_measured_at_once(one_node: Story, two_nodes: Story) -> None:
    manifests = [one_node.site.manifest(0), one_node.site.manifest(1), two_nodes.site.manifest()]
    windows = sorted((manifest["measured"]["start_s"], manifest["measured"]["end_s"]) for manifest in manifests)
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(windows))


def test_after_its_snakemake_was_killed_only_the_lost_trial_is_run_and_its_old_job_is_cancelled_first(one_node: Story) -> None:
    facts = one_node.facts
    assert len(facts["left"]) == 1  # Slurm knows nothing of a dead snakemake
    assert facts["planned"] == facts["second"] == set(job_names(facts["output"]))
    assert f"Cancelled Slurm job {facts['left'][0]}, left here by a run that died" in facts["output"]
    assert facts["left"][0] in jobs("CANCELLED")
    assert facts["planned afterwards"] == set()


def test_logs_of_slurm_and_of_each_trial_lie_where_the_guide_says(one_node: Story) -> None:
    root = one_node.site.clone.root
    assert len(list(root.glob("results/logs/slurm/rule_measure_trial/tiny_loopback_*/*.log"))) == 3
    assert one_node.site.log.exists()


@pytest.fixture(scope="module")
def two_nodes(cluster: Cluster, clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A trial with client, worker and KV host: its worker's node is lost, then the one in its place is cancelled, and a third one ends."""
    clone.configure(TWO_NODES)
    site = Site(clone, "profiles/two-nodes", tmp_path_factory.mktemp("two"), (trial_of("sys_delta", "recovery-evict", "nodes"),))
    facts: dict[str, Any] = {}
    with site.running("lost.log"):
        hold_client(site)
        facts["lost"] = jobs()
        os.kill(cluster.slurmd_pid("n2"), signal.SIGKILL)
        wait_until(lambda: jobs("NODE_FAIL") == facts["lost"], "Slurm finds the node gone")
        wait_until_gone(site)  # on the lost node too
        await_failure(site, "lost.log", facts["lost"], "NODE_FAIL")
    cluster.start_node("n2")
    site.unlock()
    facts["planned after the loss"] = site.planned()
    with site.running("cancelled.log"):
        hold_client(site)
        facts["worker"] = [process.environ() for process in role(site, "serve") if process.name() != "srun"]
        facts["secret"] = next(site.temporary.glob("semgap-trial-*/secret")).read_text()
        facts["told"] = [" ".join([*process.cmdline(), *process.environ().values()]) for process in site.processes()]
        facts["cancelled"] = jobs()
        subprocess.run(["scancel", *facts["cancelled"]], check=True)
        wait_until_gone(site)
        facts["files"] = list(site.temporary.glob("semgap-*"))
        await_failure(site, "cancelled.log", facts["cancelled"], "CANCELLED")
    site.unlock()
    facts["log"] = site.log.read_text()
    facts["output"] = site.run()
    facts["planned afterwards"], facts["without tls"] = site.planned(), site.manifest()
    clone.configure({"worker": {"tls": True}})
    site.run()
    return Story(site, facts)


def hold_client(site: Site) -> None:
    """Waits until a trial's client is with its worker, and stops it there. Its samplers start then."""
    wait_until(lambda: role(site, "semgap.telemetry.sampler_process"), "the client is with its worker")
    role(site, "semgap.client.measure")[0].suspend()


def wait_until_gone(site: Site) -> None:
    """Waits until nothing runs for a trial any more."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while left := site.processes():
        assert time.monotonic() < deadline, f"still there after {ENDS_WITHIN_S:g} s: {[process.as_dict() for process in left]}"
        time.sleep(0.1)


def await_failure(site: Site, log: str, job: list[str], status: str) -> None:
    """Waits until a run has told that its job failed. It would end by itself, after the pause between two looks at the queue."""
    told = re.compile(rf"SLURM-job '{job[0]}' failed.* SLURM status is: '{status}'")
    wait_until(lambda: told.search((site.clone.root / log).read_text()), f"the run tells that its job was {status}")


def role(site: Site, word: str) -> list[psutil.Process]:
    """Processes of a site with a word among their arguments."""
    found = []
    for process in site.processes():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if word in process.cmdline():
                found.append(process)
    return found


def test_the_worker_runs_on_the_other_node_with_its_gpu_and_its_secret_is_in_no_argument_or_environment(two_nodes: Story) -> None:
    facts = two_nodes.facts
    assert {(worker["SLURMD_NODENAME"], worker["CUDA_VISIBLE_DEVICES"]) for worker in facts["worker"]} == {("n2", "0")}
    assert len(facts["secret"]) == 64 and len(facts["told"]) > 5
    assert not [text for text in facts["told"] if facts["secret"] in text]


def test_after_a_node_was_lost_its_trial_fails_and_is_run_again(two_nodes: Story) -> None:
    facts = two_nodes.facts
    assert len(facts["lost"]) == 1 and facts["planned after the loss"] == {ON_TWO_NODES}


def test_a_cancelled_trial_fails_and_leaves_no_process_and_no_file(two_nodes: Story) -> None:
    facts = two_nodes.facts
    assert len(facts["cancelled"]) == 1 and facts["cancelled"][0] in jobs("CANCELLED")
    assert facts["files"] == []
    assert "ended by SIGTERM" in facts["log"]


def test_a_run_after_a_cancelled_trial_completes_it(two_nodes: Story) -> None:
    assert set(job_names(two_nodes.facts["output"])) == {ON_TWO_NODES}
    assert two_nodes.facts["planned afterwards"] == set()
    assert list(two_nodes.site.temporary.glob("semgap-*")) == []


def test_the_manifest_of_a_trial_on_two_nodes_says_which(two_nodes: Story) -> None:
    hosts = two_nodes.site.manifest()["hosts"]
    assert (hosts["client"]["node"], hosts["worker"]["node"]) == ("n1", "n2")


def test_a_kv_host_on_the_client_s_node_serves_the_worker_on_the_other_one(two_nodes: Story) -> None:
    manifest = two_nodes.site.manifest()
    assert manifest["reconciliation"]["agreed"] and manifest["reconciliation"]["kv_host"]["agreed"]
    steps = pq.read_table(two_nodes.site.clone.root / two_nodes.site.targets[0].replace("manifest.json", "steps.parquet")).to_pylist()
    assert sum(step["fetched_network_bytes"] for step in steps) > 0
    assert {step["recovery"] for step in steps if step["measured"] and step["evict_fraction"]} == {"delta"}


def test_worker_and_kv_host_speak_tls_across_nodes_and_the_books_reconcile(two_nodes: Story) -> None:
    before, now = (manifest["reconciliation"] for manifest in (two_nodes.facts["without tls"], two_nodes.site.manifest()))
    assert before["tls"] is before["kv_host"]["tls"] is None and before["agreed"] and now["agreed"]
    assert now["tls"] == now["kv_host"]["tls"] and now["tls"].startswith("TLSv1.3 ")


def test_srun_outside_a_job_of_two_nodes_is_refused_before_anything_is_measured(clone: Clone, two_nodes: Story) -> None:
    done = clone.snakemake("--forcerun", "measure_trial", "--", *two_nodes.site.targets)
    assert done.returncode == 1
    assert "worker.launch is 'srun' and this is no Slurm job: SLURM_JOB_ID is not set" in done.stdout


def test_the_profile_s_commented_settings_are_whole(clone: Clone) -> None:
    one, two = (yaml.safe_load((clone.root / f"profiles/{name}/config.yaml").read_text()) for name in ("one-node", "two-nodes"))
    assert {"measure_trial", "compute_reference", "check_exactness"} <= set(one["set-resources"])
    assert set(two["set-resources"]) == {"measure_trial", "check_exactness"}
