"""Slips in YAML files that users write: each is one line that names the file or the field, or simply works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.saying import Said
from helpers.saying import here as here
from helpers.saying import say as say
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from steer_heal.config import CONF, ConfigError, build
from steer_heal.experiment import Experiment

pytestmark = pytest.mark.slow(12)

HEAD = "# @package _global_\ndefaults:\n  - override /model: tiny\n"
PRESETS = [  # the body of a preset after HEAD; what the line says
    ("lam: 1\n\ttau: 2\n", "mine.yaml, line 5: found character '\\t' that cannot start any token: indent with spaces"),
    ("lam: 1\nlam: 2\n", "mine.yaml, line 5: lam is given twice"),
    ("lam: 2 # ok\n  tau: 3\n", "mine.yaml, line 5: expected <block end>"),
    (
        "trait:\n  neutral: He said: hello\n",
        "mine.yaml, line 5: mapping values are not allowed here: text with a colon",
    ),
    ("lam: yes\n", "reg.lam=True is not allowed: must be a number or text, not a truth value"),
    ("lam: 2,\n", "reg.lam='2,' is not allowed: must be a valid number"),
    ("lamm: 2\n", "lamm=2: there is no such field. Did you mean lam?"),
    ("heal:\n  lrr: 2\n", "heal.lrr=2: there is no such field. Did you mean lr?"),
    ("heal: 3\n", "heal=3 is not allowed: must have fields, each set as heal.FIELD=VALUE"),
    (
        "model: tiny\n",
        "model='tiny' is not allowed: must be an option: in YAML choose it under defaults, as - override /m",
    ),
    ("filter:\n  perplexty:\n    max: 3\n", "filter.perplexty: there is no such option. Did you mean perplexity?"),
    ("trait:\n  generate: one\n", "trait.generate='one' is not allowed: must be a list"),
    (
        "trait:\n  generate:\n    - yes\n",
        "trait.generate.0=True is not allowed: must be a valid string: text such as yes",
    ),
    (
        "trait:\n  generate:\n    - Say: hi\n",
        "trait.generate.0 is not allowed: must be a valid string: text with a colon",
    ),
    (
        "trait:\n  neutral: Pay ${amount} now\n",
        "trait.neutral: Interpolation key 'amount' not found; for text that has ${",
    ),
    (
        "trait:\n  neutral: Pay ${ now\n",
        "trait.neutral: a ${ that is not closed; for text that has ${ in it write \\${",
    ),
    ("lam: ${tau}\ntau: ${lam}\n", "lam: its ${...} leads back to itself"),
    ('trait:\n  neutral: "a \\ud83d b"\n', "trait.neutral: the character U+D83D in 'a \\ud83d b': half of a surrogate"),
    ('trait:\n  held_out: [a, "\\ude00"]\n', "trait.held_out.1: the character U+DE00"),
    ('trait:\n  probes:\n    - {prompt: a, trait: "b\\0", counter: c}\n', "trait.probes.0.trait: the character U+0000"),
    ('trait:\n  positive: "\\uFFFE"\n', "trait.positive: the character U+FFFE"),
    (
        'trait:\n  narration: ["\\bI am"]\n',
        "trait.narration.0: the character U+0008 in '\\x08I am': \\b in double quotes",
    ),
    ('filter:\n  refusal:\n    patterns: ["\\ud83d"]\n', "filter.refusal.patterns.0: the character U+D83D"),
    ('runtime:\n  store: "a\\ud83d"\n', "runtime.store: the character U+D83D"),
]


def put(folder: Path, path: str, data: str | bytes) -> str:
    """Write a file of a user's own; returns the flag that adds its folder."""
    file = folder / "mine" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return f"--config-dir={folder / 'mine'}"


def experiment(folder: Path, data: str | bytes, *typed: str) -> Experiment:
    """The experiment that a user's preset gives."""
    put(folder, "experiment/mine.yaml", data)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", [f"hydra.searchpath=[{folder / 'mine'}]", "experiment=mine", *typed])
    OmegaConf.set_struct(cfg, False)
    found = build(cfg)
    assert isinstance(found, Experiment)
    return found


@pytest.mark.parametrize(("body", "told"), PRESETS, ids=[told[:40] for _, told in PRESETS])
def test_a_slip_in_a_preset_is_one_line(say: Callable[[str], Said], tmp_path: Path, body: str, told: str) -> None:
    say(f"{put(tmp_path, 'experiment/mine.yaml', HEAD + body)} experiment=mine").refused(told)


FILES = [  # a file; its bytes; what chooses it; what the line says
    ("experiment/mine.yaml", b"lam: 1\n", "experiment=mine", "mine.yaml: its first line must be: # @package _global_"),
    ("experiment/mine.yaml", b"", "experiment=mine", "mine.yaml: its first line must be: # @package _global_"),
    (
        "experiment/mine.yaml",
        b"# mine\n" + HEAD.encode(),
        "experiment=mine",
        "its first line must be: # @package _global_",
    ),
    (
        "experiment/mine.yaml",
        b"# @package _global_\n- a\n",
        "experiment=mine",
        "mine.yaml: a list, where a file has fields",
    ),
    (
        "experiment/mine.yaml",
        HEAD.encode() + b"#\xfc\n",
        "experiment=mine",
        "mine.yaml: not UTF-8 text (byte 0xfc in line 4)",
    ),
    (
        "experiment/mine.yaml",
        HEAD.encode("utf-16"),
        "experiment=mine",
        "mine.yaml: not UTF-8 text (UTF-16); save it as UTF-8",
    ),
    (
        "experiment/mine.yaml",
        b"# @package _global_\ndefaults:\n  - model: tiny\n",
        "experiment=mine",
        "- override /model: tiny",
    ),
    (
        "experiment/mine.yaml",
        HEAD.replace("model: tiny", "reg: hubr").encode(),
        "experiment=mine",
        "reg=hubr: there is no such",
    ),
    (
        "eval/mine.yaml",
        b"_target_: steer_heal.eval.mine.Mine\nname: mine\n",
        "'eval=[trait,damage,text,mine]'",
        "mine.yaml: its first line must be: # @package eval.mine",
    ),
    (
        "eval/mine.yaml",
        b"# @package eval.mine\nname: mine\n",
        "'eval=[trait,damage,text,mine]'",
        "mine.yaml: _target_ is missing",
    ),
    (
        "filter/mine.yaml",
        b"name: mine\nmax: 3\n",
        "'filter=[mine]'",
        "mine.yaml: its first line must be: # @package filter.mine",
    ),
    (
        "reg/mine.yaml",
        b"name: mine\n",
        "reg=mine",
        "mine.yaml: _target_ is missing: the option's class, such as steer_heal.reg.mine.Mine",
    ),
    (
        "trait/mine.yaml",
        b"_target_: steer_heal.trait.Trait\nname: mine\npositive: a\nnegative: b\n",
        "trait=mine",
        "trait: neutral, generate, held_out, probes, narration are missing",
    ),
    (
        "eval/mine.yaml",
        b"",
        "'eval=[trait,damage,text,mien]'",
        "eval=mien: there is no such option. Did you mean mine?",
    ),
]


@pytest.mark.parametrize(("path", "data", "chosen", "told"), FILES, ids=[f"{f[0]} {f[3][-40:]}" for f in FILES])
def test_a_file_that_cannot_be_used_is_named(
    say: Callable[[str], Said], tmp_path: Path, path: str, data: bytes, chosen: str, told: str
) -> None:
    model = "" if path.startswith("experiment") else "model=tiny"
    say(f"{put(tmp_path, path, data)} {chosen} {model}").refused(told)


def test_surrogate_pairs_as_json_escapes_them_are_joined(tmp_path: Path) -> None:
    """Reference: Python's own JSON reader."""
    text = "a \\ud83d\\ude00 b"
    found = experiment(tmp_path, f'{HEAD}trait:\n  neutral: "{text}"\n  held_out: ["{text}", b]\n')
    assert found.trait.neutral == found.trait.held_out[0] == "a \N{GRINNING FACE} b"
    assert (
        build({"_target_": "steer_heal.contexts.Contexts", "name": "x", "prompts": ["\ud83d\ude00", "b"]}).prompts[0]
        == "\N{GRINNING FACE}"
    ), "a configuration that is no file is read otherwise"


@pytest.mark.parametrize("encoded", [b"\xef\xbb\xbf%s", b"%s"], ids=["byte order mark", "plain"])
@pytest.mark.parametrize("line", [b"\n", b"\r\n"], ids=["\\n", "\\r\\n"])
def test_editors_of_all_systems_may_be_used(tmp_path: Path, encoded: bytes, line: bytes) -> None:
    data = encoded % (HEAD.encode() + b"lam: 0.25\n").replace(b"\n", line)
    assert experiment(tmp_path, data).lam == 0.25


def test_a_preset_may_build_on_another_and_escape_a_dollar(tmp_path: Path) -> None:
    found = experiment(tmp_path, "# @package _global_\ndefaults:\n  - tiny\ntrait:\n  neutral: Pay \\${amount}\n")
    assert (found.model.name, found.trait.neutral) == ("tiny", "Pay ${amount}")


def test_a_presets_field_of_another_option_names_the_preset(say: Callable[[str], Said], tmp_path: Path) -> None:
    """The advice is one that works."""
    flag = put(tmp_path, "experiment/mine.yaml", f"{HEAD}dose:\n  alpha: [1.0]\n")
    said = "dose.alpha=[1.0]: there is no such field"
    advice = "experiment=mine sets it: to leave it out, add '~dose.alpha'"
    say(f"{flag} experiment=mine dose=walk").refused(said, advice)
    say(f"-m {flag} experiment=mine dose=fixed,walk").refused(f"dose=walk: {said}", advice)
    text = (tmp_path / "mine/experiment/mine.yaml").read_text()
    assert experiment(tmp_path, text, "dose=walk", "~dose.alpha").dose.name == "walk"


def test_text_from_bytes_that_are_not_utf_8_is_refused() -> None:
    """As Python passes such arguments on."""
    with pytest.raises(ConfigError, match=r"prompts\.1: the character U.DCFC"):
        text = b"\xfc".decode(errors="surrogateescape")
        build({"_target_": "steer_heal.contexts.Contexts", "name": "x", "prompts": ["a", text]})
