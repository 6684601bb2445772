"""Pages of other sites: a browser that can reach us must not let them use that.

There are no passwords yet, so it is all that stands between a page and everybody's backups. A POST
of a page says where it is from. A page whose owner makes its own name lead to our address (DNS
rebinding) is from here, as far as a browser can see; what tells it is the name that it asks for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import web

from api.errors import ApiError


def refuse_foreign_origin(request: web.Request) -> None:
    """ApiError for a POST of a page that is not our own."""
    origin = request.headers.get("Origin")
    if origin is None or request.method in ("GET", "HEAD"):
        return
    try:
        ours = urlsplit(origin).netloc == request.headers.get("Host")
    except ValueError:  # "http://[" is no address
        ours = False
    if not ours:
        raise ApiError("foreign_origin", "the request comes from a page of another site")


def refuse_foreign_host(request: web.Request, names: Collection[str]) -> None:
    """ApiError when the request asks for a host of a name that somebody else may own: not one of
    `names`, and none that only leads to this machine or its network."""
    host = request.headers.get("Host", "")
    name = _name_in(host)
    if name is None or not _is_ours(name, names):
        shown = host if name is None else name
        raise ApiError("foreign_host", f"{shown[:200]!r} is not in [api] host_names")


def _name_in(host: str) -> str | None:
    """Without the port; None if it is no name."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:
        return None


def _is_ours(name: str, names: Collection[str]) -> bool:
    """Addresses can't be rebound, and names without a dot are in nobody's domain."""
    if "." not in name.removesuffix(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
