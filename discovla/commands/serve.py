"""`discovla serve`: the HTTP API and the page of an index."""

from __future__ import annotations

import argparse
import os
import secrets
from importlib.util import find_spec
from pathlib import Path

TOKEN = "DISCOVLA_TOKEN"  # environment variable; a command line can be read by other users of the machine
LIBRARIES = ("fastapi", "uvicorn", "python_multipart")


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "Serve an index: a page to search it in a browser, and the HTTP API that the page uses (/docs)."
    parser = commands.add_parser("serve", help=text, description=text)
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder that `discovla index` wrote")
    host = "address to listen on; default: %(default)s, which only this machine reaches; others need --token"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    port = "default: %(default)s; 0 chooses a free one"
    parser.add_argument("--port", type=int, default=8000, help=port)
    token = (
        f"secret that requests must carry and the page asks for; default: ${TOKEN}, else none; "
        "without a value one is made and printed"
    )
    parser.add_argument("--token", nargs="?", const="", metavar="TOKEN", help=token)
    model = "the model of the index, if it has moved: a run, checkpoint, export or plain CLIP"
    parser.add_argument("--model", metavar="RUN", help=model)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve: needs {', '.join(missing)}: pip install 'discovla[search]'")
    from discovla.search.guard import check_token
    from discovla.search.index import Index
    from discovla.search.serve import serve

    token = os.environ.get(TOKEN) or None if arguments.token is None else arguments.token
    if token == "":
        token = secrets.token_hex(16)
        print(f"token: {token}", flush=True)
    check_token(token, arguments.host)  # before a model is loaded
    index = Index.open(arguments.index, model=arguments.model, device=arguments.device, read_only=True)
    index.embed_texts(["a video"])  # loads the model, so that the first search is as quick as later ones
    status = index.status()
    print(f"{arguments.index}: {status.moments:,} moments of {status.videos:,} videos", flush=True)
    try:
        serve(index, host=arguments.host, port=arguments.port, token=token)
    finally:
        index.close()
