"""One word means one thing: over all verbs, in help, in YAML, and under the names that flags had before."""

import contextlib
import io
import re
import shlex

import pytest
from mutants import kills, mutated

from alignpro.commands import helping, main, shared
from alignpro.commands.flags import options_of, renamed_in
from alignpro.errors import AlignProError
from alignpro.llm.arms.settings import JudgeSettings
from alignpro.llm.training.settings import PRESETS, TrainSettings

MEANINGS = {
    "algorithm": "How the policy is improved",
    "answers": "How many answers",
    "arms": r"Arms to compare|The arm of interest|The baseline, then the arms",
    "batch-size": "How many (sequences|pairs) a (model|judge) in this process (works on|reads) at once",
    "beta": r"Weight of the KL divergence in RLHF \(beta\), positive, in reward units",
    "bounds": "Statements to check, by name|Upper and lower bounds on the gap by name",
    "chat-template-kwargs": "Further arguments of the (models' |model's )?chat template",
    "draws": "How many rewrites of each prompt to draw",
    "dtype": "Number format of the weights",
    "epochs": "Passes over the",
    "eval-answers": "How many answers to each held-out prompt",
    "eval-prompts": "How many held-out prompts to measure on, at most",
    "family": "Kinds? of random instances?",
    "instructions-file": "File of candidate instructions, one on each line",
    "iterations": "How many rounds",
    "json": "Print one JSON object",
    "lam": r"(For star: w|W)eights? of the KL divergence in prompt optimization \(lambda\)|Weight λ of KL",
    "learning-rate": "Step of the optimizer",
    "level": "How often an interval covers the truth",
    "lora-layers": "Share of the layers, from the top, that carry the adapter",
    "lora-rank": "Rank of the adapter",
    "microbatches": "Parts in which an optimizer step's (rewrites|pairs) go through the model",
    "out": "Folder |A new folder ",
    "pairs": "File of (pairs to learn from|preferences)",
    "policy-dtype": "Type of the weights under the adapter",
    "prompt-column": r"Column (\(key\) )?of the prompts",
    "prompter": "The (reference )?prompter",
    "prompts": "How many prompts",
    "prompts-file": "(File of )?[Yy]our own prompts|File of your own prompts|File of prompts or chats",
    "proposal-answers": "(For star and best_of_n: h|H)ow many answers .*judge each distinct proposal",
    "proposals": "(For star and best_of_n: h|H)ow many rewrites of rho_sft each prompt's are resampled from",
    "r-max": "Theorem 1's r_max",
    "refused-most": "Share of (refused answers|replies that the judge's service refuses)",
    "resume": "Continue ",
    "reward": "(The r|R)eward",
    "rewrite-tokens": "The most tokens of one rewrite",
    "save-every": "(Rounds|Optimizer steps) between checkpoints",
    "seed": "Number that determines",
    "shape": "How many prompts, rewrites and responses",
    "system-prompt": "System message ",
    "train-prompts": "How many prompts to learn from",
}
"""By flag that has more than one help over the verbs: how all of them begin."""


def check_meanings(verbs):
    """Assert that a flag's help is one, or that all of its helps are of the meaning that `MEANINGS` has."""
    said: dict[str, dict[str, str]] = {}
    for name, verb in verbs.items():
        for option in options_of(verb):
            if not option.positional:
                first = option.help.split("\n\n")[0]
                said.setdefault(option.flag.removeprefix("--"), {})[first] = name
    several = {flag: helps for flag, helps in said.items() if len(helps) > 1}
    assert not [
        (flag, verb, text)
        for flag, helps in several.items()
        for text, verb in helps.items()
        if not re.match(MEANINGS.get(flag, "nothing"), text)
    ]
    assert set(MEANINGS) == set(several), "a flag with one help needs no row"


def check_one_name_each(verbs):
    """Assert that no help stands under two names, apart from those that a prefix tells apart."""
    said: dict[str, set[str]] = {}
    for verb in verbs.values():
        for option in options_of(verb):
            said.setdefault(option.help, set()).add(re.sub("^--(target|reward|judge)-", "--", option.flag))
    assert not {text: flags for text, flags in said.items() if len(flags) > 1}


def test_one_meaning_a_flag(tmp_path, monkeypatch):
    check_meanings(main.VERBS)
    check_one_name_each(main.VERBS)
    source = (
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Mutant:\n    '''A verb.'''\n\n"
    )
    for i, (field, doc, check) in enumerate(
        [
            ("draws", "Folder of drawings.", check_meanings),
            ("samples", "The most tokens of one answer; a longer one is cut.", check_one_name_each),
        ]
    ):
        text = f"{source}    {field}: int = 1\n    '''{doc}'''\n"
        (tmp_path / f"mutant{i}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        mutant = __import__(f"mutant{i}").Mutant
        kills(check, main.VERBS | {"mutant": mutant})


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_help(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert main.main([verb, "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert len(said.splitlines()) <= 60
    for text in (said, whole):
        assert max(map(len, text.splitlines())) <= 100
        for unsaid in ("None", "STR", "(default: )", "(default: False)"):
            assert unsaid not in text
    options = options_of(main.VERBS[verb])
    for option in options:
        assert option.help[0].isupper(), option
        assert option.help.endswith("."), option
        assert re.search(rf"^  {re.escape(option.flag)}( |$)", whole, re.MULTILINE), option
    assert ("--help-all" in said) == (len(helping.common(main.VERBS[verb])) < len(options))
    assert all(option in helping.common(main.VERBS[verb]) for option in options if option.required)


def test_the_overview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for asked in ([], ["--help"], ["-h"], ["--help-all"]):
        status = main.main(asked)
        said = capsys.readouterr()
        if asked:
            assert status == 0
            assert len(said.out.splitlines()) <= 60
            assert all(f"\n  {verb} " in said.out for verb in main.VERBS)


EXAMPLES = [(name, words) for name, verb in main.VERBS.items() for _, words in helping.examples(verb)]


def test_two_examples_a_verb():
    assert all(len(helping.examples(verb)) == 2 for verb in main.VERBS.values())


@pytest.mark.parametrize(("verb", "command"), EXAMPLES)
def test_examples_parse(verb, command, capsys):
    program, *words = shlex.split(command)
    assert (program, words[0]) == ("alignpro", verb)
    assert type(main._parse(words)) is main.VERBS[verb]
    assert capsys.readouterr() == ("", "")


def test_shown_commands_are_the_examples():
    """Lines that end in a backslash are one command to a shell."""
    for name, verb in main.VERBS.items():
        for width in (60, 100):
            shown = helping.text(name, verb, width).replace("\\\n", " ")
            for _, command in helping.examples(verb):
                assert shlex.split(command) in [
                    shlex.split(line, comments=True)
                    for line in shown.split("\n")
                    if line.startswith("  alignpro")
                ]


OLD = {
    "train": "--samples 4 --responses 2 --prompts 3 --max-tokens 9 --task rlhf --prices 1 2",
    "rewrite": "--samples 4 --max-tokens 9",
    "resample": "--responses 2 --prices 1 2",
    "rollout": "--rewrites a=b.jsonl --prices 1 2",
    "instruct": "--instructions a.txt --prompts 3 --held-out 7 --held-out-answers 4 --prices 1 2",
    "route": "--instructions a.txt --prompts 8 --held-out 7 --held-out-answers 4 --prices 1 2",
    "judge": "--temperature 0.5 --prices 1 2",
    "sft": "--max-tokens 9 --batch-size 3 --prompt-field a --rewrite-field b",
    "reward-model": "--max-tokens 9 --batch-size 3 --template {prompt}{response}",
    "verify": "--bound theorem1",
    "explore": "--file a.npz",
    "solve": "--report a.html",
    "estimate": "--betting",
}
"""The names that flags had in 0.1.0, which go with the release after it."""
NEEDED = {
    "rewrite": "runs/a",
    "judge": "file --arms a b --judge j --out o",
    "sft": "--pairs p --out o",
    "reward-model": "--pairs p --out o",
    "verify": "",
    "explore": "",
    "solve": "a.npz --beta 1 --lam 1",
    "estimate": "a --beta 1 --lam 1",
}


@pytest.mark.parametrize("verb", OLD)
def test_old_flags_still_work_and_name_the_new(verb, capsys):
    old = shlex.split(OLD[verb])
    needed = shlex.split(NEEDED.get(verb, "--out o"))
    found = main._parse([verb, *needed, *old])
    said = capsys.readouterr().err.splitlines()
    names = [word for word in old if word.startswith("--")]
    assert len(said) == len(names)
    new = []
    for line, name in zip(said, names, strict=True):
        shape = rf"alignpro: {name} is (called (--\S+)|given without its name) now; the old name goes"
        match = re.match(shape, line)
        assert match, line
        new.append(match[2])
    given = list(old)
    for name, now in zip(names, new, strict=True):
        given[given.index(name) : given.index(name) + 1] = [now] if now else []
    assert found == main._parse([verb, *needed, *given])
    assert capsys.readouterr().err == ""


def test_every_old_name_is_tried():
    for name, verb in main.VERBS.items():
        tried = {word.removeprefix("--") for word in shlex.split(OLD.get(name, "")) if word.startswith("--")}
        assert tried == set(renamed_in(verb))


def test_an_old_name_with_an_equals_sign(capsys):
    assert main._parse(["train", "--out=o", "--samples=4"]).settings.samples == 4
    assert main._parse(["explore", "--file=a.npz"]).file == "a.npz"
    assert "--samples is called --draws now" in capsys.readouterr().err


def test_yaml_takes_old_and_new_names_and_choices(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("prompts: 4\nsamples: 2\nalgorithm: rloo\n")
    found = main._parse(["train", "--out", "o", "--config", str(file), "--prompts-per-round", "6"])
    assert (found.settings.prompts, found.settings.samples, found.settings.algorithm) == (6, 2, "rloo")
    said = capsys.readouterr().err
    assert f"alignpro: {file}: --samples is called --draws now" in said
    file.write_text("draws: 2\nprompts_per_round: 4\n")
    found = main._parse(["train", "--out", "o", "--config", str(file)])
    assert (found.settings.prompts, found.settings.samples) == (4, 2)
    assert capsys.readouterr().err == ""
    file.write_text("algorithm: q\n")
    with pytest.raises(
        AlignProError, match=r"run.yaml: algorithm 'q': choose from ppo, rloo, grpo; see alignpro train"
    ):
        main._parse(["train", "--out", "o", "--config", str(file)])


def test_a_preset_reaches_renamed_flags():
    found = main._parse(["train", "--out", "o", "--preset", "paper", "--draws", "2"]).settings
    assert (found.prompts, found.samples, found.gae_lambda) == (PRESETS["paper"]["prompts"], 2, 0.95)


def test_choices_are_one_error_everywhere():
    with pytest.raises(AlignProError, match=r"^algorithm 'q': choose from ppo, rloo, grpo$"):
        TrainSettings(algorithm="q")
    with pytest.raises(AlignProError, match=r"^vllm 'q': choose from colocate, server$"):
        TrainSettings(vllm="q")
    with pytest.raises(
        AlignProError, match=r"^dtype 'q': choose from auto, float32, bfloat16, float16, 4bit$"
    ):
        JudgeSettings("j", dtype="q")
    for words, said in (
        ("--algorithm q", "algorithm 'q': choose from ppo, rloo, grpo"),
        ("--policy q", "policy 'q': choose from prompter, rlhf"),
        ("--report-to q", "report_to 'q': choose from tensorboard, wandb, trackio"),
        ("--reward-scale q", "reward_scale 'q': choose from 1-10, yes-no"),
    ):
        with contextlib.redirect_stderr(io.StringIO()), pytest.raises(AlignProError) as error:
            main._parse(["train", "--out", "o", *words.split()])
        assert str(error.value) == f"{said}; see alignpro train --help"


def test_mistakes_are_told_in_the_words_that_were_typed():
    for words, said in (
        ("train --out o --draws 0", "draws 0: give a whole number of at least 1"),
        (
            "train --out o --prompts-per-round 3 --minibatches 5",
            "minibatches 5: does not divide 3 prompts x 8",
        ),
        ("instruct --out o --eval-prompts 4", "eval_prompts 4: give a whole number of at least 5"),
    ):
        with pytest.raises(AlignProError) as error:
            main._parse(words.split())
        assert str(error.value).startswith(said), error.value


def check_folders(module, folder):
    """Assert that a run's folder, or one that holds it, stands for the file in it."""
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "rollouts.jsonl").write_text("")
    file = str(folder / "run" / "rollouts.jsonl")
    for name in (folder, folder / "run", file):
        assert module.found_files(str(name), "rollouts.jsonl") == [file]


def test_a_folder_stands_for_the_file_in_it(tmp_path, capsys):
    check_folders(shared, tmp_path / "a")
    mutant = mutated(shared, "sorted(folder.glob(pattern)) or", "[folder] or")
    kills(lambda module: check_folders(module, tmp_path / "b"), mutant)
    for verb, more in (
        ("estimate", "--beta 1 --lam 1"),
        ("headroom", ""),
        ("compare", "--arms none sft"),
        ("judge", f"--arms none sft --judge smollm2-135m-instruct --out {tmp_path}/out"),
        ("explore", "--no-browser"),
    ):
        given = ["--rollouts"] if verb == "explore" else []
        assert main.main([verb, *given, str(tmp_path / "a"), *more.split()]) == 2
        assert f"{tmp_path}/a/run/rollouts.jsonl: " in capsys.readouterr().err
        (tmp_path / "none").mkdir(exist_ok=True)
        assert main.main([verb, *given, str(tmp_path / "none"), *more.split()]) == 2
        assert "none: is a folder without rollouts.jsonl; name a file" in capsys.readouterr().err


def test_of_several_instances_one_is_to_be_named(tmp_path, capsys):
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_text("")
    assert main.main(["explore", str(tmp_path)]) == 2
    assert f"is a folder with 2 files *.npz; name one of {tmp_path}/a.npz" in capsys.readouterr().err
    assert main.main(["solve", str(tmp_path), "--beta", "1", "--lam", "1"]) == 2
    assert [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"{tmp_path}/a.npz",
        f"{tmp_path}/b.npz",
    ]
