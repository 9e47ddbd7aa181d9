"""The layout of a server, and changes of it while requests run."""

from functools import partial
from typing import Any

from fastapi import FastAPI, Response

from expertlane.engine.scaling import LayoutChange
from expertlane.errors import UserError
from expertlane.server.errors import ApiError, bad_field, json_response
from expertlane.server.fields import Strict
from expertlane.server.service import Service, ended
from expertlane.spec.layout import Layout

_MOST_CHANGES = 20  # that are told of
_RETRY_S = 1


class ScaleRequest(Strict):
    """The body of `/scale`."""

    layout: str


class _Changer:
    """Changes the layout of a service, one change at a time; of its event loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._to: Layout | None = None  # under way

    async def change(self, text: str) -> None:
        """Go on in another layout; returns when steps run again.

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
        recovery = service.model.engine.recovery
        if recovery is not None and recovery.shrunk_at is not None:
            raise ApiError(
                409, recovery.shares, param="layout", code="shrunk", retry_after_s=_RETRY_S
            )
        try:
            layout = self._to = Layout.parse(text)
            await service.engine.between_steps(partial(scaling.scale, layout))
        except UserError as error:
            raise bad_field("layout", f"layout: {error}") from None
        except Exception as error:
            raise ended(error) from None
        finally:
            self._to = None

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
            "state": None if recovery is None else recovery.state.value,
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
        "weight_bytes_kept": change.kept_bytes,
        "weight_bytes_read": change.read_bytes,
        "lost": record.causes,
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
