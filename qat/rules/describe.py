"""Describes a placement: the page that qat.placement prints, its JSON, and the lines that every run prints."""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from qat.base.console import console, say
from qat.graph.network import Network
from qat.graph.operations import FLOAT_ONLY, WEIGHTED
from qat.rules.obstacles import KeptFloat
from qat.rules.place import RULES
from qat.rules.placement import Decision, Placement
from qat.rules.rule import RuleText

_TOGETHER = 40  # a module with more operations than this is listed by its submodules
_FORGOTTEN = RuleText("no longer among the rules", "the version that trained the checkpoint")


@dataclass(frozen=True)
class PlacementView:
    """A network and its placement.

    ``input_shape``: of the first input, without the batch. ``rules``: the texts of the rules that ``placement`` names.
    """

    title: str
    input_shape: tuple[int, ...]
    network: Network
    placement: Placement
    rules: Mapping[str, RuleText]


def texts_of(placement: Placement, recorded: Mapping[str, str] | None = None) -> dict[str, RuleText]:
    """The texts of the rules that ``placement`` names; sentences ``recorded`` when it was made take precedence."""
    names = [decision.rule for decision in placement.decisions] + [rule for _, _, rule in placement.reads()]
    found = {name: RULES[name].text if name in RULES else _FORGOTTEN for name in dict.fromkeys(names)}
    recorded = recorded or {}
    return {name: RuleText(recorded.get(name, text.sentence), text.source) for name, text in found.items()}


def say_placement(placement: Placement) -> None:
    """Prints what matters in a run: the summary, the layers that stay in float, and what the user kept in float."""
    say(f"placement: {'; '.join(placement.summary())}")
    for decision in placement.decisions:
        if not decision.quantized and (decision.kind in WEIGHTED or decision.rule == KeptFloat.name):
            say(f"  float: {decision.label}: {decision.reason}")


def placement_json(view: PlacementView) -> dict[str, object]:
    """The content of the file that --json writes."""
    return {
        "model": view.title,
        "input_shape": list(view.input_shape),
        "summary": view.placement.summary(),
        "placement": view.placement.to_json(),
        "scale_groups": view.placement.scale_groups(),
        "rules": {name: {"sentence": text.sentence, "source": text.source} for name, text in view.rules.items()},
    }


def print_placement(view: PlacementView) -> None:
    """Prints what is in INT8 and why, what is in float and why, which tensors share a scale, and the rules."""
    names = _names(view.network)
    say(f"{view.title}, input {'x'.join(map(str, view.input_shape))}")
    for line in view.placement.summary():
        say(line)
    decisions = view.placement.decisions
    _print_decisions("INT8", names, [decision for decision in decisions if decision.quantized])
    _print_decisions("float", names, [decision for decision in decisions if not decision.quantized])
    others = [names[op.name] for op in view.network if op.kind in FLOAT_ONLY]
    if others:
        say(f"\nfloat, because no rule makes these operations INT8 ({len(others)})")
        _print_names(others)
    groups = view.placement.scale_groups()
    if groups:
        say("\nshared scales")
    for number, (quantizer, tensors) in enumerate(groups.items(), 1):
        _print_wrapped(f"{number}. {names[quantizer]}:", [names[tensor] for tensor in tensors])
    for source in dict.fromkeys(rule.source for rule in view.rules.values()):
        say(f"\nrules from {source}")
        for name, rule in view.rules.items():
            if rule.source == source:
                _print_wrapped(f"{name}:", rule.sentence.split())


def _print_decisions(title: str, names: Mapping[str, str], decisions: Iterable[Decision]) -> None:
    """Prints the operations grouped by the rule and the reason of their decision."""
    groups: dict[tuple[str, str], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((decision.rule, decision.reason), []).append(decision)
    for (rule, reason), alike in groups.items():
        counts = Counter(decision.kind.replace("_", " ") for decision in alike)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        say(f"\n{title} by {rule}{f': {reason}' if reason else ''} ({kinds})")
        _print_names([names[decision.op] for decision in alike])


def _print_names(names: list[str]) -> None:
    for prefix, rest in _by_module(names):
        _print_wrapped(f"{prefix}:" if prefix else "", rest)


def _by_module(names: list[str], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Names grouped by their common module: (module, rest of each name); '' for names without a group."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
    alone = [group[0] for group in groups.values() if len(group) == 1]
    if alone:
        yield "", alone
    for group in groups.values():
        levels = zip(*(name.split(".")[:-1] for name in group), strict=False)
        module = "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        if len(group) > _TOGETHER and len(module) > len(prefix):
            yield from _by_module(group, module)
        elif len(group) > 1:
            yield module.rstrip("."), [name.removeprefix(module) for name in group]


def _print_wrapped(label: str, words: Iterable[str]) -> None:
    """Prints a label and words, wrapped between words."""
    text = textwrap.fill(
        " ".join(words),
        width=console.width,
        initial_indent=f"  {label} " if label else "  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    say(text)


def _names(network: Network) -> dict[str, str]:
    """The shown name of every operation: its label, or its own name if several have the same label."""
    labels = Counter(op.label for op in network)
    return {op.name: op.label if labels[op.label] == 1 else op.name for op in network}
