"""Documentation of the board's routes."""

from __future__ import annotations

from imagegen.errors import InvalidRequest, QueueUnavailable
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi.document import Operation, Parameter, ResponseDoc, Route
from imagegen.web.ops import board, board_samples
from imagegen.web.ops.board_views import BoardView, HistoryView, PauseView

BOARD = "Board"

_SINCE = Parameter(
    "since",
    "query",
    "Unix time in seconds: minutes from then on; all 24 hours if absent.",
    {"type": "integer", "minimum": 0, "maximum": board.MAX_SINCE_S},
    example=0,
)

STATE = Operation(
    "get",
    "/api/admin/board",
    "getBoard",
    BOARD,
    "Read the state of the service at this moment",
    "Cheap enough to be called each second: it is from the memory of the responding instance. Only with several "
    "instances Redis is read too: the unfinished tasks at most every 5 s, the depth every 10 s, while tasks wait. "
    "Tasks are at most 200 unfinished ones and the last 100 that ended here; `GET /api/images` lists all.",
    (ResponseDoc(200, "The state.", BoardView, {"busy": board_samples.BOARD}),),
    (named.LANGUAGE,),
    needs="admin",
)

HISTORY = Operation(
    "get",
    "/api/admin/board/history",
    "getHistory",
    BOARD,
    "Read the last 24 hours at steps of one minute",
    "All instances add up. Each writes a minute in which it had tasks soon after its end; the present minute is that "
    "of the responding instance alone.",
    (ResponseDoc(200, "The minutes.", HistoryView, {"one": board_samples.HISTORY}),),
    (_SINCE, named.LANGUAGE),
    errors=(InvalidRequest, QueueUnavailable),
    needs="admin",
)

PAUSE = Operation(
    "post",
    "/api/admin/pause",
    "pauseClaiming",
    BOARD,
    "Pause claiming on all instances",
    "No task starts any more, within about a second; running ones finish, submits are accepted and wait. It lasts over "
    "restarts, until `POST /api/admin/resume`. The deadline of a task that waits goes on.",
    (
        ResponseDoc(
            200,
            "It is paused.",
            PauseView,
            {"paused": {"success": True, "paused": True, "since": "2026-01-01T00:00:00.000Z"}},
        ),
    ),
    (named.LANGUAGE,),
    errors=(QueueUnavailable,),
    needs="admin",
)

RESUME = Operation(
    "post",
    "/api/admin/resume",
    "resumeClaiming",
    BOARD,
    "Let claiming go on, on all instances",
    "",
    (ResponseDoc(200, "It goes on.", PauseView, {"resumed": {"success": True, "paused": False, "since": None}}),),
    (named.LANGUAGE,),
    errors=(QueueUnavailable,),
    needs="admin",
)

ROUTES: tuple[Route, ...] = (
    (STATE, board.get_board),
    (HISTORY, board.get_history),
    (PAUSE, board.pause),
    (RESUME, board.resume),
)
