"""The session before a trial's own: computes the beginnings of its requests, and publishes them in the KV host by content."""

from collections.abc import Sequence

import numpy as np

from semgap.client.books import reconciled
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.report import Connection, Report
from semgap.client.session import open_session
from semgap.client.spec import ClientError, ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles
from semgap.tensors import DType
from semgap.wire.link import connect
from semgap.wire.messages import Kind
from semgap.wire.step_cost import Recovered
from semgap.wire.tcp import Timeouts, tcp_info


def publish_prefixes(spec: ClientSpec, worker: WorkerSide, model: ModelFiles, prompts: Sequence[np.ndarray]) -> tuple[Connection, ...]:
    """Publishes the prefix of each measured prompt that has one, in a session of its own. Gives its connection, or none if none has one.

    ClientError if the KV host keeps less. Whether it still has all of them after the last one, `require_found` says.
    """
    prefixes = [prompt[: spec.phase.prefix_of(number)] for number, prompt in enumerate(prompts) if spec.phase.prefix_of(number)]
    if not (spec.policy.fetches_prefixes and prefixes):
        return ()
    link = connect(worker.address, Timeouts(worker.timeout_s, worker.timeout_s))
    open_session(link, spec, worker)
    start_tcp = tcp_info(link.sock)
    runtime = RemoteRuntime(link, spec.policy, model, spec.drawing)
    runtime.upload_weights()
    for number, prefix in enumerate(prefixes):
        runtime.prefill(prefix, number, Kind.SETUP)
        published = runtime.publish()
        if published.kept < published.blocks:
            raise ClientError(
                f"the KV host keeps {published.kept} of {published.blocks} blocks of a prefix of {len(prefix)} tokens; raise "
                "config.worker.kv_host_bytes"
            )
        runtime.end_request()
    books, link_bytes = reconciled(link), {"up": link.ledger.up.frame, "down": link.ledger.down.frame}
    link.close()
    return (Connection(start_tcp, books, link_bytes),)


def require_found(spec: ClientSpec, model: ModelFiles, report: Report) -> None:
    """ClientError if a request found less than was published for it, and its step does not say why: it would pass for a slow fetch."""
    if not spec.policy.fetches_prefixes or report.session is None:
        return
    token_bytes, costs = model.architecture.kv_shape(1).nbytes(DType.from_torch_name(spec.dtype).itemsize), report.session.books.peer.steps
    for row in report.steps:
        published = row.get("prefix_tokens")
        if not published:
            continue
        came = costs[row["order"]].recovered or Recovered()
        found = came.missing_bytes // token_bytes
        if found < published and came.fallback is None:
            raise ClientError(
                f"the KV host has {found} of the {published} tokens that were published for request {row['request']}: it dropped the rest "
                "for other blocks; raise config.worker.kv_host_bytes"
            )
