"""``/openapi.json`` describes what there is, in the words of the types that check it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from api_client import Api
from cupy_engine.server.protocol import ChatRequest, CompletionRequest
from cupy_engine.server.response_protocol import ResponseRequest


@pytest.fixture
def document(api: Api) -> dict[str, Any]:
    answer = api.http.get("/openapi.json")
    assert answer.status_code == 200
    return answer.get_json()


def test_every_route_is_there_and_says_what_it_does(api: Api, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    operations = {
        (path, method): each for path, methods in document["paths"].items() for method, each in methods.items()
    }
    assert {("/v1/completions", "post"), ("/v1/models/{name}", "get"), ("/health", "get")} <= operations.keys()
    routes = [rule for rule in api.app.url_map.iter_rules() if not rule.endpoint.startswith("pages.")]
    assert len(document["paths"]) == len({rule.rule for rule in routes})
    assert len({each["operationId"] for each in operations.values()}) == len(operations)
    for (path, _), operation in operations.items():
        assert operation["summary"], path
        assert operation["responses"]["400"]["content"]["application/json"]["schema"] == ERROR
    assert operations["/v1/models/{name}", "get"]["parameters"][0]["name"] == "name"


ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest), ("/v1/responses", ResponseRequest)],
)
def test_bodies_are_those_that_are_checked(document: dict[str, Any], path: str, kind: type[msgspec.Struct]) -> None:
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": f"#/components/schemas/{kind.__name__}"}
    schema = document["components"]["schemas"][kind.__name__]
    assert set(schema["properties"]) == set(kind.__struct_fields__)
    assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]


def test_parameters_say_what_they_do_and_what_is_allowed(document: dict[str, Any]) -> None:
    temperature = document["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert temperature["description"].startswith("0 is greedy; otherwise logits are divided by it.")
    assert temperature["description"].endswith("Must be between 0 and 100.")


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, list):
            return [each for item in value for each in references(item)]
        if not isinstance(value, dict):
            return []
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for item in value.values() for each in references(item)]

    found = references(document)
    assert len(found) > 20
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]
