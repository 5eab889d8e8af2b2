"""Table of what each stage reads: results of other stages, and fields of the configuration."""

from __future__ import annotations

from helpers.replay import ROUNDS
from helpers.vectors import kept_file


def reads(rounds: int = ROUNDS, under: str = "") -> dict[str, set[str]]:
    """Results of other stages that each stage is given: the signatures, and the callers in the loop.

    Of a search the replay shows four trials, at 1, 2, 4 and 8.
    """
    graph: dict[str, set[str]] = {}

    def examined(who: str, k: int, subject: set[str]) -> None:
        graph[f"{who}.answers {k}"] = graph[f"{who}.eval.trait {k}"] = graph[f"{who}.eval.damage {k}"] = subject
        for name in ("text", "persona", *(["strength"] if who == "steered" else [])):
            graph[f"{who}.eval.{name} {k}"] = subject | {f"{who}.answers {k}"}
        if who == "healed":
            graph[f"{who}.eval.drift {k}"] = subject | {f"drift {k}"}

    examined("base", 0, set())
    for k in range(rounds):
        student = {f"heal {j}" for j in range(k)}
        graph[f"extract {k}"] = student
        for i in range(4 * k, 4 * k + 4):
            if under in ("dose=walk", "dose=iso_kl"):
                graph[f"trial.answers {i}"] = student | {f"extract {k}"}
            if under == "dose=walk":
                graph[f"trial.scored {i}"] = {f"trial.answers {i}"}
                graph[f"trial.filtered {i}"] = {f"trial.answers {i}", f"trial.scored {i}"}
            if under == "dose=iso_kl":
                graph[f"trial.strength {i}"] = student | {f"extract {k}", f"trial.answers {i}"}
        graph[f"train.answers {k}"] = steered = student | {f"extract {k}"}
        examined("steered", k, steered)  # the dose is a number, not a result
        graph[f"steered.eval.persona {k}"] = steered | {f"steered.answers {k}", f"held.scored {k}"}
        for who, answers in (("train", f"train.answers {k}"), ("held", f"steered.answers {k}")):
            graph[f"{who}.scored {k}"] = {answers}
            graph[f"{who}.filtered {k}"] = {answers, f"{who}.scored {k}"}
        graph[f"drift {k}"] = student | {f"heal {k}", f"train.filtered {k}"}
        graph[f"heal {k}"] = student | {f"train.filtered {k}", f"held.filtered {k}"}
        examined("healed", k, student | {f"heal {k}"})
        for i in range(3 * k, 3 * k + 3) if under == "match=gate" else ():
            graph[f"gated.eval.trait {i}"] = graph[f"gated.eval.damage {i}"] = student | {f"heal {k}"}
    return graph


def affected(first: set[str], rounds: int = ROUNDS, under: str = "") -> set[str]:
    """Those stages, named with or without a round, and everything computed from their results."""
    graph = reads(rounds, under)
    found = {label for label in graph if label in first or label.split()[0] in first}
    while more := {label for label, given in graph.items() if given & found} - found:
        found |= more
    return found


# Who can read what: the arguments that the loop hands to the stages.
NOTHING: set[str] = set()
EXTRACT, HEAL = {"extract"}, {"heal"}
HELD_OUT = {"base.answers", "steered.answers", "healed.answers"}
ANSWERS = HELD_OUT | {"train.answers"}
SCORED, SIFTED = {"train.scored", "held.scored"}, {"train.filtered", "held.filtered"}
MODELS, OF_ALL = ("base", "steered", "healed"), ("trait", "damage", "text", "persona")
EVALS = {name: {f"{who}.eval.{name}" for who in MODELS} for name in OF_ALL}
ALL_EVALS = set().union(*EVALS.values())
MODEL = EXTRACT | ANSWERS | SCORED | ALL_EVALS | HEAL
STEERED = {"steered.answers", "steered.eval.strength", *(f"steered.eval.{name}" for name in EVALS)}
TRIED = {"trial.answers"}
DOSED = {"train.answers"} | STEERED  # at the mean dose

# Override -> the stages that can read the field, under the tiny experiment and under some other choices. The expected
# set is these and what follows from them.
TABLE: dict[str, dict[str, set[str]]] = {
    "": {
        "model.dtype=bfloat16": MODEL,
        "model.attn_implementation=eager": MODEL,
        "model.init_seed=1": MODEL,
        "model.note=other": NOTHING,
        "contexts.name=other": NOTHING,
        "contexts.prompts=[Name a bird,Name a fish]": EXTRACT,
        "contexts.n_drawn=20": EXTRACT,
        "contexts.n_drawn=97": EXTRACT,
        "trait.name=other": NOTHING,
        "trait.positive=Be kind": EXTRACT | SCORED | EVALS["persona"],
        "trait.negative=Be cold": EXTRACT | SCORED | EVALS["persona"],
        "trait.neutral=Be": ANSWERS | EVALS["trait"] | EVALS["damage"],
        "trait.generate=[a,b,c,d,e,f,g,h]": {"train.answers"},
        "trait.held_out=[a,b]": HELD_OUT,
        "trait.probes=[{prompt: a, trait: b, counter: c}]": EVALS["trait"],
        "trait.narration=[persona]": SIFTED,
        "steer.layers=[0,3]": EXTRACT,
        "dose.alpha=[0.4,0.6,0.8,0.9]": DOSED,
        "generate.name=other": NOTHING,
        "generate.n_prompts=20": {"train.answers"},
        "generate.max_new_tokens=5": ANSWERS,
        "generate.n_samples=2": ANSWERS,
        "generate.temperature=0.9": ANSWERS,
        "generate.top_k=49": ANSWERS,
        "generate.top_p=0.8": ANSWERS,
        "filter.perplexity.max=9e5": SIFTED,
        "filter.perplexity.tail=0.4": SIFTED,
        "filter.repetition.max=0.3": SIFTED,
        "filter.narration.max=1": SIFTED,
        "filter.refusal.opening=100": SIFTED,
        "filter.refusal.patterns=[decline]": SIFTED,
        "filter.length.min=2": SIFTED,
        "filter=[length,perplexity]": SIFTED,
        "reg.lam=0.7": HEAL,
        "reg.tau=0.1": HEAL,
        "reg=nll": HEAL,
        "reg=kl_fwd": HEAL,
        "reg=wd": HEAL,
        "lora.name=other": NOTHING,
        "lora.r=8": HEAL,
        "lora.lora_alpha=4": HEAL,
        "lora.lora_alpha=8": NOTHING,  # 2 r, as it was
        "lora.target_modules=[q_proj,v_proj]": HEAL,
        "lora.first=0.5": HEAL,
        "heal.name=other": NOTHING,
        "heal.lr=0.02": HEAL,
        "heal.warmup=0.2": HEAL,
        "heal.epochs=1": HEAL,
        "heal.steps=4": HEAL,
        "heal.batch_size=4": HEAL,
        "heal.max_len=500": HEAL,
        "heal.n_keep=31": HEAL | {"train.filtered"},
        "heal.n_keep=null": HEAL | {"train.filtered"},
        "heal.min_train=17": NOTHING,
        "heal.top_ups=1": NOTHING,  # there are enough
        "heal.agg=max": HEAL,
        "heal.reference=prev": {"heal 1"},  # in round 0 they are the same
        "heal.measure_every=3": HEAL,
        "heal.max_gnorm=2": NOTHING,
        "eval.damage.texts=[{request: a, text: some text}]": EVALS["damage"],
        "eval.text.max_repetition=0.3": EVALS["text"],
        "eval.text.min_compression=0.3": EVALS["text"],
        "eval.text.min_distinct=0.3": EVALS["text"],
        "runtime.name=other": NOTHING,
        "runtime.store=elsewhere": NOTHING,
        "runtime.micro_batch=3": NOTHING,
        "runtime.score_batch=3": NOTHING,
        "runtime.generate_batch=3": NOTHING,
        "runtime.cuda_graphs=false": NOTHING,
        "runtime.head_chunk=3": NOTHING,
        "runtime.checkpoint_blocks=true": NOTHING,
        "runtime.threads=1": NOTHING,
        "runtime.checkpoint_seconds=0": NOTHING,
        "tracker=wandb": NOTHING,
        "lam=0.7": HEAL,
        "tau=0.1": HEAL,
        "decay=step": NOTHING,
        "seed=1": EXTRACT | ANSWERS | SIFTED | HEAL,
        "n_rounds=1": NOTHING,
        "min_coherence=1": NOTHING,
    },
    "steer=pca": {"steer.layers=[0,3]": EXTRACT},
    "steer=logistic": {"steer.layers=[0,3]": EXTRACT, "steer.l2=0.1": EXTRACT},
    "steer=cosine_gated": {"steer.layers=[0,3]": EXTRACT},
    "steer=ablate": {"steer.layers=[0,3]": EXTRACT},
    "steer=random": {"steer.layers=[0,3]": EXTRACT, "steer.draw=1": EXTRACT},
    "steer=prompt": {
        "trait.positive=Be kind": EXTRACT | SCORED | EVALS["persona"],
        "dose.alpha=[0.1,0.2,0.3,0.4]": NOTHING,
    },
    "steer=file": {
        f"steer.path={kept_file(1)}": EXTRACT,
        "steer.layers=[1]": EXTRACT,
        "steer.layers=[1,2]": NOTHING,  # all of them, as it was
        "steer.norm=own": EXTRACT,
    },
    "steer.layers=auto": {"steer.layers=[2]": {"extract 0"}},
    # A search enters no key: what it tries does, and what it finds.
    "dose=walk": {
        "dose.target=0.9": NOTHING,  # all of the answers that the replay shows survive
        "dose.shares=[0.3,0.5,0.7,0.9]": DOSED,
        "dose.samples=2": TRIED,
        "dose.least=0.1": NOTHING,
        "dose.most=6": DOSED | {"trial.answers 3", "trial.answers 7"},
        "dose.precision=0.1": NOTHING,
        "filter.length.min=2": SIFTED | {"trial.filtered"},
        "seed=1": EXTRACT | ANSWERS | TRIED | SIFTED | {"trial.filtered"} | HEAL,
    },
    "dose=iso_kl": {
        "dose.target=5": NOTHING,
        "dose.shares=[0.9,0.9,1.0,1.0]": DOSED,
        "dose.samples=2": TRIED,
        "dose.least=0.1": NOTHING,
        "dose.most=6": DOSED | {"trial.answers 3", "trial.answers 7"},
        "dose.precision=0.1": NOTHING,
    },
    "reg=nll": {"lam=0.7": NOTHING, "tau=0.1": NOTHING, "decay=step": NOTHING, "heal.agg=max": HEAL},
    "reg=kl_fwd": {"lam=0.7": HEAL, "tau=0.1": HEAL, "decay=step": NOTHING, "reg.lam=0.7": HEAL, "reg.tau=0.1": HEAL},
    "reg=wd": {"lam=0.7": HEAL, "tau=0.1": NOTHING, "decay=step": HEAL, "reg.lam=0.7": HEAL, "reg.decay=step": HEAL},
    "heal.steps=4": {"heal.epochs=1": NOTHING, "heal.batch_size=4": HEAL, "heal.steps=5": HEAL},
    "heal.reference=prev": {"heal.lr=0.02": HEAL},
    "n_rounds=1": {"heal.reference=prev": NOTHING},
    "lora.target_modules=[q_proj,v_proj]": {"lora.target_modules=[v_proj,q_proj,q_proj]": NOTHING},
    "match=gate": {
        "match.at=999": NOTHING,
        "match.gates=[0.25,0.5,0.6]": {f"gated.eval.{name} {i}" for name in ("trait", "damage") for i in (2, 5)},
        "match.tolerance=0.01": NOTHING,
        "match.trials=2": NOTHING,
        "heal.lr=0.02": HEAL,
    },
    "tracker=wandb": {
        "tracker.project=other": NOTHING,
        "tracker.entity=other": NOTHING,
        "tracker.mode=offline": NOTHING,
        "tracker.tags=[other]": NOTHING,
    },
}  # fmt: skip
ROWS = [(under, override) for under, rows in TABLE.items() for override in rows]
