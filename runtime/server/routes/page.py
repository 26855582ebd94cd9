"""Routes of the page at `/` and of its files under `/page/`. They need no API key: the page asks for one and sends it."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request, Response

from belle_compile.runtime.server.page import Asset, load_assets

ASSETS = load_assets()
INDEX = ASSETS.pop("index.html")
HEADERS = {
    # Nothing inline and nothing of another origin; what a model writes can at most be shown.
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser asks each time, so that after an upgrade all files are of one version; unchanged ones are not sent again.
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    return asset_response(INDEX, request.headers.get("if-none-match", ""))


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request) -> Response:
    if name not in ASSETS:
        raise HTTPException(404)
    return asset_response(ASSETS[name], request.headers.get("if-none-match", ""))


def asset_response(asset: Asset, if_none_match: str) -> Response:
    """The file, or 304 without a body where `if_none_match` (the header; RFC 9110, 13.1.2) names its content."""
    headers = HEADERS | {"ETag": asset.etag}
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    if asset.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)
