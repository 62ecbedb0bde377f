"""What people watch: a map of the KV blocks and how far each running sequence is; small, however large the engine."""

from __future__ import annotations

from cupy_engine.block_pool import Block
from cupy_engine.messages import LiveSequence, LiveView
from cupy_engine.request import Sequence
from cupy_engine.scheduler import Scheduler

MAX_BLOCKS = 1024
MAX_SEQUENCES = 64


def live_view(scheduler: Scheduler) -> LiveView:
    """The picture of this moment; takes about 100 µs."""
    blocks, running = scheduler.block_manager.pool.blocks, scheduler.running
    step = -(-len(blocks) // MAX_BLOCKS)
    return LiveView(
        blocks="".join(map(_mark, blocks[::step])),
        blocks_step=step,
        sequences=[_progress(sequence) for sequence in running[:MAX_SEQUENCES]],
        num_prefilling=sum(sequence.is_prefilling for sequence in running),
    )


def _mark(block: Block) -> str:
    if block.ref_count:
        return str(min(block.ref_count, 9))
    return "." if block.block_hash is None else "c"


def _progress(sequence: Sequence) -> LiveSequence:
    return LiveSequence(sequence.num_prompt_tokens, sequence.num_output_tokens, sequence.num_computed_tokens)
