"""What structured output costs: CPU time of a token's mask in the front, and of its use on a rank.

The tokenizer is trained on the Python files of the standard library, byte-level BPE. Tokens are
drawn from the masks, weighed towards short ones, so that numbers and texts end as a model's do.
"""

import argparse
import json
import random
import sysconfig
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from expertlane.engine.model.sampled_batch import SampledBatch
from expertlane.spec.sampling import SamplingParams, Structured
from expertlane.text.grammars import Grammars
from expertlane.text.tokenizer import Tokenizer

ZIP = {"type": "string", "pattern": "^[0-9]{5}$"}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "mail", "tags", "address"],
    "additionalProperties": False,
}
FORMS = {
    "json_object": Structured(json_schema={"type": "object"}),
    "json_schema": Structured(json_schema=PERSON),
    "regex": Structured(regex=r"(\d{1,3}\.){3}\d{1,3}( [a-z]+)*"),
    "choice": Structured(choice=("yes", "no", "maybe")),
    "grammar": Structured(grammar='start: sum\nsum: n ("+" n)*\nn: /[0-9]+/ | "(" sum ")"'),
}


def trained(vocab_size: int) -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py"))
    texts = (path.read_text("utf-8", errors="ignore") for path in files)
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core, [0])


def drawn(mask: np.ndarray, draw: random.Random) -> int:
    """One of the allowed; early ones are short."""
    allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
    return int(allowed[int(len(allowed) * draw.random() ** 4)])


def measure(
    grammars: Grammars, form: Structured, num_rows: int, num_tokens: int
) -> dict[str, float]:
    began = time.process_time()
    grammars.compile(form)
    compile_s = time.process_time() - began
    draw, params = random.Random(0), SamplingParams(structured=form)
    began = time.process_time()
    rows = [grammars.begin(params, ()) for _ in range(num_rows)]
    begin_s = (time.process_time() - began) / num_rows
    taken, cpu_s, worst_s = 0, 0.0, 0.0
    while taken < num_tokens:
        tokens = [(each, drawn(each.mask, draw)) for each in rows]
        cpu, wall = time.process_time(), time.perf_counter()
        grammars.advance(tokens).result()
        cpu_s += time.process_time() - cpu
        worst_s = max(worst_s, time.perf_counter() - wall)
        taken += num_rows
        rows = [
            grammars.begin(params, ()) if each.is_ended or each.error else each for each in rows
        ]
    return {
        "compile_ms": compile_s * 1e3,
        "begin_us": begin_s * 1e6,
        "token_us": cpu_s / taken * 1e6,
        "worst_wall_ms": worst_s * 1e3,
    }


def measure_use(vocab_size: int, num_rows: int) -> float:
    """CPU microseconds a row of masks on a rank, beside choosing greedily without."""
    torch.set_num_threads(1)  # waiting threads would count as busy
    logits = torch.randn(num_rows, vocab_size)
    batch = SampledBatch([None] * num_rows, vocab_size, torch.device("cpu"))
    bits = np.full(-(-vocab_size // 32) * 4, 0x11, dtype=np.uint8)
    times = []
    for masks in ({}, dict.fromkeys(range(num_rows), bits)):
        batch.choose(logits, masks)
        began = time.process_time()
        for _ in range(20):
            batch.choose(logits, masks)
        times.append((time.process_time() - began) / 20 / num_rows)
    return (times[1] - times[0]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--tokens", type=int, default=4_000)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    asked = parser.parse_args()
    tokenizer = trained(asked.vocab_size)
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    began = time.process_time()
    grammars.compile(Structured(choice=("a",)))
    print(f"vocabulary {tokenizer.vocab_size}; first grammar {time.process_time() - began:.2f} s")
    for name, form in FORMS.items():
        for num_rows in asked.rows:
            found = measure(grammars, form, num_rows, asked.tokens)
            rounded = {key: round(value, 2) for key, value in found.items()}
            print(name, num_rows, json.dumps(rounded))
    for num_rows in asked.rows:
        used_us = measure_use(tokenizer.vocab_size, num_rows)
        print(f"use on a rank, {num_rows} rows: {used_us:.1f} us a row")


if __name__ == "__main__":
    main()
