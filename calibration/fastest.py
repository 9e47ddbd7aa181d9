"""How far off the fastest of several libraries' laws is: a minimum of laws errs towards fast.

python calibration/fastest.py            all cards and types of experts with several laws
python calibration/fastest.py b300 h200  some

Each size that all of them were timed at counts once, by the fastest; rows for judging alone are
among them, since nothing is fitted here. Prints Markdown.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from compute import Law
from laws import laws_of
from sheet import CARDS, Card
from tables import MissingTablesError, Part, read

from expertlane.cost.laws.device import DeviceModel
from expertlane.cost.laws.profile import read_profile
from expertlane.cost.step.operation import Kind

_SIZE = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts")
_SHARES = ("moe_tp_size", "moe_ep_size")
_TOKENS = ((1, 16), (17, 128), (129, 1024), (1025, 1 << 30))


def main() -> int:
    """Print a row for each card, type and number of tokens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cards", nargs="*", choices=[[], *CARDS], metavar="CARD")
    print("| card | experts | tokens | sizes | median | absolute |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    try:
        for name in parser.parse_args().cards or CARDS:
            for row in _rows(CARDS[name]):
                print(f"| {name} | {' | '.join(row)} |", flush=True)
    except MissingTablesError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _rows(card: Card) -> Iterator[tuple[str, ...]]:
    model = DeviceModel(read_profile(card.sheet.name))
    for dtype, laws in _several(card).items():
        errors = _errors(model, laws)
        for least, most in _TOKENS:
            of_size = [error for size, error in errors.items() if least <= size[0] <= most]
            if not of_size:
                continue
            signed, size = np.expm1(np.median(of_size)), np.median(np.abs(np.expm1(of_size)))
            tokens = f"{least:,} to {most:,}" if most < 1 << 30 else f"{least:,} and more"
            yield dtype, tokens, f"{len(of_size):,}", f"{signed:+.1%}", f"{size:.1%}"


def _several(card: Card) -> dict[str, list[Law]]:
    """By type, laws of experts of one kind of rows; DeepGEMM's counts sorted rows."""
    laws: defaultdict[str, list[Law]] = defaultdict(list)
    for law in laws_of(card):
        if law.kind is Kind.EXPERTS and law.library != "deepgemm":
            laws[law.dtype].append(law)
    return {dtype: each for dtype, each in laws.items() if len(each) > 1}


def _errors(model: DeviceModel, laws: list[Law]) -> dict[tuple[float, ...], float]:
    """By size, the logarithm of predicted over measured."""
    fastest: dict[tuple[float, ...], tuple[float, float]] = {}
    kernels: defaultdict[tuple[float, ...], set[object]] = defaultdict(set)
    all_kernels = set()
    for law in laws:
        for source in law.sources:
            kernel = source.table.path, source.table.where.get("kernel_source")
            all_kernels.add(kernel)
            for part in (Part.FITTED, Part.LARGEST):
                columns = read(source.table, part)
                predicted = model.times(law.kind, law.dtype, source.sizes(columns)).seconds
                sizes = zip(*(columns[name].tolist() for name in (*_SIZE, *_SHARES)), strict=True)
                for size, measured, likely in zip(
                    sizes, columns["seconds"].tolist(), predicted.tolist(), strict=True
                ):
                    kernels[size].add(kernel)
                    if size not in fastest or measured < fastest[size][0]:
                        fastest[size] = measured, likely
    return {
        size: float(np.log(likely / measured))
        for size, (measured, likely) in fastest.items()
        if kernels[size] == all_kernels
    }


if __name__ == "__main__":
    sys.exit(main())
