"""Send the web page at `/`: one file, which loads nothing else."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi.responses import Response


def page_response() -> Response:
    """Return the page, with a policy that allows only its own script and style."""
    text, policy = _page()
    return Response(
        text,
        media_type="text/html",
        headers={
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        },
    )


@cache
def _page() -> tuple[str, str]:
    text = files("runtime.serve").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_source(text, 'script')}; "
        f"style-src {_source(text, 'style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _source(text: str, tag: str) -> str:
    """Return the policy source of the only inline `tag`: its SHA-256 (CSP Level 2)."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
