"""Numerical parity with the official Medusa and EAGLE code, judged on a folder of recorded inputs, weights and outputs.

The folder says what there is to compare: sizes, trees, prompts and numbers of heads are all read from it. Its parts are
``medusa_tiny``, ``medusa_decode``, ``eagle_tiny``, ``eagle_decode`` and ``losses``, laid out as in the README that comes with
the recordings; a part that is missing is skipped by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from koala_bench.acceptance import greedy
from koala_bench.decoding import Decoded, decode
from koala_bench.errors import KoalaBenchError
from koala_bench.heads import Committed, FeatureBatch
from koala_bench.interop import Fields, Imported, eagle, make_head, medusa, read_json, read_tensors
from koala_bench.target import Target, load_target
from koala_bench.tree import DraftTree, TreeShape, TreeTemplate

PARTS = ("medusa_tiny", "medusa_decode", "eagle_tiny", "eagle_decode", "losses")

# Tolerances of the recordings' README.
_OUTPUTS_ABSOLUTE = 1e-4
_LOSSES_RELATIVE = 1e-4
_GRADIENTS_RELATIVE = 1e-3

_TABLE_WIDTH = 10  # upstream's TOPK: candidates kept per head (Medusa) or per inner node (EAGLE)

Status = Literal["pass", "fail", "skip", "unsupported"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: part and quantity, such as ``medusa_decode/accept_lengths``.
        status: ``skip`` where the recordings lack something, ``unsupported`` where this project does.
        detail: how much was compared and how well it fits, or what is wrong.
    """

    name: str
    status: Status
    detail: str


class _Recordings:
    """The folder, with the targets that were already loaded from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._targets: dict[str, Target] = {}

    def absent(self, *paths: str) -> str:
        """Those of some paths that do not exist, as text; empty if all do."""
        return ", ".join(path for path in paths if not (self.folder / path).exists())

    def target(self, path: str) -> Target:
        if path not in self._targets:
            self._targets[path] = load_target(str(self.folder / path), "cpu", "float32", tokenizer=False)
        return self._targets[path]

    def json(self, path: str) -> Fields:
        return read_json(self.folder / path)

    def tensors(self, path: str) -> Fields:
        """Tensors with their numbers as float32 and int64, whatever they are stored as."""
        found = read_tensors(self.folder / path)
        return Fields(found.path, {name: tensor.float() if tensor.is_floating_point() else tensor.long() for name, tensor in found.items()})

    def medusa(self, path: str, target: Target) -> Imported:
        return medusa.read(self.folder / path, target.spec())

    def eagle(self, path: str, target: Target) -> Imported:
        return eagle.read(self.folder / path, target.spec())


def check(folder: Path) -> list[Check]:
    """Compare the project with everything in a folder of recordings.

    Raises:
        KoalaBenchError: the folder holds no recordings, or a file in it is damaged or lacks a field.
    """
    if not folder.is_dir():
        raise KoalaBenchError(f"There is no folder {folder}.", "Give a folder of recordings of the official code.")
    if not any((folder / part).is_dir() for part in PARTS):
        raise KoalaBenchError(f"{folder} holds none of {', '.join(PARTS)}.", "Give a folder of recordings of the official code.")
    recordings = _Recordings(folder)
    checks: list[Check] = []
    for part, run in zip(PARTS, (_medusa_tiny, _medusa_decode, _eagle_tiny, _eagle_decode, _losses), strict=True):
        checks += run(recordings, part) if (folder / part).is_dir() else [Check(part, "skip", f"{part} is absent")]
    return checks


def ok(checks: Iterable[Check]) -> bool:
    """Whether nothing failed."""
    return all(each.status != "fail" for each in checks)


def report(checks: Sequence[Check]) -> str:
    """A line for each check, then how many there were of each status."""
    width = max((len(each.name) for each in checks), default=0)
    lines = [f"{each.status:<11}  {each.name:<{width}}  {each.detail}".rstrip() for each in checks]
    counts = Counter(each.status for each in checks)
    return "\n".join([*lines, f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped, {counts['unsupported']} unsupported"])


@dataclass(frozen=True)
class _Drafter:
    """A head on its target, with the tree that it fills.

    Attributes:
        rows: leaf paths of the tree, padded with -1, in the order of the recordings.
    """

    target: Target
    head: Any
    template: TreeTemplate
    rows: list[list[int]]


# ------------------------------------------------------------------------------ comparing


def _absent(name: str, absent: str) -> list[Check]:
    return [Check(name, "skip", f"{absent} is absent")]


def _judge(name: str, faults: Sequence[str], detail: str) -> Check:
    """A check that passes if there are no faults; otherwise the first one is told."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, "fail", faults[0] + more) if faults else Check(name, "pass", detail)


def _near(name: str, pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]], allowed: float = _OUTPUTS_ABSOLUTE) -> Check:
    """Compare tensors (what, ours, recorded) by their largest difference."""
    faults, worst, count = [], 0.0, 0
    for what, ours, recorded in pairs:
        count += 1
        if ours.shape != recorded.shape:
            faults.append(f"{what}: shape {list(ours.shape)}, recorded {list(recorded.shape)}")
            continue
        difference = float((ours - recorded).abs().max()) if ours.numel() else 0.0
        worst = max(worst, difference)
        if not difference <= allowed:  # so that nan fails
            faults.append(f"{what}: differs by {difference:.1e}, {allowed:.0e} is allowed")
    return _judge(name, faults, f"{count} compared, largest difference {worst:.1e}") if count else Check(name, "skip", "nothing of it is recorded")


def _relative(name: str, pairs: Iterable[tuple[str, float, float]], allowed: float) -> Check:
    """Compare numbers (what, ours, recorded) by their relative difference."""
    faults, worst, count = [], 0.0, 0
    for what, ours, recorded in pairs:
        count += 1
        difference = abs(ours - recorded) / max(abs(recorded), 1e-6)
        worst = max(worst, difference)
        if not difference <= allowed:
            faults.append(f"{what} is {ours:.6g}, recorded {recorded:.6g}")
    return _judge(name, faults, f"{count} compared, largest relative difference {worst:.1e}") if count else Check(name, "skip", "nothing of it is recorded")


def _prompts(tensors: Fields) -> list[int]:
    """Numbers of the recorded prompts."""
    return sorted(int(found[1]) for name in tensors if (found := re.fullmatch(r"prompt(\d+)\.input_ids", name)))


def _on_either_base(imported: Imported, run: Callable[[Imported], list[Check]]) -> list[Check]:
    """Run checks of an EAGLE draft whose configuration names a RoPE base; branch v1 ignores it, later code does not."""
    found = run(imported)
    if ok(found) or imported.options["rope_base"] == eagle.FIXED_ROPE_BASE:
        return found
    fixed = run(replace(imported, options={**imported.options, "rope_base": eagle.FIXED_ROPE_BASE}))
    said = f"; with RoPE base {eagle.FIXED_ROPE_BASE:.0f}, as branch v1 of upstream whatever the configuration says"
    return [replace(each, detail=each.detail + said) for each in fixed] if ok(fixed) else found


# ------------------------------------------------------------------------------ one forward pass


def _predictions(head: Any, target: Target, next_ids: torch.Tensor, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a head says at every state, through the loss that it is trained with.

    Args:
        next_ids: int64 [tokens], the token after each state's own.
        hidden: [tokens, hidden_size].
    Returns:
        predicted features [tokens, hidden_size] and logits [tokens, vocab_size] for each drafting depth.
    """
    count = len(next_ids)
    # Something must stand behind the last state for its deepest guess to have a label; nothing causal can see it.
    beyond = head.max_depth + 1
    ids = torch.cat([next_ids[:1], next_ids, next_ids.new_zeros(beyond)])[None]
    states = torch.cat([hidden, hidden.new_zeros(1 + beyond, hidden.shape[-1])])[None, :, None]
    with torch.no_grad():
        found = head.loss(FeatureBatch(ids, torch.ones_like(ids, dtype=torch.bool), states, 0, target.output, torch.tensor([ids.shape[1]])))
    return [(each.feature[each.rows < count], each.logits[each.rows < count]) for each in found.predictions]


def _states(target: Target, ids: torch.Tensor) -> torch.Tensor:
    """States [..., tokens, hidden_size] after the final norm, free of the inference mode they come from."""
    return target.states(ids if ids.ndim == 2 else ids[None]).clone()[:, :, -1].view(*ids.shape, -1)


def _medusa_tiny(recordings: _Recordings, part: str) -> list[Check]:
    if absent := recordings.absent(f"{part}/target", f"{part}/expected.safetensors"):
        return _absent(part, absent)
    target, expected = recordings.target(f"{part}/target"), recordings.tensors(f"{part}/expected.safetensors")
    prompts = _prompts(expected)
    states = {i: _states(target, expected[f"prompt{i}.input_ids"]) for i in prompts}
    checks = [
        _near(f"{part}/hidden_states", ((f"prompt {i}", states[i], expected[f"prompt{i}.hidden_states"]) for i in prompts)),
        _near(f"{part}/base_logits", ((f"prompt {i}", target.output(states[i]), expected[f"prompt{i}.base_logits"]) for i in prompts)),
    ]
    recorded = {found[1] for name in expected if (found := re.fullmatch(r"prompt\d+\.(.+)\.medusa_logits", name))}
    stored = {path.name.removeprefix("heads_") for path in (recordings.folder / part).glob("heads_*") if path.is_dir()}
    for kind in sorted(recorded | stored):
        name, folder = f"{part}/medusa_logits/{kind}", f"{part}/heads_{kind}"
        if absent := recordings.absent(folder):
            checks += _absent(name, absent)
            continue
        head = make_head(recordings.medusa(folder, target), target.spec())
        checks.append(_near(name, _medusa_logits(head, target, expected, states, kind)))
    return checks


def _medusa_logits(head: Any, target: Target, expected: Fields, states: dict[int, torch.Tensor], kind: str) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    for i, hidden in states.items():
        if (recorded := expected.get(f"prompt{i}.{kind}.medusa_logits")) is not None:
            ours = torch.stack([logits for _, logits in _predictions(head, target, expected[f"prompt{i}.input_ids"], hidden)])
            yield f"prompt {i}", ours, recorded


def _eagle_tiny(recordings: _Recordings, part: str) -> list[Check]:
    where = "medusa_tiny/target"
    if absent := recordings.absent(where, f"{part}/draft", f"{part}/expected.safetensors"):
        return _absent(part, absent)
    target, expected = recordings.target(where), recordings.tensors(f"{part}/expected.safetensors")
    template = _eagle_template(recordings, part)

    def run(imported: Imported) -> list[Check]:
        head = make_head(imported, target.spec())
        prompts = _prompts(expected)
        found = {i: _predictions(head, target, expected[f"prompt{i}.shifted_ids"], expected[f"prompt{i}.hidden_states"])[0] for i in prompts}
        checks = [
            _near(
                f"{part}/hidden_states",
                ((f"prompt {i}", _states(target, expected[f"prompt{i}.input_ids"]), expected[f"prompt{i}.hidden_states"]) for i in prompts),
            ),
            _near(f"{part}/out_features", ((f"prompt {i}", found[i][0], expected[f"prompt{i}.out_features"]) for i in prompts)),
            _near(f"{part}/out_logits", ((f"prompt {i}", found[i][1], expected[f"prompt{i}.out_logits"]) for i in prompts)),
        ]
        if template is None:
            return [
                *checks,
                *(Check(f"{part}/{name}", "skip", "eagle_decode/buffers.json, which has the tree, is absent") for name in ("tree_tokens", "tree_topk")),
            ]
        drafter = _Drafter(target, head, template, _leaf_rows(template.shape, sort=True))
        return [*checks, *_excuse_misdrafted(_eagle_tree(part, drafter, expected), template)]

    return _on_either_base(recordings.eagle(f"{part}/draft", target), run)


def _eagle_template(recordings: _Recordings, part: str) -> TreeTemplate | None:
    """The static tree, which is recorded once for both EAGLE parts."""
    path = next((path for path in (f"{part}/buffers.json", "eagle_decode/buffers.json") if not recordings.absent(path)), None)
    return None if path is None else _template(recordings.json(path), "tree_choices")


def _template(buffers: Fields, key: str) -> TreeTemplate:
    return TreeTemplate.of(str(buffers.get("tree", key)), buffers[key])


def _eagle_tree(part: str, drafter: _Drafter, expected: Fields) -> list[Check]:
    """Tree tokens as drafted for decoding, and the candidate table of each inner node, computed path by path."""
    template = drafter.template
    inner = [(), *(path for path in template.paths if any(other[:-1] == path for other in template.paths))]
    tokens_wrong: list[str] = []
    ranks_wrong: list[str] = []
    logits: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for i in _prompts(expected):
        next_ids, hidden = expected[f"prompt{i}.shifted_ids"], expected[f"prompt{i}.hidden_states"]
        drafted = _draft(drafter, next_ids, hidden)
        wanted = expected[f"prompt{i}.tree_tokens"].tolist()
        if drafted != wanted:
            tokens_wrong.append(_first_difference(f"prompt {i}", drafted, wanted))
        table_tokens, table_logits = expected[f"prompt{i}.tree_topk_tokens"], expected[f"prompt{i}.tree_topk_logits"]
        if len(table_tokens) != len(inner):
            ranks_wrong.append(f"prompt {i}: {len(table_tokens)} inner nodes are recorded, the tree '{template.name}' has {len(inner)}")
            continue
        ours = _inner_logits(drafter, inner, drafted, next_ids, hidden)
        best = ours.topk(table_tokens.shape[1], dim=-1)
        logits.append((f"prompt {i}", ours.gather(1, table_tokens), table_logits))
        logits.append((f"prompt {i}, sorted", best.values, table_logits))
        # Candidates closer to each other than the outputs need to agree may change places.
        apart = (best.indices != table_tokens) & ((ours.gather(1, table_tokens) - best.values).abs() > 2 * _OUTPUTS_ABSOLUTE)
        if apart.any():
            row, rank = apart.nonzero()[0].tolist()
            ranks_wrong.append(
                f"prompt {i}: candidate {rank} of node {list(inner[row])} is {int(best.indices[row, rank])}, recorded {int(table_tokens[row, rank])}"
            )
    return [
        _judge(f"{part}/tree_tokens", tokens_wrong, f"{len(_prompts(expected))} trees of {template.nodes} tokens are equal"),
        _judge(f"{part}/tree_topk_tokens", ranks_wrong, f"{len(_prompts(expected))} tables of {len(inner)} inner nodes agree"),
        _near(f"{part}/tree_topk_logits", logits),
    ]


def _draft(drafter: _Drafter, next_ids: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """The tokens a head drafts after a prompt, root first."""
    drafter.head.begin(drafter.template, len(next_ids) + drafter.template.nodes)
    with torch.inference_mode():
        tree: DraftTree = drafter.head.draft(Committed(next_ids, hidden[:, None], 0))
    return tree.tokens.tolist()


def _inner_logits(drafter: _Drafter, inner: Sequence[tuple[int, ...]], drafted: Sequence[int], next_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [inner nodes, vocab_size] for the children of each inner node: its path is a sequence of its own, read whole."""
    node = {path: index for index, path in enumerate([(), *drafter.template.paths])}
    features: dict[tuple[int, ...], torch.Tensor] = {}
    logits = []
    for path in inner:
        above = [path[:depth] for depth in range(len(path))]
        ids = torch.cat([next_ids, next_ids.new_tensor([drafted[node[each]] for each in [*above, path][1:]])])
        states = torch.cat([hidden, *(features[each][None] for each in above)])
        feature, said = _predictions(drafter.head, drafter.target, ids, states)[0]
        features[path] = feature[-1]
        logits.append(said[-1])
    return torch.stack(logits)


# ------------------------------------------------------------------------------ trees


def _leaf_rows(shape: TreeShape, sort: bool) -> list[list[int]]:
    """Leaf paths padded with -1, in upstream's order: Medusa lists the last leaf first, EAGLE sorts the rows."""
    paths = [list(path) for path in reversed(shape.leaf_paths)]
    width = max(map(len, paths))
    if sort:
        paths.sort(key=lambda path: path + [shape.nodes] * (width - len(path)))  # padding sorts last
    return [path + [-1] * (width - len(path)) for path in paths]


def _inner_nodes(shape: TreeShape) -> list[int]:
    return [node for node, below in enumerate(shape.children) if below]


def _draft_levels(template: TreeTemplate) -> list[dict[str, Any]]:
    """What upstream's EAGLE needs to draft each level: the inner nodes below the root, level by level.

    An index counts only parents that have inner nodes below them, as upstream's ``utils_c.py`` does; see ``_misdrafted``.
    """
    shape = template.shape
    inner = _inner_nodes(shape)[1:]
    levels = []
    for depth in range(1, template.depth):
        level = [node for node in inner if shape.depths[node] == depth]
        seen = [node for node in inner if shape.depths[node] <= depth]
        parents = [list(group) for _, group in groupby(level, key=lambda node: shape.parents[node])]
        levels.append({
            "attn_mask": shape.ancestors[level][:, seen].int().tolist(),
            "tree_indices": [template.paths[node - 1][-1] + _TABLE_WIDTH * index for index, group in enumerate(parents) for node in group],
            "position_ids": [0] * len(level),
            "repeat_nums": [len(group) for group in parents],
        })  # fmt: skip
    return levels


_MISDRAFTED = "in this tree an inner node whose children are all leaves stands before one with inner children; upstream then drafts from the wrong parent"


def _misdrafted(template: TreeTemplate) -> bool:
    """Whether upstream's EAGLE drafts this tree from wrong parents: it numbers parents by those that have inner children."""
    shape = template.shape
    inner = set(_inner_nodes(shape))
    for depth in range(1, template.depth - 1):
        grows = [any(child in inner for child in shape.children[node]) for node in sorted(inner) if shape.depths[node] == depth]
        if grows != sorted(grows, reverse=True):
            return True
    return False


def _excuse_misdrafted(checks: Sequence[Check], template: TreeTemplate) -> list[Check]:
    """What depends on the drafts cannot fail where upstream's drafts are wrong; the text is the target's own all the same."""

    def excused(each: Check) -> bool:
        return each.status == "fail" and not each.name.endswith("generated_ids")

    return [replace(each, status="unsupported", detail=_MISDRAFTED) if _misdrafted(template) and excused(each) else each for each in checks]


def _buffers(part: str, buffers: Fields, template: TreeTemplate, names: dict[str, str], eagle_like: bool) -> list[Check]:
    """Compare mask, indices, depths and leaf paths; ``names`` says how the recordings call mask and depths."""
    shape = template.shape
    tables = {node: row for row, node in enumerate(_inner_nodes(shape))}
    # A table of candidates for every inner node, or one for every head.
    rows = [tables[shape.parents[node]] if eagle_like else shape.depths[node] - 1 for node in range(1, shape.nodes)]
    ours: dict[str, Any] = {
        names["mask"]: shape.ancestors.int().tolist(),
        "tree_indices": [0, *(path[-1] + _TABLE_WIDTH * row + 1 for path, row in zip(template.paths, rows, strict=True))],
        names["depths"]: list(shape.depths),
        "retrieve_indices": _leaf_rows(shape, eagle_like),
    }
    if eagle_like and "draft_levels" in buffers:
        ours["draft_levels"] = _draft_levels(template)
    return [
        _judge(f"{part}/{name}", [] if buffers[name] == value else [_first_difference(name, value, buffers[name])], f"{len(value)} rows are equal")
        for name, value in ours.items()
    ]


# ------------------------------------------------------------------------------ decoding


def _first_difference(where: str, ours: Sequence[Any], recorded: Sequence[Any]) -> str:
    for i, (mine, theirs) in enumerate(zip(ours, recorded, strict=False)):
        if mine != theirs:
            return f"{where}, entry {i}: {_short(mine)}, recorded {_short(theirs)}"
    return f"{where}: {len(ours)} entries, recorded {len(recorded)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _stop_ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [int(value)]


def _medusa_decode(recordings: _Recordings, part: str) -> list[Check]:
    if absent := recordings.absent(f"{part}/buffers.json"):
        return _absent(part, absent)
    buffers = recordings.json(f"{part}/buffers.json")
    template = _template(buffers, "medusa_choices")
    checks = _buffers(part, buffers, template, {"mask": "medusa_attn_mask", "depths": "medusa_position_ids"}, eagle_like=False)
    rows = _leaf_rows(template.shape, sort=False)
    if absent := recordings.absent(f"{part}/target", f"{part}/heads", f"{part}/decode.json"):
        checks += _absent(f"{part}/decode", absent)
    else:
        target = recordings.target(f"{part}/target")
        head = make_head(recordings.medusa(f"{part}/heads", target), target.spec())
        checks += _decoded(part, _Drafter(target, head, template, rows), recordings.json(f"{part}/decode.json"))
    if absent := recordings.absent(f"{part}/typical.json", f"{part}/typical.safetensors"):
        return [*checks, *_absent(f"{part}/typical", absent)]
    return [*checks, *_posterior(part, template, rows, recordings.json(f"{part}/typical.json"), recordings.tensors(f"{part}/typical.safetensors"))]


def _eagle_decode(recordings: _Recordings, part: str) -> list[Check]:
    checks: list[Check] = []
    if absent := recordings.absent(f"{part}/buffers.json"):
        checks += _absent(part, absent)
    else:
        buffers = recordings.json(f"{part}/buffers.json")
        template = _template(buffers, "tree_choices")
        checks += _buffers(part, buffers, template, {"mask": "tree_attn_mask", "depths": "tree_position_ids"}, eagle_like=True)
        where = "medusa_decode/target"
        if absent := recordings.absent(where, f"{part}/draft", f"{part}/decode.json"):
            checks += _absent(f"{part}/decode", absent)
        else:
            target, recorded, rows = recordings.target(where), recordings.json(f"{part}/decode.json"), _leaf_rows(template.shape, sort=True)

            def run(imported: Imported) -> list[Check]:
                drafter = _Drafter(target, make_head(imported, target.spec()), template, rows)
                return _excuse_misdrafted(_decoded(part, drafter, recorded), template)

            checks += _on_either_base(recordings.eagle(f"{part}/draft", target), run)
    if not recordings.absent(f"{part}/decode_eagle2.json"):
        checks.append(Check(f"{part}/decode_eagle2", "unsupported", "dynamic draft trees (EAGLE-2) are not part of this project yet"))
    return checks


def _decode(drafter: _Drafter, entry: Fields, stop_ids: Sequence[int]) -> Decoded:
    """Decode as far as the recording goes. Upstream keeps all of its last step, so the limit lies behind that."""
    return decode(drafter.target, drafter.head, drafter.template, entry["prompt_ids"], len(entry["generated_ids"]) + 2, stop_ids, trace=True)


def _decoded(part: str, drafter: _Drafter, recorded: Fields) -> list[Check]:
    """Compare generation step by step, then the cases with an end-of-sequence token."""
    faults: dict[str, list[str]] = {"generated_ids": []}
    steps_seen = 0
    for i, entry in enumerate(recorded["prompts"]):
        count = len(entry["accept_lengths"])
        steps_seen += count
        # No stop ids: upstream ends after the step that holds one, which is where the recording ends.
        answer = _decode(drafter, entry, ())
        steps = answer.steps[:count]
        ours: dict[str, list[Any]] = {"generated_ids": answer.tokens[: len(entry["generated_ids"])], "accept_lengths": [len(step.path) - 1 for step in steps]}
        theirs: dict[str, list[Any]] = {name: entry[name] for name in ours}
        if "steps" in entry:
            computed: dict[str, list[Any]] = {
                "tree_tokens": [step.tree_tokens for step in steps],
                "path_nodes": [list(step.path) for step in steps],
                "accepted_tokens": [[step.tree_tokens[node] for node in step.path] for step in steps],
                "best_candidate": [_row_of(drafter.rows, step.path) for step in steps],
            }
            ours |= computed
            theirs |= {name: [step[name] for step in entry["steps"]] for name in computed}
        for name, values in ours.items():
            faults.setdefault(name, [])
            if values != theirs[name]:
                faults[name].append(_first_difference(f"prompt {i}", values, theirs[name]))
    count = len(recorded["prompts"])
    checks = [_judge(f"{part}/{name}", found, f"{count} prompts, {steps_seen} steps are equal") for name, found in faults.items()]
    if "eos_cases" in recorded:
        ended = [fault for i, entry in enumerate(recorded["eos_cases"]) for fault in _ended(f"case {i}", drafter, entry)]
        checks.append(
            _judge(f"{part}/eos_cases", ended, f"{len(recorded['eos_cases'])} answers end at the same token, after the same steps; nothing is kept behind it")
        )
    return checks


def _row_of(rows: Sequence[Sequence[int]], path: Sequence[int]) -> int:
    """The lowest row that begins with a path."""
    return next(index for index, row in enumerate(rows) if list(row[: len(path)]) == list(path))


def _ended(where: str, drafter: _Drafter, entry: Fields) -> list[str]:
    """Compare an answer that ends with a stop token. Upstream keeps what the last step settled behind it; ours is cut."""
    stops = _stop_ids(entry["eos_token_id"])
    generated = entry["generated_ids"]
    end = next((i for i, token in enumerate(generated) if token in stops), None)
    if end is None:
        return [f"{where}: the recorded answer does not hold its own stop token {stops}"]
    answer = _decode(drafter, entry, stops)
    # A step of upstream settles its root and the accepted drafts; one of ours the accepted drafts and the next root.
    accepted, before = [], 0
    for length in entry["accept_lengths"]:
        if before + length >= end:
            accepted += [end - before - 1] if end > before else []
            break
        accepted.append(length)
        before += length + 1
    if answer.tokens != generated[: end + 1]:
        return [_first_difference(where, answer.tokens, generated[: end + 1])]
    if answer.stop != "eos":
        return [f"{where}: stopped for '{answer.stop}', not at the end-of-sequence token"]
    return [] if answer.accepted == accepted else [_first_difference(f"{where}, accept lengths", answer.accepted, accepted)]


def _posterior(part: str, template: TreeTemplate, rows: Sequence[Sequence[int]], recorded: Fields, tensors: Fields) -> list[Check]:
    """Compare greedy decisions on recorded logits.

    Where upstream accepted padding, ours must not: its path is then the recorded one up to the padding.
    """
    plain: list[str] = []
    padded: list[str] = []
    counts = Counter(bool(entry.get("padding_accepted", False)) for entry in recorded["cases"])
    for entry in recorded["cases"]:
        case, wanted = entry["case"], entry["greedy"]
        tokens, logits = tensors[f"case{case}.node_tokens"], tensors[f"case{case}.node_logits"]
        path = list(greedy(DraftTree(tokens, template.shape), logits).path)
        fault = _walk_fault(path, tokens.tolist(), logits.argmax(-1).tolist(), template.shape)
        if entry.get("padding_accepted", False):
            real = [node for node in wanted["path_nodes"] if node >= 0]
            padded += [f"case {case}: {fault}"] if fault else [] if path == real else [f"case {case}: path {path}, recorded {real} before the padding"]
            continue
        ours = {
            "path_nodes": path,
            "accept_length": len(path) - 1,
            "accepted_tokens": [int(tokens[node]) for node in path],
            "best_candidate": _row_of(rows, path),
        }
        plain += [f"case {case}: {name} {value}, recorded {wanted[name]}" for name, value in ours.items() if wanted[name] != value]
        plain += [f"case {case}: {fault}"] if fault else []
    checks = [
        Check(f"{part}/typical", "unsupported", "typical acceptance is not part of this project yet"),
        _judge(f"{part}/typical/greedy", plain, f"{counts[False]} decisions are equal"),
    ]
    if counts[True]:
        detail = f"in {counts[True]} cases upstream accepts padding as token 0; ours does not, its paths end in the leaf before it"
        checks.append(_judge(f"{part}/typical/greedy_without_padding", padded, detail))
    return checks


def _walk_fault(path: Sequence[int], tokens: Sequence[int], best: Sequence[int], shape: TreeShape) -> str:
    """What is wrong with a greedily accepted path, if anything: every token must be the target's own, and none may be left out."""
    if path[0] != 0 or any(shape.parents[node] != above for above, node in pairwise(path)):
        return f"{list(path)} is no path from the root"
    if any(tokens[node] != best[above] for above, node in pairwise(path)):
        return f"path {list(path)} holds a token that is not the target's"
    if any(tokens[child] == best[path[-1]] for child in shape.children[path[-1]]):
        return f"path {list(path)} could go on"
    return ""


# ------------------------------------------------------------------------------ losses


def _losses(recordings: _Recordings, part: str) -> list[Check]:
    checks: list[Check] = []
    for name, run, needed in (
        (f"{part}/medusa", _medusa_losses, ("medusa_decode/target", "medusa_decode/heads", f"{part}/medusa_batch.safetensors", f"{part}/medusa_loss.json")),
        (f"{part}/eagle", _eagle_losses, ("medusa_decode/target", "eagle_decode/draft", f"{part}/eagle.safetensors", f"{part}/eagle_loss.json")),
    ):
        absent = recordings.absent(*needed)
        checks += _absent(name, absent) if absent else run(recordings, name, recordings.target(needed[0]), needed)
    return checks


def _gradient_norms(head: Any, total: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss by parameter; zeros where it does not depend on one."""
    names, parameters = zip(*head.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros_like(each) if gradient is None else gradient for name, each, gradient in zip(names, parameters, found, strict=True)}


def _medusa_losses(recordings: _Recordings, name: str, target: Target, paths: Sequence[str]) -> list[Check]:
    batch, recorded = recordings.tensors(paths[2]), recordings.json(paths[3])
    other = [
        Check(
            f"{name}/{kind}",
            "unsupported",
            "another network: its heads have no projection of their own and go through the target's output layer, which is trained too",
        )
        for kind in recorded
        if kind.startswith("shared_lm_head")
    ]
    if "per_head_linear" not in recorded:
        return [Check(name, "skip", f"{paths[3]} has no per_head_linear"), *other]
    ids, real = batch["input_ids"], batch["attention_mask"] != 0
    supervised = batch["labels"] != int(recorded.get("ignore_index", -100))
    if (real[:, 1:] & ~real[:, :-1]).any() or (batch["labels"] != ids)[supervised].any():
        return [Check(name, "unsupported", "labels that are not the text's own tokens, or padding on the left"), *other]
    imported = recordings.medusa(paths[1], target)
    head = make_head(imported, target.spec())
    found = head.loss(FeatureBatch(ids, supervised, _states(target, ids)[:, :, None], 0, target.output, real.sum(1)))
    wanted = recorded["per_head_linear"]
    gradients = _gradient_norms(head, found.total)
    weight, bias = gradients["block_weight"], gradients["block_bias"]
    if tied := medusa.tied_heads(imported.tensors):  # one shared block gets the gradients of all its uses
        for each in (weight, bias):
            each[:, tied] = each[:, tied].sum(0, keepdim=True).expand(len(each), *each[0, tied].shape)
    norms = {}
    for at in range(weight.shape[1]):
        for block in range(len(weight)):
            norms[f"{at}.{block}.linear.weight"] = float(weight[block, at].norm())
            norms[f"{at}.{block}.linear.bias"] = float(bias[block, at].norm())
        norms[f"{at}.{len(weight)}.weight"] = float(gradients["output_weight"][at].norm())
    losses = [("total", float(found.total.detach()), wanted["total_loss"])]
    losses += [(f"head {i}", float(found.parts[f"cross_entropy_{i + 1}"]), value) for i, value in enumerate(wanted["per_head_loss"])]
    shares = [(f"head {i}", float(found.parts[f"top1_{i + 1}"]), value) for i, value in enumerate(wanted["per_head_top1"])]
    return [
        _relative(f"{name}/per_head_linear/loss", losses, _LOSSES_RELATIVE),
        _relative(f"{name}/per_head_linear/top1", shares, _LOSSES_RELATIVE),
        _norms(f"{name}/per_head_linear/gradients", norms, wanted["grad_l2_norms"]),
        *other,
    ]


def _norms(name: str, ours: dict[str, float], recorded: Fields) -> Check:
    if unknown := sorted(set(recorded) - set(ours)):
        return Check(name, "fail", f"the head has no parameter {', '.join(unknown)}")
    return _relative(name, ((key, ours[key], float(value)) for key, value in recorded.items()), _GRADIENTS_RELATIVE)


def _eagle_losses(recordings: _Recordings, name: str, target: Target, paths: Sequence[str]) -> list[Check]:
    tensors, recorded = recordings.tensors(paths[2]), recordings.json(paths[3])
    items = sorted(int(found[1]) for key in tensors if (found := re.fullmatch(r"item(\d+)\.input_ids", key)))
    lengths = torch.tensor([len(tensors[f"item{i}.input_ids"]) for i in items])

    def padded(key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([tensors[f"item{i}.{key}"] for i in items], batch_first=True)

    raw = FeatureBatch(padded("input_ids"), padded("loss_mask") != 0, padded("hidden_state")[:, :, None], 0, target.output, lengths)

    def run(imported: Imported) -> list[Check]:
        head = make_head(
            imported, target.spec(), noise=0.0, regression_weight=float(recorded.get("v_w", 1.0)), classification_weight=float(recorded.get("p_w", 0.1))
        )
        found = head.loss(raw)
        ours = {"vloss": float(found.parts["regression"]), "ploss": float(found.parts["classification"]), "loss": float(found.total.detach())}
        norms = {key: float(each.norm()) for key, each in _gradient_norms(head, found.total).items()}
        checks = [
            _relative(f"{name}/loss", ((key, value, recorded[key]) for key, value in ours.items()), _LOSSES_RELATIVE),
            _norms(f"{name}/gradients", norms, recorded["grad_l2_norms"]),
        ]
        if "num_unmasked_positions" in recorded:
            counted, wanted = len(found.predictions[0].rows), int(recorded["num_unmasked_positions"])
            checks.append(
                _judge(
                    f"{name}/counted_positions",
                    [] if counted == wanted else [f"{counted} positions are counted, recorded {wanted}"],
                    f"{counted} positions are counted",
                )
            )
        if "predict" in tensors:
            checks.append(_near(f"{name}/predict", _predicted(head, target, tensors)))
        return checks

    return _on_either_base(recordings.eagle(paths[1], target), run)


def _predicted(head: Any, target: Target, tensors: Fields) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """Predicted states of upstream's own shifted batch, at its real positions."""
    for row, (ids, hidden, mask, recorded) in enumerate(
        zip(tensors["batch.input_ids"], tensors["batch.hidden_states"], tensors["batch.attention_mask"], tensors["predict"], strict=True)
    ):
        feature, _ = _predictions(head, target, ids, hidden)[0]
        yield f"item {row}", feature[mask != 0], recorded[mask != 0]
