"""Bodies that arrive at once in a new process. What is wrong with a body is the matter of test_bad_requests.py."""

from __future__ import annotations

import subprocess
import sys

FIRST_TWO = """
import threading, time
import msgspec
from cupy_engine.server.body import read_body
from cupy_engine.server.server_config import ServerConfig
from flask import Flask, request

evaluating = threading.Event()

def slowly():
    evaluating.set()
    time.sleep(0.2)
    return int

class Options(msgspec.Struct):
    number: "slowly()"

class Kind(msgspec.Struct):
    options: Options
    prompt: str

def read():
    with Flask("x").test_request_context(json={"options": {"number": 1}, "prompt": "x"}):
        assert read_body(request, Kind, ServerConfig()).fields == Kind(Options(1), "x")
        print("read")

first = threading.Thread(target=read)
first.start()
evaluating.wait()
read()
first.join()
"""


def test_the_first_bodies_of_a_kind_may_come_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_TWO], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stderr}"
    assert done.stdout.count("read") == 2
