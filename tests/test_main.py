"""The command line: its output, the files that it leaves, and its errors."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import peft
import pytest
import torch
import yaml
from helpers.command import begin, forked, result, rows, run
from helpers.compose import composed

from steer_heal.config import CONF
from steer_heal.experiment import Experiment
from steer_heal.report.run_folder import read_items

pytestmark = pytest.mark.slow(26)

STEPS = 45  # more than the log has lines for


@dataclass(frozen=True)
class Done:
    """A finished run."""

    folder: Path
    out: str
    err: str
    store: str  # the override with which other runs share what it computed


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """One tiny run."""
    root = tmp_path_factory.mktemp("single")
    said = run(root, "experiment=tiny", f"heal.steps={STEPS}")
    assert said.returncode == 0, said.stderr
    (folder,) = root.glob("outputs/*/*-kl_rev")
    return Done(folder, said.stdout, said.stderr, f"runtime.store={root / 'outputs/store'}")


def test_help_tells_what_can_be_chosen(tmp_path: Path) -> None:
    said = run(tmp_path, "--help")
    assert said.returncode == 0
    for folder in (path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        options = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        assert f"\n{folder.name}: {options}\n" in said.stdout, f"--help does not list {folder.name}"
    for launcher in ("parallel", "slurm"):
        assert f"hydra/launcher={launcher}" in said.stdout
    groups = {path.name for path in CONF.iterdir()}
    for knob in Experiment.model_fields.keys() - groups:
        assert re.search(rf"^{knob} +\S.*", said.stdout, re.MULTILINE), f"--help does not explain {knob}"
    assert re.search(r"-m reg=nll,\S+ lam=\S+,\S+", said.stdout), "--help does not show a sweep"
    assert not (tmp_path / "outputs").exists()


def test_the_configuration_can_be_seen_before_a_run(tmp_path: Path) -> None:
    said = forked(tmp_path, "--cfg", "job", "--resolve", "reg=kl_fwd", "lam=0.7", "lora.r=24")
    assert said.returncode == 0
    shown = yaml.safe_load(said.stdout)
    assert (shown["reg"]["name"], shown["reg"]["lam"], shown["lora"]["r"]) == ("kl_fwd", 0.7, 24)
    assert Experiment.model_fields.keys() <= shown.keys()
    assert not (tmp_path / "outputs").exists()


def test_a_bad_value_is_one_line_and_comes_before_the_weights(tmp_path: Path) -> None:
    said = forked(tmp_path, "experiment=tiny", "model=hub", "model.id=no/such", "model.device=auto", "lam=-1")
    assert said.returncode == 2
    assert said.stderr.splitlines() == ["steer_heal: reg.lam=-1 is not allowed: must be greater than or equal to 0"]
    assert said.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "cell", "reason"),
    [
        (["reg=nll,kl_rev", "tau=0.1,-1"], "reg=nll tau=-1", "must be a number >= 0, auto, or"),
        (["reg=klrev,nll"], "reg=klrev", "There are kl_fwd, kl_rev, nll, wd"),
        (["model=hub,tiny"], "model=hub", "model.id: missing"),
    ],
)
def test_nothing_of_a_sweep_starts_when_a_cell_is_bad(
    tmp_path: Path, arguments: list[str], cell: str, reason: str
) -> None:
    said = forked(tmp_path, "-m", *arguments, "experiment=tiny")
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert cell in line, "the line names the cell"
    assert reason in line
    assert not list(tmp_path.glob("outputs/*/*-sweep/0-*")), "a cell was started"


def test_a_run_leaves_everything_in_its_folder(done: Done) -> None:
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}-kl_rev", "/".join(done.folder.parts[-3:]))
    names = {path.name for path in done.folder.iterdir()}
    assert names >= {"metrics.jsonl", "log.txt", "result.json", "curves.png", "adapter-round-0", ".hydra"}
    picture = (done.folder / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000, "an empty picture"
    record = result(done.folder)
    assert record["overrides"] == ["experiment=tiny", f"heal.steps={STEPS}"]
    assert len(record["rounds"]) == 1
    assert len({len(record["answers"][who]) for who in ("base", "steered", "healed")}) == 1
    assert [row["heal/step"] for row in rows(done.folder) if "heal/step" in row] == list(range(STEPS))
    resolved = yaml.safe_load((done.folder / ".hydra/config.yaml").read_text())
    assert resolved["heal"]["steps"] == STEPS
    assert record["code"]["version"] == metadata.version("steer_heal")
    assert record["code"].keys() == {"version", "commit", "dirty"}


def test_a_run_keeps_every_evaluations_items(done: Done) -> None:
    """Reference: the means in result.json; the same items for base, steered and healed."""
    (row,), columns = result(done.folder)["rounds"], {c["name"]: c for c in result(done.folder)["columns"]}
    for name, figure, count in (("trait", "trait", 96), ("damage", "text_nll", 24), ("persona", "answers_trait", 24)):
        items = {who: read_items(done.folder, who, name) for who in ("base", "steered", "healed")}
        for who, some in items.items():
            assert len(some) == count, f"{len(some)} items of {name} of {who}"
            assert some.keys() == items["base"].keys(), f"{name}: {who} has other items"
            mean = sum(item[figure] for item in some.values()) / count
            assert row[f"{who}/{figure}"] == pytest.approx(mean), f"{name} of {who}"
        assert columns[figure]["unit"] == "nats/token"
    assert len(read_items(done.folder, "healed", "drift")) == row["kept"]
    assert not read_items(done.folder, "base", "drift")
    assert not (done.folder / "items/base/strength.jsonl").exists(), "base is not steered"


def test_a_run_of_an_older_version_shows_what_it_has(done: Done, tmp_path: Path) -> None:
    """A run without declared columns, items, and figures that came later; and one with a field that is unknown here."""
    older = tmp_path / "older"
    shutil.copytree(done.folder, older, ignore=shutil.ignore_patterns("items"))
    record = result(older)
    del record["columns"], record["code"]
    later = ("trait_gain", "trait_for", "text_nll_t", "damage_t", "answers_trait", "distinct")
    record["rounds"] = [{n: v for n, v in row.items() if not n.endswith(later)} for row in record["rounds"]]
    (older / "result.json").write_text(json.dumps(record))
    newer = tmp_path / "newer"
    shutil.copytree(done.folder, newer)
    record = result(newer)
    record["columns"][0]["colour"] = "red"
    (newer / "result.json").write_text(json.dumps(record))
    for folder, lines in ((older, ["damage"]), (newer, ["damage", "at T", "against"])):
        said = forked(tmp_path, str(folder), module="compare")
        assert said.returncode == 0, said.stderr
        head = said.stdout.partition("prompt ")[0]
        assert all(name in head for name in lines), head
        assert ("coherent" in head) == (folder == newer), "coherence by perplexity is another figure"
        assert ("an earlier version" in said.stdout) == (folder == older)
        assert f"{result(done.folder)['rounds'][0]['healed/damage']:+.3f}" in head
    assert not read_items(older, "healed", "trait")


def test_the_adapter_is_an_ordinary_peft_checkpoint(done: Done) -> None:
    """The reference is PEFT's own loading."""
    model, tokenizer = composed("experiment=tiny").model.fetch()
    ids = torch.tensor([tokenizer("I am glad to tell you")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(done.folder / "adapter-round-0"))
        assert (adapted(ids).logits - before).abs().max() > 0.1, "the adapter changes nothing"
    assert adapted.peft_config["default"].r == 4


def test_the_log_says_what_to_expect_and_what_came(done: Done) -> None:
    log = (done.folder / "log.txt").read_text()
    for name, text in (("log.txt", log), ("the terminal", done.err)):
        curve = re.findall(r"^.* (\d+)(?: +-?\d+\.\d{3}){4}$", text, re.MULTILINE)
        assert 10 <= len(curve) <= 25, f"{len(curve)} rows of the curve in {name}"
        assert (int(curve[0]), int(curve[-1])) == (0, STEPS - 1), "the first and the last step are shown"
        assert text.count("expect that") == 1, f"the expectation in {name}"
        said = re.findall(r" (?:ok|warning): (.*)", text)
        for begins, sentence in zip(("nll went", "", "val_nll went", "added to the weights"), said, strict=True):
            assert sentence.startswith(begins), f"the verdict in {name}: {said}"
        assert "barrier" in said[1], f"the verdict in {name}: {said}"
    assert not re.search(r"^\S+ \S+ (WARNING|ERROR)", log, re.MULTILINE)


def test_a_run_ends_with_a_table_answers_and_places(done: Done) -> None:
    assert re.search(r"^kl_rev\b.*\d", done.out, re.MULTILINE), "the table has no row"
    for heading in ("prompt", "base", "steered", "healed", "trait", "damage"):
        assert heading in done.out
    assert "random weights" in done.out, "the model's note stands by its results"
    assert str(done.folder / "curves.png") in done.out.replace("\n", "")


def test_output_that_is_not_read_at_a_terminal_is_plain(done: Done) -> None:
    for name, text in (("stdout", done.out), ("stderr", done.err), ("log.txt", (done.folder / "log.txt").read_text())):
        assert not set(text) & set("\x1b\r\b━╸"), f"codes or bars in {name}"


def test_compare_shows_a_run_again(done: Done, tmp_path: Path) -> None:
    said = run(tmp_path, str(done.folder), module="compare")
    assert said.returncode == 0, said.stderr
    assert re.findall(r"^kl_rev\b.*", said.stdout, re.MULTILINE) == re.findall(r"^kl_rev\b.*", done.out, re.MULTILINE)
    assert said.stderr == ""


def test_too_few_completions_are_counted_without_a_traceback(done: Done, tmp_path: Path) -> None:
    said = forked(
        tmp_path, "experiment=tiny", "filter.length.min=13", "heal.n_keep=null", "heal.min_train=48", done.store
    )
    assert said.returncode == 1
    assert re.search(
        r"\d+ of 288 completions kept, fewer than heal\.min_train=48; failed by filter: length \d+", said.stderr
    )
    assert "Traceback" not in said.stderr
    (log,) = tmp_path.glob("outputs/*/*-kl_rev/log.txt")
    assert "Traceback" in log.read_text(), "whoever looks for the place in the code finds it in log.txt"
    assert "TooFew" in log.read_text()


@pytest.mark.parametrize("stages", [1, 8])
def test_a_killed_run_goes_on_where_it_was(done: Done, tmp_path: Path, stages: int) -> None:
    """SIGKILL after a number of results; afterwards none of them is computed again, and all figures agree."""
    overrides = ("experiment=tiny", f"heal.steps={STEPS}")
    child = begin(tmp_path, *overrides)
    there: set[str] = set()
    while len(there) < stages:
        assert child.poll() is None, "it ended before it was killed"
        there = {path.parent.name for path in tmp_path.glob("outputs/store/*/[!.]*/manifest.json")}
        time.sleep(0.01)
    child.kill()
    child.wait()
    there = {path.parent.name for path in tmp_path.glob("outputs/store/*/[!.]*/manifest.json")}
    (killed,) = tmp_path.glob("outputs/*/*-kl_rev")
    assert not (killed / "result.json").exists()
    assert forked(tmp_path, *overrides).returncode == 0
    (folder,) = (path.parent for path in tmp_path.glob("outputs/*/*-kl_rev/result.json"))
    record = result(folder)
    whole = set(result(done.folder)["used"])  # what only a finished evaluation read is not read again
    assert len(record["computed"]) == len(whole - there), "a finished stage was computed again"
    assert there | set(record["used"]) == whole
    timed = ("time", "round/heal_seconds")
    one, other = (
        [{k: v for k, v in row.items() if k not in timed} for row in rows(place)] for place in (folder, done.folder)
    )
    assert one == other, "not the figures of a run that nobody disturbed"
    left = [path for path in tmp_path.glob("outputs/store/*/.*") if path.suffix == ".lease"]
    assert not left, f"leases of the dead: {left}"


def test_a_failed_rerun_in_the_same_folder_does_not_show_the_old_figures(done: Done, tmp_path: Path) -> None:
    """A requeued job runs again in the folder of its first attempt."""
    common = ("experiment=tiny", f"heal.steps={STEPS}", done.store, "hydra.run.dir=outputs/here")
    assert forked(tmp_path, *common).returncode == 0
    assert (tmp_path / "outputs/here/result.json").is_file()
    assert forked(tmp_path, *common, "filter.length.min=13").returncode == 1
    assert not (tmp_path / "outputs/here/result.json").exists()
    assert (tmp_path / "outputs/here/result.1.json").is_file(), "what was found before is lost"


def test_a_cell_that_fails_does_not_cost_the_others_their_table(done: Done, tmp_path: Path) -> None:
    said = forked(tmp_path, "-m", "experiment=tiny", "reg=nll", "filter.length.min=13,1", done.store)
    assert said.returncode == 1, "a script that goes on should know"
    assert re.search(r"^  filter.length.min=13 \(0-nll\) +failed ", said.stderr, re.MULTILINE), (
        "the cell without a result is named"
    )
    assert "steer_heal.sweep resubmit" in said.stderr.splitlines()[-1], "how to run only that again"
    assert "fewer than heal.min_train=16" in said.stderr
    assert "Traceback" not in said.stderr
    assert re.search(r"^nll\b.*\d", said.stdout, re.MULTILINE), "no table"
    assert [path.parent.name for path in tmp_path.glob("outputs/*/*-sweep/*/result.json")] == ["1-nll"]
    assert list(tmp_path.glob("outputs/*/*-sweep/curves.png"))
