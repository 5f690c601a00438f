"""What the endpoint reads and answers, for programs (OpenAPI) and for people: `/openapi.json` and `/docs`."""

from __future__ import annotations

import html
import json
from typing import Any

from infalign import __version__
from infalign.serving.request import NOT_OF, CompletionRequest, Kind

PATHS: dict[str, tuple[str, str, Kind | None]] = {
    "/v1/chat/completions": ("post", "An answer to a chat, chosen among candidates.", "chat"),
    "/v1/completions": ("post", "A completion of a text, chosen among candidates.", "text"),
    "/v1/models": ("get", "What is served.", None),
    "/v1/models/{name}": ("get", "The same of one model.", None),
    "/health": ("get", "Whether it works, and how many requests wait.", None),
    "/metrics": ("get", "Counts for Prometheus.", None),
}
"""Every path with its method, what it is, and the kind of request that it reads."""


def openapi(model: str) -> dict[str, Any]:
    """The description of the endpoint in OpenAPI 3.1; `model` is the name that is served."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for path, (method, summary, kind) in PATHS.items():
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": "as OpenAI's API has it"}},
        }
        if kind is not None:
            name = f"{kind.title()}Request"
            schemas |= _schemas(kind, name)
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
            operation["requestBody"] = {"required": True, "content": content}
            operation["responses"]["400"] = {"description": "a field that can't be honoured, named in error.param"}
        if "{name}" in path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"const": model}}]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"infalign: {model}", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _schemas(kind: Kind, name: str) -> dict[str, Any]:
    """The fields that a kind of request has, and the types that they are made of."""
    whole = CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = whole.pop("$defs")
    content = "messages" if kind == "chat" else "prompt"
    properties = {field: one for field, one in whole["properties"].items() if field not in NOT_OF[kind]}
    own = {"type": "object", "title": name, "properties": properties, "required": ["model", content]}
    return {**parts, name: {**own, "additionalProperties": False}}


def page(model: str) -> str:
    """The same to read; it loads nothing from anywhere."""
    rows = "".join(
        f"<tr><td><code>{method.upper()} {path}</code></td><td>{html.escape(summary)}</td></tr>"
        for path, (method, summary, _) in PATHS.items()
    )
    schemas = "".join(
        f"<h2>{html.escape(name)}</h2><pre>{html.escape(json.dumps(schema, indent=2))}</pre>"
        for name, schema in openapi(model)["components"]["schemas"].items()
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(model)}</title>"
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{padding:.2em 1em .2em 0}pre{background:#f0f3f6;padding:1em;overflow:auto}</style>"
        f"<h1>{html.escape(model)}</h1><p>OpenAI\N{RIGHT SINGLE QUOTATION MARK}s API; "
        "<a href=/openapi.json>openapi.json</a> is this page for programs.</p>"
        f"<table>{rows}</table>{schemas}</html>"
    )
