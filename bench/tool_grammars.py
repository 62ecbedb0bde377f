"""What grammars of tool calls cost: to write, to compile, and for each token that follows one.

python -m cupy_engine.bench.tool_grammars --tools 1 10 64

Each function has five arguments, one of them an object, all strict. A grammar is written in an HTTP worker, compiled
once on a thread of the engine, and asked for a mask on other threads after each token; the engine's loop only hands
tokens over and takes masks back. The text is 60 tokens of prose and a call. The default model's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import msgspec
from cupy_engine.server.protocol import ChatRequest
from cupy_engine.server.tool_formats import FORMS
from cupy_engine.server.tool_use import tool_use

from cupy_engine.config import EngineConfig
from cupy_engine.guide_vocabulary import load_vocabulary
from cupy_engine.guides import Guide, Guides
from cupy_engine.model_source import DEFAULT_MODEL, load_model_config, resolve_model
from cupy_engine.structured_outputs import Grammar
from cupy_engine.tokenizer import Tokenizer, load_tokenizer

_PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "zip": {"type": "string"}},
    "required": ["city", "zip"],
    "additionalProperties": False,
}
_ARGUMENTS = '{"query": "the next train to Zürich", "limit": 5, "kind": "a", "tags": ["x", "y z"], '
_ARGUMENTS += '"place": {"city": "Bern", "zip": "3000"}}'
_PROSE = "Let me see what there is, and how we get there before it rains. " * 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=int, nargs="+", default=[1, 10, 64], help="(default: 1 10 64)")
    parser.add_argument("--repeats", type=int, default=5, help="grammars of each kind (default: 5)")
    arguments = parser.parse_args()
    files = resolve_model(DEFAULT_MODEL)
    model, tokenizer = load_model_config(files), load_tokenizer(files)
    assert tokenizer is not None
    vocabulary = load_vocabulary(EngineConfig(), files, model)
    for num_tools in arguments.tools:
        guides = Guides(lambda: vocabulary, model.vocab_size)
        runs = [_measure(guides, tokenizer, num_tools, salt) for salt in range(arguments.repeats)]
        guides.close()
        figures = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        print(json.dumps({"num_tools": num_tools} | figures), flush=True)
    return 0


def _measure(guides: Guides, tokenizer: Tokenizer, num_tools: int, salt: int) -> dict[str, float]:
    """One grammar, new to the engine, from its tools to the end of an answer."""
    name = f"look_{salt}_{num_tools - 1}"
    start_s = time.perf_counter()
    grammar = _grammar([_tool(f"look_{salt}_{i}", i) for i in range(num_tools)])
    written_s = time.perf_counter()
    guide = guides.open("bench", grammar)
    _await(guides, guide)
    compiled_s = time.perf_counter()
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {_ARGUMENTS}}}\n</tool_call>'
    num_prose = len(tokenizer.encode(_PROSE))
    followed = [_follow(guides, guide, token_id) for token_id in tokenizer.encode(_PROSE + call)]
    loop_s, mask_s = zip(*followed, strict=True)
    return {
        "grammar_kib": len(grammar.text) / 1024,
        "write_ms": (written_s - start_s) * 1e3,
        "compile_ms": (compiled_s - written_s) * 1e3,
        "text_mask_ms": statistics.median(mask_s[:num_prose]) * 1e3,
        "call_mask_ms": statistics.median(mask_s[num_prose:]) * 1e3,
        "worst_mask_ms": max(mask_s) * 1e3,
        "loop_us": statistics.median(loop_s) * 1e6,
    }


def _follow(guides: Guides, guide: Guide, token_id: int) -> tuple[float, float]:
    """Seconds of the loop for one token, and until its successor's mask was there."""
    assert guide.mask is not None
    assert guide.mask[token_id // 8] >> token_id % 8 & 1, "the grammar does not allow the text"
    start_s = time.perf_counter()
    guide.accept(token_id)
    guides.collect(0.0)
    loop_s = time.perf_counter() - start_s
    _await(guides, guide)
    return loop_s, time.perf_counter() - start_s


def _await(guides: Guides, guide: Guide) -> None:
    while guide.mask is None:
        errors = guides.wait(1.0)
        assert not errors, errors[0].message


def _grammar(tools: list[dict[str, Any]]) -> Grammar:
    request = msgspec.convert({"messages": [], "tools": tools}, ChatRequest)
    wanted = tool_use(request, FORMS["hermes"], {}.get)
    assert wanted is not None
    assert wanted.grammar is not None
    grammar: Grammar = wanted.grammar.to_grammar()
    return grammar


def _tool(name: str, number: int) -> dict[str, Any]:
    properties = {
        "query": {"type": "string", "description": "what to look for, in a few words"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "kind": {"enum": ["a", "b", f"c{number}"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    function = {"name": name, "parameters": {**schema, "$defs": {"place": _PLACE}}, "strict": True}
    return {"type": "function", "function": function}


if __name__ == "__main__":
    sys.exit(main())
