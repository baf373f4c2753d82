"""Routes of the HTTP API: searches, moments, media, videos and the state of an index."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any, Literal

import fastapi
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, model_validator

from discovla.data.video.errors import DecodeError
from discovla.errors import one_line
from discovla.search.batching import SearchQueue
from discovla.search.guard import COOKIE, same_secret, session_cookie
from discovla.search.index import Index
from discovla.search.records import (
    ImageQuery,
    IndexStatus,
    LikeQuery,
    Query,
    SearchResult,
    TextQuery,
    VideoEntry,
    VideoQuery,
)
from discovla.search.status_feed import StatusFeed
from discovla.search.uploads import ImageDecoder

MAX_QUERY = 500  # characters of a text
MAX_WHERE = 1000  # characters of a condition
MAX_HITS = 200
MAX_CLIP_SECONDS = 300.0  # of a clip that is a query
MEDIA_TYPES = {  # others are sent as plain bytes, which a browser saves and does not open
    ".avi": "video/x-msvideo",
    ".gif": "image/gif",
    ".m4v": "video/mp4",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".mp4": "video/mp4",
    ".mpeg": "video/mpeg",
    ".mpg": "video/mpeg",
    ".ogv": "video/ogg",
    ".ts": "video/mp2t",
    ".webm": "video/webm",
}

FORM = "multipart/form-data"
MomentId = Annotated[int, Field(ge=0, lt=1 << 63)]
PathId = Annotated[int, fastapi.Path(ge=0, lt=1 << 63, description="number of a moment, from a hit")]


class QueryFields(BaseModel):
    """A query: one of q, like and clip, by POST also image."""

    q: str | None = Field(None, min_length=1, max_length=MAX_QUERY, description="text")
    like: MomentId | None = Field(None, description="moment that the hits should resemble")
    clip: MomentId | None = Field(None, description="moment whose file holds the clip from `start` to `end`")
    start: float | None = Field(None, ge=0, allow_inf_nan=False, description="seconds, with `clip`")
    end: float | None = Field(None, ge=0, allow_inf_nan=False, description="seconds, with `clip`")

    @model_validator(mode="after")
    def _is_one_query(self) -> QueryFields:
        names = ("q", "like", "clip", "image")
        given = [name for name in names if getattr(self, name, None) is not None]
        expected = ", ".join(name for name in names if hasattr(self, name))
        if len(given) != 1:
            raise ValueError(f"expected one of {expected}, found {' and '.join(given) or 'none'}")
        seconds = 0 if self.start is None or self.end is None else self.end - self.start
        if self.clip is None and (self.start, self.end) != (None, None):
            raise ValueError("expected start and end with clip, found them without")
        if self.clip is not None and not 0 < seconds <= MAX_CLIP_SECONDS:
            expected = f"0 < end - start <= {MAX_CLIP_SECONDS:g} seconds"
            raise ValueError(f"expected a clip with {expected}, found start {self.start}, end {self.end}")
        return self


class SearchFields(QueryFields):
    """A query and what is asked of the hits."""

    k: int = Field(24, ge=1, le=MAX_HITS, description="largest number of hits")
    where: str | None = Field(
        None, max_length=MAX_WHERE, description="condition on columns, such as `year > 2020`"
    )
    merge: bool = Field(True, description="join neighbouring moments of a video into one hit")


class Picture(BaseModel):
    """An uploaded picture: JPEG, PNG, WebP, GIF or BMP."""

    image: UploadFile | None = None


class QueryForm(Picture, QueryFields):
    """A query whose picture may be uploaded."""


class SearchForm(Picture, SearchFields):
    """A search whose picture may be uploaded."""


class FrameScore(BaseModel):
    """Similarity of one sampled frame to the query: seconds from the start of the file, and cosine."""

    time: float
    score: float


class VideoPage(BaseModel):
    """Part of a list of videos. total: videos in the whole list."""

    total: int
    videos: list[VideoEntry]


class Problem(BaseModel):
    """The body of a response with a status of 400 or above: one line."""

    detail: str


class Token(BaseModel):
    """The token that the server was started with."""

    token: str = Field(max_length=1000)


class Api:
    """Routes of the server. Its methods raise `HTTPException` for what a client can mend."""

    def __init__(self, index: Index, token: str | None) -> None:
        self.index, self.token = index, token
        self.texts = SearchQueue(index)  # and moments
        self.files = SearchQueue(index)  # images and clips, which are decoded first
        self.decoder = ImageDecoder()
        self.feed = StatusFeed(index)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Follow the index while the server runs."""
        following = asyncio.create_task(self.feed.follow())
        try:
            yield
        finally:
            self.feed.close()
            await following
            for queue in (self.texts, self.files):
                await asyncio.to_thread(queue.close)
            self.decoder.close()

    def add_routes(self, app: FastAPI) -> None:
        """Declare the routes of the API."""
        app.get("/api/search", summary="Search by text, moment or clip")(self.search)
        app.post("/api/search", summary="Search, also by an uploaded picture")(self.search_form)
        frames = "/api/moments/{moment_id}/frames"
        app.get(frames, summary="Compare the frames of a moment with a query")(self.frames)
        app.post(frames, summary="Compare them, also with an uploaded picture")(self.frames_form)
        jpeg: Any = {200: {"content": {"image/jpeg": {}}}}
        thumbnail = app.get(
            "/api/moments/{moment_id}/thumbnail",
            summary="Get a picture",
            response_class=Response,
            responses=jpeg,
        )
        thumbnail(self.thumbnail)
        file = "/api/media/{moment_id}"
        app.get(file, summary="Get a video", response_class=FileResponse)(self.media)
        app.head(file, include_in_schema=False)(self.media)
        app.get("/api/videos", summary="List videos")(self.videos)
        app.get("/api/status", summary="Get the state of the index", response_model=IndexStatus)(self.status)
        app.post("/api/session", summary="Trade the token for a cookie", status_code=204)(self.session)

    async def search(self, fields: Annotated[SearchFields, fastapi.Query()]) -> SearchResult:
        """Return the hits of a query, best first."""
        return await self._search(fields)

    async def search_form(self, fields: Annotated[SearchForm, fastapi.Form(media_type=FORM)]) -> SearchResult:
        """Return the hits of a query, best first; send the fields as `multipart/form-data`."""
        return await self._search(fields)

    async def frames(
        self, moment_id: PathId, fields: Annotated[QueryFields, fastapi.Query()]
    ) -> list[FrameScore]:
        """Return the similarity of each sampled frame of a moment to the query."""
        return await self._frames(moment_id, fields)

    async def frames_form(
        self, moment_id: PathId, fields: Annotated[QueryForm, fastapi.Form(media_type=FORM)]
    ) -> list[FrameScore]:
        """Return the similarity of each sampled frame of a moment to the query."""
        return await self._frames(moment_id, fields)

    def thumbnail(self, moment_id: PathId) -> Response:
        """Return the JPEG of a moment."""
        with _client_errors():
            picture = self.index.thumbnail(moment_id)
        return Response(picture, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=300"})

    def media(self, moment_id: PathId) -> FileResponse:
        """Return the video file of a moment, or the part that `Range` asks for."""
        with _client_errors():
            path = self.index.media_path(moment_id)
        try:
            status = path.stat()
        except OSError as error:
            raise HTTPException(
                404, f"moment {moment_id}: its file cannot be read: {error.strerror}"
            ) from None
        if not stat.S_ISREG(status.st_mode):
            raise HTTPException(404, f"moment {moment_id}: its file is gone")
        kind = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
        return FileResponse(path, stat_result=status, media_type=kind, headers={"Cache-Control": "private"})

    def videos(
        self,
        state: Annotated[Literal["indexed", "refused", "gone"] | None, fastapi.Query()] = None,
        offset: Annotated[int, fastapi.Query(ge=0)] = 0,
        limit: Annotated[int, fastapi.Query(ge=1, le=1000)] = 100,
    ) -> VideoPage:
        """Return videos of the index by path: by default all but the refused ones, which have a reason."""
        if state == "refused":
            entries = self.index.refused()
        else:
            states = ("indexed", "gone") if state is None else (state,)
            entries = [entry for entry in self.index.videos() if entry.state in states]
        return VideoPage(total=len(entries), videos=entries[offset : offset + limit])

    async def status(self, request: Request) -> Response:
        """Return numbers, columns and the progress of indexing.

        With `Accept: text/event-stream` it is sent again whenever it changes.
        """
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(self.feed.events(), media_type="text/event-stream")
        return Response(await self.feed.read(), media_type="application/json")

    def session(self, token: Token, request: Request) -> Response:
        """Set the cookie by which the page is let in."""
        if self.token is not None and not same_secret(token.token, self.token):
            raise HTTPException(401, "token: expected that of `discovla serve`, found another")
        response = Response(status_code=204)
        if self.token is not None:
            secure = request.url.scheme == "https"
            value = session_cookie(self.token)
            response.set_cookie(COOKIE, value, httponly=True, samesite="strict", secure=secure)
        return response

    async def _search(self, fields: SearchFields) -> SearchResult:
        """Answer a search in the thread of a queue."""

        def work(query: Query) -> SearchResult:
            return self.index.search(query, fields.k, where=fields.where or None, merge=fields.merge)

        return await self._submit(await self._query(fields), work)

    async def _frames(self, moment_id: int, fields: QueryFields) -> list[FrameScore]:
        scores = await self._submit(
            await self._query(fields), lambda query: self.index.frame_scores(moment_id, query)
        )
        return [FrameScore(time=time, score=score) for time, score in scores]

    async def _submit(self, query: Query, work: Callable[[Query], Any]) -> Any:
        queue = self.files if isinstance(query, ImageQuery | VideoQuery) else self.texts
        with _client_errors():
            return await asyncio.wrap_future(queue.submit(query, work))

    async def _query(self, fields: QueryFields) -> Query:
        """Return the query that the fields describe."""
        if fields.q is not None:
            return TextQuery(text=fields.q)
        if fields.like is not None:
            return LikeQuery(moment_id=fields.like)
        with _client_errors():
            if fields.clip is not None:
                path = await asyncio.to_thread(self.index.media_path, fields.clip)
                return VideoQuery(path=path, start=fields.start, end=fields.end)
            assert isinstance(fields, Picture) and fields.image is not None
            content = await fields.image.read()
            return ImageQuery(image=await asyncio.to_thread(self.decoder, content))


@contextmanager
def _client_errors() -> Iterator[None]:
    """Turn errors of the index that a client can mend into responses."""
    try:
        yield
    except KeyError as error:
        raise HTTPException(404, str(error.args[0] if error.args else "not found")) from None
    except (ValueError, DecodeError) as error:
        raise HTTPException(400, one_line(error)) from None
