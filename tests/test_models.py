"""The rows of model families: image rules against transformers itself, names against real architectures."""
import re
from importlib import import_module
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_tutor.core import VlmError
from vlm_tutor.models import (CHECKED, FAMILIES, READ_IN, RULES, Family, add_family, find_family, models, read_family,
                              size_tokens)

SIZES = [(864, 1296), (1296, 864), (600, 900), (333, 777), (64, 48), (17, 400), (400, 17), (28, 28), (31, 29),
         (512, 512), (1024, 512), (513, 511), (448, 1344), (899, 300), (1000, 999), (2049, 100)]
TESTED = [f for f in FAMILIES.values() if not f.why_untested]
families = pytest.mark.parametrize("family", TESTED, ids=lambda f: f.name)


def image_class(family):
    "The class that the row names"
    module, _, name = family.images.partition(":")
    return getattr(import_module(f"transformers.models.{module}"), name)


def build(family, **more):
    "The family's own image processor with the published values, in its words"
    v, known = family.values, {}
    if family.rule in ("proportion", "frames", "budget", "slices", "canvas"):
        known = {k: n for k, n in v.items() if k not in ("shortest_edge", "longest_edge", "tile", "tokens", "merge")}
    if "shortest_edge" in v: known["size"] = {k: v[k] for k in ("shortest_edge", "longest_edge")}
    if family.rule == "canvas": known |= dict(size=dict(height=v["tile"], width=v["tile"]), crop_to_patches=True)
    if family.rule == "tiles": known = dict(size=dict(longest_edge=v["longest_edge"]),
                                            max_image_size=dict(longest_edge=v["tile"]))
    return image_class(family)(**known | more)


def look(images, size, **more):
    return images(images=[Image.new("RGB", size, (200, 30, 90))], return_tensors="np", **more)


# --- one oracle a rule: what the class really makes of an image -------------------------------------------------------
def in_patches(family, images, size):
    frames, rows, columns = look(images, size)["image_grid_thw"][0]
    return frames*rows*columns//images.merge_size**2, 1


def in_budget(family, images, size): return look(images, size)["num_soft_tokens_per_image"][0], 1


def in_tiles(family, images, size):
    made = look(images, size, return_row_col_info=True)
    count = made["pixel_values"].shape[1]
    assert (made["rows"][0][0], made["cols"][0][0]) == family.seen(*size)[2:4]
    return count*family.values["tokens"], count


def in_canvas(family, images, size):
    count = look(images, size)["pixel_values"].shape[0]
    return count*family.values["tokens"], count


def in_slices(family, images, size):
    made = look(images, size)
    return (made["target_sizes"].prod(-1)//16).sum(), len(made["target_sizes"])


def unpadded(family, images, size):
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor as real
    self = SimpleNamespace(image_processor=images, num_image_tokens=729, vision_aspect_ratio="anyres_max_9")
    self._get_unpadded_features = lambda *args: real._get_unpadded_features(self, *args)
    looks = look(images, size)["pixel_values"].shape[1]
    return real._get_number_of_features(self, size[1], size[0], 384, 384), looks


def fixed(family, images, size):
    if family.name == "idefics2": return 64*look(images, size)["pixel_values"].shape[1], 5
    pixels, pooled = dict(paligemma=(448, 1), gemma3=(896, 16))[family.name]
    made = look(image_class(family)(size=dict(height=pixels, width=pixels)), size)["pixel_values"]
    return made.shape[0]*(made.shape[2]//14)*(made.shape[3]//14)//pooled, 1


ORACLES = dict(proportion=in_patches, frames=in_patches, budget=in_budget, tiles=in_tiles, canvas=in_canvas,
               slices=in_slices, unpadded=unpadded, fixed=fixed)


@families
def test_the_rule_says_what_the_image_processor_does(family):
    images = build(family, **dict(do_image_splitting=True) if family.name == "idefics2" else {})
    for size in SIZES:
        tokens, looks = ORACLES[family.rule](family, images, size)
        assert family.seen(*size)[:2] == (tokens, looks), size


@pytest.mark.parametrize("values", [dict(longest_edge=1536, tile=384, tokens=81), dict(longest_edge=128, tile=64),
                                    dict(longest_edge=512, tile=512)])
def test_tiles_of_other_sizes_too(values):
    "The 2.2B of SmolVLM; small tiles; an edge that is one tile"
    row = FAMILIES["smolvlm"]
    images = build(row, size=dict(longest_edge=values["longest_edge"]),
                   max_image_size=dict(longest_edge=values["tile"]))
    for size in SIZES:
        made = look(images, size, return_row_col_info=True)
        found = row.seen(*size, values)
        assert found[1:4] == (made["pixel_values"].shape[1], made["rows"][0][0], made["cols"][0][0]), (size, values)


def test_a_hand_worked_page_of_each_rule():
    "864 × 1296: 31 × 46 patches of 28; 27 × 40 of 32 (40.5 rounds to even); 3 × 4 tiles and the page"
    hand = dict(qwen2_vl=31*46, qwen3_vl=27*40, smolvlm=(3*4 + 1)*64, idefics2=5*64, gemma3=256, paligemma=32*32)
    assert {name: FAMILIES[name].seen(864, 1296).tokens for name in hand} == hand


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 5000), st.integers(30, 5000), st.sampled_from(sorted(FAMILIES)))
def test_every_page_has_tokens_and_looks(width, height, name):
    found = FAMILIES[name].seen(width, height)
    assert found.tokens > 0 and found.looks >= max(1, found.rows*found.columns)
    assert all(isinstance(n, int) for n in found)


# --- names, against architectures without weights ---------------------------------------------------------------------
def bones(kind):
    "A model of the family on the meta device, four layers deep"
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    more = dict(vision_config=dict(model_type=f"{kind}_vision")) if kind.startswith("gemma4") else {}
    config = AutoConfig.for_model(kind, **more)
    for part in (config.text_config, config.vision_config):
        for name in ("num_hidden_layers", "depth"):
            if isinstance(getattr(part, name, None), int): setattr(part, name, 4)
        if getattr(part, "layer_types", None): part.layer_types = part.layer_types[:4]
    with torch.device("meta"): return AutoModelForImageTextToText.from_config(config)


BONES = [(f, kind) for f in FAMILIES.values() for kind in f.types if f.name != "qwen4_exp"] # its defaults build nothing


@pytest.mark.parametrize("family, kind", BONES, ids=[kind for _, kind in BONES])
def test_the_names_are_those_of_the_architecture(family, kind):
    import torch
    model = bones(kind)
    for part in (family.tower, family.merger, family.language): assert model.model.get_submodule(part) is not None
    for name in family.skip: assert model.get_submodule(name) is not None
    linear = {name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    aimed = {name for name in linear if re.fullmatch(family.targets, name)}
    inside = {name for name in linear if name.startswith(f"model.{family.language}.layers.")}
    gates = ("per_layer_input_gate", "per_layer_projection", "shared_expert_gate")
    assert aimed and inside - aimed == {name for name in inside if name.endswith(gates)} and aimed <= inside
    whole = {name for name in linear if name.startswith(family.skip)}
    assert linear - inside - whole <= {"model.language_model.per_layer_model_projection"}


# --- where it was read ------------------------------------------------------------------------------------------------
def test_what_was_read_nowhere_is_marked():
    "In the data, in the list and on a family's own page"
    assert set(READ_IN) <= set(FAMILIES) and all(set(read) <= set(CHECKED) for read in READ_IN.values())
    assert all(re.search(r"[/:]", place) for read in READ_IN.values() for place in read.values())
    for row in models()["families"]:
        family = FAMILIES[row["name"]]
        missing = set(CHECKED) - set(READ_IN.get(family.name, {}))
        partly = {what for what, place in READ_IN.get(family.name, {}).items() if "not confirmed" in place}
        assert set(family.unconfirmed) == missing | partly
        assert row["unconfirmed"] == (", ".join(family.unconfirmed) or "-")
        assert family.facts()["not confirmed"] == (", ".join(family.unconfirmed) or "nothing")
    assert FAMILIES["qwen4_exp"].unconfirmed == CHECKED and not FAMILIES["qwen2_vl"].unconfirmed


# --- finding, adding, showing -----------------------------------------------------------------------------------------
def test_one_row_for_each_type_and_a_rule_for_each_row():
    kinds = [kind for f in FAMILIES.values() for kind in f.types]
    assert len(kinds) == len(set(kinds)) and {f.rule for f in FAMILIES.values()} == set(RULES)
    assert all(f.source and f.licence and f.models and f.chat for f in FAMILIES.values())


def test_an_unknown_family_names_the_nearest_and_how_to_add_one(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "qwen3_vl_next"}')
    with pytest.raises(VlmError) as raised: read_family(tmp_path)
    said = str(raised.value)
    assert "qwen3_vl_next" in said and "Did you mean 'qwen3_vl" in said and "add_family(Family(" in said
    assert "\n" not in said


def test_a_row_can_be_added(monkeypatch):
    monkeypatch.setattr("vlm_tutor.models.FAMILIES", dict(FAMILIES))
    row = Family("mine", "Mine", ("mine_vl",), ("me/mine",), "MIT", "visual", "visual.merger", "language_model", "x",
                 "fixed", dict(tokens=7), "here", "", "<u>", why_untested="no class")
    add_family(row)
    assert find_family("mine_vl") is row and row.seen(5, 5).tokens == 7


def test_the_verb_lists_and_shows():
    everything = models(width=600, height=900)
    assert len(everything["families"]) == len(FAMILIES) and "needs torchvision" in str(everything)
    one = models("Qwen/Qwen3-VL-2B-Instruct", width=640, height=640)
    assert one["name"] == "qwen3_vl" and one["tokens"] == 400
    with pytest.raises(VlmError, match="height is -1"): models(height=-1)


def test_size_tokens_is_the_rule_of_the_checks():
    from vlm_tutor.memory import size_tokens as planner
    assert planner is size_tokens


@pytest.mark.parametrize("given, said", [
    (dict(model_name_or_path="Qwen/Qwen3-VL-2B-Instruct"), "write template=qwen3_vl_nothink"),
    (dict(model_name_or_path="HuggingFaceTB/SmolVLM2-2.2B-Instruct"), "LLaMA-Factory has no template for SmolVLM"),
    (dict(model_name_or_path="google/gemma-4-E2B-it", template="gemma4"), "write template=gemma4n"),
    (dict(model_name_or_path="google/gemma-4-31B-it", template="gemma4n"), "write template=gemma4"),
    (dict(model_name_or_path="zai-org/GLM-4.6V-Flash", template="glm4v"), "write template=glm4_5v"),
    (dict(model_name_or_path="google/gemma-4-E2B-it", template="gemma4n"), None),
    (dict(model_name_or_path="Qwen/Qwen3-VL-2B-Instruct", template="qwen3_vl"), None), (dict(), None)])
def test_llama_factory_is_not_handed_another_familys_template(given, said):
    from vlm_tutor.config import load_config
    from vlm_tutor.factory import check_factory
    if said is None: return check_factory(load_config("cord", given))
    with pytest.raises(VlmError, match=said): check_factory(load_config("cord", given))
