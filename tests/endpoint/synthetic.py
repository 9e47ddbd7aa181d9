"""Log-probabilities' differences of a server that does not exist, as heavy-tailed as real ones."""

from dataclasses import dataclass

import numpy as np

from expertlane.endpoint.statistics import Differences, fit_scales


@dataclass(frozen=True)
class World:
    """What differences are drawn from.

    Attributes:
        short, long: numbers of prompts, and `long_len` the length of the latter.
        sigma: scale of rounding, in nats; `server` that of the server's over the reference's.
        flips: share of tokens whose router flips, in the reference and in the server.
        moved: share of prompts in which an early flip moves all that follows.
    """

    short: int = 48
    long: int = 2
    long_len: int = 2_560
    sigma: float = 0.02
    server: float = 1.0
    flips: tuple[float, float] = (0.02, 0.02)
    moved: float = 0.05
    num_layers: int = 4
    num_experts: int = 8
    top_k: int = 2


def draw(seed: int, world: World) -> Differences:
    """A clean run: rounding of a reference, and of a server by the same law."""
    rng = np.random.default_rng(seed)
    lens = [*rng.integers(24, 96, world.short), *[world.long_len] * world.long]
    prompts = np.repeat(np.arange(len(lens)), lens)
    positions = np.concatenate([np.arange(each) for each in lens])
    num = len(prompts)
    logprobs = -rng.exponential(2.0, num)
    margins = rng.exponential(0.3, num)
    own = world.sigma * (1 - 0.9 * np.exp(logprobs)) * rng.lognormal(0, 0.3, len(lens))[prompts]

    def rounding(flips: float, scale: float) -> np.ndarray:
        noise = own * scale * rng.standard_t(3, num)
        is_flip = rng.random(num) < flips * np.exp(-margins)
        noise += is_flip * own * 20 * rng.standard_t(2, num)
        moved = rng.random(len(lens)) < world.moved
        return noise + moved[prompts] * own * 3 * rng.standard_normal(num)

    rounded, served = rounding(world.flips[0], 1.0), rounding(world.flips[1], world.server)
    popular = rng.dirichlet(np.full(world.num_experts, 4.0), world.num_layers)
    scores = np.log(popular)[:, None, :] + rng.gumbel(
        size=(world.num_layers, num, world.num_experts)
    )
    topk_ids = np.argsort(-scores, axis=2)[:, :, : world.top_k]
    scales = fit_scales(rounded, logprobs, margins, 1e-3)
    return Differences(served, rounded, scales, prompts, positions, topk_ids)
