"""Run the quickstart notebook in a real Jupyter server's kernel and print what a person would see.

python scripts/demo.py [NOTEBOOK]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import nbformat
from kernel_session import kernel, running_server, text_of

QUICKSTART = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


class Screen:
    """Prints an answer as it grows, and each error as it comes."""

    def __init__(self) -> None:
        self._shown = ""
        self.failed = False

    def __call__(self, output: dict[str, Any]) -> None:
        text = text_of(output)
        if output["type"] == "update_display_data" and text.startswith(self._shown):
            print(text[len(self._shown) :], end="", flush=True)
        else:
            print(text, end="", flush=True)
        self._shown = text if "display" in output["type"] else ""
        self.failed |= output["type"] == "error"


async def main(notebook: Path) -> int:
    cells = nbformat.read(notebook, as_version=4).cells
    failed = False
    with running_server() as server:
        print(f"Jupyter server {server.url} (pid {server.pid}), token from its own record\n")
        async with kernel(server) as session:
            for cell in (c for c in cells if c.cell_type == "code"):
                print("\n".join(f"> {line}" for line in cell.source.splitlines()))
                screen = Screen()
                await session.execute(cell.source, screen)
                print("\n")
                expected = "raises-exception" in cell.metadata.get("tags", [])
                failed |= screen.failed and not expected
        models = await server.request("GET", "shimmy/v1/models")
        loaded = [m["id"] for m in models["data"] if m["shimmy"]["state"] == "loaded"]
        print(f"Models in the server's own process: {', '.join(loaded)}")
    return int(failed or not loaded)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else QUICKSTART)))
