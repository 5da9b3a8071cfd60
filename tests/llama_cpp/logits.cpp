// Logits of a text's first tokens, fed in batches of a size. usage: logits MODEL TEXT TOKENS BATCH THREADS REPACK OUT
// OUT: float32 (tokens, vocabulary). REPACK: 0 or 1, or "default" for what llama.cpp does unasked.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char ** argv) {
    if (argc != 8) {
        return 2;
    }
    if (!ggml_backend_reg_count()) {
        ggml_backend_load_all();  // a portable build's, beside this program
    }
    llama_model_params params = llama_model_default_params();
    if (strcmp(argv[6], "default")) {
        params.use_extra_bufts = atoi(argv[6]);
    }
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        return 1;
    }
    std::ifstream in(argv[2]);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const llama_vocab * vocab = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(text.size() + 8);
    const int found = llama_tokenize(vocab, text.data(), (int) text.size(), tokens.data(), (int) tokens.size(), true, false);
    const int count = std::min(found, atoi(argv[3])), batch = atoi(argv[4]);

    llama_context_params of_context = llama_context_default_params();
    of_context.n_ctx = of_context.n_batch = of_context.n_ubatch = (uint32_t) std::max(count, 64);
    of_context.n_threads = of_context.n_threads_batch = atoi(argv[5]);
    llama_context * context = llama_init_from_model(model, of_context);
    if (!context) {
        return 1;
    }
    FILE * out = fopen(argv[7], "wb");
    for (int at = 0; at < count; at += batch) {
        const int n = std::min(batch, count - at);
        llama_batch b = llama_batch_init(n, 0, 1);
        b.n_tokens = n;
        for (int i = 0; i < n; ++i) {
            b.token[i] = tokens[(size_t) (at + i)];
            b.pos[i] = at + i;
            b.n_seq_id[i] = 1;
            b.seq_id[i][0] = 0;
            b.logits[i] = 1;
        }
        if (llama_decode(context, b)) {
            return 1;
        }
        for (int i = 0; i < n; ++i) {
            fwrite(llama_get_logits_ith(context, i), sizeof(float), (size_t) llama_vocab_n_tokens(vocab), out);
        }
        llama_batch_free(b);
    }
    fclose(out);
    llama_free(context);
    llama_model_free(model);
    return 0;
}
