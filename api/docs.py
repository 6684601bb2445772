"""/docs: the OpenAPI document as one plain HTML page. No scripts, nothing loaded, all escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from api.openapi import Object

# What the page may do when a browser shows it: be styled by itself, and nothing else.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
@media (prefers-color-scheme:dark){body{background:#181818;color:#ddd}a{color:#8cf}}
h2{margin-top:2.5rem;border-bottom:1px solid #8888}h3{margin-top:2rem;font-family:monospace}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.2rem .6rem .2rem 0;border-bottom:1px solid #8884}
code{font-size:.95em;overflow-wrap:anywhere}
"""


def page(document: Object) -> str:
    """The whole page."""
    info = document["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    schemas = document["components"]["schemas"]
    return "".join(
        [
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width"><style>',
            f"{_STYLE}</style></head><body><h1>{title}</h1><p>{_prose(info['description'])}</p>",
            '<p><a href="/openapi.json">openapi.json</a></p><h2>Calls</h2><ul>',
            *(_entry(path, item) for path, item in document["paths"].items()),
            "</ul>",
            *(_call(path, item) for path, item in document["paths"].items()),
            "<h2>Shapes</h2>",
            *(_shape(name, schema) for name, schema in schemas.items()),
            "<h2>Errors</h2>",
            _errors(schemas["Failure"]["properties"]["scode"]["oneOf"]),
            "</body></html>",
        ]
    )


def _entry(path: str, item: Object) -> str:
    [(method, operation)] = item.items()
    return (
        f'<li><a href="#{escape(path)}"><code>{escape(method.upper())} {escape(path)}</code></a> '
        f"{_prose(operation['summary'])}</li>"
    )


def _call(path: str, item: Object) -> str:
    [(method, operation)] = item.items()
    parts = [
        f'<h3 id="{escape(path)}">{escape(method.upper())} {escape(path)}</h3>',
        f"<p>{_prose(operation['summary'])} {_prose(operation.get('description', ''))}</p>",
    ]
    if "parameters" in operation:
        parts.append(_parameters(operation["parameters"]))
    if "requestBody" in operation:
        parts.append(f"<p>Body: {_contents(operation['requestBody'])}</p>")
    parts.append(_responses(operation["responses"]))
    return "".join(parts)


def _parameters(parameters: list[Object]) -> str:
    rows = [
        (
            f"<code>{escape(one['name'])}</code>",
            _type(one["schema"]),
            "required" if one["required"] else "",
            _prose(one.get("description", "")),
        )
        for one in parameters
    ]
    return _table(("parameter", "type", "", ""), rows) if rows else ""


def _responses(responses: Object) -> str:
    rows = []
    for status, response in responses.items():
        if "$ref" in response:
            rows.append((status, '<a href="#shape-Failure">Failure</a>'))
            continue
        headers = "".join(
            f"<br>header <code>{escape(name)}</code>: {_prose(header['description'])}"
            for name, header in response.get("headers", {}).items()
        )
        rows.append((status, _contents(response) + headers))
    return _table(("status", "answer"), rows)


def _contents(holder: Object) -> str:
    return ", ".join(
        f"{_type(content['schema'])} as <code>{escape(kind)}</code>"
        for kind, content in holder["content"].items()
    )


def _shape(name: str, schema: Object) -> str:
    required = schema.get("required", [])
    rows = [
        (
            f"<code>{escape(member)}</code>",
            _type(of),
            "always" if member in required else "optional",
            _prose(of.get("description", "")),
        )
        for member, of in schema.get("properties", {}).items()
    ]
    return (
        f'<h3 id="shape-{escape(name)}">{escape(name)}</h3>'
        f"<p>{_prose(schema.get('description', ''))}</p>"
        + (_table(("member", "type", "", ""), rows) if rows else "")
    )


def _errors(choices: list[Object]) -> str:
    rows = [
        (str(one["const"]), f"<code>{escape(one['title'])}</code>", escape(one["description"]))
        for one in choices
    ]
    return _table(("scode", "name", "message"), rows)


def _type(schema: Object) -> str:
    """A schema in a few words, with a link where it has a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#shape-{escape(name)}">{escape(name)}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(f"<code>{escape(str(v))}</code>" for v in schema["enum"])
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}{_limits(schema)}"
    if kind == "object" and "additionalProperties" in schema:
        return f"object of {_type(schema['additionalProperties'])}"
    return escape(kind) + _limits(schema)


def _limits(schema: Object) -> str:
    names = ("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "pattern")
    told = [f"{name} <code>{escape(str(schema[name]))}</code>" for name in names if name in schema]
    return f" ({', '.join(told)})" if told else ""


def _prose(text: Any) -> str:
    """Escaped text, with what stands between backquotes as code."""
    pieces = escape(str(text)).split("`")
    return "".join(
        f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces)
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Cells of `rows` are HTML already."""
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{lines}</table>"
