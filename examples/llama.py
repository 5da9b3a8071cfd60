"""llama-cpp-python on a Sherry model: what its class Llama does, each in a few lines.

.venv/bin/python examples/llama.py build/demo/demo-TQ1_25.gguf [ADAPTER.gguf]
"""

import sys

from sherry_gguf import Llama
from sherry_gguf.llama_cpp_python import LLAMA_POOLING_TYPE_MEAN, LlamaGrammar

path, adapter = sys.argv[1], (sys.argv[2:] or [None])[0]
model = Llama(path, n_ctx=256, logits_all=True, verbose=False)  # logits_all: for log-probabilities
greedy = {"temperature": 0.0, "max_tokens": 16}

answer = model("def read(self):", **greedy)
print(f"completion: {answer['choices'][0]['text']!r}, {answer['usage']['completion_tokens']} tokens")

answer = model.create_chat_completion([{"role": "user", "content": "def write(self):"}], **greedy)
print(f"chat: {answer['choices'][0]['message']['content']!r}")

parts = [part["choices"][0]["text"] for part in model("def read(self):", stream=True, **greedy)]
print(f"streaming: {parts}")

grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
answer = model("Is it?", grammar=grammar, **greedy)
print(f"grammar: {answer['choices'][0]['text']!r}")

likely = model("import", logprobs=3, temperature=0.0, max_tokens=1)["choices"][0]["logprobs"]
print(f"log-probabilities: { ({token: round(float(p), 3) for token, p in likely['top_logprobs'][0].items()}) }")

*tokens, last = model.tokenize(b"class Reader:")
model.reset()
model.eval(tokens)
state = model.save_state()  # all that the model has read, to go on from there again
for text in "def close(self):", "class Reader:":
    print(f"meanwhile: {model(text, **greedy)['choices'][0]['text']!r}")
model.load_state(state)
more = [token for token, _ in zip(model.generate([last], temp=0.0, reset=False), range(16))]
print(f"saved state: {model.detokenize(more).decode(errors='ignore')!r}")

with_vectors = Llama(path, n_ctx=256, embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN, verbose=False)
vector = with_vectors.embed("a text")
print(f"embeddings: {len(vector)} numbers, the first {vector[0]:.4f}")

if adapter:  # sherry-gguf convert-adapter makes one
    adapted = Llama(path, n_ctx=256, lora_path=adapter, verbose=False)
    print(f"LoRA: {adapted('def read(self):', **greedy)['choices'][0]['text']!r}")
