"""Tokens whose rows are trained by index, through the whole pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qlora.artifacts import Lineage, read_json
from qlora.check import check
from qlora.errors import UserError
from qlora.models.loading import attach_adapter, load_base, load_gptq, load_plain, load_trained
from qlora.models.tokens import trained_tokens
from qlora.paths import RunDir
from qlora.pipeline import Pipeline
from qlora.recipe import Lora, Model
from qlora.recipe_file import load_recipe

TOKENS = "lora.new_tokens=[<call>, {text: </call>, special: true}]"
KNOWN = "lora.train_tokens=['<|im_start|>']"


@pytest.fixture(scope="session")
def base_of(tiny_model, tmp_path_factory):
    """The tiny model's tokenizer with a model of its own: so many rows beyond its tokens, a head tied or not."""

    def make(spare: int, tied: bool) -> Path:
        directory = tmp_path_factory.mktemp("base")
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        config = LlamaConfig(
            vocab_size=len(tokenizer) + spare, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=2, pad_token_id=None,
            initializer_range=0.08,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def recipe_of(base_of, calls, tiny_recipe, tmp_path):
    """A recipe that learns calls, on such a base."""

    def make(*overrides: str, spare: int = 0, tied: bool = True, dtype: str = "float32"):
        model = {"base": str(base_of(spare, tied)), "compute_dtype": dtype}
        path = tiny_recipe(model=model, data=calls, merge={"dtype": dtype}, output_dir=str(tmp_path))
        return load_recipe(path, ["train.learning_rate=0.02", TOKENS, KNOWN, *overrides])

    return make


def learned_by(recipe) -> dict[str, torch.Tensor]:
    """The adapter's tensors that are not LoRA's."""
    adapter = load_file(recipe.run_dir / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): each for name, each in adapter.items() if "lora_" not in name}


@pytest.mark.parametrize(
    ("spare", "tied", "dtype"),
    [(0, True, "float32"), (1, False, "float32"), (5, True, "bfloat16"), (7, False, "bfloat16")],
)
def test_a_whole_run(recipe_of, spare, tied, dtype):
    recipe = recipe_of(spare=spare, tied=tied, dtype=dtype)
    Pipeline(recipe).run()
    dirs, base = RunDir(recipe.run_dir), Path(recipe.model.base)
    size = len(AutoTokenizer.from_pretrained(base))
    new, rows = [size, size + 1], max(size + spare, size + 2)
    for directory in (dirs.adapter, dirs.merged, dirs.gptq):
        own = AutoTokenizer.from_pretrained(directory)
        assert own.encode("<call></call>", add_special_tokens=False) == new
        assert own.decode(new) == "<call></call>" and own.decode(new, skip_special_tokens=True) == "<call>"
    for directory in (dirs.merged, dirs.gptq):
        assert read_json(directory / "config.json")["vocab_size"] == rows

    learned = learned_by(recipe)
    assert all(tensor.shape == (3, 64) for tensor in learned.values()) and len(learned) == (1 if tied else 2)
    merged, before = (load_file(each / "model.safetensors") for each in (dirs.merged, base))
    assert ("lm_head.weight" in merged) != tied
    for name in sorted({"model.embed_tokens.weight", "lm_head.weight"} & before.keys()):
        changed = (merged[name][: size + spare] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert changed == [1, *new][: 1 + min(spare, 2)] and len(merged[name]) == rows
        trained = learned[f"{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(merged[name][[1, *new]], trained.to(getattr(torch, dtype)))

    ids = torch.tensor([[*range(0, size, 7), *new, 1, *new]])
    model = load_trained(load_base(base, recipe.model, "cpu", quantized=True), dirs.adapter, base)
    with torch.no_grad():
        logits = model(ids).logits.float()
        found = load_plain(dirs.merged, getattr(torch, dtype))(ids).logits.float()
        quantized = load_gptq(dirs.gptq)(ids).logits
    assert logits.shape == found.shape == quantized.shape == (1, ids.shape[1], rows)
    if dtype == "float32":
        assert (found - logits).abs().max() < 2e-5 * logits.abs().max().clamp(min=1)
    left, right = logits.log_softmax(-1), found.log_softmax(-1)
    assert (left.exp() * (left - right)).sum(-1).mean() < 1e-3
    rungs = {rung["name"]: rung for rung in read_json(dirs.evaluation / "ladder.json")["rungs"]}
    assert rungs["trained"]["loss"] < 0.7 * rungs["base"]["loss"] and rungs["gptq"]["kl"] < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_they_begin_as_the_mean_of_their_pieces(recipe_of, tied):
    recipe = recipe_of("train.max_steps=1", "train.learning_rate=1e-12", tied=tied)
    Pipeline(recipe).run_stage("train")
    before = load_file(Path(recipe.model.base) / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.base)
    for name, rows in learned_by(recipe).items():
        matrix = before[f"{name.partition('.token_adapter')[0]}.weight"].float()
        pieces = [tokenizer.encode(text, add_special_tokens=False) for text in ("<call>", "</call>")]
        assert all(len(each) > 1 for each in pieces)
        expected = torch.stack([matrix[1], *(matrix[each].mean(0) for each in pieces)])
        torch.testing.assert_close(rows, expected, rtol=2**-8, atol=0)  # TRL has them in bf16 for a moment


@pytest.mark.parametrize("tied", [True, False])
def test_rows_read_apart_are_what_peft_puts_into_the_matrix(recipe_of, tied):
    recipe = recipe_of(tied=tied)
    tokens = trained_tokens(recipe.lora, Path(recipe.model.base), False)
    base = load_base(recipe.model.base, recipe.model, "cpu", quantized=True, tokens=tokens)
    model = attach_adapter(base, recipe.lora, tokens)
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    assert len(layers) == 2
    for layer in layers:
        layer.trainable_tokens_delta["default"].data.mul_(1.5)
    ids = torch.tensor([[3, *tokens.ids, 9, *tokens.ids]])
    found = {}
    for way in ("apart", "peft's"):
        if way == "peft's":
            for layer in layers:
                del layer.forward
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found[way] = [loss, *(layer.trainable_tokens_delta["default"].grad for layer in layers)]
        with torch.no_grad(), model.disable_adapter():
            found[way].append(model(input_ids=ids).logits)
    for left, right in zip(found["apart"], found["peft's"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert found["apart"][1].abs().min(1).values.max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_every_path_learns_the_same(recipe_of, tied):
    """The loss from the head's rows tile by tile, packed; and PEFT's, TRL's and transformers' own code."""
    learned = []
    for kernels in ("auto", "plain"):
        recipe = recipe_of(f"train.kernels={kernels}", f"name={kernels}", tied=tied)
        Pipeline(recipe).run_stage("train")
        learned.append(learned_by(recipe))
    for name, rows in learned[0].items():
        torch.testing.assert_close(learned[1][name], rows, rtol=0, atol=2e-3)
    for log in tuple((recipe_of().run_dir.parent / "auto" / "logs").glob("*")):
        assert "TRL computes the loss" not in log.read_text()


def test_what_goes_with_them(recipe_of):
    """An interrupted run that goes on; PiSSA; GPTQ straight from the adapter; then training that goes on from it."""
    recipe = recipe_of("merge.write=false", "lora.init=pissa", "train.neftune_alpha=1", tied=False)
    Pipeline(recipe).run()
    adapter = recipe.run_dir / "adapter"
    before = (adapter / "adapter_model.safetensors").read_bytes()
    size = read_json(recipe.run_dir / "gptq" / "config.json")["vocab_size"]
    assert load_gptq(recipe.run_dir / "gptq").get_input_embeddings().num_embeddings == size
    assert read_json(recipe.run_dir / "evaluation" / "ladder.json")["rungs"][-1]["kl"] < 0.1
    shutil.rmtree(adapter)
    shutil.rmtree(recipe.run_dir / "checkpoints" / "checkpoint-6")
    Pipeline(recipe).run_stage("train")
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


def test_going_on_from_an_adapter_with_the_same_tokens(recipe_of):
    first = recipe_of("train.max_steps=2")
    Pipeline(first).run_stage("train")
    start = f"lora.start_from={first.run_dir / 'adapter'}"
    second = recipe_of(start, "name=second", "train.max_steps=1", "train.learning_rate=1e-12")
    Pipeline(second).run_stage("train")
    for name, rows in learned_by(first).items():
        torch.testing.assert_close(learned_by(second)[name], rows, rtol=0, atol=1e-9)
    for other in ("lora.new_tokens=[<call>, <other>]", "lora.new_tokens=[]", "lora.train_tokens=[]"):
        recipe = recipe_of(start, other, "name=third")
        assert any("other tokens" in problem.what for problem in check(recipe).problems)
        with pytest.raises(UserError, match="other tokens"):
            Pipeline(recipe).run_stage("train")
    combined = recipe_of(
        "lora.new_tokens=[]", "lora.train_tokens=[]", f"lora.combine=[{{path: {start[16:]}}}]", "name=sum"
    )
    with pytest.raises(UserError, match="trained tokens"):
        Pipeline(combined).run_stage("train")


def test_preferences_are_measured_against_the_rows_that_they_began_as(recipe_of, tmp_path):
    rows = [
        {"prompt": question, "chosen": f"<call>{answer}</call>", "rejected": "No idea."}
        for question, answer in {"One?": 1, "Two?": 2, "Three?": 3, "Four?": 4}.items()
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = (f"data.train=[{{path: {path}}}]", f"data.eval={{path: {path}}}")
    recipe = recipe_of(*data, "train.method=dpo", "train.max_steps=3", tied=False)
    Pipeline(recipe).run_stage("train")
    metrics = Lineage(recipe.run_dir / "lineage.json").metrics("train")
    assert metrics["steps"] == 3 and metrics["final_loss"] < 0.6  # ln 2 where the reference is the model itself
    still = recipe_of(
        *data, "train.method=dpo", "train.max_steps=1", "train.learning_rate=1e-12", "name=still", tied=False
    )
    Pipeline(still).run_stage("train")
    for name, rows in learned_by(recipe).items():
        moved = (rows - learned_by(still)[name]).abs().amax(1)
        # Nothing is predicted from the last token of an answer.
        assert (moved > 1e-3).tolist() == ([False, True, False] if "embed" in name else [True] * 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.new_tokens=['']"], "at least 1 character"),
        (["lora.new_tokens=['  ']"], "more than white space"),
        (["lora.new_tokens=[<a>, {text: <a>}]"], "'<a>' is there twice"),
        (["lora.new_tokens=[<a>]", "lora.train_tokens=[<a>]"], "'<a>' is there twice"),
        (["lora.new_tokens=[<a>]", "lora.combine=[{path: there}]"], "combine trains nothing"),
        (["lora.new_tokens=[<a>]", "lora.start_from=there", "train.method=dpo"], "copy of that adapter"),
        (["lora.new_tokens={text: <a>}"], "list"),
    ],
    ids=["empty", "white space", "twice", "both ways", "combine", "start_from", "no list"],
)
def test_recipes_that_contradict_themselves(tiny_recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(tiny_recipe(), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.new_tokens=['<|im_end|>']"], "is a token of the base's already"),
        (["lora.new_tokens=[harvest]", "lora.train_tokens=[<odd>]"], "'<odd>' is not one token of the base's"),
        (["lora.new_tokens=[<a>]", "lora.modules_to_save=[embed_tokens]"], "trained whole"),
        (["lora.new_tokens=[<a>]", "lora.target_modules=[q_proj, embed_tokens]"], "both trained rows and an adapter"),
        (["lora.new_tokens=[<a>]", "lora.target_modules=[q_proj, lm_head]"], "output head cannot have an adapter"),
    ],
    ids=["already there", "not there", "modules_to_save", "adapted embeddings", "adapted head"],
)
def test_check_and_training_refuse_what_has_no_rows_of_its_own(tiny_recipe, overrides, message):
    recipe = load_recipe(tiny_recipe(), overrides)
    assert any(message in problem.what for problem in check(recipe).problems), check(recipe).problems
    with pytest.raises(UserError, match=message):
        Pipeline(recipe).run_stage("train")


def test_a_token_that_the_model_has_no_row_for(base_of):
    """As some tokenizers have a pad token beyond the embeddings: its row would not be in the adapter."""
    base = base_of(0, True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = len(tokenizer)
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(base)
    model = Model(base=str(base))
    lora = Lora.model_validate({"new_tokens": ["<a>"]})
    with pytest.raises(UserError, match=f"no row for, such as number {size}"):
        load_base(base, model, "cpu", quantized=True, tokens=trained_tokens(lora, base, False))
    lora = Lora.model_validate({"new_tokens": ["<a>"], "train_tokens": ["<pad>"]})
    found = load_base(base, model, "cpu", quantized=True, tokens=trained_tokens(lora, base, False))
    matrix = found.get_input_embeddings().weight
    assert len(matrix) == size + 2 and torch.equal(matrix[size], matrix[:size].double().mean(0).bfloat16())
