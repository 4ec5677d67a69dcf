"""The form of a run record: what its lines hold, and what is wrong with a line that does not.

A record is a JSON-lines file: a ``run`` line that says what was measured, where and with which code; a ``turn``
line per method, question, turn and repeat; an ``end`` line once everything is there. The fields below are the
file format: change one, and ``SCHEMA`` goes up by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one below Python 3.12

from koala_bench.common.provenance import STRICT, CodeState, Count, Environment
from koala_bench.common.reading import first_problem

SCHEMA = 6

_Seconds = Annotated[float, Field(ge=0)]

# (method, question_id, turn, repeat): a record holds each at most once.
Key = tuple[str, int, int, int]
Place = tuple[int, int, int]  # question_id, turn, repeat


@with_config(STRICT)
class PresetInfo(TypedDict):
    """The settings of the run; ``sha256`` is the hash of ``resolved``. ``settled`` holds, by dotted name, the values
    that settings of ``auto`` got on this machine and target.
    """

    name: str
    sha256: str
    resolved: dict[str, Any]
    settled: NotRequired[dict[str, Any]]


@with_config(STRICT)
class TargetInfo(TypedDict):
    """The frozen model. ``path`` is where it lay; its identity is the hashes. Without ``engine`` it was eager.
    ``ignored_settings`` are settings of the checkpoint's generation configuration that would change its answers and
    that no method applies.
    """

    name: str
    path: str
    config_sha256: str
    weights_sha256: str | None
    parameters: Count
    layers: Count
    dtype: str
    device: str
    attention: str
    engine: NotRequired[Literal["graph"]]
    ignored_settings: NotRequired[dict[str, Any]]


@with_config(STRICT)
class TreeInfo(TypedDict):
    """A draft tree. ``nodes`` counts the root, ``depth`` is that of the deepest node (the root's is 0).

    ``parents`` holds for each node the index of its parent, -1 for the root, and is null where the tree differs from
    step to step.
    """

    name: str
    nodes: Count
    depth: Count
    parents: list[Annotated[int, Field(ge=-1)]] | None


@with_config(STRICT)
class TrainingInfo(TypedDict):
    """What a head was trained on: the dialogues as tokens, their order, how long, from which seed, in which precision
    (``bf16`` autocast, or ``no`` for float32; not recorded up to koala-bench 0.1.0), and with which chat template, by
    its hash (not recorded in older records).
    """

    stream_sha256: str
    order_sha256: str
    steps: Count
    tokens: Count
    seed: Count
    precision: NotRequired[str]
    chat_template: NotRequired[str]


@with_config(STRICT)
class TypicalInfo(TypedDict):
    """Typical acceptance, which is not lossless, in place of the run's rule."""

    threshold: float
    alpha: float


@with_config(STRICT)
class MethodInfo(TypedDict):
    """A decoding method. ``vanilla`` has no head, no layers and a tree of the root alone.

    ``objective`` names the term added to the head's supervised loss, if any (not recorded up to koala-bench 0.1.0);
    ``adversarial`` says whether the term is trained with the head, as a discriminator is.
    """

    name: str
    head: str | None
    layers: Count
    adversarial: bool
    objective: NotRequired[str]
    parameters: Count  # trainable ones; of a small draft model all of them
    tree: TreeInfo | None
    checkpoint: str | None
    weights_sha256: str | None
    training: TrainingInfo | None  # null for a head that was not trained here
    typical: TypicalInfo | None  # null where the run's rule holds
    lossless: bool
    draft_vocabulary: NotRequired[Count]  # tokens that it can draft, where they are not all


@with_config(STRICT)
class AcceptanceInfo(TypedDict):
    """The rule that decides which drafted tokens stay, and the distribution that it keeps; ``top_k`` 0 and ``top_p`` 1
    cut nothing.
    """

    rule: Literal["greedy", "speculative sampling"]
    temperature: Annotated[float, Field(ge=0)]
    top_k: Count
    top_p: Annotated[float, Field(gt=0, le=1)]


@with_config(STRICT)
class QuestionsInfo(TypedDict):
    """The question file."""

    name: str
    sha256: str
    count: Count


@with_config(STRICT)
class ChatTemplateInfo(TypedDict):
    """How turns became prompts."""

    name: str
    sha256: str


@with_config(STRICT)
class LimitsInfo(TypedDict):
    """Where decoding stops: at an id, or where a text is complete, if there is one."""

    max_new_tokens: Annotated[int, Field(ge=1)]
    stop_ids: list[int]
    stop_texts: NotRequired[list[str]]


@with_config(STRICT)
class MeasureInfo(TypedDict):
    """How often everything was run; ``processes`` is there if several shared out the questions.

    ``order`` is the order of the methods, and of their lines, within a turn: a permutation drawn from the run's seed
    and the place, see ``koala_bench.evaluation.order``; without it they took turns. ``process`` numbers the process
    from 1 if the evaluation was repeated in several fresh ones.
    """

    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    order: NotRequired[Literal["drawn"]]
    process: NotRequired[Annotated[int, Field(ge=1)]]
    processes: NotRequired[Annotated[int, Field(ge=2)]]


@with_config(STRICT)
class RunHeader(TypedDict):
    """The first line of a record. ``seed`` is that of the evaluation: of what is drawn while decoding, and of the order
    of the methods. Up to schema 4 it was the one that the run's preset trained with, whatever the heads came from.
    """

    kind: Literal["run"]
    schema: int
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]  # files are named after it
    created: str  # ISO 8601, UTC
    command: list[str]
    preset: PresetInfo
    target: TargetInfo
    methods: Annotated[list[MethodInfo], Field(min_length=1)]
    acceptance: AcceptanceInfo
    questions: QuestionsInfo
    chat_template: ChatTemplateInfo
    limits: LimitsInfo
    seed: int
    measure: MeasureInfo
    environment: Environment
    code: CodeState


@with_config(STRICT)
class FirstDifference(TypedDict):
    """Where an answer leaves vanilla's: 0-based position, both tokens, the target's top-2 logit gap there."""

    position: Count
    token: int
    vanilla_token: int
    top2_gap: float


@with_config(STRICT)
class ErrorInfo(TypedDict):
    """Why a turn has no numbers."""

    type: str
    message: str


@with_config(STRICT)
class TurnLine(TypedDict):
    """One answer of one method. A failed turn has ``error`` and nulls in place of everything measured.

    ``accepted[i]`` counts the draft tokens that step i accepted, after cutting at the end of sequence and at the limit;
    a step commits one token more, the target's own. The steps together commit all of ``new_token_ids``, or all but the
    first where the prefill's token is no step's. ``drafted_depth[i]`` is the deepest draft level offered at that step,
    ``kept_node[i]`` the node of the tree at which its accepted path ends (0 is the root), null if the tree varies
    between steps. ``prefill_s`` is the target's prefill, ``draft_prefill_s`` the head's, null if part of the next (up
    to schema 4). ``decode_s`` is the whole decode loop; ``draft_s`` and ``verify_s`` are the seconds of drafting and of
    the target's passes, null if not timed. ``distance`` is the total variation between the rule's distribution and the
    target's, averaged over the new tokens, null for a lossless rule.
    """

    kind: Literal["turn"]
    method: str
    question_id: int
    category: str
    turn: Count
    repeat: Count
    prompt_tokens: Count | None
    new_token_ids: Annotated[list[Count], Field(min_length=1)] | None
    text: str | None
    stop: Literal["eos", "limit", "context"] | None
    accepted: list[Count] | None
    drafted_depth: list[Count] | None
    kept_node: list[Count] | None
    prefill_s: _Seconds | None
    draft_prefill_s: _Seconds | None
    decode_s: _Seconds | None
    draft_s: _Seconds | None
    verify_s: _Seconds | None
    distance: Annotated[float, Field(ge=0, le=1)] | None
    first_difference: FirstDifference | None
    error: ErrorInfo | None


@with_config(STRICT)
class EndLine(TypedDict):
    """The last line of a finished record. ``wall_s`` is that of the process that finished it."""

    kind: Literal["end"]
    status: Literal["finished"]
    turns: Count
    wall_s: _Seconds


_HEADER = TypeAdapter(RunHeader)
_TURN = TypeAdapter(TurnLine)
_END = TypeAdapter(EndLine)

_MEASURED = ("new_token_ids", "text", "stop", "accepted", "drafted_depth", "prefill_s", "decode_s")
_MEASURED_SOMETIMES = ("kept_node", "draft_prefill_s", "draft_s", "verify_s", "distance", "first_difference")


def key_of(turn: TurnLine) -> Key:
    """What identifies a turn within a record."""
    return turn["method"], turn["question_id"], turn["turn"], turn["repeat"]


def with_other_template(methods: Iterable[MethodInfo], sha256: str) -> list[str]:
    """The methods whose heads were trained with another chat template than the one of this hash."""
    trained = [(method["name"], method["training"]) for method in methods]
    return [name for name, training in trained if training and training.get("chat_template", sha256) != sha256]


def place_of(turn: TurnLine) -> Place:
    """What a turn answers, whatever the method."""
    return turn["question_id"], turn["turn"], turn["repeat"]


def answer_s(turn: TurnLine) -> float:
    """Seconds of a whole answer that did not fail, from the prompt to the last token."""
    return (turn["prefill_s"] or 0.0) + (turn["draft_prefill_s"] or 0.0) + (turn["decode_s"] or 0.0)


# ---------------------------------------------------------------------------------------------- older records


READABLE = (3, 4, 5, SCHEMA)


def of_today(line: dict[str, Any]) -> dict[str, Any]:
    """A line of an older record in the current schema.

    Schema 4 added fields that greedy decoding does not need, schema 5 the head's own prefill, which was part of
    ``decode_s`` before, schema 6 what may stand of a head's training: its precision and chat template.
    """
    if line.get("kind") == "run" and line.get("schema") in READABLE:
        acceptance, methods = line.get("acceptance"), line.get("methods")
        if isinstance(acceptance, dict):
            acceptance = {"top_k": 0, "top_p": 1.0, **acceptance}
        if isinstance(methods, list):
            methods = [{"typical": None, **method} if isinstance(method, dict) else method for method in methods]
        return {**line, "schema": SCHEMA, "acceptance": acceptance, "methods": methods}
    return {"distance": None, "draft_prefill_s": None, **line} if line.get("kind") == "turn" else line


# ---------------------------------------------------------------------------------------------- validation


def node_depths(parents: Sequence[int]) -> list[int]:
    """Distance of every node from the root of a recorded tree.

    Raises:
        ValueError: it is no tree with its root first and parents before children.
    """
    if not parents or parents[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(parents[1:], 1)):
        raise ValueError("no tree")
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def depths_by_method(header: RunHeader) -> dict[str, list[int] | None]:
    """Depths of the nodes of each method's tree, None where not recorded; ``turn_problem`` checks against them."""
    trees = {method["name"]: method["tree"] for method in header["methods"]}
    return {
        name: node_depths(tree["parents"]) if tree and tree["parents"] is not None else None
        for name, tree in trees.items()
    }


def _problem(form: TypeAdapter[Any], line: Mapping[str, Any]) -> str | None:
    try:
        form.validate_python(line)
    except ValidationError as error:
        return first_problem(error)
    return None


def header_problem(header: Mapping[str, Any]) -> str | None:
    """What is wrong with a run line, as "place: problem", or None."""
    if problem := _problem(_HEADER, header):
        return problem
    counts = Counter(method["name"] for method in header["methods"])
    if twice := [name for name, count in counts.items() if count > 1]:
        return f"methods: '{twice[0]}' is listed twice"
    for index, method in enumerate(header["methods"]):
        tree = method["tree"]
        if tree is None or tree["parents"] is None:
            continue
        try:
            depths = node_depths(tree["parents"])
        except ValueError:
            return f"methods.{index}.tree.parents: not a tree with its root first and parents before children"
        if (len(depths), max(depths)) != (tree["nodes"], tree["depth"]):
            return (
                f"methods.{index}.tree.parents: {len(depths)} nodes of depth {max(depths)}, not {tree['nodes']} of"
                f" depth {tree['depth']}"
            )
    try:
        created = datetime.fromisoformat(header["created"])
    except ValueError:
        return "created: not an ISO 8601 time"
    return None if created.tzinfo else "created: has no time zone"


def turn_problem(turn: Mapping[str, Any], methods: Mapping[str, Sequence[int] | None]) -> str | None:
    """The problem of a turn line of a run, as "place: problem", or None; ``methods`` is its ``depths_by_method``."""
    if problem := _problem(_TURN, turn):
        return problem
    if turn["method"] not in methods:
        return f"method: '{turn['method']}' is not among the run's methods"
    if turn["error"] is not None:
        present = [name for name in (*_MEASURED, *_MEASURED_SOMETIMES) if turn[name] is not None]
        return f"{present[0]}: a failed turn has no numbers" if present else None
    missing = [name for name in ("prompt_tokens", *_MEASURED) if turn[name] is None]
    if missing:
        return f"{missing[0]}: is null, but the turn did not fail"
    accepted, offered, tokens = turn["accepted"], turn["drafted_depth"], len(turn["new_token_ids"])
    committed = sum(accepted) + len(accepted)
    if len(accepted) != len(offered):
        return f"drafted_depth: {len(offered)} steps, but accepted has {len(accepted)}"
    if tokens - committed not in (0, 1):
        return f"accepted: {len(accepted)} steps commit {committed} tokens, but new_token_ids has {tokens}"
    if any(count > depth for count, depth in zip(accepted, offered, strict=True)):
        return "accepted: more tokens than the draft was deep"
    nodes, depths = turn["kept_node"], methods[turn["method"]]
    if nodes is not None and depths is None:
        return "kept_node: the run line has no tree for this method"
    if (
        nodes is not None
        and depths is not None
        and [depths[node] if node < len(depths) else -1 for node in nodes] != accepted
    ):
        return "kept_node: not at the depths that accepted says"
    if (turn["draft_s"] is None) != (turn["verify_s"] is None):
        return "draft_s, verify_s: one is null and the other is not"
    return None


def end_problem(end: Mapping[str, Any]) -> str | None:
    """What is wrong with an end line, as "place: problem", or None."""
    return _problem(_END, end)
