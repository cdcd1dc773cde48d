"""One client's session on the worker: its limits, its model, and which object serves each operation."""

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import psutil

from semgap.engine.architecture import architecture_of
from semgap.engine.device import choose_device
from semgap.engine.executor import Executor
from semgap.engine.executor_choice import check_executor, choose_executor, compiled_for, make_executor
from semgap.engine.memory_check import free_bytes, require_room
from semgap.engine.weights import Weights
from semgap.kv.host_shadow import KVHostShadow
from semgap.kv.pool import BLOCK, KVPool
from semgap.kv.prefix_names import model_name
from semgap.kv.prefix_shadow import PrefixShadow
from semgap.kv.prefix_ways import prefix_ways
from semgap.kv.prefixes import Prefixes
from semgap.kv.recovery import LiveCaches
from semgap.kv.restoring import Restorer, Run
from semgap.kv.shadow import Shadow, transfer_of
from semgap.kv.transfer import BlockTransfer
from semgap.kv.worker_shadow import WorkerShadow
from semgap.policy import SessionSpec, refused_codec
from semgap.processes.machine import identity, package_version, peak_rss_bytes
from semgap.tensors import DType
from semgap.wire import messages
from semgap.wire.frames import Frame, FrameError, Limits, Memory
from semgap.wire.ledger import Ledger
from semgap.wire.link import Link, Refused, answer_ping, control
from semgap.wire.messages import Header, Operation
from semgap.wire.reconcile import counters
from semgap.wire.step_cost import Floor
from semgap.wire.tcp import congestion_control
from semgap.worker.engine_session import EngineSession
from semgap.worker.handle_operations import HandleOperations
from semgap.worker.kv_host_pings import KVHostPings
from semgap.worker.resources import Resources
from semgap.worker.session_limits import OPEN_HANDLES, require_bounds
from semgap.worker.session_samplers import SessionSamplers
from semgap.worker.step_cost import StepCost, Stopwatch
from semgap.worker.steps import Steps
from semgap.worker.weight_upload import WeightUpload

_KEPT_FREE_BYTES = 2 << 30  # of host memory, beside a shadow there
_NO_FLOOR = Floor(None, None, "not measured: the session has no whole model")


class Session:
    """Serves one client, in a process of its own. Its model is a `WeightUpload`, then `Steps` over it, or, with a policy of batching, an
    `EngineSession`.

    `device_name` is 'cpu', 'cuda' or 'auto'; `max_payload_bytes` bounds a frame's payload, 0 for half of this machine's memory. With
    `slot_bytes` weights pass through staging memory on the CPU too.
    """

    def __init__(
        self, link: Link, device_name: str, threads: int, resources: Resources, max_payload_bytes: int = 0, slot_bytes: int = 0
    ) -> None:
        self.link, self.resources = link, resources
        self.spec = SessionSpec()
        self.device = "cpu"
        self.upload: WeightUpload | None = None
        self.steps: Steps | None = None
        self.engine: EngineSession | None = None  # of a policy of batching
        self.costs: list[StepCost] = []
        self.samplers, self.pings = SessionSamplers(resources.io_cpus), KVHostPings(resources.kv_host)
        self._device_name, self._threads, self._max_payload_bytes, self._slot_bytes = device_name, threads, max_payload_bytes, slot_bytes
        self._chosen: tuple[str, str | None] = ("eager", None)  # executor, and why `auto` took eager
        self._executor_s = 0.0  # to make it, with its kernels and graphs

    def grant(self, requested: dict) -> dict:
        """Checks the client's request and opens the limits of an authenticated peer. Refused if this worker cannot serve it."""
        try:
            self.spec = msgspec.convert(requested, SessionSpec)
        except msgspec.ValidationError as error:
            raise Refused("session", f"the requested session is not valid: {error}") from error
        require_bounds(self.spec)
        try:
            congestion = congestion_control(self.link.sock, self.spec.congestion)
            self.device = choose_device(self._device_name)
            if self.spec.model is not None:
                architecture_of(self.spec.model)
            self._chosen = choose_executor(self.spec.executor, self.device, self.spec.dtype, self.spec.model)
        except ValueError as error:
            raise Refused(getattr(error, "code", "session"), str(error)) from error
        refused = refused_codec(self.spec.policy, "worker")
        if refused:
            raise Refused("codec", refused)
        if self.spec.policy.batching:
            self.engine = EngineSession(self.link, self.spec, self._chosen[0], self.device, self._threads, self.resources)
        self.link.limits = Limits(payload_bytes=self._max_payload_bytes or psutil.virtual_memory().total // 2)
        executor, reason = self._chosen
        ours = {"device": self.device, "executor": executor, "executor_reason": reason, "threads": self._threads, "congestion": congestion}
        return ours | _describe_process(executor) | {"max_payload_bytes": self.link.limits.payload_bytes}

    def run(self) -> bool:
        """Serves requests until the client leaves. True if it requested the worker to stop."""
        handlers: dict[Operation, Callable[[Frame], None]] = {
            Operation.OFFER_WEIGHTS: self._offer_weights,
            Operation.PUT_WEIGHTS: self._put_weights,
            Operation.FORWARD: self._forward,
            Operation.DECODE_WINDOW: lambda request: self._ready().decode_window(request),
            Operation.DECODE_ALONE: lambda request: self._ready().decode_alone(request),
            Operation.ADVANCE: lambda request: self._batching().advance(request),
            Operation.GET_BATCHES: lambda request: self._batching().get_batches(request),
            Operation.CANCEL: lambda request: None,  # its window has ended already: no answer
            **HandleOperations(self.link, self._having_model, self._ready).handlers(),
            Operation.GET_NETWORK_COUNTERS: self._get_network_counters,
            Operation.TELEMETRY: lambda request: self.samplers.answer(self.link, request),
            Operation.PING: lambda request: answer_ping(self.link, request),
            Operation.PING_KV_HOST: lambda request: self.pings.answer(self.link, request, self.steps.caches if self.steps else None),
        }
        while True:
            request = self._next_request()
            if request.operation is Operation.SHUTDOWN:
                self.link.reply(request)
                self.link.drain(1.0)
                return True
            handler = handlers.get(request.operation)
            if handler is None:
                raise FrameError("operation", f"{request.operation.name.lower()} has no place in a session")
            try:
                handler(request)
            except ValueError as error:  # all refusals are
                self.link.reply_error(request, getattr(error, "code", "request"), str(error))

    def end(self) -> None:
        """Stops all that the session started, even if caches cannot be closed, as on a lost GPU."""
        with ExitStack() as last:
            if self.engine:
                last.callback(self.engine.leave)
            if self.upload:
                last.callback(self.upload.discard)
            if self.steps and self.steps.caches:
                last.callback(self.steps.caches.close)
            last.callback(self.pings.close)
            last.callback(self.samplers.end)

    def _next_request(self) -> Frame:
        if self.engine and self.engine.has_joined:
            return self.engine.next_request(self._destinations)
        request = (self.steps and self.steps.next_ahead()) or self.link.next_request(self._destinations)
        if self.steps and request.operation is not Operation.DECODE_WINDOW:
            self.steps.end_of_windows()
        return request

    def _destinations(self, operation: Operation, header: Header) -> Sequence[Memory | None]:
        return self.upload.destinations(header) if self.upload else [None] * len(header.tensors)

    def _offer_weights(self, request: Frame) -> None:
        """Allocates memory for the offered weights, and says which of them must be sent."""
        offer = request.header_as(messages.OfferWeights)
        spec = self.spec
        if spec.model is None:
            raise Refused("session", "this session was opened without a model")
        self._forget_model()
        wanted = () if self.engine and self.engine.offer(request) else self._begin_upload(request, offer, spec.model)
        self._join_engine()
        self.link.reply(request, messages.WantWeights((), wanted))

    def _begin_upload(self, request: Frame, offer: messages.OfferWeights, config: dict[str, Any]) -> tuple[int, ...]:
        """Indices of the weights to send."""
        spec = self.spec
        load = {"handles": spec.handles, "kv_budget": spec.kv_budget}
        model, dtype = architecture_of(config), DType.from_torch_name(spec.dtype)
        require_room(model, offer.weights, dtype, self.device, spec.max_length, spec.policy, **load)
        weights = Weights(offer.weights, "cpu" if self.engine else self.device, self._slot_bytes)
        self.upload = WeightUpload(self.link, weights, spec.policy, self.resources)
        begin, name = time.perf_counter(), self._chosen[0]
        if self.engine:  # which has the weights on its device, and makes its own executor: here the offer must be the model
            check_executor(name, config, weights, spec.dtype, self._threads, spec.max_length)
        else:
            executor = make_executor(name, config, weights, spec.dtype, self._threads, spec.max_length, spec.sampling)
            self._executor_s = time.perf_counter() - begin  # handles are made here, not inside a timed step
            caches = None if spec.policy.is_stateless else _new_caches(spec, self.resources, name, executor, self.link)
            self.steps = Steps(self.link, spec, executor, caches, self.costs)
        return self.upload.offer(request)

    def _put_weights(self, request: Frame) -> None:
        if self._offered().put(request):
            self._join_engine()
            self.link.reply(request)

    def _join_engine(self) -> None:
        """Hands the model to an engine, once it is whole."""
        if not self.engine:
            return
        if self.upload and not self.upload.missing:
            founding_fd = self.engine.bring(self.upload.weights)
            self._forget_model()  # before the engine takes memory for it
            if founding_fd is not None:
                self.engine.found(founding_fd)
        if self.engine.welcome:
            self._executor_s, self.samplers.pid = self.engine.welcome.executor_s, self.engine.welcome.pid

    def _forward(self, request: Frame) -> None:
        watch = Stopwatch(self.device, self.link.ledger)
        if self.spec.policy.weights == "every_step":
            upload = self._offered()
            upload.take(request)
            upload.weights.settle()
        self._ready().forward(request, watch)

    def _get_network_counters(self, request: Frame) -> None:
        """This side's ledger and its kernel's counters, as they are before this answer is sent; delta apart from regular."""
        caches = self.steps.caches if self.steps else None
        if caches:
            caches.quiet()
        body = {
            **counters(self.link),
            "steps": [msgspec.to_builtins(cost) for cost in self.costs],
            "peak_rss_bytes": peak_rss_bytes(),
            "executor_s": self._executor_s,
            "weight_store_bytes": self.resources.store.held_bytes,
            "pcie_reason": self._pcie_reason(),
            "kv_budget_bytes": self._kv_budget_bytes(),
            "fallbacks": self.link.ledger.fallbacks,
            "floor": self.steps.executor.floor() if self.upload and self.steps and not self.upload.missing else _NO_FLOOR,
            "kv_host": caches.shadow.books() if caches and caches.shadow else None,
        }
        self.link.reply(request, None, [control(msgspec.json.encode(body))])

    def _pcie_reason(self) -> str | None:
        if self.device != "cuda":
            return "no GPU: the cache lies in host memory, nothing crosses PCIe"
        return "an engine holds weights and cache: its copies over PCIe are not counted" if self.engine else None

    def _kv_budget_bytes(self) -> int | None:
        if self.engine and self.engine.welcome:
            return self.engine.welcome.kv_budget_bytes
        return self.steps.caches.pool.budget_bytes if self.steps and self.steps.caches else None

    def _forget_model(self) -> None:
        """Drops an earlier offer's weights, caches and executor, so that their memory is free for the new model's."""
        if self.steps and self.steps.caches:
            self.steps.caches.close()
        if self.upload is None:
            return
        self.upload.weights.settle()  # before its memory goes
        self.upload.discard()
        self.upload = self.steps = None
        gc.collect()  # a cache and its layers refer to each other

    def _offered(self) -> WeightUpload:
        if self.upload is None:
            raise Refused("weights", "no weights were offered in this session")
        return self.upload

    def _ready(self) -> Steps:
        """The steps, once all weights are here."""
        if self.engine:
            raise Refused("session", "an engine runs this session's requests; send them as calls of advance frames")
        missing = self._offered().missing
        if self.steps is None or missing:
            raise Refused("weights", f"{missing} weights of the model have not been sent")
        return self.steps

    def _having_model(self) -> Steps:
        if self.steps is None:
            raise Refused("handle", "this session has no handles: no weights were offered in it")
        return self.steps

    def _batching(self) -> EngineSession:
        if self.engine is None:
            raise Refused("session", "this session's mode has no batching; only an engine takes calls of several requests")
        return self.engine


def _describe_process(executor: str) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "executor_compiled_for": compiled_for(executor),
        "versions": {name: package_version(name) for name in ("semgap", "torch", "transformers", "numpy", "msgspec")},
        "cpus": sorted(os.sched_getaffinity(0)),
        "machine": identity(),
    }


def _new_caches(spec: SessionSpec, resources: Resources, name: str, executor: Executor, link: Link) -> LiveCaches:
    """The pool of the handles of a session with an executor of that name, and the shadow of their evicted blocks."""
    pool = executor.new_pool(int(spec.kv_budget * spec.handles * executor.cache_nbytes))
    shadow: Shadow | None = None
    if spec.policy.recovery != "recompute":
        transfer = transfer_of(pool)
        if spec.policy.shadow == "worker":
            free = free_bytes("cpu")
            shadow = WorkerShadow(link.ledger, transfer, max(free // 2, free - _KEPT_FREE_BYTES))
        else:
            shadow = _host_shadow(spec, resources, executor, transfer, link)
    most, run = max(OPEN_HANDLES, spec.handles), (executor.forward, link.ledger, resources.io_cpus)
    prefixes = None
    if isinstance(shadow, KVHostShadow) and spec.policy.fetches_prefixes:
        prefixes = _prefixes(pool, spec, shadow, run, f"{name} on {executor.device}")
    return LiveCaches(pool, spec.policy, shadow, *run, most_handles=most, prefixes=prefixes)


def _prefixes(pool: KVPool, spec: SessionSpec, host: KVHostShadow, run: tuple[Run, Ledger, Sequence[int]], computed_by: str) -> Prefixes:
    """The prefixes that the session finds and publishes in its KV host by content."""
    shadow = PrefixShadow(host, spec.salt, computed_by)
    restorer = Restorer(pool, spec.policy, shadow, *run, None, prefix_ways(spec.policy)[spec.policy.prefix])
    return Prefixes(restorer, shadow, spec.policy)


def _host_shadow(spec: SessionSpec, resources: Resources, executor: Executor, transfer: BlockTransfer, link: Link) -> KVHostShadow:
    """A shadow in the worker's KV host, which it has reached. Refused without a KV host or a model_id."""
    if resources.kv_host is None:
        raise Refused("kv_host", "the mode says shadow: kvhost, and this worker has none; start it with --kv-host HOST:PORT")
    if not spec.model_id:
        raise Refused("session", "a session that keeps blocks in a KV host names its model by model_id, the digest of its weights")
    shape, dtype = executor.kv_shape, executor.dtype
    assert spec.model is not None
    name = model_name(spec.model_id, spec.model, spec.policy.codec.weights, spec.policy.lossy_kv)
    layout = messages.KVLayout(name, dtype, shape.layers, shape.heads, shape.head_dim, shape.max_length, BLOCK)
    shadow = KVHostShadow(resources.kv_host.connect, layout, transfer, link.ledger, takes_lossy=spec.policy.lossy_kv is not None)
    shadow.reach()
    return shadow
