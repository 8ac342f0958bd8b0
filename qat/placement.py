"""Show what is quantized and why, what stays in float and why, and which tensors share a scale.

    python -m qat.placement resnet50 --svg resnet50.svg
    python -m qat.placement timm/darknet53 --json placement.json --keep-float stem 'head.*'
    python -m qat.placement runs/model.qat --svg model.svg

Of a checkpoint, the placement that it was trained with is shown; of a model, that which python -m qat.train would
choose with the same options.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from qat.base.artifact import atomic_write, check_writable, sidecar_path, write_json
from qat.base.console import Command, console, run_command, say
from qat.base.errors import UserError
from qat.graph.network import Network
from qat.graph.operations import WEIGHTED
from qat.rules.keep_float import KEPT_FLOAT
from qat.rules.place import RULES, Rule, place
from qat.rules.placement import Decision, Placement

IMAGE_SIZE, CLASSES = 224, 1000
TOGETHER = 40  # operations of one module that are listed under its name; those of a larger one by its parts


@dataclass(frozen=True, kw_only=True)
class PlacementOptions(Command):
    """The options of ``python -m qat.placement``."""

    model: Annotated[str, tyro.conf.Positional]
    """A torchvision model, timm/NAME, path/to/file.py:function, or a checkpoint that python -m qat.train wrote."""
    keep_float: tuple[str, ...] = ()
    """Patterns (* ? []) of modules, operations and tensors that stay in float, by the names that are shown here."""
    image_size: int | None = None
    """Height and width of the input in pixels; by default 224."""
    num_classes: int | None = None
    """Classes of the model; by default 1000."""
    json: Path | None = None
    """The placement, the scale groups and the rules are written there as JSON."""
    svg: Path | None = None
    """A picture of the graph is written there as SVG."""


@dataclass(frozen=True)
class Shown:
    """A network and what was decided about it. ``rules`` are those that ``placement`` names."""

    title: str
    input_shape: tuple[int, int, int]
    network: Network
    placement: Placement
    rules: Mapping[str, Rule]


def main(options: PlacementOptions) -> None:
    """Prints the placement and writes what was asked for. Torch is imported later, so that --help answers at once."""
    for path in (options.json, options.svg):
        if path is not None:
            check_writable(path)
    path = Path(options.model)
    is_checkpoint = path.suffix == ".qat" or path.is_file() or sidecar_path(path).is_file()
    shown = of_checkpoint(options, path) if is_checkpoint else of_model(options)
    _print(shown)
    if options.json is not None:
        write_json(options.json, as_json(shown))
        say(f"JSON: {options.json}")
    if options.svg is not None:
        from qat.rules.drawing import draw

        picture = draw(shown.network, shown.placement, shown.rules, shown.title, shown.placement.summary())
        with atomic_write(options.svg) as temporary:
            temporary.write_text(picture, encoding="utf-8")
        say(f"picture: {options.svg}")


def of_model(options: PlacementOptions) -> Shown:
    """The placement of a model by name, as it would be trained."""
    from qat.graph.tracing import network_of
    from qat.models import ModelSpec, build_model

    size = IMAGE_SIZE if options.image_size is None else options.image_size
    classes = CLASSES if options.num_classes is None else options.num_classes
    network = network_of(build_model(ModelSpec(options.model, classes)), (3, size, size))
    placement = place(network, options.keep_float)
    return Shown(options.model, (3, size, size), network, placement, _rules(placement, {}))


def of_checkpoint(options: PlacementOptions, path: Path) -> Shown:
    """The placement that a checkpoint was trained with."""
    for name in ("keep_float", "image_size", "num_classes"):
        if getattr(options, name) not in (None, ()):
            raise UserError(
                f"--{name.replace('_', '-')} was fixed when {path} was trained: leave it out, or give the model's name"
            )
    from qat.checkpoint import load_checkpoint
    from qat.fake_quantize.prepare import placement_of
    from qat.graph.tracing import network_of
    from qat.models import ModelSpec, build_model

    checkpoint = load_checkpoint(path)
    details, preprocessing = checkpoint.sidecar.details, checkpoint.preprocessing
    shape = (3, preprocessing.height, preprocessing.width)
    network = network_of(build_model(ModelSpec(**details["model"])), shape)
    placement = placement_of(checkpoint.model)
    return Shown(f"{path} ({details['model']['name']})", shape, network, placement, _rules(placement, details["rules"]))


def say_placement(placement: Placement) -> None:
    """Prints what a run needs to be told: the summary, the layers that stay in float, and what was kept so."""
    say(f"placement: {'; '.join(placement.summary())}")
    for decision in placement.decisions:
        if not decision.quantized and (decision.kind in WEIGHTED or decision.rule == KEPT_FLOAT):
            say(f"  float: {decision.label}: {decision.reason}")


def as_json(shown: Shown) -> dict[str, object]:
    """What --json writes."""
    return {
        "model": shown.title,
        "input_shape": list(shown.input_shape),
        "summary": shown.placement.summary(),
        "placement": shown.placement.to_json(),
        "scale_groups": shown.placement.scale_groups(),
        "rules": {name: {"sentence": rule.sentence, "source": rule.source} for name, rule in shown.rules.items()},
    }


def _rules(placement: Placement, recorded: Mapping[str, str]) -> dict[str, Rule]:
    """The rules that ``placement`` names, with the sentences that were ``recorded`` when it was made."""
    names = [decision.rule for decision in placement.decisions] + [rule for _, _, rule in placement.reads()]
    unknown = Rule("no longer among the rules", "the version that trained the checkpoint")
    found = {name: RULES.get(name, unknown) for name in dict.fromkeys(names)}
    return {name: Rule(recorded.get(name, rule.sentence), rule.source) for name, rule in found.items()}


# --- the printed page


def _print(shown: Shown) -> None:
    names = _names(shown.network)
    say(f"{shown.title}, input {'x'.join(map(str, shown.input_shape))}")
    for line in shown.placement.summary():
        say(line)
    decisions = shown.placement.decisions
    _print_decisions("INT8", names, [decision for decision in decisions if decision.quantized])
    _print_decisions("float", names, [decision for decision in decisions if not decision.quantized])
    others = [names[op.name] for op in shown.network if op.kind == "other"]
    if others:
        say(f"\nfloat, since no rule knows these operations ({len(others)})")
        _print_names(others)
    groups = shown.placement.scale_groups()
    if groups:
        say("\nshared scales")
    for number, (quantizer, tensors) in enumerate(groups.items(), 1):
        _wrapped(f"{number}. {names[quantizer]}:", [names[tensor] for tensor in tensors])
    for source in dict.fromkeys(rule.source for rule in shown.rules.values()):
        say(f"\nrules from {source}")
        for name, rule in shown.rules.items():
            if rule.source == source:
                _wrapped(f"{name}:", rule.sentence.split())


def _print_decisions(title: str, names: Mapping[str, str], decisions: Iterable[Decision]) -> None:
    """The operations under the rule and the reason of their decision."""
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
        _wrapped(f"{prefix}:" if prefix else "", rest)


def _by_module(names: list[str], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Names under the module that they have in common: (module, rest of the names); '' for those that stand alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
    alone = [group[0] for group in groups.values() if len(group) == 1]
    if alone:
        yield "", alone
    for group in groups.values():
        levels = zip(*(name.split(".")[:-1] for name in group), strict=False)
        module = "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))
        if len(group) > TOGETHER and len(module) > len(prefix):
            yield from _by_module(group, module)
        elif len(group) > 1:
            yield module.rstrip("."), [name.removeprefix(module) for name in group]


def _wrapped(label: str, words: Iterable[str]) -> None:
    """A line of words behind a label, on as many lines as they need; words are not broken."""
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
    """What every operation is called: its label, or its own name where several have that label."""
    labels = Counter(op.label for op in network)
    return {op.name: op.label if labels[op.label] == 1 else op.name for op in network}


if __name__ == "__main__":
    run_command(main, PlacementOptions)
