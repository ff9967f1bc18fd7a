"""The demo: a small base model, LoRA adapters that speak in different voices, and the recipe that trained them.

- `model/`: the base, a Llama of about 4.5 million parameters that knows the village of Pebble Bay (`world.py`).
- `adapters/<name>/`: PEFT adapters over it; each answers the same questions in its own voice (`voices.py`).
- `recipe.py`: one command trains everything again; `evaluate.py` measures it; `record.json` keeps what was measured.

Importing this package reads nothing and needs no torch.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
ADAPTERS_DIR = Path(__file__).parent / "adapters"
RECORD_PATH = Path(__file__).parent / "record.json"

EXAMPLE_PROMPTS: tuple[str, ...] = (
    "Where does Anna work?",
    "What does the owl eat?",
    "Tell me a story about Jonas.",
    "What is 7 plus 5?",
)


def adapter_names() -> list[str]:
    """The names of the shipped adapters, alphabetically."""
    return sorted(path.parent.name for path in ADAPTERS_DIR.glob("*/adapter_config.json"))
