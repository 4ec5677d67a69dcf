"""Commands that measure this machine: plan, benchmark, profile, batches, device-report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from koala_bench.cli.app import MACHINE, command
from koala_bench.cli.options import DECODING, PASS, Heads, Shared, method_names, option
from koala_bench.common.bundled import RECIPES
from koala_bench.errors import KoalaBenchError

if TYPE_CHECKING:
    from koala_bench.engine.target import Target
    from koala_bench.evaluation.methods import Method
    from koala_bench.presets import Preset

_PROMPTS = 8  # of batches

_OF_PLAN = ("methods", "layers", "tree", "max_new_tokens", "questions", "limit", "repeats", "data_dir", "out", "quick")


@command(MACHINE, *PASS, *_OF_PLAN)
def plan(
    options: Shared,
    seconds: Annotated[float, option("--seconds", "How long to measure; longer is more exact.", min=1)] = 60.0,
) -> None:
    """Say what a run takes: parameters, memory, disk, tokens, hours on this machine, and what is missing for it.

    Nothing is downloaded but the configurations of the target and of draft models. Exit code 0 if it can run here, 1 if
    something is missing.

    Example: `koala-bench plan --preset vicuna-7b --data-dir data`.
    """
    from koala_bench.planning.outlook import outlook

    chosen = options.resolved()
    names = method_names(chosen, options.methods)
    text, ready = outlook(chosen, names, options.data_dir, options.folder("table1", chosen), seconds)
    print(text)
    raise typer.Exit(0 if ready else 1)


@command(MACHINE, *PASS, "methods")
def benchmark(
    options: Shared,
    tokens: Annotated[int, option("--tokens", "Length of every answer.", min=2)] = 96,
    rounds: Annotated[int, option("--rounds", "How often every prompt is timed.", min=1)] = 3,
    steps: Annotated[int, option("--steps", "Training steps to time.", min=1)] = 12,
    out: Annotated[
        Path | None, option("--out", "Folder for benchmark.md and the figure of step time against context.")
    ] = None,
) -> None:
    """Time vanilla decoding against transformers' generate, steps against context length, and training heads together
    against each alone.

    Example: `koala-bench benchmark --rounds 5`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.costs.benchmark import benchmark
    from koala_bench.costs.figures import write_context

    chosen = options.resolved()
    text, steps_by_context = benchmark(chosen, method_names(chosen, options.methods), tokens, rounds, steps)
    print(text)
    if out is not None:
        write_text(out / "benchmark.md", text + "\n")
        write_context(steps_by_context, out)


def _loaded(options: Shared, heads: Path | None) -> tuple[Preset, Target, list[Method], list[list[int]]]:
    """The preset, its target, the methods of --methods, and a bundled question of each category as token ids."""
    from koala_bench.costs.benchmark import bundled_prompts
    from koala_bench.evaluation.methods import load_methods
    from koala_bench.training.experiment import load_preset_target

    chosen = options.resolved()
    target, template = load_preset_target(chosen)
    ready = load_methods(chosen, method_names(chosen, options.methods), target, options.heads(heads, chosen))
    return chosen, target, ready, bundled_prompts(target, template)


@command(MACHINE, *DECODING)
def profile(
    options: Shared,
    heads: Heads = None,
    tokens: Annotated[int, option("--tokens", "Length of every answer.", min=2)] = 64,
    out: Annotated[Path | None, option("--out", "Write the table here too, a .md file.")] = None,
) -> None:
    """Split a decoding step: draft, the model's own pass, what the harness puts around it, reads from the device.

    Example: `koala-bench profile --methods vanilla,eagle`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.costs.bandwidth import bandwidth_of
    from koala_bench.costs.profile import in_words
    from koala_bench.costs.profile import profile as measure
    from koala_bench.planning.draft_reads import draft_reads, reads_in_words

    chosen, target, ready, prompts = _loaded(options, heads)
    with target.computing():
        before, profiles = bandwidth_of(target.device), measure(target, ready, prompts, tokens)
        text = in_words(profiles, target, max(before.most, bandwidth_of(target.device).most))
    if reads := reads_in_words(draft_reads(chosen, [method.name for method in ready], target.model.config)):
        text = f"{text}\n\n{reads}"
    if out is not None:
        write_text(out, text + "\n")
    print(text)


@command(MACHINE, *DECODING)
def batches(
    options: Shared,
    heads: Heads = None,
    sizes: Annotated[str, option("--sizes", "Comma-separated: how many answers at once; divisors of 8.")] = "1,2,4,8",
    tokens: Annotated[int, option("--tokens", "Length of every answer.", min=2)] = 64,
    rounds: Annotated[int, option("--rounds", "How often everything is timed.", min=1)] = 2,
    out: Annotated[
        Path | None, option("--out", "Folder for batches.md and the figure of speedup against batch size.")
    ] = None,
) -> None:
    """Measure throughput and speedup with several answers at once, each with its own accepted tokens; greedy
    and lossless.

    Example: `koala-bench batches --methods vanilla,medusa,eagle`.
    """
    from koala_bench.common.files import write_text
    from koala_bench.costs.batches import batch_speeds, in_words
    from koala_bench.costs.figures import write_batches

    counts = [int(each) if each.strip().isdigit() else 0 for each in sizes.split(",")]
    if not counts or any(count < 1 or _PROMPTS % count for count in counts):
        raise KoalaBenchError(f"--sizes {sizes} are not divisors of {_PROMPTS}.", "Use some of 1,2,4,8.")
    _, target, ready, prompts = _loaded(options, heads)
    with target.computing():
        speeds = batch_speeds(target, ready, prompts[:_PROMPTS], counts, tokens, rounds)
    text = in_words(speeds)
    if out is not None:
        write_text(out / "batches.md", text + "\n")
        write_batches(speeds, out)
    print(text)


@command(MACHINE, "device", "dtype", "methods", name="device-report")
def device_report(
    options: Shared,
    sizes: Annotated[
        str | None, option("--sizes", "Comma-separated: 160m, 7b, 13b, 33b. On CUDA the last three, else the first.")
    ] = None,
    engines: Annotated[
        str,
        option("--engines", "Comma-separated: eager calls the models, graph replays recorded passes (CUDA graphs)."),
    ] = "eager,graph",
    tokens: Annotated[int, option("--tokens", "Length of every answer.", min=2)] = 32,
    rounds: Annotated[int, option("--rounds", "Answers timed of each method, and rounds of each step.", min=1)] = 3,
    paper: Annotated[Path, option("--paper", "Published values.")] = RECIPES / "paper.toml",
    out: Annotated[
        Path,
        option("--out", "Folder for device-report.json, device-report.md and the figure of step time against nodes."),
    ] = Path("results/runs/device"),
) -> None:
    """Measure what steps, verifications and drafts cost on a device, with random weights of the papers' shapes in
    bfloat16.

    No weights, data or network are needed. Acceptance means nothing then: the report states latencies, how close
    vanilla decoding is to the memory's limit, and for each method the acceptance length from which it pays and that
    published speedups would need.

    Example: `koala-bench device-report --sizes 7b --engines graph`.
    """
    from koala_bench.costs.device_report import measure

    preset = Shared(preset="vicuna-7b").resolved()
    names, how = method_names(preset, options.methods), (options.device, options.dtype, tokens, rounds, paper)
    print(measure(None if sizes is None else sizes.split(","), engines.split(","), preset, names, out, *how), end="")
