"""OpenAI's API: one resource a file, wire structs beside their handlers."""
