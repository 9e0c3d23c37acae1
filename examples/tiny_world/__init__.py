"""A drawn world of moving coloured shapes with captions."""
