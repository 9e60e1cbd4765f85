"""A new LLaVA: a vision tower and a language model, each with its weights, and a projector drawn from a seed between them.

Liu et al., "Visual Instruction Tuning", 2023. Towers are Hugging Face's, or open_clip's (trained here) under their names.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ._hf_model import no_bars
from .models import load_model, one_line, quiet, reachable_hub

LAYERS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
          "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
"""Parts of a block in open_clip and in Hugging Face's CLIP."""
FLAT = (
    "{% set flat = namespace(messages=[]) %}{% for message in messages %}{% set said = namespace(text='') %}"
    "{% for part in message['content'] if message['content'] is not string %}"
    "{% set said.text = said.text + ('<image>\n' if part['type'] == 'image' else part['text']) %}{% endfor %}"
    "{% set text = message['content'] if message['content'] is string else said.text %}"
    "{% set flat.messages = flat.messages + [{'role': message['role'], 'content': text}] %}{% endfor %}"
    "{% set messages = flat.messages %}"
)
"""In front of a language model's chat template, which takes words alone: images stand among them."""
PROJECTORS = ("mlp", "linear", "downsample")


def new_llava(
    llm: str, vision: str, *, weights: Path | None = None, projector: str = "mlp", layer: int = -2, seed: int = 0
) -> tuple[Any, Any]:
    """(processor, model in float32) of `hf:LANGUAGE_MODEL` and a tower, `hf:ID_OR_PATH` or `open_clip:NAME[/TAG]`.

    weights: the open_clip tower's. projector: one of PROJECTORS; layer: the hidden state it reads.
    """
    host, _, name = llm.partition(":")
    if host != "hf" or not name:
        raise ValueError(f"{llm}: a language model is written hf:ID_OR_PATH, as in hf:lmsys/vicuna-7b-v1.5")
    tower, image = open_clip_tower(vision, weights) if vision.startswith("open_clip:") else _hf_tower(vision)
    with quiet(), no_bars(transformers), reachable_hub():
        tokenizer = one_line(llm, "has no tokenizer that can be read", lambda: transformers.AutoTokenizer.from_pretrained(
            name, extra_special_tokens={"image_token": "<image>"}))  # fmt: skip
        text = one_line(llm, "cannot be loaded", lambda: transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32))  # fmt: skip
    if text.get_input_embeddings().num_embeddings < len(tokenizer):
        text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    cls = hasattr(tower.embeddings, "class_embedding") or hasattr(tower.embeddings, "cls_token")
    model = _joined(tower, text, tokenizer.convert_tokens_to_ids("<image>"), projector, layer, cls)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for part in model.model.multi_modal_projector.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    processor = transformers.LlavaProcessor(
        image, tokenizer, patch_size=tower.config.patch_size, num_additional_image_tokens=int(cls),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        chat_template=FLAT + tokenizer.chat_template if tokenizer.chat_template else None,
    )  # fmt: skip
    return counting(processor, model), model.eval()


def counting(processor: Any, model: Any) -> Any:
    """The processor, with a patch size by which it counts the placeholders that the projector fills."""
    if getattr(model.config, "projector", None) == "downsample":
        vision = model.config.vision_config
        processor.patch_size = vision.image_size // -(-(vision.image_size // vision.patch_size) // 2)
    return processor


def resized(processor: Any, model: Any, size: int) -> None:
    """Let the tower see images of `size` pixels: its positions are resampled once (bicubic), the processor follows."""
    tower = model.model.vision_tower
    embed, config = tower.embeddings, tower.config
    if size % config.patch_size or not isinstance(getattr(embed, "position_embedding", None), nn.Embedding):
        raise ValueError(
            f"image size {size}: give a multiple of the patch, {config.patch_size} pixels, and a CLIP or SigLIP tower"
        )
    old = embed.position_embedding.weight
    first, grid = old[: len(old) - embed.num_patches], old[len(old) - embed.num_patches :]
    side, new = math.isqrt(len(grid)), size // config.patch_size
    if side != new:
        planes = grid.detach().T.reshape(1, -1, side, side)
        planes = F.interpolate(planes, (new, new), mode="bicubic", align_corners=False)[0].flatten(1).T
        embed.position_embedding = nn.Embedding.from_pretrained(torch.cat([first.detach(), planes]), freeze=False)
        embed.position_ids = torch.arange(len(embed.position_embedding.weight))[None]
        embed.num_patches, embed.num_positions = new * new, len(embed.position_embedding.weight)
    embed.image_size = config.image_size = model.config.vision_config.image_size = size
    maker = processor.image_processor
    maker.size = {"shortest_edge": size} if "shortest_edge" in dict(maker.size) else {"height": size, "width": size}
    maker.crop_size = {"height": size, "width": size}
    counting(processor, model)


def open_clip_tower(spec: str, weights: Path | None) -> tuple[nn.Module, Any]:
    """An open_clip tower as Hugging Face's CLIPVisionModel with the image processor that belongs to it."""
    # the reducer's weights are filled in once the model is reduced
    loaded = load_model(spec, weights=weights, bare=True)
    visual: Any = loaded.model
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    if blocks is None:
        raise ValueError(f"{spec} has another kind of tower: open_clip's own VisionTransformer works, as in ViT-B-32")
    quick = type(blocks[0].mlp.gelu).__name__ == "QuickGELU"
    config = transformers.CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels, intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks), num_attention_heads=blocks[0].attn.num_heads, image_size=loaded.size[0],
        patch_size=visual.conv1.kernel_size[0], hidden_act="quick_gelu" if quick else "gelu",
    )  # fmt: skip
    tower = transformers.CLIPVisionModel(config)
    tower.load_state_dict(dict(_renamed(visual.state_dict())))
    edge, side = loaded.size
    maker = transformers.CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": side},
        image_mean=list(loaded.mean), image_std=list(loaded.std),
    )  # fmt: skip
    return tower.eval(), maker


def _renamed(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """open_clip's names as Hugging Face's; queries, keys and values apart."""
    ends = {"class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight"}  # fmt: skip
    found = [(ends[key], value) for key, value in state.items() if key in ends]
    for key, value in state.items():
        kind = key.rpartition(".")[2]
        if key.startswith(("ln_pre.", "ln_post.")):
            found.append((f"{'pre_layrnorm' if 'pre' in key else 'post_layernorm'}.{kind}", value))
        elif key.startswith("transformer.resblocks."):
            _, _, index, part = key.split(".", 3)
            block = f"encoder.layers.{index}"
            if part.startswith("attn.in_proj_"):
                kind = part.removeprefix("attn.in_proj_")
                found += [(f"{block}.self_attn.{one}_proj.{kind}", rows) for one, rows in zip("qkv", value.chunk(3))]
            else:
                found.append((f"{block}.{LAYERS[part.rpartition('.')[0]]}.{kind}", value))
    return found


def _hf_tower(spec: str) -> tuple[nn.Module, Any]:
    folder = Path(spec.partition(":")[2]).expanduser().is_dir()
    tower = load_model(spec, pretrained=not folder).model
    with quiet(), no_bars(transformers), reachable_hub():
        return tower, transformers.AutoImageProcessor.from_pretrained(spec.partition(":")[2])


def _joined(tower: Any, text: Any, image: int, projector: str, layer: int, cls: bool) -> Any:
    """The three parts in one model; nothing of the size of a language model is drawn or copied."""
    from ._llava_projected import ProjectedConfig, ProjectedLlava

    words: dict[str, Any] = {
        "vision_config": tower.config, "text_config": text.config, "image_token_id": image, "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if cls else "full",
    }  # fmt: skip
    with torch.device("meta"):
        if projector == "mlp":
            model: Any = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**words))
        else:
            model = ProjectedLlava(ProjectedConfig(projector=projector, **words))
    model.model.multi_modal_projector.to_empty(device="cpu")
    model.model.vision_tower, model.model.language_model = tower, text.get_decoder()
    model.lm_head = text.get_output_embeddings()
    model.generation_config = text.generation_config
    return model
