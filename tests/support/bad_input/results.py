"""Bad input in what is made of decoded answers: records, tables and reports, traces, the gate, sweeps, parity."""

from __future__ import annotations

from tests.interop.test_traces import medusa_row
from tests.support.bad_input.cases import EVALUATE, HEAD, LONG, Case
from tests.support.bad_input.spoiling import (
    DIGITS,
    NESTED,
    UNREADABLE,
    UNWRITABLE,
    cut,
    folder,
    full_disk,
    keep_lines,
    line,
    lines,
    link,
    put,
    record,
    remove,
    turn,
)
from tests.support.synthetic_run import make_header

RECORDS = [
    Case("no such record", "table none.jsonl", "none.jsonl", "an evaluation wrote"),
    Case("a record with too long a name", f"table {LONG}", "xxx", "an evaluation wrote"),
    Case("a folder as record", "table target", "target: Is a directory", "an evaluation wrote"),
    Case(
        "an unreadable record",
        "table record.jsonl",
        "record.jsonl",
        "an evaluation wrote",
        link("record.jsonl", UNREADABLE),
    ),
    Case("an empty record", "table record.jsonl", "record.jsonl", "an evaluation wrote", put("record.jsonl")),
    Case(
        "a binary record",
        "table record.jsonl",
        "record.jsonl:1: not a line of JSON",
        "Is it a run record?",
        put("record.jsonl", b"\xff\xfe\x00\n\n"),
    ),
    Case(
        "a page as record",
        "table README.md",
        "README.md:1: not a line of JSON",
        "Is it a run record?",
        put("README.md", "# Results\n\n"),
    ),
    Case(
        "a damaged header of a record",
        "table record.jsonl",
        "record.jsonl:1: not a line of JSON",
        "Restore the record",
        keep_lines(lambda found: [found[0][:-1], *found[1:]]),
    ),
    Case("questions as record", "table questions.jsonl", "questions.jsonl is not a run record", "an evaluation wrote"),
    Case("half a header", "table record.jsonl", "record.jsonl", "an evaluation wrote", cut("record.jsonl", 200)),
    Case("a malformed line of a record", "table record.jsonl", "record.jsonl:3", "Restore", line(3, "{no json")),
    Case("a line that is a list", "table record.jsonl", "record.jsonl:3", "Restore", line(3, "[]")),
    Case(
        "a number of 5000 digits", "table record.jsonl", "record.jsonl:3", "Restore", line(3, f'{{"kind": {DIGITS}}}')
    ),
    Case("a line nested too deep", "table record.jsonl", "record.jsonl:3", "Restore", line(3, NESTED)),
    Case("a record of an earlier form", "table record.jsonl", "schema 1", "0.1.0", turn(1, schema=1)),
    Case(
        "records of two forms",
        "table other.jsonl record.jsonl",
        "record.jsonl has record schema 2",
        "0.1.0",
        turn(1, schema=2),
    ),
    Case(
        "a header without a time zone",
        "verify there",
        "there/records.jsonl:1: created",
        "Restore",
        lines("there/records.jsonl", {**make_header(), "created": "2026-02-03T04:05:06"}),
    ),
    Case(
        "an unknown method in a record",
        "table record.jsonl",
        "record.jsonl:2: method: 'hawk'",
        "Restore",
        turn(method="hawk"),
    ),
    Case("a time that is a text", "table record.jsonl", "record.jsonl:2: decode_s", "Restore", turn(decode_s="fast")),
    Case("a negative time", "table record.jsonl", "record.jsonl:2: decode_s", "Restore", turn(decode_s=-1.0)),
    Case(
        "steps that do not make the tokens",
        "table record.jsonl",
        "record.jsonl:2: accepted",
        "Restore",
        turn(accepted=[0], drafted_depth=[0]),
    ),
    Case(
        "more accepted than drafted",
        "table record.jsonl",
        "record.jsonl:2: accepted",
        "Restore",
        turn(accepted=[35], drafted_depth=[3]),
    ),
    Case(
        "a run's id that leads out of the folder",
        "table record.jsonl",
        "record.jsonl:1: run_id",
        "Restore",
        turn(1, run_id="../../up"),
    ),
    Case(
        "an answer twice",
        "table record.jsonl",
        "record.jsonl:3: the same method",
        "Restore",
        keep_lines(lambda found: [*found[:2], found[1]]),
    ),
    Case(
        "an answer less than the end counts",
        "table record.jsonl",
        "the end line counts",
        "Restore",
        keep_lines(lambda found: [*found[:-2], found[-1]]),
    ),
    Case(
        "a line after the end",
        "table record.jsonl",
        "a line after the end",
        "Restore",
        keep_lines(lambda found: found * 2),
    ),
    Case(
        "a record broken off before its first answer",
        "table record.jsonl",
        "record.jsonl holds no answer",
        "Evaluate",
        keep_lines(lambda found: found[:1]),
    ),
    Case(
        "a damaged record to go on with",
        EVALUATE,
        "out/records.jsonl:1",
        "restore it from a copy",
        lines("out/records.jsonl", "{", "{}"),
    ),
    Case(
        "a record of another run to go on with",
        f"{EVALUATE} --out done --max-new-tokens 5",
        "done/records.jsonl holds another run",
        "--out",
    ),
    Case(
        "a record of another tree to go on with",
        f"{EVALUATE} --out done --tree chain-2",
        "done/records.jsonl holds another run",
        "--out",
    ),
    Case("a record below a file", f"{EVALUATE} --out questions.jsonl/out", "questions.jsonl/out", "--out"),
    Case(
        "an interrupted record of another machine",
        EVALUATE + " --out done --max-new-tokens 6",
        "environment.cpu",
        "--out",
        keep_lines(lambda found: [found[0].replace('"cpu":"', '"cpu":"not '), *found[1:-1]], "done/records.jsonl"),
    ),
    Case("evaluating on a full disk", EVALUATE, "out/records.jsonl", "Free space", folder("out"), full_disk),
]

RESULTS = [
    Case("a misspelt table", "table none.jsonl --spec tabel1", "no table 'tabel1'", "Did you mean table1"),
    Case("no such table", "table none.jsonl --spec x", "no table 'x'", "table1, table2, table3, table-layers"),
    Case("no such table specification", "table record.jsonl --spec none.toml --out out", "none.toml", "reproduce/"),
    Case(
        "a table specification that is no TOML",
        "table record.jsonl --spec bad.toml --out out",
        "bad.toml is not valid TOML",
        "Mend",
        put("bad.toml", "methods = [\n"),
    ),
    Case(
        "a specification of 5000 digits",
        "table record.jsonl --spec bad.toml --out out",
        "bad.toml",
        "Mend",
        put("bad.toml", f"a = {DIGITS}"),
    ),
    Case(
        "published values nested too deep",
        "table record.jsonl --paper bad.toml --out out",
        "bad.toml",
        "Mend",
        put("bad.toml", f"a = {'[' * 9000}"),
    ),
    Case(
        "a binary table specification",
        "table record.jsonl --spec bad.toml --out out",
        "bad.toml",
        "Mend",
        put("bad.toml", b"\xff"),
    ),
    Case(
        "an unknown column",
        "table record.jsonl --spec bad.toml --out out",
        "'size'",
        "columns are",
        put("bad.toml", 'methods = ["vanilla"]\nquestions = "mt_bench"\ncolumns = ["size"]\n'),
    ),
    Case(
        "published values of the wrong type",
        "table record.jsonl --paper bad.toml --out out",
        "bad.toml, koala",
        "Correct",
        put("bad.toml", "koala = 5\n"),
    ),
    Case("a table below a file", "table record.jsonl --out questions.jsonl/out", "questions.jsonl/out", "--out"),
    Case(
        "a table in an unwritable folder",
        "table record.jsonl --out out",
        "out/table1.md",
        "--out",
        link("out", UNWRITABLE),
    ),
    Case(
        "the same target twice in a table",
        "table record.jsonl other.jsonl --out out",
        "other.jsonl are of the same target",
        "one record per target",
    ),
    Case(
        "a table of vanilla alone",
        "table vanilla.jsonl --out out",
        "vanilla.jsonl has no method beside vanilla",
        "--methods",
        record("vanilla.jsonl", methods=make_header(["vanilla"])["methods"]),
    ),
    Case(
        "a table on a full disk",
        "table record.jsonl --out out",
        "out/table1.md",
        "Free space",
        folder("out"),
        full_disk,
    ),
    Case("an unknown figure", "figure hawk record.jsonl", "hawk", "depth"),
    Case("a figure of a damaged record", "figure depth record.jsonl", "record.jsonl:2", "Restore", line(2, "{")),
    Case("nothing to verify", "verify target", "target and the folders below", "an evaluation wrote"),
    Case(
        "an unknown column asked for",
        "table record.jsonl --columns method,speed --out out",
        "'speed'",
        "acceptance_length",
    ),
    Case("a page in the place of a folder", "report done --out target", "target: it is a folder", "Name a file"),
    Case("nothing to report on", "report target", "target has no records.jsonl", "wrote"),
    Case(
        "a damaged record to verify",
        "verify done",
        "done/records.jsonl:2",
        "Restore",
        line(2, "{", "done/records.jsonl"),
    ),
    Case(
        "a damaged record to report on",
        "report done",
        "done/records.jsonl:2",
        "Restore",
        line(2, "{", "done/records.jsonl"),
    ),
    Case(
        "weights that cannot be verified",
        "verify done",
        f"{HEAD}model.safetensors",
        "permissions",
        link(f"{HEAD}model.safetensors", UNREADABLE),
    ),
    Case(
        "answers that cannot be verified",
        "verify done",
        "vanilla.jsonl",
        "permissions",
        link("done/answers/target-vanilla.jsonl", UNREADABLE),
    ),
    Case("vanilla audited against itself", "audit --methods vanilla", "vanilla", "--methods"),
    Case("an unknown task", "audit --tasks mtbench --data-dir target", "'mtbench'", "mt_bench"),
    Case("no task", "audit --tasks ,", "','", "separated by commas"),
    Case("no tasks in the data folder", "audit --tasks all --data-dir target", "target", "koala-bench data"),
    Case(
        "an audit without heads",
        "audit SMALL --tasks questions.jsonl --methods vanilla,medusa --heads none --out out",
        "none/medusa",
        "koala-bench train",
    ),
]

TRACES = [
    Case("no such answers", "analyse none.jsonl", "none.jsonl", "path"),
    Case("answers with too long a name", f"analyse {LONG}", "xxx", "permissions"),
    Case("a folder of answers", "analyse target", "target", "inside it"),
    Case(
        "unreadable answers", "analyse answers.jsonl", "answers.jsonl", "permissions", link("answers.jsonl", UNREADABLE)
    ),
    Case(
        "binary answers",
        "analyse answers.jsonl",
        "answers.jsonl, line 1",
        "UTF-8",
        put("answers.jsonl", b"\xff\xfe\x00"),
    ),
    Case("empty answers", "analyse answers.jsonl", "answers.jsonl", "choices", put("answers.jsonl")),
    Case(
        "a malformed answer", "analyse answers.jsonl", "answers.jsonl, line 2", "cut off", line(2, "{", "answers.jsonl")
    ),
    Case("questions as answers", "analyse questions.jsonl", "questions.jsonl, line 1", "--questions"),
    Case(
        "an answer twice in a file",
        "analyse answers.jsonl",
        "answers.jsonl, line 3",
        "Keep one",
        lines("answers.jsonl", *map(medusa_row, (81, 82, 81))),
    ),
    Case(
        "a negative count of tokens",
        "analyse answers.jsonl",
        "line 1: choices.0.new_tokens",
        "An answer is",
        lines("answers.jsonl", medusa_row(new_tokens=[-6, 5])),
    ),
    Case(
        "fewer times than turns",
        "analyse answers.jsonl",
        "'wall_time' has 1",
        "one a turn",
        lines("answers.jsonl", medusa_row(wall_time=[0.5])),
    ),
    Case("a file named twice", "analyse answers.jsonl ./answers.jsonl", "answers.jsonl", "once"),
    Case(
        "a baseline of other questions",
        "analyse answers.jsonl --baseline base.jsonl",
        "no question in common",
        "the same questions",
        lines("base.jsonl", medusa_row(500, "vanilla")),
    ),
    Case("no categories", "analyse answers.jsonl --by-category", "answers.jsonl", "--questions"),
    Case("a damaged record to analyse", "analyse record.jsonl", "record.jsonl:2", "Restore", line(2, "{")),
    Case("numbers below a file", "analyse answers.jsonl --csv questions.jsonl/x.csv", "questions.jsonl", "folder"),
    Case("numbers on a full disk", "analyse answers.jsonl --csv x.csv", "x.csv", "Free space", around=full_disk),
]

GATE = [
    Case("a baseline that is not there", "check none.jsonl record.jsonl", "none.jsonl", "an evaluation wrote"),
    Case("a baseline folder without records", "check target record.jsonl", "target", ".jsonl"),
    Case("the same run on both sides", "check record.jsonl record.jsonl", "the same run", "--out"),
    Case(
        "an unfinished record",
        "check record.jsonl other.jsonl",
        "other.jsonl",
        "goes on",
        keep_lines(lambda found: found[:-1], "other.jsonl"),
    ),
    Case(
        "other questions than the baseline's",
        "check record.jsonl new.jsonl",
        "questions.sha256",
        "--questions",
        record("new.jsonl", questions={"name": "x", "sha256": "99" * 32, "count": 8}),
    ),
    Case(
        "a report below a file, beside one that could be written",
        "check record.jsonl other.jsonl --junit x.xml --markdown questions.jsonl/x.md",
        "questions.jsonl",
        "folder",
    ),
    Case(
        "a report that is a folder", "check record.jsonl other.jsonl --junit target --markdown x.md", "target", "folder"
    ),
    Case(
        "a margin for what is accepted anyway",
        "check record.jsonl other.jsonl --update --margin 3",
        "--update",
        "--margin",
    ),
    Case(
        "two records for one file",
        "check record.jsonl other.jsonl more.jsonl --update",
        "record.jsonl",
        "folder",
        record("more.jsonl"),
    ),
    Case(
        "a baseline on a full disk", "check new.jsonl other.jsonl --update", "new.jsonl", "Free space", around=full_disk
    ),
]

SWEEPS = [
    Case("neither grid nor records", "sweep", "--records", "reproduce/sweeps"),
    Case("no such grid", "sweep none.toml --out out", "none.toml", "reproduce/sweeps"),
    Case("a grid that is no TOML", "sweep bad.toml --out out", "bad.toml", "Mend", put("bad.toml", "[grid\n")),
    Case("a sweep that is no sweep", "sweep --records questions.jsonl", "questions.jsonl", "--out"),
]

RECORDINGS = [
    Case("no recordings", "parity none", "There is no folder none", "recordings"),
    Case("a file of recordings", "parity questions.jsonl", "There is no folder questions.jsonl", "recordings"),
    Case("other things than recordings", "parity done", "done holds none of medusa_tiny", "recordings"),
    Case(
        "damaged tensors of a recording",
        "parity fixtures",
        "expected.safetensors",
        "again",
        put("fixtures/medusa_tiny/expected.safetensors", b"x" * 99),
    ),
    Case(
        "a recording without its target",
        "parity fixtures",
        "medusa_tiny/target",
        "--target",
        remove("fixtures/medusa_tiny/target/config.json"),
    ),
    Case(
        "an unreadable recording",
        "parity fixtures",
        "expected.safetensors",
        "again",
        link("fixtures/medusa_tiny/expected.safetensors", UNREADABLE),
    ),
    Case("a recording that lacks a field", "parity fixtures", "prompt0.hidden_states", "complete"),
]

RESULT_CASES = [*RECORDS, *RESULTS, *TRACES, *GATE, *SWEEPS, *RECORDINGS]
