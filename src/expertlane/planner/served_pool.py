"""A pool of a plan, or a deployment of an experiment, as an engine serves it: with its limits."""

from dataclasses import KW_ONLY, dataclass, replace
from math import ceil

from expertlane.cost.memory import RANK_STEP_TOKENS
from expertlane.planner.candidates import Candidate, candidates_like
from expertlane.planner.engines import (
    EXPERTLANE,
    DeviceKind,
    RolePool,
    Row,
    ServingEngine,
    refusal,
)
from expertlane.spec.deployment import Deployment, Options
from expertlane.spec.model import ModelConfig
from expertlane.spec.workload import Load, Workload

LEAST_BUFFER = 128  # tokens of a rank in DeepEP's low-latency buffers
_HEADROOM = 1.5  # longest request that is accepted, over the mean length
_BLOCK = 256  # the longest request is rounded up to a multiple of these tokens


@dataclass(frozen=True)
class ServedPool(RolePool):
    """A pool of a plan, or a deployment of an experiment, with limits for its servers.

    Attributes:
        rank_seqs: most running sequences of a data-parallel rank.
        step_tokens: most tokens in a step of a data-parallel rank.
        devices_per_host: devices of a machine.
        rank_kv_tokens: tokens that a data-parallel rank's KV cache holds; None for the engine's own
            choice.
    """

    _: KW_ONLY
    rank_seqs: int
    step_tokens: int
    devices_per_host: int
    rank_kv_tokens: int | None = None

    @property
    def options(self) -> Options:
        """Options of the candidate."""
        return self.candidate.options

    @property
    def rank_tokens(self) -> int:
        """Most tokens in a step of a data-parallel rank; in a decode pool those of its decodes."""
        decodes = self.rank_seqs * (1 + self.candidate.num_drafts)
        return max(decodes, LEAST_BUFFER if self.role == "decode" else self.step_tokens)

    @property
    def num_hosts(self) -> int:
        """Number of machines that it needs."""
        return ceil(self.layout.world_size / self.devices_per_host)

    @property
    def per_host(self) -> int:
        """Number of such pools that fit on a machine."""
        return max(1, self.devices_per_host // self.layout.world_size)

    def servers(self, engine: ServingEngine) -> tuple["ServedPool", int]:
        """One server of the pool, and the number of servers: replicas may need one each."""
        if engine.has_replicas:
            return self, 1
        alone = replace(self.layout, replicas=1)
        return replace(self, candidate=self.candidate._replace(layout=alone)), self.layout.replicas


def deployed_pool(
    engine: ServingEngine,
    deployment: Deployment,
    model: ModelConfig,
    workload: Workload,
    devices_per_host: int,
    device: DeviceKind = "cuda",
    step_tokens: int = RANK_STEP_TOKENS,
    kv_tokens: int | None = None,
) -> ServedPool | Row:
    """An experiment's deployment as an engine serves it, with limits as in a plan.

    For other engines than expertlane, an option that is `auto` becomes the first choice that the
    engine has.

    Args:
        step_tokens: most tokens in a step of a data-parallel rank.
        kv_tokens: tokens that the KV caches of all data-parallel ranks hold together.

    Returns:
        The pool; or the row of the engine's limitations that rules the deployment out.
    """
    layout, num_seqs = deployment.layout, workload.num_sequences
    candidates = [Candidate(layout, deployment.options)]
    if engine is not EXPERTLANE:  # which chooses by itself
        candidates = candidates_like(layout, deployment.options, devices_per_host)
    found: Row | None = None
    for candidate in candidates:
        broken = refusal(engine, candidate, model, device)
        if broken is None:
            return ServedPool(
                candidate,
                model,
                rank_seqs=layout.places_of_rank(num_seqs, num_seqs),
                step_tokens=step_tokens,
                devices_per_host=devices_per_host,
                rank_kv_tokens=kv_tokens and ceil(kv_tokens / (layout.replicas * layout.dp)),
            )
        found = found or broken
    assert found is not None, "there is a candidate at least"
    return found


def longest_request(load: Load, model: ModelConfig) -> int:
    """Longest request, in tokens, that a server must accept.

    At least 1.5 times the mean, since a load that names one length may have longer requests.
    """
    mean = ceil(sum(load.mean_lens))
    longest = load.max_len + 1
    wanted = ceil(max(_HEADROOM * mean, longest) / _BLOCK) * _BLOCK
    return max(mean, min(wanted, model.max_position_embeddings))
