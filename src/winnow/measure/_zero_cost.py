"""Operators that count as no multiply-adds: they move, compare, normalise or sum, with no product over a shared axis.

The convention of torch.utils.flop_counter and fvcore; here it is a list, so that an operator outside it is an error.
"""

from __future__ import annotations

from typing import Any

import torch

GROUPS = {
    "made from nothing": """
        arange empty empty_like empty_permuted empty_strided eye full full_like hann_window linspace logspace
        new_empty new_empty_strided new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices triu_indices
        zeros zeros_like
    """,
    "random": """
        bernoulli cauchy exponential geometric log_normal multinomial native_dropout normal normal_functional poisson
        rand rand_like randint randint_like randn randn_like random randperm uniform rrelu_with_noise
    """,
    "copies and changes of shape or place": """
        _pin_memory _reshape_copy _resize_output _to_copy _unsafe_view block_diag cat channel_shuffle col2im
        constant_pad_nd copy copy_ diag_embed fill flip im2col lift lift_fresh lift_fresh_copy masked_fill _chunk_cat
        pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave
        replication_pad1d replication_pad2d replication_pad3d resize resize_as roll rot90 set stack tril triu zero
        alias_copy as_strided_copy as_strided_scatter diagonal_copy diagonal_scatter expand_copy narrow_copy
        permute_copy select_scatter slice_scatter split_with_sizes_copy squeeze squeeze_copy t transpose t_copy
        transpose_copy unbind_copy unfold_copy unsqueeze unsqueeze_copy view_copy unsafe_split unsafe_split_with_sizes
        as_strided
    """,
    "lookups, sorting, counting": """
        _embedding_bag _embedding_bag_forward_only _unique _unique2 _unsafe_index _unsafe_index_put
        _unsafe_masked_index _unsafe_masked_index_put_accumulate argsort bincount bucketize embedding gather histc
        index index_add index_copy index_fill index_put _index_put_impl index_reduce index_select isin kthvalue
        masked_scatter masked_select nonzero nonzero_static put scatter scatter_add scatter_reduce searchsorted
        segment_reduce sort take topk unique_consecutive unique_dim
    """,
    "reductions and running sums": """
        all allclose amax amin aminmax any argmax argmin count_nonzero cummax cummin _cummax_helper _cummin_helper
        cumprod cumsum dist equal linalg_vector_norm logcumsumexp _logcumsumexp logsumexp max mean median min mode
        nanmedian nansum norm prod renorm std std_mean sum trace var var_mean
    """,
    "normalisation, softmax, activations and losses that are not tagged as pointwise": """
        _batch_norm_no_update _batch_norm_with_update _fused_rms_norm _log_softmax _native_batch_norm_legit
        _native_batch_norm_legit_no_training _prelu_kernel _safe_softmax _softmax _weight_norm_interface
        batch_norm_elemt binary_cross_entropy binary_cross_entropy_with_logits cudnn_batch_norm gelu glu hardswish
        log_sigmoid_forward miopen_batch_norm mse_loss huber_loss native_batch_norm native_group_norm
        native_layer_norm nll_loss_forward nll_loss2d_forward smooth_l1_loss softplus
    """,
    "elementwise that are not tagged as pointwise": """
        __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __lshift__ __rshift__ __ilshift__ __irshift__ _add_relu
        addr _conj_physical complex floor_divide linalg_cross polar threshold _foreach_add _foreach_copy _foreach_mul
        _foreach_norm
    """,
    "pooling and interpolation": """
        _adaptive_avg_pool2d _adaptive_avg_pool3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
        _upsample_lanczos2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        adaptive_max_pool2d adaptive_max_pool3d affine_grid_generator avg_pool2d avg_pool3d grid_sampler_2d
        grid_sampler_3d _grid_sampler_2d_cpu_fallback max_pool2d_with_indices max_pool3d_with_indices max_unpool2d
        upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_trilinear3d
    """,
    "questions to a tensor": """
        _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _functional_sym_constrain_range
        _is_all_true _is_any_true _local_scalar_dense is_pinned is_same_size item sym_constrain_range
        sym_constrain_range_for_size
    """,
}
ZERO_COST = frozenset(name for group in GROUPS.values() for name in group.split())


def is_zero_cost(func: Any) -> bool:
    """True for views, for operators torch tags as pointwise, and for those on the list (in-place forms included)."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return False
    space, name = schema.name.split("::")
    if space == "prim":
        return name in ("device", "layout")
    if space != "aten":
        return False
    base = name if name.startswith("__") else name.removesuffix("_")
    return base in ZERO_COST or func.is_view or _pointwise(name) or _pointwise(base)


def _pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
