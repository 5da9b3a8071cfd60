// ggml's FLASH_ATTN_EXT by our kernels; ggml-cpu/ops.cpp includes this file and tries sherry_attention_forward first.

#pragma once

#include "../isas.h"

#include <cstring>

static bool sherry_attention_type_of(enum ggml_type type, int & to) {
    switch (type) {
        case GGML_TYPE_F16:  to = SHERRY_ATTENTION_F16; return true;
        case GGML_TYPE_BF16: to = SHERRY_ATTENTION_BF16; return true;
        case GGML_TYPE_Q8_0: to = SHERRY_ATTENTION_Q8_0; return true;
        default:             return false;
    }
}

// Whether the operands fit each other as upstream's code asserts; a graph from the network may say anything.
static bool sherry_attention_fits(const ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    for (const ggml_tensor * x : { q, k, v, mask, sinks }) {
        if (x && (ggml_is_empty(x) || x->nb[0] != ggml_type_size(x->type))) {
            return false;
        }
    }
    return q->type == GGML_TYPE_F32 && q->ne[0] == k->ne[0] && k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] &&
           q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0 &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1])) &&
           (!sinks || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[2])) && dst->type == GGML_TYPE_F32 && dst->ne[0] == v->ne[0] &&
           dst->ne[1] == q->ne[2] && dst->ne[2] == q->ne[1] && dst->ne[3] == q->ne[3] && ggml_is_contiguous(dst);
}

// False, before anything is written, if upstream's code must do it.
static bool sherry_attention_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3], *sinks = dst->src[4];
    const sherry_attention_kernels * kernels = tq1_25_best_isa()->attention;
    sherry_attention a;
    if (params->use_ref || !kernels || !sherry_attention_fits(dst) || !sherry_attention_type_of(k->type, a.k_type) ||
        !sherry_attention_type_of(v->type, a.v_type)) {
        return false;
    }
    a.q = (const char *) q->data;
    a.k = (const char *) k->data;
    a.v = (const char *) v->data;
    a.mask = mask ? (const char *) mask->data : nullptr;
    a.sinks = sinks ? (const float *) sinks->data : nullptr;
    a.dst = (char *) dst->data;
    a.k_size = k->ne[0];
    a.v_size = v->ne[0];
    a.tokens = q->ne[1];
    a.keys = k->ne[1];
    a.heads = q->ne[2];
    a.kv_heads = k->ne[2];
    a.streams = q->ne[3];
    a.kv_streams = k->ne[3];
    a.mask_heads = mask ? mask->ne[2] : 1;
    a.mask_streams = mask ? mask->ne[3] : 1;
    for (int i = 0; i < 3; ++i) {
        a.q_stride[i] = (int64_t) q->nb[i + 1];
        a.k_stride[i] = (int64_t) k->nb[i + 1];
        a.v_stride[i] = (int64_t) v->nb[i + 1];
        a.mask_stride[i] = mask ? (int64_t) mask->nb[i + 1] : 0;
    }
    a.dst_stride = (int64_t) dst->nb[1];
    std::memcpy(&a.scale, dst->op_params, sizeof(float));
    std::memcpy(&a.max_bias, dst->op_params + 1, sizeof(float));
    std::memcpy(&a.softcap, dst->op_params + 2, sizeof(float));

    const int nth = params->nth, ith = params->ith;
    const size_t unaligned = (uintptr_t) params->wdata % 64, start = unaligned ? 64 - unaligned : 0;
    sherry_attention_plan plan;
    if (params->wsize < start || !sherry_attention_make_plan(&a, nth, (int64_t) ((params->wsize - start) / nth / 64 * 64), &plan)) {
        return false;
    }
    float * scratch = (float *) ((char *) params->wdata + start);
    if (!plan.tiles) {
        for (int64_t round = 0; round < plan.rounds; ++round) {
            sherry_attention_part(kernels, &a, &plan, round, ith, scratch);
            if (plan.key_parts > 1) {
                ggml_barrier(params->threadpool);
                sherry_attention_join(&a, &plan, round, ith, scratch);
                if (round + 1 < plan.rounds) {
                    ggml_barrier(params->threadpool);
                }
            }
        }
        return true;
    }
    const bool numa = ggml_is_numa(); // there, each thread has its items
    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);
    for (int64_t item = ith; item < plan.items; item = numa ? item + nth : ggml_threadpool_chunk_add(params->threadpool, 1)) {
        sherry_attention_tile(kernels, &a, &plan, item, scratch + ith * plan.scratch);
    }
    return true;
}
