"""HTML pages that load nothing, on one base: `base.html`."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def fill(template: str, **values: Any) -> str:
    """Fill a template, named by its path in the package (``reporting/page.html``); all values are escaped."""
    environment = Environment(
        loader=PackageLoader("ssl_geo", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
