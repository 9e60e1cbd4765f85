"""Vision-language models: the parts a family's adapter names, and where methods act in them.

Winnow's own, on transformers 5. What happens when such a model is called is in _vlm_calls.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ._beside import TOKEN, among, beside, enter, leave
from ._columns import Columns
from ._decoder import decode
from ._host import Host, Patch
from ._run import Seat, Slot
from ._tower import look, project, reduced_features, spread
from ._vlm_calls import Moment, forward, generate, language
from .reducer import Facts, Reducer, Setting
from .ways import Way

INSIDE = ("block", "between", "input")
"""Where a method acts inside the tower."""
SIGNALS = frozenset("queries keys values cls_attention received".split())
DRAWN = frozenset({"noise", "training_noise", "padding"})


@dataclass(frozen=True)
class Vlm:
    """A vision-language model as its family's adapter sees it."""

    family: str
    model: nn.Module
    """What is called: `forward`, `generate`."""
    core: nn.Module
    """What puts image features among the embeddings: `get_placeholder_mask`."""
    llm: nn.Module
    """The language model without its head: `layers`, `rotary_emb`, `config`."""
    tower: Host | None = None
    """The vision tower as its own adapter sees it; None where nothing is known of it."""
    begin: Patch | None = None
    """Where the tower is entered with its images."""
    projector: nn.Module | None = None
    """What reads the tower's features; None where patches are merged before, and features are reduced as they come out."""
    made: int = 0
    """Block of the tower whose output the projector reads."""
    grids: Callable[..., list[tuple[int, int]] | int] | None = None
    """Without a projector: grids of the images, from the arguments of `get_image_features`; or features per tile."""
    in_place: bool = False
    """Something after the projector needs each token in the slot of its own patch."""
    mrope: bool = False
    """Positions are rows and columns of the image: kept, not renumbered."""
    more: tuple[Patch, ...] = ()
    follow: Callable[[dict[str, Any], Columns], dict[str, Any]] | None = None
    """What else the language model is given per column, for the columns that are left."""
    inside: str = ""
    """Why methods inside the tower cannot be served; "" where they can."""
    place: Callable[[nn.Module], Tensor] | None = None
    """[C] the position that the tower's embeddings (given) add to their last patch; None where there is none."""
    first: int = 1
    """First block of the language model before which image tokens may leave."""
    drops: bool = False
    """Features that are combined would lose what later blocks add to each of them."""


class VlmSeat(Seat):
    """The seat of a reducer in a vision-language model."""

    def __init__(self, vlm: Vlm, host: Host, reducer: Reducer, way: Way) -> None:
        super().__init__(host, reducer, way)
        self.vlm, self.now = vlm, Moment()
        self.still = False
        """Nothing that the tower makes of the image alone has a gradient; not of one moment, as blocks may be recomputed."""
        if "question" in self.facts.needs:
            config: Any = vlm.llm.config
            reducer.meet(config.hidden_size)
        early = [site for site in self.sites if self.facts.where == "llm" and site < vlm.first]
        if early:
            raise ValueError(
                f"{reducer.method}: {vlm.family} adds image features in its first blocks, so tokens may leave before "
                f"block {vlm.first} at the earliest"
            )
        if vlm.drops and self.facts.where == "tower" and self.facts.combine != "none":
            raise TypeError(
                f"{reducer.method} combines tokens, and {vlm.family} adds features to each of them in later blocks: "
                "methods that only drop work, such as Random(at='tower') or FastV"
            )


def host(vlm: Vlm) -> Host:
    """The host for methods inside the tower, which knows those for methods after it and in the language model."""
    for module in (vlm.model, vlm.core, vlm.llm, vlm.projector):
        if module is not None and "forward" in module.__dict__:
            raise TypeError(
                f"{type(module).__name__} has a replaced forward (spread over devices by accelerate?): "
                "load the model on one device, and reduce it before anything else wraps it"
            )
    elsewhere = dict.fromkeys(INSIDE, partial(_inside, vlm))
    elsewhere |= {"tower": partial(_after, vlm), "llm": partial(_llm, vlm)}
    if vlm.tower is None:
        return replace(_features(vlm), elsewhere=elsewhere, whole=partial(_whole, vlm))
    return replace(vlm.tower, family=vlm.family, elsewhere=elsewhere, whole=partial(_whole, vlm))


def _inside(vlm: Vlm, facts: Facts) -> Host:
    if vlm.inside or vlm.tower is None or vlm.projector is None:
        more = "" if vlm.tower is None else ", or expand=True, which saves in the tower alone"
        raise TypeError(
            f"{vlm.family} cannot be reduced inside its tower: {vlm.inside}. Works: a method at the tower or llm{more}"
        )
    patches = (*vlm.tower.patches, Patch(vlm.projector, "forward", project), *_doors(vlm))
    return replace(vlm.tower, family=vlm.family, patches=patches, seat=partial(VlmSeat, vlm))


def _whole(vlm: Vlm, facts: Facts) -> Host:
    """The host of methods that act inside the tower alone: the projector and all behind it are given every patch."""
    if facts.where not in INSIDE:
        raise TypeError(f'expand=True is for methods inside the tower; this one acts at "{facts.where}": leave it out')
    if vlm.tower is None or vlm.projector is None:
        raise TypeError(
            f"{vlm.family}: Winnow does not know the blocks of its tower, so nothing acts inside it; "
            "expand=True works with LLaVA, LLaVA-NeXT and LLaVA-OneVision"
        )
    if facts.combine == "none":
        raise TypeError(
            "expand=True gives each patch the token that holds it, and this method drops patches: ToMe() or EViT() work"
        )
    patches = (*vlm.tower.patches, Patch(vlm.projector, "forward", partial(spread, made=vlm.made)))
    return replace(vlm.tower, family=vlm.family, patches=patches)


def _after(vlm: Vlm, facts: Facts) -> Host:
    """The host of methods that act once, on what the projector is about to read."""
    if vlm.tower is None or vlm.projector is None or vlm.begin is None:
        return _features(vlm)
    setting, blocks = vlm.tower.setting, vlm.tower.blocks
    reads, gives = bool(facts.needs & SIGNALS), "cls" in facts.needs
    reader = vlm.made + facts.ahead
    lacks = "cls_attention" in facts.needs and not setting.cls  # which is refused with what would work
    if reads and reader >= len(blocks) and not lacks:
        raise ValueError(
            f"{vlm.family}: the features come out of the last block, so no block reads them next; "
            "use a method with ahead=0, such as Random(at='tower')"
        )
    gives_at = {vlm.made} if gives else set()
    reads_at = {reader} & set(range(len(blocks))) if reads else set()
    watched = [
        Patch(blocks[at], "forward", partial(look, reads=at in reads_at, gives=at in gives_at))
        for at in sorted(gives_at | reads_at)
    ]
    begin = vlm.begin
    if facts.needs & TOKEN:
        begin, watched = replace(begin, function=partial(enter, begin=begin.function)), _passed(vlm, facts)
    return Host(
        family=vlm.family,
        setting=Setting(1, setting.width, setting.heads, 0, setting.cls, setting.grid, setting.patch),
        blocks=blocks,
        views=(),
        patches=(begin, *watched, Patch(vlm.projector, "forward", project), *_doors(vlm)),
        accepts=frozenset({"tower"}),
        offers=(SIGNALS | TOKEN if vlm.tower.views else frozenset())
        | {"projected", "training_projected", "question"}
        | DRAWN
        | ({"cls"} if setting.cls else frozenset()),
        seat=partial(VlmSeat, vlm),
    )


def _passed(vlm: Vlm, facts: Facts) -> list[Patch]:
    """The blocks that a token of the reducer's own passes: every one up to that which the projector reads."""
    assert vlm.tower is not None
    blocks, views = vlm.tower.blocks[: vlm.made + 1], vlm.tower.views
    gives = [("cls" in facts.needs) and at == vlm.made for at in range(len(blocks))]
    if "token" in facts.needs:
        apart = [partial(beside, view=views[at], gives=gives[at]) for at in range(len(blocks))]
        after = [Patch(block, "forward", leave) for block in vlm.tower.blocks[vlm.made + 1 :][:1]]
        return [Patch(block, "forward", one) for block, one in zip(blocks, apart)] + after
    ends = {at: (facts.first and at == 0, facts.first and at == vlm.made) for at in (0, vlm.made)}
    return [
        Patch(blocks[at], "forward", partial(among, first=first, last=last, gives=gives[at]))
        for at, (first, last) in ends.items()
        if first or last or gives[at]
    ]


def _features(vlm: Vlm) -> Host:
    """The host of methods that act once, on the features that come out of a tower which merges patches itself."""
    config: Any = vlm.llm.config
    return Host(
        family=vlm.family,
        setting=Setting(1, config.hidden_size, 1, 0, False, None),
        blocks=tuple(vlm.llm.layers),  # type: ignore[arg-type]
        views=(),
        patches=(Patch(vlm.core, "get_image_features", reduced_features, signed=True), *_doors(vlm)),
        accepts=frozenset({"tower"}),
        offers=DRAWN | {"projected"},
        seat=partial(VlmSeat, vlm),
    )


def _llm(vlm: Vlm, facts: Facts) -> Host:
    """The host of methods that act before blocks of the language model."""
    config: Any = vlm.llm.config
    layers = tuple(vlm.llm.layers)  # type: ignore[arg-type]
    if getattr(config, "sliding_window", None) and any("sliding" in kind for kind in config.layer_types or ()):
        raise TypeError(
            f"{vlm.family}: its sliding windows count columns, which pruning moves; use a method at the tower"
        )
    return Host(
        family=vlm.family,
        setting=Setting(len(layers), config.hidden_size, config.num_attention_heads, 0, False, None),
        blocks=layers,
        views=(),
        patches=(
            *(Patch(layer, "forward", partial(decode, index=index)) for index, layer in enumerate(layers)),
            *_doors(vlm),
        ),
        accepts=frozenset({"llm"}),
        offers=frozenset({"text_attention"}),
        seat=partial(VlmSeat, vlm),
    )


def _doors(vlm: Vlm) -> tuple[Patch, ...]:
    return (
        Patch(vlm.core, "get_placeholder_mask", _placeholders),
        Patch(vlm.llm, "forward", language),
        Patch(vlm.model, "forward", forward, signed=True),
        Patch(vlm.model, "generate", generate, signed=True),
        *vlm.more,
    )


def _placeholders(slot: Slot, *args: Any, **words: Any) -> Any:
    """The host's own mask of placeholders; asked exactly when image features are put among the embeddings."""
    seat: Any = slot.seat
    found = type(slot.module).get_placeholder_mask(slot.module, *args, **words)  # type: ignore[attr-defined]
    if "image_features" in words or len(args) > 2:
        seat.now.images = (found[0] if isinstance(found, tuple) else found)[..., 0]
    return found
