"""Training with rounding: torch's own fake quantisation, PyTorch's gradients, PEFT and compressed-tensors as oracles"""
import copy, json, math

import pytest
import torch
import torch.nn.functional as F
from cord import short_receipts
from families import build
from vlm_tutor.config import Config, ineffective_keys, load_config
from vlm_tutor.core import RunFolder, VlmError
from vlm_tutor.export import merge
from vlm_tutor.lora import build_adapter, linear_layers
from vlm_tutor.predict import load_run_model, predict, split_examples, stands_alone
from vlm_tutor.qat import *
from vlm_tutor.tiny import load_model
from vlm_tutor.train import events, train, trained_folder

GRIDS = [Grid(4, 32), Grid(4, 0), Grid(8, 0), Grid(8, 16)]
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def matrix(rows=6, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# --- rounding ---------------------------------------------------------------------------------------------------------
@grids
def test_rounding_is_that_of_torch(grid):
    "torch.fake_quantize_per_channel_affine, one channel a group"
    weight, most = matrix(), 2 ** (grid.bits - 1) - 1
    parts = weight.reshape(-1, grid.group_size or 64)
    scales = parts.abs().amax(1) / most
    zero = torch.zeros(len(scales), dtype=torch.int32)
    wanted = torch.fake_quantize_per_channel_affine(parts, scales, zero, 0, -most, most).view_as(weight)
    assert (rounded(weight, grid) - wanted).abs().max() < 1e-6
    codes, _ = codes_and_scales(weight, grid)
    assert torch.equal(codes, codes.round()) and codes.abs().max() == most


@grids
def test_what_is_rounded_stays_as_it_is(grid):
    once = rounded(matrix(), grid)
    assert (rounded(once, grid) - once).abs().max() < 1e-6
    assert torch.equal(codes_and_scales(once, grid)[0], codes_and_scales(matrix(), grid)[0])


def test_no_weight_moves_by_more_than_half_a_step():
    weight, (_, scales) = matrix(), codes_and_scales(matrix(), Grid())
    moved = (rounded(weight, Grid()) - weight).unflatten(1, (-1, 32)).abs()
    assert (moved <= scales / 2 + 1e-7).all()


def test_zeros_stay_zeros():
    assert torch.equal(rounded(torch.zeros(2, 64), Grid()), torch.zeros(2, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_loses_nothing(bits):
    "Every value, both ends included"
    most = 2 ** (bits - 1)
    codes = torch.arange(-most, most).repeat(2, 4)
    assert pack(codes, bits).shape == (2, codes.shape[1] * bits // 32)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


# --- the gradient -----------------------------------------------------------------------------------------------------
@grids
@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_gradient_is_that_of_the_straight_through_estimator(grid, with_adapter):
    "PyTorch's own, of a rounding that is hidden from it"
    W, A, B, x = (t.requires_grad_() for t in (matrix(), matrix(2), matrix(6, 2), matrix(5)))
    used = (W.detach(), A, B) if with_adapter else (W, None, None)
    whole = W.detach() + .5 * B @ A if with_adapter else W
    wanted = F.linear(x, whole + (rounded(whole.detach(), grid) - whole.detach()))
    found, g = RoundedProduct.apply(x, *used, .5, grid), matrix(5, 6, 1)
    learning = (x, A, B) if with_adapter else (x, W)
    assert torch.allclose(found, wanted, atol=1e-4)
    for one, other in zip(*(torch.autograd.grad((y * g).sum(), learning) for y in (found, wanted))):
        assert torch.allclose(one, other, atol=1e-4)


def test_in_16_bits_the_same_weights_are_rounded():
    "Under autocast the sum is still made in 32 bits; the result is that of the settled layer in 16 bits"
    layer = RoundedLinear(torch.nn.Linear(64, 6), Grid())
    A, B, x = matrix(2), matrix(6, 2), matrix(5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, A, B, .5)
        wanted = layer.settled(A, B, .5)(x)
    y.float().sum().backward()
    assert y.dtype == wanted.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert (y - wanted).abs().max() <= 2 ** -7 * wanted.abs().max()


def test_no_rounded_copy_is_kept_for_the_backward_pass():
    "What autograd holds is the input, the weights and nothing of their size besides"
    layer, kept = RoundedLinear(torch.nn.Linear(64, 6), Grid()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(matrix(5).requires_grad_(), matrix(2).requires_grad_(), matrix(6, 2).requires_grad_())
    assert sorted(t.numel() for t in kept) == sorted([6 * 64, 5 * 64, 2 * 64, 6 * 2])


# --- whole models -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(): return load_model("tiny-receipts")


@pytest.fixture(scope="module")
def data(tmp_path_factory): return short_receipts(tmp_path_factory.mktemp("data"), 4)


def ids(): return torch.randint(60, 90, (2, 30), generator=torch.Generator().manual_seed(0))


def scores(model):
    with torch.no_grad(): return model.eval()(input_ids=ids()).logits


def moved(model):
    "A model whose learning weights have changed a little"
    torch.manual_seed(0)
    for p in model.parameters(): p.data += .02 * p.abs().mean().clamp(min=.1) * torch.randn_like(p) * p.requires_grad
    return model


def trained_like(base, word, **more):
    config = Config(finetuning_type=word, **more)
    return moved(dict(qat=build_qat, qat_lora=build_qat_lora)[word](copy.deepcopy(base), config))


def test_only_the_matrices_of_the_language_model_are_rounded(base):
    model = round_layers(copy.deepcopy(base), Grid())
    names = {name for name, layer in model.named_modules() if isinstance(layer, RoundedLinear)}
    assert names == {name for name, part in linear_layers(base).items() if part == "language"} and len(names) == 35
    same = dict(base.named_parameters())
    assert all(torch.equal(p, same[name]) for name, p in model.named_parameters())  # the weights behind are untouched


@pytest.mark.parametrize("word", ["qat", "qat_lora"])
@grids
def test_the_converted_model_is_the_one_that_was_trained(base, word, grid):
    "Fake-quantised, settled and packed: three computations, one model"
    model = trained_like(base, word, qat_bits=grid.bits, qat_group_size=grid.group_size)
    seen = scores(model)
    plain = settled(model)
    assert not any(isinstance(layer, RoundedLinear) or "lora" in name for name, layer in plain.named_modules())
    assert (scores(plain) - seen).abs().max() < 1e-4 * seen.abs().max()
    assert (scores(packed(plain, grid)) - seen).abs().max() < 1e-4 * seen.abs().max()


def test_qat_lora_is_rounding_after_pefts_own_merge(base):
    "PEFT merges, we round: the oracle of the sum"
    model = trained_like(base, "qat_lora", lora_rank=4)
    seen = scores(model)
    plain = build_adapter(copy.deepcopy(base), Config(lora_rank=4))
    plain.load_state_dict(model.state_dict())
    merged = plain.merge_and_unload()
    for name, part in linear_layers(merged).items():
        if part == "language":
            weight = merged.get_submodule(name).weight
            weight.data = rounded(weight.data, Grid())
    assert (scores(merged) - seen).abs().max() < 1e-3 * seen.abs().max()


@grids
def test_transformers_reads_the_same_model_by_compressed_tensors(base, tmp_path, grid):
    pytest.importorskip("compressed_tensors", reason="NO COMPRESSED-TENSORS: the packed format is not tested")
    plain = settled(trained_like(base, "qat", qat_bits=grid.bits, qat_group_size=grid.group_size))
    seen = scores(plain)
    packed(plain, grid).save_pretrained(tmp_path)
    assert (scores(load_model(str(tmp_path))) - seen).abs().max() < 1e-5 * seen.abs().max()
    noted = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert noted["config_groups"]["group_0"]["weights"]["num_bits"] == grid.bits and "lm_head" in noted["ignore"]


def test_a_packed_model_is_small(base):
    "Bits a weight by hand: 4, and 32 for the scale of each 32"
    model = packed(round_layers(copy.deepcopy(base), Grid()), Grid())
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    bits = sum(8 * b.numel() * b.element_size() for x in layers for b in (x.weight_packed, x.weight_scale))
    assert len(layers) == 35 and bits == 5 * sum(math.prod(layer.weight_shape.tolist()) for layer in layers)


@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm", "qwen3_5"])
def test_other_families_are_rounded_packed_and_read_alike(tmp_path, kind):
    pytest.importorskip("compressed_tensors", reason="NO COMPRESSED-TENSORS: the packed format is not tested")
    model = trained_like(load_model(str(build(kind, tmp_path / "base"))), "qat_lora", lora_rank=4)
    seen = scores(model)
    packed(settled(model), Grid()).save_pretrained(tmp_path / "small")
    assert (scores(load_model(str(tmp_path / "small"))) - seen).abs().max() < 1e-4 * seen.abs().max()


def test_experts_are_refused(tmp_path):
    with pytest.raises(VlmError, match="holds experts, which are not rounded yet"):
        round_layers(load_model(str(build("qwen3_vl_moe", tmp_path))), Grid())


# --- runs -------------------------------------------------------------------------------------------------------------
def options(data, path, word, **more):
    return dict(data=str(data), output_dir=str(path), finetuning_type=word, max_steps=2, logging_steps=1,
                per_device_train_batch_size=2, save_strategy="no", warmup_ratio=0, eval_strategy="no",
                learning_rate=1e-3) | more


@pytest.mark.parametrize("word", ["qat_lora", pytest.param("qat", marks=pytest.mark.slow)])
def test_a_run_is_trained_validated_loaded_and_shipped(data, tmp_path, word):
    pytest.importorskip("compressed_tensors", reason="NO COMPRESSED-TENSORS: the packed format is not tested")
    train("tiny", overrides=options(data, tmp_path / "run", word, qat_bits=8, qat_group_size=0))
    run = RunFolder(tmp_path / "run")
    assert read_grid(trained_folder(run)) == Grid(8, 0) and stands_alone(trained_folder(run))
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, trained_folder(run))
    batch = preprocess.collate([preprocess.encode(e) for e in split_examples(config, "validation")])
    with torch.no_grad(): loss = model(**batch).loss.item()
    assert loss == pytest.approx(events(run, "validation")[-1]["loss"], abs=2e-4)
    told = merge(str(run.path), dtype="quantised", rows=1)
    assert told["checked"]["equal_answers"] == told["rounded"]["equal_answers"] == 1
    assert told["rounded"]["logit_difference"] < 1e-4 * told["rounded"]["logit_size"]
    shipped = load_model(told["folder"])
    with torch.no_grad(): assert shipped(**batch).loss.item() == pytest.approx(loss, abs=2e-4)
    assert merge(str(run.path), dtype="quantised", rows=1)["checked"] == told["checked"]


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, said", [
    (dict(qat_bits=3), "qat_bits is 3. Allowed: 4, 8"), (dict(qat_group_size=-1), "qat_group_size is -1. Allowed: 0"),
    (dict(finetuning_type="qat", freeze_language_model=True, freeze_vision_tower=False), "freeze_language_model=true"),
    (dict(finetuning_type="qat", torch_compile=True), "torch_compile does not go with finetuning_type=qat"),
    (dict(finetuning_type="qat", quantization_bit=4), "finetuning_type=qat and quantization_bit=4 contradict"),
    (dict(finetuning_type="qat_lora", use_dora=True), "finetuning_type=qat_lora and use_dora=true contradict"),
    (dict(finetuning_type="qat", adapter_name_or_path="x"), "cannot go on from adapter_name_or_path. Take qat_lora"),
    (dict(finetuning_type="qat_lora", fsdp=True), "fsdp shares frozen layers"),
    (dict(finetuning_type="qat_lora", lora_dropout=.1), "the sum of weight and adapter is rounded")])
def test_what_contradicts_is_named(given, said):
    with pytest.raises(VlmError) as raised: load_config("tiny", given)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_keys_of_other_methods_have_no_effect_and_it_is_said():
    assert "it belongs to qat and qat_lora" in dict(ineffective_keys(Config(qat_bits=8)))["qat_bits"]
    idle = dict(ineffective_keys(Config(finetuning_type="qat_lora", lora_rank=4, qat_bits=8, pissa_iter=3)))
    assert "pissa_iter" in idle and not {"lora_rank", "qat_bits"} & set(idle)


def test_groups_that_do_not_fit_are_refused(base):
    with pytest.raises(VlmError, match="qat_group_size 48.*Allowed: 0 for a whole row, or a divisor of 64"):
        round_layers(copy.deepcopy(base), Grid(4, 48))
    with pytest.raises(VlmError, match="LoRA without DoRA"):
        add_first(build_adapter(copy.deepcopy(base), Config(finetuning_type="dora")))


def test_a_run_without_rounding_is_not_shipped_in_few_bits(data, tmp_path):
    from vlm_tutor.export import check_packed
    with pytest.raises(VlmError, match="was trained without rounding.*finetuning_type=qat or qat_lora"):
        check_packed({tmp_path: 1.}, "quantised")
