"""Every exception that crosses modules. Each message says what is wrong, where, and what to do."""


class Stop(Exception):
    """A problem the user can fix; the message says how. Commands print it and exit with code 1."""


class ConvertError(Exception):
    """A GGUF file cannot be written, read or verified."""


class VocabularyError(Exception):
    """A GGUF cannot hold this tokenizer so that llama.cpp splits text as the checkpoint does."""


class CheckFailed(Exception):
    """llama.cpp or transformers failed to split the texts of the tokenizer check."""


class NotBuilt(FileNotFoundError):
    """A part of the patched llama.cpp is missing."""


class QuantizeError(ValueError):
    """A block cannot hold these weights.

    row: the first bad row, counted over all leading axes; cause: `blocks.NOT_FINITE` or `blocks.OVERFLOW`.
    """

    def __init__(self, row: int, cause: str):
        super().__init__(f"row {row}: {cause}")
        self.row = row
        self.cause = cause

    def __reduce__(self):
        return type(self), (self.row, self.cause)
