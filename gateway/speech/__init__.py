"""What a model says -> reasoning, text and tool calls; and what it may say, as a grammar. Plain text in and out."""
