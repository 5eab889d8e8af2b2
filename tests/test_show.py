"""`python -m steer_heal.show`, and what a run leaves in its folder: completions, adapters, names, the log's lines."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers.command import forked, result, run
from helpers.compose import composed

from steer_heal import show
from steer_heal.artifacts import Adapter, Completion, Completions, Metrics, write_jsonl
from steer_heal.filter import Filter
from steer_heal.filter.refusal import Refusal
from steer_heal.lm.student import Student
from steer_heal.model import load
from steer_heal.report import completions
from steer_heal.store import Store, damage, stage
from steer_heal.store.entries import entries, used_by_runs
from steer_heal.sweep.status import Status, write
from steer_heal.system.process import current_process
from steer_heal.system.terminal import printable, within

pytestmark = pytest.mark.slow(8)

FEW = ("experiment=tiny", "heal.steps=2", "filter.perplexity.max=300", "generate.n_samples=2", "heal.n_keep=16")
NASTY = "\x1b[2J\x1b]0;owned\x07 one\ttwo \u202eevil\u2066 [bold]not markup[/] \x9b31m\nsecond line"


@dataclass(frozen=True)
class Done:
    """A run of two rounds, and its store."""

    folder: Path
    store: Path
    log: str


def put_down(folder: Path, k: int, rows: Sequence[completions.Record]) -> None:
    """A round's completions, where a run leaves them."""
    (folder / completions.FOLDER).mkdir(exist_ok=True)
    write_jsonl(folder / completions.FOLDER / f"round-{k}.jsonl", rows)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    root, before = tmp_path_factory.mktemp("run"), os.umask(0o027)
    said = run(root, *FEW, "n_rounds=2", "hydra.run.dir=here")  # a fork would have the umask of its parent
    os.umask(before)
    assert said.returncode == 0, said.stderr
    return Done(root / "here", root / "outputs/store", said.stderr)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, output and errors of the command, in this process."""
    capsys.readouterr()
    try:
        code: Any = show.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def listed(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said(capsys, *arguments, "--json")[1].splitlines()]


def made_up(folder: Path, *texts: str, k: int = 0) -> Path:
    """A run's folder with nothing but completions, the odd ones dropped."""
    rows = [
        Completion(f"Prompt {i}", (1,), (2, 3), text, 0.5, True, {"refusal": i % 2}, ("refusal",) * (i % 2), not i % 2)
        for i, text in enumerate(texts)
    ]
    found = {"refusal": Refusal(name="refusal", opening=9, patterns=("no",))}
    folder.mkdir(exist_ok=True)
    put_down(folder, k, completions.records(k, Completions(tuple(rows)), found))
    return folder


def test_every_completion_is_shown_with_scores_and_reasons(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the filtered completions in the store."""
    (key,) = (key for key, what in result(done.folder)["used"].items() if what == "filter.sift: round 1, batch 1")
    rows = Completions.load(done.store / "filter.sift" / key).rows
    found = listed(capsys, done.folder, "--round", 1)
    assert [(r["prompt"], r["text"], r["dose"], r["kept"]) for r in found] == [
        (row.prompt, row.text, row.dose, row.kept) for row in rows
    ]
    assert [r["scores"] for r in found] == [row.scores for row in rows]
    assert [tuple(f["filter"] for f in r["failed"]) for r in found] == [row.reasons for row in rows]
    dropped = next(r for r in found if not r["passed"])
    assert dropped["failed"] == [{"filter": "perplexity", "score": dropped["scores"]["perplexity"], "max": 300.0}]
    _, out, _ = said(capsys, done.folder, "--round", 1, "--dropped")
    assert f"dropped for perplexity {dropped['scores']['perplexity']:.3g} (max 300)" in out
    assert f"prompt   {dropped['prompt']}" in out


def test_kept_dropped_round_and_prompt_choose(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    every = listed(capsys, done.folder)
    assert {row["round"] for row in every} == {0, 1}
    for option, wanted in (
        (["--kept"], [r for r in every if r["kept"]]),
        (["--dropped"], [r for r in every if r["failed"]]),
        (["--round", 1], [r for r in every if r["round"] == 1]),
        (["--prompt", every[0]["prompt"][:9].upper()], [r for r in every if every[0]["prompt"][:9] in r["prompt"]]),
    ):
        assert listed(capsys, done.folder, *option) == wanted != every, option
        assert wanted, option


def test_nothing_to_show_is_said_and_is_status_1(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, done.folder, "--prompt", "in no prompt")
    assert code == 1
    assert "round 0: " in out
    assert err.count("\n") == 1


def test_the_head_counts_by_filter_as_the_log_does(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the figures of the round."""
    for k, row in enumerate(result(done.folder)["rounds"]):
        line = (
            f"round {k}: {row['passed']:.0f} of {row['generated']:.0f} pass "
            f"(perplexity {row['generated'] - row['passed']:.0f}), {row['kept']:.0f} kept"
        )
        assert f" I {line}\n" in done.log
        assert f"\n{line}\n" in said(capsys, done.folder)[1]


def test_the_folder_alone_is_enough(done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the folder on a machine without the store."""
    shutil.copytree(done.folder, tmp_path / "copy")
    assert listed(capsys, tmp_path / "copy") == listed(capsys, done.folder)


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (Status(state="running", owner=current_process()), "still running"),
        (Status(state="failed", message="TooFew: \x1b[31m3 of 96"), "failed: TooFew: \\x1b[31m3 of 96"),
        (Status(state="interrupted", message="KeyboardInterrupt"), "interrupted: KeyboardInterrupt"),
    ],
)
def test_a_run_without_a_result_shows_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: Status, line: str
) -> None:
    write(tmp_path, status)
    code, out, _ = said(capsys, tmp_path)
    assert code == 1
    assert line in out
    assert "no completions" in out
    made_up(tmp_path, "one", "two")
    code, out, _ = said(capsys, tmp_path)
    assert code == 0
    assert line in out
    assert "round 0: 1 of 2 pass (refusal 1), 1 kept" in out


def test_a_round_of_which_too_few_pass_leaves_its_completions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = forked(tmp_path, *FEW, "filter.length.min=13", "heal.top_ups=0", "hydra.run.dir=here")
    assert failed.returncode == 1
    code, out, _ = said(capsys, tmp_path / "here", "--dropped")
    assert code == 0
    assert "failed: TooFew" in out
    assert "dropped for perplexity" in out
    assert "length 12 (min 13)" in out


def test_a_filter_of_ones_own_shows_its_limits_without_more_code() -> None:
    """Its `min` and `max`, otherwise all its numbers; a flag and a text are none."""

    class Own(Filter):
        threshold: float
        strict: bool = True

    class Both(Own):
        max: int

    assert Own(name="own", threshold=0.3).compared_with() == {"threshold": 0.3}
    assert Both(name="both", threshold=0.3, max=2).compared_with() == {"max": 2}
    assert Refusal(name="refusal", opening=9, patterns=("no",)).compared_with() == {"max": 0}


def test_nothing_that_a_model_wrote_acts_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences, marks that turn text, 8-bit controls and markup, in prompts and answers, in both forms."""
    made_up(tmp_path, NASTY)
    (row,) = completions.read(tmp_path)[0]
    put_down(tmp_path, 0, [{**row, "prompt": NASTY}])
    _, out, _ = said(capsys, tmp_path)
    assert all(c.isprintable() or c == "\n" for c in out), repr(out)
    for shown in ("\\x1b[2J", "\\x07", "\\u202eevil\\u2066", "[bold]not markup[/]", "\\x9b31m", "    second line"):
        assert shown in out, f"{shown} is lost"
    _, out, _ = said(capsys, tmp_path, "--json")
    assert out.isascii()
    assert out.rstrip("\n").isprintable()
    assert json.loads(out)["text"] == NASTY, "jq gets the text itself"


def test_answers_that_a_comparison_shows_are_safe_as_well() -> None:
    assert all(c.isprintable() or c == "\n" for c in printable(NASTY).plain)


def test_on_a_terminal_it_goes_through_the_pager(tmp_path: Path) -> None:
    """A real terminal; the pager is the user's."""
    made_up(tmp_path, *["some text"] * 50)
    ours, theirs = pty.openpty()
    environ = os.environ | {"PAGER": "sed s/^/paged:/", "TERM": "xterm"}
    command = [sys.executable, "-m", "steer_heal.show", str(tmp_path)]
    child = subprocess.Popen(command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux raises it once the other side is closed
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert child.wait(300) == 0
    assert shown.count(b"paged:") > 50, shown[-500:]


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    made_up(tmp_path, *["some text " * 100] * 300)
    command = f"{sys.executable} -m steer_heal.show {tmp_path} | head -3"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300, check=False)
    assert (found.stdout.count("\n"), found.stderr) == (3, "")


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, sweep = made_up(tmp_path / "run", "text"), tmp_path / "sweep"
    sweep.mkdir()
    cells = [{"folder": f"{i}-nll", "overrides": []} for i in range(12)]
    record = {"command": [], "cwd": ".", "launcher": {}, "began": "", "cells": cells}
    (sweep / "sweep.json").write_text(json.dumps(record))
    (run / "log.txt").touch()
    (tmp_path / "empty").mkdir()
    for arguments, part in (
        ([], "the following arguments are required: RUN; usage: "),
        ([tmp_path / "rum"], "there is no such folder. Did you mean run?"),
        ([run / "log.txt"], f"give {run}"),
        ([run / "completions"], f"give {run}"),
        ([tmp_path / "empty"], "not the folder of a run"),
        ([tmp_path], "in it there are run, sweep"),
        ([sweep], "0-nll, 1-nll, 2-nll, 3-nll, 4-nll, 5-nll, 6-nll, 7-nll and 4 more"),
        ([run, "--round", 3], "has round 0 only"),
        ([run, "--round", -1], "has round 0 only"),
        ([run, "--round", "x"], "--round: invalid int value: 'x'"),
        ([run, "--kept", "--dropped"], "not allowed with argument"),
        ([run, "--drop"], "unrecognized arguments: --drop"),
    ):
        code, out, err = said(capsys, *arguments)
        assert (code, out) == (2, ""), f"{arguments}: {err}"
        assert err.count("\n") == 1
        assert err.startswith("steer_heal: ")
        assert part in err, err
    (run / "completions/round-0.jsonl").write_text('{"round": 0}\n')
    assert "round-0.jsonl cannot be read: line 1 lacks dose" in said(capsys, run)[2]
    (run / "completions/round-0.jsonl").write_text("{\n")
    code, _, err = said(capsys, run)
    assert (code, err.count("\n")) == (2, 1), err


def test_a_run_of_an_earlier_version_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, out, _ = said(capsys, tmp_path)
    assert code == 1
    assert "run it again" in out


def test_an_earlier_attempts_completions_do_not_pass_for_new(done: Done, tmp_path: Path) -> None:
    """With a result they are kept beside it; the second run has one round."""
    shutil.copytree(done.folder, tmp_path / "here")
    again = forked(tmp_path, *FEW, "hydra.run.dir=here", f"runtime.store={done.store}")
    assert again.returncode == 0, again.stderr
    assert completions.read(tmp_path / "here").keys() == {0}
    assert (tmp_path / "here/result.1.json").is_file()
    assert (tmp_path / "here/completions.1/round-1.jsonl").is_file(), "what was found before is lost"


def test_the_log_says_which_model_is_evaluated(done: Done) -> None:
    evaluated = re.findall(r" I eval\.evaluate: (.*), (\w+)$", done.log, re.MULTILINE)
    times = Counter(where for where, _ in evaluated)
    models = ["base", *(f"round {k}, {who}" for k in (0, 1) for who in ("steered", "healed"))]
    assert list(times) == models
    assert {name for where, name in evaluated if where == "base"} == {"trait", "damage", "text", "persona"}


def test_what_the_store_serves_is_one_line_a_round(done: Done, tmp_path: Path) -> None:
    assert "from the store" not in done.log
    log = forked(tmp_path, *FEW, f"runtime.store={done.store}", "n_rounds=2").stderr
    served = re.findall(r" I (.*), from the store: (.*)", log)
    assert [where for where, _ in served] == ["base, round 0", "round 1"]
    assert "heal.heal" in served[0][1]
    assert "eval.evaluate (14)" in served[0][1], served
    assert " I eval.evaluate" not in log


@stage("test.count")
def count_up(n: int) -> Metrics:
    return Metrics({"n": n})


def test_what_is_served_is_told_before_what_is_computed(tmp_path: Path, told: list[str]) -> None:
    """And a result that this run has had before is not told again."""
    for n in (1, 2):
        Store(tmp_path)(count_up, n)
    told.clear()
    store = Store(tmp_path)
    with within("round 0"):
        for n in (1, 2, 1, 3, 3):
            store(count_up, n)
        store.log_served()
    assert told == ["round 0, from the store: test.count (2)", "test.count: round 0"]


def test_the_results_that_a_run_used_are_named(done: Done) -> None:
    """Reference: the store's folders; nothing of what the run used is collected."""
    used = result(done.folder)["used"]
    there = {entry.key: entry.stage for entry in entries(done.store)}
    assert {key: what.partition(":")[0] for key, what in used.items()} == {key: there[key] for key in used}
    assert {"steer.extract: round 1", "heal.heal: round 0", "eval.evaluate: round 1, healed, damage"} <= {
        *used.values()
    }
    assert used_by_runs(done.folder.parent) == set(used)


def test_an_edited_adapter_leaves_the_store_whole(done: Done, tmp_path: Path) -> None:
    """Every file of a run's folder is its own, with the user's permissions."""
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_nlink > 1] == []
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (done.folder / "adapter-round-0").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    shutil.copytree(done.folder, tmp_path / "run", copy_function=os.link)  # edited in place below
    for name in ("adapter_config.json", "adapter_model.safetensors", "summary.json"):
        with (tmp_path / "run/adapter-round-0" / name).open("r+b") as file:
            before = file.read(9)
            file.seek(0)
            file.write(b"x" * len(before))
            file.flush()
            assert [e.folder for e in entries(done.store, "heal.heal") if damage(e.folder) != ""] == []
            file.seek(0)
            file.write(before)


def test_plain_peft_loads_the_rounds_and_adds_them_up(done: Done) -> None:
    """docs/running.md's lines; reference: this project's own sum of base and adapters."""
    exp = composed("experiment=tiny")
    base, ids = load(exp.model), torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    student = Student(base)
    with torch.no_grad():
        for k in (0, 1):
            student = student.learn(Adapter.load(done.folder / f"adapter-round-{k}"))
        with student.view() as ours:
            expected = ours(ids).logits
        model = peft.PeftModel.from_pretrained(exp.model.fetch()[0], str(done.folder / "adapter-round-0"), "round-0")
        model.load_adapter(str(done.folder / "adapter-round-1"), "round-1")
        one = model(ids).logits
        model.base_model.set_adapter(["round-0", "round-1"])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (one - expected).abs().max() > 1e-2, "the second adapter adds nothing"
