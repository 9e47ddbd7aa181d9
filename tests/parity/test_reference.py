"""The reference against loops over single numbers in float64, written from the definition."""

import math

import numpy as np
import pytest
import torch

from expertlane.engine.model.weights import draw
from expertlane.spec.model import PRESETS
from parity.reference import ReferenceModel

SMALL = PRESETS["paper-tiny"].with_overrides(
    name="small",
    num_hidden_layers=2,
    hidden_size=6,
    num_attention_heads=2,
    head_dim=4,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
    vocab_size=11,
    rope_theta=100.0,
    rms_norm_eps=1e-3,
)


def norm(model, x, weight):
    mean_square = sum(value * value for value in x) / len(x)
    return np.array(
        [
            v / math.sqrt(mean_square + model.rms_norm_eps) * w
            for v, w in zip(x, weight, strict=True)
        ]
    )


def rotate(model, vector, position):
    half = model.head_dim // 2
    out = vector.copy()
    for i in range(half):
        angle = position * model.rope_theta ** (-2 * i / model.head_dim)
        pair = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = pair.real, pair.imag
    return out


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def attend(model, weight, layer, xs):
    """One output a position, from normed inputs."""
    outputs = []
    for position in range(len(xs)):
        mixed = []
        for head in range(model.num_attention_heads):
            rows = slice(head * model.head_dim, (head + 1) * model.head_dim)
            projected = {
                part: [weight(f"layers.{layer}.{part}")[rows] @ x for x in xs]
                for part in ("query", "key", "value")
            }
            query = rotate(model, projected["query"][position], position)
            scores = [
                query @ rotate(model, projected["key"][i], i) / math.sqrt(model.head_dim)
                for i in range(position + 1)
            ]
            shares = softmax(scores)
            mixed += list(sum(s * projected["value"][i] for i, s in enumerate(shares)))
        outputs.append(weight(f"layers.{layer}.output") @ np.array(mixed))
    return outputs


def route(model, weight, layer, x):
    """The block's output for one token, and the router's margin."""
    logits = weight(f"layers.{layer}.router") @ x
    order = sorted(range(model.num_experts), key=lambda expert: -logits[expert])
    chosen = order[: model.num_experts_per_tok]
    out = np.zeros(model.hidden_size)
    for expert, share in zip(chosen, softmax([logits[expert] for expert in chosen]), strict=True):
        inner = weight(f"layers.{layer}.experts.{expert}.up") @ x
        active = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in inner])
        out += share * (weight(f"layers.{layer}.experts.{expert}.down") @ active)
    rest = order[model.num_experts_per_tok :]
    return out, logits[chosen[-1]] - logits[rest[0]] if rest else math.inf


def naive_forward(model, seed, tokens):
    """Logits [len, vocab_size] and margins upstream [len] of one sequence."""

    def weight(name):
        return draw(model, seed, name).astype(np.float64)

    xs = [weight("embedding")[token] for token in tokens]
    least = [math.inf] * len(xs)
    for layer in range(model.num_hidden_layers):
        normed = [norm(model, x, weight(f"layers.{layer}.attention_norm")) for x in xs]
        xs = [x + y for x, y in zip(xs, attend(model, weight, layer, normed), strict=True)]
        for i, x in enumerate(xs):
            normed_x = norm(model, x, weight(f"layers.{layer}.moe_norm"))
            y, margin = route(model, weight, layer, normed_x)
            xs[i] = x + y
            least[i] = min(least[i], margin)
    logits = [weight("head") @ norm(model, x, weight("final_norm")) for x in xs]
    return np.array(logits), np.array([min(least[: i + 1]) for i in range(len(xs))])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_against_plain_loops(top_k):
    model = SMALL.with_overrides(num_experts_per_tok=top_k)
    token_ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    logits, margins = ReferenceModel(model, seed=5).forward(token_ids)
    assert logits.dtype == margins.dtype == torch.float32
    for i, tokens in enumerate(token_ids.tolist()):
        expected_logits, expected_margins = naive_forward(model, 5, tokens)
        np.testing.assert_allclose(logits[i], expected_logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(margins[i], expected_margins, rtol=0, atol=1e-5)


def test_one_head_of_one_pair_and_one_expert():
    model = SMALL.with_overrides(
        num_attention_heads=1, head_dim=2, num_experts=1, num_experts_per_tok=1
    )
    logits, margins = ReferenceModel(model, seed=0).forward(torch.tensor([[7]]))
    np.testing.assert_allclose(logits[0], naive_forward(model, 0, [7])[0], rtol=0, atol=1e-5)
    assert margins.tolist() == [[math.inf]]


def test_generation_is_greedy_and_feeds_its_own_tokens():
    prompts = np.array([[3, 1, 4], [1, 5, 9]])
    run = ReferenceModel(SMALL, seed=5).generate(prompts, output_len=4)
    assert run.tokens.shape == run.router_margins.shape == (2, 4)
    assert run.logits.shape == (2, 4, 11)
    assert (run.tokens.dtype, run.logits.dtype) == (np.int64, np.float32)
    for i, prompt in enumerate(prompts.tolist()):
        logits, margins = naive_forward(SMALL, 5, prompt + run.tokens[i, :-1].tolist())
        np.testing.assert_allclose(run.logits[i], logits[2:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(run.router_margins[i], margins[2:], rtol=0, atol=1e-5)
        assert run.tokens[i].tolist() == logits[2:].argmax(axis=-1).tolist()
