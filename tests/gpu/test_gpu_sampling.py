"""The GPU sampler against the NumPy sampler: the same tokens, but for draws that fall onto a rounding error.

A draw differs where its random number lies between two roundings of one boundary, which is rare: see MISMATCH_RATE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gpu_arrays import DTYPES, to_gpu
from sampler_pair import POISON, SamplerPair, random_logits, random_request, setup

pytestmark = pytest.mark.gpu

VOCAB_SIZES = [1, 7, 1000, 49152, 128256]
MISMATCH_RATE = 2e-4  # of draws; weights carry errors of 1e-7, and boundaries are as many as tokens
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 400, "top_p": 0.9, "min_p": 0.01},
]


def assert_same(drawn: Sequence[int] | np.ndarray, expected: Sequence[int] | np.ndarray, context: Any = "") -> None:
    """All equal, but for MISMATCH_RATE of them or one."""
    different = np.flatnonzero(np.array(drawn) != np.array(expected))
    assert len(different) <= max(1, MISMATCH_RATE * len(drawn)), (context, different, len(drawn))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_greedy_takes_the_first_of_the_best(rng: np.random.Generator, vocab_size: int, dtype: str) -> None:
    pair = SamplerPair(16, vocab_size)
    pair.seat(*(setup(slot, [1], temperature=0.0) for slot in range(16)))
    logits = random_logits(rng, 5, vocab_size, DTYPES[dtype])
    rows, slots = rng.integers(0, 5, 9), rng.permutation(16)[:9]
    drawn = pair.draw(logits, rows, slots, np.full(9, 1))
    assert drawn.tolist() == np.argmax(logits.astype(np.float32), axis=1)[rows].tolist()
    last_tokens = np.zeros(16, np.int32)
    last_tokens[slots] = drawn
    assert pair.gpu.last_tokens.get().tolist() == last_tokens.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_batch_of_everything_is_the_reference_draw_by_draw(
    rng: np.random.Generator, vocab_size: int, dtype: str
) -> None:
    """Random requests side by side for some steps; a draw that differs is put right before the next."""
    num_slots, num_steps = (32, 6) if vocab_size <= 1000 else (24, 2)
    pair = SamplerPair(num_slots, vocab_size)
    requests = [random_request(rng, vocab_size) for _ in range(num_slots)]
    outputs: list[list[int]] = [[] for _ in requests]
    pair.seat(*(setup(slot, **request) for slot, request in enumerate(requests)))
    drawn, expected = [], []
    for _ in range(num_steps):
        logits = random_logits(rng, num_slots, vocab_size, DTYPES[dtype])
        rows, slots = rng.integers(0, num_slots, num_slots), rng.permutation(num_slots)
        positions = [len(requests[slot]["prompt"]) + len(outputs[slot]) for slot in slots]
        drawn.extend(pair.draw(logits, rows, slots, positions).tolist())
        expected.extend(pair.expected(logits, rows, slots, positions).tolist())
        for slot, was, should in zip(slots.tolist(), drawn[-num_slots:], expected[-num_slots:], strict=True):
            outputs[slot].append(max(should, 0))
            if was != should or should < 0:
                pair.seat(setup(slot, output=outputs[slot], **requests[slot]))
    assert_same(drawn, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "spread"), [(1000, "float32", 2), (49152, "float32", 3), (128256, "bfloat16", 2)]
)
def test_many_draws_give_the_tokens_of_the_reference(
    rng: np.random.Generator, vocab_size: int, dtype: str, spread: float, settings: dict[str, Any]
) -> None:
    num_slots = 256
    pair = SamplerPair(num_slots, vocab_size)
    pair.seat(*(setup(slot, [1], seed=int(rng.integers(2**62)), **settings) for slot in range(num_slots)))
    logits = (rng.standard_normal((8, vocab_size)) * spread).astype(DTYPES[dtype])
    drawn, expected = [], []
    for step in range(4 if vocab_size == 1000 else 1):
        arguments = (logits, np.arange(num_slots) % 8, np.arange(num_slots), np.full(num_slots, 1 + step))
        drawn.extend(pair.draw(*arguments).tolist())
        expected.extend(pair.expected(*arguments).tolist())
    assert_same(drawn, expected, settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 1000, 3000])
def test_cuts_among_equals_keep_the_lower_ids(rng: np.random.Generator, vocab_size: int, dtype: str) -> None:
    """Logits of few values, so that every cut falls between equals; enough draws to see all survivors."""
    num_slots = 64
    pair = SamplerPair(num_slots, vocab_size)
    logits = rng.integers(-2, 3, (4, vocab_size)).astype(DTYPES[dtype])
    logits[3] = 0.0
    logits[3, ::2] = -0.0
    cuts = [{"top_p": 0.1}, {"top_p": 0.5}, {"top_p": 0.75}, {"top_k": 3}, {"top_k": vocab_size // 2}]
    cuts += [{"top_k": vocab_size // 3, "top_p": 0.5}, {"top_k": vocab_size - 1, "top_p": 0.9}, {"min_p": 0.3}]
    requests = [cuts[slot % len(cuts)] | {"seed": int(rng.integers(2**62))} for slot in range(num_slots)]
    pair.seat(*(setup(slot, [1], **request) for slot, request in enumerate(requests)))
    for step in range(6):
        arguments = (logits, rng.integers(0, 4, num_slots), np.arange(num_slots), np.full(num_slots, 1 + step))
        assert pair.draw(*arguments).tolist() == pair.expected(*arguments).tolist()


def test_cuts_reach_tokens_that_are_hopeless(rng: np.random.Generator) -> None:
    """One token far above the rest: the top-k boundary lies where weights round to zero."""
    pair = SamplerPair(4, 2000)
    logits = rng.standard_normal((1, 2000)).astype(np.float32)
    logits[0, 77] = 60.0
    pair.seat(*(setup(slot, [1], top_k=5, top_p=p, temperature=t) for slot, (p, t) in enumerate(PEAKED)))
    arguments = (logits, np.zeros(4, int), np.arange(4), np.full(4, 9))
    assert pair.draw(*arguments).tolist() == pair.expected(*arguments).tolist()


PEAKED = [(1.0, 1.0), (0.9, 1.0), (1.0, 0.01), (0.99, 1e-3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_draw_does_not_depend_on_its_neighbours(rng: np.random.Generator, dtype: str) -> None:
    """Alone, a row is split over many blocks; in a batch, over few. The tokens are the same, bit for bit."""
    vocab_size, num_slots = 49152, 48
    pair = SamplerPair(num_slots, vocab_size)
    pair.seat(
        *(
            setup(slot, [1], seed=slot, frequency_penalty=0.1 * (slot % 2), **SETTINGS[slot % len(SETTINGS)])
            for slot in range(num_slots)
        )
    )
    logits = (rng.standard_normal((num_slots, vocab_size)) * 2).astype(DTYPES[dtype])
    together = pair.draw(logits, np.arange(num_slots), np.arange(num_slots), np.full(num_slots, 5))
    alone = [int(pair.draw(logits[slot : slot + 1], [0], [slot], [5])[0]) for slot in range(0, num_slots, 2)]
    assert alone == together[::2].tolist()


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_own_draws_only(
    rng: np.random.Generator, value: float, is_greedy: bool
) -> None:
    pair = SamplerPair(5, 5000)
    pair.seat(*(setup(slot, [1], temperature=1 - is_greedy, presence_penalty=slot % 2) for slot in range(5)))
    logits = rng.standard_normal((4, 5000)).astype(np.float32)
    logits[1, 4321] = value
    logits[3] = -np.inf
    arguments = (logits, [0, 1, 1, 2, 3], np.arange(5), np.full(5, 1))
    drawn = pair.draw(*arguments)
    assert drawn.tolist() == pair.expected(*arguments).tolist()
    assert drawn[[1, 2, 4]].tolist() == [-1, -1, -1]
    assert pair.gpu.last_tokens.get().tolist() == [drawn[0], 0, 0, drawn[3], 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_no_token_says_so(rng: np.random.Generator, temperature: float) -> None:
    pair = SamplerPair(4, 1000)
    pair.seat(
        setup(0, [3], temperature=temperature, allowed_token_ids=[7, 8], bad_words=[[7], [3, 8]]),
        setup(1, [3], temperature=temperature, allowed_token_ids=[0], min_tokens=1),
        setup(2, [3], temperature=temperature, allowed_token_ids=[5000]),
        setup(3, [3], temperature=temperature, allowed_token_ids=[9], logit_bias={9: -100.0, 5000: 1.0}),
    )
    logits = rng.standard_normal((1, 1000)).astype(np.float32)
    assert pair.draw(logits, [0] * 4, range(4), [1] * 4).tolist() == [-2, -2, -2, 9]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_guided_slots_draw_what_their_masks_allow(rng: np.random.Generator, vocab_size: int, dtype: str) -> None:
    """Every other slot is guided, by a new mask each step; its request's own lists hold too."""
    num_slots = 16
    pair = SamplerPair(num_slots, vocab_size)
    requests = [random_request(rng, vocab_size) | {"is_guided": slot % 2 == 0} for slot in range(num_slots)]
    pair.seat(*(setup(slot, **request) for slot, request in enumerate(requests)))
    outputs: list[list[int]] = [[] for _ in requests]
    for _ in range(3):
        masks = {slot: rng.random(vocab_size) < rng.choice([0.01, 0.5]) for slot in range(0, num_slots, 2)}
        masks[0] = np.arange(vocab_size) == vocab_size - 1
        pair.mask(masks)
        logits = random_logits(rng, num_slots, vocab_size, DTYPES[dtype])
        slots = rng.permutation(num_slots)
        positions = [len(requests[slot]["prompt"]) + len(outputs[slot]) for slot in slots]
        drawn = pair.draw(logits, np.arange(num_slots), slots, positions)
        expected = pair.expected(logits, np.arange(num_slots), slots, positions)
        assert_same(drawn, expected)
        for slot, was, should in zip(slots.tolist(), drawn.tolist(), expected.tolist(), strict=True):
            assert was < 0 or slot not in masks or masks[slot][was]
            outputs[slot].append(max(should, 0))
            if was != should or should < 0:
                pair.seat(setup(slot, output=outputs[slot], **requests[slot]))


def test_a_slot_that_is_no_longer_guided_is_free(rng: np.random.Generator) -> None:
    pair = SamplerPair(1, 1000)
    logits = rng.standard_normal((1, 1000)).astype(np.float32)
    best = int(logits[0].argmax())
    pair.seat(setup(0, [1], temperature=0.0, is_guided=True))
    pair.mask({0: np.arange(1000) == 7})
    assert pair.draw(logits, [0], [0], [1]).tolist() == [7]
    pair.mask({0: np.zeros(1000, bool)})
    assert pair.draw(logits, [0], [0], [2]).tolist() == [-2]
    pair.seat(setup(0, [1], temperature=0.0))
    assert pair.draw(logits, [0], [0], [1]).tolist() == [best]


def test_padding_is_left_alone(rng: np.random.Generator) -> None:
    pair = SamplerPair(6, 1000)
    pair.seat(*(setup(slot, [1], temperature=slot % 2, top_p=0.9, presence_penalty=0.5) for slot in range(4)))
    logits = rng.standard_normal((3, 1000)).astype(np.float32)
    slots, rows = [-1, 2, 6, 1, -1, 1 << 30], [0, 1, 1 << 30, 2, -5, 0]
    drawn = pair.draw(logits, rows, slots, np.full(6, 1))
    assert drawn[[0, 2, 4, 5]].tolist() == [POISON] * 4
    assert drawn[[1, 3]].tolist() == pair.expected(logits, [1, 2], [2, 1], [1, 1]).tolist()
    assert pair.gpu.last_tokens.get().tolist() == [0, drawn[3], drawn[1], 0, 0, 0]


def test_a_resumed_sequence_goes_on_as_if_never_interrupted(rng: np.random.Generator) -> None:
    """Seated anew with its output so far, in another slot, after each possible number of tokens."""
    vocab_size = 40
    request = random_request(rng, vocab_size) | {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "min_tokens": 5,
        "bad_words": [[1, 2, 3], [2, 3], [3, 3, 3, 4], [5]],
    }
    prompt_len = len(request["prompt"])
    logits = rng.standard_normal((10, vocab_size)).astype(np.float32)
    pair = SamplerPair(2, vocab_size)
    pair.seat(setup(0, **request))
    tokens = [int(pair.draw(logits[i : i + 1], [0], [0], [prompt_len + i])[0]) for i in range(10)]
    for interrupted in range(10):
        pair.seat(setup(1, output=tokens[:interrupted], **request))
        rest = [int(pair.draw(logits[i : i + 1], [0], [1], [prompt_len + i])[0]) for i in range(interrupted, 10)]
        assert rest == tokens[interrupted:]


def test_a_new_sequence_in_a_slot_inherits_nothing(rng: np.random.Generator) -> None:
    pair = SamplerPair(1, 1000)
    logits = rng.standard_normal((1, 1000)).astype(np.float32)
    best = int(logits[0].argmax())
    pair.seat(setup(0, [best], temperature=0.0, repetition_penalty=2.0, allowed_token_ids=[30], min_tokens=9))
    assert pair.draw(logits, [0], [0], [1]).tolist() == [30]
    pair.seat(setup(0, [1], temperature=0.0))
    assert pair.draw(logits, [0], [0], [1]).tolist() == [best]
    pair.seat(setup(0, [1], temperature=0.0, frequency_penalty=2.0))
    assert pair.draw(logits, [0], [0], [1]).tolist() == [best]


def test_counts_stop_at_their_limit() -> None:
    """A token counted 40000 times: the penalty of 32767 counts, and no spill into its neighbours."""
    pair = SamplerPair(1, 8)
    pair.seat(setup(0, [5], [2] * 40000 + [3], temperature=0.0, frequency_penalty=0.001))
    logits = np.array([[0, 0, 33, 0, 0, 0, 0, 0]], np.float32)
    assert pair.draw(logits, [0], [0], [40002]).tolist() == [2]
    assert pair.draw(logits - np.float32(0.5) * (np.arange(8) == 2), [0], [0], [40003]).tolist() == [0]


def test_a_captured_graph_draws_like_the_launches_it_recorded(rng: np.random.Generator) -> None:
    """Replayed with other logits, slots and padding, while nothing is allocated."""
    import cupy

    num_slots, vocab_size = 16, 32000
    pair = SamplerPair(num_slots, vocab_size)
    requests = [random_request(rng, vocab_size) for _ in range(num_slots)]
    pair.seat(*(setup(slot, **request) for slot, request in enumerate(requests)))
    stream, shape = pair.device.stream, (num_slots, vocab_size)
    with pair.device.use():
        logits = cupy.zeros(shape, np.float32)
        integers = [cupy.full(num_slots, -1, np.int32) for _ in range(4)]
        pair.gpu.sample(logits, *integers)
        stream.synchronize()
        used_bytes = cupy.get_default_memory_pool().used_bytes()
        stream.begin_capture()
        pair.gpu.sample(logits, *integers)
        graph = stream.end_capture()
        assert cupy.get_default_memory_pool().used_bytes() == used_bytes
    drawn, expected = [], []
    for step, num_draws in enumerate((16, 5, 1)):
        host_logits = random_logits(rng, num_slots, vocab_size, np.float32)
        slots = np.full(num_slots, -1, np.int32)
        slots[:num_draws] = rng.permutation(num_slots)[:num_draws]
        rows = rng.integers(0, num_slots, num_slots).astype(np.int32)
        positions = np.array([len(requests[slot]["prompt"]) + step for slot in slots], np.int32)
        for array, values in zip([logits, *integers], (host_logits, rows, slots, positions), strict=False):
            array.set(values, stream=stream)
        graph.launch(stream)
        drawn.extend(integers[3].get(stream=stream)[:num_draws].tolist())
        expected.extend(pair.expected(host_logits, rows[:num_draws], slots[:num_draws], positions[:num_draws]).tolist())
        for slot, token in zip(slots[:num_draws].tolist(), expected[-num_draws:], strict=True):
            pair.seat(setup(slot, output=[max(token, 0)], **requests[slot] | {"prompt": requests[slot]["prompt"]}))
    assert_same(drawn, expected)


def test_wrong_shapes_are_refused() -> None:
    pair = SamplerPair(2, 100)
    with pytest.raises(ValueError, match="at most 2 draws of 100 tokens"):
        pair.draw(np.zeros((1, 100), np.float32), [0] * 3, range(3), [1] * 3)
    with pytest.raises(ValueError, match="at most 2 draws of 100 tokens"):
        pair.draw(np.zeros((1, 99), np.float32), [0], [0], [1])
    integers = [to_gpu(np.zeros(1, np.int32)) for _ in range(4)]
    strided = to_gpu(np.zeros((2, 200), np.float32))[:, ::2]
    with pytest.raises(ValueError, match="logits must be contiguous"):
        pair.gpu.sample(strided, *integers)
