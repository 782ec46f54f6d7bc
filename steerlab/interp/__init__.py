"""What a vector does: every function returns a tidy table that passes `tables.check`."""
