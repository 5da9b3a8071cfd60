"""What `train` and `finetune` share: flags and their help, text, checkpoints, progress, Ctrl-C, files that appear whole or not at all."""
