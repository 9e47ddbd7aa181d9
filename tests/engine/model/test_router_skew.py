"""A skewed router: popularity falls by place, another order in each layer, same function."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling
from conftest import PoolKeeper
from distributed.running import deployment, run_deployment
from expertlane.engine.model.weights import draw
from expertlane.errors import SpecError
from expertlane.spec.model import PRESETS, Routing
from expertlane.spec.workload import Workload
from parity.contract import check_contract
from parity.reference import ReferenceModel

SKEWED = replace(PRESETS["paper-tiny"], routing=Routing(router_bias=True, router_skew=1.5))


def test_the_bias_is_a_power_law_of_a_drawn_order():
    biases = [draw(SKEWED, 0, f"layers.{layer}.router_bias") for layer in (0, 1)]
    wanted = -1.5 * np.log(np.arange(1, SKEWED.num_experts + 1))
    for bias in biases:
        np.testing.assert_allclose(np.sort(bias)[::-1], wanted, rtol=1e-6)
    assert biases[0].argmax() != biases[1].argmax()


def test_a_skew_needs_a_bias():
    with pytest.raises(SpecError, match="set router_bias = true too"):
        replace(SKEWED, routing=Routing(router_skew=1.0))
    with pytest.raises(SpecError, match=telling("router_skew -1 0 100")):
        replace(SKEWED, routing=Routing(router_bias=True, router_skew=-1))


def test_the_reference_knows_it_and_load_is_uneven(pools: PoolKeeper):
    workload = Workload(num_sequences=6, prompt_len=8, output_len=6, seed=1)
    reference = ReferenceModel(SKEWED, 0).generate(
        workload.prompt_token_ids(SKEWED.vocab_size), workload.output_len
    )
    run = run_deployment(
        pools.pool(4),
        SKEWED,
        deployment("dp=4,ep=4", num_redundant_experts=4, dispatch="hierarchical"),
        workload,
        forced=reference.tokens,
        return_logits=True,
        ranks_per_node=2,
    )
    assert run.logits is not None
    check_contract(reference, run.logits, run.tokens)
    load = sum(
        record.num_tokens_per_expert for step in run.steps for record in step.outcome.records
    )
    assert (load.max(axis=1) / load.mean(axis=1)).min() > 2
