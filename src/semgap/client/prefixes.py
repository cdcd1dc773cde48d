"""The session before a trial's own: computes the beginnings of its requests, and publishes them in the KV host by content."""

from collections.abc import Sequence

import numpy as np

from semgap.client.books import reconciled
from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.report import Connection
from semgap.client.session import open_session
from semgap.client.spec import ClientError, ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles
from semgap.wire.link import connect
from semgap.wire.messages import Kind
from semgap.wire.tcp import Timeouts, tcp_info


def publish_prefixes(spec: ClientSpec, worker: WorkerSide, model: ModelFiles, prompts: Sequence[np.ndarray]) -> tuple[Connection, ...]:
    """Publishes the prefix of each measured prompt that has one, in a session of its own. Gives its connection, or none if none has one.

    ClientError if the KV host keeps less.
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
