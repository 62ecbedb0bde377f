"""CUDA launches of sampling and log-probabilities: see ``kernels/sampling.cu`` and ``kernels/logprobs.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.device import Array
from cupy_engine.ops._launch import check_contiguous, launch, type_name, vector_width

MAX_VOCAB_SIZE = 1 << 20
MAX_PARTS = 64
PART_BYTES = 12  # struct Best
MAX_TOP = 32

_BLOCK = 1024
_PART_BLOCK = 256
_PART_BLOCKS_PER_SM = 4  # as many as are resident at once: a second wave would start late
_MIN_PART_TOKENS = 4096
_PART_ALIGNMENT = 32


def seat_slots(slots: Array, updates_address: int, num_updates: int, num_slots: int, vocab_size: int) -> None:
    """Apply ``num_updates`` SLOT_UPDATE records in page-locked host memory to slots [num_slots] SLOT."""
    launch(
        "sampling.cu", "seat_slots", (num_updates,), _BLOCK, slots, np.uint64(updates_address), num_slots, vocab_size
    )


def set_masks(slots: Array, addresses: tuple[int, int], num_masks: int, num_slots: int, num_words: int) -> None:
    """Replace what ``num_masks`` guided slots forbid, in slots [num_slots] SLOT.

    Args:
        addresses: of indices [num_masks] int32 and masks [num_masks, num_words] uint32, in page-locked host memory.
    """
    indices, masks = map(np.uint64, addresses)
    launch("sampling.cu", "set_masks", (num_masks,), _BLOCK, slots, indices, masks, num_slots, num_words)


def split_row(num_draws: int, vocab_size: int, num_multiprocessors: int) -> tuple[int, int]:
    """Into how many parts each draw's row is split to fill the GPU, and the tokens of a part."""
    wanted = _PART_BLOCKS_PER_SM * num_multiprocessors // num_draws
    num_parts = min(max(1, wanted), -(-vocab_size // _MIN_PART_TOKENS), MAX_PARTS)
    part_size = -(-vocab_size // (num_parts * _PART_ALIGNMENT)) * _PART_ALIGNMENT
    return -(-vocab_size // part_size), part_size


def sample(
    logits: Array,
    rows: Array,
    draw_slots: Array,
    positions: Array,
    token_ids: Array,
    *,
    slots: Array,
    num_slots: int,
    last_tokens: Array,
    parts: Array,
    num_multiprocessors: int,
) -> None:
    """Draw a token per entry of ``rows``: two launches, nothing allocated.

    Args:
        logits: [R, V] float32, float16 or bfloat16.
        rows, draw_slots, positions, token_ids: [N] int32.
        slots: [num_slots] SLOT, as bytes.
        last_tokens: [num_slots] int32.
        parts: scratch of N * MAX_PARTS * PART_BYTES bytes.

    Raises:
        ValueError: an array is not contiguous.
    """
    check_contiguous(
        logits=logits, rows=rows, draw_slots=draw_slots, positions=positions, token_ids=token_ids, parts=parts
    )
    (num_rows, vocab_size), num_draws = logits.shape, len(rows)
    if num_draws == 0:
        return
    kind = f"<{type_name(logits)}, {vector_width(vocab_size, logits)}>"
    num_parts, part_size = split_row(num_draws, vocab_size, num_multiprocessors)
    reading: tuple[Any, ...] = (parts, logits, rows, draw_slots, positions, slots)
    grid = (num_parts, num_draws)
    launch("sampling.cu", "best_tokens" + kind, grid, _PART_BLOCK, *reading, num_rows, num_slots, vocab_size, part_size)
    sizes = (num_parts, num_rows, num_slots, vocab_size)
    launch("sampling.cu", "draw_tokens" + kind, (num_draws,), _BLOCK, token_ids, last_tokens, *reading, *sizes)


def token_logprobs(
    logits: Array, rows: Array, token_ids: Array, num_top: int, ids: Array, logprobs: Array, ranks: Array
) -> None:
    """Log-probabilities of one token per entry of ``rows`` and of the ``num_top`` most likely ones; one launch.

    Args:
        logits: [R, V] float32, float16 or bfloat16, any values.
        rows, token_ids, ranks: [N] int32.
        num_top: alternatives to list, at most 32; where V is less, the rest is -1 and NaN.
        ids: [N, 1 + num_top] int32, the token and the alternatives, most likely first.
        logprobs: [N, 1 + num_top] float32.

    Raises:
        ValueError: ``num_top`` is too large, or an array has another shape or is not contiguous.
    """
    check_contiguous(logits=logits, rows=rows, token_ids=token_ids, ids=ids, logprobs=logprobs, ranks=ranks)
    num_tokens = len(rows)
    if not 0 <= num_top <= MAX_TOP:
        raise ValueError(f"num_top must be at most {MAX_TOP}, got {num_top}")
    if not ids.shape == logprobs.shape == (num_tokens, 1 + num_top):
        raise ValueError(f"ids and logprobs must be {(num_tokens, 1 + num_top)}, got {ids.shape}, {logprobs.shape}")
    if num_tokens == 0:
        return
    num_rows, vocab_size = logits.shape
    expression = f"token_logprobs<{type_name(logits)}, {vector_width(vocab_size, logits)}>"
    arrays = (ids, logprobs, ranks, logits, rows, token_ids)
    launch("logprobs.cu", expression, (num_tokens,), _BLOCK, *arrays, num_rows, vocab_size, num_top)
