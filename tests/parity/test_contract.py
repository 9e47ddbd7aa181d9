import numpy as np
import pytest

from cli.screen import telling
from parity.contract import check_contract
from parity.reference import ReferenceRun


def make_run(num_seqs: int = 4, output_len: int = 25) -> ReferenceRun:
    """Every row of logits is 0, 1, 4: token 2, gap 3, largest logit 4."""
    logits = np.tile(np.array([0, 1, 4], dtype=np.float32), (num_seqs, output_len, 1))
    tokens = np.full((num_seqs, output_len), 2)
    return ReferenceRun(tokens, logits, np.ones((num_seqs, output_len), dtype=np.float32))


@pytest.mark.parametrize("num", [(4, 25), (1, 1)])
def test_the_reference_itself_passes(num):
    run = make_run(*num)
    assert check_contract(run, run.logits.copy(), run.tokens.copy()) == (0.0, 0.0)


def changed(*, tokens=(), logits=(), margins=(), gaps=(), bound=1e-5):
    """Check a run; changes are (place, value), margins and gaps those of the reference."""
    run = make_run()
    for place, margin in margins:
        run.router_margins[place] = margin
    for place, gap in gaps:
        run.logits[(*place, 1)] = 4 - gap
    own_logits, own_tokens = run.logits.copy(), run.tokens.copy()
    for place, token in tokens:
        own_tokens[place] = token
    for place, by in logits:
        own_logits[place] += by
    return check_contract(run, own_logits, own_tokens, bound)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": [((3, 7), 1), ((3, 9), 0)]}, "2 wrong sequence 3 output 7 1"),
        *(
            ({"logits": [((1, 2, 0), by)]}, "error sequence 1 output 2 entry 0")
            for by in (4.2e-5, -4.2e-5, np.nan, np.inf)
        ),
        # A router margin at the limit is judged, and so are logits where a token is a close call.
        ({"margins": [((2, 3), 1.1e-5)], "tokens": [((2, 3), 0)]}, "1 wrong"),
        ({"gaps": [((0, 1), 3e-4)], "logits": [((0, 1, 0), 1)]}, "logit error"),
        # Both kinds count in one share, of which 2 % is the most.
        ({"margins": [((0, 0), 0), ((0, 2), 0)], "gaps": [((0, 1), 0)]}, "3 100 tokens 3.00% 2%"),
    ],
)
def test_what_fails(changes, said):
    with pytest.raises(AssertionError, match=telling(said)):
        changed(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "share"),
    [
        ({"logits": [((1, 2, 0), 3.9e-5)]}, 3.9e-5 / 4, 0.0),  # relative to the largest logit
        ({"logits": [((0, 0, 0), 0.02)], "bound": 1e-2}, 5e-3, 0.0),
        # A close router excludes token and logits, a close call (limit: 1e-4 of 4) the token.
        (
            {"margins": [((2, 3), 9e-6)], "tokens": [((2, 3), 0)], "logits": [((2, 3), 7)]},
            *(0.0, 0.01),
        ),
        ({"gaps": [((0, 1), 3e-4)], "tokens": [((0, 1), 1)]}, 0.0, 0.01),
        ({"margins": [((0, 0), 0)], "gaps": [((0, 1), 0)]}, 0.0, 0.02),
    ],
)
def test_what_passes(changes, error, share):
    found = changed(**changes)
    assert found.error == pytest.approx(error, rel=1e-2)
    assert found.excluded_share == share


def test_what_can_judge_nothing_fails():
    none = make_run(0)
    with pytest.raises(AssertionError, match=telling("nothing checked")):
        check_contract(none, none.logits, none.tokens)
    run = make_run()
    for logits, tokens, said in (
        (run.logits[..., :2], run.tokens, "logits (4, 25, 2)"),
        (run.logits, run.tokens[:, :24], "tokens (4, 24)"),
    ):
        with pytest.raises(AssertionError, match=telling(said)):
            check_contract(run, logits, tokens)
    run.logits[:] = 0
    with pytest.raises(AssertionError, match=telling("logit 0.0")):
        check_contract(run, run.logits, run.tokens)
