"""HellaSwag's two forms: the hub's fields, and the finished text that llama-perplexity's files hold."""

from datasets import Dataset
from lm_eval.tasks.hellaswag import utils

FINISHED = "query", "choices", "gold"
HUB = "activity_label", "ctx_a", "ctx_b", "endings", "label"


def process_docs(dataset: Dataset) -> Dataset:
    """The rows with "query", "choices" and "gold", made by lm-eval's own code where the file has the hub's fields.

    Raises ValueError for rows of another form.
    """
    if set(FINISHED) <= set(dataset.column_names):
        return dataset
    if not set(HUB) <= set(dataset.column_names):
        found, hub, finished = map(", ".join, (dataset.column_names, HUB, FINISHED))
        raise ValueError(f"its rows have {found}; HellaSwag's have {hub}, or {finished}")
    return utils.process_docs(dataset)
