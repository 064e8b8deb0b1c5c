"""Text without padding: the groups, and the same features and gradients as with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import CLIP, ModelConfig, TextConfig, build_model, config_with, load_model_config, why_padding_counts
from models.layers import Groups
from models.unpadded import best_groups, plan_text

Build = Callable[[str | ModelConfig], CLIP]

START, END, CONTEXT = 49406, 49407, 77


def _model(context_length: int = CONTEXT, **text: object) -> CLIP:
    """A small model with texts as long as the published ones'."""
    raw = config_with(load_model_config("tiny-test"), context_length=context_length).to_dict()
    custom = {"custom_text": text.pop("custom_text", False)}
    torch.manual_seed(0)
    return build_model(ModelConfig.from_dict({**raw, **custom, "text_cfg": {**raw["text_cfg"], **text}}))


def _tokens(lengths: Sequence[int], context_length: int = CONTEXT, filler: int | None = 0) -> Tensor:
    """Rows of start, words, end and `filler`, random words for None; `lengths` with both marks in them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(1, START, (len(lengths), context_length), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, 0], tokens[row, length - 1] = START, END
        if filler is not None:
            tokens[row, length:] = filler
    return tokens


def _gradients(model: CLIP, tokens: Tensor, unpadded: bool) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    plan = model.text_tower.plan_text(tokens) if unpadded else None
    features = model.encode_text(tokens, normalize=True, plan=plan)
    weights = torch.linspace(-1, 1, features.numel()).view_as(features).roll(1, dims=-1)
    (features * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _assert_same_features(model: CLIP, tokens: Tensor) -> None:
    with torch.no_grad():
        plan = model.text_tower.plan_text(tokens)
        padded, unpadded = (model.encode_text(tokens, normalize=True, plan=p) for p in (None, plan))
        torch.testing.assert_close(unpadded, padded, rtol=0, atol=2e-6)


def _assert_same_gradients(model: CLIP, tokens: Tensor) -> None:
    want, got = _gradients(model, tokens, False), _gradients(model, tokens, True)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= 1e-5 * float(value.norm()), name


lengths_of_texts = st.lists(st.integers(2, CONTEXT), min_size=1, max_size=24)


@pytest.fixture(scope="module")
def model() -> CLIP:
    return _model()


# ---- groups


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), most=st.integers(1, 4), cost=st.integers(0, 20))
def test_groups_cost_no_more_than_any_other_way_to_cut(lengths: list[int], most: int, cost: int) -> None:
    def price(groups: Groups) -> int:
        return sum(rows * length + cost for rows, length in groups.shapes)

    def cut(at: Sequence[int]) -> Groups:
        parts = np.split(np.sort(lengths), at)
        return Groups(tuple((len(part), int(part[-1])) for part in parts))

    groups = best_groups(np.array(lengths), most, cost)
    assert 1 <= len(groups.shapes) <= most
    every = (at for n in range(min(most, len(lengths))) for at in combinations(range(1, len(lengths)), n))
    assert price(groups) == min(price(cut(at)) for at in every)


@given(lengths=lengths_of_texts)
def test_a_plan_holds_every_needed_token_once_and_finds_each_rows_end(lengths: list[int]) -> None:
    plan = plan_text(torch.tensor(lengths), CONTEXT)
    line = plan.index.tolist()
    assert len(set(line)) == len(line) == sum(rows * length for rows, length in plan.groups.shapes)
    needed = {row * CONTEXT + at for row, length in enumerate(lengths) for at in range(length)}
    assert needed <= set(line)
    ends = [row * CONTEXT + length - 1 for row, length in enumerate(lengths)]
    assert [line[place] for place in plan.pooled.tolist()] == ends


@given(lengths=lengths_of_texts)
def test_no_plan_has_more_tokens_than_the_padded_batch(lengths: list[int]) -> None:
    assert len(plan_text(torch.tensor(lengths), CONTEXT).index) <= len(lengths) * max(lengths)


def test_splitting_a_line_and_joining_it_changes_nothing() -> None:
    groups = Groups(((2, 3), (1, 4)))
    line = torch.randn(10, 5)
    assert [tuple(part.shape) for part in groups.split(line)] == [(2, 3, 5), (1, 4, 5)]
    assert torch.equal(groups.join(groups.split(line)), line)


# ---- the tower


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_texts)
def test_features_without_padding_are_those_with_it(model: CLIP, lengths: list[int]) -> None:
    _assert_same_features(model, _tokens(lengths))


@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_texts)
def test_every_gradient_without_padding_is_that_with_it(model: CLIP, lengths: list[int]) -> None:
    _assert_same_gradients(model, _tokens(lengths))


@pytest.mark.parametrize(
    "lengths",
    [[2] * 8, [CONTEXT] * 8, [2], [CONTEXT], [2, CONTEXT], list(range(2, CONTEXT + 1))],
    ids=["all empty", "all full", "one empty", "one full", "both ends", "every length"],
)
def test_the_ends_of_the_range_are_exact(model: CLIP, lengths: list[int]) -> None:
    tokens = _tokens(lengths)
    _assert_same_features(model, tokens)
    _assert_same_gradients(model, tokens)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 7, START, END]), min_size=12, max_size=12), min_size=1, max_size=8
    ),
    pool=st.sampled_from(["argmax", "eos", "first"]),
)
def test_any_ids_are_exact_whether_or_not_a_row_ends(rows: list[list[int]], pool: str) -> None:
    """No end, several ends, tokens behind the end: the row is cut where the padded tower pools."""
    _assert_same_features(_model(12, pool_type=pool, eos_id=2), torch.tensor(rows))


def test_words_behind_the_end_change_nothing(model: CLIP) -> None:
    lengths = [3, 9, 9, 30]
    silent, noisy = _tokens(lengths), _tokens(lengths, filler=None)
    plans = [model.text_tower.plan_text(tokens) for tokens in (silent, noisy)]
    assert torch.equal(*(model.encode_text(t, plan=p) for t, p in zip((silent, noisy), plans, strict=True)))


@pytest.mark.parametrize(
    "text", [{"custom_text": True}, {"proj_bias": True}, {"ls_init_value": 0.1}, {"pool_type": "first"}], ids=str
)
def test_towers_of_every_kind_are_exact(text: dict[str, object]) -> None:
    model = _model(**text)
    tokens = _tokens([2, 5, 11, 40, 77])
    _assert_same_features(model, tokens)
    _assert_same_gradients(model, tokens)


def test_positions_that_no_text_reaches_get_a_gradient_of_zero(model: CLIP) -> None:
    gradient = _gradients(model, _tokens([5, 9]), True)["positional_embedding"]
    assert gradient[:9].abs().sum(dim=1).all()
    assert not gradient[9:].any()


def test_recomputed_blocks_give_the_same_gradients(model: CLIP) -> None:
    tokens = _tokens([3, 3, 12, 50])
    want = _gradients(model, tokens, True)
    recomputing = _model()
    recomputing.set_grad_checkpointing()
    for name, value in _gradients(recomputing, tokens, True).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


def test_each_block_runs_once_whatever_the_lengths(model: CLIP) -> None:
    """Sharded parameters are gathered by every run of a block, on all ranks alike."""
    runs: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: runs.append(1)) for block in model.text_tower.transformer.blocks()]
    for lengths in ([2], [2, 30, 77] * 20):
        runs.clear()
        _gradients(model, _tokens(lengths), True)
        assert len(runs) == len(hooks)
    for hook in hooks:
        hook.remove()


def test_autocast_gives_unit_features_near_those_of_fp32(model: CLIP) -> None:
    tokens = _tokens([4, 8, 8, 60])
    plan = model.text_tower.plan_text(tokens)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        unpadded = model.encode_text(tokens, normalize=True, plan=plan)
        padded = model.encode_text(tokens, normalize=True)
    assert unpadded.dtype == torch.float32
    torch.testing.assert_close(unpadded, padded, rtol=0, atol=2e-2)


@pytest.mark.slow
def test_a_published_text_tower_is_exact(build: Build) -> None:
    model = build("ViT-B-32")
    tokens = _tokens([2, 77, *range(4, 30)])
    plan = model.text_tower.plan_text(tokens)
    with torch.no_grad():
        padded, unpadded = (model.encode_text(tokens, normalize=True, plan=p) for p in (None, plan))
    torch.testing.assert_close(unpadded, padded, rtol=0, atol=2e-6)
    _assert_same_gradients(model, tokens)


# ---- towers that need their padding


@pytest.mark.parametrize(
    ("text", "reason"),
    [({"no_causal_mask": True}, "no causal mask"), ({"pool_type": "last"}, "pools the last")],
    ids=["without mask", "last"],
)
def test_a_tower_in_which_padding_counts_makes_no_plan(text: dict[str, object], reason: str) -> None:
    model = _model(**text)
    assert not model.text_tower.ignores_padding
    with pytest.raises(ValueError, match=reason):
        model.text_tower.plan_text(_tokens([5, 9]))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50", "convnext_large_d_320", "ViT-bigG-14"])
def test_the_published_towers_of_clip_can_do_without_padding(name: str) -> None:
    assert why_padding_counts(load_model_config(name).text_cfg) is None


def test_siglips_tower_needs_its_padding() -> None:
    assert why_padding_counts(TextConfig(context_length=64, no_causal_mask=True, pool_type="last", proj_bias=True))
