"""Run a command beside a real Jupyter server; kernels that it starts use that server.

python scripts/with_server.py COMMAND [ARG ...]
"""

from __future__ import annotations

import os
import subprocess
import sys

from kernel_session import running_server

if __name__ == "__main__":
    with running_server() as server:
        named = {"SHIMMY_SERVER_URL": server.url, "SHIMMY_KERNEL_TOKEN": server.token}
        done = subprocess.run(sys.argv[1:], env={**os.environ, **named}, check=False)
    sys.exit(done.returncode)
