"""The HTTP application: OpenAI's API, and what a server needs beside it."""

from __future__ import annotations

from fastapi import FastAPI

from belle_compile import __version__
from belle_compile.runtime.server.errors import install_handlers
from belle_compile.runtime.server.middleware import install
from belle_compile.runtime.server.openapi import TITLE, document
from belle_compile.runtime.server.routes import adapters, admin, chat, completions, health, info, models, page, tokenize
from belle_compile.runtime.server.service import Service

ROUTERS = (
    chat.router, completions.router, models.router, adapters.router, admin.router, tokenize.router, info.router, health.router,
    page.router,
)  # fmt: skip


def create_app(service: Service) -> FastAPI:
    """Return the application that serves `service`. Its documentation is /openapi.json; there are no pages of other hosts."""
    app = FastAPI(
        title=TITLE, version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        root_path=service.options.root_path,
    )  # fmt: skip
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    install(app, service)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app
