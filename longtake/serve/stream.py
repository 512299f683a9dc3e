"""The WebSocket: one viewer of one session."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from longtake.serve.errors import ApiError
from longtake.serve.hub import Hub
from longtake.serve.live import Live
from longtake.serve.security import Allowance, same
from longtake.serve.viewers import Viewer, init_message

router = APIRouter()

_REFUSED, _SLOW = 1008, 1013
_MOST_FRAME = 2**31


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hello(_Message):
    """The first message of a viewer."""

    token: str | None = Field(default=None, max_length=1000)
    secret: str = Field(max_length=1000)
    format: Literal["h264", "mp4", "png"] = "h264"
    from_frame: int | None = Field(default=None, ge=0, lt=_MOST_FRAME)


class Shown(_Message):
    """So many frames have been on the screen."""

    type: Literal["shown"]
    frame: int = Field(ge=0, lt=_MOST_FRAME)


class Ping(_Message):
    """Asks for an answer."""

    type: Literal["ping"]
    id: int = Field(default=0, ge=0, lt=_MOST_FRAME)


_SAID: TypeAdapter[Shown | Ping] = TypeAdapter(Annotated[Shown | Ping, Field(discriminator="type")])


@router.websocket("/api/sessions/{name}/stream")
async def stream(socket: WebSocket, name: str) -> None:
    """Sends a session to a viewer until either ends."""
    hub: Hub = socket.app.state.hub
    await socket.accept()
    try:
        async with asyncio.timeout(hub.settings.limits.hello_seconds):
            hello = Hello.model_validate_json(await _text(socket, hub))
        if hub.settings.token is not None and not same(hello.token, hub.settings.token):
            raise ApiError(401, "unauthorized", "the token is missing or wrong", "send it in the first message")
        live = hub.find(name, hello.secret)
        if len(live.viewers) >= hub.settings.limits.viewers:
            raise ApiError(429, "too_many", "the session has as many viewers as it may", "close another page")
    except (TimeoutError, ValidationError, ValueError):
        await _refuse(socket, ApiError(400, "bad_request", "the first message is wrong", "see docs/serving.md"))
    except ApiError as error:
        await _refuse(socket, error)
    except WebSocketDisconnect:
        pass
    else:
        await _serve(socket, hub, live, hello)


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):  # gone before it was told
        await socket.send_text(json.dumps({"type": "error", **error.body()}))
        await socket.close(_REFUSED, error.code)


async def _text(socket: WebSocket, hub: Hub) -> str:
    """A message. Raises: ValueError unless it is a short text."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code") or 1000)
    text = message.get("text")
    if text is None or len(text) > hub.settings.limits.message_bytes:
        raise ValueError("no short text")
    return text


async def _serve(socket: WebSocket, hub: Hub, live: Live, hello: Hello) -> None:
    assert hub.stage is not None
    viewer = Viewer(hello.format, live.shown, 2 * hub.settings.blocks_ahead + 4)
    viewer.tell({"type": "hello", **live.public(), "stream": hub.stage.public(hello.format)})
    live.join(viewer, hello.from_frame)
    listening = asyncio.create_task(_listen(socket, hub, live, viewer))
    sending = asyncio.create_task(_send(socket, hub, viewer))
    try:
        await asyncio.wait([listening, sending], return_when=asyncio.FIRST_COMPLETED)
    finally:
        live.leave(viewer)
        for task in (listening, sending):
            task.cancel()
        await asyncio.gather(listening, sending, return_exceptions=True)


async def _send(socket: WebSocket, hub: Hub, viewer: Viewer) -> None:
    """Sends what waits, one message at a time; a viewer that takes none of it for long is dropped."""
    assert hub.stage is not None
    head = init_message(hub.stage.head) if viewer.form == "mp4" else None
    try:
        while (item := await viewer.next()) is not None:
            async with asyncio.timeout(hub.settings.limits.slow_seconds):
                if isinstance(item, str):
                    await socket.send_text(item)
                else:
                    await socket.send_bytes(await asyncio.to_thread(item.message, viewer.form))
                if head is not None:  # behind `hello`, which says what it is for
                    await socket.send_bytes(head)
                    head = None
        code, reason = viewer.closed or (1000, "")
        await socket.close(code, reason)
    except TimeoutError:
        with suppress(TimeoutError):  # who takes nothing does not take this either
            async with asyncio.timeout(hub.settings.limits.slow_seconds):
                await socket.close(_SLOW, "slow")
    except (WebSocketDisconnect, RuntimeError):  # gone while something was sent
        pass


async def _listen(socket: WebSocket, hub: Hub, live: Live, viewer: Viewer) -> None:
    """Does what a viewer says; one that says too much or nothing that has a meaning is closed."""
    allowance = Allowance(hub.settings.limits.messages_per_second, 1)
    try:
        while True:
            said: Any = _SAID.validate_json(await _text(socket, hub))
            if not allowance.take():
                viewer.close(_REFUSED, "too_many")
                await asyncio.sleep(hub.settings.limits.slow_seconds)
                return
            if isinstance(said, Shown):
                live.saw(viewer, said.frame)
            else:
                viewer.tell({"type": "pong", "id": said.id})
    except WebSocketDisconnect:
        return
    except (ValidationError, ValueError):
        viewer.close(_REFUSED, "bad_request")
        await asyncio.sleep(hub.settings.limits.slow_seconds)
