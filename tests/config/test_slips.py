"""Slips of the command line: each is one line that says what to write instead, or simply works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers.compose import composed
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say

from steer_heal.config import CONF, ConfigError
from steer_heal.config.typed import flags_first

pytestmark = pytest.mark.slow(12)

SLIPS = [  # what is typed; what the line begins with; what it says
    # what a shell does
    ("-m reg=nll, kl_fwd", "reg=nll,: ", "the shell ends an argument at a space: write reg=nll,kl_fwd"),
    ("filter=[length, refusal]", "filter=[length,: ", "write 'filter=[length,refusal]'"),
    ("dose.alpha=[0.5, 1.0, 2]", "dose.alpha=[0.5,: ", "write 'dose.alpha=[0.5,1.0,2]'"),
    ("lam = 1", "lam: ", "write lam=1, without spaces"),
    ("lam =1", "lam: ", "write lam=1, without spaces"),
    ("lam= 1", "1: ", "write lam=1, without spaces"),
    ("reg nll", "reg: ", "write reg=nll"),
    ("'seed=1 lam=2'", "seed=1 lam=2: ", "several settings in one argument"),
    # characters
    ("reg:nll", "reg:nll: ", "write reg=nll"),
    ("reg/nll", "reg/nll: ", "write reg=nll"),
    ("lam==1", "lam==1: ", "write lam=1"),
    ("lam=1,", "lam=1,: ", "write lam=1"),
    ("-m seed=0,,1", "seed=0,,1: ", "write seed=0,1"),
    ("'filter=[length'", "filter=[length: ", "a bracket is not closed"),
    ("'reg=“nll”'", "reg=“nll”: ", "a typographic quote, U+201C"),
    ("'seed=\u00a01'", "seed=\ufffd1: ", "an invisible character, U+00A0"),
    ("seed=0,1", "seed=0,1: ", "add -m"),
    ("lam=0,5", "lam=0,5: ", "a fraction is written 0.5"),
    ("dose.alpha=0.5,1", "dose.alpha=0.5,1: ", "for a list, write 'dose.alpha=[0.5,1]'"),
    # flags
    ("--seed 3", "--seed: ", "a value is set as seed=VALUE, without dashes"),
    ("--lam=1", "--lam: ", "a value is set as lam=1, without dashes"),
    ("lam=1 --multirum", "--multirum: ", "Did you mean --multirun?"),
    ("--configdir mine", "--configdir: ", "Did you mean --config-dir?"),
    ("model=tiny -cd", "-cd: ", "nothing follows it; a folder"),
    ("-cd nowhere lam=1", "-cd nowhere: ", "there is no such folder"),
    ("-c lam=1", "-c lam=1: ", "one of job, hydra, all must follow -c"),
    ("-cn tiny", "tiny: ", "a preset is chosen as experiment=tiny"),
    # numbers and names in place of options
    ("lora=r12", "lora=r12: ", "Write lora.r=12 to set a rank that has no file"),
    ("lora=12", "lora=12: ", "Write lora.r=12 to set a rank that has no file"),
    ("dose=0.5", "dose=0.5: ", "Write 'dose.alpha=[0.5]'"),
    ("steer=5", "steer=5: ", "Write 'steer.layers=[5]'"),
    ("generate=128", "generate=128: ", "Write generate.max_new_tokens=128"),
    ("model=Qwen/Qwen3-0.6B", "model=Qwen/Qwen3-0.6B: ", "model=hub model.id=Qwen/Qwen3-0.6B"),
    ("model.id=gpt2", "model.id: ", "only some options of model have such a knob: hub"),
    ("model=hub model.id=mine model.template.style=1", "model.template.style: ", "write +model.template.style=..."),
    ("launcher=slurm", "launcher: ", "hydra/launcher=slurm"),
    ("hydra.launcher=slurm", "hydra.launcher=slurm: ", "hydra/launcher=slurm"),
    ("hydra.searchpath=mine", "hydra.searchpath=mine: ", "write 'hydra.searchpath=[mine]'"),
    ("'hydra.searchpath=[/no/such]'", "hydra.searchpath='/no/such': ", "there is no such folder"),
    # lists of options
    ("eval=arr", "eval=arr: ", "chosen as 'eval=[trait,damage,text,arr]'"),
    ("eval=strength", "eval is not allowed: ", "write 'eval=[trait,damage,text,strength]'"),
    ("filter=none", "filter=none: ", "to choose none, write 'filter=[]'"),
    ("eval=null", "eval=null: ", "write 'eval=[]'"),
    ("'filter=[[length]]'", "filter=[[length]]: ", "There are length, narration"),
    ("~filter", "~filter: ", "'filter=[]'"),
    ("'filter=[length]' +filter.refusal.opening=9", "filter.refusal: ", "add it, 'filter=[length,refusal]'"),
    ("experiment=tiny 'filter=[length]' filter.perplexity.max=9", "filter.perplexity: ", "perplexity is not chosen"),
    # values
    ("lam=???", "lam: missing; ", "give lam=VALUE"),
    ("model=hub steer=file", "model.id, steer.path: missing; ", "give model.id=VALUE steer.path=VALUE"),
    ("'trait.neutral=Pay ${amount}'", "trait.neutral: ", "for text that has ${ in it write \\${"),
    ("'trait.neutral=Pay ${amount'", "trait.neutral=Pay ${amount: ", "for text that has ${ in it write \\${"),
    ("'lam=${oc.env:NO_SUCH}'", "lam: ", "the environment variable NO_SUCH is not set"),
    ("'lam=${foo:1}'", "lam: ", "there is no such resolver"),
    ("'lam=${lam}'", "lam: ", "leads back to itself"),
    (
        "'trait.probes=[{promt: a, trait: b, counter: c}]'",
        "trait.probes.0.promt='a': ",
        "There are prompt, trait, count",
    ),
    ("'trait.probes=[{prompt: a}]'", "trait.probes.0: ", "trait, counter are missing"),
    ("'heal={lrr: 1}'", "heal: ", "it has no such field; there are heal.name, heal.lr"),
    ("dose.alpha=1", "dose.alpha=1 is not allowed: ", "must be a list: write 'dose.alpha=[1]'"),
    ("seed=x lam=y", "reg.lam='y' is not allowed", "a valid number"),
    ("seed=x n_rounds=0", "seed='x' is not allowed", "n_rounds=0 is not allowed"),
]


@pytest.mark.parametrize(("typed", "begins", "told"), SLIPS, ids=[typed for typed, *_ in SLIPS])
def test_a_slip_is_one_line_with_what_to_write(say: Callable[[str], Said], typed: str, begins: str, told: str) -> None:
    chosen = "" if "model" in typed else "model=tiny"
    line = say(f"{typed} {chosen}").refused(told)
    assert line.startswith(f"steer_heal: {begins}"), line


@pytest.mark.parametrize(
    ("typed", "moved"),
    [
        ("reg=nll -m", "-m reg=nll"),
        ("lam=1 --multirun seed=0,1 reg=nll", "--multirun lam=1 seed=0,1 reg=nll"),
        ("lam=1 --multi", "--multirun lam=1"),
        ("lam=1 -cd / reg=nll", "-cd / lam=1 reg=nll"),
        ("--config-dir=/ lam=1", "--config-dir=/ lam=1"),
        ("lam=1 --cfg job --resolve", "--cfg job --resolve lam=1"),
        ("lam=1 --info defaults", "--info defaults lam=1"),
        ("--info lam=1", "--info lam=1"),
        ("-h lam=1", "-h lam=1"),
    ],
)
def test_flags_may_stand_anywhere(typed: str, moved: str) -> None:
    """Reference: the order that argparse takes."""
    assert flags_first(typed.split()) == moved.split()


@pytest.mark.parametrize("chosen", ["[]", "[length]", "length", "[length,refusal]"])
def test_a_presets_fields_for_a_filter_that_is_not_chosen_do_not_count(chosen: str) -> None:
    """`tiny` sets the limits of perplexity and length."""
    filters = composed("experiment=tiny", f"filter={chosen}").filter
    assert list(filters) == [name for name in chosen.strip("[]").split(",") if name]
    if "length" in filters:
        assert filters["length"].key_fields()["min"] == 1, "the preset's field is lost where it counts"


def test_without_filters_a_run_keeps_every_answer(say: Callable[[str], Said]) -> None:
    """What it needs beyond the check is the weights."""
    with pytest.raises(AssertionError, match="weights were loaded"):
        say("experiment=tiny filter=[]")


@pytest.mark.parametrize("field", ["trait.probes=[{prompt: a, trait: b, counter: c}]", "trait.held_out=[one]"])
def test_a_single_item_is_doubted(field: str) -> None:
    doubts = composed("model=tiny", field).doubts()
    assert [doubt.split()[0] for doubt in doubts] == [field.partition("=")[0]]
    assert composed("model=tiny").doubts() == []


def test_a_folder_of_one_group_is_not_the_folder_of_groups() -> None:
    with pytest.raises(ConfigError, match="give the folder that it is in"):
        flags_first(["-cd", str(CONF / "experiment")])
