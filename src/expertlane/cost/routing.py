"""Routing sources: experts drawn by popularity, taken from a trace, or those of a recorded step.

Routing that is drawn or from a trace has earlier tokens too: experts are placed by their load,
and judged by later tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property
from math import ceil, comb
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from expertlane.balance.holding import Placements, placements_of
from expertlane.balance.placement import Placement
from expertlane.balance.planner import plan_placement
from expertlane.balance.trace import RoutingTrace, read_trace
from expertlane.cost.step.operation import Floats, Ints
from expertlane.errors import SpecError, UserError
from expertlane.spec.deployment import Options
from expertlane.spec.layout import Layout
from expertlane.spec.model import ModelConfig, Routing
from expertlane.spec.ranges import DRIFT, LIKENESS, SKEW_BOUNDS, take_option
from expertlane.spec.tensors import num_active_params

NUM_SAMPLED_LAYERS = 2  # of a power law, where a load is served step by step; layers take turns
_DRAWN_TOGETHER = 1024  # tokens
_MOST_DRAWN = 16_384  # tokens of a layer before they come again
# The most drawn tokens per step, so that steps differ, and per prompt.
_TOKENS_OF_STEP, _TOKENS_OF_PROMPT = _MOST_DRAWN // 2, 512
NUM_EARLIER = 4096  # tokens of a layer that experts are placed by, where they are drawn
_EVEN_ENOUGH = 1.15  # fullest rank over the mean of earlier tokens; later ones are less even


class RoutingSource(Protocol):
    """Says which experts the tokens of a step choose.

    Attributes:
        likeness: how similarly tokens of one prompt choose (`PowerLawRouting`); 0 where tokens are
            independent or recorded.
    """

    likeness: float

    def sample_of(self, layer: int) -> Hashable:
        """A hashable key; layers with the same key give all tokens the same choices."""
        ...

    def topk_ids(
        self, layer: int, first: int, before: Ints, owned: Ints, num_new: Ints | None = None
    ) -> Ints:
        """The choices of a part of a micro-batch in one layer.

        Args:
            first: tokens computed before this step, from which a source with an order goes on.
            before: [R]; tokens that each rank of the stage had in this step before this part.
            owned: [R]; those it has in this part.
            num_new: [S]; the same tokens by sequence, in order; None: each of its own sequence.

        Returns:
            [owned.sum(), K] int64; logical experts, rank after rank.
        """
        ...


class LoadedRouting(RoutingSource, ABC):
    """A source of which earlier tokens are known: experts can be placed by their load.

    Each placement is made once, for all that ask: a screen, a projection in full, a simulation.
    """

    likeness: float = 0.0

    def __init__(self) -> None:
        self._loads: dict[Hashable, Ints] = {}  # by sample
        self._placed: dict[Hashable, Placement] = {}

    @abstractmethod
    def earlier_load(self, layer: int) -> Ints:
        """[num_experts]; how many earlier tokens chose each. None of them is in `topk_ids`."""

    def placements(
        self, layers: Sequence[int], layout: Layout, num_redundant: int, ranks_per_node: int
    ) -> list[Placement]:
        """[num_layers]; those by the load of earlier tokens; one for layers of one sample.

        Args:
            ranks_per_node: consecutive ranks of the layout that share a node.

        Raises:
            SpecError: there are more copies than a rank without an expert twice can hold.
        """
        ep, per_node = layout.ep, _full_nodes(layout, ranks_per_node)
        samples = {self.sample_of(layer): layer for layer in layers}
        how = ep, per_node, num_redundant
        missing = [sample for sample in samples if (sample, *how) not in self._placed]
        for sample in missing:
            if sample not in self._loads:
                self._loads[sample] = self.earlier_load(samples[sample])
        if missing:
            load = np.stack([self._loads[sample] for sample in missing])
            made = plan_placement(load, ep, per_node, num_redundant, even=_EVEN_ENOUGH)
            for sample, placement in zip(missing, made, strict=True):
                self._placed[sample, *how] = placement
        return [self._placed[self.sample_of(layer), *how] for layer in layers]


@cache
def _full_nodes(layout: Layout, ranks_per_node: int) -> int:
    """Ranks of an `ep` group per node, or `ep` where node borders make no difference.

    That is where groups lie on nodes unevenly, so that no placement suits all, or where each rank
    is on a node of its own.
    """
    try:
        per_node = layout.ep_ranks_per_node(ranks_per_node)
    except SpecError:
        return layout.ep
    return per_node if per_node > 1 else layout.ep


def placed(
    model: ModelConfig,
    layout: Layout,
    options: Options,
    traffic: LoadedRouting,
    ranks_per_node: int,
) -> Placements:
    """[num_hidden_layers], as `placements_of`, and by load where the options say so.

    Experts that move while requests run are by load too: moving them takes no time here.

    Raises:
        UserError: as `placements_of`.
    """
    if not options.is_by_load:
        return placements_of(model, layout, options)
    layers = model.moe_layers
    made = traffic.placements(layers, layout, options.num_redundant_experts, ranks_per_node)
    of_layer = dict(zip(layers, made, strict=True))
    return tuple(map(of_layer.get, range(model.num_hidden_layers)))


@dataclass(eq=False, repr=False)
class PowerLawRouting(LoadedRouting):
    """Experts of unequal popularity, drawn without replacement.

    Popularity drifts: experts are placed by tokens of an earlier, different popularity.

    The expert at place i of an order drawn for each layer has a weight of (1 + i)^-alpha, as the
    router of seeded weights with a skew has it; K experts are drawn by weights, none twice. Where a
    router is limited to groups, a token's draws of all experts choose its groups first, then the K
    inside them. Tokens are drawn once and taken in turn.

    Tokens of one prompt choose similar experts. Each token has an exponential arrival time for each
    expert, over its weight, and chooses those that come first. An exponential E over a factor S
    that a prompt's tokens share, to the power of r, is an exponential too, where S is positive
    stable of index r (P. Hougaard, "A class of multivariate failure time distributions",
    Biometrika 73, 1986). So every token chooses by the common popularity, exactly, whatever r is;
    but given their prompt, tokens draw by weights (1 + i)^(-alpha / r) S, and the largest of S fall
    with their rank to the power of -1 / r: a random order of the prompt's own. One token of each
    sequence, as decode steps have it, is thus as if all were independent.

    Args:
        alpha: 0 for uniform.
        num_sampled_layers: layers take turns with so many samples.
        groups: groups of the router; none by default.
        bounds: low and high `alpha` where it is assumed, not asked for.
        drift: standard deviation of log popularity since earlier tokens, over `alpha`.
        num_zero: experts beyond `num_experts` that compute nothing, as popular as the others; -1
            stands for each in `topk_ids`.
        likeness: 1 - r, Kendall's rank correlation of the arrival times of two tokens of a prompt;
            0 for independent tokens, below 1.
    """

    num_experts: int
    top_k: int
    alpha: float = 0.0
    seed: int = 0
    num_sampled_layers: int = 4
    groups: Routing = field(default_factory=Routing)
    bounds: tuple[float, float] | None = None
    drift: float = DRIFT
    likeness: float = 0.0
    num_zero: int = 0
    _drawn: dict[tuple[int, int], Ints] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        alpha: float,
        seed: int = 0,
        num_sampled_layers: int = 4,
        bounds: tuple[float, float] | None = None,
        likeness: float = 0.0,
    ) -> "PowerLawRouting":
        """The routing of a model's experts."""
        sizes = model.num_experts, model.num_experts_per_tok
        groups = model.routing
        return cls(
            *(*sizes, alpha, seed, num_sampled_layers, groups, bounds),
            likeness=likeness,
            num_zero=model.num_zero_experts,
        )

    def redrawn(self, times: int) -> "list[PowerLawRouting]":
        """Other draws of the same routing."""
        return [replace(self, seed=self.seed + 1 + each) for each in range(times)]

    @cached_property
    def extremes(self) -> "tuple[PowerLawRouting, PowerLawRouting] | None":
        """The routing at the lowest and highest exponent; None where the exponent was asked for."""
        if self.bounds is None:
            return None
        low, high = (replace(self, alpha=each, bounds=None) for each in self.bounds)
        return low, high

    def sample_of(self, layer: int) -> int:
        """The sample that a layer uses; layers take turns."""
        return layer % self.num_sampled_layers

    def topk_ids(
        self, layer: int, first: int, before: Ints, owned: Ints, num_new: Ints | None = None
    ) -> Ints:
        """The choices of tokens drawn once, taken in turn; ranks' tokens follow each other."""
        sample, first = self.sample_of(layer), first + int(before.sum())
        if not self.likeness or num_new is None or not (is_long := num_new > 1).any():
            return self._alone(sample, first, int(owned.sum()))
        if is_long.all():
            return self._of_prompts(sample, first, num_new)
        topk_ids = np.empty((num_new.sum(), self.top_k), dtype=np.int64)
        of_prompts = is_long.repeat(num_new)
        topk_ids[of_prompts] = self._of_prompts(sample, first, num_new[is_long])
        topk_ids[~of_prompts] = self._alone(sample, first, int((~of_prompts).sum()))
        return topk_ids

    def _alone(self, sample: int, first: int, num: int) -> Ints:
        """[num, K]; choices of tokens of different prompts."""
        tokens = self._prompts(sample, 1, min(first + num, _MOST_DRAWN) or 1)[:, 0]
        return tokens[_in_turn(len(tokens), first, num)]

    def _of_prompts(self, sample: int, first: int, num_new: Ints) -> Ints:
        """[num_new.sum(), K]; of prompts that follow each other; a few tokens of each, in turn.

        Tokens before are taken as prompts as long as these, on average.
        """
        num = _power_of_two(min(_TOKENS_OF_PROMPT, _TOKENS_OF_STEP // len(num_new)))
        num = max(min(num, 2 * _power_of_two(int(num_new.max()) - 1)), 2)
        before, most = round(first * len(num_new) / int(num_new.sum())), _MOST_DRAWN // num
        drawn = self._prompts(sample, num, min(before + len(num_new), most))
        prompt = np.arange(before, before + len(num_new)) % most
        place = np.arange(num_new.sum()) - (np.cumsum(num_new) - num_new).repeat(num_new)
        place = prompt.repeat(num_new) * num + place % num
        of_prompts: Ints = drawn.reshape(-1, self.top_k)[place]
        return of_prompts

    def _prompts(self, sample: int, num: int, at_least: int) -> Ints:
        """[n, num, K]; `num` tokens of each of the prompts drawn so far, at least so many."""
        drawn = self._drawn.get((sample, num), np.empty((0, num, self.top_k), dtype=np.int64))
        together = max(_DRAWN_TOGETHER // num, 1)
        missing = range(len(drawn) // together, -(-at_least // together))
        if missing:
            blocks = [self._block(sample, block, num) for block in missing]
            self._drawn[sample, num] = drawn = np.concatenate([drawn, *blocks])
        return drawn

    def earlier_load(self, layer: int) -> Ints:
        """[num_experts]; of another draw, by popularity as it was before it drifted."""
        sample = self.sample_of(layer)
        blocks = range(NUM_EARLIER // _DRAWN_TOGETHER)
        drawn = np.concatenate([self._block(sample, block, is_earlier=True) for block in blocks])
        return np.bincount(drawn[drawn >= 0], minlength=self.num_experts)

    @property
    def _num_all(self) -> int:
        return self.num_experts + self.num_zero

    def _rarity(self, sample: int, is_earlier: bool = False) -> Floats:
        """[E]; the inverse of the weights, of all experts."""
        places = np.random.default_rng((self.seed, sample)).permutation(self._num_all)
        rarity: Floats = np.power(1.0 + places, self.alpha, dtype=np.float64)
        if is_earlier:
            rng = np.random.default_rng((self.seed, sample, 0, 1))
            rarity *= np.exp(self.alpha * self.drift * rng.standard_normal(self._num_all))
        return rarity

    def _block(self, sample: int, block: int, num: int = 1, *, is_earlier: bool = False) -> Ints:
        """[n, num, K]; choices of a block of prompts, `num` tokens of each."""
        # The last word tells blocks apart: 0, of earlier tokens 1, of alike ones 2 or more.
        kind = num if num > 1 else int(is_earlier)
        rng = np.random.default_rng((self.seed, sample, block + 1, kind))
        together, rarity = max(_DRAWN_TOGETHER // num, 1), self._rarity(sample, is_earlier)
        if num > 1:
            own = _positive_stable(rng, 1 - self.likeness, (together, 1, self._num_all))
            rarity = rarity ** (1 / (1 - self.likeness)) / own
        return self._chosen(rng, (together, num), rarity)

    def _chosen(self, rng: np.random.Generator, size: tuple[int, ...], rarity: Floats) -> Ints:
        """[*size, K]; the choices of so many tokens.

        Args:
            rarity: [..., E]; of each token, or of several.
        """
        # The first arrivals of Poisson processes: the same as Gumbel noise on log weights.
        arrivals = rng.standard_exponential((*size, self._num_all), np.float32)
        arrivals *= rarity.astype(np.float32)
        arrivals = arrivals.reshape(-1, self._num_all)
        if self.groups.n_group > 1:
            _close_groups(arrivals, self.groups)
        chosen = _first_places(arrivals, self.top_k).reshape(*size, self.top_k)
        return _without_zero(chosen, self.num_experts) if self.num_zero else chosen


def _without_zero(topk_ids: Ints, num_experts: int) -> Ints:
    """Chosen experts, with -1 for those that compute nothing: those beyond `num_experts`."""
    return np.where(topk_ids < num_experts, topk_ids, -1)


def _positive_stable(rng: np.random.Generator, index: float, size: tuple[int, ...]) -> Floats:
    """Positive numbers S with E[exp(-s S)] = exp(-s^index), 0 < index < 1.

    M. Kanter, "Stable densities under change of scale and total variation inequalities", Annals of
    Probability 3, 1975, corollary 4.1.
    """
    angle, wait = rng.uniform(0, np.pi, size), rng.standard_exponential(size)
    first = np.sin(index * angle) / np.sin(angle) ** (1 / index)
    stable: Floats = first * (np.sin((1 - index) * angle) / wait) ** (1 / index - 1)
    return stable


def _power_of_two(num: int) -> int:
    """The largest power of two up to `num`; 0 for 0."""
    return 1 << num.bit_length() >> 1


def _first_places(arrivals: npt.NDArray[np.float32], num: int) -> Ints:
    """[T, num]; the places of the first arrivals of each token, in any order.

    Positive floats sort as their bits do. The last of these give way to the place, so that sorting
    need not carry it along: several times as fast as `argpartition`.
    """
    of_place = np.int32((1 << int(arrivals.shape[1] - 1).bit_length()) - 1)
    keyed = (arrivals.view(np.int32) & ~of_place) | np.arange(arrivals.shape[1], dtype=np.int32)
    keyed.partition(num - 1, axis=1)
    places: Ints = (keyed[:, :num] & of_place).astype(np.int64)
    return places


def _close_groups(arrivals: npt.NDArray[np.float32], groups: Routing) -> None:
    """Put off the arrivals [T, E] of all experts outside each token's `topk_group` groups.

    Logarithms of arrivals stand for scores: a group's largest is its first arrival, the sum of its
    two largest the product of its first two.
    """
    by_group = arrivals.reshape(len(arrivals), groups.n_group, -1)  # a view
    num_compared = 1 if groups.group_score == "max" else 2
    first = np.partition(by_group, num_compared - 1, axis=2)[:, :, :num_compared]
    order = np.argsort(first.prod(axis=2), axis=1)
    closed = order[:, groups.topk_group :]
    by_group[np.arange(len(arrivals))[:, None], closed] = np.inf


def extremes_of(source: LoadedRouting) -> tuple[LoadedRouting, LoadedRouting] | None:
    """Routing at the low and the high exponent; None unless the exponent is assumed."""
    return source.extremes if isinstance(source, PowerLawRouting) else None


class TraceRouting(LoadedRouting):
    """The tokens of a trace in turn, over and over; layers that it lacks take those it has.

    Args:
        num_earlier: the first tokens, which experts are placed by, come no more.
        num_zero: its last experts that compute nothing.
    """

    def __init__(self, trace: RoutingTrace, num_earlier: int = 0, num_zero: int = 0) -> None:
        super().__init__()
        if trace.num_tokens <= num_earlier:
            raise ValueError("a trace without tokens")
        self._layers = trace.layers
        self._num_experts = trace.num_experts - num_zero
        self._earlier, self._topk_ids = np.split(trace.topk_ids, [num_earlier], axis=1)

    def sample_of(self, layer: int) -> int:
        """Every layer of a trace is its own."""
        return self._layers.index(layer) if layer in self._layers else layer % len(self._layers)

    def topk_ids(
        self, layer: int, first: int, before: Ints, owned: Ints, num_new: Ints | None = None
    ) -> Ints:
        """The choices of the trace's tokens in turn; ranks' tokens follow each other."""
        tokens = self._topk_ids[self.sample_of(layer)]
        taken = _in_turn(len(tokens), first + int(before.sum()), int(owned.sum()))
        topk_ids: Ints = tokens[taken].astype(np.int64)
        return _without_zero(topk_ids, self._num_experts)

    def earlier_load(self, layer: int) -> Ints:
        """[num_experts]; all equal where the trace has no earlier tokens."""
        earlier = self._earlier[self.sample_of(layer)]
        return np.bincount(earlier[earlier < self._num_experts], minlength=self._num_experts)


class GivenRouting:
    """Recorded choices of the ranks of a replica in one step.

    Args:
        of_rank: by rank of the replica, by layer of its stage, [T, K].
    """

    likeness: float = 0.0

    def __init__(self, of_rank: Sequence[Mapping[int, npt.NDArray[np.integer]]]) -> None:
        self._of_rank = of_rank

    def sample_of(self, layer: int) -> Hashable:
        """All layers differ."""
        return layer

    def topk_ids(
        self, layer: int, first: int, before: Ints, owned: Ints, num_new: Ints | None = None
    ) -> Ints:
        """The recorded choices of the part; `first` is ignored."""
        of_ranks = [ids[layer] for ids in self._of_rank if layer in ids]
        slices = zip(of_ranks, before.tolist(), owned.tolist(), strict=True)
        parts = [ids[begin : begin + num] for ids, begin, num in slices]
        return np.concatenate(parts).astype(np.int64)


def _in_turn(num_tokens: int, first: int, num: int) -> slice | Ints:
    """Indices of `num` tokens from `first` on, beginning anew after the last."""
    begin = first % num_tokens
    if begin + num <= num_tokens:
        return slice(begin, begin + num)
    return np.arange(begin, begin + num) % num_tokens


_FEWEST_CHOICES = 30  # of each expert on average in half a trace: its load is sure to a fifth


@dataclass(frozen=True)
class RoutingChoice:
    """A routing source, and the option that selects it.

    Args:
        option: the command-line option that selects it.
        words: for a list of assumptions.
        note: what a trace is of, and cautions about it, in a line; empty where routing is drawn.
    """

    source: LoadedRouting
    option: str
    words: str
    note: str = ""


def choose_routing(
    model: ModelConfig,
    trace: Path | None,
    skew: float | None,
    seed: int = 0,
) -> RoutingChoice:
    """A trace, else experts whose popularity falls with their rank to the power of -`skew`.

    Tokens of one prompt choose similar experts by default; with a `skew` they are independent.

    Args:
        skew: exponent of the power law; None for the model's usual one and its bounds, and beside
            a trace.

    Raises:
        UserError: both are given, or the trace is damaged, empty or of other sizes.
    """
    take_option("--skew", skew)
    if trace is None:
        bounds, likeness = (SKEW_BOUNDS, LIKENESS) if skew is None else (None, 0.0)
        skew = model.usual_skew if skew is None else skew
        source = PowerLawRouting.of(model, skew, seed, NUM_SAMPLED_LAYERS, bounds, likeness)
        words = (
            f"expert popularity by Zipf's law, exponent {skew:g}, in a random order per layer"
            if skew
            else "uniform over experts; real traffic is not, so this is the best case"
        )
        if skew:
            words += (
                f", whose logarithm changes by {skew * source.drift:.2g} (standard deviation) "
                "after experts are placed"
            )
        if likeness:
            words += (
                f"; tokens of one prompt choose similar experts (rank correlation {likeness:g})"
            )
        if bounds is not None:
            words += f"; bounds go from exponent {bounds[0]:g} to {bounds[1]:g}"
        if model.routing.n_group > 1:
            words += (
                f"; within the top {model.routing.topk_group} of {model.routing.n_group} groups "
                "of each token"
            )
        return RoutingChoice(source, f"--skew {skew:g}", words)
    if skew is not None:
        raise UserError("--routing-trace and --skew exclude each other")
    read = read_trace(trace)
    if not read.num_tokens:
        raise UserError(f"{trace}: the trace has no tokens")
    sizes = (read.num_experts, read.num_experts_per_tok)
    if sizes != (model.num_routed_experts, model.num_experts_per_tok):
        raise UserError(
            f"{trace} records top-{sizes[1]} of {sizes[0]} experts; {model.name} has "
            f"top-{model.num_experts_per_tok} of {model.num_routed_experts}"
        )
    layers = model.moe_layers
    if others := [each for each in read.layers if each not in layers]:
        raise UserError(
            f"{trace} records experts of layer {others[0]}; {model.name} has none there: its "
            f"layers with experts are from {layers[0]} to {layers[-1]}"
        )
    num_earlier = read.num_tokens // 2
    words = (
        f"{read.num_tokens:,} recorded tokens, the last {read.num_tokens - num_earlier:,} repeated "
        "in a loop; experts are placed by the load of the first half only"
    )
    recorded = TraceRouting(read, num_earlier, model.num_zero_experts)
    return RoutingChoice(recorded, f"--routing-trace {trace}", words, _note(read, model))


@dataclass(frozen=True)
class ComputingExperts:
    """Number of a token's chosen experts that compute, in one layer.

    Attributes:
        least, most: 5th and 95th percentile over tokens.
    """

    mean: float
    least: int
    most: int

    @classmethod
    def of(cls, model: ModelConfig) -> "ComputingExperts":
        """By the hypergeometric distribution: all experts equally popular."""
        total, num = model.num_routed_experts, model.num_experts_per_tok
        ways = [
            comb(model.num_experts, each) * comb(model.num_zero_experts, num - each)
            for each in range(num + 1)
        ]
        below = np.cumsum(np.array([float(Fraction(each, sum(ways))) for each in ways]))
        least, most = (int(np.searchsorted(below, share)) for share in (0.05, 0.95))
        return cls(num * model.num_experts / total, least, most)


def varying_work(model: ModelConfig) -> Iterator[str]:
    """Cautions on experts that compute nothing, no router chooses, or are awaited a layer later."""
    if model.num_zero_experts:
        computing = ComputingExperts.of(model)
        least, most = (
            (num_active_params(model, each) - model.vocab_size * model.hidden_size) / 1e9
            for each in (computing.least, computing.most)
        )
        share = (computing.mean - computing.least) / max(computing.most - computing.least, 1)
        mean = least + share * (most - least)
        yield (
            f"{model.num_zero_experts} of {model.num_routed_experts} experts compute nothing: of a "
            f"token's {model.num_experts_per_tok} choices {computing.mean:.2g} compute on average, "
            f"{computing.least} to {computing.most} in a layer (5th to 95th percentile): "
            f"{mean:.1f}B parameters beside the embedding, {least:.1f}B to {most:.1f}B if so in "
            "all layers. Steps are priced by drawn choices, all experts as popular on average."
        )
    if model.hash_layers:
        yield (
            f"{len(model.hash_layers)} of {model.num_hidden_layers} layers choose experts by a "
            "token's number in the vocabulary: how evenly depends on the text, and is not known; "
            "these choices are drawn as those of the other layers."
        )
    if model.shortcut_experts:
        yield (
            "The output of experts is awaited one layer later; their times are added to that "
            "layer's, not hidden behind it: an upper bound."
        )


def _note(trace: RoutingTrace, model: ModelConfig) -> str:
    """`trace of paper-tiny, 19 tokens`, and cautions."""
    parts = [f"trace of {trace.model}, {trace.num_tokens:,} token{'s' * (trace.num_tokens != 1)}"]
    if Path(trace.model).name != Path(model.name).name:
        parts.append(f"caution: another model than {model.name}")
    if len(trace.layers) < len(model.moe_layers):
        parts.append(
            f"caution: {len(trace.layers)} of {len(model.moe_layers)} layers stand for all"
        )
    num_choices = trace.num_tokens / 2 * trace.num_experts_per_tok / trace.num_experts
    if num_choices < _FEWEST_CHOICES:
        least = ceil(2 * _FEWEST_CHOICES * trace.num_experts / trace.num_experts_per_tok)
        parts.append(f"caution: too few to tell experts apart; take {least:,} or more")
    return "; ".join(parts)
