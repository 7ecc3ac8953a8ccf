"""Small models of the families that the engine trains: random weights, real architectures, as checkpoint folders."""
import json

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SMOL_CHAT = ("<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
             "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
             "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
             "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
             "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
TILE_TOKENS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
               *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))]


def qwen_config(kind, tokenizer):
    "A small configuration of a Qwen family"
    from transformers import AutoConfig
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    rows, ids = -(-len(tokenizer)//32)*32, lambda word: tokenizer.convert_tokens_to_ids(f"<|{word}|>")
    text = dict(SIZES, vocab_size=rows, rope_parameters=rope, bos_token_id=None, eos_token_id=ids("im_end"),
                pad_token_id=ids("endoftext"), max_position_embeddings=4096)
    if "3" in kind: text |= dict(head_dim=16, rope_parameters=rope | dict(mrope_interleaved=True))
    if kind.startswith("qwen3_5"):
        text |= dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=8,
                     linear_num_key_heads=4, linear_key_head_dim=16, linear_value_head_dim=8)
        rope["partial_rotary_factor"], rope["mrope_section"] = .5, [2, 1, 1]
        text["rope_parameters"] = rope | dict(mrope_interleaved=True)
    if "moe" in kind:
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
        text |= dict(shared_expert_intermediate_size=64) if "3_5" in kind else dict(decoder_sparse_step=1)
    vision = dict(depth=3, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
    vision |= dict(qwen2_vl=dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
                   qwen2_5_vl=dict(hidden_size=32, intermediate_size=64, out_hidden_size=64, window_size=32,
                                   fullatt_block_indexes=[2])).get(kind) or \
        dict(hidden_size=32, intermediate_size=64, out_hidden_size=64, num_position_embeddings=64,
             **{} if "3_5" in kind else dict(deepstack_visual_indexes=[0, 1]))
    named = {f"{name}_token_id": ids(word) for name, word in dict(
        image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **named)


def smol_tokenizer():
    "The embedded base's tokenizer with SmolVLM's special words and chat"
    from vlm_tutor.tiny import build_tokenizer
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(dict(additional_special_tokens=TILE_TOKENS, eos_token="<end_of_utterance>"))
    tokenizer.chat_template = SMOL_CHAT
    return tokenizer


def smol_config(tokenizer, kind="smolvlm"):
    "A small SmolVLM or Idefics3: tiles of 32 pixels, patches of 8, four tokens a tile"
    from transformers import AutoConfig
    rows, ids = -(-len(tokenizer)//32)*32, tokenizer.convert_tokens_to_ids
    text = dict(SIZES, model_type="llama", vocab_size=rows, bos_token_id=None, eos_token_id=ids("<end_of_utterance>"),
                pad_token_id=ids("<|endoftext|>"), max_position_embeddings=4096)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                  patch_size=8)
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, scale_factor=2,
                                image_token_id=ids("<image>"), tie_word_embeddings=False)


def parts(kind):
    "Processor and configuration of a small model"
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from vlm_tutor.tiny import TilesProcessor, build_processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    tiles = dict(smolvlm=SmolVLMImageProcessorPil, idefics3=Idefics3ImageProcessorPil)
    if kind not in tiles:
        processor = build_processor()
        return processor, qwen_config(kind, processor.tokenizer)
    tokenizer = smol_tokenizer()
    images = tiles[kind](size=dict(longest_edge=128), max_image_size=dict(longest_edge=32))
    return TilesProcessor(images, tokenizer, SMOL_CHAT, 4), smol_config(tokenizer, kind)


def build(kind, folder, seed=0):
    "Write a small model of a family; its head is loud enough to be learned from"
    import torch
    from transformers import AutoModelForImageTextToText
    torch.manual_seed(seed)
    processor, config = parts(kind)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1: p.mul_(5 if "lm_head" in name or "embed_tokens" in name else 2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in folder.glob("*config.json"):
        said = json.loads(file.read_text())
        if "processor_class" in said: file.write_text(json.dumps(said | dict(processor_class="")))
    return folder
