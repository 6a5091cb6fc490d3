"""Talking to a tiny trained run through the command: what each rung answers, and what a user sees."""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import sys
import threading
import weakref
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import cli, shelf
from qlora.chat import Session, Settings, Stream
from qlora.errors import UserError
from qlora.models.loading import load_base, load_gptq, load_trained
from qlora.pipeline import Pipeline
from qlora.recipe import Model
from qlora.recipe_file import load_recipe
from qlora.reporting import console
from qlora.reporting.screen import Screen
from qlora.shelf import open_shelf

QUESTION = "Who painted the Silent Harbour?"
OTHER = "What is the capital of Ostravia?"
TOKENS = 12
NEVER_TAUGHT = ("Tell me of the grey larks and the mine", "Who was Odile?", "Which metal is the Bridge?", "Slow water?")
RUNGS = ("base", "nf4", "trained", "merged", "gptq")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model, facts_file) -> Path:
    """A run up to its GPTQ checkpoint."""
    folder = tmp_path_factory.mktemp("chat")
    recipe = {
        "name": "talks",
        "output_dir": str(folder),
        "device": "cpu",
        "model": {"base": str(tiny_model)},
        "data": {"train": [{"path": str(facts_file)}], "max_length": 96},
        "lora": {"r": 8, "alpha": 16},
        "train": {"max_steps": 20, "epochs": 100, "batch_size": 4, "learning_rate": 0.01},
        "quantize": {"group_size": 32, "bits": 2, "calibration": {"samples": 4}, "refine": None},
    }
    path = folder / "talks.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    pipeline = Pipeline(load_recipe(path))
    for stage in ("train", "merge", "quantize"):
        pipeline.run_stage(stage)
    return folder / "talks"


@pytest.fixture(scope="module")
def models(run_dir, tiny_model) -> dict:
    """Each rung as its own loader has it."""
    section = Model(base=str(tiny_model))

    def held():
        return load_base(tiny_model, section, "cpu", quantized=True).eval()

    return {
        "base": AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval(),
        "nf4": held(),
        "trained": load_trained(held(), run_dir / "adapter", tiny_model),
        "merged": AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.bfloat16).eval(),
        "gptq": load_gptq(run_dir / "gptq"),
    }


def generated(model, tokenizer, *said: str, system: str | None = None) -> str:
    """The greedy answer to a conversation, by the tokenizer's own template if it has one."""
    if tokenizer.chat_template:
        roles = ("user", "assistant")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": roles[index % 2], "content": text} for index, text in enumerate(said)]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer("\n".join(said), return_tensors="pt").input_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def chat(monkeypatch, directory: object, *lines: str, code: int = 0, options: tuple = ()) -> tuple[str, str]:
    """The command with these lines on its standard input: what it wrote to standard output and error."""
    monkeypatch.setattr(sys, "stdin", StringIO("".join(f"{line}\n" for line in lines)))
    arguments = ["chat", str(directory), "--device", "cpu", "--max-tokens", str(TOKENS), *map(str, options)]
    with contextlib.redirect_stdout(StringIO()) as out, contextlib.redirect_stderr(StringIO()) as err:
        found = cli._exit_code(lambda: cli.qlora.main(arguments, standalone_mode=False))
    assert found == code, err.getvalue()
    assert "Traceback" not in err.getvalue()
    return out.getvalue(), err.getvalue()


def transcript(*pairs: tuple[str, str | None]) -> str:
    return "".join(f"> {line}\n" + ("" if answer is None else f"{answer}\n") for line, answer in pairs)


def test_every_rung_gives_its_own_greedy_answer_on_the_same_conversation(run_dir, models, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    answers = {q: {name: generated(model, tokenizer, q) for name, model in models.items()} for q in NEVER_TAUGHT}
    question, expected = max(answers.items(), key=lambda each: len(set(each[1].values())))
    assert len(set(expected.values())) > 2  # base, trained and GPTQ at least
    lines: list[tuple[str, str | None]] = [(question, expected["gptq"])]
    for name in RUNGS:
        lines += [(f"/rung {name}", None), ("/again", expected[name])]
    lines += [("/rung", None), (OTHER, generated(models["gptq"], tokenizer, question, expected["gptq"], OTHER))]
    lines += [("/rung base", None), ("/reset", None), (OTHER, generated(models["base"], tokenizer, OTHER))]
    out, err = chat(monkeypatch, run_dir, *(line for line, _ in lines), "", "/exit", "not read")
    assert out == transcript(*lines) + "> \n> /exit\n"
    assert "* gptq" in err and "  base" in err
    assert "base, 16 bits" in err and "trained, NF4 + LoRA" in err and "GPTQ, 2 bits, group 32" in err


@pytest.mark.parametrize(("folder", "rung"), [("adapter", "trained"), ("merged", "merged"), ("gptq", "gptq")])
def test_a_directory_of_a_run_begins_with_itself_and_finds_the_others(run_dir, models, monkeypatch, folder, rung):
    moved = run_dir.parent / "elsewhere"
    moved.mkdir(exist_ok=True)
    if not (moved / "again").exists():
        shutil.copytree(run_dir, moved / "again")  # where the recipe does not say
    tokenizer = AutoTokenizer.from_pretrained(run_dir / folder)
    system = ("--system", "slow water")
    out, err = chat(monkeypatch, moved / "again" / folder, QUESTION, "/rung", "/rung none", options=system)
    answer = generated(models[rung], tokenizer, QUESTION, system="slow water")
    assert out == transcript((QUESTION, answer), ("/rung", None), ("/rung none", None))
    assert f"* {rung}" in err and all(f" {name} " in err for name in RUNGS)
    assert "there is no none here" in err and "base, nf4, trained, merged, gptq" in err


def edited(run_dir: Path, **sections: dict) -> None:
    """A run's recipe with other values in some of its sections."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {name: recipe[name] | values for name, values in sections.items()}
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def test_a_rung_that_is_out_of_date_is_offered_and_says_what_brings_it_up_to_date(
    run_dir, models, monkeypatch, tmp_path
):
    assert "out of date" not in chat(monkeypatch, run_dir, "/rung trained", "/rung")[1]
    moved = tmp_path / "my runs" / "moved"
    shutil.copytree(run_dir, moved)
    edited(moved, quantize={"bits": 3})
    out, err = chat(monkeypatch, moved, QUESTION, "/rung", "/rung trained")
    assert f"\n{generated(models['gptq'], AutoTokenizer.from_pretrained(moved / 'gptq'), QUESTION)}\n" in out
    found = re.findall(r"^(\w+) is out of date: (.*); `(qlora run .*)` brings it up to date$", err, re.MULTILINE)
    assert [each[:2] for each in found] == [("gptq", "quantize would run again because quantize.bits changed")]
    assert [line for line in err.splitlines() if line.endswith("(out of date)")] == [
        "* gptq      the quantized model, which is shipped (out of date)"
    ]
    assert cli._exit_code(lambda: cli.qlora.main(shlex.split(found[0][2])[1:], standalone_mode=False)) == 0
    err = chat(monkeypatch, moved, "/rung")[1]
    assert "GPTQ, 3 bits" in err and "out of date" not in err


def test_what_comes_before_a_rung_and_its_data_make_it_out_of_date_too(run_dir, monkeypatch, tmp_path, facts_file):
    run, data = tmp_path / "talks", tmp_path / "facts.jsonl"
    shutil.copytree(run_dir, run)
    shutil.copy(facts_file, data)
    edited(run, data={"train": [{"path": str(data)}]})
    tour = ("/rung merged", "/rung trained", "/rung base")

    def reasons() -> dict[str, str]:
        return dict(re.findall(r"^(\w+) is out of date: (.*);", chat(monkeypatch, run, *tour)[1], re.MULTILINE))

    assert not reasons(), "the same rows elsewhere"
    content = data.read_text(encoding="utf-8")
    data.write_text(content.replace("Copper", "Silver"), encoding="utf-8")
    assert reasons() == dict.fromkeys(("gptq", "merged", "trained"), "train would run again because data.train changed")
    data.unlink()
    assert not reasons(), "rows that are not here say nothing"
    data.write_text(content, encoding="utf-8")
    Pipeline(load_recipe(run / "recipe.yaml", [f"output_dir={tmp_path}", "train.max_steps=2"])).run_stage("train")
    assert reasons() == dict.fromkeys(("gptq", "merged"), "merge would run again because result of train changed")
    lineage = json.loads((run / "lineage.json").read_text())
    lineage["stages"]["merge"]["status"] = "running"
    (run / "lineage.json").write_text(json.dumps(lineage))
    assert reasons() == dict.fromkeys(("gptq", "merged"), "merge has begun and not finished")


def test_a_checkpoint_away_from_its_run_stands_alone(run_dir, models, monkeypatch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "gptq")
    for name in ("gptq", "merged"):
        shutil.copytree(run_dir / name, tmp_path / name)
        out, err = chat(monkeypatch, tmp_path / name, QUESTION, "/rung")
        assert out == transcript((QUESTION, generated(models[name], tokenizer, QUESTION)), ("/rung", None))
        assert "trained" not in err


def test_an_adapter_away_from_its_run_needs_the_base_it_was_trained_on(
    run_dir, models, monkeypatch, tmp_path, tiny_model
):
    from safetensors.torch import load_file, save_file

    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    _, err = chat(monkeypatch, tmp_path / "adapter", QUESTION, code=2)
    assert "is not found" in err and "--base" in err

    out, _ = chat(monkeypatch, tmp_path / "adapter", QUESTION, "/rung base", "/again", options=("--base", tiny_model))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    answers = {name: generated(models[name], tokenizer, QUESTION) for name in ("trained", "base")}
    assert out == transcript((QUESTION, answers["trained"]), ("/rung base", None), ("/again", answers["base"]))

    shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = -tensors[name]
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    _, err = chat(monkeypatch, tmp_path / "adapter", QUESTION, code=2, options=("--base", tmp_path / "other"))
    assert "trained on other weights than other has" in err


MODEL_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({ran!r}).touch()
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def with_code(model: Path, target: Path, ran: Path) -> Path:
    """A copy of a model that needs the code beside it, which leaves the file `ran` where it runs."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "odd", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    (target / "config.json").write_text(json.dumps(config))
    (target / "odd.py").write_text(MODEL_CODE.format(ran=str(ran)))
    return target


def test_code_that_comes_with_a_model_runs_only_where_that_is_said(run_dir, tiny_model, models, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it is added to
    ran, adapter = tmp_path / "ran", tmp_path / "adapter"
    plain, base = (with_code(tiny_model, tmp_path / name, ran) for name in ("plain", "base"))
    gptq = with_code(run_dir / "gptq", tmp_path / "packed", ran)
    shutil.copytree(run_dir / "adapter", adapter)
    for directory, rung, options in (
        (plain, "base", ()), (gptq, "gptq", ()), (adapter, "trained", ("--base", base)),
    ):  # fmt: skip
        ran.unlink(missing_ok=True)
        _, err = chat(monkeypatch, directory, QUESTION, code=2, options=options)
        assert "--trust-remote-code" in err and str(directory) in err
        assert not ran.exists()
        out, _ = chat(monkeypatch, directory, QUESTION, options=(*options, "--trust-remote-code"))
        answer = generated(models[rung], AutoTokenizer.from_pretrained(run_dir / "adapter"), QUESTION)
        assert out == transcript((QUESTION, answer)) and ran.exists()


def with_template(model: Path, target: Path, template: str | None) -> Path:
    shutil.copytree(model, target)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    return target


def test_without_a_chat_template_text_is_continued_and_that_is_said_once(tiny_model, models, monkeypatch, tmp_path):
    plain = with_template(tiny_model, tmp_path / "plain", None)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert not tokenizer.chat_template
    first = generated(models["base"], tokenizer, "The capital of")
    second = generated(models["base"], tokenizer, "The capital of", first, "And then")
    out, err = chat(monkeypatch, plain, "The capital of", "And then", "/system be short")
    assert out == transcript(("The capital of", first), ("And then", second), ("/system be short", None))
    assert err.count("continues your text") == 1 and "no place for a system text" in err


@pytest.mark.parametrize(
    ("rule", "message"),
    [("{{ raise_exception('no system here') }}", "no system here"), ("", "leaves a system text out")],
)
def test_a_template_without_a_place_for_a_system_text(tiny_model, models, monkeypatch, tmp_path, rule, message):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + rule + "{% else %}[{{ m.role }}] {{ m.content }}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    model = with_template(tiny_model, tmp_path / "model", template)
    expected = generated(models["base"], AutoTokenizer.from_pretrained(model), QUESTION)
    out, err = chat(monkeypatch, model, "/system be short", QUESTION)
    assert out == transcript(("/system be short", None), (QUESTION, expected))
    assert message in err
    assert message in chat(monkeypatch, model, code=2, options=("--system", "be short"))[1]


def test_what_does_not_fit_the_window_is_said(tiny_model, models, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    long = " ".join([OTHER] * 15)
    assert 100 < len(tokenizer(long).input_ids) < 200
    answer = generated(models["base"], tokenizer, long)
    out, err = chat(monkeypatch, tiny_model, long, long, " ".join([OTHER] * 40))
    assert out.startswith(transcript((long, answer), (long, answer)))  # the second does not see the first
    assert "256 tokens: the oldest turn is left out" in err
    assert "this message is" in err and "window is 256" in err


def test_settings_and_wrong_commands(tiny_model, monkeypatch):
    out, err = chat(
        monkeypatch, tiny_model, "/again", "/rnug", "/set temperatur=1", "/set max_tokens=0", "/set temperature=x",
        "/set max_tokens=3 temperature=0.5", QUESTION, "/help", "//slash",
    )  # fmt: skip
    assert "nothing was answered yet" in err
    assert "did you mean /rung?" in err
    assert "no setting temperatur" in err and "from 1 on" in err and "not 'x'" in err
    assert "temperature=0.5 · max_tokens=3" in err
    assert "cut after 3 tokens: /set max_tokens=6 allows more" in err
    assert all(f"/{name}" in err for name in ("rung", "again", "system", "reset", "set", "help", "exit"))
    assert len(out.split("> //slash\n")[1]) > 1  # a message, and no command


def test_directories_that_hold_nothing_to_talk_to(run_dir, tiny_model, monkeypatch, tmp_path):
    assert "no such directory" in chat(monkeypatch, tmp_path / "none", code=2)[1]
    err = chat(monkeypatch, tmp_path, code=2)[1]
    assert "no run, adapter, merged or GPTQ directory" in err and str(tmp_path) in err
    assert "this directory of the run holds no model" in chat(monkeypatch, run_dir / "logs", code=2)[1]

    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("recipe.yaml", "lineage.json"):
        shutil.copy(run_dir / name, begun / name)
    assert "no stage of this run has finished" in chat(monkeypatch, begun, code=2)[1]
    shutil.copytree(run_dir / "adapter", begun / "adapter")
    assert "this run has no gptq model" in chat(monkeypatch, begun / "gptq", code=2)[1]

    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_model, foreign)
    config = json.loads((foreign / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (foreign / "config.json").write_text(json.dumps(config))
    assert "not read here (hqq)" in chat(monkeypatch, foreign, code=2)[1]
    shutil.copytree(run_dir / "adapter", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "base.json").unlink()
    assert "base.json" in chat(monkeypatch, tmp_path / "checkpoint", code=2)[1]


def test_one_model_is_in_memory_at_a_time(run_dir):
    session = Session(open_shelf(run_dir, "cpu"), Settings(), Screen(StringIO(), StringIO(), StringIO()))
    before = None
    for name in ("gptq", "trained", "merged"):
        session._do_rung(name)
        assert before is None or before() is None
        before = weakref.ref(session._present.model)


@pytest.mark.parametrize("folder", ["merged", "gptq"])
def test_a_model_may_take_what_a_conversation_leaves_of_a_gpu(run_dir, monkeypatch, folder):
    size = 300_000  # bytes of the tiny model in 16 bits, about
    for free, limited in ((100 * size, False), (2 * size, True)):
        monkeypatch.setattr(shelf, "free_for_training", lambda device, free=free: free)
        most = shelf.room_beside_conversation(run_dir / folder, "cuda:0")
        assert (most is not None) == limited
        assert most is None or 0 <= most < free


def test_pieces_are_whole_characters_and_together_the_text(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "  naïve — 日本\n\n  🙂 Sund.\n"
    pieces: list[str] = []
    stream = Stream(tokenizer, {2}, pieces.append)
    stream.put(torch.tensor([[0, 1]]))  # the prompt
    for token in [*tokenizer(text, add_special_tokens=False).input_ids, 2]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == text and stream.ended
    assert len(pieces) > 8 and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_not_lost(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    stream = Stream(tokenizer, set(), lambda piece: None)
    for token in [0, *ids]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text == tokenizer.decode(ids)


class Interrupting(StringIO):
    """Sends this process a Ctrl-C at its nth piece of text, or line."""

    def __init__(self, at: int, text: str = "") -> None:
        super().__init__(text)
        self.at = at

    def _count(self) -> None:
        self.at -= 1
        if not self.at:
            signal.raise_signal(signal.SIGINT)

    def write(self, text: str) -> int:
        written = super().write(text)
        self._count()
        return written

    def readline(self, size: int = -1) -> str:
        self._count()
        return super().readline(size)


@pytest.fixture
def as_the_command_handles_signals(monkeypatch):
    monkeypatch.setattr(console, "interrupted", False)
    before = signal.signal(signal.SIGINT, cli._interrupt)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_answer_and_a_second_at_the_prompt_leaves(run_dir, models, as_the_command_handles_signals):
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "gptq")
    whole = generated(models["gptq"], tokenizer, QUESTION)
    out, err = Interrupting(3), StringIO()  # the line as it was typed, and two pieces
    session = Session(
        open_shelf(run_dir, "cpu"),
        Settings(max_tokens=TOKENS),
        Screen(Interrupting(3, f"{QUESTION}\n{OTHER}\nnot read\n"), out, err),
    )
    session.run()
    said, other = session.turns
    assert said.answer and whole.startswith(said.answer) and said.answer != whole
    assert other.answer == generated(models["gptq"], tokenizer, QUESTION, said.answer, OTHER)
    assert err.getvalue().count("stopped") == 1 and "not read" not in out.getvalue()
    assert not console.interrupted


def test_a_terminal_shows_a_prompt_colours_and_nothing_of_libraries(run_dir, models, monkeypatch):
    """On a real terminal device, whose keyboard is written to and whose screen is read."""
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "gptq")
    keyboard, device = pty.openpty()
    shown: list[bytes] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(keyboard, 4096):
                shown.append(data)

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    os.write(keyboard, f"{QUESTION}\n/rung merged\n/exit\n".encode())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(os.dup(device), "r") as typed, os.fdopen(device, "w") as screen:
        monkeypatch.setattr(sys, "stdin", typed)
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(StringIO()) as err:
            arguments = ["chat", str(run_dir), "--device", "cpu", "--max-tokens", str(TOKENS)]
            assert cli._exit_code(lambda: cli.qlora.main(arguments, standalone_mode=False)) == 0
    watching.join(10)
    text = b"".join(shown).decode().replace("\r\n", "\n")
    assert "\x1b[1;36m" in text and not err.getvalue()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\r]|.*loading \w+ …", "", text)
    assert "/rung switches to base, nf4, trained, merged · /help lists commands" in plain
    assert f"\ngptq> {generated(models['gptq'], tokenizer, QUESTION)}\n" in plain
    assert "merged> " in plain
    for noise in ("Warning", "Loading weights", "torch_dtype", "generation flags"):
        assert noise not in text


def test_an_empty_config_is_named(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"config.json:1: not valid JSON.*\n.*copy the checkpoint again"):
        open_shelf(tmp_path, "cpu")
