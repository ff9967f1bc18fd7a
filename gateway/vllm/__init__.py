"""vLLM's routes beside OpenAI's: tokens, and adapters that are loaded and unloaded."""
