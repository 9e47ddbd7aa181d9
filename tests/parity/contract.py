"""Contract 1 of the design as an assertion: a run computes the reference's function."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from parity.reference import ReferenceRun

MIN_ROUTER_MARGIN = 1e-5  # under it another choice of experts is legitimate
MIN_TOP2_GAP = 1e-4  # of the largest logit; under it another token is legitimate
MAX_EXCLUDED_SHARE = 0.02


class ContractCheck(NamedTuple):
    """What a passed check found: the error, and the share of tokens it could not judge."""

    error: float
    excluded_share: float


def check_contract(
    reference: ReferenceRun,
    logits: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int64],
    bound: float = 1e-5,
) -> ContractCheck:
    """Hold a run that was fed the reference's tokens against the reference.

    The error is max|a − b| / max|b|. A position whose upstream router margin is under
    `MIN_ROUTER_MARGIN` is left out of the error; its token, and one whose top-2 gap is at most
    `MIN_TOP2_GAP` × max|b|, is left out of the comparison of tokens; both count as excluded.

    Args:
        logits: [num_seqs, output_len, vocab_size].
        tokens: [num_seqs, output_len]; what the run chose.

    Raises:
        AssertionError: shapes differ, the error passes `bound`, a token differs, or over
            `MAX_EXCLUDED_SHARE` of the tokens is excluded.
    """
    _check_shape("logits", logits, reference.logits)
    _check_shape("tokens", tokens, reference.tokens)
    assert reference.tokens.size > 0, "the reference has no token: nothing would be checked"
    scale = float(np.abs(reference.logits).max())
    assert 0 < scale < np.inf, f"the reference's largest logit is {scale}: it can judge nothing"

    settled = reference.router_margins >= MIN_ROUTER_MARGIN
    top2 = np.partition(reference.logits, -2, axis=-1)[..., -2:]
    judged = settled & (top2[..., 1] - top2[..., 0] > MIN_TOP2_GAP * scale)
    excluded = int(judged.size - judged.sum())
    share = excluded / judged.size
    print(f"contract 1: excluded {excluded} of {judged.size} tokens ({share:.2%})")
    assert share <= MAX_EXCLUDED_SHARE, (
        f"{excluded} of {judged.size} tokens ({share:.2%}) are too close to call; "
        f"at most {MAX_EXCLUDED_SHARE:.0%} may be"
    )

    difference = np.where(settled[..., None], np.abs(logits - reference.logits), 0.0)
    seq, step, entry = np.unravel_index(np.argmax(difference), difference.shape)
    error = float(difference[seq, step, entry]) / scale
    print(f"contract 1: error {error:.2e}, bound {bound:.0e}")
    assert error <= bound, (  # also false for NaN
        f"logit error {error:.2e} passes {bound:.0e}: sequence {seq}, output {step}, entry {entry} "
        f"is {logits[seq, step, entry]:.7g}, the reference has "
        f"{reference.logits[seq, step, entry]:.7g} (largest {scale:.4g})"
    )

    wrong = np.argwhere(judged & (tokens != reference.tokens))
    assert len(wrong) == 0, (
        f"{len(wrong)} wrong tokens, the first at sequence {wrong[0][0]}, output {wrong[0][1]}: "
        f"{tokens[tuple(wrong[0])]}, the reference chose {reference.tokens[tuple(wrong[0])]}"
    )
    return ContractCheck(error, share)


def _check_shape(name: str, got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> None:
    assert got.shape == wanted.shape, (
        f"{name} have shape {got.shape}, the reference's {wanted.shape}"
    )
