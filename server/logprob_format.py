"""Log-probabilities in the three shapes that clients know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cupy_engine.outputs import TokenLogprob

Json = dict[str, Any]


def completion_logprobs(entries: Sequence[TokenLogprob | None], first_token: str = "", first_offset: int = 0) -> Json:
    """OpenAI's completions: parallel lists.

    A leading ``None`` is a prompt's first token, which has no probability; ``first_token`` is its text.
    ``first_offset``: where in the choice's text the first token begins, in characters.
    """
    offsets, offset = [], first_offset
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token if entry else first_token)
    return {
        "tokens": [_name(entry) if entry else first_token for entry in entries],
        "token_logprobs": [entry and entry.logprob for entry in entries],
        "top_logprobs": [entry and {_name(each): each.logprob for each in (*entry.top, entry)} for entry in entries],
        "text_offset": offsets,
    }


def chat_logprobs(entries: Iterable[TokenLogprob]) -> Json:
    """OpenAI's chat: one object per token, with its bytes and alternatives."""
    content = [_chat_token(entry) | {"top_logprobs": [_chat_token(each) for each in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def prompt_logprobs(entries: Sequence[TokenLogprob | None]) -> list[Json | None]:
    """vLLM's extension: per prompt token a map of token id to probability, rank and text."""
    return [_by_token_id(entry) if entry else None for entry in entries]


def _by_token_id(entry: TokenLogprob) -> Json:
    return {
        str(each.token_id): {"logprob": each.logprob, "rank": each.rank, "decoded_token": each.token}
        for each in (*entry.top, entry)
    }


def _chat_token(entry: TokenLogprob) -> Json:
    return {"token": entry.token or _name(entry), "logprob": entry.logprob, "bytes": list(entry.bytes)}


def _name(entry: TokenLogprob) -> str:
    """A token's text, or what tells it apart where it has none: its bytes, or its id without a tokenizer."""
    if not entry.bytes:
        return f"token_id:{entry.token_id}"
    if "\ufffd" in entry.token:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.bytes)
    return entry.token
