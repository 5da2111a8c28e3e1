"""A step that did not come to its end, and what is left of the engine. Loaded when that has happened."""

from typing import Any


def after(engine: Any, error: BaseException) -> None:
    """Called with the LLMEngine whose step raised `error`, which the caller raises again.

    After Ctrl-C, an engine that computes in this process on a CPU is used further: every unfinished request
    ends, all KV blocks are free, and the prefix cache is empty. A step changes nothing that outlives its
    requests but the KV cache and the rows of the batch, and each of these is written again before a new
    request reads it. Any other engine is closed: ranks may be in the middle of a sum, a GPU in that of
    a capture, a compiler in that of a graph.
    """
    on = engine.config.optimizations
    if (
        not isinstance(error, KeyboardInterrupt)
        or engine.config.device != "cpu"
        or on.tensor_parallel_size > 1
        or on.kernels == "compile"
    ):
        engine.close(f"a step failed ({type(error).__name__}: {error})")
        return
    try:
        old = engine.scheduler
        for queue in (old.waiting, old.prefilling, old.decoding):
            for seq in queue.values():
                seq.finish_reason = "abort"
        blocks = type(old.blocks)(old.blocks.num_blocks, old.blocks.block_size, old.stats)
        scheduler = type(old)(old.config, blocks, old.stats)
        loop = type(engine.loop)(scheduler, engine.runner)
        engine.scheduler, engine.loop = scheduler, loop
    except BaseException:
        engine.close("a step was interrupted, and Ctrl-C came again while it was undone")
        raise
