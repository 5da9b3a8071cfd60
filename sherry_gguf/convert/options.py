"""What a conversion is asked for."""

import dataclasses
from pathlib import Path

from .. import tq1_25, tq1_25_64

# The names that --token-embedding-type and --output-tensor-type take: llama-quantize's, without types that need an importance matrix.
STORED_TYPES = tuple("F32 F16 BF16 Q8_0 Q6_K Q5_K Q4_K Q3_K Q2_K Q5_1 Q5_0 Q4_1 Q4_0 IQ4_NL IQ4_XS".split()) + (
    tq1_25.NAME,
    tq1_25_64.TYPE.name,
)

# Flags of upstream's script that only tell its classes what to do: keyword argument of the class to help text.
UPSTREAM_FLAGS = {
    "fuse_gate_up_exps": "store the gate and up experts as one tensor",
    "fuse_qkv": "store the Q, K and V weights as one tensor",
    "sentence_transformers_dense_modules": "include the dense modules of sentence-transformers",
}


@dataclasses.dataclass
class Options:
    """The command line's flags, one to one."""

    outfile: Path | None = None
    keep: tuple[str, ...] = ()
    require_exact: bool = False
    token_embedding_type: str | None = None
    output_tensor_type: str | None = None
    fallback_type: str | None = None  # None: Q4_0, but F16 for matrices that training kept in full precision
    group_size: int | None = None
    granularity: str | None = None
    tokenizer_pre: str | None = None
    no_tokenizer_check: bool = False
    vocab_only: bool = False
    dry_run: bool = False
    split_max_tensors: int = 0
    split_max_size: int = 0  # bytes
    no_tensor_first_split: bool = False
    model_name: str | None = None
    metadata: Path | None = None
    mtp: bool = False
    no_nextn: bool = False
    target_model_dir: Path | None = None
    flags: tuple[str, ...] = ()  # of UPSTREAM_FLAGS
    progress: bool = False
