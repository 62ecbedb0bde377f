"""The fields by which a request demands a form of its output, in OpenAI's words and in vLLM's."""

from __future__ import annotations

from typing import Any

import msgspec

from cupy_engine.structured_outputs import FORMS, StructuredOutputs

from .api_errors import refuse
from .protocol import GenerationFields, ResponseFormat


def output_form(fields: GenerationFields) -> StructuredOutputs | None:
    """The form that the output must have.

    Raises:
        ApiError, InvalidRequestError: several forms, or one that makes no sense; names the field.
    """
    forms = [_guided(form, value) for form in FORMS if (value := getattr(fields, f"guided_{form}", None)) is not None]
    if fields.structured_outputs is not None:
        forms.append(StructuredOutputs(**msgspec.structs.asdict(fields.structured_outputs)))
    if (schema := answer_schema(fields.response_format)) is not None:
        forms.append(StructuredOutputs(json=schema, param="response_format"))
    if len(forms) > 1:
        refuse(forms[1].param, f"{forms[1].param} cannot go with {forms[0].param}: give one form of the output")
    return forms[0] if forms else None


def _guided(form: str, value: object) -> StructuredOutputs:
    given: dict[str, Any] = {form: value, "param": f"guided_{form}"}
    return StructuredOutputs(**given)


def answer_schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema that ``response_format`` wants of an answer, if any.

    Raises:
        ApiError: it is missing.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        missing = "response_format.json_schema" + (".schema" if wanted.json_schema else "")
        refuse(missing, f"{missing} is required with type json_schema")
    return wanted.json_schema.schema
