"""How much of their prompts replicas find in their prefix caches: conversations of many turns, shared system prompts.

python -m cupy_engine.bench.prefix_affinity --replicas 2 --workers 2

Each turn is a request on a connection of its own, so that any HTTP worker may get it; its prompt is all that was said
before, the model's answers included. Beside the server with its replicas two others show what there is to gain: one
replica that gets everything, and servers of one replica each that are asked at random. The default model's dummy twin.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .http_client import Address
from .twin import serve_twin

VOCAB_SIZE = 4096
SYSTEM_LEN, QUESTION_LEN, ANSWER_LEN = 512, 48, 32


@dataclass(slots=True)
class Conversation:
    """What has been said so far, as token ids."""

    tokens: list[int]
    num_turns: int = 0


@dataclass(slots=True)
class Tally:
    """Prompt tokens of all requests, and how many of them came out of a cache."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)


class Talks:
    """Clients that lead conversations until each has had its turns."""

    def __init__(self, addresses: Sequence[Address], arguments: argparse.Namespace) -> None:
        self._addresses = addresses
        self._num_turns = arguments.turns
        self._random = random.Random(0)
        self._lock = threading.Lock()
        systems = [self._say(SYSTEM_LEN) for _ in range(arguments.systems)]
        self._waiting = [Conversation(list(systems[i % len(systems)])) for i in range(arguments.conversations)]
        self._num_unfinished = len(self._waiting)
        self.tally = Tally()

    def run(self, num_clients: int) -> Tally:
        clients = [threading.Thread(target=self._client) for _ in range(num_clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return self.tally

    def _client(self) -> None:
        while self._num_unfinished > 0:
            with self._lock:
                if not self._waiting:
                    talk = None
                else:
                    talk = self._waiting.pop(self._random.randrange(len(self._waiting)))
                    talk.tokens += self._say(QUESTION_LEN)
                    address = self._random.choice(self._addresses)
            if talk is None:
                time.sleep(0.005)
                continue
            self._ask(talk, address)

    def _ask(self, talk: Conversation, address: Address) -> None:
        body = {"prompt": talk.tokens, "max_tokens": ANSWER_LEN, "ignore_eos": True, "return_token_ids": True}
        connection = http.client.HTTPConnection(*address, timeout=60)
        start_s = time.perf_counter()
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
        talk.tokens += answer["choices"][0]["token_ids"]
        talk.num_turns += 1
        with self._lock:
            self.tally.num_prompt_tokens += answer["usage"]["prompt_tokens"]
            self.tally.num_cached_tokens += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            self.tally.latencies_s.append(time.perf_counter() - start_s)
            if talk.num_turns < self._num_turns:
                self._waiting.append(talk)
            else:
                self._num_unfinished -= 1

    def _say(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(100, VOCAB_SIZE) for _ in range(num_tokens)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2, help="(default: 2)")
    parser.add_argument("--workers", type=int, default=2, help="HTTP workers (default: 2)")
    parser.add_argument("--conversations", type=int, default=64, help="(default: 64)")
    parser.add_argument("--turns", type=int, default=6, help="of each conversation (default: 6)")
    parser.add_argument("--systems", type=int, default=4, help="system prompts that they share (default: 4)")
    parser.add_argument("--clients", type=int, default=8, help="requests at once (default: 8)")
    arguments = parser.parse_args()
    workers, replicas = ("--workers", str(arguments.workers)), ("--replicas", str(arguments.replicas))
    _measure("one replica", arguments, [workers])
    _measure("at random", arguments, [workers] * arguments.replicas)
    _measure("replicas, one worker", arguments, [("--workers", "1", *replicas)])
    _measure("replicas", arguments, [(*workers, *replicas)])
    return 0


def _measure(name: str, arguments: argparse.Namespace, servers: Sequence[Sequence[str]]) -> None:
    common = ("--max-model-len", "4096", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(1 << 27))
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(serve_twin(*common, *options)).address for options in servers]
        tally = Talks(addresses, arguments).run(arguments.clients)
    found = tally.num_cached_tokens / tally.num_prompt_tokens
    median_s = sorted(tally.latencies_s)[len(tally.latencies_s) // 2]
    figures = {"found": round(found, 4), "num_requests": len(tally.latencies_s), "median_ms": round(median_s * 1e3, 1)}
    print(json.dumps({"servers": name, **figures}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
