"""Hidden states of the frozen encoder on disk, filled once and trained from in the place of audio."""
