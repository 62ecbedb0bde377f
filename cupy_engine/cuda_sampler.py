"""The sampler on a GPU: what slots ask for lives there, and drawing neither allocates nor waits.

set_slot ─▶ queue ─ flush: one launch ─▶ slots on the device ◀─ sample: two launches, fit for a captured graph

The meaning is that of :mod:`cupy_engine.sampler`; the same seed gives the same token but for rounding. Probabilities
are integers there, so a draw does not depend on how the work was split.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from cupy_engine.cuda_slot import LIST_FIELDS, SLOT, SLOT_UPDATE, SlotData
from cupy_engine.device import Array, Device
from cupy_engine.messages import TokenLogprobs
from cupy_engine.ops import _cuda_sampling as ops
from cupy_engine.plan import SlotSetup, TokenMask

NO_LOGPROBS = -1
_MAX_LIST_BYTES = 64 << 10  # of stop tokens, biases and bad words: far more than a request may bring


class CudaSampler:
    """Per-slot sampling state and the draw, on the current GPU. All calls use one stream.

    Args:
        num_slots: slots are numbered below this; the most draws at once.
        vocab_size: V, the width of the logits.
        device: the GPU.

    Raises:
        ValueError: the vocabulary is too large.

    Usage::

        sampler.set_slot(setup)
        sampler.flush(stream)
        sampler.sample(logits, rows, slots, positions, token_ids)
    """

    def __init__(self, num_slots: int, vocab_size: int, device: Device) -> None:
        if vocab_size > ops.MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be at most {ops.MAX_VOCAB_SIZE}, got {vocab_size}")
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._device = device
        self._num_multiprocessors = int(device.xp.cuda.Device().attributes["MultiProcessorCount"])
        self.last_tokens: Array = device.xp.zeros(num_slots, np.int32)  # [num_slots], 0 where a draw failed
        self._slots: Array = device.xp.zeros(num_slots * SLOT.itemsize, np.uint8)
        self._parts: Array = device.empty((num_slots * ops.MAX_PARTS * ops.PART_BYTES,), np.uint8)
        self._num_top = np.full(num_slots, NO_LOGPROBS)
        self._waiting: dict[int, SlotData] = {}
        self._lists: dict[int, Array] = {}  # by slot, what its record points to
        self._always_forbidden: dict[int, np.ndarray] = {}  # by guided slot
        self._counts = _CountRows(vocab_size, device)
        self._uploads: deque[tuple[Any, np.ndarray]] = deque()  # pinned memory, and the event behind its last reader

    @property
    def max_bytes_per_slot(self) -> int:
        """Device memory of a slot that makes use of everything: counts, bitmaps over the vocabulary, lists."""
        return self._counts.bytes_per_row + self._vocab_size // 2 + _MAX_LIST_BYTES

    @property
    def counts_bytes_per_slot(self) -> int:
        """Device memory of a slot that penalizes repetition, kept for the next one; other slots need none."""
        return self._counts.bytes_per_row

    def set_slot(self, setup: SlotSetup) -> None:
        """Seat a sequence from the next :meth:`flush` on. A resumed one brings its output in ``token_ids``."""
        data = self._waiting[setup.slot] = SlotData.of(setup, self._vocab_size)
        self._always_forbidden.pop(setup.slot, None)
        if data.always_forbidden is not None:
            self._always_forbidden[setup.slot] = data.always_forbidden
        self._num_top[setup.slot] = (setup.params.logprobs or 0) if setup.needs_logprobs else NO_LOGPROBS

    def flush(self, stream: Any) -> None:
        """Enqueue what :meth:`set_slot` left to do, before the step's kernels and outside of a capture."""
        if not self._waiting:
            return
        with stream:
            memory = self._pack(self._waiting)
            address, num_updates = memory.ctypes.data, len(self._waiting)
            ops.seat_slots(self._slots, address, num_updates, self._num_slots, self._vocab_size)
            self._keep_until_read(memory, stream)
        self._waiting = {}

    def set_masks(self, masks: list[TokenMask], stream: Any) -> None:
        """Enqueue what guided slots may draw next: after :meth:`flush`, before the step's kernels."""
        masks = [mask for mask in masks if mask.slot in self._always_forbidden]
        if not masks:
            return
        import cupyx

        width = -(-self._vocab_size // 32)
        with stream:
            memory: np.ndarray = cupyx.empty_pinned(len(masks) * (width + 1), np.int32)
            indices, rows = memory[: len(masks)], memory[len(masks) :].reshape(len(masks), width)
            for i, mask in enumerate(masks):
                indices[i] = mask.slot
                rows[i] = ~np.frombuffer(mask.allowed, np.int32, width) | self._always_forbidden[mask.slot]
            addresses = indices.ctypes.data, rows.ctypes.data
            ops.set_masks(self._slots, addresses, len(masks), self._num_slots, width)
            self._keep_until_read(memory, stream)

    def _keep_until_read(self, memory: np.ndarray, stream: Any) -> None:
        """Hold on to pinned memory until the stream has come past this point."""
        while self._uploads and self._uploads[0][0].done:
            self._uploads.popleft()
        event = self._device.xp.cuda.Event(disable_timing=True)
        event.record(stream)
        self._uploads.append((event, memory))

    def _pack(self, waiting: dict[int, SlotData]) -> np.ndarray:
        """Pinned memory for the kernel to read: SLOT_UPDATE records, then their lists and tokens."""
        import cupyx

        num_words = sum(data.lists.size + data.counted.size for data in waiting.values())
        records_bytes = len(waiting) * SLOT_UPDATE.itemsize
        memory: np.ndarray = cupyx.empty_pinned(records_bytes + 4 * num_words, np.uint8)
        updates = memory[:records_bytes].view(SLOT_UPDATE)
        words = memory[records_bytes:].view(np.int32)
        address = memory.ctypes.data + records_bytes
        place = 0
        for update, (slot, data) in zip(updates, waiting.items(), strict=True):
            lists_end = place + data.lists.size
            end = lists_end + data.counted.size
            words[place:lists_end], words[lists_end:end] = data.lists, data.counted
            update["lists"], update["num_list_words"] = address + 4 * place, data.lists.size
            update["tokens"], update["num_tokens"] = address + 4 * lists_end, data.counted.size
            update["num_prompt_tokens"], update["index"] = data.num_prompt_tokens, slot
            self._place(slot, data, update)
            place = end
        return memory

    def _place(self, slot: int, data: SlotData, update: np.void) -> None:
        """Find device memory for a slot's lists and counts, and put its addresses into the update."""
        record = data.record.copy()
        self._lists.pop(slot, None)
        if data.lists.size:
            target = self._lists[slot] = self._device.empty(data.lists.shape, np.int32)
            update["list_target"] = target.data.ptr
            for name in LIST_FIELDS:
                if record[name]:
                    record[name] = target.data.ptr + 4 * int(record[name])
        else:
            update["list_target"] = 0
        record["counts"] = self._counts.seat(slot) if data.is_penalized else self._counts.discard(slot)
        update["slot"] = record

    def sample(self, logits: Array, rows: Array, slots: Array, positions: Array, out_token_ids: Array) -> None:
        """Enqueue a draw per entry of ``rows``; also notes each token in its slot and in ``last_tokens``.

        Args:
            logits: [R, V] float32, float16 or bfloat16; not changed.
            rows: [N] int32, the row of logits each draw uses; several may use the same.
            slots: [N] int32, none twice; an entry outside the slots is padding, and its token is not written.
            positions: [N] int32, the position in its sequence of the token being drawn.
            out_token_ids: [N] int32; -1 where logits are not finite, -2 where a request leaves no token to choose.

        Raises:
            ValueError: more draws than slots, another vocabulary, or an array that is not contiguous.
        """
        if len(rows) > self._num_slots or logits.shape[1] != self._vocab_size:
            raise ValueError(
                f"at most {self._num_slots} draws of {self._vocab_size} tokens, got {len(rows)} of {logits.shape[1]}"
            )
        ops.sample(
            logits,
            rows,
            slots,
            positions,
            out_token_ids,
            slots=self._slots,
            num_slots=self._num_slots,
            last_tokens=self.last_tokens,
            parts=self._parts,
            num_multiprocessors=self._num_multiprocessors,
        )

    def logprobs(
        self,
        logits: Array,
        rows: Array,
        token_ids: Array,
        num_top: int,
        out_ids: Array,
        out_logprobs: Array,
        out_ranks: Array,
    ) -> None:
        """Enqueue log-probabilities of drawn tokens: see :func:`cupy_engine.ops._cuda_sampling.token_logprobs`.

        A token below 0 (a draw that failed) gets NaN and rank 0.
        """
        ops.token_logprobs(logits, rows, token_ids, num_top, out_ids, out_logprobs, out_ranks)

    def num_top_logprobs(self, slots: np.ndarray) -> np.ndarray:
        """[N] int: how many alternatives the sequences now in these slots want listed, ``NO_LOGPROBS`` if nothing."""
        num_top: np.ndarray = self._num_top[slots]
        return num_top

    def prompt_logprobs(self, logits: Array, next_token_ids: np.ndarray, num_top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens, one record per row of logits [R, V]; waits for the GPU.

        A row that is not finite gives a NaN logprob and rank 0.
        """
        num_tokens, device = len(next_token_ids), self._device
        rows = device.xp.arange(num_tokens, dtype=np.int32)
        shape = (num_tokens, 1 + num_top)
        arrays = device.empty(shape, np.int32), device.empty(shape, np.float32), device.empty((num_tokens,), np.int32)
        self.logprobs(logits, rows, device.asarray(next_token_ids, np.int32), num_top, *arrays)
        ids, logprobs, ranks = map(device.to_host, arrays)
        records = logprob_records(np.full(num_tokens, num_top), ids, logprobs, ranks)
        return [record for record in records if record is not None]


def logprob_records(
    num_top: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray
) -> list[TokenLogprobs | None]:
    """Records of N draws from what :meth:`CudaSampler.logprobs` gave, on the host.

    Args:
        num_top: [N] int, alternatives that each draw asked for; ``NO_LOGPROBS`` gives ``None``, as does a failed draw.
        ids: [N, 1 + K] int32.
        logprobs: [N, 1 + K] float32.
        ranks: [N] int32.
    """
    records: list[TokenLogprobs | None] = []
    for count, row_ids, row, rank in zip(*(array.tolist() for array in (num_top, ids, logprobs, ranks)), strict=True):
        if count == NO_LOGPROBS or row_ids[0] < 0:
            records.append(None)
            continue
        listed = zip(row_ids[1 : 1 + count], row[1 : 1 + count], strict=True)
        top = [(token_id, logprob) for token_id, logprob in listed if token_id >= 0]
        records.append(TokenLogprobs(row_ids[0], row[0], rank, top))
    return records


class _CountRows:
    """Token counts on the device, [V] uint16, for the slots that penalize repetition. Rows are reused."""

    def __init__(self, vocab_size: int, device: Device) -> None:
        self._device = device
        self._row_len = -(-vocab_size // 8) * 8  # whole vectors
        self._rows: dict[int, Array] = {}
        self._free: list[Array] = []

    @property
    def bytes_per_row(self) -> int:
        return 2 * self._row_len

    def seat(self, slot: int) -> int:
        """The address of the slot's row; what is in it is undefined."""
        if slot not in self._rows:
            self._rows[slot] = self._free.pop() if self._free else self._device.empty((self._row_len,), np.uint16)
        return int(self._rows[slot].data.ptr)

    def discard(self, slot: int) -> int:
        """Take the slot's row back, if it has one; returns the null address."""
        if slot in self._rows:
            self._free.append(self._rows.pop(slot))
        return 0
