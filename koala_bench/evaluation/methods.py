"""Methods ready to decode: head (trained or training-free), tree, and entry in the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from koala_bench.common.draft_vocabulary import BUFFER
from koala_bench.common.progress import log_line
from koala_bench.decoding.hybrid import Hybrid
from koala_bench.decoding.loop import VANILLA_TREE, Vanilla
from koala_bench.engine.loading.targets import fingerprint
from koala_bench.engine.target import Target
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import DraftHead
from koala_bench.presets import EvaluationPreset, MethodPreset, Preset
from koala_bench.records.schema import MethodInfo, TrainingInfo, TreeInfo, TypicalInfo
from koala_bench.registry import OBJECTIVES, installed, load
from koala_bench.training.checkpoints import load_head, read_manifest
from koala_bench.training.experiment import VANILLA, first_head, free_head, methods_with_heads
from koala_bench.tree import Template, load_template


@dataclass(frozen=True)
class Method:
    """A method ready to decode."""

    name: str
    head: DraftHead
    template: Template
    info: MethodInfo


def load_methods(preset: Preset, names: Sequence[str], target: Target, heads: Path) -> list[Method]:
    """Load the trained head of every method, vanilla first. Raises KoalaBenchError where a head is not trained, damaged
    or of another target, or cannot fill its tree."""
    info = _info(name=VANILLA, head=None, layers=0, parameters=0, tree=_tree(VANILLA_TREE))
    methods = [Method(VANILLA, Vanilla(), VANILLA_TREE, info)]
    for name in methods_with_heads(preset, names):
        wanted = preset.method(name)
        template = load_template(wanted.tree)
        head = free_head(wanted, target)
        vocabulary = target.config.vocab_size
        if head is not None:
            parameters = getattr(head, "drafting_parameters", 0)
            info = _info(head=wanted.head, layers=wanted.layers, parameters=parameters)
        else:
            head, info = _trained(preset, name, target, heads)
            vocabulary = info.get("draft_vocabulary", vocabulary)
        template.check(depth=head.max_depth, candidates=vocabulary)
        info |= {
            "name": name,
            "tree": _tree(template, getattr(head, "dynamic", False)),
            "typical": _typical(name, wanted, preset.evaluation),
            "lossless": wanted.typical is None,
        }
        methods.append(_with_first(Method(name, head, template, info), wanted, target))
    return methods


def _info(**values: Any) -> MethodInfo:
    """What is the same of a method that has nothing trained, with ``values`` in place."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("name", "head", "layers", "adversarial", "parameters", "tree", "checkpoint", "weights_sha256")
    )
    nothing |= {"adversarial": False, "training": None, "typical": None, "lossless": True}
    return cast(MethodInfo, nothing | values)


def _trained(preset: Preset, name: str, target: Target, heads: Path) -> tuple[DraftHead, MethodInfo]:
    """A method's trained head and its part of the record."""
    place = heads / preset.trained_as(name)
    head, config, weights = load_head(place, target, preset.method(name).draft_vocabulary)
    trained_on, training = _training(place)
    if trained_on not in (None, fingerprint(target)["weights_sha256"]):
        log_line(f"The head in {place} was trained on other weights than those of {target.name}: it will draft worse.")
    info = _info(
        head=config["head"],
        layers=config["layers"],
        adversarial=_learns(config["objective"]),
        parameters=sum(p.numel() for p in head.parameters()),
        checkpoint=_relative(place),
        weights_sha256=weights,
        training=training,
    )
    if config["objective"] is not None:
        info["objective"] = config["objective"]
    if (drafted := getattr(head, BUFFER, None)) is not None:
        info["draft_vocabulary"] = len(drafted)
    return head, info


def _relative(place: Path) -> str:
    """Path relative to the working directory, so that records hold no absolute paths."""
    absolute = place.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else place)


def _learns(objective: str | None) -> bool:
    """Whether an objective has parameters trained against the head; assumed of one that is not installed here."""
    if objective is None or (":" not in objective and objective not in installed(OBJECTIVES)):
        return objective is not None
    return bool(getattr(load(OBJECTIVES, objective), "learns", True))


def _with_first(method: Method, preset: MethodPreset, target: Target) -> Method:
    """The method with the head before its own that its preset names, if any."""
    first = first_head(preset, target)
    if first is None or preset.first is None:
        return method
    templates = load_template(preset.first.tree), method.template
    head = Hybrid(first, method.head, templates)
    tree: TreeInfo = {
        "name": " or ".join(template.name for template in templates),
        "nodes": head.template.nodes,
        "depth": max(template.depth for template in templates),
        "parents": None,
    }
    return replace(method, head=head, template=head.template, info={**method.info, "tree": tree})


def _tree(template: Template, dynamic: bool = False) -> TreeInfo:
    parents = None if dynamic or template.dynamic else list(template.shape.parents)
    return {"name": template.name, "nodes": template.nodes, "depth": template.depth, "parents": parents}


def _typical(name: str, preset: MethodPreset, evaluation: EvaluationPreset) -> TypicalInfo | None:
    if preset.typical is None:
        return None
    if evaluation.temperature == 0:
        raise KoalaBenchError(
            f"{name} uses typical acceptance, which needs a temperature above 0.", "Give a --temperature such as 0.7."
        )
    return {"threshold": preset.typical.threshold, "alpha": preset.typical.alpha}


def _training(folder: Path) -> tuple[str | None, TrainingInfo | None]:
    """Hash of the target that a head was trained on, and its training for the record; None for an imported head. Raises
    KoalaBenchError where the manifest beside the head is damaged."""
    place = folder / "training.json"
    manifest = read_manifest(folder) if place.exists() else {}
    try:
        if manifest is None:
            raise ValueError("not a JSON object")
        weights: str | None = manifest["target"]["weights_sha256"] if "target" in manifest else None
        if "stream_sha256" not in manifest:
            return weights, None
        found = {name: manifest[name] for name in ("stream_sha256", "order_sha256", "steps", "tokens")}
        training = manifest["training"]
        found |= {name: training[name] for name in ("seed", "precision") if name in training}
        if "chat_template" in manifest:
            found["chat_template"] = manifest["chat_template"]
        return weights, TypeAdapter(TrainingInfo).validate_python(found)
    except (ValueError, KeyError, TypeError) as error:  # pydantic's own is a ValueError
        raise KoalaBenchError(f"{place} is damaged.", "Train the head again.") from error
