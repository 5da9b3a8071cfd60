"""training.png: how loss, Arenas' λ and the monitor's figures developed."""

from __future__ import annotations

from pathlib import Path


def plot(history: list[dict], path: Path) -> None:
    """Draw what `history`, a Trainer's log, has of loss, λ, effective ranks and flips, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def draw(axis, key, label, **style):
        points = [(e["step"], e[key]) for e in history if key in e]
        if points:
            axis.plot(*zip(*points), label=label, lw=1.3, **style)

    figure, (loss, rank, flips) = plt.subplots(3, 1, figsize=(9, 9), sharex=True)
    draw(loss, "loss", "training loss")
    draw(loss, "eval_loss", "held-out loss", marker="o", ms=3)
    loss.set_ylabel("nats per token")
    if any("residual" in entry for entry in history):
        residual = loss.twinx()
        draw(residual, "residual", "λ", color="tab:green", ls="--")
        residual.set_ylabel("λ of Arenas")
    draw(rank, "gradient_rank", "of the gradients")
    draw(rank, "activation_rank", "of the layers' inputs")
    rank.set_ylabel("effective rank")
    draw(flips, "flips", "ternary values changed by a step")
    draw(flips, "sign_flips", "of these, sign changes")
    draw(flips, "near_zeroing", "groups close to another choice of the zero", ls=":")
    draw(flips, "near_sign", "latent weights close to 0", ls=":")
    flips.set_ylabel("share")
    flips.set_yscale("log")
    flips.set_xlabel("optimizer step")
    for axis in loss, rank, flips:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
