"""The GPU sampler beside its reference: same seats, same logits, tokens compared draw by draw."""

from __future__ import annotations

from typing import Any

import numpy as np
from gpu_arrays import to_gpu

from cupy_engine.cuda_device import CudaDevice
from cupy_engine.cuda_sampler import CudaSampler
from cupy_engine.device import NumpyDevice
from cupy_engine.plan import SlotSetup, TokenMask
from cupy_engine.sampler import NOT_FINITE, NOTHING_ALLOWED, Sampler
from cupy_engine.sampling_params import SamplingParams

POISON = -77
EOS = 0
_ERRORS = {NOT_FINITE: -1, NOTHING_ALLOWED: -2}


def setup(
    slot: int,
    prompt: list[int],
    output: list[int] | None = None,
    *,
    seed: int = 0,
    bad_words: list[list[int]] | None = None,
    is_guided: bool = False,
    **params: Any,
) -> SlotSetup:
    settings = SamplingParams(**params)
    return SlotSetup(
        slot=slot,
        params=settings,
        seed=seed,
        token_ids=prompt + (output or []),
        num_prompt_tokens=len(prompt),
        eos_token_ids=[EOS],
        bad_words_token_ids=bad_words or [],
        needs_logprobs=settings.logprobs is not None,
        is_guided=is_guided,
    )


class SamplerPair:
    """A sampler on the GPU and the NumPy one."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.device = CudaDevice()
        self.gpu = CudaSampler(num_slots, vocab_size, self.device)
        self.reference = Sampler(num_slots, vocab_size, NumpyDevice())

    def seat(self, *setups: SlotSetup) -> None:
        for one in setups:
            self.gpu.set_slot(one)
            self.reference.set_slot(one)
        self.gpu.flush(self.device.stream)

    def mask(self, allowed: dict[int, np.ndarray]) -> None:
        """What guided slots may draw next: [V] bool by slot."""
        width = -(-self.vocab_size // 32) * 4
        packed = {slot: np.packbits(flags, bitorder="little").tobytes() for slot, flags in allowed.items()}
        masks = [TokenMask(slot, bits.ljust(width, b"\0")) for slot, bits in packed.items()]
        self.gpu.set_masks(masks, self.device.stream)
        self.reference.set_masks(masks)

    def draw(self, logits: np.ndarray, rows: Any, slots: Any, positions: Any) -> np.ndarray:
        """[N] int32, tokens drawn on the GPU from logits of any dtype."""
        with self.device.use():
            drawn = to_gpu(np.full(len(rows), POISON, np.int32))
            integers = [to_gpu(np.array(array, np.int32)) for array in (rows, slots, positions)]
            self.gpu.sample(to_gpu(logits), *integers, drawn)
            host: np.ndarray = drawn.get()
        return host

    def expected(self, logits: np.ndarray, rows: Any, slots: Any, positions: Any) -> np.ndarray:
        """[N] int32, what the reference draws, errors as negative numbers."""
        result = self.reference.sample(logits.astype(np.float32), *map(np.array, (rows, slots, positions)))
        token_ids: np.ndarray = result.token_ids.copy()
        for draw, message in result.errors.items():
            token_ids[draw] = _ERRORS[message]
        return token_ids


def random_request(rng: np.random.Generator, vocab_size: int) -> dict[str, Any]:
    """Settings of every kind, each present about half the time."""

    def some_ids(most: int) -> list[int]:
        return rng.choice(vocab_size, min(vocab_size, most), replace=False).tolist()

    settings = {
        "top_k": int(rng.integers(1, 60)),
        "top_p": float(rng.uniform(0.3, 1)),
        "min_p": float(rng.uniform(0, 0.3)),
        "repetition_penalty": float(rng.uniform(0.7, 1.6)),
        "frequency_penalty": float(rng.uniform(-1, 1)),
        "presence_penalty": float(rng.uniform(-1, 1)),
        "min_tokens": 3,
        "stop_token_ids": some_ids(5),
        "logit_bias": {token: float(rng.uniform(-3, 3)) for token in some_ids(50)},
        "allowed_token_ids": some_ids(-(-2 * vocab_size // 3)),
        "logprobs": int(rng.integers(0, 21)),
    }
    settings = {name: value for name, value in settings.items() if rng.random() < 0.5}
    common = rng.integers(0, vocab_size, 6)  # so that bad words are often begun
    words = [rng.choice(common, rng.integers(1, 4)).tolist() for _ in range(rng.integers(0, 8))]
    prompt = rng.choice(common, rng.integers(1, 12)).tolist()
    temperature = float(rng.choice([0.0, 0.7, 1.0, 1.5]))
    seed = int(rng.integers(-(2**63), 2**63))
    return settings | {"prompt": prompt, "bad_words": words, "temperature": temperature, "seed": seed}


def random_logits(rng: np.random.Generator, num_rows: int, vocab_size: int, dtype: Any) -> np.ndarray:
    """Rows of different spread; some of few distinct values, some with forbidden tokens."""
    logits = rng.standard_normal((num_rows, vocab_size)) * rng.choice([0.3, 1.0, 3.0, 8.0], (num_rows, 1))
    logits[::3] = np.round(logits[::3])
    if vocab_size > 2:
        logits[1::4, rng.integers(0, vocab_size, vocab_size // 3)] = -np.inf
    return logits.astype(dtype)
