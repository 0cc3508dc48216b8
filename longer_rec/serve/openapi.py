"""What the API's page says of request bodies, which are checked column by column and not by a schema."""

from typing import Any

_COLUMN = {"type": "array", "items": {}}
_HISTORY = {"type": "object", "additionalProperties": _COLUMN,
            "description": "one array per column, as GET /v1/model lists them; times in whole seconds, oldest first"}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in
                                                          ("application/json", "application/msgpack")}}}


SCORE_BODY = _body({
    "type": "object", "required": ["time", "candidates"], "additionalProperties": False,
    "properties": {
        "user": {"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
        "time": {"type": "integer", "minimum": 0, "description": "of the request, seconds since 1970"},
        "features": {"type": "object", "description": "of the user; those left out are as the data knew them"},
        "history": _HISTORY,
        "candidates": {"type": "array", "items": {}, "minItems": 1, "description": "item ids"}}})
EVENTS_BODY = _body({"type": "object", "required": ["events"], "additionalProperties": False,
                     "properties": {"events": _HISTORY}})
