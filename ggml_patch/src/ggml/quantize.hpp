// What llama-quantize does for our types. src/llama-quant.cpp includes this file after its tensor categories.

#pragma once

#include "types.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

static bool tq1_25_is_ftype(llama_ftype ftype) {
    switch (ftype) {
        SHERRY_TYPES(SHERRY_FTYPE_CASE) return true;
        default: return false;
    }
}

// TQ1_25 becomes TQ1_25_64 if the rows are a multiple of 64 but not of 128.
static ggml_type tq1_25_type_for_rows(const ggml_tensor * tensor, ggml_type type) {
    const int64_t n = tensor->ne[0];
    return type == GGML_TYPE_TQ1_25 && n % QK_TQ1_25 && n % QK_TQ1_25_64 == 0 ? GGML_TYPE_TQ1_25_64 : type;
}

// With an importance matrix, weights were not trained for the type, so attn_v and the first eighth of ffn_down get more bits. Sets `type`,
// the tensor's new type, and llama-quant.cpp's `state`; returns false to leave the choice to upstream.
template <typename State> static bool tq1_25_mixed_type(State & state, llama_ftype ftype, tensor_category category, ggml_type & type) {
    if (!tq1_25_is_ftype(ftype) || !state.has_imatrix) {
        return false;
    }
    if (category_is_attn_v(category)) {
        const auto & hparams = state.model.hparams;
        type = hparams.n_gqa() >= 4 || hparams.n_expert >= 4 ? GGML_TYPE_Q4_K : GGML_TYPE_Q2_K;
        ++state.i_attention_wv;
    } else if (category == tensor_category::FFN_DOWN) {
        if (state.i_ffn_down++ < (state.n_ffn_down + 7) / 8) {
            type = GGML_TYPE_Q2_K;
        }
    }
    return true;
}

// One run of llama-quantize, for any type. Removes its output files unless it finishes.
class tq1_25_quantize_run {
    struct loss {
        const ggml_tensor * tensor;
        ggml_type type; // the new one
        double squared_error, squares; // of the rows that were measured
    };
    std::vector<loss> losses; // of the tensors that got one of our types
    std::vector<float> row;
    std::vector<std::filesystem::path> unfinished;

  public:
    // `tensors` know their target types; `ctx` has the new file's metadata, its file type under `key`.
    template <typename Tensors> tq1_25_quantize_run(const Tensors & tensors, gguf_context * ctx, const std::string & key) {
        const auto any = [&](ggml_type type) {
            return std::any_of(tensors.begin(), tensors.end(), [type](const auto & t) { return t.target_type == type; });
        };
        const int64_t at = gguf_find_key(ctx, key.c_str());
        if (at >= 0 && gguf_get_kv_type(ctx, at) == GGUF_TYPE_UINT32 && gguf_get_val_u32(ctx, at) == LLAMA_FTYPE_MOSTLY_TQ1_25 &&
            any(GGML_TYPE_TQ1_25_64) && !any(GGML_TYPE_TQ1_25)) {
            gguf_set_val_u32(ctx, key.c_str(), LLAMA_FTYPE_MOSTLY_TQ1_25_64);
        }
    }
    tq1_25_quantize_run(const tq1_25_quantize_run &) = delete;
    tq1_25_quantize_run & operator=(const tq1_25_quantize_run &) = delete;

    ~tq1_25_quantize_run() {
        for (const auto & path : unfinished) {
            std::error_code ignored;
            if (std::filesystem::is_regular_file(path, ignored)) { // not /dev/null
                std::filesystem::remove(std::filesystem::canonical(path, ignored), ignored);
            }
        }
    }

    // Types that flags choose have no fallback. Without this check the process would abort in the middle of the file.
    static void check_rows(const ggml_tensor * tensor, ggml_type type) {
        if (tensor->ne[0] % ggml_blck_size(type) != 0) {
            throw std::runtime_error(
                format("tensor '%s' has rows of %lld weights, not a multiple of %lld, the block size of %s: choose another type for it "
                       "(--token-embedding-type, --output-tensor-type, --tensor-type)",
                       tensor->name, (long long) tensor->ne[0], (long long) ggml_blck_size(type), ggml_type_name(type)));
        }
    }

    // Call when `file` is open for writing and empty.
    void opened(const std::string & file) { unfinished.emplace_back(file); }

    // Compares some of the `rows` rows x of a tensor with their quantized form q.
    void measure(const ggml_tensor * tensor, ggml_type type, const float * x, const void * q, int64_t rows) {
        if (!sherry_has_type(type)) {
            return;
        }
        if (losses.empty() || losses.back().tensor != tensor) {
            losses.push_back({ tensor, type, 0.0, 0.0 });
        }
        const int64_t n = tensor->ne[0];
        const int64_t step = std::max<int64_t>(1, rows / 16); // a trained matrix is ternary in every row
        row.resize(n);
        for (int64_t i = 0; i < rows; i += step) {
            ggml_get_type_traits(type)->to_float((const char *) q + i * ggml_row_size(type, n), row.data(), n);
            for (int64_t k = 0; k < n; ++k) {
                const double value = x[i * n + k], error = row[k] - value;
                losses.back().squares += value * value;
                losses.back().squared_error += error * error;
            }
        }
    }

    // Call when everything is written.
    void finished() {
        unfinished.clear();
        const loss * first = nullptr;
        size_t count = 0;
        for (const loss & l : losses) {
            // If the weights were ternary, only the scale's rounding to fp16 is lost, less than a millionth. Two groups of 64 under one
            // scale lose about half a hundredth, other weights a tenth or more.
            if (l.squared_error > 1e-5 * l.squares) {
                first = first ? first : &l;
                ++count;
            }
        }
        if (first) {
            LLAMA_LOG_WARN(
                "WARNING: %zu of %zu tensors were not 3:4 sparse ternary in the groups of their new type, such as %s "
                "(relative error %.2g): %sexpect noise unless the model was trained with Sherry. "
                "An ordinary model loses less if sherry-gguf calibrate prepares its Hugging Face directory first\n",
                count, losses.size(), first->tensor->name, std::sqrt(first->squared_error / first->squares),
                first->type == GGML_TYPE_TQ1_25 ? "if the model was trained in groups of 64, quantize it to TQ1_25_64; otherwise " : "");
        }
    }
};
