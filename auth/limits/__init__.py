"""What tenants and keys may use: their limits, and the admission that holds every request to them."""
