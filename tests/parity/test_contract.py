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


def test_the_reference_itself_passes(capsys):
    run = make_run()
    assert check_contract(run, run.logits.copy(), run.tokens.copy()) == (0.0, 0.0)
    out = capsys.readouterr().out
    assert "excluded 0 of 100 tokens (0.00%)" in out
    assert "error 0.00e+00, bound 1e-05" in out


def test_one_token_is_enough():
    run = make_run(1, 1)
    assert check_contract(run, run.logits, run.tokens) == (0.0, 0.0)


def test_no_token_is_not():
    run = make_run(0)
    with pytest.raises(AssertionError, match=telling("nothing checked")):
        check_contract(run, run.logits, run.tokens)


def test_a_wrong_token_fails_and_is_named():
    run = make_run()
    tokens = run.tokens.copy()
    tokens[3, 7] = 1
    tokens[3, 9] = 0
    with pytest.raises(
        AssertionError,
        match=telling("2 wrong sequence 3 output 7 1"),
    ):
        check_contract(run, run.logits, tokens)


@pytest.mark.parametrize("by", [4.2e-5, -4.2e-5, np.nan, np.inf])
def test_a_wrong_logit_fails_and_is_named(by):
    run = make_run()
    logits = run.logits.copy()
    logits[1, 2, 0] += by
    with pytest.raises(AssertionError, match="sequence 1, output 2, entry 0"):
        check_contract(run, logits, run.tokens)


def test_the_error_is_relative_to_the_largest_logit():
    run = make_run()
    logits = run.logits.copy()
    logits[1, 2, 0] += 3.9e-5
    assert check_contract(run, logits, run.tokens).error == pytest.approx(3.9e-5 / 4, rel=1e-3)


def test_a_looser_bound_can_be_asked_for():
    run = make_run()
    logits = run.logits.copy()
    logits[0, 0, 0] += 0.02
    assert check_contract(run, logits, run.tokens, bound=1e-2).error == pytest.approx(5e-3)


def test_a_close_router_excludes_token_and_logits(capsys):
    run = make_run()
    run.router_margins[2, 3] = 9e-6
    logits, tokens = run.logits.copy(), run.tokens.copy()
    logits[2, 3] = 7
    tokens[2, 3] = 0
    assert check_contract(run, logits, tokens) == (0.0, 0.01)
    assert "excluded 1 of 100 tokens (1.00%)" in capsys.readouterr().out


def test_a_router_margin_at_the_limit_is_judged():
    run = make_run()
    run.router_margins[2, 3] = 1.1e-5
    tokens = run.tokens.copy()
    tokens[2, 3] = 0
    with pytest.raises(AssertionError, match="1 wrong tokens"):
        check_contract(run, run.logits, tokens)


def test_a_close_call_excludes_the_token_but_not_its_logits():
    run = make_run()
    run.logits[0, 1, 1] = 4 - 3e-4  # gap 3e-4; the limit is 1e-4 × 4
    tokens = run.tokens.copy()
    tokens[0, 1] = 1
    assert check_contract(run, run.logits, tokens) == (0.0, 0.01)
    logits = run.logits.copy()
    logits[0, 1, 0] = 1
    with pytest.raises(AssertionError, match="logit error"):
        check_contract(run, logits, tokens)


def test_both_kinds_count_in_one_share_and_over_two_percent_fails():
    run = make_run()
    run.router_margins[0, 0] = 0
    run.logits[0, 1, 1] = 4
    assert check_contract(run, run.logits, run.tokens).excluded_share == 0.02
    run.router_margins[0, 2] = 0
    with pytest.raises(
        AssertionError,
        match=telling("3 100 tokens 3.00% 2%"),
    ):
        check_contract(run, run.logits, run.tokens)


def test_shapes_must_agree():
    run = make_run()
    with pytest.raises(AssertionError, match=telling("logits (4, 25, 2)")):
        check_contract(run, run.logits[..., :2], run.tokens)
    with pytest.raises(AssertionError, match=telling("tokens (4, 24)")):
        check_contract(run, run.logits, run.tokens[:, :24])


def test_a_reference_of_zeros_judges_nothing():
    run = make_run()
    run.logits[:] = 0
    with pytest.raises(AssertionError, match=telling("logit 0.0")):
        check_contract(run, run.logits, run.tokens)
