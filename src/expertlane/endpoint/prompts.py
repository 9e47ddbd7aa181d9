"""Prompts by which a server is verified: short and long ones that reach every expert.

Candidates are drawn by a seed: random tokens, and text where there is a tokenizer. The reference's
router tells which experts each reaches; prompts are taken greedily, the one with the most wanted
choices a token first (the greedy algorithm for covering problems, Chvátal 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertlane.client.server import Vocabulary
from expertlane.endpoint.scored import PromptScores, Reference
from expertlane.errors import UserError
from expertlane.progress import Progress
from expertlane.text.tokenizer import Tokenizer

LENGTHS = (8, 16, 24, 32, 48, 64)  # tokens of short prompts, in turn
LONG_LEN = 2304  # beyond 2,048, a limit of many masks, windows and caches
TIMES = 8  # that an expert of a layer is to be chosen
NUM_CANDIDATES = 192
_FLOAT32 = "float32"
_OF_A_PROMPT = 16  # tokens that a request costs beside its own

# Of several kinds, so that text reaches other experts than random tokens do.
_TEXTS = (
    "The committee met on Tuesday to discuss the budget, and after three hours nobody agreed.",
    "In the year 1848 a series of revolutions spread across much of Europe.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "for (int i = 0; i < n; ++i) { total += values[i]; }\n",
    '{"name": "Ada", "born": 1815, "languages": ["en", "fr"], "active": true}',
    "Let f be continuous on [a, b]; then f attains its maximum at some point of the interval.",
    "SELECT city, COUNT(*) FROM orders WHERE price > 20 GROUP BY city;",
    "Die Katze liegt auf dem warmen Ofen und schläft, während es draußen regnet.",
    "La rivière traverse le village avant de se jeter dans la mer.",
    "El tren sale a las siete y media, pero hoy llega con retraso.",
    "昨天下午我们在图书馆看书，晚上一起吃了饭。",
    "東京の朝は早く、駅はもう人でいっぱいだった。",
    "Мы долго шли по лесу и наконец увидели озеро.",
    "Q: What is the boiling point of water at sea level?\nA: 100 degrees Celsius.\n",
    "Ingredients: 200 g flour, 2 eggs, 50 ml milk, a pinch of salt. Whisk and rest for an hour.",
    "Dear Sir or Madam, I am writing to complain about the delay of my order no. 48213.",
    "Mitochondria convert nutrients into adenosine triphosphate, which powers the cell.",
    "<ul><li>first</li><li>second</li></ul><!-- end of list -->",
    "x^2 + 5x + 6 = (x + 2)(x + 3), so the roots are -2 and -3.",
    "GOAL! In the 89th minute the captain heads it in from a corner.",
)


@dataclass(frozen=True, eq=False)
class DrawnPrompts:
    """Prompts that may be asked: token ids."""

    short: list[list[int]]
    long: list[list[int]]


@dataclass(frozen=True, eq=False)
class ChosenPrompts:
    """Prompts that are asked, and the reference's scores of them.

    Attributes:
        prompts: token ids; those that were given first, then short ones, then long ones.
        scored: by number type, in the order of `prompts`.
    """

    prompts: list[list[int]]
    scored: dict[str, list[PromptScores]]


def draw_prompts(
    vocabulary: Vocabulary,
    *,
    max_len: int,
    seed: int = 0,
    num_short: int = NUM_CANDIDATES,
    num_long: int = 2,
) -> DrawnPrompts:
    """Prompts of all lengths, drawn by a seed.

    Args:
        max_len: tokens of the longest prompt that server and reference take.
        num_long: of `LONG_LEN` tokens; none where that is more than `max_len`.

    Raises:
        UserError: no prompt can be made.
    """
    draw, token_ids = np.random.default_rng(seed), _ordinary(vocabulary)
    short = _candidates(draw, token_ids, vocabulary.tokenizer, num_short, max_len)
    num_long = num_long if max_len >= LONG_LEN else 0
    long = [draw.choice(token_ids, size=LONG_LEN).tolist() for _ in range(num_long)]
    return DrawnPrompts(short, long)


def _ordinary(vocabulary: Vocabulary) -> NDArray[np.int64]:
    """All ids that may be drawn: without control tokens, and those that the tokenizer lacks.

    Raises:
        UserError: there are none.
    """
    ids, tokenizer = vocabulary.token_ids, vocabulary.tokenizer
    if tokenizer is not None:
        special = tokenizer.special_token_ids
        ids = [each for each in ids if each not in special and tokenizer.has_token(each)]
    if not len(ids):
        raise UserError(f"no token of {len(vocabulary)} is left to make prompts of")
    return np.array(ids, dtype=np.int64)


def choose_prompts(
    reference: Reference,
    drawn: DrawnPrompts,
    progress: Progress,
    *,
    given: Sequence[list[int]] = (),
    times: int = TIMES,
    num_least: int = 32,
    number_types: Sequence[str] = (_FLOAT32,),
) -> ChosenPrompts:
    """Prompts that choose every expert of every layer often enough, where any candidates do.

    The reference reads its layers once, for candidates and all number types together.

    Args:
        drawn: candidates; of these all long ones are taken.
        given: prompts that are asked in any case, and count first.
        times: how often an expert is to be chosen, by given and short prompts alone.
        num_least: given and short prompts at least, though fewer may reach all experts.
        number_types: what is scored beside float32.

    Raises:
        UserError: as `reference.score_in`.
    """
    first, prompts = len(given), [*given, *drawn.short, *drawn.long]
    types = dict.fromkeys((_FLOAT32, *number_types))
    scored = reference.score_in(prompts, tuple(types), progress)
    counts = np.stack([count_choices([each], reference.num_experts) for each in scored[_FLOAT32]])
    last = len(prompts) - len(drawn.long)
    lengths = np.array([len(each) for each in prompts[first:last]])
    taken = _greedy(counts[first:last], lengths, times, counts[:first].sum(axis=0))
    others = sorted(set(range(last - first)) - set(taken))
    taken = sorted(taken + others[: max(0, num_least - first - len(taken))])
    places = [*range(first), *(first + each for each in taken), *range(last, len(prompts))]
    return ChosenPrompts(
        [prompts[place] for place in places],
        {name: [of_type[place] for place in places] for name, of_type in scored.items()},
    )


def count_choices(scored: Sequence[PromptScores], num_experts: Sequence[int]) -> NDArray[np.int64]:
    """[num_moe_layers, most experts], how often prompts choose each expert.

    The last token of each is left out: no log-probability follows from its experts.
    """
    found = np.zeros((len(num_experts), max(num_experts, default=0)), dtype=np.int64)
    for each in scored:
        if each.topk_ids is not None:
            for layer, chosen in enumerate(each.topk_ids[:, :-1]):
                found[layer] += np.bincount(chosen.ravel(), minlength=found.shape[1])
    return found


def _candidates(
    draw: np.random.Generator,
    token_ids: NDArray[np.int64],
    tokenizer: Tokenizer | None,
    number: int,
    max_len: int,
) -> list[list[int]]:
    """Short prompts; every second one of text, where there is a tokenizer."""
    if max_len < 2:
        raise UserError(f"prompts need 2 tokens; the longest that the server takes has {max_len}")
    prompts = []
    for place in range(number):
        length = min(LENGTHS[place // 2 % len(LENGTHS)], max_len)
        if tokenizer is not None and place % 2:
            text = _text(draw, tokenizer, length)
            if len(text) == length and max(text) <= token_ids.max():
                prompts.append(text)
                continue
        prompts.append(draw.choice(token_ids, size=length).tolist())
    return prompts


def _text(draw: np.random.Generator, tokenizer: Tokenizer, length: int) -> list[int]:
    """The first tokens of several texts in a row."""
    texts = [_TEXTS[place] for place in draw.permutation(len(_TEXTS))]
    return tokenizer.encode(" ".join(texts))[:length]


def _greedy(
    counts: NDArray[np.int64], lengths: NDArray[np.int64], times: int, given: NDArray[np.int64]
) -> list[int]:
    """Places of prompts whose choices together reach `times`, or as near as all of them do.

    Args:
        counts: [num_prompts, num_moe_layers, num_experts].
        lengths: [num_prompts], tokens.
        given: [num_moe_layers, num_experts], choices that are there already.
    """
    # More than all of them together cannot be reached.
    left = np.minimum(counts.sum(axis=0), np.maximum(times - given, 0))
    taken: list[int] = []
    while left.any():
        gains = np.minimum(counts, left).sum(axis=(1, 2)) / (lengths + _OF_A_PROMPT)
        gains[taken] = 0
        best = int(gains.argmax())
        taken.append(best)
        left = np.maximum(left - counts[best], 0)
    return taken
