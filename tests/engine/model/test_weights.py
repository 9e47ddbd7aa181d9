import numpy as np
import pytest

from expertlane.engine.model.weights import draw
from expertlane.spec.model import PRESETS
from expertlane.spec.tensors import expert_name

TINY = PRESETS["paper-tiny"]  # hidden 64, attention 64, inner 128, vocabulary 257
NARROW = TINY.with_overrides(num_attention_heads=2)  # attention 8


def test_different_names_and_seeds_differ():
    names = ["layers.0.query", "layers.0.key", "layers.0.value", "layers.1.query"]
    drawn = [draw(TINY, 0, name) for name in names] + [draw(TINY, 1, names[0])]
    drawn += [draw(TINY, 0, expert_name(0, expert, "up"))[:64] for expert in range(2)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            correlation = np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]
            assert abs(correlation) < 0.08  # 5 / √4096


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding", 1.0),
        ("head", 64**-0.5),
        ("layers.0.query", 64**-0.5),
        ("layers.0.output", 8**-0.5),
        ("layers.0.experts.0.up", 64**-0.5),
        ("layers.0.experts.0.down", 128**-0.5),
    ],
)
def test_matrices_have_std_of_one_over_root_fan_in(name, std):
    drawn = draw(NARROW, 0, name)
    tolerance = 5 / np.sqrt(drawn.size)  # five standard errors
    assert drawn.std() == pytest.approx(std, rel=tolerance)
    assert drawn.mean() == pytest.approx(0, abs=tolerance * std)


def test_norms_are_near_one_but_not_one():
    model = TINY.with_overrides(hidden_size=4096)
    drawn = draw(model, 0, "final_norm")
    assert drawn.mean() == pytest.approx(1, abs=0.01)
    assert drawn.std() == pytest.approx(0.1, rel=0.08)


def test_an_expert_s_weights_do_not_depend_on_what_else_is_in_the_model():
    other = TINY.with_overrides(num_experts=8, num_hidden_layers=2, vocab_size=11)
    name = expert_name(1, 3, "down")
    np.testing.assert_array_equal(draw(TINY, 0, name), draw(other, 0, name))
