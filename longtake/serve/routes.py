"""The routes under /api: what a request says, checked, and who is asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Self

import numpy as np
from fastapi import APIRouter, Depends, File, Form, Header, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from longtake.errors import ConfigError
from longtake.inference.pipeline import check_prompt
from longtake.serve.errors import ApiError, not_found
from longtake.serve.hub import Hub
from longtake.serve.live import Live
from longtake.serve.pictures import png, read_picture
from longtake.serve.timeline import Beginning
from longtake.serve.viewers import FORMATS


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptBody(_Body):
    """Another prompt."""

    prompt: str
    drop: bool = True


class RewindBody(_Body):
    """How far to go back."""

    blocks: int | None = Field(default=None, ge=1, le=1_000_000)
    to_frame: int | None = Field(default=None, ge=0, le=2**31)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.blocks is None) == (self.to_frame is None):
            raise ValueError("give either blocks or to_frame")
        return self


class ErrorBody(BaseModel):
    """What went wrong, in a code, and what to do."""

    error: dict[str, str]


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 409, 413, 415, 422, 429, 500, 503, 507)
}
router = APIRouter(prefix="/api", responses=_ERRORS)


def _hub(request: Request) -> Hub:
    return request.app.state.hub


HubHere = Annotated[Hub, Depends(_hub)]


def _session(hub: HubHere, name: str, x_session_secret: Annotated[str | None, Header()] = None) -> Live:
    return hub.find(name, x_session_secret)


Session = Annotated[Live, Depends(_session)]
Upload = Annotated[UploadFile | None, File()]
Drop = Annotated[bool, Form()]


def _checked(prompt: str, hub: Hub) -> str:
    most = hub.settings.limits.prompt_chars
    if len(prompt) > most:
        raise ApiError(
            422, "bad_request", f"the prompt has {len(prompt)} characters, and {most} at most are taken", "cut it"
        )
    try:
        return check_prompt(prompt)
    except ConfigError:
        raise ApiError(422, "bad_request", "the prompt is empty or no text", "say what should move and how") from None


async def _picture(file: UploadFile | None, hub: Hub) -> NDArray[np.uint8] | None:
    if file is None:
        return None
    limits = hub.settings.limits
    data = await file.read(limits.upload_bytes + 1)
    if len(data) > limits.upload_bytes:
        raise ApiError(413, "too_large", f"the picture is larger than {limits.upload_bytes} bytes", "scale it down")
    return await run_in_threadpool(read_picture, data, hub.model.height, hub.model.width, limits.pixels)


async def _packed(picture: NDArray[np.uint8] | None) -> bytes | None:
    return None if picture is None else await run_in_threadpool(png, picture)


@router.get("/info")
async def info(hub: HubHere) -> dict[str, Any]:
    """The model, how its pictures are sent, the limits, how full it is."""
    return hub.info(list(FORMATS))


@router.post("/sessions", status_code=201)
async def create(
    hub: HubHere,
    prompt: Annotated[str, Form()],
    image: Upload = None,
    seed: Annotated[int, Form(ge=0, lt=2**63)] = 0,
    guidance: Annotated[float | None, Form(ge=0, le=100)] = None,
    negative: Annotated[str | None, Form()] = None,
) -> dict[str, Any]:
    """A new session, which plays as soon as there is room."""
    hub.check_ready()
    text = _checked(prompt, hub)
    unwanted = None if not negative else _checked(negative, hub)
    picture = await _picture(image, hub)
    return await hub.create(Beginning(text, await _packed(picture), seed, guidance, unwanted), picture)


@router.post("/sessions/open", status_code=201)
async def open_saved(
    hub: HubHere,
    id: Annotated[str, Form(max_length=64)],
    secret: Annotated[str, Form(max_length=1000)],
    save: Annotated[int | None, Form(ge=0, le=2**31)] = None,
) -> dict[str, Any]:
    """A session as it was saved, under its old name; one that plays makes way."""
    return await hub.open(id, secret, save)


@router.get("/sessions/{name}")
async def state(live: Session) -> dict[str, Any]:
    """Where a session stands."""
    return live.public()


@router.delete("/sessions/{name}", status_code=204)
async def delete(hub: HubHere, live: Session) -> None:
    """Ends a session and removes all that the server kept of it."""
    await hub.end(live, "deleted", forget=True)


@router.post("/sessions/{name}/prompt")
async def prompt(hub: HubHere, live: Session, body: PromptBody) -> dict[str, Any]:
    """Another prompt."""
    return await live.change("prompt", _checked(body.prompt, hub), None, body.drop)


@router.post("/sessions/{name}/image")
async def image(hub: HubHere, live: Session, image: Upload = None, drop: Drop = True) -> dict[str, Any]:
    """A cut to another picture, or to a scene of the prompt alone."""
    picture = await _picture(image, hub)
    return await live.change("image", picture, await _packed(picture), drop)


@router.post("/sessions/{name}/target")
async def target(hub: HubHere, live: Session, image: Upload = None, drop: Drop = True) -> dict[str, Any]:
    """A picture to move towards, or none any more."""
    picture = await _picture(image, hub)
    return await live.change("target", picture, await _packed(picture), drop)


@router.post("/sessions/{name}/pause")
async def pause(live: Session) -> dict[str, Any]:
    """No more blocks."""
    await live.hold(True)
    return live.public()


@router.post("/sessions/{name}/resume")
async def resume(live: Session) -> dict[str, Any]:
    """On it goes."""
    await live.hold(False)
    return live.public()


@router.post("/sessions/{name}/rewind")
async def rewind(live: Session, body: RewindBody) -> dict[str, Any]:
    """Takes back blocks."""
    return await live.rewind(body.blocks, body.to_frame)


@router.post("/sessions/{name}/fork", status_code=201)
async def fork(hub: HubHere, live: Session) -> dict[str, Any]:
    """A branch that goes on from here."""
    return await hub.fork(live)


@router.post("/sessions/{name}/save")
async def save(live: Session) -> dict[str, int]:
    """Writes the session down, for `open`."""
    return await live.save()


@router.get("/sessions/{name}/recording", response_class=StreamingResponse)
async def recording(live: Session) -> StreamingResponse:
    """All frames so far, an mp4."""
    await live.settled()
    chunks: AsyncIterator[bytes] = iterate_in_threadpool(live.recording.read())
    name = f'attachment; filename="longtake-{live.name}.mp4"'
    return StreamingResponse(chunks, media_type="video/mp4", headers={"content-disposition": name})


@router.get("/sessions/{name}/script", response_class=Response)
async def script(live: Session) -> Response:
    """What makes the same video again: story.yaml and its pictures, a zip."""
    await live.settled()
    if live.made == 0:
        raise ApiError(409, "conflict", "nothing has been made yet", "wait for the first block")
    data = await run_in_threadpool(live.timeline.script, live.made)
    name = f'attachment; filename="longtake-{live.name}.zip"'
    return Response(data, media_type="application/zip", headers={"content-disposition": name})


@router.get("/sessions/{name}/thumbnails/{frame}", response_class=Response)
async def one_thumbnail(live: Session, frame: int) -> Response:
    """A small picture of the block that begins at a frame."""
    if frame not in live.thumbnails:
        raise not_found()
    return Response(live.thumbnails[frame], media_type="image/jpeg")
