"""Functions of matrices, batched, on plain tensors."""
