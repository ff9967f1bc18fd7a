"""LoRAX's API, as its own clients speak it: routes without a version, flat errors, times in headers."""
