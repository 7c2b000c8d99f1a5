"""Several workers of one study, on this machine or on many."""
