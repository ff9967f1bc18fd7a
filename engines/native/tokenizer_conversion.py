"""A checkpoint's tokenizer in any form that transformers reads (SentencePiece among them) -> its `tokenizer.json`.

    python -m loraplex.engines.native.tokenizer_conversion DIRECTORY > tokenizer.json

transformers brings torch along, so the gateway's process has this done by another one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from loraplex.engines.errors import ModelNotServable


def tokenizer_json(directory: Path) -> str:
    """Raises ModelNotServable where transformers reads no tokenizer there, or one that no `tokenizer.json` can say."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any failure of foreign code means the same: it cannot be read
        raise ModelNotServable(f"{directory}: transformers reads no tokenizer there: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelNotServable(f"{directory}: {type(tokenizer).__name__} cannot be written as a tokenizer.json")
    return str(backend.to_str())


def main() -> int:
    try:
        print(tokenizer_json(Path(sys.argv[1])))
    except ModelNotServable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
