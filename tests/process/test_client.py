"""The thin client's one loop: every mode gets local's tokens and logits, and its rows record the steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from semgap.client.loop import run_requests
from semgap.client.prompts import make_prompts, text_after_prompts
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.runtime import Arrival, Drawing, draw_from
from semgap.client.session import open_session, require_promise
from semgap.client.spec import ClientError, ClientSpec, Phase
from semgap.experiment.exactness import Logits
from semgap.policy import Policy, Reply, policy_from
from semgap.tensors import Tensor, TensorClass
from semgap.wire.ledger import Ledger
from semgap.wire.link import RemoteError
from semgap.wire.messages import Evicted, Kind, Operation, Release

if TYPE_CHECKING:
    from started_workers import StartedWorker

Spec = Callable[..., ClientSpec]
Runtime = Callable[..., RemoteRuntime]
MODES: dict[str, dict[str, Any]] = {
    "naive": {"weights": "every_step", "kv_cache": "every_step"},
    "remote_cache": {},
    "offloaded": {"kv_cache": "offloaded"},
    "stateless_zlib_tokens": {"kv_cache": "every_step", "codec": {"tokens": "fp16_zlib"}},
}
LOSSY: dict[str, dict[str, Any]] = {
    "remote_cache_fp16": {"codec": {"tokens": "fp16", "reply": "fp16"}, "keeps": "lossy"},
    "sys_simulated": {"kv_cache": "offloaded", "codec": {"tokens": "fp16_zlib", "reply": "fp16_zlib"}, "keeps": "lossy"},
}


def _run_client(spec: ClientSpec, after: str = "") -> str:
    """Runs a spec in a process of its own, as a trial does; gives what `after` prints."""
    path = Path(spec.directory) / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    script = f"import sys\nfrom semgap.client import measure\nmeasure.main({str(path)!r})\n{after}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_waiting_client_begins_when_it_is_told_its_worker(worker: StartedWorker, llama: Path, client_spec: Spec) -> None:
    spec = client_spec(llama, Policy(), worker)
    path, report = Path(spec.directory) / "spec.json", Path(spec.directory) / "report.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(spec, worker=None, waits=True)))
    with subprocess.Popen([sys.executable, "-m", "semgap.client.measure", str(path)], stdin=subprocess.PIPE) as client:
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(3)
        assert not report.exists()
        client.communicate(msgspec.json.encode(spec.worker), timeout=120)
        assert client.returncode == 0 and report.exists()


@pytest.fixture(scope="session")
def local_logits(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Logits]:
    """Local's logits of a family, from a process of its own."""
    made: dict[str, Logits] = {}

    def make(family: str) -> Logits:
        if family not in made:
            directory = tmp_path_factory.mktemp("local")
            spec = ClientSpec(
                directory=str(directory),
                model_directory=str(model_of(family)),
                prompts_file=str(Path(__file__).resolve().parents[2] / "resources/prompts/english.txt"),
                policy=Policy(placement="local"),
                phase=Phase("decode", (12,), requests=2, steps=3),
                dtype="float32",
                threads=1,
                max_length=32,
                device="cpu",
            )
            _run_client(spec)
            made[family] = Logits.read(directory / "logits.npz")
        return made[family]

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_remote_mode_sees_bitwise_the_logits_of_local(
    worker: StartedWorker,
    model_of: Callable[[str], Path],
    local_logits: Callable[[str], Logits],
    client_spec: Spec,
    open_runtime: Runtime,
    family: str,
    mode: str,
) -> None:
    model, policy = model_of(family), policy_from(MODES[mode], mode)
    spec = client_spec(model, policy, worker)
    seen = run_requests(open_runtime(worker, model, policy), spec, *make_prompts(spec))
    local = local_logits(family)
    arrays = seen.arrays()
    assert np.array_equal(arrays["tokens"], local.tokens)
    assert np.array_equal(arrays["digests"], local.digests)
    assert np.array_equal(arrays["last_logits"], local.last_logits)


@pytest.mark.parametrize("mode", LOSSY)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_a_mode_in_fp16_sees_the_cast_of_locals_logits(
    worker: StartedWorker,
    model_of: Callable[[str], Path],
    local_logits: Callable[[str], Logits],
    client_spec: Spec,
    open_runtime: Runtime,
    family: str,
    mode: str,
) -> None:
    model, policy, local = model_of(family), policy_from(LOSSY[mode], mode), local_logits(family)
    spec = client_spec(model, policy, worker, forced_tokens=tuple(map(tuple, local.tokens.tolist())))
    seen = run_requests(open_runtime(worker, model, policy), spec, *make_prompts(spec))
    assert local.last_logits is not None
    assert np.array_equal(seen.arrays()["last_logits"], local.last_logits.astype(np.float16).astype(np.float32))


def test_a_thin_client_imports_no_torch_and_reports_each_step(worker: StartedWorker, llama: Path, client_spec: Spec) -> None:
    spec = client_spec(llama, Policy(), worker, Phase("decode", (10,), requests=2, steps=3, warmup_requests=1, warmup_steps=1))
    heavy = "{name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'pandas', 'snakemake'}"
    assert _run_client(spec, f"print(sorted({heavy}))") == "[]\n"
    report = json.loads((Path(spec.directory) / "report.json").read_text())
    steps, ledger = report["steps"], report["session"]["books"]["rows"]
    assert [(s["request"], s["step"], s["warmup"], s["measured"], s["position"], s["tokens_in"]) for s in steps] == [
        *((0, step, True, False, *at) for step, at in enumerate([(0, 10), (10, 1)])),
        *((request, step, False, step > 0, *at) for request in (1, 2) for step, at in enumerate([(0, 10), (10, 1), (11, 1), (12, 1)])),
    ]
    for step in steps:
        assert (step["up_payload_bytes"], step["down_payload_bytes"]) == (8 * step["tokens_in"], 4 * 512 * step["tokens_in"])
        assert step["round_trips"] == 1 and step["latency_s"] > 0
        assert step["down_segments"] > 0 and step["up_segments"] > 0
    for row in report["requests"]:
        mine = [s["latency_s"] for s in steps if s["request"] == row["request"]]
        assert row["new_tokens"] == len(mine) and row["prompt_tokens"] == 10
        assert row["ttft_s"] == mine[0] and row["e2e_s"] == pytest.approx(sum(mine))
        assert row["tpot_s"] == pytest.approx(sum(mine[1:]) / (len(mine) - 1))
    regular = [row for row in ledger if row["kind"] == "regular"]
    assert sum(row["payload_bytes"] for row in regular) == 6 * (8 + 4 * 512)
    assert sum(row["frames"] for row in regular) == 12
    released = [row for row in ledger if row["operation"] == "release" and row["direction"] == "up"]
    assert [row["frames"] for row in released] == [3]
    assert report["setup"]["weights_bytes"] == sum(row["tensor_bytes"] for row in ledger if row["tensor_class"] == "weights")
    assert 0 < report["client_peak_rss_anon_bytes"] < 250e6


@pytest.mark.parametrize("remote", [False, True])
def test_a_text_pass_feeds_the_text_over_the_same_session_after_the_tokens_that_were_drawn(
    worker: StartedWorker, llama: Path, client_spec: Spec, local_logits: Callable[[str], Logits], remote: bool
) -> None:
    policy, text = Policy() if remote else Policy(placement="local"), Path(client_spec(llama, Policy()).directory) / "text.npz"
    spec = client_spec(llama, policy, worker if remote else None, text_pass=True)
    _run_client(spec)
    drawn, fed = Logits.read(text.with_name("logits.npz")), Logits.read(text)
    assert drawn.text is None and np.array_equal(drawn.tokens, local_logits("llama").tokens)
    assert fed.text is not None and fed.text.tolist() == [follows.tolist() for follows in text_after_prompts(spec)]
    text.unlink()
    _run_client(client_spec(llama, Policy(placement="local"), forced_tokens=tuple(map(tuple, fed.text.tolist()))))
    assert np.array_equal(fed.digests, Logits.read(text.with_name("logits.npz")).digests)
    assert not text.exists()


def test_each_session_before_the_last_leaves_its_own_logits(worker: StartedWorker, llama: Path, client_spec: Spec) -> None:
    spec = client_spec(llama, Policy(), worker, Phase("decode", (12,), steps=2, sessions=3))
    _run_client(spec)
    seen = {file.name: Logits.read(file) for file in Path(spec.directory).glob("*.npz")}
    assert sorted(seen) == ["logits-1.npz", "logits-2.npz", "logits.npz"]
    assert len({logits.digests.tobytes() for logits in seen.values() if logits.digests is not None}) == 1


def test_a_phase_of_prefill_measures_the_prefill_alone(
    worker: StartedWorker, llama: Path, client_spec: Spec, open_runtime: Runtime
) -> None:
    spec = client_spec(llama, Policy(), worker, Phase("prefill", (5, 9), requests=2, warmup_requests=0))
    seen = run_requests(open_runtime(worker, llama, Policy()), spec, *make_prompts(spec))
    assert [(row["tokens_in"], row["measured"]) for row in seen.steps] == [(5, True), (5, True), (9, True), (9, True)]
    assert all(row["tpot_s"] is None and row["new_tokens"] == 1 for row in seen.requests)


def test_the_end_of_a_request_frees_its_handle(worker: StartedWorker, llama: Path, open_runtime: Runtime) -> None:
    runtime = open_runtime(worker, llama, Policy())
    runtime.prefill(np.array([1, 2]), 0, Kind.SETUP)
    runtime.end_request()
    with pytest.raises(RemoteError, match="handle 1 is not open"):
        runtime.link.request(Operation.RELEASE, Release((), 1))
    logits = runtime.prefill(np.array([1, 2]), 0, Kind.SETUP).logits
    assert logits is not None and logits.shape == (2, 512)


class _Recorder:
    """A runtime that always prefers one token and remembers its input."""

    def __init__(self, token: int) -> None:
        self.ledger, self.fed, self.kinds = Ledger(), [], []  # type: ignore[var-annotated]
        self._token = token

    def prefill(self, prompt: np.ndarray, request: int, kind: Kind) -> Arrival:
        return self._arrive(prompt.tolist(), kind)

    def decode(self, token: int, count: int, kind: Kind) -> Iterator[Arrival]:
        yield self._arrive([token], kind)

    def _arrive(self, tokens: list[int], kind: Kind) -> Arrival:
        self.fed.append(tokens)
        self.kinds.append(kind)
        logits = np.zeros((len(tokens), 16), np.float32)
        logits[-1, self._token] = 1
        return draw_from(Tensor.from_numpy(logits, TensorClass.LOGITS), Drawing(), 0, len(self.fed))

    def select(self, request: int) -> None:
        pass

    def evict(self, layers: Sequence[int]) -> None:
        pass

    def restore(self) -> None:
        pass

    def end_request(self) -> None:
        self.fed.append("next")

    def segments(self) -> tuple[int, int]:
        return 0, 0


def test_forced_tokens_are_fed_instead_of_the_drawn_ones_which_are_kept(llama: Path, client_spec: Spec) -> None:
    phase = Phase("decode", (2,), requests=2, steps=2, warmup_steps=1)
    spec = client_spec(llama, Policy(), phase=phase, forced_tokens=((3, 4, 5), (6, 7, 8)))
    runtime, prompt = _Recorder(9), np.array([1, 2])
    seen = run_requests(runtime, spec, [prompt, prompt], [prompt])
    assert runtime.fed == [[1, 2], [9], "next", [1, 2], [3], [4], "next", [1, 2], [6], [7], "next"]
    assert [request.tokens for request in seen.measured] == [[9, 9, 9], [9, 9, 9]]
    assert runtime.kinds == [Kind.SETUP] * 2 + [Kind.SETUP, Kind.REGULAR, Kind.REGULAR] * 2


def test_without_forced_tokens_each_step_is_fed_what_was_drawn(llama: Path, client_spec: Spec) -> None:
    runtime, prompt = _Recorder(9), np.array([1, 2])
    run_requests(runtime, client_spec(llama, Policy(), phase=Phase("decode", (2,), steps=2)), [prompt], [])
    assert runtime.fed == [[1, 2], [9], [9], "next"]


@pytest.mark.parametrize(
    ("more", "message"),
    [({"threads": 2}, "runs 1 threads, the config says threads: 2"), ({"device": "cuda"}, "computes on cpu, the config says device: cuda")],
)
def test_a_worker_that_computes_otherwise_than_the_config_says_is_refused(
    worker: StartedWorker, llama: Path, client_spec: Spec, more: dict[str, Any], message: str
) -> None:
    spec = client_spec(llama, Policy(), worker, **more)
    assert spec.worker is not None
    link = worker.link()
    with pytest.raises(ClientError, match=message):
        open_session(link, spec, spec.worker)
    link.close()


def test_graphs_are_refused_by_a_worker_without_a_gpu_before_any_upload(worker: StartedWorker, llama: Path, client_spec: Spec) -> None:
    spec = client_spec(llama, Policy(), worker, executor="cuda_graph")
    assert spec.worker is not None
    link = worker.link()
    with pytest.raises(RemoteError, match="cuda_graph cannot run on cpu: it needs CUDA; use executor: eager"):
        open_session(link, spec, spec.worker)
    link.close()


def test_a_promise_that_two_devices_cannot_keep_is_refused() -> None:
    bitwise, lossy = (Policy(reply=Reply("hidden_last"), keeps=keeps) for keeps in ("bitwise", "lossy"))
    require_promise(bitwise, "cpu")
    require_promise(lossy, "cuda")
    with pytest.raises(ClientError, match="promises keeps: bitwise, but the worker computes on cuda"):
        require_promise(bitwise, "cuda")


def test_warmups_are_other_text_than_the_measured_requests(llama: Path, client_spec: Spec) -> None:
    prompts, warmups = make_prompts(client_spec(llama, Policy(), phase=Phase("decode", (8, 12), requests=2, steps=1, warmup_requests=2)))
    assert [len(prompt) for prompt in prompts] == [8, 8, 12, 12] and [len(prompt) for prompt in warmups] == [8, 8]
    texts = [tuple(prompt[:8]) for prompt in (*prompts, *warmups)]
    assert len(set(texts)) == len(texts)


def test_the_first_prompts_begin_at_the_chosen_passages_and_the_others_at_those_that_are_left(llama: Path, client_spec: Spec) -> None:
    def starts(**phase: Any) -> list[tuple[int, ...]]:
        return [tuple(prompt) for prompt in make_prompts(client_spec(llama, Policy(), phase=Phase("decode", (8,), steps=2, **phase)))[0]]

    inorder = starts(requests=6)
    assert starts(requests=4, passages=(5, 1)) == [inorder[5], inorder[1], inorder[0], inorder[2]]
    assert starts(requests=1, passages=(5, 1)) == [inorder[5]]
    spec = client_spec(llama, Policy(), phase=Phase("decode", (8,), requests=1, steps=2, passages=(5,)))
    whole = client_spec(llama, Policy(), phase=Phase("decode", (11,), requests=1, steps=2, passages=(5,)))
    assert np.array_equal(text_after_prompts(spec)[0], make_prompts(whole)[0][0][8:])


class _SavesEachTime(_Recorder):
    """A worker whose restore is a recompute: all that it evicts is dirty."""

    def evict(self, layers: Sequence[int]) -> Evicted:  # type: ignore[override]
        return Evicted((), len(layers), len(layers), 100, 10)


def test_a_steps_row_counts_what_both_of_its_evictions_saved_if_a_restore_ran_between_them(llama: Path, client_spec: Spec) -> None:
    phase = Phase("recovery", (2,), requests=1, warmup_requests=0, steps=2, evict_fractions=(0.5,))
    spec = client_spec(llama, Policy(recovery="auto"), phase=phase, layers=2)
    seen = run_requests(_SavesEachTime(9), spec, [np.array([1, 2])], [])  # type: ignore[arg-type]
    rows = [(row["saved_tensor_bytes"], row["saved_payload_bytes"], "restore_alone_s" in row) for row in seen.steps[1:]]
    assert sorted(rows) == [(100, 10, False), (200, 20, True)]


def test_trials_of_one_number_evict_the_same_layers_before_the_same_steps_in_every_mode(llama: Path, client_spec: Spec) -> None:
    phase = Phase("recovery", (2,), requests=2, warmup_requests=1, steps=8, evict_fractions=(0, 0.25, 0.5, 1))

    def evicted(policy: Policy, trial: int, steps: int = 8) -> list[list[tuple[float, int]]]:
        spec = client_spec(llama, policy, phase=msgspec.structs.replace(phase, steps=steps), layers=4, trial=trial)
        seen = run_requests(_SavesEachTime(9), spec, [np.array([1, 2])] * 2, [np.array([1, 2])])  # type: ignore[arg-type]
        rows = [row for row in seen.steps if row["step"] and not row["warmup"]]
        return [[(row["evict_fraction"], row["evicted_layers"]) for row in rows if row["request"] == request] for request in (1, 2)]

    assert evicted(Policy(), 1) == evicted(Policy(recovery="delta"), 1) != evicted(Policy(), 2)
    assert evicted(Policy(recovery="recompute"), 1, steps=5) == [each[:5] for each in evicted(Policy(), 1)]
    assert evicted(Policy(), 1)[0] != evicted(Policy(), 1)[1]
