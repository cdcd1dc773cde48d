"""The output head in the client's process, by the same product as the worker's, so that the logits are bitwise the worker's."""

from semgap.client.runtime import ClientHead
from semgap.engine.model_files import ModelFiles


def load_client_head(model: ModelFiles, executor: str, threads: int) -> ClientHead:
    """The head of a model for a worker that runs `executor`. Loads torch, with `threads`, unless that is fused."""
    if executor == "fused":
        from semgap.engine.fused_head import FusedHead

        return FusedHead.load(model)
    from semgap.engine.device import limit_threads
    from semgap.engine.output_head import load_head

    limit_threads(threads)
    return load_head(model)
