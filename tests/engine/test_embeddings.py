"""Embeddings by the Python API: the same however prompts are cut, cached or preempted, and of use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cupy_engine import Engine, InvalidRequestError
from cupy_engine.model_source import ModelFiles, load_model_config
from cupy_engine.pooling import unit_vector

PROMPTS = [*("The cat sat on the mat. " * n for n in range(1, 7)), "A dog barks.", "x"]


@pytest.fixture(scope="module")
def engine(default_model_name: str) -> Iterator[Engine]:
    with Engine(model=default_model_name, max_model_len=128, num_kv_blocks=64, max_num_seqs=16) as engine:
        yield engine


def test_chunks_and_a_cache_change_nothing(engine: Engine, default_model_name: str) -> None:
    options = {"model": default_model_name, "max_num_batched_tokens": 16, "max_steps_in_flight": 2, "max_num_seqs": 4}
    with Engine(max_model_len=128, num_kv_blocks=12, **options) as small:
        for pooling in ("mean", "last"):
            whole, again = engine.embed(PROMPTS, pooling=pooling), engine.embed(PROMPTS, pooling=pooling)
            np.testing.assert_allclose(whole, again, atol=1e-5)
            np.testing.assert_allclose(small.embed(PROMPTS, pooling=pooling), whole, atol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
        stats = small.stats()
        assert (stats.num_running, stats.num_free_kv_blocks) == (0, 12)
    assert engine.stats().num_prefix_hit_tokens > 0, "the last token's state needs no others"


def test_one_token_is_its_own_mean(engine: Engine, default_model: ModelFiles) -> None:
    prompt = {"prompt_token_ids": [100]}
    mean, last = engine.embed(prompt)[0], engine.embed(prompt, pooling="last")[0]
    np.testing.assert_allclose(mean, last, atol=1e-6)
    config = load_model_config(default_model)
    assert len(mean) == config.hidden_size


def test_likeness(engine: Engine) -> None:
    cat, kitten, tax = np.array(
        engine.embed(["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Income tax is due in April."])
    )
    assert cat @ kitten > cat @ tax


def test_texts_beside_generation(engine: Engine) -> None:
    alone = engine.embed(PROMPTS[0])[0]
    mixed = engine.generate(["Once upon a time"] * 4)
    assert all(output.token_ids and output.embedding is None for output in mixed)
    np.testing.assert_allclose(engine.embed([PROMPTS[0]] * 3), [alone] * 3, atol=1e-5)


def test_unit_vectors() -> None:
    raw = np.array([3, 4, 12], np.float32).tobytes()
    np.testing.assert_allclose(unit_vector(raw), np.array([3, 4, 12]) / 13)
    np.testing.assert_allclose(unit_vector(raw, 2), [0.6, 0.8])
    assert unit_vector(bytes(8)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="not finite"):
        unit_vector(np.array([np.nan], np.float32).tobytes())


def test_unknown_pooling_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="pooling must be mean or last, got 'max'"):
        engine.embed("a", pooling="max")  # type: ignore[arg-type]
