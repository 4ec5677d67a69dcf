"""Sessions of the project. ``nox --list`` explains them; options for a session follow ``--``."""

import nox

nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]
nox.options.error_on_missing_interpreters = False

CONSTRAINTS = ("-c", "constraints.txt")


def install(session: nox.Session, *extras: str) -> None:
    wanted = f".[{','.join(extras)}]" if extras else "."
    session.install("-e", wanted, *CONSTRAINTS, silent=True)


@nox.session
def reproduce_table1(session: nox.Session) -> None:
    """Table 1: train the heads, decode the questions, write table, figure and records (-- --quick, -- --preset vicuna-7b)."""
    install(session)
    session.run("koala-bench", "reproduce", "table1", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests; options go to pytest (-- -m 'not slow')."""
    install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and mypy."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def benchmark(session: nox.Session) -> None:
    """Vanilla decoding against transformers' generate, interleaved."""
    install(session)
    session.run("koala-bench", "benchmark", *session.posargs)


@nox.session(default=False)
def pretrain(session: nox.Session) -> None:
    """Train the bundled target again from nothing (-- --out FOLDER --steps N)."""
    install(session)
    session.run("koala-bench", "pretrain", *session.posargs)
