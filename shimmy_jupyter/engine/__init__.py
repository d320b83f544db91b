"""The room that owns native objects: one worker thread for each loaded model."""
