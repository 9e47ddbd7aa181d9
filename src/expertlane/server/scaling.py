"""The layout of a server, and changes of it while requests run."""

import asyncio
from functools import partial
from typing import Any

from fastapi import FastAPI, Response

from expertlane.engine.scaling import LayoutChange, Scaling
from expertlane.errors import CapacityError, UserError
from expertlane.server.errors import ApiError, bad_field, json_response
from expertlane.server.fields import Strict
from expertlane.server.service import Service, ended
from expertlane.spec.layout import Layout
from expertlane.spec.names import Origin

_MOST_CHANGES = 20  # that are told of
_RETRY_S = 1
_LOOK_S = 0.02  # between checks of the progress of preparing
PREPARING = "preparing"  # the state before those of `engine.recovery`


class ScaleRequest(Strict):
    """The body of `/scale`."""

    layout: str


class _Changer:
    """Changes the layout of a service, one change at a time; of its event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._to: Layout | None = None  # under way

    async def change(self, text: str) -> None:
        """Prepare another layout and switch to it; returns when steps run again.

        Raises:
            ApiError: with 400, 409, 500 or 503.
        """
        service = self._service
        service.check_running()
        scaling = service.model.scaling
        if scaling is None:
            raise bad_field("layout", "the layout of this server cannot change", "not_scalable")
        if self._to is not None:
            raise ApiError(
                409,
                f"the layout is being changed to {self._to}; try again later",
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
        try:
            self._to = Layout.parse(text)
            await self._change(scaling, self._to)
        except ApiError:
            raise
        except UserError as error:
            raise bad_field("layout", f"layout: {error}") from None
        except Exception as error:
            raise ended(error) from None
        finally:
            self._to = None

    async def _change(self, scaling: Scaling, layout: Layout) -> None:
        between_steps = self._service.engine.between_steps
        is_ready = False

        def advance() -> None:
            nonlocal is_ready
            is_ready = scaling.advance()

        await between_steps(partial(scaling.prepare, layout))
        try:
            await between_steps(advance)
            while not is_ready:
                await asyncio.sleep(_LOOK_S)
                self._service.check_running()
                await between_steps(advance)
        except CapacityError as error:
            raise ApiError(503, str(error), param="layout", code="not_prepared") from None
        except (ApiError, asyncio.CancelledError):
            await between_steps(scaling.give_up)
            raise
        try:
            await between_steps(partial(scaling.scale, layout))
        except UserError as error:  # such as ranks that were lost meanwhile
            await between_steps(scaling.give_up)
            raise ApiError(503, str(error), param="layout", code="not_prepared") from None

    def facts(self) -> dict[str, Any]:
        """What `GET /scale` says."""
        service, scaling = self._service, self._service.model.scaling
        recovery = service.model.engine.recovery
        if scaling is None:
            return {"can_scale": False, "layout": None, "changes": []}
        layout = scaling.deployment.layout
        return {
            "can_scale": recovery is not None,
            "layout": str(layout),
            "num_ranks": layout.world_size,
            "under_way": None if self._to is None else str(self._to),
            "state": PREPARING if scaling.ahead else recovery and recovery.state.value,
            "preparing": preparing(scaling),
            "num_generation_tokens": service.metrics.num_generation_tokens,
            "changes": [_facts(each) for each in scaling.changes[-_MOST_CHANGES:]],
        }


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
    """A change whose ranks make their weights; None where there is none."""
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


def add_scaling(app: FastAPI, service: Service) -> None:
    """Add the two routes."""
    changer = _Changer(service)

    @app.post("/scale")
    async def scale(request: ScaleRequest) -> Response:
        """Change the layout; responds when steps run again."""
        await changer.change(request.layout)
        return json_response(changer.facts())

    @app.get("/scale")
    async def scaling() -> Response:
        """The layout, a change in progress, and the last changes."""
        return json_response(changer.facts())
