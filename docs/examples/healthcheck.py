"""Exits with 0 where the server can do its main job; else says in one line why not, and exits with 1.

The token is read from a file and sent in a header, so that it is in no process's arguments, in no
environment, and in no log of requests.
"""

# ruff: noqa: INP001, S310, T201

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 10.0


def main() -> int:
    url = os.environ.get("SHIMMY_HEALTH_URL", "http://127.0.0.1:8888/shimmy/health")
    try:
        token = Path(os.environ["JUPYTER_TOKEN_FILE"]).read_text(encoding="ascii").strip()
        request = urllib.request.Request(url, headers={"Authorization": f"token {token}"})
        # Straight to it, whatever proxy the environment names: it would get to see the token.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=SECONDS) as answer:
            json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            print(f"the server answers {error.code}")
        return 1
    except KeyError:
        print("JUPYTER_TOKEN_FILE must name the file that holds the token")
        return 1
    except (OSError, ValueError) as error:
        print(f"no answer: {type(error).__name__}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
