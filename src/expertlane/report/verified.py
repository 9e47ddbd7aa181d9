"""The answer and the report of `expertlane verify`."""

from collections.abc import Iterator, Sequence

from expertlane.report.document import Answer, Column, Section, Table, Words, number, text
from expertlane.report.numbers import counted, duration, figures, percent, shortened, times
from expertlane.results.results import Results
from expertlane.results.verified_record import (
    ConditionRecord,
    ExpertRecord,
    LayerExperts,
    SignificanceRecord,
    TokenRecord,
    VerifiedRecord,
)

_MOST_WORST, _MOST_EXPERTS, _MOST_SKIPPED, _MOST_LAYERS = 3, 3, 2, 3  # of the answer
_MOST_LISTED = 64  # experts of a layer
_MOST_CONDITIONS, _MOST_OFF = 12, 6
_NAME_WIDTH = 40
_SOURCES = {
    "told": "as told",
    "checkpoint": "taken for the server's",
    "seen": "seen: the server rounds no more",
}
_LEAST_P_VALUE = 1e-12  # a smaller one says no more


def _record(results: Results) -> VerifiedRecord:
    (found,) = (each.verified for each in results.deployments)
    assert found is not None, "results of verify have it"
    return found


def verified_answer(results: Results) -> Answer:
    """The verdict, its likely cause, and every condition in a line."""
    found = _record(results)
    named = found.url + (f" ({found.software})" if found.software else "")
    setting = (
        f"{shortened(found.model, _NAME_WIDTH)} at {named} | "
        f"against {shortened(found.reference, _NAME_WIDTH)} | {found.dtype}"
    )
    parts: list[Words] = [*found.why, *_main_conditions(found)]
    if found.experts:
        parts.append(_experts(found.experts[:_MOST_EXPERTS]))
    if found.worst:
        parts.append(_worst(found.worst[:_MOST_WORST]))
    parts += _sensitivity(found)
    if said := [*_unreached(found), *_in_decoder(found)]:
        parts.append(" ".join(said))
    parts.append(" ".join([*_granted(found), *_left_out(found)]))
    return Answer(setting, headline(found), tuple(parts))


def _main_conditions(found: VerifiedRecord) -> Iterator[Words]:
    """Conditions: where some differ those, with the names of the others."""
    off = [each for each in found.conditions if each.alarms]
    shown = off[:_MOST_OFF] if off else found.conditions[:_MOST_CONDITIONS]
    yield _conditions(shown, _title(shown), is_brief=True)
    if off:
        said = []
        for against, words in (("reference", "No difference"), ("alone", "The same as alone")):
            rest = [each for each in found.conditions if not each.alarms]
            names = [each.name for each in rest if each.against == against]
            if names:
                said.append(f"{words}: {'; '.join(names[:_MOST_CONDITIONS])}.")
        if said:
            yield " ".join(said)


def _title(shown: Sequence[ConditionRecord]) -> str:
    """Title of the conditions' table: what they are compared with."""
    exact = [each.name for each in shown if each.against == "reference"]
    if len(exact) == len(shown):
        return "Differences to the reference, in nats"
    if not exact:
        return "Differences to the same tokens alone, in nats"
    first = exact[0] + (" and ranks" if len(exact) > 1 else "")
    return f"Differences in nats: {first} to the reference, the others to alone"


def headline(found: VerifiedRecord) -> str:
    """The verdict in a sentence."""
    off = [each for each in found.conditions if each.alarms]
    if found.verdict == "can't tell":
        return "Can't tell whether it computes the model."
    if found.verdict == "same":
        num = sum(each.num_tokens for each in found.conditions)
        return (
            f"Same: it computes the model. None of {num:,} log-probabilities, under "
            f"{counted(len(found.conditions), 'condition')}, differ beyond rounding."
        )
    first = off[0]
    where = first.name + (f" and {len(off) - 1} more" if len(off) > 1 else "")
    said = f"Differs beyond rounding of {found.dtype}: {where}"
    if first.rounding and first.median > first.rounding:
        said += f", median {times(first.median / first.rounding)} of rounding's"
    if first.share_off:
        said += f", {percent(first.share_off)} of tokens far off"
    return f"{said}."


def verified_sections(results: Results) -> tuple[Section, ...]:
    """All sections but the setup."""
    found = _record(results)
    return (
        Section("Verdict", (headline(found), *found.why), "top", "answer"),
        Section("Conditions", (_conditions(found.conditions),), chapter="answer"),
        Section("Experts", (_experts(found.experts),) if found.experts else (), chapter="why"),
        Section("Tokens", (_worst(found.worst),) if found.worst else (), chapter="why"),
        Section("Tests", (_tests(found.tests),) if found.tests else (), chapter="why"),
        Section(
            "Sensitivity and limits",
            (
                *_sensitivity(found),
                *_reach(found),
                *_unreached(found),
                *_in_decoder(found),
                *_granted(found),
                *_left_out(found),
                *_budget(found),
            ),
            chapter="sure",
        ),
        Section("Experts that no prompt chose", _not_chosen(found), chapter="sure"),
        Section("What was asked", (_facts(results, found),), chapter="setup"),
    )


def _nats(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 1e-3 else figures(value)


def _conditions(
    conditions: Sequence[ConditionRecord], title: str = "", *, is_brief: bool = False
) -> Table:
    columns: list[Column[ConditionRecord]] = [
        text("condition", lambda each: each.name),
        text("against", lambda each: each.against),
        number("tokens", lambda each: each.num_tokens, "{:,}".format),
        number("median", lambda each: each.median, _nats),
        number("p99", lambda each: each.p99, _nats),
        number("rounding", lambda each: each.rounding, _nats),
        number("its p99", lambda each: each.rounding_p99, _nats),
        text("verdict", lambda each: "differs" if each.alarms else "same"),
    ]
    if is_brief:
        columns = [each for each in columns if each.heading != "against"]
    return Table.of(title, columns, conditions)


def _experts(experts: Sequence[ExpertRecord]) -> Table:
    columns: list[Column[ExpertRecord]] = [
        number("MoE layer", lambda each: each.layer),
        number("expert", lambda each: each.expert),
        number("tokens", lambda each: each.num_tokens, "{:,}".format),
        number("median, its tokens", lambda each: each.inside, _nats),
        number("others", lambda each: each.outside, _nats),
        number("p-value", lambda each: each.p_value, _p_value),
    ]
    return Table.of("Experts of the tokens that are off", columns, experts)


def _worst(tokens: Sequence[TokenRecord]) -> Table:
    columns: list[Column[TokenRecord]] = [
        text("condition", lambda each: each.condition),
        number("prompt", lambda each: each.prompt),
        number("position", lambda each: each.position, "{:,}".format),
        number("token id", lambda each: each.token_id),
        number("server", lambda each: each.server, "{:.4g}".format),
        number("expected", lambda each: each.expected, "{:.4g}".format),
        number("ratio", lambda each: abs(each.server - each.expected) / each.scale, figures),
    ]
    title = "Tokens farthest off (ratio: the difference over that token's rounding)"
    return Table.of(title, columns, tokens)


def _tests(tests: Sequence[SignificanceRecord]) -> Table:
    columns: list[Column[SignificanceRecord]] = [
        text("condition", lambda each: each.condition),
        text("test", lambda each: each.name),
        text("of", lambda each: each.what),
        number("statistic", lambda each: each.statistic, figures),
        number("p-value at most", lambda each: each.p_value, _p_value),
    ]
    return Table.of("", columns, tests)


def _p_value(value: float) -> str:
    return f"<{_LEAST_P_VALUE:.0e}" if value < _LEAST_P_VALUE else f"{value:.2g}"


def _sensitivity(found: VerifiedRecord) -> Iterator[str]:
    """The smallest difference that would have been seen: how much a `same` says."""
    if found.verdict == "differs" or found.least_seen is None:
        return
    more = (
        ""
        if found.least_seen_expert is None
        else f", and one of {_nats(found.least_seen_expert)} in the tokens of a single expert"
    )
    yield (
        f"An error of {_nats(found.least_seen)} nats in every token's log-probability would have "
        f"been seen{more}; smaller ones hide in rounding."
    )


def _unreached(found: VerifiedRecord) -> Iterator[str]:
    """How many experts of which layers no prompt chose."""
    if found.coverage is None or not found.coverage.unreached:
        return
    layers = found.coverage.unreached
    num = sum(len(each.experts) for each in layers)
    said = [f"{len(each.experts)} of MoE layer {each.layer}" for each in layers[:_MOST_LAYERS]]
    rest = layers[_MOST_LAYERS:]
    if rest:
        more = sum(len(each.experts) for each in rest)
        said.append(f"{more:,} of {counted(len(rest), 'more layer')}")
    yield (
        f"Not covered: {counted(num, 'expert')} of {found.coverage.num_experts:,}, which no prompt "
        f"chose: {', '.join(said)}."
    )


def _in_decoder(found: VerifiedRecord) -> Iterator[str]:
    """Decoder layers of the MoE layers that are named, where their numbers differ."""
    if found.coverage is None:
        return
    of_decoder = dict(enumerate(found.coverage.moe_layers))
    named = [each.layer for each in found.experts]
    named += [each.layer for each in found.coverage.unreached]
    moved = [
        each for each in dict.fromkeys(named) if each in of_decoder and of_decoder[each] != each
    ]
    if moved:
        said = ", ".join(f"{each} is layer {of_decoder[each]}" for each in moved[:_MOST_LAYERS])
        more = ", …" if len(moved) > _MOST_LAYERS else ""
        yield f"In the decoder MoE layer {said}{more}."


def _reach(found: VerifiedRecord) -> Iterator[str]:
    """How well the prompts reach experts."""
    own = found.coverage
    if own is None:
        yield "Which experts the prompts choose can't be told without a checkpoint."
    elif own.num_experts:
        num = own.num_experts - sum(len(each.experts) for each in own.unreached)
        rare = f", {own.num_rare:,} of them fewer than {own.wanted} times" if own.num_rare else ""
        yield f"The prompts choose {num:,} of {counted(own.num_experts, 'expert')}{rare}."


def _not_chosen(found: VerifiedRecord) -> tuple[Table, ...]:
    if found.coverage is None or not found.coverage.unreached:
        return ()
    columns: list[Column[LayerExperts]] = [
        number("MoE layer", lambda each: each.layer),
        number("how many", lambda each: len(each.experts)),
        text("experts", _listed),
    ]
    return (Table.of("", columns, found.coverage.unreached),)


def _listed(own: LayerExperts) -> str:
    more = len(own.experts) - _MOST_LISTED
    said = ", ".join(map(str, own.experts[:_MOST_LISTED]))
    return f"{said} and {more} more" if more > 0 else said


def _granted(found: VerifiedRecord) -> Iterator[str]:
    how = "measured on the same tokens" if found.is_measured else "a usual one, not measured"
    if found.dtype == "float32":
        how = "a bound on its sums"
    if found.coverage is None:
        how += "; for a token that changes under load on the second server, at least that change"
    yield f"Rounding granted: {found.dtype} ({_SOURCES[found.dtype_source]}), {how}."


def _left_out(found: VerifiedRecord) -> Iterator[str]:
    if found.num_excused:
        yield (
            f"Left out: what follows near ties of routers, in "
            f"{counted(found.num_excused, 'prompt')}."
        )
    if found.skipped:
        more = len(found.skipped) - _MOST_SKIPPED
        said = "; ".join(found.skipped[:_MOST_SKIPPED])
        yield f"Not asked: {said}{f'; {more} more' if more > 0 else ''}."


def _budget(found: VerifiedRecord) -> Iterator[str]:
    yield (
        f"A test is an alarm where its p-value is below {found.alarm:.2g}, so that all "
        f"{len(found.tests)} together alarm in at most {percent(found.false_alarms)} of runs on a "
        "server that only rounds."
    )
    yield from found.skipped


def _facts(results: Results, found: VerifiedRecord) -> Table:
    question = results.question
    return Table.facts(
        [
            ("server", f"{found.url} {found.software}".strip()),
            ("model", found.model),
            ("reference", found.reference),
            ("log-probabilities by", found.method),
            ("number type", f"{found.dtype}, {_SOURCES[found.dtype_source]}"),
            ("seed", str(question["seed"])),
            ("short prompts at least", str(question["num_prompts"])),
            ("took", duration(found.wall_s)),
        ]
    )
