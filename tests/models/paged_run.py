"""Runs a model on a paged cache the way a worker does, with blocks in whatever physical order a test wants."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cupy_engine.batch import AttentionMetadata, Batch
from cupy_engine.device import NumpyDevice
from cupy_engine.hf_config import load_hf_config
from cupy_engine.kv_cache import KVCache
from cupy_engine.model_registry import CausalLM, model_class
from cupy_engine.safetensors_weights import SafetensorsWeights

BLOCK_SIZE = 16


@dataclass
class Sequence:
    """Token ids known so far, how many of them are in the cache, and in which blocks."""

    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)


@dataclass
class PagedRun:
    """A model, its cache, and blocks handed out in a random order if ``scatter_seed`` is given, else ascending."""

    model: CausalLM
    kv_cache: KVCache
    free_blocks: list[int]

    @classmethod
    def open(cls, folder: Path, num_blocks: int = 128, scatter_seed: int | None = None) -> PagedRun:
        config = load_hf_config(folder)
        model = model_class(config.architecture)(config, SafetensorsWeights(folder, config), NumpyDevice(), np.float32)
        order = (
            np.arange(num_blocks)[::-1]
            if scatter_seed is None
            else np.random.default_rng(scatter_seed).permutation(num_blocks)
        )
        return cls(model, KVCache(config, num_blocks, BLOCK_SIZE, 0, NumpyDevice(), np.float32), order.tolist())

    def step(self, scheduled: list[tuple[Sequence, int]]) -> list[np.ndarray]:
        """Compute the next n tokens of each sequence; returns the logits of those tokens, [n, V] each."""
        return np.split(self.logits(scheduled), np.cumsum([n for _, n in scheduled])[:-1])

    def logits(self, scheduled: list[tuple[Sequence, int]], output_rows: np.ndarray | None = None) -> np.ndarray:
        """The same, of some of the step's tokens; [R, V]."""
        batch = self._pack(scheduled)
        batch.output_rows = output_rows
        hidden = self.model.forward(batch, self.kv_cache)
        for sequence, n in scheduled:
            sequence.num_computed += n
        return self.model.compute_logits(hidden)

    def greedy(self, sequence: Sequence, logits: np.ndarray, num_tokens: int) -> list[int]:
        """Continue from the last computed logits one token at a time."""
        chosen = []
        for _ in range(num_tokens):
            chosen.append(int(logits.argmax()))
            sequence.token_ids.append(chosen[-1])
            logits = self.step([(sequence, 1)])[0][-1]
        return chosen

    def _pack(self, scheduled: list[tuple[Sequence, int]]) -> Batch:
        token_ids, positions, slots, tables = [], [], [], []
        for sequence, n in scheduled:
            end = sequence.num_computed + n
            while len(sequence.block_ids) * BLOCK_SIZE < end:
                sequence.block_ids.append(self.free_blocks.pop())
            chunk = range(sequence.num_computed, end)
            token_ids += sequence.token_ids[chunk.start : chunk.stop]
            positions += chunk
            slots += [sequence.block_ids[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in chunk]
            tables.append(sequence.block_ids[: -(-end // BLOCK_SIZE)])
        query_lens = np.array([n for _, n in scheduled], np.int32)
        context_lens = np.array([sequence.num_computed + n for sequence, n in scheduled], np.int32)
        width = max(map(len, tables))
        metadata = AttentionMetadata(
            query_start=np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32),
            context_lens=context_lens,
            block_tables=np.array([table + [0] * (width - len(table)) for table in tables], np.int32),
            slot_mapping=np.array(slots, np.int32),
            max_query_len=int(query_lens.max()),
            max_context_len=int(context_lens.max()),
            host_query_lens=query_lens,
            host_context_lens=context_lens,
        )
        return Batch(np.array(token_ids, np.int32), np.array(positions, np.int32), metadata)
