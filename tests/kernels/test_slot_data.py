"""Slot records for the GPU: places and contents of the lists, exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cupy_engine.cuda_slot import SLOT, SLOT_UPDATE, SlotData
from cupy_engine.ops._cuda_sampling import split_row
from cupy_engine.plan import SlotSetup
from cupy_engine.sampling_params import SamplingParams

VOCAB_SIZE = 70
IS_STOP, ENDS_BAD_WORD = 1, 2


def slot_data(
    prompt: list[int],
    output: list[int],
    bad_words: list[list[int]] | None = None,
    is_guided: bool = False,
    **params: Any,
) -> SlotData:
    setup = SlotSetup(
        slot=3,
        params=SamplingParams(**params),
        seed=-2,
        token_ids=prompt + output,
        num_prompt_tokens=len(prompt),
        eos_token_ids=[0],
        bad_words_token_ids=bad_words or [],
        needs_logprobs=False,
        is_guided=is_guided,
    )
    return SlotData.of(setup, VOCAB_SIZE)


def bits_set(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def test_records_are_as_long_as_the_kernels_say() -> None:
    assert (SLOT.itemsize, SLOT_UPDATE.itemsize) == (144, 184)


def test_a_plain_request_has_numbers_only() -> None:
    data = slot_data([1, 2], [5], temperature=0.7, top_k=-1, top_p=0.5, min_p=0.25, min_tokens=0)
    assert (data.lists.size, data.counted.size, data.is_penalized) == (0, 0, False)
    record = data.record
    assert int(record["seed"]) == 2**64 - 2
    assert float(record["factor"]) + float(record["factor_rest"]) == pytest.approx(1 / np.log(2) / 0.7, rel=1e-14)
    assert (record["top_k"], record["top_p"], record["first_stop_position"], record["always_edits"]) == (0, 0.5, 2, 0)
    assert record["min_p_distance"] == pytest.approx(0.7 * np.log(4))
    assert slot_data([1], [], temperature=0.0).record["factor"] == 0
    assert slot_data([1], [], min_p=0.0).record["min_p_distance"] == np.inf


def test_a_tiny_temperature_stays_finite() -> None:
    record = slot_data([1], [], temperature=1e-300).record
    assert np.isfinite([record["factor"], record["factor_rest"]]).all()
    assert record["factor"] > 1e29


def test_lists_lie_where_the_record_says() -> None:
    data = slot_data(
        [9, 4, 5],
        [6],
        bad_words=[[33], [5, 6, 40], [6, 41], [4, 41], [7, 99]],
        allowed_token_ids=list(range(1, 65)),
        logit_bias={40: 1.5, 2: -3.0, 99: 7.0},
        min_tokens=4,
        stop_token_ids=[2, 77],
        presence_penalty=0.5,
    )
    record, lists = data.record, data.lists
    place = {name: int(record[name]) for name in ("forbidden", "listed", "edits", "words", "word_tokens", "recent")}
    assert place == {"forbidden": 1, "listed": 4, "edits": 7, "words": 19, "word_tokens": 28, "recent": 32}
    assert lists.size == 34
    assert bits_set(lists[1:4]) == [0, 33, 65, 66, 67, 68, 69]
    assert bits_set(lists[4:7]) == [0, 2, 40, 41]
    edits = lists[7:19].reshape(4, 3)
    assert edits[:, 0].tolist() == [0, 2, 40, 41]
    assert edits[:, 1].tolist() == [IS_STOP, IS_STOP, ENDS_BAD_WORD, ENDS_BAD_WORD]
    assert edits[:, 2].copy().view(np.float32).tolist() == [0.0, -3.0, 1.5, 0.0]
    assert lists[19:28].reshape(3, 3).tolist() == [[0, 2, 2], [2, 1, 3], [3, 1, 3]]
    assert lists[28:32].tolist() == [5, 6, 6, 4]
    assert lists[32:34].tolist() == [5, 6]  # positions 2 and 3
    assert (record["num_edits"], record["num_words"], record["num_recent"]) == (4, 3, 2)
    assert (record["first_stop_position"], record["always_edits"]) == (7, 1)
    assert (data.counted.tolist(), data.num_prompt_tokens, data.is_penalized) == ([9, 4, 5, 6], 3, True)


def test_a_guided_slot_has_room_for_its_masks() -> None:
    plain = slot_data([1], [], is_guided=True)
    assert (int(plain.record["forbidden"]), plain.record["always_edits"], plain.lists.size) == (1, 1, 4)
    assert plain.always_forbidden is not None
    assert bits_set(plain.always_forbidden) == []
    listed = slot_data([1], [], bad_words=[[4]], allowed_token_ids=list(range(68)), is_guided=True)
    assert listed.always_forbidden is not None
    assert bits_set(listed.always_forbidden) == bits_set(listed.lists[1:4]) == [4, 68, 69]
    assert slot_data([1], [], bad_words=[[4]]).always_forbidden is None


def test_stop_tokens_alone_edit_only_early_positions() -> None:
    record = slot_data([1], [], min_tokens=4).record
    assert (record["always_edits"], record["num_edits"], record["first_stop_position"]) == (0, 1, 5)


@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 49152, 128256, 1 << 20])
@pytest.mark.parametrize("num_draws", [1, 3, 32, 200, 256, 1000])
def test_parts_cover_the_row_once(num_draws: int, vocab_size: int) -> None:
    num_parts, part_size = split_row(num_draws, vocab_size, 132)
    assert part_size % 32 == 0
    assert 1 <= num_parts <= 64
    assert (num_parts - 1) * part_size < vocab_size <= num_parts * part_size
