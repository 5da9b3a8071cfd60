"""Log-probabilities of tokens by llama.cpp's C interface, for a process of its own, since llama.cpp ends the process on some errors.

Imports only what that process needs.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cffi
import numpy as np

from .errors import CheckFailed
from .llama_vocabulary import Text, Vocabulary

BATCH = 512  # tokens that one llama_decode computes
SEQUENCES = 64  # sequences in the cache at a time
LOGITS = 128 << 20  # bytes of logits that one llama_decode returns, at most


class Tree:
    """Token sequences as a tree: what several sequences begin with is computed once.

    Sequences must be added in lexicographic order. A node is a token at a position; parents come before their children, which is the
    order that llama_decode needs. share: False keeps the sequences apart.
    """

    def __init__(self, share: bool = True) -> None:
        self._share = share
        self.tokens: list[int] = []  # by node
        self.positions: list[int] = []
        self.sequences: list[list[int]] = []  # which sequences the node belongs to
        self.targets: dict[int, list[tuple[int, int]]] = {}  # by node: (request, token that follows it)
        self.count = 0  # sequences
        self._path: list[int] = []  # the last sequence's nodes

    def _shared(self, tokens: Sequence[int]) -> int:
        """How many tokens the last sequence begins with too."""
        if not self._share:
            return 0
        pairs = enumerate(zip(self._path, tokens))
        return next((i for i, (node, token) in pairs if self.tokens[node] != token), min(len(self._path), len(tokens)))

    def nodes_with(self, tokens: Sequence[int]) -> int:
        """How many nodes the tree would have with another sequence."""
        return len(self.tokens) + len(tokens) - self._shared(tokens)

    def add(self, request: int, tokens: Sequence[int], scored: int) -> None:
        """Add a request: the last `scored` of its tokens are to be predicted. The last token is no node: nothing follows it."""
        body = tokens[:-1]
        path = self._path[: self._shared(body)]
        for position in range(len(path), len(body)):
            path.append(len(self.tokens))
            self.tokens.append(body[position])
            self.positions.append(position)
            self.sequences.append([])
        for node in path:
            self.sequences[node].append(self.count)
        for position in range(len(tokens) - scored, len(tokens)):
            self.targets.setdefault(path[position - 1], []).append((request, tokens[position]))
        self._path, self.count = path, self.count + 1

    def batches(self, most: int, outputs: int) -> Iterator[range]:
        """The nodes in order, at most `most` at a time with at most `outputs` of them followed by a token to predict."""
        start, wanted = 0, 0
        for node in range(len(self.tokens)):
            more = node in self.targets
            if node - start == most or wanted + more > outputs:
                yield range(start, node)
                start, wanted = node, 0
            wanted += more
        if start < len(self.tokens):
            yield range(start, len(self.tokens))


class Scorer(Vocabulary):
    """A GGUF in memory that gives log-probabilities.

    Args:
        gguf, header, library: paths of the model, llama.h and its library.
        ggml: path of libggml, and `backends` the directory of its backends if they are separate files.
        length: most tokens of a request, limited to the model's training length.
        threads: CPU threads.
        exact: compute attention in float32. By default it is llama.cpp's, with fp16 keys and values.

    Raises CheckFailed if llama.cpp refuses the model.
    """

    _structs = (*Vocabulary._structs, "llama_context_params", "llama_batch")
    _functions = Vocabulary._functions + """
    typedef struct llama_memory_i * llama_memory_t;
    struct llama_context_params llama_context_default_params(void);
    struct llama_context * llama_init_from_model(struct llama_model *, struct llama_context_params);
    void llama_free(struct llama_context *);
    bool llama_model_is_recurrent(const struct llama_model *);
    bool llama_model_is_hybrid(const struct llama_model *);
    int32_t llama_model_meta_val_str(const struct llama_model *, const char *, char *, size_t);
    int32_t llama_vocab_n_tokens(const struct llama_vocab *);
    int32_t llama_vocab_bos(const struct llama_vocab *);
    int32_t llama_vocab_eos(const struct llama_vocab *);
    int32_t llama_token_to_piece(const struct llama_vocab *, int32_t, char *, int32_t, int32_t, bool);
    llama_memory_t llama_get_memory(const struct llama_context *);
    void llama_memory_clear(llama_memory_t, bool);
    int32_t llama_decode(struct llama_context *, struct llama_batch);
    float * llama_get_logits(struct llama_context *);
    """  # fmt: skip

    def __init__(self, gguf: str, header: str, library: str, ggml: str, backends: str, length: int, threads: int, weights: bool = True,
                 exact: bool = False):  # fmt: skip
        _load_backends(ggml, backends)
        super().__init__(gguf, header, library, weights=weights)
        ffi, lib = self._ffi, self._lib
        self.vocabulary = lib.llama_vocab_n_tokens(self._vocab)
        self.trained = int(self._metadata(f"{self._metadata('general.architecture')}.context_length"))
        self.length = min(length, self.trained)
        # A recurrent state belongs to one sequence.
        self._share = not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))
        self._context = ffi.NULL
        if not weights:
            return
        params = lib.llama_context_default_params()
        self._outputs = max(SEQUENCES, min(BATCH, LOGITS // (4 * self.vocabulary)))
        params.n_ctx = self._cells = max(2 * self.length, BATCH)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max, params.n_outputs_max = SEQUENCES, self._outputs
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = params.kv_unified = True
        if exact:
            params.type_k = params.type_v = 0  # GGML_TYPE_F32
            params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = lib.llama_init_from_model(self._model, params)
        if self._context == ffi.NULL:
            raise CheckFailed(f"llama.cpp cannot run the model: {self._why()}")

    def close(self) -> None:
        self._lib.llama_free(self._context)
        super().close()

    def _metadata(self, key: str) -> str:
        """A value of the file's metadata as text. Raises CheckFailed if there is none."""
        value = self._ffi.new("char[]", 256)
        if self._lib.llama_model_meta_val_str(self._model, key.encode(), value, 256) < 0:
            raise CheckFailed(f"the file has no {key}")
        return self._ffi.string(value).decode(errors="replace")

    def special(self) -> dict[str, Any]:
        """The ids of BOS and EOS, or None: "bos", "eos"; their text, or "": "bos_text", "eos_text"."""
        found: dict[str, Any] = {}
        for name in "bos", "eos":
            token = getattr(self._lib, f"llama_vocab_{name}")(self._vocab)
            buffer = self._ffi.new("char[]", 256)
            size = self._lib.llama_token_to_piece(self._vocab, token, buffer, 256, 0, True) if token >= 0 else 0
            found[name] = token if token >= 0 else None
            found[f"{name}_text"] = self._ffi.buffer(buffer, max(size, 0))[:].decode(errors="replace")
        return found

    def score(self, requests: Sequence[tuple[Sequence[int], int]]) -> Iterator[list[tuple[int, float, bool]]]:
        """Score the last tokens of each request.

        requests: token ids, and how many of them to score, less than all.

        Yields the requests in an order of its own, several at a time: the request's number, the sum of its tokens' log-probabilities in
        nats, and whether each of them is the likeliest. Raises CheckFailed.
        """
        longest = max((len(tokens) for tokens, _ in requests), default=0)
        if longest - 1 > self._cells:
            raise CheckFailed(f"a request has {longest} tokens, and the cache holds {self._cells}")
        most = min(self._cells, max(BATCH, 2 * longest))  # attention looks at all cells in use: keep them few
        tree, members = Tree(self._share), list[int]()
        for i in sorted(range(len(requests)), key=lambda i: list(requests[i][0][:-1])):
            tokens, scored = requests[i]
            if tree.count and (tree.count == SEQUENCES or tree.nodes_with(tokens[:-1]) > most):
                yield self._compute(tree, members)
                tree, members = Tree(self._share), []
            tree.add(i, tokens, scored)
            members.append(i)
        if members:
            yield self._compute(tree, members)

    def _compute(self, tree: Tree, members: list[int]) -> list[tuple[int, float, bool]]:
        """Run a tree of requests, whose numbers are `members`."""
        totals, greedy = dict.fromkeys(members, 0.0), dict.fromkeys(members, True)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        for nodes in tree.batches(BATCH, self._outputs):
            wanted = [node for node in nodes if node in tree.targets]
            for node, row in zip(wanted, self._decode(tree, nodes, len(wanted))):
                best = int(row.argmax())
                total = float(np.log(np.exp(row - row[best]).sum(dtype=np.float64)))
                for request, token in tree.targets[node]:
                    logprob = float(row[token]) - float(row[best]) - total
                    if not np.isfinite(logprob):
                        raise CheckFailed("the model's probabilities are not numbers")
                    totals[request] += logprob
                    greedy[request] &= token == best
        return [(i, totals[i], greedy[i]) for i in members]

    def _decode(self, tree: Tree, nodes: range, outputs: int) -> np.ndarray:
        """llama_decode on some nodes: the logits, float32 (outputs, vocabulary), of those with targets. Valid until the next call."""
        ffi, lib, n = self._ffi, self._lib, len(nodes)
        part = slice(nodes.start, nodes.stop)
        counts = np.array([len(s) for s in tree.sequences[part]], np.int32)
        flat = np.array([s for sequences in tree.sequences[part] for s in sequences], np.int32)
        places = (flat.ctypes.data + 4 * (np.cumsum(counts) - counts)).astype(np.uintp)
        arrays: dict[str, np.ndarray] = {
            "token": np.array(tree.tokens[part], np.int32),
            "pos": np.array(tree.positions[part], np.int32),
            "n_seq_id": counts,
            "seq_id": places,  # pointers into `flat`
            "logits": np.array([node in tree.targets for node in nodes], np.int8),
        }
        batch = ffi.new("struct llama_batch *")
        batch.n_tokens = n
        for name, array in arrays.items():
            setattr(batch, name, ffi.cast(ffi.typeof(getattr(batch, name)), array.ctypes.data))
        self._errors.clear()
        if code := lib.llama_decode(self._context, batch[0]):
            raise CheckFailed(f"llama_decode returns {code}: {self._why()}")
        if not outputs:
            return np.empty((0, self.vocabulary), np.float32)
        logits = ffi.buffer(lib.llama_get_logits(self._context), 4 * outputs * self.vocabulary)
        return np.frombuffer(logits, np.float32).reshape(outputs, self.vocabulary)


def _load_backends(ggml: str, directory: str) -> None:
    """Load ggml's backends if they are separate files: by itself ggml looks for them beside Python."""
    ffi = cffi.FFI()
    ffi.cdef("size_t ggml_backend_dev_count(void); void ggml_backend_load_all_from_path(const char *);")
    lib = ffi.dlopen(ggml)
    if not lib.ggml_backend_dev_count():
        lib.ggml_backend_load_all_from_path(os.fsencode(directory))


def serve() -> None:
    """Answer requests on standard input, a line of JSON each, with lines of JSON.

    The first: Scorer's arguments. Answers its facts and special tokens. Then:
    ["tokenize", [Text's fields, ...]]: the token ids of each text.
    ["score", requests as in `Scorer.score`]: what it yields, a line each, and null.
    An error is {"error"}, and the end.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is not an answer

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        scorer = Scorer(**json.loads(sys.stdin.readline()))
        answer({"trained": scorer.trained, "vocabulary": scorer.vocabulary, "length": scorer.length} | scorer.special())
        for line in sys.stdin:
            kind, wanted = json.loads(line)
            if kind == "tokenize":
                answer([scorer.split(Text(*text)) for text in wanted])
            else:
                for scores in scorer.score(wanted):
                    answer(scores)
                answer(None)
    except CheckFailed as e:
        answer({"error": str(e)})
    except Exception as e:  # no library, or another llama.h
        answer({"error": f"llama.cpp's C interface cannot be used: {type(e).__name__}: {e}"})
