"""A request that goes on with what an earlier process computed, as a preempted one does."""

from expertlane.errors import UserError
from expertlane.schedule.request import Request, RequestOutput
from expertlane.text.grammars import Constraint


def resume(request: Request, earlier: RequestOutput, constraint: Constraint | None) -> None:
    """Give a request its earlier output before it is queued; both hold one list.

    Args:
        constraint: that has taken this output in.

    Raises:
        UserError: the constraint does not allow that output.
    """
    request.output_token_ids = earlier.token_ids
    request.num_cached_tokens = earlier.num_cached_tokens
    if constraint is not None:
        if constraint.error is not None:
            raise UserError(f"{request.name}: {constraint.error}")
        request.mask = None if constraint.is_ended else constraint.mask
