"""What happens to the model: promised counts, protected prefix, honest MACs, refusal, and a restore to the bit.

Winnow's own.
"""

from __future__ import annotations

import torch

import winnow

from .._reduce import seat_of
from ..measure import count_macs
from ..measure._evaluating import output_of
from ..measure.closed_form import check_counted, closed_macs
from ..methods import Random
from .case import Case, close, ready


def restore_is_exact(case: Case) -> None:
    """Reducing adds only reducer.* keys; restoring gives the same outputs, keys and attributes, to the bit."""
    for cls in case.fits():
        model, images = case.plain(cls), case.images()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            plain = output_of(model(images))
            winnow.reduce(model, case.method)
            ready(winnow.reducer_of(model))
            model(images)
            more = set(model.state_dict()) - set(state)
            assert all(name.startswith("reducer.") for name in more), (
                f"reducing adds {sorted(more)[0]} to the state dict"
            )
            winnow.restore(model)
            assert torch.equal(output_of(model(images)), plain), "the restored model gives another output"
        after = {name: set(vars(module)) for name, module in model.named_modules()}
        changed = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
        assert not changed, f"something is left behind on {sorted(changed)[0] or 'the model'}"
        same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert same and set(model.state_dict()) == set(state), "a weight changed"


def nothing_removed_changes_nothing(case: Case) -> None:
    """With a reducer in place that removes nothing, the output is the plain model's."""
    for cls in case.fits():
        model, images = case.plain(cls), case.images()
        with torch.no_grad():
            plain = output_of(model(images))
            winnow.reduce(model, Random(keep=winnow.Keep(1.0), layers=(0,)))
            close(output_of(model(images)), plain, 1e-5, "with nothing removed")


def every_site_is_reached(case: Case) -> None:
    """One forward calls the reducer once at each of its sites, in order, and passes every block."""
    for cls in case.fits():
        model = case.model(cls)
        calls: list[int] = []
        reducer, setting = winnow.reducer_of(model), seat_of(model).setting
        hook = reducer.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[-1]))
        with torch.no_grad(), winnow.watch(model) as run:
            model(case.images())
        hook.remove()
        if case.facts.where != "input":
            wanted = list(case.method.sites(setting.depth))
            assert calls == wanted, f"the reducer was called at {calls}, its sites are {wanted}"
        passed = list(run.ledgers)
        assert passed == list(range(-1, setting.depth)), f"of {setting.depth} blocks, these were passed: {passed[1:]}"


def executed_tokens_are_promised(case: Case) -> None:
    """Tokens executed per block are those of `counts`, on every kind of model."""
    for cls in case.fits():
        model = case.model(cls)
        with torch.no_grad(), winnow.watch(model) as run:
            model(case.images())
        wanted = case.method.counts(seat_of(model).setting)
        assert len(run.counts) == len(wanted), f"{len(run.counts)} counts for {len(wanted) - 1} blocks"
        if case.facts.static:
            assert tuple(run.counts) == wanted, f"executed {run.counts}, promised {list(wanted)}"
        else:
            assert bool((run.valid_counts <= torch.tensor(wanted)).all()), "more tokens than promised"


def prefix_never_reaches_the_reducer(case: Case) -> None:
    """The ledger covers exactly the patches of the input: no class, distillation or register token."""
    for cls in case.fits():
        model = case.model(cls)
        with torch.no_grad(), winnow.watch(model) as run:
            model(case.images())
        patches, setting = run.ledger.owner.shape[1], seat_of(model).setting
        assert patches == setting.patches, (
            f"the ledger covers {patches} tokens, the image has {setting.patches} patches"
        )


def macs_equal_the_closed_form(case: Case) -> None:
    """The counter and the closed form agree, reducer included."""
    for cls in case.fits():
        model, images = case.model(cls).eval(), case.images(2)
        counted = count_macs(model, images)
        with torch.no_grad(), winnow.watch(model) as run:
            model(images)
        executed = torch.tensor([run.counts])
        closed = closed_macs(model, executed)
        assert closed is not None
        check_counted(counted, float(closed[0]), repr(case.method))


def spelling_round_trips(case: Case) -> None:
    """parse(repr(method)) is the method, and methods hash."""
    known = type(case.method) in winnow.METHODS
    text = repr(case.method)
    assert "object at" not in text and text.startswith(type(case.method).__name__), f"{text!r} is no spelling"
    if known:
        assert winnow.parse(text) == case.method, f"{text!r} reads back as {winnow.parse(text)!r}"
        assert hash(winnow.parse(text)) == hash(case.method), "equal methods hash differently"


def unfit_models_are_refused(case: Case) -> None:
    """Class attention without class token, layers that do not exist, a reduced or a foreign model: refused untouched."""
    shallow = case.plain()
    last = max(case.method.sites(case.depth), default=0)
    shallow.blocks = shallow.blocks[: max(1, last)]
    refused = [(torch.nn.Linear(3, 3), True), (case.model(), True)]
    refused += [(case.plain(cls=False), "cls_attention" in case.facts.needs)]
    if case.method.sites(1) == case.method.sites(2):  # layers are listed, not derived from the depth
        refused += [(shallow, last >= len(shallow.blocks))]
    for model, must in refused:
        before = set(vars(model))
        try:
            winnow.reduce(model, case.method)
        except (TypeError, ValueError) as error:
            assert must, f"refused without need: {error}"
            assert "\n" not in str(error) and len(str(error)) > 20, f"the refusal explains nothing: {error}"
            assert set(vars(model)) == before, "a refused model was touched"
        else:
            assert not must, f"{type(model).__name__} should have been refused"


CHECKS = (
    restore_is_exact,
    nothing_removed_changes_nothing,
    every_site_is_reached,
    executed_tokens_are_promised,
    prefix_never_reaches_the_reducer,
    macs_equal_the_closed_form,
    spelling_round_trips,
    unfit_models_are_refused,
)
