"""The worker on a GPU: steps as captured graphs, the largest launched one by one, results fetched without waiting.

submit(n)    pack ─ copy in ─ graph or launches ─ copy out ─ event        returns at once
submit(n+1)  … the tokens of step n are read on the device …
result(n)    wait for the event of step n, read its tokens from pinned memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupy_engine.batch import AttentionBounds, AttentionMetadata, Batch
from cupy_engine.cuda_device import CudaDevice
from cupy_engine.cuda_graph import GraphSet, batch_buckets, token_buckets
from cupy_engine.cuda_sampler import NO_LOGPROBS, CudaSampler, logprob_records
from cupy_engine.device import Array
from cupy_engine.executor import DoneStep, FailedStep, StepHandle
from cupy_engine.kv_cache import KVCache
from cupy_engine.messages import TokenLogprobs
from cupy_engine.model_registry import CausalLM
from cupy_engine.ops.embedding import embedding
from cupy_engine.ops.last_tokens import take_last_tokens
from cupy_engine.plan import StepError, StepPlan, StepResult
from cupy_engine.pooling import Pooler
from cupy_engine.prompt_scores import PromptScores
from cupy_engine.sampler import NOT_FINITE, NOTHING_ALLOWED
from cupy_engine.slot_table import PackedStep, SlotTable
from cupy_engine.step_buffers import StepArrays, StepBuffers, StepShape
from cupy_engine.step_parts import compute_in_parts
from cupy_engine.worker import move_blocks

_MAX_PREFILLS = 16  # sequences of a graph that may compute several tokens: each costs attention an idle block per head
_NO_TOKEN = {-1: StepError(NOT_FINITE, "internal"), -2: StepError(NOTHING_ALLOWED, "invalid")}


@dataclass(slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to pinned memory; shapes as :func:`logprob_records` wants them."""

    num_top: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray

    def records(self) -> list[TokenLogprobs | None]:
        return logprob_records(self.num_top, self.ids, self.logprobs, self.ranks)


@dataclass(slots=True)
class CudaStep:
    """A step under way on the GPU."""

    step_id: int
    draw_sequences: np.ndarray  # [N]
    token_ids: np.ndarray  # [N] int32, pinned; valid after the event, as are the log-probabilities
    logprobs: PendingLogprobs | None
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    embeddings: dict[int, np.ndarray]  # [H] float32, pinned
    done: Any  # event

    def result(self) -> StepResult:
        self.done.synchronize()
        errors = {int(self.draw_sequences[i]): _NO_TOKEN[self.token_ids[i]] for i in np.flatnonzero(self.token_ids < 0)}
        drawn = np.maximum(self.token_ids, 0).tolist()
        logprobs = [] if self.logprobs is None else self.logprobs.records()
        embeddings = {plan_index: vector.tobytes() for plan_index, vector in self.embeddings.items()}
        return StepResult(self.step_id, drawn, logprobs, self.prompt_logprobs, errors, embeddings)


class CudaWorker:
    """Weights, KV cache, slots and graphs on one GPU. An executor of its own: steps run in order of submission.

    Args:
        max_num_tokens: tokens of the largest step.
        max_num_graph_tokens: tokens of the largest step worth a graph: larger ones keep the GPU busier than the host.
        max_num_seqs: slots.
        table_width: block table columns.
        max_steps_in_flight: submitted steps whose results have not been read.
    """

    def __init__(
        self,
        device: CudaDevice,
        model: CausalLM,
        kv_cache: KVCache,
        sampler: CudaSampler,
        slots: SlotTable,
        *,
        max_num_tokens: int,
        max_num_graph_tokens: int,
        max_num_seqs: int,
        table_width: int,
        max_steps_in_flight: int,
    ) -> None:
        import cupyx

        self._device = device
        self._model = model
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._slots = slots
        self._prompt_scores = PromptScores(model, sampler)
        self._pooler = Pooler()
        self._table_width = table_width
        largest = StepShape(max_num_tokens, max_num_seqs, table_width, max_num_seqs, max_num_seqs)
        self._buffers = StepBuffers(largest, max_steps_in_flight + 1)
        self._drawn = device.empty((max_num_seqs,), np.int32)
        self._results = [cupyx.empty_pinned(max_num_seqs, np.int32) for _ in range(max_steps_in_flight + 1)]
        self._max_num_tokens, self._max_num_graph_tokens = max_num_tokens, max_num_graph_tokens
        self._max_num_seqs = max_num_seqs
        self._decode_shapes, self._mixed_shapes = self._make_shapes()
        self.graphs = GraphSet(device.stream, self._upload_padding, self._run_shape)

    def _make_shapes(self) -> tuple[list[StepShape], list[StepShape]]:
        """Shapes worth a graph, ascending: of steps that only decode, and of others."""
        width, max_num_seqs = self._table_width, self._max_num_seqs
        return (
            [StepShape.decode(n, width) for n in batch_buckets(min(max_num_seqs, self._max_num_tokens))],
            [StepShape.mixed(n, max_num_seqs, width, _MAX_PREFILLS) for n in token_buckets(self._max_num_graph_tokens)],
        )

    def _largest_first(self) -> list[StepShape]:
        return sorted(self._decode_shapes + self._mixed_shapes, key=lambda shape: shape.num_tokens, reverse=True)

    def warm_up(self) -> None:
        """Run every shape that has a graph once. To be called before the first capture."""
        self.graphs.warm_up(self._largest_first())

    def capture_graphs(self) -> None:
        """Prepare all graphs, on the present cache."""
        self.graphs.capture(self._largest_first())

    @property
    def max_bytes_per_slot(self) -> int:
        """Device memory that a sequence with every option in use may take beyond what is taken from the start."""
        return self._sampler.max_bytes_per_slot

    def attach(self, kv_cache: KVCache, slots: SlotTable, table_width: int) -> None:
        """Work on this cache from now on, with a table that is no wider than the first one."""
        self._kv_cache, self._slots, self._table_width = kv_cache, slots, table_width
        self._decode_shapes, self._mixed_shapes = self._make_shapes()
        self.capture_graphs()

    def submit(self, plan: StepPlan) -> StepHandle:
        """Enqueue a step."""
        try:
            with self._device.use():
                move_blocks(plan, self._kv_cache)
                self._seat(plan)
                return self._enqueue_if_it_fits(plan) or self._compute_in_parts(plan)
        except Exception as error:  # whatever breaks a step fails its requests, not the engine
            return FailedStep(error)

    def _enqueue_if_it_fits(self, plan: StepPlan) -> CudaStep | None:
        try:
            return self._enqueue(plan)
        except MemoryError:
            return None  # what its traceback holds on to is free only after this

    def _compute_in_parts(self, plan: StepPlan) -> DoneStep:
        self._device.release_unused()
        return DoneStep(compute_in_parts(plan, lambda part: self._enqueue(part).result()))

    def _enqueue(self, plan: StepPlan) -> CudaStep:
        """What may run out of memory comes before the draws, which a second try would repeat."""
        if not plan.slots:
            return self._finish(plan.step_id, np.empty(0, np.int32), None, {}, {})
        step = self._slots.pack(plan)
        shape = self._graph_shape(plan, step)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        embeddings: dict[int, np.ndarray] = {}
        logits: Array | None = None
        if shape is None:
            shape = StepShape.of(step)
            self._buffers.upload(step, shape, self._device.stream)
            arrays = StepArrays.view(self._buffers.memory, shape)
            are_all_wanted = self._are_all_states_wanted(plan)
            attention = _attention(arrays, step.query_lens, step.context_lens)
            hidden = self._forward(arrays, attention, None if are_all_wanted else arrays.logits_rows)
            prompt_logprobs = self._prompt_scores.of_step(plan, hidden)
            if shape.num_draws:
                logits = self._sample(embedding(arrays.logits_rows, hidden) if are_all_wanted else hidden, arrays)
            pooled = self._pooler.of_step(plan, hidden)
            embeddings = {i: _fetch(vector, self._device.stream) for i, vector in pooled.items()}
        else:
            self._buffers.upload(step, shape, self._device.stream)
            logits = self.graphs.launch(shape)
        logprobs = self._logprobs(step, shape, logits)
        return self._finish(plan.step_id, step.draw_sequences, logprobs, prompt_logprobs, embeddings)

    def _graph_shape(self, plan: StepPlan, step: PackedStep) -> StepShape | None:
        """The smallest captured shape that holds the step; ``None`` if it has to be launched op by op."""
        if self._are_all_states_wanted(plan):
            return None  # graphs keep them inside
        shapes, wanted = self._decode_shapes if step.is_decode else self._mixed_shapes, StepShape.of(step)
        return next((shape for shape in shapes if shape.holds(wanted)), None)

    def _are_all_states_wanted(self, plan: StepPlan) -> bool:
        """Whether hidden states are read that no draw needs."""
        return self._prompt_scores.are_wanted(plan) or self._pooler.is_wanted(plan)

    def _seat(self, plan: StepPlan) -> None:
        for setup in plan.slot_setups:
            self._sampler.set_slot(setup)
        self._prompt_scores.note(plan.slot_setups)
        self._pooler.note(plan.slot_setups)
        self._slots.write(plan)
        self._sampler.flush(self._device.stream)
        self._sampler.set_masks(plan.masks, self._device.stream)

    def _forward(self, arrays: StepArrays, attention: AttentionMetadata, output_rows: Array | None = None) -> Array:
        token_ids = take_last_tokens(arrays.token_ids, self._sampler.last_tokens)
        return self._model.forward(Batch(token_ids, arrays.positions, attention, output_rows), self._kv_cache)

    def _logprobs(self, step: PackedStep, shape: StepShape, logits: Array | None) -> PendingLogprobs | None:
        """Enqueue log-probabilities for the draws that ask, and their copy to the host."""
        num_top, stream = self._sampler.num_top_logprobs(step.draw_slots), self._device.stream
        if logits is None or not (num_top != NO_LOGPROBS).any():
            return None
        num_draws, width = len(num_top), 1 + int(num_top.max())
        rows = StepArrays.view(self._buffers.memory, shape).draw_rows[:num_draws]
        arrays = (
            self._device.empty((num_draws, width), np.int32),
            self._device.empty((num_draws, width), np.float32),
            self._device.empty((num_draws,), np.int32),
        )
        self._sampler.logprobs(logits, rows, self._drawn[:num_draws], width - 1, *arrays)
        return PendingLogprobs(num_top, *(_fetch(array, stream) for array in arrays))

    def _upload_padding(self, shape: StepShape) -> None:
        self._buffers.upload(PackedStep.empty(), shape, self._device.stream)

    def _run_shape(self, shape: StepShape) -> Array:
        """Enqueue a step of a captured shape whose integers are in the buffers; returns its logits."""
        arrays = StepArrays.view(self._buffers.memory, shape)
        ones = np.ones(shape.num_sequences, np.int32)
        attention = _attention(arrays, ones, ones)
        if not shape.num_prefills:
            return self._sample(self._forward(arrays, attention), arrays)
        attention.bounds = AttentionBounds(shape.num_tokens, shape.num_prefills)
        return self._sample(self._forward(arrays, attention, arrays.logits_rows), arrays)

    def _sample(self, hidden: Array, arrays: StepArrays) -> Array:
        logits = self._model.compute_logits(hidden)
        drawn = self._drawn[: len(arrays.draw_slots)]
        self._sampler.sample(logits, arrays.draw_rows, arrays.draw_slots, arrays.draw_positions, drawn)
        return logits

    def _finish(
        self,
        step_id: int,
        draw_sequences: np.ndarray,
        logprobs: PendingLogprobs | None,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        embeddings: dict[int, np.ndarray],
    ) -> CudaStep:
        """Enqueue the copy of the tokens to the host."""
        import cupy

        num_draws, stream = len(draw_sequences), self._device.stream
        token_ids = self._results[step_id % len(self._results)][:num_draws]
        if num_draws:
            kind = cupy.cuda.runtime.memcpyDeviceToHost
            cupy.cuda.runtime.memcpyAsync(token_ids.ctypes.data, self._drawn.data.ptr, 4 * num_draws, kind, stream.ptr)
        done = cupy.cuda.Event(disable_timing=True)
        done.record(stream)
        return CudaStep(step_id, draw_sequences, token_ids, logprobs, prompt_logprobs, embeddings, done)


def _fetch(array: Array, stream: Any) -> np.ndarray:
    import cupyx

    pinned: np.ndarray = cupyx.empty_pinned(array.shape, array.dtype)
    array.get(stream=stream, out=pinned, blocking=False)
    return pinned


def _attention(arrays: StepArrays, query_lens: np.ndarray, context_lens: np.ndarray) -> AttentionMetadata:
    return AttentionMetadata(
        query_start=arrays.query_start,
        context_lens=arrays.context_lens,
        block_tables=arrays.block_tables,
        slot_mapping=arrays.slot_mapping,
        max_query_len=int(query_lens.max()),
        max_context_len=int(context_lens.max()),
        host_query_lens=query_lens,
        host_context_lens=context_lens,
    )
