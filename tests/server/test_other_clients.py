"""Other clients that people point at an OpenAI server: curl, LangChain, LiteLLM. Those not installed are skipped."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer

CAPITAL = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
MODEL = "smollm2-135m"


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where a package is missing; the test's process need not import it."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: LiveServer) -> None:
    def curl(path: str, body: dict[str, Any]) -> str:
        command = ["curl", "-sSN", "--max-time", "60", server.url + path, "-d", json.dumps(body)]
        return subprocess.run(
            [*command, "-H", "Content-Type: application/json"], capture_output=True, text=True, check=True
        ).stdout

    messages = [{"role": "user", "content": CAPITAL}]
    answer = json.loads(curl("/v1/chat/completions", {"messages": messages, "temperature": 0}))
    assert answer["choices"][0]["message"]["content"] == ANSWER
    lines = curl("/v1/chat/completions", {"messages": messages, "temperature": 0, "stream": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == ANSWER
    guided = json.loads(curl("/v1/completions", {"prompt": "Is it so? ", "guided_choice": ["yes", "no"]}))
    assert guided["choices"][0]["text"] in ("yes", "no")


LANGCHAIN = """
import json, sys
from typing import Literal
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url, question = sys.argv[1:]
options = {"base_url": url, "api_key": "none", "max_retries": 0}
model = ChatOpenAI(model="smollm2-135m", temperature=0, **options)

class City(BaseModel):
    "Tell a city"
    name: Literal["Paris", "Rome"]

call = model.bind_tools([City], tool_choice="any").invoke(question).tool_calls[0]
newer = ChatOpenAI(model="smollm2-135m", temperature=0, use_responses_api=True, **options)
embeddings = OpenAIEmbeddings(model="smollm2-135m", check_embedding_ctx_length=False, **options)
print(json.dumps({
    "answer": model.invoke(question).content,
    "streamed": "".join(chunk.content for chunk in model.stream(question)),
    "by schema": model.with_structured_output(City).invoke(question).name,
    "by tool": model.with_structured_output(City, method="function_calling").invoke(question).name,
    "called": [call["name"], call["args"]["name"]],
    "responses": newer.invoke(question).text,
    "embedded": [len(vector) for vector in embeddings.embed_documents(["a cat", "a dog"])],
}))
"""


@needs("langchain_openai")
def test_langchain(server: LiveServer, tmp_path: Path) -> None:
    found = run_client(LANGCHAIN, server, tmp_path)
    assert found["answer"] == found["streamed"] == found["responses"] == ANSWER
    assert {found["by schema"], found["by tool"], found["called"][1]} <= {"Paris", "Rome"}
    assert found["called"][0] == "City"
    assert found["embedded"] == [576, 576]


LITELLM = """
import json, sys
import litellm

url, question = sys.argv[1:]
options = {"model": "openai/smollm2-135m", "api_base": url, "api_key": "none", "temperature": 0}
messages = [{"role": "user", "content": question}]
parameters = {"type": "object", "properties": {"name": {"enum": ["Paris", "Rome"]}}, "required": ["name"]}
tools = [{"type": "function", "function": {"name": "tell", "parameters": parameters}}]
answer = litellm.completion(messages=messages, **options)
stream = litellm.completion(messages=messages, stream=True, **options)
called = litellm.completion(messages=messages, tools=tools, tool_choice="required", max_tokens=200, **options)
options.pop("temperature")
embedded = litellm.embedding(input=["a cat"], encoding_format="float", **options)
print(json.dumps({
    "answer": answer.choices[0].message.content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "called": called.choices[0].message.tool_calls[0].function.name,
    "embedded": len(embedded.data[0]["embedding"]),
}))
"""


@needs("litellm")
def test_litellm(server: LiveServer, tmp_path: Path) -> None:
    found = run_client(LITELLM, server, tmp_path)
    assert found == {"answer": ANSWER, "streamed": ANSWER, "called": "tell", "embedded": 576}


def run_client(code: str, server: LiveServer, tmp_path: Path) -> Any:
    """Run a client in a process of its own, where its warnings are its own; what it prints last, as JSON."""
    script = tmp_path / "client.py"
    script.write_text(code)
    command = [sys.executable, str(script), server.url + "/v1", CAPITAL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
