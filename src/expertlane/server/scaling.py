"""The layout of a server, and changes of it while requests run."""

import asyncio
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Response

from expertlane.engine.elastic.scaling import PREPARING, LayoutChange, Scaling
from expertlane.errors import CapacityError, UserError
from expertlane.server.errors import ApiError, bad_field, json_response
from expertlane.server.fields import Name, Strict
from expertlane.server.live_state import LiveState
from expertlane.server.service import Service, ended
from expertlane.spec.layout import Layout
from expertlane.spec.names import Origin

_MOST_CHANGES = 20  # changes reported, the latest ones
_RETRY_S = 1
_LOOK_S = 0.02  # between checks of the progress of preparing


class ScaleRequest(Strict):
    """The body of `/scale`: the layout to change to.

    Attributes:
        dry_run: only check the layout.
    """

    layout: Name
    dry_run: bool = False


@dataclass(eq=False)
class _UnderWay:
    """A change of the layout under way.

    Attributes:
        is_cancelled: whether it is to be given up.
        is_switching: whether ranks have begun to switch, so that it is too late to cancel.
        over: set once it is made or given up.
    """

    to: Layout
    is_cancelled: bool = False
    is_switching: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class _Changer:
    """Layout changes of a service, one at a time; used in its event loop."""

    def __init__(self, service: Service, live: LiveState) -> None:
        self._service, self._live = service, live
        self._under_way: _UnderWay | None = None

    async def change(self, text: str, *, dry_run: bool) -> None:
        """Prepare another layout and switch to it; returns when steps run again.

        Args:
            dry_run: only check the layout.

        Raises:
            ApiError: with 400, 409, 500 or 503.
        """
        scaling = self._check_can_change()
        try:
            layout = Layout.parse(text)
            if dry_run:
                await self._service.engine.between_steps(partial(_check, scaling, layout))
                return
            under_way = self._under_way = _UnderWay(layout)
            try:
                await self._change(scaling, under_way)
            finally:
                self._under_way = None
                under_way.over.set()
        except ApiError:
            raise
        except UserError as error:
            raise bad_field("layout", f"layout: {error}") from None
        except Exception as error:
            raise ended(error) from None

    def _check_can_change(self) -> Scaling:
        """The model's `Scaling`, if a change of the layout can begin now.

        Raises:
            ApiError: with 400, 409, 500 or 503.
        """
        service = self._service
        service.check_running()
        scaling = service.model.scaling
        if scaling is None:
            raise bad_field("layout", "the layout of this server cannot change", "not_scalable")
        if self._under_way is not None:
            raise ApiError(
                409,
                f"the layout is being changed to {self._under_way.to}; try again later",
                param="layout",
                code="scaling",
                retry_after_s=_RETRY_S,
            )
        if (recovery := service.model.engine.recovery) is not None:
            try:
                recovery.check_whole()
            except UserError as error:
                raise ApiError(
                    409, str(error), param="layout", code="shrunk", retry_after_s=_RETRY_S
                ) from None
        return scaling

    async def cancel(self) -> None:
        """Give up the change under way; returns once the weights prepared for it are freed.

        Raises:
            ApiError: with 409: there is none, or it is too late.
        """
        under_way = self._under_way
        if under_way is None:
            raise ApiError(409, "no change of the layout is under way", code="not_scaling")
        if under_way.is_switching:
            raise ApiError(
                409,
                f"too late: ranks are switching to {under_way.to}; a change back takes another "
                "POST /scale",
                code="too_late",
            )
        under_way.is_cancelled = True
        await under_way.over.wait()

    async def _change(self, scaling: Scaling, under_way: _UnderWay) -> None:
        between_steps, layout = self._service.engine.between_steps, under_way.to
        is_ready, began_s = False, time.monotonic()

        def advance() -> None:
            nonlocal is_ready
            is_ready = scaling.advance()

        await between_steps(partial(scaling.prepare, layout))
        try:
            await between_steps(advance)
            while not (is_ready or under_way.is_cancelled):
                await asyncio.sleep(_LOOK_S)
                self._service.check_running()
                await between_steps(advance)
            if under_way.is_cancelled:
                raise ApiError(
                    409, f"the change to {layout} was cancelled", param="layout", code="cancelled"
                )
        except CapacityError as error:
            self._note_end(layout, began_s, "given up", f": {error}")
            raise ApiError(503, str(error), param="layout", code="not_prepared") from None
        except (ApiError, asyncio.CancelledError):
            await between_steps(scaling.give_up)
            self._note_end(layout, began_s, "cancelled" if under_way.is_cancelled else "given up")
            raise
        under_way.is_switching = True
        try:
            await between_steps(partial(scaling.scale, layout))
        except UserError as error:  # such as ranks that were lost meanwhile
            await between_steps(scaling.give_up)
            self._note_end(layout, began_s, "given up", f": {error}")
            raise ApiError(503, str(error), param="layout", code="not_prepared") from None

    def _note_end(self, layout: Layout, began_s: float, how: str, why: str = "") -> None:
        """Log a change that was not made; the engine logs those that were."""
        took_s = time.monotonic() - began_s
        text = f"layout change to {layout} {how} after {took_s:.1f} s{why}"
        self._live.add("scaling", text)

    def facts(self) -> dict[str, Any]:
        """The body of `GET /scale`: the layout, a change under way, and the last changes."""
        service, scaling = self._service, self._service.model.scaling
        recovery = service.model.engine.recovery
        if scaling is None:
            return {"can_scale": False, "layout": None, "changes": []}
        layout = scaling.deployment.layout
        return {
            "can_scale": recovery is not None,
            "layout": str(layout),
            "num_ranks": layout.world_size,
            "under_way": None if self._under_way is None else str(self._under_way.to),
            "state": PREPARING if scaling.ahead else recovery and recovery.state.value,
            "preparing": preparing(scaling),
            "num_generation_tokens": service.metrics.num_generation_tokens,
            "changes": [_facts(each) for each in scaling.changes[-_MOST_CHANGES:]],
        }


def _check(scaling: Scaling, layout: Layout) -> None:
    scaling.check(layout)


def _facts(change: LayoutChange) -> dict[str, Any]:
    record = change.record
    return {
        "at": record.at,
        "from": str(change.before),
        "to": str(change.after),
        "is_over": record.is_over,
        "seconds": round(record.total_s, 4),
        "seconds_by_state": {
            state.value: round(each, 4) for state, each in record.seconds().items()
        },
        "num_requests_computed_again": record.num_requests,
        "seconds_ahead": round(change.ahead_s, 4),
        "weight_bytes_from": {origin.value: change.bytes_from(origin) for origin in Origin},
        "ranks": [
            {
                "weight_bytes_from": each.bytes_from,
                "seconds_from": {k: round(v, 4) for k, v in each.seconds_from.items()},
                "kv_bytes": each.kv_bytes,
            }
            for each in change.held
        ],
        "lost": record.causes,
    }


def preparing(scaling: Scaling | None) -> dict[str, Any] | None:
    """The change for which ranks prepare weights, and its progress; None where there is none."""
    ahead = None if scaling is None else scaling.ahead
    if ahead is None:
        return None
    return {
        "layout": str(ahead.layout),
        "share": round(ahead.share, 4),
        "weight_bytes": ahead.num_bytes,
        "ranks": {
            rank: {"share": round(each.share, 4), "weight_bytes": each.num_bytes}
            for rank, each in sorted(ahead.prepared.items())
        },
    }


def add_scaling(app: FastAPI, service: Service, live: LiveState) -> None:
    """Add the routes of `/scale`; changes that are given up are events of `live`."""
    changer = _Changer(service, live)

    @app.post("/scale")
    async def scale(request: ScaleRequest) -> Response:
        """Change the layout; responds when steps run again."""
        await changer.change(request.layout, dry_run=request.dry_run)
        return json_response(changer.facts())

    @app.delete("/scale")
    async def cancel_scaling() -> Response:
        """Give up a change that is being prepared; responds when nothing is left of it."""
        await changer.cancel()
        return json_response(changer.facts())

    @app.get("/scale")
    async def scaling() -> Response:
        """The layout, a change in progress, and the last changes."""
        return json_response(changer.facts())
