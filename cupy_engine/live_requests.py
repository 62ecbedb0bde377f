"""Every request that has not ended, by its id, and when it must have."""

from __future__ import annotations

import random
from collections.abc import Iterator

from cupy_engine.errors import InvalidRequestError
from cupy_engine.messages import GenerateRequest
from cupy_engine.request import Request, Sequence, SequenceStatus, check_fits
from cupy_engine.request_queue import DeadlineQueue

SPARE_DEADLINES = 1000  # of ended requests
SEED_MASK = (1 << 64) - 1
GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15


class LiveRequests:
    """Makes requests and their sequences from messages, and keeps them until they end.

    Args:
        max_num_seqs: most sequences of a request.
        max_model_len: most tokens of prompt and output together.
        seed: of the seeds drawn for requests that bring none.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, eos_token_ids: tuple[int, ...] = (), seed: int | None = None
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._random = random.Random(seed)
        self._requests: dict[str, Request] = {}
        self._deadlines = DeadlineQueue()
        self._next_sequence_id = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def check(self, message: GenerateRequest) -> None:
        """Raises InvalidRequestError if the request can never be served."""
        if message.request_id in self._requests:
            raise InvalidRequestError("request_id", f"request_id {message.request_id!r} is in use by a live request")
        check_fits(message, self._max_model_len, self._max_num_seqs)

    def add(self, message: GenerateRequest) -> Request:
        """A request whose first sequence waits and whose others will fork from it."""
        request = Request(message, self._eos_token_ids, self._max_model_len)
        seed = self._random.getrandbits(64) if message.params.seed is None else message.params.seed
        for index in range(message.params.num_sequences):
            sequence = Sequence(
                sequence_id=self._next_sequence_id,
                index=index,
                request=request,
                seed=(seed + index * GOLDEN_RATIO_64) & SEED_MASK,
                token_ids=list(message.prompt_token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                status=SequenceStatus.FORKING if index else SequenceStatus.WAITING,
            )
            self._next_sequence_id += 1
            request.sequences.append(sequence)
        self._requests[request.request_id] = request
        if request.deadline_s is not None:
            self._deadlines.push(request.deadline_s, request.request_id)
            if len(self._deadlines) > 2 * len(self._requests) + SPARE_DEADLINES:
                self._deadlines.sweep(self._requests)
        return request

    def late(self, now_s: float) -> list[Request]:
        """The requests whose deadline has passed, each once."""
        passed = [self._requests.get(request_id) for request_id in dict.fromkeys(self._deadlines.pop_passed(now_s))]
        # An id may be in use again, by a request with a later deadline or none.
        return [r for r in passed if r is not None and r.deadline_s is not None and r.deadline_s <= now_s]

    def remove(self, request: Request) -> None:
        """Forget an ended request, and take the cycle of references apart, so that it need not be found as garbage."""
        del self._requests[request.request_id]
        request.sequences.clear()
