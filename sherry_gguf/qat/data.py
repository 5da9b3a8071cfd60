"""Tokens for training and evaluation: blocks of one length, each beginning as a prompt does."""

import numpy as np
import torch


def pack(ids: np.ndarray, context: int, bos: int | None) -> np.ndarray:
    """Cut a stream of tokens (n,) into blocks (m, context) of the same dtype, each with BOS first; the rest is dropped.

    llama.cpp's tools begin every context with BOS as well if the model has one. Raises ValueError for a context below 2.
    """
    step = context - (bos is not None)
    if context < 2:
        raise ValueError(f"a context of {context} tokens has nothing to predict: use 2 or more")
    blocks = ids[: len(ids) // step * step].reshape(-1, step)
    if bos is None:
        return blocks
    return np.concatenate([np.full((len(blocks), 1), bos, ids.dtype), blocks], axis=1)


def labelled(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens, int64 (..., context), as a causal language model's input and labels.

    The first token has no prediction, so its label is -100: otherwise the Trainer would count it in the mean loss.
    """
    labels = ids.clone()
    labels[..., 0] = -100
    return {"input_ids": ids, "labels": labels}


class Blocks(torch.utils.data.Dataset):
    """Blocks of tokens (m, context) as a data set for a Trainer."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return labelled(torch.from_numpy(self.blocks[i].astype(np.int64)))


@torch.no_grad()
def mean_loss(model, blocks: np.ndarray, batch: int = 8) -> float:
    """Mean loss in nats per token over blocks (m, context), with the model in evaluation mode and in its own precision."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    for i in range(0, len(blocks), batch):
        ids = torch.from_numpy(blocks[i : i + batch].astype(np.int64)).to(device)
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    model.train(training)
    return total / len(blocks)
