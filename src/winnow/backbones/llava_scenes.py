"""llava_scenes: a small LLaVA for the built-in scenes: a ViT of Winnow's own, a projector, a LLaMA, and a handful of words.

Liu et al., "Visual Instruction Tuning", NeurIPS 2023, in small; transformers' LlavaForConditionalGeneration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..data.scenes import COLOURS, SHAPES
from .vit_scenes import ARCHITECTURE, MEAN

STORED = Path(__file__).with_name("llava_scenes.hf")
"""The trained model and its processor, as `save_pretrained` leaves them: `hf:scenes`."""
DEPTH = 6
"""Blocks of the ViT that make the tower."""
TEXT = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "initializer_range": 0.1
}  # fmt: skip
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (*SPECIAL, *"USER ASSISTANT what colour is the a ? ,".split(), *SHAPES, *COLOURS)
TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'].upper() }} "
    "{% if message['content'] is string %}{% set parts = [{'type': 'text', 'text': message['content']}] %}"
    "{% else %}{% set parts = message['content'] %}{% endif %}"
    "{% for part in parts if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in parts if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] }} </s> {% endgeneration %}"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


def llava_scenes(vit: VisionTransformer | None = None) -> Any:
    """LlavaForConditionalGeneration with random weights from the global generator; the tower's are those of `vit`."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

    width, side = ARCHITECTURE["embed_dim"], ARCHITECTURE["img_size"]
    special = {f"{name}_token_id": WORDS.index(word) for name, word in zip(("pad", "bos", "eos"), SPECIAL)}
    tower = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=DEPTH, image_size=side,
        num_attention_heads=ARCHITECTURE["num_heads"], patch_size=ARCHITECTURE["patch_size"], layer_norm_eps=1e-6,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, image_token_id=WORDS.index("<image>"), vision_feature_layer=-2,
        text_config=LlamaConfig(**TEXT, vocab_size=len(WORDS), max_position_embeddings=512, **special),
        image_seq_length=(side // ARCHITECTURE["patch_size"]) ** 2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.update(**special)
    if vit is not None:
        fill(model.model.vision_tower, vit)
    return model


def fill(tower: Any, vit: VisionTransformer) -> None:
    """Give a transformers ViTModel the first blocks of a timm ViT; its pooler, which nothing reads, stays."""
    own = dict(tower.state_dict())
    for name, value in vit.state_dict().items():
        own |= _renamed(name, value, len(tower.layers))
    tower.load_state_dict(own)


def _renamed(name: str, value: Tensor, depth: int) -> dict[str, Tensor]:
    """A timm weight under the names transformers gives it; none for the head and for blocks beyond `depth`."""
    plain = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    part, _, rest = name.partition(".")
    if name in plain:
        return {plain[name]: value}
    if part == "patch_embed":
        return {f"embeddings.patch_embeddings.projection.{rest.removeprefix('proj.')}": value}
    if part == "norm":
        return {f"layernorm.{rest}": value}
    if part != "blocks" or int(rest.partition(".")[0]) >= depth:
        return {}
    at, _, rest = rest.partition(".")
    layer, kind = f"layers.{at}.", rest.rpartition(".")[2]
    if rest.startswith("attn.qkv."):
        return {f"{layer}attention.{one}_proj.{kind}": third for one, third in zip("qkv", value.chunk(3))}
    for ours, theirs in (
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.o_proj"),
    ):
        rest = rest.replace(f"{ours}.", f"{theirs}.")
    return {layer + rest: value}


def words() -> Any:
    """LlavaProcessor: scenes as vit_scenes takes them, a token per word, USER and ASSISTANT in turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    side = ARCHITECTURE["img_size"]
    known = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512, padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=[MEAN] * 3, image_std=[MEAN] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        images, tokenizer, patch_size=ARCHITECTURE["patch_size"], vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def save(model: nn.Module, processor: Any, folder: Path) -> None:
    """`save_pretrained` of both, weights in half precision; they are read as float32."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
