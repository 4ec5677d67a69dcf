"""The command that measures a device with random weights: device-report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from koala_bench.cli.app import app
from koala_bench.cli.options import Device, Dtype, Methods, method_names, preset_of
from koala_bench.errors import KoalaBenchError

_NODES = (1, 2, 4, 8, 16, 26, 32, 48, 64, 96, 128)
_COPIED = {"cuda": 1 << 31, "cpu": 1 << 28}  # bytes: far beyond any cache


@app.command("device-report")
def device_report(
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", help="Comma-separated: 160m, 7b, 13b, 33b. On CUDA the last three, else the first."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    methods: Methods = None,
    engines: Annotated[
        str,
        typer.Option(
            "--engines", help="Comma-separated: eager calls the models, graph replays recorded passes (CUDA graphs)."
        ),
    ] = "eager,graph",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Length of every answer.")] = 32,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Answers timed of each method, and rounds of each step.")
    ] = 3,
    paper: Annotated[Path, typer.Option("--paper", help="Published values.")] = Path("reproduce/paper.toml"),
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder for device-report.json, device-report.md and the figure of step time against nodes."
        ),
    ] = Path("results/runs/device"),
) -> None:
    """Measure what steps, verifications and drafts cost on a device, with random weights of the papers' shapes in
    bfloat16.

    No weights, data or network are needed. Acceptance means nothing then: the report states latencies, how close
    vanilla decoding is to the memory's limit, and for each method the acceptance length from which it pays and that
    published speedups would need.

    Example: `koala-bench device-report --sizes 7b --engines graph`.
    """
    from dataclasses import replace

    import torch

    from koala_bench.common.files import write_text
    from koala_bench.common.provenance import code_state
    from koala_bench.costs.device import bandwidth, model_cost, random_model
    from koala_bench.costs.device_report import DeviceReport, in_words
    from koala_bench.costs.figure_nodes import write_nodes
    from koala_bench.engine.shapes import SHAPES, VICUNA
    from koala_bench.engine.target import machine, pick_device, pick_dtype, pick_engine
    from koala_bench.results.tables.published import read_paper

    where = pick_device(device or "auto")
    kind = pick_dtype(dtype or ("bfloat16" if where.type == "cuda" else "auto"), where)
    wanted = [each.strip() for each in (sizes or ",".join(VICUNA if where.type == "cuda" else SHAPES[:1])).split(",")]
    if unknown := [each for each in wanted if each not in SHAPES]:
        raise KoalaBenchError(f"--sizes: '{unknown[0]}' is no size.", f"Use {', '.join(SHAPES)}.")
    picked = [pick_engine(each.strip(), where) for each in engines.split(",")]
    published = read_paper(paper)
    preset = preset_of("vicuna-7b", False, None)
    chosen = {
        name: (preset.method(name), preset.method(name).tree)
        for name in method_names(preset, methods)
        if name != "vanilla"
    }
    environment = machine(where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else environment["cpu"]
    rates, code = bandwidth(where, _COPIED[where.type]), code_state()
    report = DeviceReport(name, str(kind).removeprefix("torch."), rates, dict(environment), dict(code), (), {})
    for size in wanted:
        try:
            base = random_model(size, where, kind)
            for engine in picked:
                cost = model_cost(replace(base, engine=engine), size, chosen, _NODES, tokens, rounds)
                report = replace(report, models=(*report.models, cost))
            del base
        except (KoalaBenchError, torch.cuda.OutOfMemoryError) as error:
            report = replace(report, missing={**report.missing, size: str(error).splitlines()[0]})
        if where.type == "cuda":
            torch.cuda.empty_cache()
        # After each size: what was measured is not lost with what comes later.
        write_text(out / "device-report.json", report.json())
        write_text(out / "device-report.md", in_words(report, published))
        if report.models:
            write_nodes(report.models, out)
    if not report.models:
        raise KoalaBenchError(
            f"Nothing could be measured: {next(iter(report.missing.values()))}",
            "Use smaller --sizes, or another --device.",
        )
    print(in_words(report, published), end="")
