"""`discovla search`: find moments in an index of videos."""

from __future__ import annotations

import argparse
import json
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from discovla.search.index import Index
from discovla.search.query import Correction
from discovla.search.records import Hit, ImageQuery, LikeQuery, Query, SearchResult, TextQuery, VideoQuery


def add(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    text = "Find the moments of an index that are closest to a text, an image, a video or another moment."
    parser = commands.add_parser("search", help=text, description=text)
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder that `discovla index` made")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="hits; default: %(default)s")
    parser.add_argument("--image", type=Path, metavar="FILE", help="look for moments like an image")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="look for moments like a video, or a span of it"
    )
    parser.add_argument("--start", type=float, metavar="S", help="start of that span in seconds")
    parser.add_argument("--end", type=float, metavar="S", help="end of that span in seconds")
    parser.add_argument("--like", type=int, metavar="ID", help="look for moments like a moment of the index")
    where = "only moments for which a condition on columns holds: \"year > 2020 and title like '%%dog%%'\""
    parser.add_argument("--where", metavar="CONDITION", help=where)
    apart = "list neighbouring moments of a video one by one"
    parser.add_argument("--no-merge", action="store_true", help=apart)
    exact = "compare the tokens of all moments, not only of those with the closest pooled features"
    parser.add_argument("--exact", action="store_true", help=exact)
    correction = "weigh scores by those of other captions; default: %(default)s"
    parser.add_argument("--correction", choices=get_args(Correction), default="none", help=correction)
    model = "model of the index, if it has moved"
    parser.add_argument("--model", metavar="RUN", help=model)
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", default="auto", choices=devices, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--open", action="store_true", help="play the best hit in the browser")
    parser.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    query = _query(arguments)
    with Index.open(arguments.index, model=arguments.model, device=arguments.device, read_only=True) as index:
        try:
            result = index.search(
                query,
                arguments.k,
                where=arguments.where,
                merge=not arguments.no_merge,
                exact=arguments.exact,
                correction=arguments.correction,
            )
        except KeyError as error:
            raise ValueError(f"search: --like: {error.args[0]}") from None
    print(json.dumps(asdict(result), ensure_ascii=False) if arguments.json else _table(result))
    if arguments.open and result.hits:
        best = result.hits[0]
        webbrowser.open(f"{Path(best.video).as_uri()}#t={best.start:.2f}")


def _query(arguments: argparse.Namespace) -> Query:
    """Return the query of the options, of which there must be one."""
    given = {
        "TEXT": arguments.text and TextQuery(text=arguments.text),
        "--image": arguments.image and ImageQuery(image=arguments.image),
        "--video": arguments.video
        and VideoQuery(path=arguments.video, start=arguments.start, end=arguments.end),
        "--like": arguments.like is not None and LikeQuery(moment_id=arguments.like),
    }
    queries = [query for query in given.values() if query]
    if len(queries) != 1:
        found = ", ".join(name for name, query in given.items() if query) or "none"
        raise ValueError(f"search: expected one of TEXT, --image, --video and --like, found {found}")
    if arguments.video is None and (arguments.start is not None or arguments.end is not None):
        raise ValueError("search: --start, --end: expected --video, of which they are a span, found none")
    return queries[0]


def _table(result: SearchResult) -> str:
    """Return the hits as lines under a head, and the note about them."""
    head = ["  #    score  prob.  time             video"] if result.hits else []
    lines = [_line(rank, hit) for rank, hit in enumerate(result.hits, start=1)]
    return "\n".join([*head, *lines, *([result.note] if result.note else [])])


def _line(rank: int, hit: Hit) -> str:
    probability = "     " if hit.probability is None else f"{hit.probability:5.0%}"
    span = f"{_clock(hit.start)}-{_clock(hit.end)}"
    return f"{rank:3d} {hit.score:8.3f} {probability}  {span}  {hit.video}  (moment {hit.moment_id})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes):d}:{rest:04.1f}"
