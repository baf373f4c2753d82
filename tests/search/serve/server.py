"""Serve the stand-in of an index: `python server.py FOLDER`."""

import sys
from pathlib import Path

from discovla.search.serve import serve
from tests.search.serve.fake import FakeIndex

if __name__ == "__main__":
    serve(FakeIndex(Path(sys.argv[1])), port=0)  # type: ignore[arg-type]
