"""A whole plan: search, explain, and put it into results."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from expertlane.plan.assumptions import plan_assumptions
from expertlane.plan.candidates import Candidate
from expertlane.plan.commands import ServeTarget, experiment_text, serve_commands
from expertlane.plan.explanation import best_of_families
from expertlane.plan.outcome import best_deployments, families, papers, pareto_front, pools
from expertlane.plan.request import PlanRequest
from expertlane.plan.screen import Screened
from expertlane.plan.search import OnePool, Search
from expertlane.plan.two_pools import TwoPools, TwoPoolSearch
from expertlane.results.plan import NoPools, PlanResults, ServeCommandResult
from expertlane.spec.files import strict_json


class Plan:
    """The request, and what is found of it step by step.

    Args:
        routing: which experts tokens choose, in words.
        cautions: what a reader must know of the numbers, in sentences.
    """

    def __init__(
        self,
        request: PlanRequest,
        routing: str,
        cautions: tuple[str, ...] = (),
    ) -> None:
        self._cautions = cautions
        self._request = request
        self._routing = routing
        self._search = Search(request)
        self._pool_search = TwoPoolSearch(request)
        self._screened: list[Screened] = []
        self._found: OnePool | None = None
        self._pools: TwoPools | NoPools = "over limits"

    @property
    def num_candidates(self) -> int:
        """Deployments of one pool."""
        return len(self._search.candidates)

    @property
    def num_pool_candidates(self) -> int:
        """Deployments tried for two pools."""
        return self._pool_search.num_candidates

    def screen(self, advance: Callable[[int], None]) -> None:
        """First, one pool of all devices.

        Args:
            advance: called with a number of candidates that are done.

        Raises:
            UserError: no layout is valid.
        """
        self._screened = self._search.screen(advance)

    def search(self, advance: Callable[[int], None]) -> None:
        """Then, the best of them in full.

        Args:
            advance: called with 1 for each of at most `NUM_FINALISTS`.

        Raises:
            UserError: nothing fits, or nothing keeps the limits.
        """
        self._found = self._search.in_full(self._screened, advance)

    def search_pools(self, advance: Callable[[int], None]) -> None:
        """Last, two pools.

        Args:
            advance: called with a number of candidates that are done.
        """
        self._pools = self._pool_search.run(advance)

    @property
    def found(self) -> OnePool:
        """Of one pool; after `search`."""
        assert self._found is not None, "searched before"
        return self._found

    def results(
        self, *, command: str, version: str, served: ServeTarget, experiment: str | None
    ) -> PlanResults:
        """All that is shown.

        Args:
            version: of expertlane.
            served: what other systems are to load.
            experiment: the path of the file with `experiment`.
        """
        found, traffic, goals, setting = (
            self.found,
            self._request.traffic,
            self._request.goals,
            self._request.setting,
        )
        two = self._pools
        winner = found.finalists[0].option.candidate
        return PlanResults(
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=version,
            model=json.loads(
                strict_json(asdict(self._request.model))
            ),  # lists, as they are read back
            cluster=str(self._request.cluster),
            device=self._request.cluster.profile.device.name,
            num_sequences=traffic.num_sequences,
            prompt_len=traffic.prompt_len,
            output_len=traffic.output_len,
            max_tpot_s=goals.max_tpot_s,
            max_ttft_s=goals.max_ttft_s,
            best=best_deployments(found, traffic, self._search),
            families=families(found, traffic),
            pareto=pareto_front(found),
            papers=papers(found, traffic, self._search, self._request.model),
            two_pools=pools(two) if isinstance(two, TwoPools) else None,
            no_two_pools=None if isinstance(two, TwoPools) else two,
            num_candidates=found.num_candidates,
            num_too_large=found.num_too_large,
            num_over_limits=sum(option.place is None for option in found.options),
            num_pool_candidates=self.num_pool_candidates,
            commands=self._commands(winner, served),
            experiment=experiment,
            assumptions=plan_assumptions(self._request.cluster, traffic, setting, self._routing),
            cautions=self._cautions,
        )

    def _commands(self, winner: Candidate, served: ServeTarget) -> tuple[ServeCommandResult, ...]:
        per_node = self._request.cluster.profile.ranks_per_node
        nodes = -(-winner.layout.replica_size // per_node)
        commands = serve_commands(
            winner, served, self._request.setting.types, self._request.traffic.full_len + 1, nodes
        )
        return tuple(ServeCommandResult(**asdict(each)) for each in commands)

    def experiment(self, name: str, checkpoint: str | None, comment: str) -> str:
        """The winner and what it is to be held against, as TOML.

        Args:
            checkpoint: the model's folder, if it has one.
        """
        return experiment_text(
            name,
            self._request.model,
            checkpoint,
            self._request.traffic,
            self._request.cluster.profile.ranks_per_node,
            self._compared(),
            comment,
        )

    def _compared(self) -> Sequence[tuple[str, Candidate]]:
        """The best without expert parallelism as the baseline, then the winner."""
        winner = self.found.finalists[0].option.candidate
        kinds = best_of_families(self.found.options).values()
        plain = [option.candidate for option in kinds if option.candidate.layout.ep == 1]
        others = [each for each in plain if each != winner]
        baseline = [("best without EP", others[0])] if others else []
        return [*baseline, ("planned", winner)]
