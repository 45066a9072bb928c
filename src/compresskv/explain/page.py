"""The retention view: one HTML file that needs nothing else, neither a library nor the network."""

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

from compresskv.explain.retention import Report
from compresskv.selection.budget_words import in_words
from compresskv.selection.precision import NATIVE

_IN_SCRIPT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def retention_page(report: Report) -> str:
    """The page as text; write it as UTF-8.

    Whatever the document holds stays text: it is embedded as JSON in which no tag can be written, the script shows it
    through text nodes only, and the page's policy allows no other script and no request.
    """
    style, script = _asset("retention.css"), _asset("retention.js")
    policy = f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}"
    parts = {
        "@policy@": policy,
        "@title@": html.escape(f"Retention: {report.question}"),
        "@style@": style,
        "@script@": script,
        "@data@": json.dumps(_packed(report), ensure_ascii=False).translate(_IN_SCRIPT),
    }
    page = []
    for line in _asset("retention.html").splitlines():
        mark = next((mark for mark in parts if mark in line), None)
        page.append(line if mark is None else line.replace(mark, parts[mark]))
    return "\n".join(page) + "\n"


def _packed(report: Report) -> dict[str, Any]:
    """The report's data with one base64 byte a token and layer instead of numbers: a third of the size."""
    data = report.to_dict()
    for method in data["methods"]:
        method["budget_text"] = in_words(method["budget"])
        if method["store"] != NATIVE:
            method["budget_text"] += f" in {method['store']}"
        for layer in method["layers"]:
            layer["retained"] = base64.b64encode(bytes(layer["retained"])).decode("ascii")
    return data


def _asset(name: str) -> str:
    return resources.files("compresskv.explain").joinpath(name).read_text(encoding="utf-8").strip()


def _source(text: str) -> str:
    """What names an inline element in a content security policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
