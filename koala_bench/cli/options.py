"""Options that several commands share, and the preset that they make together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from koala_bench.errors import KoalaBenchError
from koala_bench.presets import Preset, load_preset, preset_names, usual_methods

PresetName = Annotated[str, typer.Option("--preset", help=f"{', '.join(preset_names())}, or a .toml file.")]
TargetName = Annotated[
    str | None, typer.Option("--target", help="Hub id or folder of any causal LM, in place of the preset's.")
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float64, float32, bfloat16 or float16.")]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**31 - 1, help="Of the heads' weights, the order of the data and the noise."),
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods", help="Comma-separated, e.g. vanilla,eagle,eagle+koala; the preset's usual ones by default."
    ),
]
Layers = Annotated[int | None, typer.Option("--layers", min=1, help="K, the number of layers of every head.")]
Tree = Annotated[
    str | None,
    typer.Option(
        "--tree",
        help="Draft tree of every method: a name such as medusa/mc_sim_7b_63, chain-4, 4x2x1, or a .json file.",
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions", help="bundled, a name such as mt_bench in the data folder, or a file in MT-bench's format."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions of each category.")]
Repeats = Annotated[int | None, typer.Option("--repeats", min=1, help="How often every question is answered.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0, help="0 decodes greedily; above, drafts and target are sampled from, losslessly."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k", min=0, help="Of target and drafts alike, where there is a temperature: only the k likeliest tokens."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", help="Of both, where there is a temperature: the fewest tokens that together have this probability."
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of question files; KOALA_BENCH_DATA by default.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for heads, records and tables.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override of the preset, section.key=value; may be repeated.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="A text that ends an answer, besides the target's and the template's; may be repeated."
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="The same at reduced size: shows that everything works, no more.")]
AttentionName = Annotated[str | None, typer.Option("--attention", help="sdpa or eager.")]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="eager calls the model, graph replays recorded passes; auto: graph on the CPU."),
]


def preset_of(
    name: str,
    quick: bool,
    settings: list[str] | None,
    *,
    target: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    layers: int | None = None,
    tree: str | None = None,
    max_new_tokens: int | None = None,
    questions: str | None = None,
    limit: int | None = None,
    repeats: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    attention: str | None = None,
    engine: str | None = None,
    stop: list[str] | None = None,
) -> Preset:
    """The preset with the options' values in place; an option wins over --quick, --set over both.

    Another target brings its own chat template, but where a preset of the user's own names one.
    """
    direct = {
        "target.device": device,
        "target.dtype": dtype,
        "target.attention": attention,
        "target.engine": engine,
        "training.seed": seed,
        "evaluation.max_new_tokens": max_new_tokens,
        "evaluation.questions": questions,
        "evaluation.limit": limit,
        "evaluation.repeats": repeats,
        "evaluation.temperature": temperature,
        "evaluation.top_k": top_k,
        "evaluation.top_p": top_p,
    }
    overrides = [
        f"{key}={value}" if isinstance(value, (int, float)) else f"{key}={_quoted(value)}"
        for key, value in direct.items()
        if value is not None
    ]
    overrides += [f"evaluation.stop={json.dumps(stop, ensure_ascii=False)}"] if stop else []
    methods = load_preset(name).methods if layers is not None or tree is not None else {}
    for method in methods:
        overrides += [f'methods."{method}".layers={layers}'] if layers is not None else []
        overrides += [f'methods."{method}".tree={_quoted(tree)}'] if tree is not None else []
    found = load_preset(name, [*overrides, *(settings or [])], quick)
    if target is None:
        return found
    overrides += [f"target.name={_quoted(target)}", *_template_of(name, found, target)]
    return load_preset(name, [*overrides, *(settings or [])], quick)


def _template_of(name: str, preset: Preset, target: str) -> list[str]:
    """What --target says of the chat template: nothing where it names the preset's own target."""
    named = name.endswith(".toml") and "chat_template" in preset.target.model_fields_set
    return [] if preset.target.name == target or named else ["target.chat_template=auto"]


def _quoted(text: str) -> str:
    # A JSON string is a TOML string too, unless it spells characters beyond U+FFFF as two.
    return json.dumps(text, ensure_ascii=False)


def method_names(preset: Preset, methods: str | None) -> list[str]:
    """The methods of --methods, or the usual ones of the preset."""
    names = (
        [name.strip() for name in methods.split(",") if name.strip()] if methods is not None else usual_methods(preset)
    )
    if not names:
        raise KoalaBenchError(
            f"--methods '{methods}' names no method.", f"The preset has: {', '.join(['vanilla', *preset.methods])}."
        )
    if len(set(names)) != len(names):
        raise KoalaBenchError(f"--methods {methods} names a method twice.", "Name each once.")
    for name in names:
        if name != "vanilla":
            preset.method(name)
    return names


def output_folder(out: Path | None, kind: str, preset: Preset, quick: bool) -> Path:
    """The folder of --out, or one named after what is run."""
    if out is not None:
        return out
    target = Path(preset.target.name).name
    questions = (
        "" if preset.evaluation.questions == _usual_questions(preset) else f"-{Path(preset.evaluation.questions).stem}"
    )
    sampled = f"-t{preset.evaluation.temperature:g}" if preset.evaluation.temperature else ""
    return Path("results") / "runs" / f"{kind}-{target}{questions}{sampled}{'-quick' if quick else ''}"


def _usual_questions(preset: Preset) -> str:
    """Question set that needs no mention in a folder's name."""
    return "bundled" if preset.target.name == "tiny" else "mt_bench"


def typed_command() -> list[str]:
    """The command as a user would type it again, without this machine's paths."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
