"""A request (a caller's prompt) and its sequences (continuations of it), as the scheduler keeps them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cupy_engine.block_manager import hash_block, root_hash
from cupy_engine.errors import InvalidRequestError
from cupy_engine.guides import Guide
from cupy_engine.messages import FinishReason, GenerateRequest, TokenLogprobs


class SequenceStatus(enum.Enum):
    """Where a sequence is.

    WAITING ⇄ RUNNING → FINISHED, with SWAPPED (waiting, KV on the host) on the way back after a preemption by swap.
    FORKING sequences wait for their request's first sequence to finish the prompt.
    """

    WAITING = enum.auto()
    SWAPPED = enum.auto()
    FORKING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One continuation of a prompt.

    token_ids          [ prompt …………… | output … ]
    in flight                                     [ ? ? ]     drawn by steps whose results are not back
    num_computed_tokens  ───────────────────────────▶         KV is or will be there once the steps in flight ran
    steady_until         ───────────────────────────────▶     nothing but counting to do for positions before this one
    """

    sequence_id: int
    index: int
    request: Request
    seed: int
    token_ids: list[int]
    num_prompt_tokens: int
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int = -1
    num_computed_tokens: int = 0
    steady_until: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    last_token_in_slot: bool = False
    last_token_time_s: float | None = None  # by the listener's clock
    guide: Guide | None = None
    finish_reason: FinishReason | None = None
    block_hashes: list[bytes] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_prefilling(self) -> bool:
        """More than the last token is still to be computed."""
        return self.num_computed_tokens < self.num_tokens - 1

    def num_uncomputed_tokens(self) -> int:
        """Tokens a step could compute now: none if the tokens in flight will end the sequence anyway."""
        num_tokens = len(self.token_ids) + self.num_in_flight
        if num_tokens >= self.request.max_num_tokens:
            return 0
        num_uncomputed = num_tokens - self.num_computed_tokens
        if self.guide is None or (self.guide.mask is not None and not self.num_in_flight):
            return num_uncomputed
        return num_uncomputed - 1  # the last one draws the next, and what that may be is not known yet

    def update_block_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all blocks whose tokens are known, extended as tokens arrive."""
        for start in range(len(self.block_hashes) * block_size, len(self.token_ids) - block_size + 1, block_size):
            parent = self.block_hashes[-1] if self.block_hashes else root_hash(self.request.cache_salt)
            self.block_hashes.append(hash_block(parent, self.token_ids[start : start + block_size]))
        return self.block_hashes

    def start_from(self, parent: Sequence) -> None:
        """Run on where the parent is, which has computed the prompt."""
        self.num_computed_tokens = parent.num_computed_tokens
        self.block_hashes = list(parent.block_hashes)
        self.guide = parent.guide and parent.guide.fork()
        self.status = SequenceStatus.RUNNING

    def append(self, token_id: int) -> int | None:
        """Take a drawn token. Sets ``finish_reason`` if it ends the sequence; returns the stop token id if one did."""
        token_ids, request = self.token_ids, self.request
        token_ids.append(token_id)
        if token_id in request.ending_token_ids or len(token_ids) >= request.max_num_tokens:
            return self._end(token_id)
        return None

    def _end(self, token_id: int) -> int | None:
        request = self.request
        num_output = len(self.token_ids) - self.num_prompt_tokens
        may_stop = num_output > request.params.min_tokens
        if may_stop and token_id in request.eos_token_ids:
            self.finish_reason = "stop"
        elif may_stop and token_id in request.stop_token_ids:
            self.finish_reason = "stop"
            return token_id
        elif num_output >= request.max_output_tokens:
            self.finish_reason = "length"
        return None


class Request:
    """A caller's prompt, its parameters and its ``n`` (or ``best_of``) sequences."""

    def __init__(self, message: GenerateRequest, eos_token_ids: tuple[int, ...], max_model_len: int) -> None:
        params = message.params
        self.request_id = message.request_id
        self.params = params
        self.priority = message.priority
        self.cache_salt = message.cache_salt
        self.arrival_time_s = message.arrival_time_s
        self.deadline_s = message.deadline_s
        self.bad_words_token_ids = message.bad_words_token_ids
        self.pooling = message.pooling
        self.num_prompt_tokens = len(message.prompt_token_ids)
        self.eos_token_ids = () if params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.ending_token_ids = self.stop_token_ids.union(self.eos_token_ids)
        room = max_model_len - self.num_prompt_tokens
        self.max_output_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.max_num_tokens = self.num_prompt_tokens + self.max_output_tokens
        self.sequences: list[Sequence] = []
        self.wants_prompt_logprobs = params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * (
            self.num_prompt_tokens if self.wants_prompt_logprobs else 0
        )
        self.needs_logprobs = params.logprobs is not None or params.num_sequences > params.n
        self.num_cached_tokens = 0
        self.expected_wait_s = 0.0  # in the queue
        self.first_scheduled_time_s: float | None = None
        self.first_token_time_s: float | None = None

    @property
    def needs_every_token(self) -> bool:
        """Whether something is made of every token of the prompt, so that none may come from a cache."""
        return self.wants_prompt_logprobs or self.pooling == "mean"

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)


def check_fits(message: GenerateRequest, max_model_len: int, max_num_seqs: int) -> None:
    """Raises InvalidRequestError if the request could never run, however idle the engine is."""
    num_prompt, num_seqs = len(message.prompt_token_ids), message.params.num_sequences
    if num_prompt == 0:
        raise InvalidRequestError("prompt", "prompt is empty: give at least one token")
    if num_prompt >= max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"prompt has {num_prompt} tokens, but with at least one generated token the limit is {max_model_len}",
        )
    if num_seqs > max_num_seqs:
        raise InvalidRequestError("n", f"n or best_of is {num_seqs}, more than max_num_seqs = {max_num_seqs}")
