"""What can be chosen about the HTTP side: limits, keys, times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupy_engine import sampling_params as limits
from cupy_engine.config import check_types
from cupy_engine.errors import ConfigError

from .tool_formats import TOOL_PARSERS


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of the HTTP server, apart from where it listens.

    Args:
        api_keys: keys of which a client must send one (``Authorization: Bearer KEY``); none means no check.
        key_max_requests: most requests of one key at a time.
        key_requests_per_minute, key_tokens_per_minute: budget of one key; tokens are those of prompts and answers.
        admin_keys: keys that open everything, and alone the endpoints that load and unload models; none closes those.
        strict: refuse unknown request fields instead of ignoring them with a warning header.
        request_timeout_s: longest time for one request; its own ``timeout_s`` may be shorter.
        drain_timeout_s: time for running requests to finish when the server is asked to end.
        keep_alive_comment_s: a stream that waits longer than this gets a comment line.
        client_write_timeout_s: a client that takes no bytes for this long counts as gone.
        stall_timeout_s: an engine whose loop has not come round for this long is unhealthy, and started again.
        max_engine_restarts: an engine that ends this often in a row stays down.
        max_body_bytes: largest request body.
        max_prompts: most prompts in one request.
        max_n: largest ``n`` and ``best_of``.
        max_logprobs: largest ``logprobs``, ``top_logprobs`` and ``prompt_logprobs``.
        max_stop_strings: most stop strings.
        max_stop_string_chars: longest stop string.
        max_bad_words: most bad words.
        max_logit_bias: most entries of ``logit_bias``.
        tool_call_parser: the family of models whose way to write tool calls is read; auto goes by the chat template.
        log_requests: log one line for each request, without its text.
        log_prompts: put prompts and answers into these lines.
        otlp_traces_endpoint: where to send OpenTelemetry traces, such as http://localhost:4318/v1/traces.

    Raises:
        ConfigError: a bad value; ``field`` names it.
    """

    api_keys: tuple[str, ...] = ()
    key_max_requests: int | None = None
    key_requests_per_minute: int | None = None
    key_tokens_per_minute: int | None = None
    admin_keys: tuple[str, ...] = ()
    strict: bool = False
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    keep_alive_comment_s: float = 15.0
    client_write_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    max_engine_restarts: int = 10
    max_body_bytes: int = 4 << 20
    max_prompts: int = 256
    max_n: int = limits.MAX_N
    max_logprobs: int = limits.MAX_LOGPROBS
    max_stop_strings: int = limits.MAX_STOP_STRINGS
    max_stop_string_chars: int = limits.MAX_STOP_STRING_CHARS
    max_bad_words: int = limits.MAX_BAD_WORDS
    max_logit_bias: int = limits.MAX_LOGIT_BIAS
    tool_call_parser: str = "auto"
    log_requests: bool = True
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("api_keys", "admin_keys"):
            object.__setattr__(self, name, _checked_keys(name, getattr(self, name)))
        check_types(self)
        if self.tool_call_parser not in TOOL_PARSERS:
            allowed = ", ".join(TOOL_PARSERS)
            raise ConfigError("tool_call_parser", f"must be one of {allowed}, got {self.tool_call_parser!r}")
        if self.otlp_traces_endpoint is not None and not self.otlp_traces_endpoint.startswith(("http://", "https://")):
            raise ConfigError("otlp_traces_endpoint", f"must be an HTTP URL, got {self.otlp_traces_endpoint!r}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in _KEY_LIMITS:
                continue
            if not low <= value <= high:
                raise ConfigError(name, f"must be between {low:g} and {high:g}, got {value!r}")
        if self.limits_keys and not self.api_keys:
            name = next(name for name in _KEY_LIMITS if getattr(self, name) is not None)
            raise ConfigError(name, "needs api_keys: without keys clients cannot be told apart")

    @property
    def limits_keys(self) -> bool:
        """Whether keys have limits."""
        return any(getattr(self, name) is not None for name in _KEY_LIMITS)


def _checked_keys(field: str, keys: Any) -> tuple[str, ...]:
    """Keys as a tuple; one key may be given as a string."""
    if not isinstance(keys, (str, list, tuple)):
        raise ConfigError(field, f"must be a key or a list of keys, got {keys!r}")
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    for key in keys:
        if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable():
            raise ConfigError(field, "a key must be a non-empty text of printable ASCII characters")
    return keys


_DAY_S = 86400.0
_KEY_LIMITS = ("key_max_requests", "key_requests_per_minute", "key_tokens_per_minute")
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_KEY_LIMITS, (1, 1 << 40)),
    "request_timeout_s": (0.001, _DAY_S),
    "drain_timeout_s": (0, _DAY_S),
    "keep_alive_comment_s": (0.01, _DAY_S),
    "client_write_timeout_s": (0.01, _DAY_S),
    "stall_timeout_s": (0.1, _DAY_S),
    "max_engine_restarts": (0, 1_000_000),
    "max_body_bytes": (1, 1 << 30),
    "max_prompts": (1, 1 << 16),
    "max_n": (1, limits.MAX_N),
    "max_logprobs": (0, limits.MAX_LOGPROBS),
    "max_stop_strings": (0, limits.MAX_STOP_STRINGS),
    "max_stop_string_chars": (1, limits.MAX_STOP_STRING_CHARS),
    "max_bad_words": (0, limits.MAX_BAD_WORDS),
    "max_logit_bias": (0, limits.MAX_LOGIT_BIAS),
}
