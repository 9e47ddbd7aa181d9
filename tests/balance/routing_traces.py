"""Made-up routing traces: a power law of expert popularity, with or without topics."""

import numpy as np
import numpy.typing as npt

from expertlane.balance.trace import RoutingTrace


def routing_trace(
    *,
    num_layers: int,
    num_experts: int,
    num_experts_per_tok: int,
    num_tokens: int,
    skew: float,
    seed: int,
    num_topics: int = 1,
    affinity: float = 30.0,
    num_tokens_per_step: int = 256,
) -> RoutingTrace:
    """Tokens that draw their experts without replacement, the expert of rank r ∝ r^-skew.

    With topics, each token has one, and an expert of the token's own topic is likelier by the
    factor `affinity`; topics are equally frequent and share out the experts at random in equal
    parts, so that an expert's total popularity keeps its skew.
    """
    rng = np.random.default_rng(seed)
    layers = []
    topic = rng.integers(num_topics, size=num_tokens)
    for _ in range(num_layers):
        popularity = rng.permutation(np.arange(1, num_experts + 1) ** -skew)
        weights = np.ones((num_topics, num_experts))
        if num_topics > 1:
            topic_of_expert = rng.permutation(np.arange(num_experts) % num_topics)
            own = topic_of_expert[None] == np.arange(num_topics)[:, None]
            weights[own] = affinity
        logits = np.log(popularity * weights)
        layers.append(_draw(logits, topic, num_experts_per_tok, rng))
    return RoutingTrace(
        model="made-up",
        num_experts=num_experts,
        layers=tuple(range(num_layers)),
        topk_ids=np.stack(layers),
        step=np.arange(num_tokens, dtype=np.int64) // num_tokens_per_step,
    )


def drifting_trace(
    num_parts: int, share: float, num_tokens: int, **others: int | float
) -> RoutingTrace:
    """Traces of one popularity after the other, each with other hot experts.

    From part to part a share of the experts, the same of each popularity, exchange their ids: so
    what is asked for drifts away from what it was at first.

    Args:
        num_tokens: of all parts.
        others: as `routing_trace` takes them.
    """
    num_experts, seed = int(others["num_experts"]), int(others["seed"])
    rng = np.random.default_rng((seed, 1))
    whole = routing_trace(num_tokens=num_tokens, **others)  # type: ignore[arg-type]
    ids = whole.topk_ids.copy()
    part_of = np.arange(num_tokens) * num_parts // num_tokens
    for layer in range(len(ids)):
        renamed = np.arange(num_experts)
        for part in range(1, num_parts):
            moved = rng.permutation(num_experts)[: round(share * num_experts)]
            renamed[moved] = renamed[rng.permutation(moved)]
            ids[layer, part_of == part] = renamed[ids[layer, part_of == part]]
    return RoutingTrace(whole.model, num_experts, whole.layers, ids, whole.step)


def _draw(
    logits: npt.NDArray[np.float64],
    topic: npt.NDArray[np.int64],
    top_k: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int16]:
    """[num_tokens, top_k]; the largest of logits plus Gumbel noise draws without replacement."""
    ids = np.empty((len(topic), top_k), dtype=np.int16)
    for start in range(0, len(topic), 4096):  # bounds the noise's memory
        part = slice(start, start + 4096)
        noisy = logits[topic[part]] + rng.gumbel(size=(len(topic[part]), logits.shape[1]))
        ids[part] = np.argpartition(-noisy, top_k - 1, axis=1)[:, :top_k]
    return ids


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """The first and the second half of the tokens."""
    middle = trace.num_tokens // 2
    one, other = (
        RoutingTrace(
            trace.model,
            trace.num_experts,
            trace.layers,
            trace.topk_ids[:, part],
            trace.step[part],
        )
        for part in (slice(middle), slice(middle, None))
    )
    return one, other
