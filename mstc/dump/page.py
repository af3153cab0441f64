"""The dump as one HTML page that needs nothing else: no network, no other file.

The page's scripts build everything with ``textContent``, so that no text of a model is ever read as
HTML; its data stand in a block that is no script; and a policy lets only the page's own scripts run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mstc.dump.coding import to_data
from mstc.dump.diff import Difference
from mstc.dump.model import Dump

_LIBRARIES = ("vendor/d3.min.js", "vendor/dagre.min.js")
_SCRIPTS = (
    "base",
    "data",
    "graph",
    "model",
    "detail",
    "passes",
    "refusals",
    "memory",
    "about",
    "compare",
    "search",
    "app",
)


def to_html(dump: Dump, difference: Difference | None = None) -> str:
    """The page; with ``difference`` it also compares the dump to another one."""
    scripts = [_read(name) for name in (*_LIBRARIES, *(f"templates/{s}.js" for s in _SCRIPTS))]
    style = _read("templates/page.css")
    environment = Environment(
        loader=PackageLoader("mstc.dump"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        title=dump.title,
        policy=_policy(scripts, style),
        style=Markup(style),
        scripts=[Markup(s) for s in scripts],
        data=_embedded({**to_data(dump), "difference": difference.to_data() if difference else None}),
    )


@cache
def _read(name: str) -> str:
    return files("mstc.dump").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: list[str], style: str) -> str:
    """A content security policy: these scripts, this style, and nothing from anywhere."""
    hashes = " ".join(_hash(s) for s in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data:; base-uri 'none'"


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(data: Any) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(data, separators=(",", ":"), default=str)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
