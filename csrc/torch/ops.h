// The operators, one function each for all devices; schemas and registration are in register.cpp.
#pragma once

#include <tuple>

#include "torch/tensors.h"

namespace nsa::binding {

using Tensor2 = std::tuple<Tensor, Tensor>;
using Tensor3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensor4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensor6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor compress_pool_fwd(Tensor x, OptTensor weight, OptTensor pos, OptTensor cu_seqlens,
                         int64_t max_seqlen, int64_t block_size, int64_t block_stride);
Tensor3 compress_pool_bwd(Tensor dout, Tensor x, OptTensor weight, OptTensor pos,
                          OptTensor cu_seqlens, int64_t max_seqlen, int64_t block_size,
                          int64_t block_stride);
Tensor compress_mlp_fwd(Tensor x, OptTensor pos, Tensor w1, OptTensor b1, OptTensor w2,
                        OptTensor b2, OptTensor cu_seqlens, int64_t max_seqlen, int64_t block_size,
                        int64_t block_stride);
Tensor6 compress_mlp_bwd(Tensor dout, Tensor x, OptTensor pos, Tensor w1, OptTensor b1,
                         OptTensor w2, OptTensor b2, OptTensor cu_seqlens, int64_t max_seqlen,
                         int64_t block_size, int64_t block_stride);

Tensor3 compressed_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, OptTensor cu_seqlens_q,
                            OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                            std::vector<int64_t> config, double softmax_scale, bool deterministic);
Tensor3 compressed_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor out,
                            Tensor lse, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                            int64_t max_seqlen_q, int64_t max_seqlen_k, std::vector<int64_t> config,
                            double softmax_scale, bool deterministic);
Tensor select_blocks(Tensor q, Tensor k_cmp, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, std::vector<int64_t> config,
                     double softmax_scale);
Tensor2 selected_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor block_indices,
                          OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                          int64_t max_seqlen_k, int64_t select_size, double softmax_scale,
                          bool deterministic);
Tensor3 selected_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                          Tensor block_indices, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                          int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t select_size,
                          double softmax_scale, bool deterministic);
Tensor2 window_attn_fwd(Tensor q, Tensor k, Tensor v, OptTensor cu_seqlens_q,
                        OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                        int64_t window, double softmax_scale, bool deterministic);
Tensor3 window_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                        OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, int64_t window, double softmax_scale,
                        bool deterministic);
Tensor4 sparse_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc,
                        OptTensor k_win, OptTensor v_win, Tensor gates, OptTensor cu_seqlens_q,
                        OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                        std::vector<int64_t> config, double softmax_scale, bool save_branches,
                        bool deterministic);
Tensor8 sparse_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc,
                        Tensor v_slc, OptTensor k_win, OptTensor v_win, Tensor gates,
                        Tensor branch_out, Tensor branch_lse, Tensor block_indices,
                        OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, std::vector<int64_t> config, double softmax_scale,
                        bool deterministic);

Tensor3 cache_gather(Tensor k, Tensor v, Tensor tail_k, Tensor tail_v, Tensor state,
                     OptTensor counts, OptTensor block_table, int64_t num_pages,
                     std::vector<int64_t> config);
void cache_append(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                  OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                  Tensor tail_v, Tensor steps, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                  Tensor k_raw, Tensor v_raw, Tensor k_cmp, Tensor v_cmp, OptTensor block_table,
                  OptTensor rope_inv_freq, std::vector<int64_t> config);
#ifdef NSA_EXT_WITH_CUDA
void cache_store_mlp(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                     OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                     Tensor tail_v, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                     Tensor k_raw, Tensor v_raw, OptTensor counts, OptTensor block_table,
                     OptTensor rope_inv_freq, std::vector<int64_t> config, OptTensor k_pos,
                     Tensor k_w1, OptTensor k_b1, OptTensor k_w2, OptTensor k_b2, OptTensor v_pos,
                     Tensor v_w1, OptTensor v_b1, OptTensor v_w2, OptTensor v_b2);
void cache_store_pool(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                      OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                      Tensor tail_v, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                      Tensor k_raw, Tensor v_raw, OptTensor counts, OptTensor block_table,
                      OptTensor rope_inv_freq, std::vector<int64_t> config, OptTensor k_weight,
                      OptTensor k_pos, OptTensor v_weight, OptTensor v_pos);
#endif
Tensor2 decode_fwd(Tensor q, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor k_pages, Tensor v_pages,
                   OptTensor k_win_pages, OptTensor v_win_pages, Tensor gates, Tensor seqlens,
                   OptTensor block_table, std::vector<int64_t> config, double softmax_scale);
int64_t max_decode_rows();

}  // namespace nsa::binding
