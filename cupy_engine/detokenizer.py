"""Token ids to text as they come: whole characters only, stop strings found and cut off.

token ids ─▶ bytes ─▶ UTF-8 decoder ─▶ text ─▶ stop strings ─▶ text to show
                      keeps a half             keep what may be
                      character                a stop string's beginning
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from cupy_engine.sampling_params import SamplingParams
from cupy_engine.tokenizer import Tokenizer

_MAX_UTF8_TAIL = 3


class Detokenizer:
    """Turns one sequence's token ids into text. All text together is the same however the ids are cut into steps.

    Generation ends at the stop string that is complete first; of several that are complete at the same character, the
    longest counts. A stop string counts once ``min_tokens`` tokens are there; it may begin before.

    Args:
        tokenizer: the model's.
        params: ``stop``, ``include_stop_str_in_output``, ``min_tokens`` and ``skip_special_tokens`` count here. Special
            tokens never get spaces between them, which ``spaces_between_special_tokens`` would only allow.
        prompt_token_ids: what stands before: a first word keeps its space, a half character is completed.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self.stop_string: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._skips_special = params.skip_special_tokens
        self._min_tokens = params.min_tokens
        self._stops = params.stop_strings
        self._includes_stop = params.include_stop_str_in_output
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        tail = self._last_bytes(prompt_token_ids)
        self._is_at_start = not tail
        self._utf8.decode(_unfinished_character(tail))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add and that is certain by now. Nothing after a stop string was found.

        ``stop_string`` then names it, and ``num_tokens`` counts the tokens up to the one that completed it.
        """
        shown = []
        for token_id in token_ids:
            if self.stop_string is not None:
                break
            self.num_tokens += 1
            shown.append(self._release(self._utf8.decode(self._visible_bytes(token_id))))
        return "".join(shown)

    def flush(self) -> str:
        """What was held back, at the end of generation; a half character becomes U+FFFD."""
        if self.stop_string is not None:
            return ""
        shown = self._release(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    def _visible_bytes(self, token_id: int) -> bytes:
        data = self._bytes_of(token_id)
        if self._is_at_start and data:
            self._is_at_start = False
            return data.removeprefix(b" ") if self._tokenizer.strips_leading_space else data
        return data

    def _bytes_of(self, token_id: int) -> bytes:
        if self._skips_special and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _last_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The last few bytes of the prompt's text, none if it shows no text."""
        tail = b""
        for token_id in reversed(token_ids):
            tail = self._bytes_of(token_id) + tail
            if len(tail) >= _MAX_UTF8_TAIL:
                break
        return tail

    def _release(self, text: str) -> str:
        """Add text and take out what no stop string can reach any more."""
        if not self._stops or not text:
            return text
        num_searched = len(self._held)
        text = self._held + text
        found = self._find_stop(text, num_searched) if self.num_tokens >= self._min_tokens else None
        if found is not None:
            start, self.stop_string = found
            self._held = ""
            return text[: start + len(self.stop_string)] if self._includes_stop else text[:start]
        num_certain = min(_start_of_partial(text, stop) for stop in self._stops)
        self._held = text[num_certain:]
        return text[:num_certain]

    def _find_stop(self, text: str, num_searched: int) -> tuple[int, str] | None:
        """Where the first complete stop string starts that ends past ``num_searched``, and which it is."""
        starts = [(text.find(stop, max(0, num_searched - len(stop) + 1)), stop) for stop in self._stops]
        found = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        return min(found)[1:] if found else None


def _start_of_partial(text: str, stop: str) -> int:
    """Where the longest beginning of ``stop`` starts that ``text`` ends with; the text's length if there is none."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)


def _unfinished_character(tail: bytes) -> bytes:
    """The bytes of a UTF-8 character that begins in ``tail`` and is not complete there."""
    for count in range(1, min(_MAX_UTF8_TAIL, len(tail)) + 1):
        lead = tail[-count]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return tail[-count:] if count < length else b""
        if lead < 0x80:
            break
    return b""
