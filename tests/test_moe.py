"""Mixtures of experts: router and experts by hand, counts by PEFT and by formula, the balance loss by transformers."""
import shutil

import pytest
import torch
from cord import short_receipts
from vlm_tutor.collate import Preprocess
from vlm_tutor.config import Config, explain, ineffective_keys, load_config, method_name
from vlm_tutor.core import RunFolder, VlmError, read_json_file
from vlm_tutor.engine import PlainLoss, choose_loss
from vlm_tutor.export import check_mergeable, combine, merge
from vlm_tutor.factory import check_factory
from vlm_tutor.lora import build_adapter, count_trainable, lora_config
from vlm_tutor.methods import METHODS, TOTALS
from vlm_tutor.models import FAMILIES
from vlm_tutor.moe import balance_loss, count_experts, expert_stacks, expert_use, plot_expert_use, save_small_moe
from vlm_tutor.predict import adapter_hash, load_run_model, predict, split_examples
from vlm_tutor.soft import load_adapter
from vlm_tutor.tiny import load_model
from vlm_tutor.train import events, train

LAYERS, EXPERTS, USED, WIDTH, INNER, RANK = 2, 8, 2, 64, 64, 4
ATTENTION = LAYERS*RANK*sum(a + b for a, b in [(WIDTH, 64), (WIDTH, 32), (WIDTH, 32), (64, WIDTH)])
STACKS = LAYERS*RANK*EXPERTS*((WIDTH + 2*INNER) + (INNER + WIDTH))
ROUTERS = LAYERS*RANK*(WIDTH + EXPERTS)
COUNTS = {"all": ATTENTION, "experts": STACKS, "router": ROUTERS, "all,experts": ATTENTION + STACKS,
          "q_proj, experts": LAYERS*RANK*128 + STACKS, "all,experts,router": ATTENTION + STACKS + ROUTERS}
HUB = dict(model_name_or_path="Qwen/Qwen3-VL-30B-A3B-Instruct")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "The folder of a small mixture"
    folder = tmp_path_factory.mktemp("base")/"small-moe"
    save_small_moe(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Four receipts a split with short answers"
    return short_receipts(tmp_path_factory.mktemp("data"), 4)


def options(data, base, path, **more):
    return dict(data=str(data), output_dir=str(path), model_name_or_path=str(base), max_steps=24, logging_steps=1,
                per_device_train_batch_size=2, save_strategy="steps", save_steps=16, save_total_limit=2, warmup_ratio=0,
                lora_rank=RANK, lora_alpha=8, eval_strategy="no", learning_rate=1e-2, image_max_pixels=24000,
                lora_target="all,experts,router", moe_aux_loss_coef=.1) | more


@pytest.fixture(scope="module")
def run(data, base, tmp_path_factory):
    "A short run of attention, experts and router, with the balance loss"
    path = tmp_path_factory.mktemp("run")/"run"
    train("tiny", overrides=options(data, base, path))
    return RunFolder(path)


@pytest.fixture
def at_hand(data, base):
    "Configuration, model, preprocessing and rows"
    config = load_config("tiny", options(data, base, "runs/none"))
    model, preprocess, _ = load_run_model(config)
    return config, model, preprocess, [preprocess.encode(example) for example in split_examples(config, "train")]


def filled(model, seed=0):
    "An adapter that changes something"
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name: p.data.normal_(0, .05)
    return model


# --- router and experts -----------------------------------------------------------------------------------------------
def test_a_layer_of_experts_by_hand(base):
    block = load_model(str(base)).model.language_model.layers[1].mlp
    router, stack = block.gate.weight, block.experts
    x, found = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(3)), []
    for token in x:
        share = torch.exp(router @ token)/torch.exp(router @ token).sum()
        best = sorted(range(EXPERTS), key=lambda e: -share[e])[:USED]
        out = 0
        for e in best:
            gate, up = stack.gate_up_proj[e, :INNER] @ token, stack.gate_up_proj[e, INNER:] @ token
            out = out + share[e]/sum(share[b] for b in best)*(stack.down_proj[e] @ (gate*torch.sigmoid(gate)*up))
        found.append(out)
    torch.testing.assert_close(block(x[None])[0], torch.stack(found), atol=1e-5, rtol=1e-4)


def test_use_is_what_the_routers_scores_say(at_hand):
    _, model, preprocess, rows = at_hand
    found, counts = expert_use(model, preprocess, rows), torch.zeros(LAYERS, EXPERTS)
    for row in rows:
        scores = model(**preprocess.collate([row]), output_router_logits=True).router_logits
        for i, one in enumerate(scores):
            for choice in one.topk(USED, -1).indices.flatten(): counts[i, choice] += 1
    assert counts.sum() == LAYERS*USED*sum(len(row["input_ids"]) for row in rows)
    torch.testing.assert_close(found, counts/counts.sum(1, keepdim=True))
    assert not any(stack._forward_pre_hooks for stack in expert_stacks(model))


def test_use_is_counted_under_an_adapter_too(at_hand):
    config, model, preprocess, rows = at_hand
    before = expert_use(model, preprocess, rows)
    model = build_adapter(model, config).eval()
    torch.testing.assert_close(expert_use(model, preprocess, rows), before)
    assert not torch.equal(expert_use(filled(model), preprocess, rows), before)


def test_the_plot_shows_each_layer_of_each_model():
    use = torch.tensor([[.75, .25], [.5, .5]])
    figure = plot_expert_use({"before": use, "after": use})
    first, second = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    assert [round(bar.get_height(), 3) for bar in second.patches] == [.375, .125, .25, .25]
    assert first.get_ylim() == second.get_ylim()


# --- how many ---------------------------------------------------------------------------------------------------------
def test_active_and_total_of_the_small_one(base):
    found, one = count_experts(load_model(str(base))), 3*WIDTH*INNER
    assert found["experts"] == LAYERS*EXPERTS*one
    assert found["total"] - found["active"] == LAYERS*(EXPERTS - USED)*one


def test_active_and_total_of_the_published_one():
    from test_methods import qwen3_vl_30b
    found = count_experts(qwen3_vl_30b())
    assert found["total"] == TOTALS["Qwen3-VL-30B-A3B"]
    assert found["experts"] == 48*128*3*2048*768 and found["total"] - found["active"] == 48*120*3*2048*768
    language = found["active"] - 538631408 - 2*151936*2048 # without vision, embedding and head
    assert 2.7e9 < language < 3e9 # the A3B of its name


@pytest.mark.parametrize("target", COUNTS)
def test_as_many_numbers_learn_as_the_widths_say(base, target):
    config = load_config("tiny", dict(model_name_or_path=str(base), lora_target=target, lora_rank=RANK))
    model = build_adapter(load_model(str(base)), config)
    assert count_trainable(model)["trainable"] == COUNTS[target] == model.get_nb_trainable_parameters()[0]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    for part, word in (("mlp.experts", "experts"), ("mlp.gate", "router")):
        assert any(part in name for name in learning) == (word in target)
    assert not any("visual" in name for name in learning)


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("moe_")])
def test_the_survey_counts_what_the_engine_builds(name):
    from peft import get_peft_model
    from test_methods import qwen3_vl_30b
    model, config = qwen3_vl_30b(), load_config("cord", METHODS[name].native.split())
    adapted = get_peft_model(model, lora_config(model, config))
    assert count_trainable(adapted)["trainable"] == METHODS[name].trainable == adapted.get_nb_trainable_parameters()[0]


def test_peft_lays_out_the_experts_as_the_chapter_says(base):
    "A by expert, B with the experts innermost; the correction of each, with loops"
    config = load_config("tiny", dict(model_name_or_path=str(base), lora_target="experts", lora_rank=3, lora_alpha=6))
    model, plain = filled(build_adapter(load_model(str(base)), config)), load_model(str(base))
    outer = model.get_base_model().model.language_model.layers[0].mlp.experts
    wanted = {}
    for wrapped in (outer, outer.base_layer):
        A, B = (part["default"].weight.detach() for part in (wrapped.lora_A, wrapped.lora_B))
        weight = getattr(plain.model.language_model.layers[0].mlp.experts, wrapped.parameter_name).detach().clone()
        for e in range(EXPERTS):
            for r in range(3): weight[e] += 2*torch.outer(B[:, r*EXPERTS + e], A[e*3 + r])
        wanted[wrapped.parameter_name] = weight
    assert set(wanted) == {"gate_up_proj", "down_proj"}
    merged = model.merge_and_unload().model.language_model.layers[0].mlp.experts
    for name, weight in wanted.items(): torch.testing.assert_close(getattr(merged, name), weight, atol=1e-6, rtol=1e-5)


# --- balance ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("used", [1, 2, 3])
def test_the_balance_loss_is_that_of_transformers(used):
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func as theirs
    g = torch.Generator().manual_seed(used)
    scores = tuple(3*torch.randn(4*9, EXPERTS, generator=g) for _ in range(3))
    mask = (torch.rand(4, 9, generator=g) < .7).long()
    for seen in (None, mask):
        assert balance_loss(scores, used, seen).item() == pytest.approx(theirs(scores, EXPERTS, used, seen).item())
    alone = sum(theirs((one,), EXPERTS, used, mask) for one in scores)/3
    assert balance_loss(scores, used, mask, each_layer=True).item() == pytest.approx(alone.item())


def test_the_balance_loss_from_its_ends():
    "Even work, all work with the same, and two layers that excuse each other"
    sure = lambda *choices: 50*torch.eye(4)[list(choices)]
    assert balance_loss([sure(0, 1, 2, 3)], 1).item() == pytest.approx(1)
    assert balance_loss([sure(2, 2, 2, 2)], 1).item() == pytest.approx(4)
    pair = [sure(0, 0, 1, 1), sure(2, 2, 3, 3)]
    assert balance_loss(pair, 1).item() == pytest.approx(1)
    assert balance_loss(pair, 1, each_layer=True).item() == pytest.approx(2)


def test_its_gradient_takes_from_those_that_are_chosen_most():
    scores = torch.tensor([[1., 0, 0], [1., 0, 0], [0, 1., 0]], requires_grad=True)
    grad, = torch.autograd.grad(balance_loss([scores], 1), scores)
    assert (grad[:, 0] > 0).all() and (grad[:, 2] < 0).all()


@pytest.mark.parametrize("memory", ["keep", "layers"])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_engine_adds_it_in_training_only(at_hand, memory, sparse):
    config, model, preprocess, rows = at_hand
    model, batch = filled(build_adapter(model, config)), preprocess.collate(rows)
    answers = sum(label != -100 for row in rows for label in row["labels"][1:])
    with torch.no_grad(): plain = model(**batch).loss
    model.config.text_config.router_aux_loss_coef = .1
    out = model.train()(**batch, output_router_logits=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(out.loss*answers, learned)
    loss = PlainLoss(model, preprocess, sparse, True)
    while memory == "layers" and loss.save_memory(): pass
    found = loss(rows)
    assert found.item() == pytest.approx(answers*(plain + .1*out.aux_loss).item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, learned), truth): torch.testing.assert_close(ours, theirs,
                                                                                                 atol=1e-3, rtol=1e-3)
    model.eval()
    with torch.no_grad(): assert loss(rows).item() == pytest.approx(answers*plain.item(), rel=1e-5)


def test_the_configuration_reaches_the_loss(at_hand):
    config, model, preprocess, _ = at_hand
    loss, reason = choose_loss(build_adapter(model, config), preprocess, config)
    assert loss.balance and model.config.text_config.router_aux_loss_coef == .1 and reason


# --- a run ------------------------------------------------------------------------------------------------------------
def losses(run): return [row["loss"] for row in events(run, "step")]


def test_two_dozen_steps_lower_the_loss(run):
    found = losses(run)
    assert len(found) == 24 and sum(found[-4:]) < .6*sum(found[:4])
    assert events(run, "start")[0]["trainable"] == COUNTS["all,experts,router"]
    assert set(read_json_file(run.adapter/"adapter_config.json")["target_parameters"]) == {
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"}


def test_what_was_saved_is_what_was_trained(run, base):
    "The last validation against the loaded adapter, beside the weights and merged; no balance loss in either"
    config = load_config(run.config_file)
    merged, preprocess, _ = load_run_model(config, run.adapter)
    beside = load_adapter(load_model(str(base)), run.adapter).eval()
    total = count = 0
    for example in split_examples(config, "validation"):
        batch, answer = preprocess.collate([preprocess.encode(example)]), len(preprocess.answer_ids(example))
        with torch.no_grad(): one, apart = merged(**batch), beside(**batch)
        assert (one.logits - apart.logits).abs().max() < 1e-3
        total, count = total + apart.loss.item()*answer, count + answer
    assert total/count == pytest.approx(events(run, "validation")[-1]["loss"], abs=2e-4)


def test_a_stopped_run_ends_as_one_that_was_not(run, data, base, tmp_path):
    again = RunFolder(tmp_path/"run")
    shutil.copytree(run.path, again.path)
    shutil.rmtree(again.adapter)
    shutil.rmtree(again.checkpoints/"checkpoint-24")
    train("tiny", overrides=options(data, base, again.path))
    assert losses(again) == losses(run) and adapter_hash(again.adapter) == adapter_hash(run.adapter)


@pytest.mark.slow
def test_it_answers_and_becomes_a_folder(run, tmp_path):
    assert predict(str(run.path))["errors"] == 0 and check_mergeable(run.adapter) == "LORA"
    found = merge(str(run.path), str(tmp_path/"merged"))
    stack = expert_stacks(load_model(str(tmp_path/"merged")))[0]
    assert tuple(stack.gate_up_proj.shape) == (EXPERTS, 2*INNER, WIDTH) and found["checked"]["rows"]


# --- what cannot be ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, said", [
    (HUB | dict(lora_target="experts", lora_dropout=.1), "PEFT cannot drop their inputs"),
    (HUB | dict(lora_target="all,router", lora_dropout=.1), "lora_dropout=0.1 and lora_target=all,router contradict"),
    (HUB | dict(lora_target="experts", use_dora=True), "use_dora=true and lora_target=experts contradict"),
    (HUB | dict(lora_target="experts", finetuning_type="pissa"), "PEFT has no PiSSA for them"),
    (HUB | dict(lora_target="experts", fsdp=True), "fsdp does not share them"),
    (HUB | dict(lora_target="experts", freeze_language_model=True, freeze_vision_tower=False), "language model"),
    (HUB | dict(finetuning_type="prompt", moe_aux_loss_coef=.001), "leaves all weights alone"),
    (HUB | dict(moe_aux_loss_coef=-1), "moe_aux_loss_coef is -1.0. Allowed: 0 or above"),
    (dict(lora_target="experts"), "needs a model with experts; Qwen2-VL has none"),
    (dict(moe_aux_loss_coef=.01), "moe_aux_loss_coef=0.01 needs a model with experts; Qwen2-VL has none")])
def test_what_contradicts_is_named_before_a_model_is_loaded(given, said):
    with pytest.raises(VlmError) as raised: load_config("tiny", given)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_dropout_beside_the_attention_is_fine():
    config = load_config("cord", HUB | dict(lora_dropout=.1, moe_aux_loss_coef=.001))
    assert method_name(config) == "LoRA r8"
    assert method_name(load_config("cord", HUB | dict(lora_target="experts"))) == "LoRA r8 on experts"


def test_targets_are_held_to_the_model(base):
    model, plain = load_model(str(base)), load_model("tiny-receipts")
    named = lambda target, **more: load_config("tiny", dict(model_name_or_path=str(base), lora_target=target) | more)
    with pytest.raises(VlmError, match="Did you mean 'experts'"): lora_config(model, named("expert"))
    with pytest.raises(VlmError, match="up to 8"): lora_config(model, named("router"))
    unknown = Config(model_name_or_path="somebody/elses", lora_target="all,experts") # a hub name of no row
    with pytest.raises(VlmError, match="this model has no 'mlp.experts.gate_up_proj'"): lora_config(plain, unknown)
    with pytest.raises(VlmError, match="no experts"): expert_stacks(plain)


def test_few_bits_leave_experts_as_they_are():
    notes = {row["key"]: row["but"] for row in explain(load_config("cord", HUB | dict(finetuning_type="qlora")))}
    assert "experts are no linear layers and keep 16 bits" in notes["quantization_bit"]


def test_llamafactory_is_not_asked_for_what_it_has_not():
    with pytest.raises(VlmError, match="no adapters for experts"):
        check_factory(load_config("cord", HUB | dict(lora_target="experts", template="qwen3_vl_nothink")))
    config = load_config("cord", HUB | dict(moe_aux_loss_coef=.001))
    assert "moe_aux_loss_coef" in dict(ineffective_keys(config, "llamafactory"))
    assert "moe_aux_loss_coef" not in dict(ineffective_keys(config))


def test_adapters_on_experts_are_not_summed(run, base):
    model = load_adapter(load_model(str(base)), run.adapter, "one")
    model.load_adapter(run.adapter, "two")
    with pytest.raises(VlmError, match="adapters on experts cannot be summed"): combine(model, dict(one=.5, two=.5))


@pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.name not in ("minicpm_v", "gemma4_unified")])
def test_a_family_has_experts_where_its_row_says_so(name):
    "The decoder of each family, two layers of it without weights"
    from transformers import AutoConfig, AutoModelForImageTextToText
    config = AutoConfig.for_model(FAMILIES[name].types[0])
    config.get_text_config().num_hidden_layers = 2
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(config)
    names = [n for n, _ in model.named_parameters()]
    for end in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
        assert any(n.endswith(end) for n in names) == FAMILIES[name].experts, end
