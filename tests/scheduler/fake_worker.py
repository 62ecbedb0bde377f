"""A worker without a model: it moves blocks, writes and reads them as a model would, and draws from what it reads.

What it keeps for a token is a hash over the whole context, chained through the block table: token after token, each
place holds a hash of the place before it and of its own token. A block that holds another sequence's data, was not
copied, or was overwritten too early therefore gives other tokens than :func:`expected_tokens`, which needs no blocks.
"""

from __future__ import annotations

import itertools

from cupy_engine.messages import TokenLogprobs
from cupy_engine.plan import ScheduledSequence, SlotSetup, StepError, StepPlan, StepResult
from cupy_engine.sampling_params import SamplingParams

VOCAB_SIZE = 6
EOS = 0
_START = 12345
_NO_TOKEN = VOCAB_SIZE + 1  # what stands in a result where a draw failed


def chained(previous: int, token_id: int) -> int:
    return hash((previous, token_id))


def drawn_token(state: int, seed: int, position: int) -> int:
    """The token at ``position`` after a context whose chained hash is ``state``."""
    return hash((state, seed, position)) % VOCAB_SIZE


def expected_tokens(prompt: list[int], seed: int, params: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """What a sequence draws if nothing ever goes wrong, and why it ends."""
    state = _START
    for token_id in prompt:
        state = chained(state, token_id)
    output: list[int] = []
    limit = max_model_len - len(prompt) if params.max_tokens is None else params.max_tokens
    limit = min(limit, max_model_len - len(prompt))
    while True:
        output.append(drawn_token(state, seed, len(prompt) + len(output)))
        may_stop = len(output) > params.min_tokens
        if may_stop and not params.ignore_eos and output[-1] == EOS:
            return output, "stop"
        if may_stop and output[-1] in (params.stop_token_ids or []):
            return output, "stop"
        if len(output) == limit:
            return output, "length"
        state = chained(state, output[-1])


def expected_prompt_logprobs(prompt: list[int]) -> list[TokenLogprobs | None]:
    """One entry per prompt token, none for the first."""
    logprobs: list[TokenLogprobs | None] = [None]
    state = _START
    for previous, token_id in itertools.pairwise(prompt):
        state = chained(state, previous)
        logprobs.append(prompt_logprob(state, token_id))
    return logprobs


def prompt_logprob(state: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, float(hash((state, token_id)) % 1000), 1, [])


class FakeWorker:
    """Carries out plans exactly as :class:`cupy_engine.plan.StepPlan` describes them.

    ``broken_steps`` fail half-way: blocks are moved, nothing is computed, and the step's places hold rubbish.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int, num_slots: int) -> None:
        self.block_size = block_size
        self.device: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.tables: list[dict[int, int]] = [{} for _ in range(num_slots)]
        self.setups: list[SlotSetup | None] = [None] * num_slots
        self.last_tokens = [-1] * num_slots
        self.broken_steps: set[int] = set()
        self.failing_draws: set[tuple[int, int]] = set()  # (step id, plan index)

    def run(self, plan: StepPlan) -> StepResult | None:
        """The step's result, or ``None`` if the step breaks."""
        if plan.step_id in self.broken_steps:
            self._spoil(plan)
            return None
        self._move_blocks(plan)
        self._seat(plan)
        self._write(plan)
        return self._draw(plan)

    def _move_blocks(self, plan: StepPlan) -> None:
        for device_id, host_id in plan.swap_out:
            self.host[host_id] = list(self.device[device_id])
        for host_id, device_id in plan.swap_in:
            self.device[device_id] = list(self.host[host_id])
        sources = {source for source, _ in plan.block_copies}
        destinations = [destination for _, destination in plan.block_copies]
        assert not sources.intersection(destinations), "copies that depend on each other's order"
        assert len(destinations) == len(set(destinations)), "two copies to one block"
        for source, destination in plan.block_copies:
            self.device[destination] = list(self.device[source])

    def _seat(self, plan: StepPlan) -> None:
        for setup in plan.slot_setups:
            self.setups[setup.slot] = setup
            self.last_tokens[setup.slot] = -1
        for write in plan.block_table_writes:
            for column, block_id in enumerate(write.block_ids, write.first):
                self.tables[write.slot][column] = block_id

    def _write(self, plan: StepPlan) -> None:
        """All sequences' tokens, in the order of their positions: a token may attend to what this very step writes."""
        work = []
        for entry in plan.sequences:
            token_ids = entry.token_ids or [self.last_tokens[entry.slot]]
            assert len(token_ids) == entry.num_tokens
            assert -1 not in token_ids, "a slot's last token is not known"
            work.extend((entry.start + i, entry.slot, token_id) for i, token_id in enumerate(token_ids))
        written = set()
        for position, slot, token_id in sorted(work):
            place = self._place(slot, position)
            assert place not in written, "two sequences write to one place"
            written.add(place)
            self.device[place[0]][place[1]] = chained(self._state(slot, position), token_id)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size

    def _state(self, slot: int, position: int) -> int:
        """The chained hash of everything before ``position``, read from the blocks."""
        if position == 0:
            return _START
        block_id, offset = self._place(slot, position - 1)
        state = self.device[block_id][offset]
        return -1 if state is None else state

    def _draw(self, plan: StepPlan) -> StepResult:
        result = StepResult(plan.step_id, [], [])
        for plan_index, entry in enumerate(plan.sequences):
            end = entry.start + entry.num_tokens
            state = self._state(entry.slot, end)
            is_failing = (plan.step_id, plan_index) in self.failing_draws
            for slot in entry.sample_slots:
                setup = self.setups[slot]
                assert setup is not None
                token_id = _NO_TOKEN if is_failing else drawn_token(state, setup.seed, end)
                self.last_tokens[slot] = token_id
                result.token_ids.append(token_id)
                result.logprobs.append(None)
            if entry.num_prompt_logprobs is not None:
                result.prompt_logprobs[plan_index] = self._prompt_logprobs(entry)
            if is_failing:
                result.errors[plan_index] = StepError("not finite", "internal")
        return result

    def _prompt_logprobs(self, entry: ScheduledSequence) -> list[TokenLogprobs]:
        setup = self.setups[entry.slot]
        assert setup is not None
        last = min(entry.start + entry.num_tokens, setup.num_prompt_tokens - 1)
        positions = range(entry.start + 1, last + 1)
        return [prompt_logprob(self._state(entry.slot, p), setup.token_ids[p]) for p in positions]

    def _spoil(self, plan: StepPlan) -> None:
        touched = [device_id for _, device_id in plan.swap_in + plan.block_copies]
        for device_id in touched:
            self.device[device_id] = [-1] * self.block_size
        for _, host_id in plan.swap_out:
            self.host[host_id] = [-1] * self.block_size
        self._seat(plan)
        for entry in plan.sequences:
            for position in range(entry.start, entry.start + entry.num_tokens):
                block_id, offset = self._place(entry.slot, position)
                self.device[block_id][offset] = -1
            for slot in entry.sample_slots:
                self.last_tokens[slot] = 1
