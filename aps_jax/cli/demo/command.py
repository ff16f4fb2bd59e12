"""Starts the demo on this machine alone, and cleans up after it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from aps_jax.cli.options import Demo

#: The browser itself sees to it that the page takes nothing from elsewhere.
POLICY = (
    "default-src 'self' blob: data: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "form-action 'self'"
)


def run(options: Demo) -> int:
    """Serves until Ctrl-C; returns the exit code."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("aps-jax demo needs Gradio: pip install 'aps_jax[demo]'")
    with tempfile.TemporaryDirectory(prefix="aps-jax-demo-") as folder:
        blocks = launch(Path(folder), port=options.port, inbrowser=options.open)
        print(f"open {blocks.local_url} in a browser; Ctrl-C ends the demo", flush=True)
        try:
            blocks.block_thread()
        finally:
            blocks.close(verbose=False)
    return 0


def launch(folder: Path, *, port: int | None = None, inbrowser: bool = False) -> Any:
    """Starts serving in a thread of its own; `close()` of what is returned ends it.

    Args:
      folder: for uploads and results, of which each run has a folder of its own.
      port: of 127.0.0.1; None takes a free one.
      inbrowser: open the page.

    Raises:
      OSError: the port is taken.
    """
    # Gradio reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "cache")
    from aps_jax.cli.demo.app import build, look

    blocks = build(folder)
    blocks.queue(default_concurrency_limit=1, max_size=16)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        inbrowser=inbrowser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        app_kwargs={"middleware": _middleware()},
        **look(),
    )
    return blocks


def _middleware() -> list[Any]:
    from starlette.middleware import Middleware

    return [Middleware(_Policy)]


class _Policy:
    """Adds the policy to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
