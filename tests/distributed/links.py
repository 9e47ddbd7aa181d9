"""Links of GPUs between CPUs: an environment variable has the ranks of a pool use them."""

from dataclasses import replace
from typing import Any
from unittest import mock

from expertlane.engine.comm.torch_transport import NcclLink, TorchTransport
from expertlane.engine.ops.backend import STAGED, Platform
from expertlane.engine.stage import worker

LINKS = "LINKS_OF_RANKS"  # `staged` or `native`


def use_links(kind: str) -> None:
    """Have ranks exchange rows as those on GPUs do, where what they send lies on the CPU."""
    if kind == "staged":
        choose = worker.choose_platform

        def staged(*arguments: Any, **others: Any) -> Platform:
            chosen = choose(*arguments, **others)
            return replace(chosen, transport=chosen.transport + STAGED)

        mock.patch.object(worker, "choose_platform", staged).start()
        return

    def link(self: TorchTransport, ranks: tuple[int, ...]) -> NcclLink:
        place = ranks.index(self._rank)
        common = self._backends[ranks], place, len(ranks), self._device, self._epoch
        return NcclLink(*common, spans_nodes=True)

    mock.patch.object(TorchTransport, "link", link).start()
