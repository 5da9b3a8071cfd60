"""Compare Hugging Face checkpoints and GGUFs on lm-eval's tasks and on text.

command     the entry point; imports PyTorch and lm-eval only after the arguments have been checked
options     the arguments
measure     one run: every model on every task and the text, and the JSON report
tasks       lm-eval's tasks, from the hub, the cache or local files
text        the loss on a text, by llama-perplexity's protocol
models      lm-eval's view of a model: PyTorch runs a checkpoint, llama-server a GGUF
server      a llama-server and its HTTP interface
tools       llama.cpp's programs as child processes
comparison  differences between models, doubts about them, and the final table
"""
