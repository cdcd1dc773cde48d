"""Makes a worker hold a model's weights before a client needs them."""

import msgspec

from semgap.client.remote_runtime import RemoteRuntime
from semgap.client.session import open_session
from semgap.client.spec import ClientSpec, WorkerSide
from semgap.engine.model_files import ModelFiles
from semgap.policy import Policy
from semgap.wire.link import connect


def hold_weights(spec: ClientSpec, worker: WorkerSide, model: ModelFiles) -> tuple[int, int]:
    """Offers a model to a worker by hash, in a session of its own. Gives the bytes that it held and those that were sent."""
    policy = Policy(weights="by_hash")
    link = connect(worker.address)
    try:
        open_session(link, msgspec.structs.replace(spec, policy=policy), worker)
        runtime = RemoteRuntime(link, policy, model, spec.drawing, None)
        sent = runtime.upload_weights()
        return runtime.held_bytes, sent
    finally:
        link.close()
