"""Speed and memory against diffusers on the same weights and inputs: one file a table, measured, never asserted."""
