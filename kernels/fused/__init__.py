"""Element-wise steps of a layer that would each read and write a row of their own, in one pass."""
